"""makeshards.py writes the same bytes with any number of workers and after any interruption."""

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import ROOT, error_of, run, wait_until
from make_data import picture, read_tar
from PIL import Image

TRAIN, VAL = 240, 60
WORKERS = 3
OPTIONS = ("--maxcount", 6, "--resize", 24, "--workers", WORKERS)  # 40 training and 10 validation shards
FINISHED = ["train: 40 shards, 240 samples", "val: 10 shards, 60 samples"]
INTERRUPTIBLE = "tests/interrupt_writing.py"  # makeshards.py, stopped at a chosen point


def shards(folder):
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r"imagenet-(train|val)-\d{6}\.tar", name))


def content(folder, *excluded):
    """{name: (bytes, modification time)} of the files in a folder, except those with one of these endings."""
    files = [path for path in folder.iterdir() if not path.name.endswith(excluded)]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def digests(folder):
    """{name: SHA-256} of all files in a folder, including hidden ones."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def splits_of(path):
    """The splits of an index or plan, or none if there is no such file."""
    return json.loads(path.read_text())["splits"] if path.exists() else {}


def check_interrupted(folder, wanted):
    """Every shard is complete; the index names only complete splits, and the other shards are in a plan.

    Returns the number of shards.
    """
    found = digests(folder)
    there = {name: found[name] for name in shards(folder)}
    assert there.items() <= wanted.items()
    index = splits_of(folder / "_info.json")
    assert index or "_info.json" not in found
    known = set()
    for entry in index.values():
        assert dict(zip(entry["filenames"], entry["shard_sha256"], strict=True)).items() <= there.items()
        known |= set(entry["filenames"])
    for name in (".train.json", ".val.json"):
        for entry in splits_of(folder / name).values():
            known |= set(entry["filenames"])
    assert there.keys() <= known
    return len(there)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """data/ with three classes of small images. One in the middle of the shuffled training images is a large file."""
    folder = tmp_path_factory.mktemp("many")
    noise = random.Random(0)
    order = list(range(TRAIN))
    random.Random(0).shuffle(order)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            path = folder / "data" / split / "abc"[3 * i // count] / f"{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.frombytes("RGB", (40, 30), noise.randbytes(3600))
            if split == "val" and i == 0:  # slow to decode, so that the first shard is not the first to be complete
                image = image.resize((1500, 1000))
            padding = 1 << 20 if split == "train" and i == order[TRAIN // 2] else 0
            path.write_bytes(picture(image) + bytes(padding))
    return folder


@pytest.fixture
def place(many, tmp_path):
    """The test's folder, with the images in data/ and an empty shards/."""
    (tmp_path / "data").symlink_to(many / "data")
    (tmp_path / "shards").mkdir()
    return tmp_path


@pytest.fixture
def begin(start):
    """A function that starts a run which stops for a signal once `count` shards are in place, and waits until then."""

    def begin(count, *options):
        writing = start(*options, script=INTERRUPTIBLE, env={"HOLD_AT": count})
        wait_until(lambda: len(shards(writing.cwd / "shards")) >= count, writing.output)
        return writing

    return begin


def uninterrupted(place, *options):
    """{name: SHA-256} of what a run with these options writes."""
    folder = place / "uninterrupted"
    folder.mkdir()
    run("makeshards.py", *options, "--shards", folder, cwd=place)
    return digests(folder)


@pytest.fixture(scope="module")
def finished(many, tmp_path_factory):
    """The shards/ of an uninterrupted run with OPTIONS."""
    folder = tmp_path_factory.mktemp("finished")
    stdout, stderr = run("makeshards.py", *OPTIONS, "--shards", folder, cwd=many)
    assert stdout.splitlines() == [f"{line} written" for line in FINISHED]
    assert stderr == ""  # no progress bar unless it is a terminal
    assert sorted(os.listdir(folder)) == ["_info.json", *shards(folder)]
    return folder


