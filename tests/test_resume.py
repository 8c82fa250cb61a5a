"""Whatever ends a run, a signal, a failure or kill -9: it says so, it leaves nothing behind, and --resume goes on.

Most runs here are forked from one process that has imported the scripts, `python tests/test_resume.py`, so that they
take a second or two and not ten: see serve(). The others are started as a user starts them.
"""

import contextlib
import functools
import gc
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, free_port, load
from PIL import Image
from test_shards import tar

TRAIN, VAL = [30, 1, 29, 18], [40, 20]  # 78 samples: in batches of 4 a last one of 2, and for two ranks two of 3
STEPS, EPOCHS = 20, 3  # of an epoch in one process; the steps of two are half as many
ARGS = ["-a", "shufflenet_v2_x0_5", "--image-size", "32", "-p", "1", "--lr", "0.01", "--no-accel"]
WDS = [*ARGS, "-b", "4", "-j", "2", "--epochs", EPOCHS, "--seed", "1"]
RESUME = ["--resume", "checkpoint.pth.tar"]
NAMES = ("checkpoint.pth.tar", "model_best.pth.tar")
MARK = "TEST_RESUME_RUN"  # in the environment of a run's processes: torchrun's have sessions of their own


# ---------------------------------------------------------------------------- runs that begin at once


def serve():
    """Fork a process for each request on stdin, a line of JSON, and print its number; or, asked for it, its status."""
    for script in ("main-orig.py", "main-wds.py", "makeshards.py"):
        load(script)
    with contextlib.suppress(ImportError):
        import torchcodec.decoders  # noqa: F401
    gc.freeze()  # else each fork would copy these modules' memory when it looks for garbage
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        answer = status_of(**request) if "pid" in request else os.fork()
        if answer == 0 and "pid" not in request:
            become(**request)
            return
        print(json.dumps(answer), flush=True)


def status_of(pid, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def become(script, args, cwd, env, note=False, child=False, output="."):
    """Do in this process what the command does; the ranks of --multiprocessing-distributed are forked, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
    os.setsid()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in enumerate((os.devnull, f"{output}/out", f"{output}/err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.argv = [str(ROOT / script), *args]
    mp.spawn = functools.partial(mp.start_processes, start_method="fork")
    if script == "saves":
        save_without_end(*map(int, args))
    if child:
        mp.get_context("fork").Process(target=outlive).start()
    if note:
        note_samples(load(script))
    load(script).main()


def outlive():
    """In a child that is none of the loader's: it still lives two seconds after the run has stopped, and says so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while not os.path.exists("checkpoint.pth.tar"):
        time.sleep(0.05)
    time.sleep(2)
    Path("survived").touch()


def note_samples(main_wds):
    """Each batch that a rank trains with becomes a line of seenRANK, each decoded training sample a byte of `decoded`.

    The steps take longer, those of validation too, so that a signal comes at the one at which it was meant to come.
    """
    batches = main_wds.DeviceLoader.__iter__
    shard_loader = main_wds.shard_loader

    def noted(self):
        with open(f"seen{self.args.rank}" if self.order else os.devnull, "a", buffering=1) as file:
            for images, target in batches(self):
                print(*target.tolist(), file=file)
                time.sleep(0.04)
                yield images, target

    def counted(transform, data):
        os.write(decoded, b".")
        return transform(data)

    def counting(urls, lengths, transform, *args, train=True, **options):
        transform = functools.partial(counted, transform) if train else transform
        return shard_loader(urls, lengths, transform, *args, train=train, **options)

    decoded = os.open("decoded", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    main_wds.DeviceLoader.__iter__ = noted
    main_wds.shard_loader = counting


class Server:
    """serve() in a process of its own."""

    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error,ignore:This DataLoader will create"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, text=True, **pipes)

    def start(self, **request):
        """The process that does what become() says, with this one's environment as it is now."""
        mine = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONWARNINGS")}
        return self.ask(**{**request, "env": {**mine, **request.get("env", {})}})

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Run:
    """A command in a session of its own, in the folder cwd, where its output goes to the files `out` and `err`.

    The server starts it, as become() says, or without one Python; `before` are then torchrun's arguments.
    """

    def __init__(self, script, *args, cwd, server=None, before=(), env=None, **more):
        self.cwd, self.server, self.script, self.seen = cwd, server, script, set()
        cwd.mkdir(exist_ok=True)
        for name in ("out", "err"):
            (cwd / name).write_text("")
        args = [str(arg) for arg in args]
        if server:
            self.pid = server.start(script=script, args=args, cwd=str(cwd), env=env or {}, **more)
            return
        warnings = "error::DeprecationWarning,error::FutureWarning" if before else "error"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings, MARK: str(cwd)}
        command = [sys.executable, *before, str(ROOT / script), *args]
        with open(cwd / "out", "w") as out, open(cwd / "err", "w") as err:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True)
        self.pid = self.process.pid

    def alive(self, among="[0-9]*"):
        """{id: parent's} of its processes that have not ended."""
        found = {}
        for folder in Path("/proc").glob(str(among)):
            try:
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                ours = self.pid in (int(session), int(folder.name)) or (
                    not self.server and f"{MARK}={self.cwd}\0".encode() in (folder / "environ").read_bytes()
                )
            except OSError:  # it has just ended, or is another user's
                continue
            if ours and state not in "ZX":
                found[int(folder.name)] = int(parent)
        self.seen |= set(found)
        return found

    def until(self, pattern, count=1, timeout=60):
        """Wait for as many matches in its output."""
        end = time.monotonic() + timeout
        while len(re.findall(pattern, (self.cwd / "out").read_text(), re.M)) < count:
            assert time.monotonic() < end and self.alive(self.pid), f"{pattern}\n{self.output()}"
            time.sleep(0.01)
        return self

    def output(self):
        return "\n".join((self.cwd / name).read_text() for name in ("out", "err"))

    def kill(self, number, group=False):
        self.alive()
        (os.killpg if group else os.kill)(self.pid, number)
        return self

    def finish(self, status=0, timeout=60, lines=0):
        """(stdout, lines on stderr), once it has ended like that: no traceback, no process left, no shared memory."""
        found = self.wait(timeout)
        assert found == status, f"status {found}\n{self.output()}"
        end = time.monotonic() + 8  # a worker looks for its parent each 5 s
        while self.alive():
            assert time.monotonic() < end, f"{self.alive()} are left\n{self.output()}"
            time.sleep(0.02)
        left = [name for name in os.listdir("/dev/shm") if any(str(pid) in re.split(r"\D+", name) for pid in self.seen)]
        assert not left
        out, err = (self.cwd / "out").read_text(), (self.cwd / "err").read_text()
        err = [line for line in err.splitlines() if "Terminating process" not in line]  # PyTorch's log of the others
        assert lines in (None, len(err)) and "Traceback" not in out, self.output()
        return out, err

    def wait(self, timeout):
        if self.server:
            return self.server.ask(pid=self.pid, timeout=timeout)
        return self.process.wait(timeout)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(20)
    server.process.stdout.close()


