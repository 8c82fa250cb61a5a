"""Odd machines, disks, outputs and launchers: nothing ends in a wrong result without a word."""

import argparse
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, error_of, free_port, load, run, summary
from test_resume import ARGS, RESUME, WDS, checkpoint, folders, server, shards, start, write_shards  # noqa: F401

SCRIPTS = ["main-orig.py", "main-wds.py"]
FAST = ["-a", "shufflenet_v2_x0_5", "-b", "8", "-j", "1", "-p", "1", "--epochs", "1", "--no-accel"]


def command(script, folders, shards):
    """The arguments with which a script trains an epoch of four steps, or of ten."""
    if script == "main-orig.py":
        return [*FAST, folders]
    return [*FAST, "--shards", shards, "--image-size", 32]


each_script = pytest.mark.parametrize("script", SCRIPTS)


# ---------------------------------------------------------------------------- batches that are missing


@each_script
def test_a_long_tmpdir(script, folders, shards, tmp_path):
    """PyTorch's workers can't send batches then; training would end after no step, with status 0."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    line = error_of(script, *command(script, folders, shards), cwd=tmp_path, env={"TMPDIR": str(long)})
    assert f"TMPDIR={long}: too long" in line


class Loader(list):
    """It has one batch less than its length says."""

    def __len__(self):
        return super().__len__() + 1


@each_script
@pytest.mark.parametrize("batches", [0, 2])
def test_a_loader_that_ends_early(script, batches):
    module = load(script)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    args = argparse.Namespace(rank=0, print_freq=1, amp=False, distributed=False)
    args.device, args.memory_format = torch.device("cpu"), torch.contiguous_format
    loader = Loader([(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))] * batches)
    criterion, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters())
    with pytest.raises(module.DataError, match=f"training loader ended after {batches} of {batches + 1} batches"):
        module.train(loader, model, criterion, optimizer, 0, args.device, args)
    with pytest.raises(module.DataError, match=f"validation loader ended after {batches} of {batches + 1} batches"):
        module.validate(loader, model, criterion, args)


# ---------------------------------------------------------------------------- what --resume says


@each_script
def test_options_that_the_checkpoint_overrides(script, start, folders, shards):
    """Reported in one line; and so is a run that has no epoch left."""
    args = command(script, folders, shards)
    start(*args, "--lr", 0.01, "--wd", 0.001, script=script).finish()
    out, _ = start(*args, "--lr", 0.5, "--momentum", 0.8, "--wd", 0.001, *RESUME, script=script).finish()
    assert "=> the checkpoint's options are kept: --lr 0.01, not 0.5, --momentum 0.9, not 0.8\n" in out
    assert "=> all 1 epochs are done; to continue, increase --epochs\n" in out
    assert "Epoch: [" not in out
    out, _ = start(*args, "--lr", 0.01, "--wd", 0.001, "--epochs", 2, *RESUME, script=script).finish()
    assert "kept" not in out and "done" not in out and "Epoch: [1]" in out


@each_script
def test_a_missing_checkpoint(script, start, folders, shards):
    """It trains from the start, as job scripts rely on; but it doesn't evaluate a network that knows nothing."""
    args = [*command(script, folders, shards), "--resume", "none.tar"]
    out, _ = start(*args, script=script).finish()
    assert "=> no checkpoint found at 'none.tar': training starts from the beginning\n" in out
    assert "Epoch: [0]" in out and len(summary(out)) == 1
    _, (line,) = start(*args, "--evaluate", script=script).finish(status=2, lines=1)
    assert line == f"{script}: --resume none.tar: no checkpoint found there"


def test_the_message_names_what_the_user_typed():
    """The options are those of a node, and what is compared is that of a process."""
    module = load("main-wds.py")
    args = argparse.Namespace(resume="c.tar", ngpus_per_node=2)
    with pytest.raises(module.DataError, match="with --batch-size 8, not 16; "):
        module.check_order(args, {"batch_size": 4}, {"batch_size": 8}, 0)


# ---------------------------------------------------------------------------- outputs


@each_script
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_full_output(script, streams, folders, shards, tmp_path):
    """A log on a full disk costs neither the epoch nor the checkpoint nor the status."""
    args = [sys.executable, ROOT / script, *map(str, command(script, folders, shards))]
    with open("/dev/full", "w") as full, open(tmp_path / "log", "w") as log:
        outputs = {name: full if name in streams else log for name in ("stdout", "stderr")}
        done = subprocess.run(args, cwd=tmp_path, timeout=100, **outputs)
    assert done.returncode == 0
    assert checkpoint(tmp_path)["epoch"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_closed_output(number, shards, tmp_path):
    """`| tee` is gone after some lines, and then there is a signal: the checkpoint is that of the step in progress."""
    args = [sys.executable, ROOT / "main-wds.py", *map(str, WDS), "--epochs", "90", "--shards", shards]
    process = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("Epoch: [0][ 3/"):
            break
    process.stdout.close()
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["position"]["step"]) > (0, 3)