@pytest.fixture(scope="module")
def wanted(finished):
    return digests(finished)


# ---------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("resize", [(), ("--resize", 24)], ids=["original", "resized"])
def test_bytes_do_not_depend_on_workers(resize, place):
    """Neither those of the shards nor of the index. --check changes no byte either."""
    options = ("--seed", 3, "--maxcount", 25, *resize)
    wanted = uninterrupted(place, *options)
    for workers, *check in ((1,), (2, "--check"), (5,), (5, "--check")):
        shutil.rmtree(place / "shards")
        (place / "shards").mkdir()
        run("makeshards.py", *options, "--workers", workers, *check, cwd=place)
        assert digests(place / "shards") == wanted, (workers, check)
    names = [f"imagenet-{split}-{i:06d}.tar" for split, count in (("train", 10), ("val", 3)) for i in range(count)]
    assert sorted(wanted) == ["_info.json", *names]
    index = splits_of(place / "shards/_info.json")
    in_index = [digest for entry in index.values() for digest in entry["shard_sha256"]]
    assert in_index == [wanted[name] for name in names]
    keys = {"train": [], "val": []}
    for name in names:
        members = [member for member, _ in read_tar(place / "shards" / name)]
        keys[name.split("-")[1]] += [int(member[:-4]) for member in members if member.endswith(".cls")]
    order = list(range(TRAIN))
    random.Random(3).shuffle(order)
    assert keys == {"train": order, "val": list(range(VAL))}


# ---------------------------------------------------------------------------- interrupted runs


@pytest.mark.slow
def test_kill_9_after_some_shards(begin, place):
    options = ("--maxcount", 2, "--resize", 24, "--workers", WORKERS)  # 150 shards
    wanted = uninterrupted(place, *options)
    draw = random.Random(7)
    for count in sorted(draw.sample(range(140), 10)):
        writing = begin(count, *options)
        writing.kill(signal.SIGKILL).finish(-signal.SIGKILL, lines=None)
        check_interrupted(place / "shards", wanted)
    stdout, _ = run("makeshards.py", *options, cwd=place)
    assert "of the shards by an earlier run" in stdout
    assert digests(place / "shards") == wanted


@pytest.mark.slow
def test_kill_9_before_each_flush_rename_and_removal(start, place):
    options = ("--maxcount", 120, "--workers", 2)  # two training shards and one validation shard
    logged = start(*options, script=INTERRUPTIBLE, env={"LOG": "log"})
    logged.finish()
    wanted = digests(place / "shards")
    calls = [json.loads(line) for line in (place / "log").read_text().splitlines()]
    by_main_process = sum(pid == logged.pid for pid, *_ in calls)
    assert by_main_process >= 10
    stages = set()
    for number in range(1, by_main_process + 1):
        shutil.rmtree(place / "shards")
        (place / "shards").mkdir()
        start(*options, script=INTERRUPTIBLE, env={"KILL_AT": number}).finish(-signal.SIGKILL, lines=None)
        stages.add(check_interrupted(place / "shards", wanted))
        run("makeshards.py", *options, cwd=place)
        assert digests(place / "shards") == wanted, number
    assert stages == {0, 2, 3}


def test_files_are_flushed_before_they_are_renamed(start, place):
    """And the folder is flushed after the shards are renamed and before the index is, which comes last."""
    start(*OPTIONS, script=INTERRUPTIBLE, env={"LOG": "log"}).finish()
    folder = (place / "shards").stat().st_ino
    flushed = set()
    renamed = []
    not_in_flushed_folder = set()
    for line in (place / "log").read_text().splitlines():
        _, call, inode, *names = json.loads(line)
        if call == "fsync" and inode == folder:
            not_in_flushed_folder.clear()
        elif call == "fsync":
            flushed.add(inode)
        elif call == "replace":
            assert inode in flushed, names
            flushed.remove(inode)
            if names == ["_info.json"]:
                assert not not_in_flushed_folder
            not_in_flushed_folder.update(names)
            renamed += names
    assert sorted(name for name in renamed if name.endswith(".tar")) == shards(place / "shards")
    assert renamed.count("_info.json") == 2 and renamed[-1] == "_info.json"