@pytest.fixture
def start(server, tmp_path):
    """Start main-wds.py, or another, in the test's folder; what a failed test leaves running is killed."""
    runs = []

    def start(*args, script="main-wds.py", cwd=tmp_path, server=server, **more):
        runs.append(Run(script, *args, cwd=cwd, server=server, **more))
        return runs[-1]

    yield start
    for pid in {pid for run in runs for pid in run.alive()}:
        os.kill(pid, signal.SIGKILL)


def ddp():
    return ["--multiprocessing-distributed", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]


def torchrun():
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


# ---------------------------------------------------------------------------- what they train with, and end with


def write_shards(folder, lengths, cut=None):
    """Shards of noise, each sample of a class of its own: its number. Of number `cut` only half the image is there."""
    folder.mkdir(exist_ok=True)
    draw, splits = random.Random(1), {}
    for split, sizes in lengths.items():
        numbers, names = itertools.count(), [f"imagenet-{split}-{i:06}.tar" for i in range(len(sizes))]
        splits[split] = {"num_samples": sum(sizes), "filenames": names, "shard_lengths": sizes}
        for name, size in zip(names, sizes, strict=True):
            members = []
            for number in itertools.islice(numbers, size):
                image = io.BytesIO()
                Image.frombytes("RGB", (40, 40), draw.randbytes(4800)).save(image, "jpeg")
                data = image.getvalue()[: 600 if (split, number) == ("train", cut) else None]
                members += [(f"n{number:03}.cls", b"%d" % number), (f"n{number:03}.jpg", data)]
            (folder / name).write_bytes(tar(members))
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("numbered") / "shards", {"train": TRAIN, "validation": VAL})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """32 training images and 8 for validation, of two classes, in folders."""
    data, draw = tmp_path_factory.mktemp("folders"), random.Random(1)
    for split, size in (("train", 16), ("val", 4)):
        for path in (data / split / name / f"{i}.jpg" for name in ("a", "b") for i in range(size)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (40, 40), draw.randbytes(4800)).save(path)
    return data


@pytest.fixture(scope="module")
def unbroken(server, shards, tmp_path_factory):
    """The folder of a whole run with these arguments, made once."""

    @functools.cache
    def run(ranks, *args):
        folder = tmp_path_factory.mktemp("unbroken")
        more = ddp() if ranks == 2 else []
        Run("main-wds.py", *args, "--shards", shards, *more, cwd=folder, server=server, note=True).finish()
        return folder

    return lambda ranks, *args: run(ranks, *map(str, args))