# ---------------------------------------------------------------------------- launchers


def args_of_rank(**more):
    common = {"distributed": True, "rank": 1, "world_size": 2, "gpu": None, "multiprocessing_distributed": False}
    return argparse.Namespace(**{**common, "no_accel": False, "ngpus_per_node": 1, **more})


ERRORS = {
    "NCCL": (dist.DistBackendError("NCCL error in: x.cpp\nDuplicate GPU detected : rank 1 and rank 0"), None),
    "gloo": (RuntimeError("[enforce fail at gloo/x.cc] Unable to find address for: eth7\nsecond line"), None),
    "closed": (RuntimeError("[gloo/pair.cc:547] Connection closed by peer [1.2.3.4]:5"), "lost the connection"),
    "reset": (RuntimeError("[gloo/pair.cc:547] Read error: Connection reset by peer"), "lost the connection"),
    "remote": (dist.DistBackendError("ncclRemoteError: a remote process exiting prematurely"), "lost the connection"),
    "killed": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "is killed by signal: Killed"),
    "bus": (
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that out of shared memory."
        ),
        "/dev/shm is full",
    ),
    "semaphore": (OSError(28, "No space left on device"), "/dev/shm is full"),
    "read-only": (RuntimeError("unable to open shared memory object </torch_7>: Read-only"), "/dev/shm is full"),
    "space": (RuntimeError("unable to write to file </torch_7_8>: No space left on device (28)"), "/dev/shm is full"),
}


@each_script
@pytest.mark.parametrize("case", ERRORS)
def test_the_text_of_an_error(case, script, monkeypatch):
    """Whole; only a connection that was closed is a rank that was lost."""
    module, (error, expected) = load(script), ERRORS[case]

    def failing(*_):
        raise error

    monkeypatch.setattr(module, "main_worker", failing)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(module.DataError) as caught:
        module.run_worker(None, 1, args_of_rank())
    assert (expected or str(error)) in str(caught.value)
    assert ("lost" in str(caught.value)) == (expected == "lost the connection")


@each_script
def test_odd_numbers(script, tmp_path):
    for args in (["--lr", "-1"], ["--lr", "nan"], ["--wd", "inf"], ["--momentum", "-0.1"], ["-b", 10**20], ["-b", 1.5]):
        assert f"argument {args[0]}" in error_of(script, *args, cwd=tmp_path)


@each_script
def test_names_that_the_output_cannot_hold(script, folders, shards, tmp_path):
    env = {"PYTHONIOENCODING": "ascii"}
    args = [*command(script, folders, shards), "--epochs", 0, "--resume", "nichtü.tar"]
    out, _ = run(script, *args, cwd=tmp_path, env=env)
    assert "'nicht\\xfc.tar'" in out


@each_script
def test_our_own_faults_keep_their_traceback(script, monkeypatch):
    module = load(script)
    monkeypatch.setattr(module, "main_worker", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        module.run_worker(None, 1, args_of_rank())


@each_script
@pytest.mark.parametrize("gpus, processes, fails", [(2, 4, True), (4, 2, False), (1, 4, False)])
def test_more_processes_than_gpus(gpus, processes, fails, script, monkeypatch):
    module = load(script)
    accelerator = {"is_available": True, "device_count": gpus, "current_accelerator": torch.device("cuda")}
    for name, value in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    args = args_of_rank(ngpus_per_node=processes)
    if fails:
        with pytest.raises(module.DataError, match="4 processes on this node, but it has 2 GPUs"):
            module.pick_device(1, args)
    else:
        assert module.pick_device(1, args) == torch.device("cuda", 1 % gpus)
    with pytest.raises(module.DataError, match=rf"--gpu 7: this machine has {gpus}"):
        module.pick_device(7, args_of_rank(gpu=7))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
@each_script
def test_a_gpu_where_there_is_none(script, start, folders, shards):
    args = [arg for arg in command(script, folders, shards) if arg != "--no-accel"]
    out, _ = start(*args, "--gpu", 3, script=script).finish()
    assert "=> --gpu 3 is ignored: no GPU found\n" in out and len(summary(out)) == 1


@each_script
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl"), ("xpu", "xccl")])
def test_backend(device, backend, script, monkeypatch):
    """Of the device's own, unless another one is given."""
    found = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: found.append(backend))
    for given in ("nccl", "mpi"):
        args = args_of_rank(dist_backend=given, device=torch.device(device), dist_url="env://")
        load(script).init_process_group(args)
    assert found == [backend, "mpi"]