def test_ctrl_c(begin, place, wanted):
    for count in (1, 10, 25, 42):
        writing = begin(count, *OPTIONS)
        _, (line,) = writing.kill(signal.SIGINT, group=True).finish(130, lines=1)
        assert line.startswith("makeshards.py: interrupted")
        assert check_interrupted(place / "shards", wanted) >= count
        assert not list((place / "shards").glob("*.tmp"))
    stdout, _ = run("makeshards.py", *OPTIONS, cwd=place)
    assert stdout.splitlines()[0] == f"{FINISHED[0]} already there"
    assert "of the shards by an earlier run" in stdout.splitlines()[1]
    assert digests(place / "shards") == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_worker(number, begin, place, wanted):
    writing = begin(4, *OPTIONS)
    worker = max(pid for pid, parent in writing.alive().items() if parent == writing.pid)
    os.kill(worker, number)
    _, (line,) = writing.finish(2, lines=1)
    assert line.startswith("makeshards.py: a worker was killed")
    assert check_interrupted(place / "shards", wanted) >= 4
    assert not list((place / "shards").glob("*.tmp"))
    stdout, _ = run("makeshards.py", *OPTIONS, cwd=place)
    assert re.match(rf"{FINISHED[0]} written, \d+ of the shards by an earlier run\n", stdout)
    assert digests(place / "shards") == wanted


def test_full_disk(start, place):
    """The shard in the middle does not fit; the complete ones are kept."""
    options = ("--maxcount", 6, "--workers", WORKERS, "--splits", "train")
    wanted = uninterrupted(place, *options)
    folder = place / "shards"
    _, (line,) = start(*options, script=INTERRUPTIBLE, env={"FILE_SIZE": 1 << 18}).finish(2, lines=1)
    assert re.match(r"makeshards\.py: \./shards/imagenet-train-0000\d\d\.tar: can't be written", line)
    left = content(folder)
    complete = shards(folder)
    assert 1 <= len(complete) < 40
    assert left.keys() == {".train.json", ".train.sha256", *complete}
    stdout, _ = run("makeshards.py", *options, cwd=place)
    assert stdout == f"{FINISHED[0]} written, {len(complete)} of the shards by an earlier run\n"
    assert digests(folder) == wanted
    after = content(folder)
    assert all(after[name] == left[name] for name in complete)


def test_full_disk_when_the_plan_is_written(start, place):
    options = ("--maxcount", 1, "--workers", WORKERS, "--splits", "train")
    size_of_a_shard = 10240
    _, (line,) = start(*options, script=INTERRUPTIBLE, env={"FILE_SIZE": size_of_a_shard}).finish(2, lines=1)
    assert "shards/.train.json: can't be written" in line
    assert os.listdir(place / "shards") == []


# ---------------------------------------------------------------------------- the same command again


def test_damaged_shards_are_written_again(place, finished, wanted):
    """A shard with a changed byte, a truncated one and a missing one; the others are left as they are."""
    folder = place / "shards"
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    before = content(folder)
    changed, truncated, missing = (folder / f"imagenet-train-{i:06d}.tar" for i in (0, 17, 39))
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    truncated.write_bytes(truncated.read_bytes()[:-10240])
    for path in (changed, truncated):  # only the bytes differ
        os.utime(path, ns=(before[path.name][1], before[path.name][1]))
    missing.unlink()
    stdout, _ = run("makeshards.py", *OPTIONS, cwd=place)
    assert stdout.splitlines() == [
        f"{FINISHED[0]} written, 37 of the shards by an earlier run",
        f"{FINISHED[1]} already there",
    ]
    assert digests(folder) == wanted
    after = content(folder)
    rewritten = {name for name in after if after[name][1] != before[name][1]} - {"_info.json"}
    assert rewritten == {changed.name, truncated.name, missing.name}
    stdout, _ = run("makeshards.py", *OPTIONS, cwd=place)
    assert stdout.splitlines() == [f"{line} already there" for line in FINISHED]
    assert content(folder) == after


