"""Several processes: both scripts under torchrun and --multiprocessing-distributed, compared with one process."""

import json
import re

import pytest
import torch
from commands import (
    SMALL_MODEL,
    SMALL_RUN,
    args_of,
    checkpoint,
    free_port,
    run,
    run_ranks,
    spawned_ranks,
    start_nodes,
    summary,
    torchrun,
)
from make_data import noise, write_shards

FAST = ["-a", "shufflenet_v2_x0_5", "-j", 2, "-b", 16, "--lr", 0.01, "--epochs", 1, "--seed", 1, "--no-accel"]


def result(stdout, steps):
    """(accuracies, loss) of the only validation. Only rank 0 may print, in an epoch of that many steps."""
    assert stdout.count("=> creating model") == 1
    assert re.findall(r"Epoch: \[0\]\[ *(\d+)/(\d+)\]", stdout)[0] == ("1", str(steps))
    (accuracies,) = summary(stdout)
    return accuracies, last_loss(stdout)


def last_loss(stdout):
    """The average loss of the validation."""
    return float(re.findall(r"^Test: .*Loss \S+ \((\S+)\)", stdout, re.M)[-1])


@pytest.mark.parametrize(
    "dataset, launcher",
    [
        pytest.param("main-orig.py", "spawn", marks=pytest.mark.slow),
        pytest.param("orig", "spawn", marks=pytest.mark.slow),
        ("wds", "spawn"),
        pytest.param("wds", "torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_processes(dataset, launcher, start, small, tmp_path):
    """Their validation gives the accuracy and loss that one process finds for their checkpoint.

    With two samples per batch and a high learning rate, the ranks' batch norm statistics differ so much that the loss
    shows whether both ranks validate with rank 0's.
    """
    args = [*FAST, "-b", 4, "--lr", 0.05]
    if dataset == "main-orig.py":
        script = dataset
        args += [small / "data"]
    else:
        script = "main-wds.py"
        args += ["--data", small / "data", "--shards", small / "shards", "--image-size", 64, "--dataset", dataset]
    if launcher == "spawn":
        run_of_two = start(*args, *spawned_ranks(), script=script, typed=script == "main-orig.py")
    else:
        run_of_two = start(*args, script=script, before=torchrun())
    stdout, _ = run_of_two.finish(lines=None)
    accuracies, loss = result(stdout, steps=20)  # 40 samples per rank
    stdout, _ = run(script, *args, "--resume", "checkpoint.pth.tar", "--evaluate", cwd=tmp_path)
    assert summary(stdout) == [accuracies]
    assert last_loss(stdout) == pytest.approx(loss, rel=1e-3)


def test_validation_with_any_number_of_ranks(small, tmp_path):
    """One, two and four ranks find one accuracy and loss. Of four ranks, two have a second batch and two have not."""
    folders = ["--data", small / "data", "--shards", small / "shards", "--image-size", 64]
    run("main-wds.py", *FAST, *folders, cwd=tmp_path)
    results = []
    for dataset in ("orig", "wds"):
        for ranks in (1, 2, 4):
            args = [*FAST, *folders, "--dataset", dataset, "--resume", "checkpoint.pth.tar", "--evaluate"]
            stdout, _ = run_ranks(ranks, "main-wds.py", *args, "-b", 7 * ranks, cwd=tmp_path)
            results.append((*summary(stdout)[0], last_loss(stdout)))
    assert results == [pytest.approx(results[0], rel=1e-3)] * 6


@pytest.mark.slow
def test_two_processes_train_like_one(small, tmp_path):
    """Without random crops, batch norm and dropout, a step of two ranks is that of one with the whole batch."""
    index = json.loads((small / "shards/_info.json").read_text())
    index["splits"]["train"] = index["splits"]["validation"]  # 30 samples, a single step
    (tmp_path / "index.json").write_text(json.dumps(index))
    args = ["-a", "vit_b_32", "-j", 2, "-b", 30, "--lr", 0.01, "--epochs", 1, "--seed", 1, "--augmentation", "simple"]
    args += ["--shards", small / "shards", "--index", tmp_path / "index.json"]
    weights = []
    results = []
    for ranks in (1, 2):
        stdout, _ = run_ranks(ranks, "main-wds.py", *args, cwd=tmp_path)
        weights.append(checkpoint(tmp_path)["state_dict"])
        results.append(result(stdout, steps=1))
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
@pytest.mark.slow
def test_two_nodes(launcher, start, small, tmp_path):
    """Two launchers on one machine, each with two ranks, form one group. Only rank 0 prints and writes checkpoints."""
    args = [*FAST, "--shards", small / "shards", "--image-size", 64]
    address = f"127.0.0.1:{free_port()}"
    nodes = []
    for rank in (0, 1):
        cwd = tmp_path / str(rank)
        if launcher == "spawn":
            more = [
                "--multiprocessing-distributed",
                "--world-size",
                2,
                "--rank",
                rank,
                "--dist-url",
                f"tcp://{address}",
            ]
            nodes.append(start(*args, *more, cwd=cwd, typed=True))
        else:  # as README.md has it
            before = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"]
            nodes.append(start(*args, cwd=cwd, before=[*before, f"--rdzv-endpoint={address}"]))
    outputs = sorted((node.finish(lines=None)[0] for node in nodes), key=len)  # torchrun picks rank 0
    accuracies, _ = result(outputs[1], steps=3)  # 80 samples, 20 per rank, 8 per batch
    (written,) = tmp_path.glob("*/checkpoint.pth.tar")
    assert outputs[0] == ""
    stdout, _ = run("main-wds.py", *args, "--resume", written, "--evaluate", cwd=tmp_path)
    assert summary(stdout) == [accuracies]


def test_shards_give_as_many_steps_as_folders(small, tmp_path):
    """80 samples, which neither 3 ranks nor batches of 7 divide: 27 per rank, in 4 steps."""
    args = [*SMALL_MODEL, "-j", 3, "-b", 21, "--epochs", 1, "--data", small / "data", "--shards", small / "shards"]
    for dataset in ("orig", "wds"):
        stdout, _ = run_ranks(3, "main-wds.py", *args, "--dataset", dataset, cwd=tmp_path)
        assert re.findall(r"Epoch: \[0\]\[(\d/\d)\]", stdout) == ["1/4", "2/4", "3/4", "4/4"]
        assert len(summary(stdout)) == 1


# ---------------------------------------------------------------------------- launchers and nodes


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
    assert line == f"{script}: --rank 2 --world-size 2: give a rank from 0 to 1"
    _, (line,) = start(*args, script=script).finish(status=2, lines=1)
    assert line.startswith(f"{script}: --dist-url env://: WORLD_SIZE is not set")


def errors_of_nodes(start, script, tmp_path, *args_of_nodes):
    """The error of each node."""
    errors = []
    for node in start_nodes(start, script, tmp_path, *args_of_nodes):
        _, (line,) = node.finish(status=2, lines=1)
        assert line.endswith("; it must be the same")
        errors.append(line.removeprefix(f"{script}: "))
    return errors


@pytest.mark.parametrize(
    "script, option, value, expected",
    [
        ("main-orig.py", "-b", 4, "--batch-size is 8 on rank 0 but 4 on rank 1"),
        ("main-wds.py", "--lr", 1, "--lr is 0.1 on rank 0 but 1.0 on rank 1"),
        ("main-wds.py", "--seed", 3, "--seed is None on rank 0 but 3 on rank 1"),
    ],
)
def test_nodes_with_different_options(script, option, value, expected, start, folders, shards, tmp_path):
    """Without the check, the ranks might wait for each other forever."""
    args = args_of(script, folders, shards)
    found = errors_of_nodes(start, script, tmp_path, args, [*args, option, value])
    assert [line.partition(";")[0] for line in found] == [expected] * 2


def test_nodes_with_different_numbers_of_processes(script, start, folders, shards, tmp_path):
    """A node with one process and one with two divide the same batch size: their ranks' batches would differ."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 3}
    runs = []
    for rank, local in enumerate((1, 2, 2)):
        more = {"RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local}
        args = args_of(script, folders, shards)
        runs.append(start(*args, script=script, cwd=tmp_path / str(rank), env={**env, **more}))
    for run_of_rank in runs:
        _, (line,) = run_of_rank.finish(status=2, lines=1)
        assert line == f"{script}: --batch-size is 8 on rank 0 but 4 on rank 1; it must be the same"


def test_nodes_with_different_shards(start, shards, tmp_path):
    other = write_shards(tmp_path / "other", noise, train=[90], validation=[60])
    args_of_nodes = [[*SMALL_RUN, "--shards", folder] for folder in (shards, other)]
    for line in errors_of_nodes(start, "main-wds.py", tmp_path, *args_of_nodes):
        assert line.startswith("data is [")


def test_nodes_with_different_checkpoints(start, shards, tmp_path):
    """The nodes may not share a disk: only the first has the checkpoint, or the second has one of another run."""
    at = SMALL_RUN.index("--seed")
    args = [*SMALL_RUN[:at], *SMALL_RUN[at + 2 :], "--shards", shards, "--epochs", 1]
    for seed, name in ((5, "first"), (6, "second")):
        start(*args, "--seed", seed, cwd=tmp_path / name).finish()
    cases = [
        ("none", "checkpoint's epoch is 1 on rank 0 but 0 on rank 1"),
        ("second", "checksum of its weights is "),
    ]
    for name, expected in cases:
        paths = [tmp_path / folder / "checkpoint.pth.tar" for folder in ("first", name)]
        args_of_nodes = [[*args, "--resume", path] for path in paths]
        for line in errors_of_nodes(start, "main-wds.py", tmp_path, *args_of_nodes):
            assert line.startswith(expected)
