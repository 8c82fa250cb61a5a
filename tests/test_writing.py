"""makeshards.py: the same bytes from any number of workers, whatever stops a run on the way, and what it tells."""

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

TRAIN, VAL = 240, 60
OPTIONS = ("--maxcount", 6, "--resize", 24, "--workers", 3)  # 40 and 10 shards
FINISHED = ["train: 40 shards, 240 samples", "val: 10 shards, 60 samples"]
PROC = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc, by which to find the workers")
FORK = pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="workers are not forked")

# Importing PyTorch takes seconds, and here are a hundred runs: this process imports it once, and forks for each run.
# What a child then does is the command itself, in a session of its own; with "log", the main process and its workers
# write down what they do to files, and with "die" the main process kills itself before the nth of these acts.
SERVER = """
import atexit, json, os, resource, runpy, signal, sys
@atexit.register  # it runs last, and spares a child the second that taking PyTorch down takes
def leave():
    if job:
        sys.stdout.flush()
        os._exit(result)
job, result = None, 1
import PIL.JpegImagePlugin, torchvision.datasets, tqdm, webdataset
from concurrent.futures import ProcessPoolExecutor
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "poll" in job:
        pid, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        break
    job = None
else:
    sys.exit()
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(job["cwd"])
flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), os.open("stdout", flags), os.open("stderr", flags))):
    os.dup2(file, number)
if job["limit"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
acts, main = 0, os.getpid()
def watched(name, act):
    def wrapper(what, *rest):
        global acts
        if os.getpid() == main:
            acts += 1
            if acts == job["die"]:
                os.kill(main, signal.SIGKILL)
        if job["log"]:
            done = [name, os.stat(what).st_ino, *map(os.path.basename, rest)]
            with open("log", "ab", 0) as file:
                file.write(json.dumps(done).encode() + b"\\n")
        return act(what, *rest)
    return wrapper
if job["die"] or job["log"]:
    os.fsync, os.replace, os.unlink = (watched(act.__name__, act) for act in (os.fsync, os.replace, os.unlink))
sys.argv[1:] = job["args"]
try:
    runpy.run_path(job["script"], run_name="__main__")
except SystemExit as end:
    result = end.code or 0
    raise
"""