def test_other_options_or_images_do_not_resume(begin, place, many):
    """The error names the difference, and nothing is changed: while training or validation shards are incomplete."""
    for name in ("more", "renamed"):
        shutil.copytree(many / "data", place / name, copy_function=os.link)
    for split in ("train", "val"):
        first = place / "more" / split / "a/000.jpg"
        os.link(first, first.with_name("other.jpg"))
        first = place / "renamed" / split / "a/000.jpg"
        os.rename(first, first.with_name("other.jpg"))
    in_both_splits = [
        (("--maxcount", 7), "maxcount: 6 then, 7 now"),
        (("--data", "renamed"), "other files"),
    ]
    in_train = [
        *in_both_splits,
        (("--data", "more"), "images: 240 then, 241 now"),
        (("--seed", 1), "seed: 0 then, 1 now"),
        (("--resize", 25), "resize: 24 then, 25 now"),
        (("--quality", 80), "quality: 90 then, 80 now"),
        (("--filekey",), "filekey: off then, True now"),
    ]
    for split, count, cases in (("train", 3, in_train), ("val", 42, in_both_splits)):
        begin(count, *OPTIONS).kill(signal.SIGKILL).finish(-signal.SIGKILL, lines=None)
        before = content(place / "shards", ".tmp")
        assert f".{split}.json" in before
        for options, difference in cases:
            message = error_of("makeshards.py", *OPTIONS, "--splits", split, *options, cwd=place)
            assert f"its {split} shards" in message and f"({difference})" in message, message
            assert content(place / "shards", ".tmp") == before


def test_two_runs_at_once(start, place):
    """The second is refused and changes nothing, not even partial files. It resumes once the first is killed."""
    options = ("--maxcount", 1, "--resize", 24, "--workers", WORKERS)
    folder = place / "shards"
    first = start(*options, script=INTERRUPTIBLE, env={"HOLD_AT": 100}).until("^held$", WORKERS)
    before = content(folder)
    assert sum(name.endswith(".tmp") for name in before) == WORKERS
    for other in ((), ("--seed", 1)):
        assert "another run is writing to it" in error_of("makeshards.py", *options, *other, cwd=place)
        assert content(folder) == before
    first.kill(signal.SIGKILL).finish(-signal.SIGKILL, lines=None)
    stdout, _ = run("makeshards.py", *options, cwd=place)
    assert re.match(r"train: 240 shards, 240 samples written, 10\d of the shards by an earlier run\n", stdout)
    stdout, _ = run("makeshards.py", "--verify", cwd=place)
    assert stdout.endswith("no problems found\n")


# ---------------------------------------------------------------------------- progress


@pytest.mark.slow
def test_progress_bar_on_a_terminal(small, tmp_path):
    (tmp_path / "shards").mkdir()
    command = [sys.executable, str(ROOT / "makeshards.py"), "--data", str(small / "data")]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # 100 columns
    with ThreadPoolExecutor() as pool:
        shown = pool.submit(read_terminal, ours)
        try:
            done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
        finally:
            os.close(theirs)
        text = shown.result(timeout=60)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, text
    for split, count in (("train", 80), ("val", 30)):
        assert re.search(rf"{split}: 100%\|.*\| {count}/{count} ", text)


def read_terminal(fd):
    """All that is written to a terminal until it is closed."""
    chunks = []
    with contextlib.suppress(OSError):  # on Linux, EIO marks the end
        while chunk := os.read(fd, 4096):
            chunks.append(chunk)
    os.close(fd)
    return b"".join(chunks).decode()