def checkpoint(folder, name="checkpoint.pth.tar"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    """To the bit; and no NaN, which nothing equals."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def end_alike(folder, other):
    names = [name for name in NAMES if (other / name).exists()]  # there may be no best: of 1.7 percent by chance
    return all(same(checkpoint(folder, name), checkpoint(other, name)) for name in names)


def lines(folder, rank=0):
    """The batches that a rank trained with, each as the numbers of its samples."""
    return [list(map(int, line.split())) for line in (folder / f"seen{rank}").read_text().splitlines()]


def stopped(run, number, alone=False):
    """(epoch, step) at which it stopped, which must be what its one line, its checkpoint and its batches say.

    The process that has started the ranks passes a SIGINT on to them as SIGTERM, which may come before a SIGINT that a
    terminal sends to all.
    """
    _, (line,) = run.finish(status=128 + number, lines=1)
    name = "SIGTERM" if alone else f"(?:{signal.Signals(number).name}|SIGTERM)"
    form = rf"main-wds\.py: stopped by {name}; add --resume checkpoint\.pth\.tar to continue "
    form += r"\(epoch (\d+), step (\d+)\)"
    epoch, step = map(int, re.fullmatch(form, line).groups())
    state = checkpoint(run.cwd)
    assert (state["epoch"], state["position"]["step"]) == (epoch, step)
    return epoch, step


# ---------------------------------------------------------------------------- checkpoints


def save_without_end(number, seed):
    """Checkpoints of epochs from `number` on, each second one the best; every value in them is that of the epoch."""
    main_wds, draw = load("main-wds.py"), random.Random(seed)
    net = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    net(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    for epoch in itertools.count(number):
        for tensor in (*net.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())):
            tensor.fill_(epoch)
        position = {"position": {"step": epoch}} if draw.random() < 0.3 else {}
        state = {"epoch": epoch, "best_acc1": float(epoch), "state_dict": net.state_dict(), **position}
        main_wds.save_checkpoint({**state, "optimizer": optimizer.state_dict()}, is_best=epoch % 2 == 0)
        print(epoch, flush=True)


def test_killed_while_it_writes(start, tmp_path):
    """A hundred kill -9 at random moments: both checkpoints can be read, and each is of one moment alone.

    The moments are within the time in which three checkpoints of each name are written, whatever the disk takes.
    """
    draw, epochs, unfinished = random.Random(1), {0}, 0
    for _ in range(2):  # what the server does but once is not timed
        began = time.monotonic()
        run = start(0, 0, script="saves").until("^2$")
        span = time.monotonic() - began
        run.kill(signal.SIGKILL).finish(status=-signal.SIGKILL)
    for i in range(1, 101):
        run = start(1000 * i, i, script="saves")
        time.sleep(draw.uniform(0, span))
        run.kill(signal.SIGKILL).wait(20)
        for name in NAMES:
            state = checkpoint(tmp_path, name)
            epoch = state["epoch"]
            values = [
                *state["state_dict"].values(),
                *(s["momentum_buffer"] for s in state["optimizer"]["state"].values()),
            ]
            assert len(values) == 4 and all((value == epoch).all() for value in values)
            assert state["best_acc1"] == epoch and state.get("position", {"step": epoch}) == {"step": epoch}
            assert name == "checkpoint.pth.tar" or epoch % 2 == 0
            epochs.add(epoch)
        for path in tmp_path.glob("*.partial"):
            unfinished += 1
            path.unlink()
    print(f"{len(epochs)} different checkpoints in up to {span:.3f} s each, {unfinished} times one was being written")
    assert len(epochs) > 30 and unfinished > 15


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_on_disk_before_it_counts(script, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append((a, b)), replace(a, b)))
    monkeypatch.chdir(tmp_path)
    load(script).save_checkpoint({"epoch": 1}, is_best=True)
    partial = [call[0] for call in calls[1::2]]
    assert calls[::2] == [str(tmp_path / name) for name in partial]
    assert [call[1] for call in calls[1::2]] == list(reversed(NAMES))  # else a best one that is found again is none
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_a_pickle_that_would_run_something(script, start, folders, shards, tmp_path):
    """In a checkpoint that is otherwise whole, it is refused, and not run."""
    data = [folders] if script == "main-orig.py" else ["--shards", shards]
    state = {"epoch": 1, "arch": "shufflenet_v2_x0_5", "best_acc1": 0.0, "state_dict": {}, "optimizer": Malicious()}
    torch.save({**state, "scheduler": {}}, tmp_path / "evil.tar")
    args = [arg for arg in ARGS if script == "main-wds.py" or arg not in ("--image-size", "32")]
    _, (line,) = start(*args, *data, "--resume", "evil.tar", script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --resume evil.tar: not a checkpoint of this script")
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------------------- between two epochs

BOUNDARIES = [("main-orig.py", "", 1), *(("main-wds.py", name, ranks) for name in ("orig", "wds") for ranks in (1, 2))]


@pytest.mark.parametrize("script, dataset, ranks", BOUNDARIES)
def test_resume_between_epochs(script, dataset, ranks, start, folders, shards, tmp_path):
    """Three epochs at once and one by one end alike: weights, optimizer and scheduler, the last and the best."""
    args = ["-a", "shufflenet_v2_x0_5", "-b", 16, "-j", 2, "--lr", 0.01, "--seed", 1, "--no-accel"]
    if script == "main-orig.py":
        args += [folders]
    else:
        args += ["--dataset", dataset, "--data", folders, "--shards", shards, "--image-size", 32]
    cwds = [tmp_path / "unbroken", tmp_path / "resumed"]
    for epochs, cwd in ((3, cwds[0]), *((epochs, cwds[1]) for epochs in (1, 2, 3))):
        more = [*(RESUME if (cwd / NAMES[0]).exists() else []), *(ddp() if ranks == 2 else [])]
        out, _ = start(*args, "--epochs", epochs, *more, script=script, cwd=cwd).finish()
        assert out.count(" * Acc@1") == (3 if cwd == cwds[0] else 1)
    state = checkpoint(cwds[0])
    assert state["epoch"] == 3 and state["scheduler"]["last_epoch"] == 3 and len(state["optimizer"]["state"]) > 50
    assert "position" not in state
    assert end_alike(*cwds)


# ---------------------------------------------------------------------------- in mid-epoch


def interrupted(start, args, plan, cwd):
    """The (epoch, step)s at which runs stopped that were interrupted and resumed: each (steps, signal, group) is one.

    In the end the samples that a run decodes are those that it trains with.
    """
    stops, resume = [], []
    for steps, number, group in plan:
        run = start(*args, *resume, *(ddp() if group is not None else []), cwd=cwd, note=True)
        run.until("^Epoch", count=steps).kill(number, group=bool(group))
        stops.append(stopped(run, number, alone=group is False))
        resume = RESUME
    before = sum(map(len, lines(cwd))), (cwd / "decoded").stat().st_size
    start(*args, *resume, *(ddp() if group is not None else []), cwd=cwd, note=True).finish()
    ranks = 1 if group is None else 2
    assert (cwd / "decoded").stat().st_size - before[1] == ranks * (sum(map(len, lines(cwd))) - before[0])
    return stops


def test_ten_signals(start, shards, unbroken, tmp_path):
    """At random steps of three epochs, each signal in turn: the batches and the weights are those of a run without."""
    draw, args = random.Random(2), [*WDS, "--shards", shards]
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    plan = [(draw.randint(1, 5), signals[i % 3], None) for i in range(10)]
    stops = interrupted(start, args, plan, tmp_path)
    print(stops)
    assert len(set(stops)) == 10 and stops == sorted(stops) and stops[-1][0] >= 1
    assert lines(tmp_path) == lines(unbroken(1, *WDS))
    assert end_alike(tmp_path, unbroken(1, *WDS))
    for epoch in range(EPOCHS):
        batches = lines(tmp_path)[epoch * STEPS : (epoch + 1) * STEPS]
        assert sorted(itertools.chain(*batches)) == list(range(sum(TRAIN)))
    assert lines(tmp_path)[:STEPS] != lines(tmp_path)[STEPS : 2 * STEPS]


def test_ten_signals_to_two_ranks(start, shards, unbroken, tmp_path):
    """To the process that was started, as schedulers do, or to all of them, as a terminal does."""
    draw, args = random.Random(3), [*WDS, "--shuffle", 8, "-b", 6]  # 39 samples a rank, in 13 steps
    signals = [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGUSR1, False), (signal.SIGTERM, True)]
    plan = [(draw.randint(1, 2), *signals[i % 4]) for i in range(10)]
    stops, whole = interrupted(start, [*args, "--shards", shards], plan, tmp_path), unbroken(2, *args)
    print(stops)
    assert len(set(stops)) == 10 and stops == sorted(stops) and stops[-1][0] >= 1
    for rank in (0, 1):
        assert lines(tmp_path, rank) == lines(whole, rank) and len(lines(whole, rank)) == EPOCHS * 13
    assert lines(whole, 0) != lines(whole, 1)
    assert end_alike(tmp_path, whole)


def test_ctrl_c_for_the_first_of_two_ranks(start, shards, unbroken, tmp_path):
    """SIGINT to the process that was started, and to no other."""
    args = [*WDS, "--shuffle", 8, "--epochs", 2, "-b", 8]
    interrupted(start, [*args, "--shards", shards], [(2, signal.SIGINT, False)], tmp_path)
    assert end_alike(tmp_path, unbroken(2, *args))


MORE = {
    "no workers": ["-j", 0],
    "no workers, dropout": ["-a", "squeezenet1_1", "-j", 0],
    "three workers, dropout, a small buffer": ["-a", "squeezenet1_1", "-j", 3, "--shuffle", 5],
}


@pytest.mark.parametrize("case", MORE)
def test_other_networks_and_workers(case, start, shards, unbroken, tmp_path):
    args = [*WDS, "--epochs", 1, *MORE[case]]
    interrupted(start, [*args, "--shards", shards], [(2, signal.SIGTERM, None), (3, signal.SIGINT, None)], tmp_path)
    assert lines(tmp_path) == lines(unbroken(1, *args))
    assert end_alike(tmp_path, unbroken(1, *args))


def test_without_a_seed(start, shards, tmp_path):
    """Each sample comes once in the epoch all the same; and the next epoch has an order of its own."""
    at = WDS.index("--seed")
    args = [*WDS[:at], *WDS[at + 2 :], "--epochs", 2, "--shards", shards]
    interrupted(start, args, [(5, signal.SIGTERM, None)], tmp_path)
    epochs = [list(itertools.chain(*lines(tmp_path)[i : i + STEPS])) for i in (0, STEPS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(sum(TRAIN)))] * 2
    assert epochs[0] != epochs[1]


def test_checkpoint_steps(start, shards, unbroken, tmp_path):
    """kill -9 loses no more than the steps since the last checkpoint, also where that is in mid-epoch."""
    args = [*WDS, "--shards", shards, "--checkpoint-steps", 3]
    runs = []
    for steps, resume in ((5, []), (7, RESUME)):
        runs.append(start(*args, *resume, note=True).until("^Epoch", count=steps).kill(signal.SIGKILL))
        assert runs[-1].wait(20) == -signal.SIGKILL
    assert checkpoint(tmp_path)["epoch"] == 0 and checkpoint(tmp_path)["position"]["step"] == 9
    start(*args, *RESUME, note=True).finish()
    assert end_alike(tmp_path, unbroken(1, *WDS))
    assert not any(run.alive() for run in runs)  # their workers have missed them


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_validation(ranks, start, shards, unbroken, tmp_path):
    """It ends at once, and is done again; no sample comes twice."""
    args, more = [*WDS, "--epochs", 2, *(["-b", 8] if ranks == 2 else [])], ddp if ranks == 2 else list
    run = start(*args, "--shards", shards, *more(), note=True).until(r"^Test: \[ *1/")
    run.kill(signal.SIGTERM)
    assert stopped(run, signal.SIGTERM) == (0, STEPS / ranks)
    assert " * Acc" not in run.output()
    out, _ = start(*args, "--shards", shards, *RESUME, *more(), note=True).finish()
    assert out.index("Test: ") < out.index("Epoch: [1]") and "Epoch: [0]" not in out
    assert lines(tmp_path) == lines(unbroken(ranks, *args))
    assert end_alike(tmp_path, unbroken(ranks, *args))


def test_a_signal_while_validation_starts(start, shards, unbroken, tmp_path):
    """Twenty times soon after the last training step, while the four workers of the validation loader are forked."""
    args = [*WDS, "-j", 4, "--epochs", 1]
    for i in range(20):
        cwd = tmp_path / str(i)
        run = start(*args, "--shards", shards, cwd=cwd, note=True).until(rf"^Epoch: \[0\]\[{STEPS}/")
        time.sleep(0.3 * i / 19)
        assert stopped(run.kill(signal.SIGTERM), signal.SIGTERM) == (0, STEPS)
        assert same(checkpoint(cwd), checkpoint(tmp_path / "0"))
    start(*args, "--shards", shards, *RESUME, cwd=cwd, note=True).finish()
    assert lines(cwd) == lines(unbroken(1, *args))
    assert end_alike(cwd, unbroken(1, *args))


@pytest.mark.parametrize("moment", ["^Epoch", r"^Test: \[ *1/"])
def test_two_signals_at_once(moment, start, shards):
    """One of them is reported, and the other does no harm."""
    run = start(*WDS, "--shards", shards, note=True).until(moment)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        run.kill(number)
    while run.alive():
        time.sleep(0.05)
    stopped(run, signal.SIGINT if "SIGINT" in run.output() else signal.SIGTERM)


def test_two_signals_to_the_process_that_starts_the_ranks(start, shards):
    """It waits for its ranks all the same."""
    run = start(*WDS, "--shards", shards, *ddp(), note=True).until("^Epoch", count=3).kill(signal.SIGTERM)
    time.sleep(0.2)
    stopped(run.kill(signal.SIGINT), signal.SIGTERM)


def test_only_its_own_workers_are_ended(start, shards, tmp_path):
    """Not another child of the process: that one outlives the stop by two seconds."""
    run = start(*WDS, "--shards", shards, note=True, child=True).until("^Epoch", count=3).kill(signal.SIGTERM)
    stopped(run, signal.SIGTERM)
    assert (tmp_path / "survived").exists()


# ---------------------------------------------------------------------------- while workers wait for a server


class Gate(SimpleHTTPRequestHandler):
    """Sends server.part of a training shard's bytes, and the others once server.gate is open."""

    def copyfile(self, source, outputfile):
        data = source.read()
        first = int(len(data) * (self.server.part if "train" in self.path else 1))
        with contextlib.suppress(OSError):  # the client is gone
            outputfile.write(data[:first])
            if first < len(data):
                self.server.stalled.release()
                self.server.gate.wait()
            outputfile.write(data[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def gate(tmp_path):
    """A server, of which each of four workers needs a shard of its own: 20 samples in five batches."""
    shards = write_shards(tmp_path / "shards", {"train": [20] * 4, "validation": VAL})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Gate, directory=shards)) as server:
        server.daemon_threads = True
        server.gate, server.stalled = threading.Event(), threading.Semaphore(0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.args = [*WDS, "-j", 4, "--shuffle", 0, "--shards", f"http://127.0.0.1:{server.server_port}"]
        yield server
        server.gate.set()
        server.shutdown()


def wait_for_workers(gate):
    for _ in range(4):
        assert gate.stalled.acquire(timeout=60)


def test_two_signals_within_two_seconds(gate, start):
    """Both come while the process waits for its first batch: they are one, which stops it after that batch."""
    gate.part = 0
    run = start(*gate.args, note=True)
    wait_for_workers(gate)
    run.kill(signal.SIGTERM)
    time.sleep(1)
    run.kill(signal.SIGINT)
    time.sleep(0.5)
    assert run.alive(run.pid)
    gate.gate.set()
    assert stopped(run, signal.SIGTERM) == (0, 1)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGUSR1)])