class Server:
    def __init__(self):
        environment = {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
        command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout.readline() == "ready\n"
        self.runs = []

    def ask(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        for one in self.runs:
            if one.poll() is None:
                os.kill(one.pid, signal.SIGKILL)
            for pid in one.processes():
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(60)


class Run:
    """A run of makeshards.py in a folder with data/, in a session and process group of its own."""

    def __init__(self, server, cwd, *args, name="run", limit=0, die=0, log=False):
        self.server, self.cwd, self.status = server, cwd / name, None
        self.cwd.mkdir(exist_ok=True)
        args = ["--data", str(cwd / "data"), "--shards", str(cwd / "shards"), *map(str, args)]
        job = {"script": str(ROOT / "makeshards.py"), "cwd": str(self.cwd), "args": args}
        self.pid = server.ask(**job, limit=limit, die=die, log=log)
        server.runs.append(self)

    def poll(self):
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def processes(self):
        """The run's own that still live, without zombies; none where there is no /proc."""
        found = []
        for name in os.listdir("/proc") if os.path.isdir("/proc/self/task") else ():
            with contextlib.suppress(OSError):
                if name.isdigit() and os.getpgid(int(name)) == self.pid:
                    with open(f"/proc/{name}/stat") as file:
                        if file.read().rpartition(")")[2].split()[0] not in "ZX":
                            found.append(int(name))
        return sorted(found)

    def wait(self, status=0):
        """(stdout, stderr) once it has ended with that status, and its workers soon after."""
        until(lambda: self.poll() is not None)
        out, err = ((self.cwd / name).read_text() for name in ("stdout", "stderr"))
        assert self.status == status, f"status {self.status}\n{out}\n{err}"
        until(lambda: not self.processes(), timeout=10)
        assert status or not err, err
        return out, err

    def error(self, status=2):
        """The one line with which it ended."""
        line = self.wait(status)[1]
        assert re.fullmatch(r"makeshards\.py: [^\n]+\n", line), line
        return line

    def kill(self):
        """kill -9 of the main process alone; the status, which is another if it had ended by itself."""
        os.kill(self.pid, signal.SIGKILL)  # not yet waited for by the server, so it is no other process
        until(lambda: self.poll() is not None)
        until(lambda: not self.processes(), timeout=10)
        return self.status

    def reach(self, count):
        """Wait until this many shards are there; the run goes on."""
        folder = self.cwd.parent / "shards"
        until(lambda: len(shards(folder)) >= count or self.poll() is not None)
        assert self.poll() is None, "it ended too early to be stopped"


def until(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.002)


def shards(folder):
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"imagenet-(train|val)-\d{6}\.tar", name))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder, *leaving):
    """{name: (bytes, time of the last change)} of all files in the folder, but those with such an ending."""
    files = [path for path in folder.iterdir() if not path.name.endswith(leaving)]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def digests(folder):
    """{name: sha256} of all files in the folder, hidden ones too."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def check_stopped(folder, wanted):
    """After a stop: each shard that is there is complete and in a plan or the index; the index names no other."""
    there = {name: sha256(folder / name) for name in shards(folder)}
    assert there.items() <= wanted.items()
    known = set()
    for name in (".train.json", ".val.json", "_info.json"):
        if (folder / name).exists():
            for entry in json.loads((folder / name).read_text())["splits"].values():
                known |= set(entry["filenames"])
                if name == "_info.json":
                    assert dict(zip(entry["filenames"], entry["shard_sha256"], strict=True)).items() <= there.items()
    assert there.keys() <= known
    return len(there)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """data/ with three classes of small files; the training image in the middle of the order is a large file."""
    folder, rng, order = tmp_path_factory.mktemp("many"), np.random.default_rng(0), list(range(TRAIN))
    random.Random(0).shuffle(order)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            path = folder / "data" / split / "abc"[3 * i // count] / f"{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
            if (split, i) == ("val", 0):  # so that with --check and --resize another shard is done before the first
                image = image.resize((1500, 1000))
            image.save(path)
            if (split, i) == ("train", order[TRAIN // 2]):
                path.write_bytes(path.read_bytes() + bytes(1 << 20))
    return folder


@pytest.fixture
def place(many, tmp_path):
    """A folder with the images in data/, and an empty shards/."""
    (tmp_path / "data").symlink_to(many / "data")
    (tmp_path / "shards").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def finished(server, many, tmp_path_factory):
    """The shards/ of an uninterrupted run with OPTIONS."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").symlink_to(many / "data")
    (folder / "shards").mkdir()
    out, _ = Run(server, folder, *OPTIONS).wait()
    assert out.splitlines() == [f"{line} written" for line in FINISHED]
    assert sorted(os.listdir(folder / "shards")) == ["_info.json", *shards(folder / "shards")]
    return folder / "shards"


@pytest.fixture(scope="module")
def wanted(finished):
    return digests(finished)


# ---------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("resize", [(), ("--resize", 24)], ids=["plain", "resize"])
def test_the_same_bytes_from_any_number_of_workers(resize, server, place):
    """Of the shards and of the index; by the command as it is typed, and again."""
    options = ("--seed", 3, "--maxcount", 25, *resize)
    run("makeshards.py", *options, cwd=place)
    found = digests(place / "shards")
    for workers, *check in ((1,), (2,), (5,), (1, "--check"), (5, "--check")):
        shutil.rmtree(place / "shards")
        (place / "shards").mkdir()
        Run(server, place, *options, "--workers", workers, *check).wait()
        assert digests(place / "shards") == found, (workers, check)
    names = [f"imagenet-{split}-{i:06d}.tar" for split, count in (("train", 10), ("val", 3)) for i in range(count)]
    assert sorted(found) == ["_info.json", *names]
    index = json.loads((place / "shards/_info.json").read_text())
    of_index = [sha for entry in index["splits"].values() for sha in entry["shard_sha256"]]
    assert of_index == [found[name] for name in names]
    keys = {"train": [], "val": []}
    for name in names:
        with tarfile.open(place / "shards" / name) as shard:
            keys[name.split("-")[1]] += [int(member[:-4]) for member in shard.getnames() if member.endswith(".cls")]
    order = list(range(TRAIN))
    random.Random(3).shuffle(order)
    assert keys == {"train": order, "val": list(range(VAL))}


