"""Unusual machines, disks, outputs and launchers: the run works, or one line names the reason."""

import argparse
import contextlib
import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from commands import (
    RESUME,
    ROOT,
    SMALL_RUN,
    checkpoint,
    error_of,
    free_port,
    load,
    run,
    spawned_ranks,
    summary,
    wait_until,
)
from make_data import noise, write_shards

FAST = ["-a", "shufflenet_v2_x0_5", "-b", 8, "-j", 1, "-p", 1, "--epochs", 1, "--no-accel"]

each_script = pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])


def args_of(script, folders, shards):
    """The arguments with which a script trains an epoch, of four steps or of ten."""
    if script == "main-orig.py":
        return [*FAST, folders]
    return [*FAST, "--shards", shards, "--image-size", 32]


# ---------------------------------------------------------------------------- missing batches


@each_script
@pytest.mark.slow
def test_long_tmpdir(script, folders, shards, tmp_path):
    """PyTorch's workers can't send batches then; without the check, training would end after no step, with status 0."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    line = error_of(script, *args_of(script, folders, shards), cwd=tmp_path, env={"TMPDIR": str(long)})
    assert line.startswith(f"{script}: TMPDIR={long}: too long")


class ShortLoader(list):
    """A loader with one batch less than its length says."""

    def __len__(self):
        return super().__len__() + 1


@each_script
@pytest.mark.parametrize("batches", [0, 2])
def test_loader_that_ends_early(script, batches):
    module = load(script)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    args = argparse.Namespace(rank=0, print_freq=1, amp=False, distributed=False)
    args.device = torch.device("cpu")
    args.memory_format = torch.contiguous_format
    loader = ShortLoader([(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))] * batches)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(module.DataError, match=f"training loader ended after {batches} of {batches + 1} batches"):
        module.train(loader, model, criterion, optimizer, 0, args.device, args)
    with pytest.raises(module.DataError, match=f"validation loader ended after {batches} of {batches + 1} batches"):
        module.validate(loader, model, criterion, args)


# ---------------------------------------------------------------------------- --resume


@each_script
def test_options_that_the_checkpoint_overrides(script, start, folders, shards):
    """They are reported, and so is a run with no epoch left."""
    args = args_of(script, folders, shards)
    start(*args, "--lr", 0.01, "--wd", 0.001, script=script).finish()
    out, _ = start(*args, "--lr", 0.5, "--momentum", 0.8, "--wd", 0.001, *RESUME, script=script).finish()
    assert "=> the checkpoint's options are kept: --lr 0.01, not 0.5, --momentum 0.9, not 0.8\n" in out
    assert "=> all epochs are done (--epochs 1)" in out and "Epoch: [" not in out
    out, _ = start(*args, "--lr", 0.01, "--wd", 0.001, "--epochs", 2, *RESUME, script=script).finish()
    assert "are kept" not in out and "are done" not in out and "Epoch: [1]" in out


@each_script
def test_missing_checkpoint(script, start, folders, shards):
    """Training starts from the beginning, as job scripts expect. --evaluate fails."""
    args = [*args_of(script, folders, shards), "--resume", "none.tar"]
    out, _ = start(*args, script=script).finish()
    assert "=> no checkpoint found at 'none.tar'" in out
    assert "Epoch: [0]" in out and len(summary(out)) == 1
    _, (line,) = start(*args, "--evaluate", script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --resume none.tar: ")


# ---------------------------------------------------------------------------- outputs


@pytest.mark.slow
def test_full_output(shards, tmp_path):
    """A full log disk does not stop training."""
    command = [sys.executable, ROOT / "main-wds.py", *map(str, args_of("main-wds.py", None, shards))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, timeout=300, stdout=full, stderr=full)
    assert done.returncode == 0
    assert checkpoint(tmp_path)["epoch"] == 1


@pytest.mark.slow
def test_closed_output(shards, tmp_path):
    """After `| tee` has ended, training continues, and a signal still stops it with a checkpoint."""
    args = [*SMALL_RUN, "--epochs", 90, "--shards", shards, "--checkpoint-steps", 1]
    command = [sys.executable, ROOT / "main-wds.py", *map(str, args)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Epoch: [0][ 3/"):
                    break
            process.stdout.close()
            wait_until(lambda: position(tmp_path) >= (0, 6), lambda: lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert position(tmp_path) >= (0, 6)


def position(folder):
    """(epoch, step) of the checkpoint in a folder, if there is one."""
    state = {"epoch": 0}
    if (folder / "checkpoint.pth.tar").exists():
        state = checkpoint(folder)
    return state["epoch"], state.get("position", {"step": 0})["step"]


@pytest.mark.slow
def test_name_that_the_output_cannot_encode(shards, tmp_path):
    args = [*args_of("main-wds.py", None, shards), "--epochs", 0, "--resume", "nichtü.tar"]
    out, _ = run("main-wds.py", *args, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert "'nicht\\xfc.tar'" in out


@each_script
def test_numbers_out_of_range(script, tmp_path):
    for args in (["--lr", "-1"], ["--lr", "nan"], ["--wd", "inf"], ["--momentum", "-0.1"], ["-b", 10**20], ["-b", 1.5]):
        assert f"argument {args[0]}" in error_of(script, *args, cwd=tmp_path)


# ---------------------------------------------------------------------------- launchers


def args_of_rank(**more):
    common = {"distributed": True, "rank": 1, "world_size": 2, "gpu": None, "multiprocessing_distributed": False}
    return argparse.Namespace(**{**common, "no_accel": False, "ngpus_per_node": 1, **more})


ERRORS = {  # of libraries, which can't be provoked on any machine
    "NCCL": (dist.DistBackendError("NCCL error in: x\nDuplicate GPU"), "rank 1: NCCL error in: x\nDuplicate GPU"),
    "NCCL lost": (dist.DistBackendError("ncclRemoteError: a remote process exiting"), "rank 1 lost the connection"),
    "gloo lost": (
        RuntimeError("[gloo/pair.cc:547] Read error: Connection reset by peer"),
        "rank 1 lost the connection",
    ),
    "semaphore": (OSError(28, "No space left on device"), "/dev/shm is full"),
    "read-only": (RuntimeError("unable to open shared memory object </torch_7>: Read-only"), "/dev/shm is full"),
    "bug": (RuntimeError("size mismatch"), None),  # keeps its traceback
}


@each_script
@pytest.mark.parametrize("case", ERRORS)
def test_which_errors_are_user_errors(case, script, monkeypatch):
    module = load(script)
    error, expected = ERRORS[case]

    def main_worker(*_):
        raise error

    monkeypatch.setattr(module, "main_worker", main_worker)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(module.DataError if expected else RuntimeError) as caught:
        module.run_worker(None, 1, args_of_rank())
    assert str(caught.value).startswith(expected or "size mismatch")


@each_script
def test_more_processes_than_gpus(script, monkeypatch):
    """An error, unless there is only one GPU, which all processes then use."""
    module = load(script)
    gpus = 2
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(module.DataError, match="4 processes on this node, but it has 2 GPUs"):
        module.pick_device(1, args_of_rank(ngpus_per_node=4))
    gpus = 1
    assert module.pick_device(1, args_of_rank(ngpus_per_node=4)) == torch.device("cuda", 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
@each_script
def test_gpu_option_without_a_gpu(script, start, folders, shards):
    args = [arg for arg in args_of(script, folders, shards) if arg != "--no-accel"]
    out, _ = start(*args, "--gpu", 3, script=script).finish()
    assert "=> --gpu 3 is ignored" in out and len(summary(out)) == 1


@each_script
def test_dist_backend_that_is_not_available(script, folders, shards, tmp_path):
    args = [*args_of(script, folders, shards), *spawned_ranks(), "--dist-backend", "xccl"]
    assert "--dist-backend xccl: the ranks can't meet: " in error_of(script, *args, cwd=tmp_path)


@each_script
def test_env_without_local_rank(script, start, folders, shards, tmp_path):
    """PyTorchJob and a plain srun set RANK and WORLD_SIZE only: --dist-url env:// uses them."""
    args = [*args_of(script, folders, shards), "--dist-url", "env://"]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    cwds = [tmp_path / "0", tmp_path / "1"]
    runs = [start(*args, script=script, cwd=cwds[rank], env={**env, "RANK": rank}) for rank in (0, 1)]
    out, _ = runs[0].finish()
    assert runs[1].finish()[0] == ""
    steps = 2 if script == "main-orig.py" else 5  # 16 and 39 samples per rank
    assert f"/{steps}]" in out and len(summary(out)) == 1
    assert (cwds[0] / "checkpoint.pth.tar").exists() and not (cwds[1] / "checkpoint.pth.tar").exists()
    _, (line,) = start(*args, script=script, env={**env, "RANK": 2}).finish(status=2, lines=1)
    assert line.startswith(f"{script}: RANK 2, WORLD_SIZE 2: ")
    _, (line,) = start(*args, script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --dist-url env://: RANK is not set")


def errors_of_nodes(start, script, tmp_path, *args_of_nodes):
    """The error of each node, with one process per node as torchrun would start it."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": len(args_of_nodes)}
    env |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    runs = []
    for rank, args in enumerate(args_of_nodes):
        runs.append(start(*args, script=script, cwd=tmp_path / str(rank), env={**env, "RANK": rank}))
    errors = []
    for node in runs:
        _, (line,) = node.finish(status=2, lines=1)
        assert line.endswith("; it must be the same")
        errors.append(line.removeprefix(f"{script}: "))
    return errors


@pytest.mark.parametrize(
    "script, option, value, expected",
    [
        ("main-orig.py", "-b", 4, "--batch-size is 8 on rank 0 but 4 on rank 1"),
        ("main-wds.py", "--lr", 1, "--lr is 0.1 on rank 0 but 1.0 on rank 1"),
    ],
)
def test_nodes_with_different_options(script, option, value, expected, start, folders, shards, tmp_path):
    """Without the check, the ranks might wait for each other forever."""
    args = args_of(script, folders, shards)
    found = errors_of_nodes(start, script, tmp_path, args, [*args, option, value])
    assert [line.partition(";")[0] for line in found] == [expected] * 2


def test_nodes_with_different_shards(start, shards, tmp_path):
    other = write_shards(tmp_path / "other", noise, train=[90], validation=[60])
    args_of_nodes = [[*SMALL_RUN, "--shards", folder] for folder in (shards, other)]
    for line in errors_of_nodes(start, "main-wds.py", tmp_path, *args_of_nodes):
        assert line.startswith("checksum of the list of val shards is ")


def test_nodes_with_different_checkpoints(start, shards, tmp_path):
    """The nodes may not share a disk: only the first has the checkpoint, or the second has one of another run."""
    args = [*SMALL_RUN, "--shards", shards, "--epochs", 1]
    for name in ("first", "second"):
        start(*args, "--seed", len(name), cwd=tmp_path / name).finish()
    cases = [
        ("none", "--resume: checkpoint found is True on rank 0 but False"),
        ("second", "checksum of the weights is "),
    ]
    for name, expected in cases:
        paths = [tmp_path / folder / "checkpoint.pth.tar" for folder in ("first", name)]
        args_of_nodes = [[*args, "--resume", path] for path in paths]
        for line in errors_of_nodes(start, "main-wds.py", tmp_path, *args_of_nodes):
            assert line.startswith(expected)


# ---------------------------------------------------------------------------- disks and memory


@each_script
def test_folder_that_cannot_be_written(script, folders, shards):
    """Reported before the first step."""
    out, err = run(script, *args_of(script, folders, shards), cwd="/proc", status=2)
    assert err.startswith(f"{script}: can't write checkpoints to the current folder (") and err.count("\n") == 1
    assert "Epoch: [" not in out


@each_script
def test_write_error_keeps_the_last_checkpoint(script, tmp_path, monkeypatch):
    """And leaves no partial file. A limit on the size of files stands for a full disk."""
    module = load(script)
    monkeypatch.chdir(tmp_path)
    module.save_checkpoint({"epoch": 1}, is_best=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(module.DataError, match=r"can't write checkpoint\.pth\.tar .*\(File too large\)"):
            module.save_checkpoint({"epoch": 2, "state_dict": torch.zeros(100_000)}, is_best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"] and checkpoint(tmp_path)["epoch"] == 1


@each_script
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


@each_script
def test_killed_worker(script, start, folders, shards):
    run = start(*args_of(script, folders, shards), "--epochs", 90, script=script).until("^Epoch", count=2)

    def has_ended():
        """Kill the workers, until a kill comes before its worker has ended by itself."""
        processes = run.alive()
        for pid, parent in processes.items():
            if parent == run.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return run.pid not in processes

    wait_until(has_ended, run.output)
    _, lines = run.finish(status=2, lines=None)
    (line,) = [line for line in lines if line.startswith(f"{script}: ")]
    assert line.startswith(f"{script}: a data worker died (") and "lower --workers" in line


def small_memory(*args):
    """The command, with 2 MB of shared memory."""
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=2M tmpfs /dev/shm && exec "$@"', "-", *args]


@each_script
@pytest.mark.slow
def test_full_shared_memory(script, folders, shards, tmp_path):
    if not shutil.which("unshare") or subprocess.run(small_memory("true"), capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    args = [arg for arg in args_of(script, folders, shards) if arg not in ("--image-size", 32)]
    command = small_memory(sys.executable, str(ROOT / script), *map(str, args))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: /dev/shm is full: ")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------- models, URLs, indexes


def test_image_size_that_the_model_cannot_take(start, shards):
    args = [*SMALL_RUN, "-a", "vit_b_16", "--image-size", 16, "--shards", shards]
    _, (line,) = start(*args).finish(status=2, lines=1)
    assert line.startswith("main-wds.py: --arch vit_b_16: it does not support --image-size 16 (")


def test_passwords_are_never_printed(start, shards):
    """A URL with a password is refused, but one may be part of a command."""
    url = "http://me:secret@127.0.0.1:9/imagenet-train-{000000..000003}.tar"
    _, (line,) = start(*SMALL_RUN, "--shards", shards, "--trainshards", url).finish(status=2, lines=1)
    assert line.startswith("main-wds.py: http://127.0.0.1:9/_info.json: ") and "secret" not in line
    run = start(*SMALL_RUN, "--shards", shards, "--trainshards", f"pipe:false {url}")
    wait_until(lambda: "retrying in" in run.output(), run.output)
    run.kill(signal.SIGKILL).finish(status=-signal.SIGKILL, lines=None)
    assert "pipe:false http://127.0.0.1:9/" in run.output() and "secret" not in run.output()


def test_unknown_url_schemes(start, shards):
    for args in (["--shards", "s3://b/imagenet"], ["--shards", shards, "--trainshards", "s3://b/imagenet-{0..1}.tar"]):
        _, (line,) = start(*SMALL_RUN, *args).finish(status=2, lines=1)
        assert line.startswith("main-wds.py: s3://b/imagenet") and "pipe:" in line


def test_gzip_encoded_index(start, tmp_path):
    """Some servers send it like that."""
    folder = write_shards(tmp_path / "shards", noise, train=[8], validation=[4])
    index = folder / "_info.json"
    index.write_bytes(gzip.compress(index.read_bytes()))
    out, _ = start(*SMALL_RUN, "--epochs", 1, "--shards", folder).finish()
    assert "=> train: 8 images in 1 shard" in out and len(summary(out)) == 1