def test_a_second_signal_ends_it_at_once(numbers, gate, start, tmp_path):
    """Without a checkpoint, where no batch comes; and its workers, which wait for the server, end soon after it."""
    gate.part = 0
    run = start(*gate.args, note=True)
    wait_for_workers(gate)
    run.kill(numbers[0])
    time.sleep(2.5)
    assert run.alive(run.pid)
    run.kill(numbers[1]).finish(status=128 + numbers[1], timeout=1)
    assert not (tmp_path / "checkpoint.pth.tar").exists()


def test_a_stop_while_workers_wait(gate, start):
    """All four wait for the server as they make their third batch, while steps 5 to 8 have theirs."""
    gate.part = 0.6
    run = start(*gate.args, note=True).until("^Epoch", count=5)
    wait_for_workers(gate)
    began = time.monotonic()
    epoch, step = stopped(run.kill(signal.SIGTERM), signal.SIGTERM)
    assert epoch == 0 and 5 <= step < 8 and time.monotonic() - began < 8


# ---------------------------------------------------------------------------- with other options


@pytest.fixture(scope="module")
def stopped_at(server, shards, tmp_path_factory):
    """A folder with the checkpoint of a run that SIGTERM stopped in epoch 1."""
    folder = tmp_path_factory.mktemp("stopped")
    run = Run("main-wds.py", *WDS, "--shards", shards, cwd=folder, server=server, note=True)
    run.until(r"^Epoch: \[1\]", count=5).kill(signal.SIGTERM)
    epoch, step = stopped(run, signal.SIGTERM)
    assert epoch == 1
    return folder, step


