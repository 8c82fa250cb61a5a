"""Several processes: both scripts under torchrun and --multiprocessing-distributed, and against one process."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, forked, free_port, run, run_command, summary

FAST = ["-a", "shufflenet_v2_x0_5", "-j", "2", "-b", "16", "--lr", "0.01", "--epochs", "1", "--seed", "1"]


def torchrun(processes, script, *args, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::DeprecationWarning,error::FutureWarning"}
    return run_command([*command, str(ROOT / script), *map(str, args)], cwd=cwd, env=env)[0]


def spawned(script, *args, cwd):
    """Two processes by --multiprocessing-distributed."""
    ddp = ["--multiprocessing-distributed", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    return run(script, *args, *ddp, cwd=cwd, typed=True)[0]


def checked(stdout, steps):
    """The validation's result, when each line stands there once and the epoch had that many steps."""
    assert stdout.count("=> creating model") == 1
    assert re.findall(r"Epoch: \[0\]\[(?: *)(\d+)/(\d+)\]", stdout)[0] == ("1", str(steps))
    assert len(summary(stdout)) == 1
    return summary(stdout)[0], last_loss(stdout)


def last_loss(stdout):
    """The average over all ranks: the last validation line has it."""
    return float(re.findall(r"^Test: .*Loss \S+ \((\S+)\)", stdout, re.M)[-1])


@pytest.mark.parametrize("start", [spawned, lambda *args, cwd: torchrun(2, *args, cwd=cwd)], ids=["spawn", "torchrun"])
@pytest.mark.parametrize("dataset", ["original", "orig", "wds"])
def test_two_processes(dataset, start, small, tmp_path):
    """They train; and one process that evaluates their checkpoint finds the very accuracy and loss that they found."""
    if dataset == "original":
        script, args = "main-orig.py", [*FAST, small / "data"]
    else:
        script, args = "main-wds.py", [*FAST, "--data", small / "data", "--shards", small / "shards"]
        args += ["--image-size", 64, "--dataset", dataset]
    found = checked(start(script, *args, cwd=tmp_path), steps=5)  # 80 samples, 40 a rank, 8 a batch
    assert (tmp_path / "checkpoint.pth.tar").exists()
    stdout, _ = run(script, *args, "--resume", "checkpoint.pth.tar", "--evaluate", cwd=tmp_path)
    assert summary(stdout) == [found[0]]
    assert last_loss(stdout) == pytest.approx(found[1], rel=1e-3)


def test_any_number_of_ranks_evaluates_the_same(small, tmp_path):
    """1, 2, 3 and 5 ranks, of which 3 and 5 do not divide the batches equally: one accuracy and one loss."""
    folders = ["--data", small / "data", "--shards", small / "shards", "--image-size", 64]
    run("main-wds.py", *FAST, *folders, cwd=tmp_path)
    results = {}
    for dataset in ("orig", "wds"):
        for ranks in (1, 2, 3, 5):
            args = [*FAST, *folders, "--dataset", dataset, "--resume", "checkpoint.pth.tar", "--evaluate"]
            args[args.index("-b") + 1] = 4 * ranks
            stdout, _ = forked(ranks, "main-wds.py", *args, cwd=tmp_path)
            results[dataset, ranks] = *summary(stdout)[0], pytest.approx(last_loss(stdout), rel=1e-3)
    assert all(result == results["wds", 1] for result in results.values()), results


def test_two_processes_train_what_one_does(small, tmp_path):
    """Batches of the whole set, a network without batch norm and dropout, no random crops: the same steps in halves."""
    weights = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        args = ["-a", "vit_b_32", "-j", 2, "-b", 30, "--lr", 0.01, "--epochs", 1, "--seed", 1]
        args += [
            "--augmentation",
            "simple",
            "--shards",
            small / "shards",
            "--trainshards",
            small / "shards/imagenet-val-000000.tar",
        ]
        stdout, _ = forked(processes, "main-wds.py", *args, cwd=folder)
        state = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
        weights[processes] = state["state_dict"], summary(stdout), last_loss(stdout)
    assert weights[1][1] == weights[2][1]
    assert weights[1][2] == pytest.approx(weights[2][2], rel=1e-3)
    for name, value in weights[1][0].items():
        assert torch.allclose(value, weights[2][0][name], atol=1e-4), name


@pytest.mark.parametrize("start", ["spawn", "torchrun"])
def test_two_nodes(start, small, tmp_path):
    """Two launchers on one machine, each with two processes: four ranks of one group, whose output rank 0 prints."""
    args, port = [*FAST, "--shards", small / "shards", "--image-size", 64], free_port()
    before, after = [], ["--multiprocessing-distributed", "--world-size", 2, "--dist-url", f"tcp://127.0.0.1:{port}"]
    if start == "torchrun":  # as README.md types it
        before, after = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"], []
        before += [f"--rdzv-endpoint=localhost:{port}"]
    nodes = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        rest = [*before, ROOT / "main-wds.py", *args, *after, *(["--rank", rank] if after else [])]
        command = [sys.executable, *map(str, rest)]
        nodes.append(subprocess.Popen(command, cwd=tmp_path / str(rank), stdout=subprocess.PIPE, text=True))
    outputs = sorted((node.communicate(timeout=300)[0] for node in nodes), key=len)
    assert [node.returncode for node in nodes] == [0, 0]
    found = checked(outputs[1], steps=3)  # 80 samples, 20 a rank, 8 a batch
    written = list(tmp_path.glob("*/checkpoint.pth.tar"))
    assert outputs[0] == "" and len(written) == 1
    stdout, _ = run("main-wds.py", *args, "--resume", written[0], "--evaluate", cwd=tmp_path)
    assert summary(stdout) == [found[0]]


def test_as_many_steps_from_shards_as_from_folders(small, tmp_path):
    """80 samples, which neither 3 ranks nor batches of 7 divide: an epoch of 27 samples a rank, in 4 steps."""
    args = ["-a", "shufflenet_v2_x0_5", "-j", 3, "-b", 21, "--epochs", 1, "--image-size", 32, "-p", 1]
    args += ["--data", small / "data", "--shards", small / "shards"]
    for dataset in ("orig", "wds"):
        stdout, _ = forked(3, "main-wds.py", *args, "--dataset", dataset, cwd=tmp_path)
        assert re.findall(r"Epoch: \[0\]\[(\d/\d)\]", stdout) == ["1/4", "2/4", "3/4", "4/4"]
        assert len(summary(stdout)) == 1