@each_script
def test_env_without_a_local_rank(script, start, folders, shards, tmp_path):
    """As PyTorchJob and a plain srun start processes: --dist-url env:// is honoured."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    args = [*command(script, folders, shards), "--dist-url", "env://"]
    cwds = [tmp_path / "0", tmp_path / "1"]
    runs = [start(*args, script=script, cwd=cwds[rank], env={**env, "RANK": str(rank)}) for rank in (0, 1)]
    out, _ = runs[0].finish()
    assert runs[1].finish()[0] == ""
    whole = 32 if script == "main-orig.py" else 78
    assert f"/{-(-whole // 16)}]" in out and len(summary(out)) == 1
    assert (cwds[0] / "checkpoint.pth.tar").exists() and not (cwds[1] / "checkpoint.pth.tar").exists()
    line = error_of(script, *args, cwd=tmp_path, env={**env, "RANK": "2"})
    assert line == f"{script}: RANK 2, WORLD_SIZE 2: the rank must be from 0 to 1"
    line = error_of(script, *args, cwd=tmp_path)
    assert line == f"{script}: --dist-url env://: RANK is not set in the environment; torchrun sets it"


def nodes(start, script, tmp_path, *args_of_nodes):
    """One process on each node, as torchrun would start them: the lines with which they end, with status 2."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(args_of_nodes))}
    env |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    runs = []
    for rank, args in enumerate(args_of_nodes):
        runs.append(start(*args, script=script, cwd=tmp_path / str(rank), env={**env, "RANK": str(rank)}))
    return [run.finish(status=2, lines=1)[1][0].removeprefix(f"{script}: ") for run in runs]


@each_script
def test_nodes_that_disagree(script, start, folders, shards, tmp_path):
    """They would wait for each other forever; what differs is named."""
    args = command(script, folders, shards)
    cases = [(["-b", 4], "--batch-size is 8 on rank 0 but 4"), (["--lr", 1], "--lr is 0.1 on rank 0 but 1.0")]
    for changed, expected in cases:
        assert (
            nodes(start, script, tmp_path, args, [*args, *changed])
            == [f"{expected} on rank 1; it must be the same"] * 2
        )


def test_nodes_with_other_checkpoints_or_shards(start, shards, tmp_path):
    """Only the first node has the checkpoint, as on disks of their own; or there are other shards on the second."""
    args = [*WDS, "--shards", shards]
    run = start(*args, "-b", 2, cwd=tmp_path / "0").until("^Epoch", count=3).kill(signal.SIGTERM)
    run.finish(status=143, lines=1)
    found = nodes(start, "main-wds.py", tmp_path, *[[*args, *RESUME]] * 2)
    assert found == ["--resume: checkpoint found is True on rank 0 but False on rank 1; it must be the same"] * 2
    more = write_shards(tmp_path / "more", {"train": [90], "validation": [60]})
    found = nodes(start, "main-wds.py", tmp_path, args, [*WDS, "--shards", more])
    assert all(
        re.match(r"checksum of the list of val shards is \d+ on rank 0 but \d+ on rank 1", line) for line in found
    )
    for rank, folder in enumerate(("x", "y")):  # checkpoints of the same epoch, of other runs
        start(*args, "--epochs", 1, "--seed", rank, cwd=tmp_path / folder).finish()
    own = [[*args, "--resume", tmp_path / folder / "checkpoint.pth.tar", "--evaluate"] for folder in ("x", "y")]
    found = nodes(start, "main-wds.py", tmp_path, *own)
    assert all("must be the same" in line and line.startswith("checksum of the weights") for line in found)


# ---------------------------------------------------------------------------- disks


@each_script
def test_a_folder_that_cannot_be_written(script, folders, shards):
    """Said before the first step."""
    out, err = run(script, *command(script, folders, shards), cwd="/proc", status=2)
    assert err.startswith(f"{script}: current folder: can't write checkpoints there") and err.count("\n") == 1
    assert "Epoch: [" not in out