OTHER = {
    "workers": (["-j", 3], "with --workers 2, not 3; "),
    "no workers": (["-j", 0], "with --workers 2, not 0; "),
    "batch": (["-b", 5], "with --batch-size 4, not 5; "),
    "ranks": (["-b", 8, "-j", 4], "with 1 ranks, not 2; "),
    "shuffle": (["--shuffle", 7], "with --shuffle 1000, not 7; "),
    "seed": (["--seed", 2], "with --seed 1, not 2; "),
    "fewer shards": ([], "with other shards"),
    "samples": ([], "with other shards"),
    "lengths": ([], "with other shards"),  # as many shards and samples, but divided in another way
}
LENGTHS = {"fewer shards": [30, 29, 19], "samples": [30, 1, 29, 17], "lengths": [29, 2, 29, 18]}


@pytest.mark.parametrize("case", OTHER)
def test_other_options_are_refused(case, start, shards, stopped_at, tmp_path):
    """Those with which the rest of the epoch would not be the samples that were left: by name, with both ways out."""
    folder, _ = stopped_at
    args, expected = OTHER[case]
    if case in LENGTHS:
        shards = write_shards(tmp_path / "shards", {"train": LENGTHS[case], "validation": VAL})
    args = [*WDS, "--shards", shards, "--resume", folder / "checkpoint.pth.tar", *args]
    _, (line,) = start(*args, *(ddp() if case == "ranks" else [])).finish(status=2, lines=1)
    assert line.startswith(f"main-wds.py: --resume {folder}/checkpoint.pth.tar: it stopped within an epoch, with ")
    assert expected in line and line.endswith("--start-epoch 1")