# ---------------------------------------------------------------------------- stopped on the way


def test_ten_kills_at_random_moments(server, place):
    """kill -9, and the same command again, which may be killed too: in the end the bytes of an uninterrupted run."""
    options, folder = ("--maxcount", 2, "--resize", 24, "--workers", 3), place / "shards"
    start = time.monotonic()
    Run(server, place, *options).wait()
    seconds, wanted = time.monotonic() - start, digests(folder)
    rng, kills, between, earlier = random.Random(7), 0, set(), 0
    shutil.rmtree(folder)
    for _ in range(100):
        folder.mkdir(exist_ok=True)
        one = Run(server, place, *options)
        time.sleep(rng.uniform(0, seconds))
        if one.kill() == -signal.SIGKILL:
            kills += 1
            between.add(check_stopped(folder, wanted))
            continue
        out, _ = one.wait()
        earlier += "of the shards earlier" in out
        assert digests(folder) == wanted
        if kills >= 10 and earlier and len(between - {0, 150}) >= 5:
            break
        shutil.rmtree(folder)
    else:
        pytest.fail(f"{kills} kills, with so many shards there: {sorted(between)}; {seconds} seconds")


def test_killed_before_each_of_its_acts(server, place):
    """Before each fsync, rename and removal of the main process: whatever is there then is known to the next run."""
    options, ends = ("--maxcount", 120, "--workers", 2), []
    Run(server, place, *options).wait()
    wanted = digests(place / "shards")
    for act in range(1, 100):
        shutil.rmtree(place / "shards")
        (place / "shards").mkdir()
        one = Run(server, place, *options, die=act)
        until(lambda: one.poll() is not None)  # noqa: B023
        if one.status == 0:
            break
        one.wait(-signal.SIGKILL)
        stage = check_stopped(place / "shards", wanted)
        out, _ = Run(server, place, *options).wait()
        ends.append((stage, "earlier" in out, "already there" in out))
        assert digests(place / "shards") == wanted, act
    assert len(ends) >= 10 and {stage for stage, _, _ in ends} == {0, 2, 3}
    assert any(there for _, _, there in ends)


@FORK
def test_on_disk_before_it_has_its_name(server, place):
    """Each file is flushed before it is renamed, and the folder after the shards' renames and before the index's."""
    Run(server, place, *OPTIONS, log=True).wait()
    folder, flushed, renamed, waiting = (place / "shards").stat().st_ino, set(), [], set()
    for line in (place / "run/log").read_text().splitlines():
        act, inode, *target = json.loads(line)
        if act == "fsync":
            flushed.add(inode)
            waiting -= waiting if inode == folder else set()
        if act == "replace":
            assert inode in flushed, target
            assert target != ["_info.json"] or not waiting
            flushed.remove(inode)
            renamed += target
            waiting |= set(target)
    assert sorted(name for name in renamed if name.endswith(".tar")) == shards(place / "shards")
    assert renamed.count("_info.json") == 2 and renamed[-1] == "_info.json"


def test_what_is_seen_while_it_runs(server, place, wanted):
    """A shard is complete as soon as it is there; the plan is there until the index is, and the index comes last."""
    folder, seen, journals = place / "shards", set(), set()
    one = Run(server, place, *OPTIONS)
    while one.poll() is None:
        for name in set(shards(folder)) - seen:
            assert sha256(folder / name) == wanted[name]
            seen.add(name)
            journal = f".{name.split('-')[1]}.json"
            if (folder / journal).exists():
                journals.add(journal)
            else:  # the split is finished
                index = json.loads((folder / "_info.json").read_text())
                assert {".train.json": "train", ".val.json": "validation"}[journal] in index["splits"]
        if not (folder / "imagenet-train-000039.tar").exists():
            assert not (folder / "_info.json").exists() or len(shards(folder)) >= 40
    one.wait()
    assert journals == {".train.json", ".val.json"} and len(seen) > 20
    assert digests(folder) == wanted  # no plan any more