@each_script
def test_a_full_disk(script, tmp_path, monkeypatch):
    """Its own message, not PyTorch's; and nothing is left of it."""
    module = load(script)
    monkeypatch.chdir(tmp_path)
    module.save_checkpoint({"epoch": 1}, is_best=False)

    def opened(name, mode):
        Path(name).touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(module, "open", opened, raising=False)
    with pytest.raises(module.DataError, match=r"can't write checkpoint\.pth\.tar there \(No space left on device\)"):
        module.save_checkpoint({"epoch": 2, "state_dict": torch.zeros(100_000)}, is_best=False)
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"] and checkpoint(tmp_path)["epoch"] == 1


@each_script
def test_two_runs_in_one_folder(script, tmp_path, monkeypatch):
    """One writes its checkpoint while the other does."""
    module, fsync, others = load(script), os.fsync, [2]
    monkeypatch.chdir(tmp_path)

    def synced(file):
        if others:
            module.save_checkpoint({"epoch": others.pop()}, is_best=False)
            assert checkpoint(tmp_path)["epoch"] == 2
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    module.save_checkpoint({"epoch": 1}, is_best=False)
    assert checkpoint(tmp_path)["epoch"] == 1 and os.listdir(tmp_path) == ["checkpoint.pth.tar"]


def worker_of(run):
    """A data worker, which is a child of the training process."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        workers = [pid for pid, parent in run.alive().items() if parent == run.pid]
        if workers:
            return workers[0]
        time.sleep(0.01)
    raise AssertionError(run.output())


@each_script
def test_a_worker_is_killed(script, start, folders, shards):
    args = [*command(script, folders, shards), "--epochs", 90]
    run = start(*args, script=script).until("^Epoch", count=2)
    os.kill(worker_of(run), signal.SIGKILL)
    assert run.wait(60) == 2
    lines = [line for line in run.output().splitlines() if line.startswith(f"{script}: ")]
    assert len(lines) == 1 and "if out of memory, lower --workers" in lines[0]
    assert lines[0].startswith(f"{script}: a data worker ended (")


def small_memory(*args):
    """The command, with 2 MB of shared memory."""
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=2M tmpfs /dev/shm && exec "$@"', "-", *args]


@each_script
def test_shared_memory_is_full(script, folders, shards, tmp_path):
    if not shutil.which("unshare") or subprocess.run(small_memory("true"), capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    args = [arg for arg in command(script, folders, shards) if arg not in ("--image-size", 32)]
    args = small_memory(sys.executable, str(ROOT / script), *map(str, args))
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: /dev/shm is full: ")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------- models, URLs, indexes


@pytest.mark.parametrize("arch, reason", [("vit_b_16", "Expected 224"), ("alexnet", "too small")])
def test_an_image_size_that_does_not_fit(arch, reason, start, shards):
    _, (line,) = start(*ARGS, "-a", arch, "--image-size", 16, "--shards", shards).finish(status=2, lines=1)
    assert line.startswith(f"main-wds.py: --arch {arch}: it does not take --image-size 16 (") and reason in line


def test_a_password_is_never_printed(start, shards):
    """Neither of a URL, which is refused, nor of one in a command."""
    url = "http://me:secret@127.0.0.1:9/imagenet-train-{000000..000003}.tar"
    _, (line,) = start(*WDS, "--shards", shards, "--trainshards", url).finish(status=2, lines=1)
    assert "http://127.0.0.1:9/_info.json: " in line and "pipe:curl with --netrc" in line and "secret" not in line
    run = start(*WDS, "--shards", shards, "--trainshards", f"pipe:false {url}")
    while "retrying in" not in run.output():
        time.sleep(0.05)
    assert run.kill(signal.SIGKILL).wait(20) == -signal.SIGKILL
    assert "pipe:false http://127.0.0.1:9/" in run.output() and "secret" not in run.output()


def test_urls_that_nothing_opens(start, shards):
    for args in (["--shards", "s3://b/imagenet"], ["--shards", shards, "--trainshards", "s3://b/imagenet-{0..1}.tar"]):
        _, (line,) = start(*WDS, *args).finish(status=2, lines=1)
        assert line.startswith("main-wds.py: s3://b/imagenet") and "with a pipe: command" in line


def test_a_gzip_encoded_index(start, tmp_path):
    """As some servers send it."""
    folder = write_shards(tmp_path / "shards", {"train": [8], "validation": [4]})
    index = folder / "_info.json"
    index.write_bytes(gzip.compress(index.read_bytes()))
    out, _ = start(*WDS, "--epochs", 1, "--shards", folder).finish()
    assert "=> train: 8 images in 1 shards" in out and len(summary(out)) == 1
