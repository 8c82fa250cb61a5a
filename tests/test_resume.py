"""Checkpoints, stopping, resuming and failing: --resume gives the same bits, errors are reported, no process is left.

Most runs are forked by commands.fork_server(). Those with `typed` or `before` start from the command line.
"""

import contextlib
import functools
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from commands import (
    EPOCHS,
    LIMIT,
    RESUME,
    ROOT,
    SMALL_RUN,
    STEPS,
    Run,
    args_of,
    checkpoint,
    data_of,
    load,
    run,
    run_command,
    spawned_ranks,
    start_nodes,
    summary,
    torchrun,
    wait_until,
)
from make_data import TRAIN, VAL, noise, write_shards

NAMES = ("checkpoint.pth.tar", "model_best.pth.tar")
SHUFFLENET = ["-a", "shufflenet_v2_x0_5", "-p", 1, "--no-accel"]


def launcher(ranks):
    return spawned_ranks() if ranks == 2 else []


def same(a, b):
    """Whether two states are bitwise equal. NaN is never equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_checkpoints(folder, expected):
    """Whether both checkpoints equal those in `expected`, which has no best one if no image was classified right."""
    names = [name for name in NAMES if (expected / name).exists() or (folder / name).exists()]
    return bool(names) and all(same(checkpoint(folder, name), checkpoint(expected, name)) for name in names)


def batches(folder, rank=0):
    """The batches that a rank trained with, each as a list of sample numbers; see instruments.record()."""
    return [list(map(int, line.split())) for line in (folder / f"seen{rank}").read_text().splitlines()]


def samples_of(steps):
    return sorted(itertools.chain(*steps))


def stop_position(run, number):
    """(epoch, step) of a run that was stopped by a signal. Its message names it, and agrees with its checkpoint."""
    _, (line,) = run.finish(status=128 + number, lines=1)
    name = signal.Signals(number).name
    advice = r"add --resume checkpoint\.pth\.tar to continue \(epoch (\d+), step (\d+)\)"
    match = re.fullmatch(rf"main-wds\.py: stopped by {name}; {advice}", line)
    assert match, line
    epoch, step = map(int, match.groups())
    state = checkpoint(run.cwd)
    assert (state["epoch"], state["position"]["step"]) == (epoch, step)
    return epoch, step


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_kill_while_checkpoints_are_written(start, tmp_path):
    """After each of a hundred kill -9, both checkpoints can be loaded and each holds the state of a single epoch.

    Half of the kills come as soon as a partial file is seen, the others once checkpoints are complete.
    """
    start(0, instrument="save_checkpoints").until("^2$").kill(signal.SIGKILL).finish(status=-signal.SIGKILL)
    unfinished = 0
    for i in range(1, 101):
        run = start(1000 * i, instrument="save_checkpoints")
        if i % 2:
            wait_until(lambda: any(tmp_path.glob("*.partial")), run.output)
        else:
            run.until(".")
        run.kill(signal.SIGKILL).finish(-signal.SIGKILL)
        for name in NAMES:
            state = checkpoint(tmp_path, name)
            epoch = state["epoch"]
            values = [*state["state_dict"].values()]
            values += [buffers["momentum_buffer"] for buffers in state["optimizer"]["state"].values()]
            assert len(values) == 4 and all((value == epoch).all() for value in values)
            assert state["best_acc1"] == epoch
            assert state.get("position", {"step": epoch}) == {"step": epoch}
            assert name == "checkpoint.pth.tar" or epoch % 2 == 0
        for path in tmp_path.glob("*.partial"):
            unfinished += 1
            path.unlink()
    assert unfinished


def test_checkpoint_is_synced_before_it_is_renamed(script, tmp_path, monkeypatch):
    """The best one comes first: after a kill between the two, the resumed run would not find it to be the best."""
    fsync = os.fsync
    replace = os.replace
    synced = []
    renamed = []

    def recorded_fsync(file):
        fsync(file)
        synced.append(os.stat(file).st_ino)

    def recorded_replace(old, new):
        assert os.stat(old).st_ino in synced
        renamed.append(os.path.basename(new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.chdir(tmp_path)
    load(script).save_checkpoint({"epoch": 1}, is_best=True)
    assert renamed == ["model_best.pth.tar", "checkpoint.pth.tar"]
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_malicious_pickle_is_refused(script, start, folders, shards, tmp_path):
    state = {"epoch": 1, "arch": "shufflenet_v2_x0_5", "best_acc1": 0.0, "state_dict": {}, "optimizer": Malicious()}
    torch.save({**state, "scheduler": {}}, tmp_path / "evil.tar")
    args = [*SHUFFLENET, *data_of(script, folders, shards), "--resume", "evil.tar"]
    _, (line,) = start(*args, script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --resume evil.tar: not a checkpoint of this script")
    assert not (tmp_path / "pwned").exists()


def test_folder_that_cannot_be_written(script, folders, shards, tmp_path):
    """Reported before the first step."""
    (tmp_path / "read-only").mkdir(mode=0o555)
    command = [sys.executable, str(ROOT / script), *map(str, args_of(script, folders, shards))]
    mount = ["true"]
    if os.access(tmp_path / "read-only", os.W_OK):  # as root
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "read-only"]
        command = ["unshare", "-m", "sh", "-c", f'{" ".join(mount)} && cd read-only && exec "$@"', "-", *command]
        if not shutil.which("unshare") or subprocess.run([*command[:6], "true"], cwd=tmp_path).returncode:
            pytest.skip("needs the right to mount a file system")
    else:
        command = ["sh", "-c", 'cd read-only && exec "$@"', "-", *command]
    out, err = run_command(command, cwd=tmp_path, status=2)
    assert err == f"{script}: can't write checkpoints to the current folder; run in another one\n"
    assert "Epoch: [" not in out


def test_linked_checkpoint(script, tmp_path, monkeypatch):
    """The link stays, and its target is replaced, also if it does not exist yet."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for name in NAMES:
        os.symlink(f"../disk/{name}", name)
    for epoch in (1, 2):
        load(script).save_checkpoint({"epoch": epoch}, is_best=True)
        for name in NAMES:
            assert os.readlink(name) == f"../disk/{name}"
            assert checkpoint(tmp_path / "disk", name)["epoch"] == epoch
    assert sorted(os.listdir(tmp_path / "disk")) == sorted(os.listdir()) == sorted(NAMES)