def test_ctrl_c(server, place, wanted):
    """One line, status 130 and no half of anything, at any moment; the same command goes on."""
    for count in (1, 10, 25, 42):
        one = Run(server, place, *OPTIONS)
        one.reach(count)
        os.killpg(one.pid, signal.SIGINT)
        assert "interrupted; run it again" in one.error(130)
        assert check_stopped(place / "shards", wanted) >= count
        assert not list((place / "shards").glob("*.tmp"))
    out, _ = Run(server, place, *OPTIONS).wait()
    assert out.splitlines()[0] == f"{FINISHED[0]} already there" and "of the shards earlier" in out.splitlines()[1]
    assert digests(place / "shards") == wanted


@PROC
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_is_killed(number, server, place, wanted):
    one = Run(server, place, *OPTIONS)
    one.reach(4)
    os.kill(one.processes()[-1], number)
    assert "a worker was killed" in one.error() and "run it again" in one.error()
    assert check_stopped(place / "shards", wanted) >= 4
    assert not list((place / "shards").glob("*.tmp"))
    out, _ = Run(server, place, *OPTIONS).wait()
    assert re.match(rf"{FINISHED[0]} written, \d+ of the shards earlier\n", out)
    assert digests(place / "shards") == wanted


def test_the_disk_is_full(server, place):
    """A limit on the size of files stands for it: of the shards, the one in the middle is too large."""
    options = ("--maxcount", 6, "--workers", 3, "--splits", "train")
    message = Run(server, place, *options, limit=1 << 18).error()
    assert "imagenet-train-0000" in message and "run this again to resume" in message
    left = digests(place / "shards")
    assert 1 <= len(shards(place / "shards")) < 40 and left.keys() == {
        ".train.json",
        ".train.sha256",
        *shards(place / "shards"),
    }
    out, _ = Run(server, place, *options).wait()
    assert out == f"{FINISHED[0]} written, {len(left) - 2} of the shards earlier\n"
    found = digests(place / "shards")
    assert len(found) == 41 and all(found[name] == left[name] for name in shards(place / "shards") if name in left)
    shutil.rmtree(place / "shards")
    (place / "shards").mkdir()
    Run(server, place, *options).wait()
    assert found == digests(place / "shards")


def test_no_room_for_the_plan(server, place):
    """The same if it is the plan that can't be written: nothing of it is left either."""
    options = ("--maxcount", 1, "--workers", 3, "--splits", "train")  # each shard is of 10240 bytes
    assert "shards/.train.json: can't be written" in Run(server, place, *options, limit=10240).error()
    assert os.listdir(place / "shards") == []


# ---------------------------------------------------------------------------- the same command again


def test_damaged_shards_are_written_anew(server, place, finished, wanted):
    """A byte that is another, a cut and a missing file; the others are read, and left as they are."""
    folder = place / "shards"
    folder.rmdir()
    shutil.copytree(finished, folder)
    before = content(folder)
    paths = [folder / f"imagenet-train-{i:06d}.tar" for i in (0, 17, 39)]
    for path, damage in zip(paths, ("flip", "cut", "remove"), strict=True):
        data, times = bytearray(path.read_bytes()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10240])
        os.utime(path, ns=times)  # so that nothing but its bytes tells
        if damage == "remove":
            path.unlink()
    out, _ = Run(server, place, *OPTIONS).wait()
    assert out.splitlines() == [f"{FINISHED[0]} written, 37 of the shards earlier", f"{FINISHED[1]} already there"]
    assert digests(folder) == wanted
    after = content(folder)
    changed = {name for name, (_, changed) in after.items() if changed != before[name][1]}
    assert changed >= {path.name for path in paths} and changed <= {path.name for path in paths} | {"_info.json"}
    out, _ = Run(server, place, *OPTIONS).wait()
    assert out.splitlines() == [f"{line} already there" for line in FINISHED]
    assert content(folder) == after


