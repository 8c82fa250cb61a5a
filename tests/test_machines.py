"""Unusual machines and outputs: the run works, or one line names the reason."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from commands import (
    ROOT,
    SMALL_RUN,
    Batches,
    args_of,
    checkpoint,
    error_of,
    load,
    run,
    wait_until,
)

# ---------------------------------------------------------------------------- missing batches


@pytest.mark.slow
def test_long_tmpdir(script, folders, shards, tmp_path):
    """PyTorch's workers can't send batches then; without the check, training would wait for them forever."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    line = error_of(script, *args_of(script, folders, shards), cwd=tmp_path, env={"TMPDIR": str(long)})
    assert line.startswith(f"{script}: TMPDIR={long}: too long")


class ShortLoader(Batches):
    """A loader with one batch less than its length says."""

    def __len__(self):
        return super().__len__() + 1


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


def test_numbers_out_of_range(script, tmp_path):
    for args in (["--lr", "-1"], ["--lr", "nan"], ["--wd", "inf"], ["--momentum", "-0.1"], ["-b", 10**20], ["-b", 1.5]):
        assert f"argument {args[0]}" in error_of(script, *args, cwd=tmp_path)


# ---------------------------------------------------------------------------- processes and memory


def test_killed_worker(script, start, folders, shards):
    """PyTorch's error, and no process is left."""
    run = start(*args_of(script, folders, shards), script=script, instrument="stay_in_a_step").until("^held$")
    worker = min(pid for pid, parent in run.alive().items() if parent == run.pid)
    os.kill(worker, signal.SIGKILL)
    _, lines = run.finish(status=1, lines=None)
    assert f"RuntimeError: DataLoader worker (pid {worker}) is killed by signal: Killed" in "\n".join(lines)


def small_memory(*args):
    """The command, with 2 MB of shared memory."""
    return ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=2M tmpfs /dev/shm && exec "$@"', "-", *args]


@pytest.mark.slow
def test_full_shared_memory(script, folders, shards, tmp_path):
    if not shutil.which("unshare") or subprocess.run(small_memory("true"), capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    args = [arg for arg in args_of(script, folders, shards) if arg not in ("--image-size", 32)]
    command = small_memory(sys.executable, str(ROOT / script), *map(str, args))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert re.search("shared memory|No space left on device|bus error", done.stderr, re.I)