def test_moved_shards_and_more_epochs_are_not_refused(start, stopped_at, tmp_path):
    folder, step = stopped_at
    shards = write_shards(tmp_path / "moved", {"train": TRAIN, "validation": VAL})
    args = [*WDS, "--epochs", 2, "--shards", shards, "--resume", folder / "checkpoint.pth.tar"]
    out, _ = start(*args, note=True).finish()
    printed = re.findall(r"^Epoch: \[1\](\S* ?\S*/\d+\])", out, re.M)
    assert printed == [f"[{i:2}/{STEPS}]" for i in range(step + 1, STEPS + 1)]  # such as [ 6/20]
    seen = [*lines(folder)[STEPS:], *lines(tmp_path)]
    assert len(seen) == STEPS and len(lines(tmp_path)) == STEPS - step
    assert sorted(itertools.chain(*seen)) == list(range(sum(TRAIN)))


def test_start_epoch_begins_it_anew(start, shards, stopped_at, tmp_path):
    """With whatever options."""
    folder, _ = stopped_at
    args = [*WDS, "--epochs", 2, "--shards", shards, "--resume", folder / "checkpoint.pth.tar", "--start-epoch", 1]
    start(*args, "-b", 6, "-j", 1, note=True).finish()
    assert sorted(itertools.chain(*lines(tmp_path))) == list(range(sum(TRAIN)))


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_folders_begin_the_epoch_anew(script, start, folders, stopped_at, tmp_path):
    """A checkpoint of mid-epoch is one of the epoch's beginning to those who know of no other; they say so."""
    folder, step = stopped_at
    args = ["-a", "shufflenet_v2_x0_5", "-b", 8, "-j", 1, "--epochs", 2, "-p", 1, "--no-accel"]
    args += ["--resume", folder / "checkpoint.pth.tar"]
    args += [folders] if script == "main-orig.py" else ["--dataset", "orig", "--data", folders]
    out, _ = start(*args, script=script).finish()
    assert f"(epoch 1, step {step})\n" in out and "=> epoch 1 is trained again from its first step\n" in out
    assert re.findall(r"^Epoch: \[(\d)\]\[(\d/\d)\]", out, re.M) == [("1", f"{i}/4") for i in range(1, 5)]
    assert checkpoint(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_folders_at_a_signal(number, start, folders, tmp_path):
    """The checkpoint stays that of the last whole epoch."""
    args = ["--dataset", "orig", "--data", folders, *WDS]
    run = start(*args, note=True).until(r"^Epoch: \[1\]")
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    _, (line,) = run.until("^Epoch", count=8 + 3).kill(number).finish(status=128 + number, lines=1)
    assert line == f"main-wds.py: stopped by {number.name}; nothing was saved since the last whole epoch"
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


# ---------------------------------------------------------------------------- failures, and what is left


def ranks_of(run):
    """The processes that train, in their order."""
    command = lambda pid: Path(f"/proc/{pid}/cmdline").read_text()  # noqa: E731
    return sorted(pid for pid, parent in run.alive().items() if parent == run.pid and "tracker" not in command(pid))


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_a_rank_is_killed(script, start, folders, shards):
    """The others end, and one line says why."""
    args = ["-a", "shufflenet_v2_x0_5", "-b", 8, "-j", 2, "-p", 1, "--no-accel"]
    args += [folders] if script == "main-orig.py" else ["--shards", shards, "--image-size", 32]
    run = start(*args, *ddp(), script=script).until("^Epoch", count=2)
    os.kill(ranks_of(run)[script == "main-orig.py"], signal.SIGKILL)
    _, lines = run.finish(status=1, lines=None)
    (line,) = [line for line in lines if not line.startswith("[rank")]  # Python's, if a worker was just sending
    form = r"process \d terminated with signal SIGKILL; the other processes of this node were terminated"
    assert re.fullmatch(rf"{script}: {form}", line)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_a_rank_on_another_node_is_killed(script, start, folders, shards, tmp_path):
    """As if the two were started by torchrun on two nodes: the other ends, soon, and one line says why."""
    args = ["-a", "shufflenet_v2_x0_5", "-b", 4, "-j", 1, "-p", 1, "--no-accel", "--epochs", 90]
    args += [folders] if script == "main-orig.py" else ["--shards", shards, "--image-size", 32]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    envs = [{**env, "RANK": str(rank), "LOCAL_RANK": "0"} for rank in (0, 1)]
    runs = [start(*args, script=script, cwd=tmp_path / str(rank), env=envs[rank]) for rank in (0, 1)]
    runs[0].until("^Epoch", count=2)
    runs[1].kill(signal.SIGKILL)
    _, (line,) = runs[0].finish(status=2, lines=1)
    assert line.startswith(f"{script}: rank 0 lost the connection to another rank, which failed or was killed (")
    assert runs[1].wait(20) == -signal.SIGKILL


def test_ctrl_c_of_the_original(start, folders):
    """Status 130, and no traceback."""
    args = ["-a", "shufflenet_v2_x0_5", "-b", 4, "-j", 0, "-p", 1, "--no-accel", folders]
    run = start(*args, script="main-orig.py").until("^Epoch", count=2).kill(signal.SIGINT)
    run.finish(status=128 + signal.SIGINT)


def test_a_rank_of_torchrun_is_killed(start, shards):
    run = start(*WDS, "--epochs", 90, "--shards", shards, server=None, before=torchrun()).until("^Epoch", count=2)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert run.wait(60) == 1
    assert "SIGKILL" in run.output() or "Signal 9" in run.output()
    assert not run.alive()


@pytest.mark.parametrize("how", ["spawn", "torchrun"])
def test_an_image_that_is_cut_off(how, start, tmp_path):
    """It is named, shard and key, though another rank met it not."""
    shards = write_shards(tmp_path / "shards", {"train": TRAIN, "validation": VAL}, cut=40)
    args = [*WDS, "--shards", shards, *(ddp() if how == "spawn" else [])]
    expected = f"main-wds.py: {shards}/imagenet-train-000002.tar: sample n040: not a readable image"
    if how == "spawn":
        _, (line,) = start(*args).finish(status=2, lines=1)
        assert line.startswith(expected)
    else:
        run = start(*args, server=None, before=torchrun())
        assert run.wait(60) == 1
        assert len(re.findall(f"^{re.escape(expected)}", run.output(), re.M)) == 1
        assert not run.alive()


ENDS = [("wds", 0, False), ("wds", signal.SIGTERM, False), ("wds", signal.SIGINT, True), ("orig", signal.SIGINT, True)]


@pytest.mark.parametrize("dataset, number, group", ENDS)
def test_nothing_is_left(dataset, number, group, start, folders, shards, tmp_path):
    """Neither a process nor shared memory, of two ranks with two workers each: finish() looks for them."""
    args = ["--dataset", dataset, "--data", folders, "--shards", shards, *WDS, "-b", 16, "-j", 4]
    run = start(*args, "--epochs", 1 if not number else 90, *ddp()).until("^Epoch", count=2)
    assert len(run.alive()) >= (3 if dataset == "orig" else 3 + 2 * 2)  # from folders they last an epoch
    if number:
        run.kill(number, group)
    run.finish(status=128 + number if number else 0, lines=1 if number else 0)


def test_as_a_user_types_it(start, shards, unbroken, tmp_path):
    """Without the server: one process, stopped and resumed."""
    run = start(*WDS, "--shards", shards, server=None).until("^Epoch", count=STEPS + 4).kill(signal.SIGTERM)
    assert stopped(run, signal.SIGTERM) > (0, 0)
    start(*WDS, "--shards", shards, *RESUME, server=None).finish()
    assert end_alike(tmp_path, unbroken(1, *WDS))


def test_as_a_user_types_it_for_two_ranks(start, shards, unbroken, tmp_path):
    """Without the server: --multiprocessing-distributed is stopped by Ctrl-C, and torchrun goes on."""
    args = [*WDS, "--shuffle", 8, "--epochs", 2, "-b", 8]
    run = start(*args, "--shards", shards, *ddp(), server=None).until("^Epoch", count=3).kill(signal.SIGINT, True)
    stopped(run, signal.SIGINT)
    start(*args, "--shards", shards, *RESUME, server=None, before=torchrun()).finish()
    assert end_alike(tmp_path, unbroken(2, *args))


if __name__ == "__main__":
    serve()