def test_a_run_of_another_plan_is_not_continued(server, place, many):
    """Neither while the training shards are being written, nor the others: the difference is named."""
    for name in ("more", "renamed"):
        shutil.copytree(many / "data", place / name, copy_function=os.link)
        for split in ("train", "val"):
            path = place / name / split / "a/000.jpg"  # its key is the next one's then
            (os.link if name == "more" else os.rename)(path, path.with_name("other.jpg"))
    cases = [
        (("--seed", 1), "seed: 0 then, 1 now"),
        (("--maxcount", 7), "maxcount: 6 then, 7 now"),
        (("--resize", 25), "resize: 24 then, 25 now"),
        (("--quality", 80), "quality: 90 then, 80 now"),
        (("--filekey",), "filekey: off then, True now"),
        (("--data", place / "more"), "images: {} then, {} now"),
        (("--data", place / "renamed"), "other files"),
    ]
    for split, count, images in (("train", 3, TRAIN), ("val", 42, VAL)):
        one = Run(server, place, *OPTIONS)
        one.reach(count)
        assert one.kill() == -signal.SIGKILL
        before = content(place / "shards", ".tmp")
        assert f".{split}.json" in before
        for options, difference in cases:
            message = Run(server, place, *OPTIONS, "--splits", split, *options).error()
            assert f"its {split} shards were written with other options or images" in message
            assert f"({difference.format(images, images + 1)})" in message, message
            assert content(place / "shards", ".tmp") == before


def test_two_at_once(server, place):
    """The second is refused at once, and goes on once the first has been killed."""
    options = ("--maxcount", 1, "--resize", 24, "--workers", 3)
    first = Run(server, place, *options, name="first")
    first.reach(1)
    os.killpg(first.pid, signal.SIGSTOP)
    for more in ((), ("--seed", 1)):
        message = Run(server, place, *options, *more, name="second").error()
        assert "another run is writing to it; wait until it has ended" in message
    os.kill(first.pid, signal.SIGKILL)
    os.killpg(first.pid, signal.SIGCONT)  # so that its workers can end
    assert first.kill() == -signal.SIGKILL
    out, _ = Run(server, place, *options, name="second").wait()
    assert re.match(r"train: 240 shards, 240 samples written, \d+ of the shards earlier\n", out)
    out, _ = Run(server, place, "--verify").wait()
    assert out.endswith("no problems found\n")


def test_a_run_that_is_refused_leaves_files_alone(server, place):
    """Of what another run is writing."""
    lock, theirs = os.open(place / "shards", os.O_RDONLY), place / "shards/imagenet-train-000000.tar.tmp"
    fcntl.flock(lock, fcntl.LOCK_EX)
    theirs.write_text("half of it")
    assert "another run is writing" in Run(server, place, *OPTIONS).error()
    assert os.listdir(place / "shards") == [theirs.name]
    os.close(lock)


# ---------------------------------------------------------------------------- progress


def test_quiet_within_the_first_minute(small, tmp_path):
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "shards").mkdir()
    out, err = run("makeshards.py", "--maxcount", 10, cwd=tmp_path)
    assert out.splitlines() == ["train: 8 shards, 80 samples written", "val: 3 shards, 30 samples written"]
    assert err == ""


def test_a_bar_on_a_terminal(small, tmp_path):
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "shards").mkdir()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command, shown = [sys.executable, str(ROOT / "makeshards.py")], io.BytesIO()
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO at its end on Linux
            while data := os.read(ours, 4096):
                shown.write(data)
        os.close(ours)
        out = process.stdout.read()
    assert process.returncode == 0 and len(out.splitlines()) == 2
    for split, count in (("train", 80), ("val", 30)):
        assert re.search(rf"{split}: 100%\|.*\| {count}/{count} \[.* images/s\]", shown.getvalue().decode())