def test_checkpoint_is_linked_to_a_device(script, tmp_path, monkeypatch):
    """It is not replaced, as a regular file would be: on some machines that would be /dev/null."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("device")
    os.symlink("device", "checkpoint.pth.tar")
    with pytest.raises(load(script).DataError, match="device is not a regular file"):
        load(script).save_checkpoint({"epoch": 1}, is_best=False)
    assert sorted(os.listdir()) == ["checkpoint.pth.tar", "device"] and not os.path.isfile("device")


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) is killed"), KeyboardInterrupt()])
def test_no_partial_checkpoint_is_left(error, script, tmp_path, monkeypatch):
    """Whatever is raised while one is written, such as by PyTorch's handler of dead workers."""

    def fail(_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        load(script).save_checkpoint({"epoch": 1}, is_best=True)
    assert os.listdir() == []


def test_write_error_keeps_the_last_checkpoint(script, tmp_path, monkeypatch):
    """And leaves no partial file. A limit on the size of files stands for a full disk."""
    module = load(script)
    monkeypatch.chdir(tmp_path)
    module.save_checkpoint({"epoch": 1}, is_best=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 50_000):  # the error comes when the file is closed, or from torch.save()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(module.DataError, match=r"can't write checkpoint\.pth\.tar \(File too large\)"):
                module.save_checkpoint({"epoch": 2, "state_dict": torch.zeros(100_000)}, is_best=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"] and checkpoint(tmp_path)["epoch"] == 1


def test_two_runs_in_one_folder(script, tmp_path, monkeypatch):
    """One writes its checkpoint while the other does, and neither breaks the other's."""
    module = load(script)
    fsync = os.fsync

    def fsync_after_the_other_run(file):
        monkeypatch.setattr(os, "fsync", fsync)
        module.save_checkpoint({"epoch": 2}, is_best=False)
        assert checkpoint(tmp_path)["epoch"] == 2
        fsync(file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync_after_the_other_run)
    module.save_checkpoint({"epoch": 1}, is_best=False)
    assert checkpoint(tmp_path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pth.tar"]


# ---------------------------------------------------------------------------- resuming between epochs


@pytest.mark.parametrize(
    "script, dataset, ranks",
    [
        pytest.param("main-orig.py", None, 1, marks=pytest.mark.slow),
        pytest.param("main-wds.py", "orig", 2, marks=pytest.mark.slow),
        ("main-wds.py", "wds", 2),
    ],
)
def test_resume_between_epochs(script, dataset, ranks, start, folders, shards, tmp_path):
    """Two epochs in one run and in two give bitwise equal checkpoints."""
    args = [*SHUFFLENET, "-b", 16, "-j", 2, "--lr", 0.01, "--seed", 1]
    if script == "main-orig.py":
        args += [folders]
    else:
        args += ["--dataset", dataset, "--data", folders, "--shards", shards, "--image-size", 32]
    whole = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    out, _ = start(*args, "--epochs", 2, *launcher(ranks), script=script, cwd=whole).finish()
    assert out.count(" * Acc@1") == 2
    for epochs in (1, 2):  # the first run finds no checkpoint
        out, _ = start(*args, "--epochs", epochs, *RESUME, *launcher(ranks), script=script, cwd=resumed).finish()
        assert out.count(" * Acc@1") == 1
    state = checkpoint(whole)
    assert state["epoch"] == 2 and state["scheduler"]["last_epoch"] == 2 and len(state["optimizer"]["state"]) > 50
    assert "position" not in state
    assert same_checkpoints(resumed, whole)


# ---------------------------------------------------------------------------- resuming within an epoch


def stop_and_resume(start, args, ranks, stops, cwd):
    """Train to the end, in runs that are stopped and resumed; return the positions (epoch, step) of the stops.

    stops: for each, (steps, signal, group): after that many steps the signal goes to the process or to its group.
    After the last stop, as many samples must be decoded as are used: resuming does not decode those before.
    """
    positions = []
    resume = []
    for steps, number, group in stops:
        run = start(*args, *resume, *launcher(ranks), cwd=cwd, instrument="record", env={"HOLD_AT": steps})
        run.until("^Epoch", count=steps).kill(number, group)
        positions.append(stop_position(run, number))
        resume = RESUME
    used = sum(map(len, batches(cwd)))
    decoded = (cwd / "decoded").stat().st_size
    start(*args, *resume, *launcher(ranks), cwd=cwd, instrument="record").finish()
    used = sum(map(len, batches(cwd))) - used
    decoded = (cwd / "decoded").stat().st_size - decoded
    assert decoded == ranks * used
    assert positions == sorted(set(positions))  # each run makes progress
    return positions


@pytest.mark.slow
def test_stop_and_resume(start, shards, unbroken, tmp_path):
    """A run that is stopped seven times trains with the same batches as one that is not, and ends with the same bits.

    Each sample comes once per epoch, and each epoch has its own order.
    """
    signals = itertools.cycle([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    stops = [(steps, next(signals), False) for steps in (1, 4, 2, 5, 3, 5, 2)]
    positions = stop_and_resume(start, [*SMALL_RUN, "--shards", shards], 1, stops, tmp_path)
    assert positions[-1][0] >= 1  # 22 steps or more, of 20 in an epoch
    assert batches(tmp_path) == batches(unbroken(1, *SMALL_RUN))
    assert same_checkpoints(tmp_path, unbroken(1, *SMALL_RUN))
    epochs = [batches(tmp_path)[epoch * STEPS : (epoch + 1) * STEPS] for epoch in range(EPOCHS)]
    assert [samples_of(epoch) for epoch in epochs] == [list(range(sum(TRAIN)))] * EPOCHS
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_stop_and_resume_two_ranks(start, shards, unbroken, tmp_path):
    """The signal comes to the launcher alone, as schedulers send it, or to all processes, as a terminal does."""
    args = [*SMALL_RUN, "--shuffle", 8, "-b", 6]
    stops = [
        (1, signal.SIGTERM, False),
        (3, signal.SIGINT, True),
        (2, signal.SIGUSR1, True),
        (4, signal.SIGTERM, False),
        (4, signal.SIGINT, False),
    ]
    positions = stop_and_resume(start, [*args, "--shards", shards], 2, stops, tmp_path)
    whole = unbroken(2, *args)
    steps = 13  # per epoch: 39 samples per rank
    assert positions[-1][0] >= 1
    for rank in (0, 1):
        assert batches(tmp_path, rank) == batches(whole, rank)
        assert len(batches(whole, rank)) == EPOCHS * steps
    assert batches(whole, 0) != batches(whole, 1)
    assert same_checkpoints(tmp_path, whole)


@pytest.mark.parametrize("loading", [["-j", 0], ["-j", 3, "--shuffle", 5]], ids=["no workers", "three workers"])
@pytest.mark.slow
def test_resume_with_dropout(loading, start, shards, unbroken, tmp_path):
    """Dropout draws random numbers in each step, and without workers the augmentation does so in the same process."""
    args = [*SMALL_RUN, "--epochs", 2, "-a", "squeezenet1_1", *loading]
    stops = [(2, signal.SIGTERM, False), (3, signal.SIGINT, False)]
    stop_and_resume(start, [*args, "--shards", shards], 1, stops, tmp_path)
    assert batches(tmp_path) == batches(unbroken(1, *args))
    assert same_checkpoints(tmp_path, unbroken(1, *args))


def test_each_step_has_its_own_seed(unbroken):
    """With the epoch's seed in each step, dropout would leave out the same features all the time."""
    seeds = (unbroken(1, *SMALL_RUN) / "seeds0").read_text().split()
    assert len(set(seeds)) == len(seeds) == EPOCHS * STEPS


def test_resume_without_seed(start, shards, tmp_path):
    """The batches are those of a run with the seed that the position holds; another run draws another one."""
    at = SMALL_RUN.index("--seed")
    args = [*SMALL_RUN[:at], *SMALL_RUN[at + 2 :], "--epochs", 2, "--shards", shards]
    seeds = []
    for name in ("first", "second"):
        run = start(*args, cwd=tmp_path / name, instrument="record", env={"HOLD_AT": 5}).until("^Epoch", count=5)
        stop_position(run.kill(signal.SIGTERM), signal.SIGTERM)
        ((_, options),) = checkpoint(tmp_path / name)["position"]["runs"]
        seeds.append(options["seed"])
    assert seeds[0] != seeds[1]
    start(*args, *RESUME, cwd=tmp_path / "first", instrument="record").finish()
    start(*args, "--seed", seeds[0], cwd=tmp_path / "seeded", instrument="record").finish()
    assert batches(tmp_path / "first") == batches(tmp_path / "seeded")


def test_resume_after_a_change_of_the_seed(start, shards, late_run, tmp_path):
    """Without --seed, the one of the last run is kept."""
    at = SMALL_RUN.index("--seed")
    args = [*SMALL_RUN[:at], *SMALL_RUN[at + 2 :], "--epochs", 1, "--shards", shards]
    path = late_run / "checkpoint.pth.tar"
    start(*args, "--seed", 2, "--resume", path, cwd=tmp_path / "whole", instrument="record").finish()
    stopped = start(
        *args, "--seed", 2, "--resume", path, cwd=tmp_path / "stopped", instrument="record", env={"HOLD_AT": 2}
    )
    stop_position(stopped.until("^Epoch", count=2).kill(signal.SIGTERM), signal.SIGTERM)
    out, _ = start(*args, *RESUME, cwd=tmp_path / "stopped", instrument="record").finish()
    assert "anew" not in out
    assert batches(tmp_path / "stopped") == batches(tmp_path / "whole")


def test_checkpoint_steps(start, shards, unbroken, tmp_path):
    """After kill -9, --resume continues from the last of these checkpoints. The killed run's workers end."""
    args = [*SMALL_RUN, "--shards", shards, "--checkpoint-steps", 3]
    for steps, resume in ((5, []), (7, RESUME)):
        run = start(*args, *resume, instrument="record", env={"HOLD_AT": steps}).until("^Epoch", count=steps)
        run.kill(signal.SIGKILL).finish(status=-signal.SIGKILL, lines=None)  # Python in a worker may complain
        epoch, step = re.findall(r"^Epoch: \[(\d+)\]\[ *(\d+)/", run.output(), re.M)[-1]
        done = int(epoch) * STEPS + int(step)
        state = checkpoint(tmp_path)
        saved = state.get("position", {"step": 0})["step"]
        assert saved % 3 == 0
        assert done - 3 <= state["epoch"] * STEPS + saved <= done  # the last step may have been saved already
    start(*args, *RESUME, instrument="record").finish()
    assert same_checkpoints(tmp_path, unbroken(1, *SMALL_RUN))


def test_simultaneous_signals(start, shards):
    """Two signals at once count as one: the run stops with a checkpoint, and with the status of either."""
    run = start(*SMALL_RUN, "--shards", shards, instrument="record", env={"HOLD_AT": 3}).until("^Epoch", count=3)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        run.kill(number)
    status = run.wait()
    assert status in (128 + signal.SIGINT, 128 + signal.SIGTERM), run.output()
    assert f"stopped by {signal.Signals(status - 128).name}; add --resume" in run.output()
    assert checkpoint(run.cwd)["position"]["step"] == 3


@pytest.mark.parametrize("group", [True, False])
def test_signal_to_spawned_ranks(group, start, shards):
    """Each rank gets it from the launcher and, if it comes from a terminal, directly, too: this counts as one."""
    args = [*SMALL_RUN, "--shards", shards, *spawned_ranks()]
    run = start(*args, instrument="record", env={"HOLD_AT": 3}).until("^Epoch", count=3)
    stop_position(run.kill(signal.SIGINT, group), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_one_spawned_rank(number, start, shards):
    """The launcher, which did not get it, has the status of its ranks."""
    args = [*SMALL_RUN, "--shards", shards, *spawned_ranks()]
    run = start(*args, instrument="record", env={"HOLD_AT": 3}).until("^Epoch", count=3)
    for pid in ranks_of(run):
        os.kill(pid, number)
    stop_position(run, number)


def test_only_data_workers_are_ended(start, shards, tmp_path):
    """Another child of the process outlives the stop."""
    args = [*SMALL_RUN, "--shards", shards]
    run = start(*args, instrument="record_beside_a_child", env={"HOLD_AT": 3}).until("^Epoch", count=3)
    run.kill(signal.SIGTERM)
    wait_until(lambda: len(run.alive()) <= 2, run.output)  # the run waits for the child at its end
    (tmp_path / "go").touch()
    stop_position(run, signal.SIGTERM)
    assert (tmp_path / "survived").exists()


# ---------------------------------------------------------------------------- stopping while data is held back


class HoldingHandler(SimpleHTTPRequestHandler):
    def copyfile(self, source, outputfile):
        data = source.read()
        released = self.server.held.get(Path(self.path).name)
        first = int(self.server.part * len(data)) if released else len(data)
        with contextlib.suppress(OSError):  # the client has gone
            outputfile.write(data[:first])
            if released:
                self.server.requested.release()
                released.wait()
            outputfile.write(data[first:])

    def log_message(self, *_):
        pass


class HoldingServer(ThreadingHTTPServer):
    """Serves a folder; of the files that match a pattern only the first part, a fraction, until they are released."""

    daemon_threads = True

    def __init__(self, folder, pattern, part=0):
        super().__init__(("127.0.0.1", 0), functools.partial(HoldingHandler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.held = {path.name: threading.Event() for path in folder.glob(pattern)}
        self.part = part
        self.requested = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def wait_for_requests(self, count):
        """Wait until that many requests are held."""
        for i in range(count):
            assert self.requested.acquire(timeout=LIMIT), f"{i} requests of {count}"

    def release(self, *names):
        """Send the rest of these files, by default of all."""
        for name in names or self.held:
            self.held[name].set()


@pytest.fixture
def hold(monkeypatch):
    """A function that starts a HoldingServer."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def hold(*args, **options):
        servers.append(HoldingServer(*args, **options))
        return servers[-1]

    yield hold
    for server in servers:
        server.release()
        server.shutdown()
        server.server_close()


def test_second_signal_ends_at_once(start, hold, shards, tmp_path):
    """While no batch arrives, the first signal does not stop the run; one more than two seconds later ends it."""
    server = hold(shards, "*train*")
    run = start(*SMALL_RUN, "--shards", server.url, instrument="record")
    server.wait_for_requests(2)
    run.kill(signal.SIGTERM)

    def killed():
        run.kill(signal.SIGINT)
        time.sleep(0.1)
        return not run.alive(run.pid)

    wait_until(killed, run.output)
    run.finish(status=128 + signal.SIGINT)
    assert not (tmp_path / "checkpoint.pth.tar").exists()


def test_stop_while_workers_wait_for_a_server(start, hold, tmp_path):
    """Each of four workers reads a shard of five batches, of which it gets two; only the first gets the rest."""
    lengths = [20] * 4
    shards = write_shards(tmp_path / "shards", noise, train=lengths, validation=VAL)
    server = hold(shards, "*train*", part=0.6)
    args = [*SMALL_RUN, "-j", 4, "--shuffle", 0, "--shards", server.url]
    run = start(*args, instrument="record").until("^Epoch", count=5)
    server.wait_for_requests(4)
    run.kill(signal.SIGTERM)
    ((shard, _),) = load("main-wds.py").plan([range(20)] * 4, 4, 0, 1, seed=1, worker=0, workers=4)
    server.release(f"imagenet-train-{shard:06}.tar")  # else the run would wait for step 9
    epoch, step = stop_position(run, signal.SIGTERM)
    assert epoch == 0 and 5 <= step <= 9


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_stop_during_validation(ranks, start, hold, shards, unbroken, tmp_path):
    """The resumed run validates again, and trains with no sample twice."""
    server = hold(shards, "*validation*", part=0.6)
    args = [*SMALL_RUN, "--epochs", 2, "-b", 4 * ranks, "-j", ranks]
    run = start(*args, "--shards", server.url, *launcher(ranks), instrument="record").until(r"^Test: \[ *1/")
    server.wait_for_requests(ranks)
    run.kill(signal.SIGTERM, group=True)
    server.release()
    assert stop_position(run, signal.SIGTERM) == (0, STEPS // ranks)
    assert " * Acc" not in run.output()
    out, _ = start(*args, "--shards", shards, *RESUME, *launcher(ranks), instrument="record").finish()
    assert "Epoch: [0]" not in out and out.index("Test: ") < out.index("Epoch: [1]")
    assert batches(tmp_path) == batches(unbroken(ranks, *args))
    assert same_checkpoints(tmp_path, unbroken(ranks, *args))


@pytest.mark.parametrize("workers", range(1, 5))
@pytest.mark.slow
def test_stop_while_validation_workers_start(workers, start, shards, unbroken, tmp_path):
    """The signal comes right after that many of the four have been forked; training's four stay."""
    args = [*SMALL_RUN, "-j", 4, "--epochs", 1, "--shards", shards]
    run = start(*args, instrument="record_and_stop_at_a_fork", env={"STOP_AT": 4 + workers})
    assert stop_position(run, signal.SIGTERM) == (0, STEPS)
    start(*args, *RESUME, instrument="record").finish()
    assert batches(tmp_path) == batches(unbroken(1, *args))
    assert same_checkpoints(tmp_path, unbroken(1, *args))


@pytest.mark.slow
def test_stop_spawned_ranks_and_resume_with_torchrun(start, hold, shards, unbroken, tmp_path):
    server = hold(shards, "*train*")
    args = [*SMALL_RUN, "--shuffle", 8, "--epochs", 2, "-b", 8]
    run = start(*args, "--shards", server.url, *spawned_ranks(), typed=True)
    server.wait_for_requests(2)
    run.kill(signal.SIGINT, group=True)
    server.release()
    assert stop_position(run, signal.SIGINT) == (0, 1)
    start(*args, "--shards", shards, *RESUME, before=torchrun()).finish()
    assert same_checkpoints(tmp_path, unbroken(2, *args))


# ---------------------------------------------------------------------------- resuming with other options


def test_options_that_the_checkpoint_overrides(script, start, folders, shards):
    """They are reported, and so is a run with no epoch left."""
    args = args_of(script, folders, shards)
    start(*args, "--lr", 0.01, "--wd", 0.001, script=script).finish()
    out, _ = start(*args, "--lr", 0.5, "--momentum", 0.8, "--wd", 0.001, *RESUME, script=script).finish()
    assert "=> the checkpoint's options are kept: --lr 0.01, not 0.5, --momentum 0.9, not 0.8\n" in out
    assert "=> all epochs are done (--epochs 1)" in out and "Epoch: [" not in out
    out, _ = start(*args, "--lr", 0.01, "--wd", 0.001, "--epochs", 2, *RESUME, script=script).finish()
    assert "are kept" not in out and "are done" not in out and "Epoch: [1]" in out


def test_missing_checkpoint(script, start, folders, shards):
    """Training starts from the beginning, as job scripts expect. --evaluate fails."""
    args = [*args_of(script, folders, shards), "--resume", "none.tar"]
    out, _ = start(*args, script=script).finish()
    assert "=> no checkpoint found at 'none.tar'" in out
    assert "Epoch: [0]" in out and len(summary(out)) == 1
    _, (line,) = start(*args, "--evaluate", script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --resume none.tar: ")


@pytest.fixture(scope="module")
def stopped_run(shards, tmp_path_factory):
    """(folder, epoch, step) of a run that was stopped after the first epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    hold = {"HOLD_AT": STEPS + 2}
    run = Run("main-wds.py", *SMALL_RUN, "--shards", shards, cwd=folder, instrument="record", env=hold)
    run.until(r"^Epoch: \[1\]", count=2).kill(signal.SIGTERM)
    epoch, step = stop_position(run, signal.SIGTERM)
    return folder, epoch, step


OTHER_OPTIONS = {  # options, the change that is reported, and the number of steps then: 26 of 78 samples are left
    "no workers": (["-j", 0], "workers 0, not 2", 20),
    "five workers": (["-j", 5], "workers 5, not 2", 20),
    "batch size": (["-b", 6], "batch size 6, not 4", 13 + 5),
    "shuffle": (["--shuffle", 7], "shuffle 7, not 1000", 20),
    "seed": (["--seed", 2], "seed 2, not 1", 20),
    "two ranks": (["-b", 10, "-j", 4], "ranks 2, not 1; batch size 5, not 4", 13 + 3),
}


@pytest.mark.parametrize("case", OTHER_OPTIONS)
def test_other_options_divide_the_rest_anew(case, start, shards, late_run, tmp_path):
    """The epoch's samples come once over both runs; the next epoch is a whole one. The printed steps continue."""
    options, change, steps = OTHER_OPTIONS[case]
    ranks = 2 if "two ranks" in case else 1
    args = [*SMALL_RUN, "--epochs", 2, "--shards", shards, "--resume", late_run / "checkpoint.pth.tar", *options]
    out, _ = start(*args, *launcher(ranks), instrument="record").finish()
    assert f"=> the rest of epoch 0 is divided anew ({change})\n" in out
    printed = re.findall(rf"^Epoch: \[0\]\[ *(\d+)/{steps}\]", out, re.M)
    assert list(map(int, printed)) == list(range(14, steps + 1))
    by_rank = [batches(tmp_path, rank) for rank in range(ranks)]
    rest = [step for seen in by_rank for step in seen[: steps - 13]]
    whole = [step for seen in by_rank for step in seen[steps - 13 :]]
    assert samples_of(batches(late_run) + rest) == list(range(sum(TRAIN)))
    assert samples_of(whole) == list(range(sum(TRAIN)))


@pytest.fixture(scope="module")
def late_run(shards, tmp_path_factory):
    """The folder of a run that was stopped after 13 of 20 steps of its first epoch."""
    folder = tmp_path_factory.mktemp("late")
    run = Run("main-wds.py", *SMALL_RUN, "--shards", shards, cwd=folder, instrument="record", env={"HOLD_AT": 13})
    assert stop_position(run.until("^Epoch", count=13).kill(signal.SIGTERM), signal.SIGTERM) == (0, 13)
    return folder


def test_other_images_keep_the_batches(start, shards, late_run, unbroken, tmp_path):
    """--image-size, --decode and --augmentation have no part in which samples come when."""
    args = [*SMALL_RUN, "--epochs", 1, "--shards", shards, "--resume", late_run / "checkpoint.pth.tar"]
    args += ["--image-size", 40, "--decode", "pil", "--augmentation", "simple"]
    out, _ = start(*args, instrument="record").finish()
    assert "anew" not in out
    assert batches(late_run) + batches(tmp_path) == batches(unbroken(1, *SMALL_RUN))[:STEPS]


def test_epoch_on_one_cluster_after_the_other(start, shards, tmp_path):
    """2 ranks of 2 workers, then 3 of 1, then a single process: each sample is used once, but for the repeats.

    What the last one does in a single run and in two is bitwise the same.
    """
    args = [*SMALL_RUN, "--epochs", 2, "--shards", shards]
    clusters = {"first": [2, 4, "-b", 4, "-j", 2], "second": [3, 2, "-b", 5, "-j", 1, "--shuffle", 8]}
    resume = []
    used = []
    outputs = []
    for name, (ranks, steps, *options) in clusters.items():
        args_of_nodes = [[*args, *options, *resume]] * ranks
        runs = start_nodes(
            start, "main-wds.py", tmp_path / name, *args_of_nodes, instrument="record", env={"HOLD_AT": steps}
        )
        runs[0].until("^Epoch", count=steps)
        for node in runs:
            node.kill(signal.SIGTERM)
        stop_position(runs[0], signal.SIGTERM)
        used += batches(runs[0].cwd)
        for rank, node in enumerate(runs[1:], 1):
            node.finish(status=128 + signal.SIGTERM)
            used += batches(node.cwd, rank)
        resume = ["--resume", tmp_path / name / "0/checkpoint.pth.tar"]
        outputs.append(runs[0].output())
    changes = "ranks 3, not 2; workers 1, not 2; batch size 5, not 4; shuffle 8, not 1000"
    assert f"=> the rest of epoch 0 is divided anew ({changes})\n" in outputs[1]

    args += ["-b", 4, "-j", 0]
    whole = start(*args, *resume, cwd=tmp_path / "whole", instrument="record")
    out, _ = whole.finish()
    changes = "ranks 1, not 3; workers 0, not 1; batch size 4, not 5; shuffle 1000, not 8"
    assert f"=> the rest of epoch 0 is divided anew ({changes})\n" in out
    seen = batches(whole.cwd)
    rest = len(seen) - STEPS  # of the first epoch
    assert re.findall(r"^Epoch: \[0\]\[ *(\d+)/(\d+)\]", out, re.M) == [
        (str(step), str(6 + rest)) for step in range(7, 7 + rest)
    ]
    used += seen[:rest]
    numbers = samples_of(used)
    assert set(numbers) == set(range(sum(TRAIN))) and len(numbers) <= sum(TRAIN) + (2 - 1) + (3 - 1)
    assert samples_of(seen[rest:]) == list(range(sum(TRAIN)))

    stopped = start(*args, *resume, cwd=tmp_path / "stopped", instrument="record", env={"HOLD_AT": 2})
    assert stop_position(stopped.until("^Epoch", count=2).kill(signal.SIGTERM), signal.SIGTERM) == (0, 8)
    start(*args, *RESUME, cwd=tmp_path / "stopped", instrument="record").finish()
    assert batches(tmp_path / "stopped") == seen
    assert same_checkpoints(tmp_path / "stopped", tmp_path / "whole")


def test_nothing_is_left_of_the_epoch(start, hold, shards, tmp_path):
    """A run that was stopped during validation continues with validation on other ranks, too."""
    server = hold(shards, "*validation*", part=0.6)
    args = [*SMALL_RUN, "--epochs", 2, "-j", 1]
    run = start(*args, "--shards", server.url, instrument="record").until(r"^Test: \[ *1/")
    server.wait_for_requests(1)
    run.kill(signal.SIGTERM)
    server.release()
    assert stop_position(run, signal.SIGTERM) == (0, STEPS)
    out, _ = start(*args, "--shards", shards, "-b", 8, *RESUME, *launcher(2), instrument="record").finish()
    assert "Epoch: [0]" not in out and out.index("Test: ") < out.index("Epoch: [1]")
    assert len(summary(out)) == 2
    assert samples_of([*batches(tmp_path)[STEPS:], *batches(tmp_path, 1)]) == list(range(sum(TRAIN)))


OTHER_SHARDS = "the position was saved with other shards, or by an earlier version"


def test_other_shards_are_refused(start, shards, stopped_run, tmp_path):
    """The message names the way out."""
    folder, epoch, _ = stopped_run
    other = write_shards(tmp_path / "other", noise, train=[29, 2, *TRAIN[2:]], validation=VAL)
    path = folder / "checkpoint.pth.tar"
    _, (line,) = start(*SMALL_RUN, "--shards", other, "--resume", path).finish(status=2, lines=1)
    way_out = f"restart the epoch with --start-epoch {epoch}"
    assert line == f"main-wds.py: --resume {path}: {OTHER_SHARDS}; {way_out}"


def test_shards_with_another_seed_are_refused(start, small, tmp_path):
    """They have the same names, lengths and images, but another order: samples would be left out."""
    other = tmp_path / "other"
    other.mkdir()
    run("makeshards.py", "--maxcount", 30, "--seed", 5, "--shards", other, cwd=small)
    assert sorted(os.listdir(other)) == sorted(os.listdir(small / "shards"))
    stopped = start(*SMALL_RUN, "--shards", small / "shards", instrument="record", env={"HOLD_AT": 2})
    stop_position(stopped.until("^Epoch", count=2).kill(signal.SIGTERM), signal.SIGTERM)
    _, (line,) = start(*SMALL_RUN, "--shards", other, *RESUME).finish(status=2, lines=1)
    assert OTHER_SHARDS in line
    args_of_nodes = [[*SMALL_RUN, "--shards", folder] for folder in (small / "shards", other)]
    for node in start_nodes(start, "main-wds.py", tmp_path / "nodes", *args_of_nodes):
        _, (line,) = node.finish(status=2, lines=1)
        assert line.startswith("main-wds.py: data is [")


def test_position_of_an_earlier_version_is_refused(start, shards, stopped_run, tmp_path):
    folder, _, _ = stopped_run
    state = checkpoint(folder)
    position = state["position"]
    del position["runs"]
    position |= {"seed": 1, "shuffle": 1000, "world_size": 1, "workers": 2, "batch_size": 4}
    torch.save(state, tmp_path / "checkpoint.pth.tar")
    _, (line,) = start(*SMALL_RUN, "--shards", shards, *RESUME).finish(status=2, lines=1)
    assert f"{OTHER_SHARDS}; restart the epoch with --start-epoch 1" in line


def test_position_before_the_first_step(start, stopped_run, tmp_path):
    """Several ranks may stop only there after a signal. All of the epoch is left, so other shards will do."""
    folder, epoch, _ = stopped_run
    shards = write_shards(tmp_path / "other", noise, train=[12], validation=[4])
    state = checkpoint(folder)
    state["position"]["step"] = 0
    torch.save(state, tmp_path / "checkpoint.pth.tar")
    out, _ = start(*SMALL_RUN, "--epochs", epoch + 1, "-j", 1, "--shards", shards, *RESUME).finish()
    assert "anew" not in out and re.findall(r"^Epoch: \[(\d)\]\[(\d)/3\]", out, re.M) == [
        (str(epoch), step) for step in "123"
    ]


def test_resume_with_moved_shards_and_other_epochs(start, stopped_run, tmp_path):
    """The printed steps continue, and the epoch's samples come once over both runs."""
    folder, epoch, step = stopped_run
    shards = write_shards(tmp_path / "moved", noise, train=TRAIN, validation=VAL)
    args = [*SMALL_RUN, "--epochs", epoch + 1, "--shards", shards, "--resume", folder / "checkpoint.pth.tar"]
    out, _ = start(*args, instrument="record").finish()
    printed = re.findall(rf"^Epoch: \[{epoch}\]\[ *(\d+)/{STEPS}\]", out, re.M)
    assert list(map(int, printed)) == list(range(step + 1, STEPS + 1))
    rest = batches(tmp_path)
    assert len(rest) == STEPS - step
    assert samples_of(batches(folder)[epoch * STEPS :] + rest) == list(range(sum(TRAIN)))


def test_start_epoch_restarts_the_epoch(start, shards, stopped_run, tmp_path):
    """Then other options are accepted."""
    folder, epoch, _ = stopped_run
    args = [*SMALL_RUN, "--epochs", epoch + 1, "--shards", shards, "-b", 6, "-j", 1]
    args += ["--resume", folder / "checkpoint.pth.tar", "--start-epoch", epoch]
    start(*args, instrument="record").finish()
    assert samples_of(batches(tmp_path)) == list(range(sum(TRAIN)))


def test_folders_restart_the_epoch(script, start, folders, stopped_run, tmp_path):
    """A checkpoint within an epoch of shards can be resumed with folders, from the first step of the epoch."""
    folder, epoch, step = stopped_run
    args = [*SHUFFLENET, "-b", 8, "-j", 1, "--epochs", epoch + 1, "--resume", folder / "checkpoint.pth.tar"]
    args += [folders] if script == "main-orig.py" else ["--dataset", "orig", "--data", folders]
    out, _ = start(*args, script=script).finish()
    if script == "main-wds.py":
        assert f"(epoch {epoch}, step {step})\n" in out
        assert f"=> epoch {epoch} is trained again from its first step\n" in out
    printed = re.findall(r"^Epoch: \[(\d)\]\[(\d/\d)\]", out, re.M)
    assert printed == [(str(epoch), f"{i}/4") for i in range(1, 5)]
    assert checkpoint(tmp_path)["epoch"] == epoch + 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_from_folders_keeps_the_last_whole_epoch(ranks, start, folders, tmp_path):
    args = ["--dataset", "orig", "--data", folders, *SMALL_RUN, "-b", 4 * ranks, "-j", 2 * ranks]
    run = start(*args, "--epochs", 90, *launcher(ranks), cwd=tmp_path / "stopped")
    run.until(r"^Epoch: \[1\]").kill(signal.SIGINT, group=True)
    out, (line,) = run.finish(status=128 + signal.SIGINT, lines=1)
    assert re.match(r"main-wds\.py: stopped by (SIGINT|SIGTERM); nothing was saved since the last complete epoch", line)
    epochs = out.count(" * Acc@1")
    start(*args, "--epochs", epochs, *launcher(ranks), cwd=tmp_path / "whole").finish()
    assert checkpoint(tmp_path / "stopped")["epoch"] == epochs
    assert same_checkpoints(tmp_path / "stopped", tmp_path / "whole")


# ---------------------------------------------------------------------------- failures


def ranks_of(run):
    """The pids of the ranks, in order of their start."""
    pids = []
    for pid, parent in run.alive().items():
        if parent == run.pid and "tracker" not in Path(f"/proc/{pid}/cmdline").read_text():
            pids.append(pid)
    return sorted(pids)


@pytest.mark.parametrize("script, rank", [("main-orig.py", 1), ("main-wds.py", 0)])
def test_killed_rank(script, rank, start, folders, shards):
    """The other rank ends too, with PyTorch's error."""
    args = [*SHUFFLENET, "-b", 8, "-j", 2, *data_of(script, folders, shards)]
    run = start(*args, *spawned_ranks(), script=script).until("^Epoch", count=2)
    os.kill(ranks_of(run)[rank], signal.SIGKILL)
    _, lines = run.finish(status=1, lines=None)
    assert re.fullmatch(r"torch.*ProcessExitedException: process \d terminated with signal SIGKILL", lines[-1])


def test_signal_to_one_rank(start, shards, tmp_path):
    """Both ranks stop after the same step, and rank 0, which got no signal, writes the checkpoint."""
    args = [*SMALL_RUN, "--epochs", 90, "--shards", shards]
    runs = start_nodes(start, "main-wds.py", tmp_path, args, args)
    runs[0].until("^Epoch", count=2)
    runs[1].kill(signal.SIGTERM)
    stop_position(runs[0], signal.SIGTERM)
    runs[1].finish(status=128 + signal.SIGTERM)


@pytest.mark.slow
def test_killed_rank_on_another_node(script, start, folders, shards, tmp_path):
    args = [*SHUFFLENET, "-b", 4, "-j", 1, *data_of(script, folders, shards)]
    runs = start_nodes(start, script, tmp_path, args, args)
    runs[0].until("^Epoch", count=2)
    runs[1].kill(signal.SIGKILL)
    _, lines = runs[0].finish(status=1, lines=None)
    text = "\n".join(lines)
    assert "Traceback" in text and re.search("Connection (closed|reset) by peer", text)
    runs[1].finish(status=-signal.SIGKILL, lines=None)


@pytest.mark.slow
def test_killed_rank_of_torchrun(start, shards):
    run = start(*SMALL_RUN, "--epochs", 90, "--shards", shards, before=torchrun()).until("^Epoch", count=2)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    run.finish(status=1, lines=None)


def test_interrupt_of_the_original(start, folders):
    args = [*SHUFFLENET, "-b", 4, "-j", 0, folders]
    run = start(*args, script="main-orig.py", instrument="stay_in_a_step").until("^held$").kill(signal.SIGINT)
    run.finish(status=128 + signal.SIGINT)


def one_truncated(number):
    """noise(), but only the first part of image 40."""
    return noise(number)[: 600 if number == 40 else None]


@pytest.mark.slow
def test_truncated_image_is_named_once(start, tmp_path):
    """Shard and key are printed by the rank of torchrun that reads it, and the other rank ends without a message."""
    shards = write_shards(tmp_path / "shards", one_truncated, train=TRAIN, validation=VAL)
    _, lines = start(*SMALL_RUN, "--shards", shards, before=torchrun()).finish(status=1, lines=None)
    expected = f"main-wds.py: {shards}/imagenet-train-000002.tar: sample 0040: not a readable image"
    assert len([line for line in lines if line.startswith(expected)]) == 1
