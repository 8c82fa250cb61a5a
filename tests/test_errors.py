"""User errors: one line on stderr that names the cause and the fix, exit status 2, no traceback."""

import os
import shutil

import pytest
import torch
from commands import error_of, spawned_ranks
from make_data import noise, write_folders, write_shards
from torchvision import models

FAST = ["-a", "shufflenet_v2_x0_5", "-j", "2", "-b", "16", "--epochs", "1", "--no-accel"]


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small dataset and its shards, which tests may damage."""
    shutil.copytree(small / "data", tmp_path / "data")
    shutil.copytree(small / "shards", tmp_path / "shards")
    return tmp_path


@pytest.mark.parametrize(
    "script, args, expected",
    [
        ("main-orig.py", ["-a", "resnet81"], "resnet18"),
        ("main-wds.py", ["-a", "inception_v3"], "inception_v3"),
        ("main-orig.py", ["--epochs", "many"], "--epochs"),
        ("main-orig.py", ["-b", "0"], "0 is less than 1"),
        ("main-orig.py", ["--bogus"], "--bogus"),
        ("main-wds.py", ["--dataset", "zip"], "zip"),
        ("main-wds.py", ["--world-size", "2"], "--rank"),
        ("main-wds.py", ["--rank", "1"], "--world-size"),
        ("main-wds.py", ["-b", "1", "--multiprocessing-distributed", "--no-accel"], "--batch-size 1"),
    ],
)
def test_invalid_options(script, args, expected, tmp_path):
    assert expected in error_of(script, *args, cwd=tmp_path)


def test_more_classes_than_outputs(script, tmp_path):
    write_folders(tmp_path / "data", train=1, val=1, classes=[f"n{i:08}" for i in range(1001)])
    args = ["data"] if script == "main-orig.py" else ["--dataset", "orig"]
    assert "1001 class folders, but the model has 1000 outputs" in error_of(script, *FAST, *args, cwd=tmp_path)


def test_folders(copy):
    """Class folders that differ, a split without any, and no folder at all."""
    args = ["main-orig.py", *FAST, "data"]
    os.rename(copy / "data/val/n90000001", copy / "data/val/n90000099")
    assert "n90000001, n90000099" in error_of(*args, cwd=copy)
    shutil.rmtree(copy / "data/val")
    (copy / "data/val").mkdir()
    shutil.copy(next(copy.glob("data/train/*/*")), copy / "data/val/flat.JPEG")
    assert "data/val" in error_of(*args, cwd=copy)
    shutil.rmtree(copy / "data")
    message = error_of(*args, cwd=copy)
    assert "data/val" in message and "must hold train/ and val/" in message


@pytest.mark.parametrize(
    "kind, decode",
    [
        ("empty", "tensor"),
        ("cut off", "tensor"),
        ("missing", "pil"),
        pytest.param("empty", "pil", marks=pytest.mark.slow),
        pytest.param("cut off", "pil", marks=pytest.mark.slow),
        pytest.param("missing", "tensor", marks=pytest.mark.slow),
    ],
)
def test_unreadable_image(kind, decode, copy):
    """In a folder the error names the path; in shards, the shard and the key."""
    image = sorted(copy.glob("data/val/*/*"))[7]
    whole = image.read_bytes()
    image.unlink()
    if kind == "missing":
        image.symlink_to("nowhere")  # as a file that is deleted after it was listed
    else:
        image.write_bytes(b"\xff\xd8\xff\xe0 cut off" if kind == "cut off" else b"")
    args = [*FAST, "--evaluate"]
    if decode == "pil":
        assert str(image.relative_to(copy)) in error_of("main-orig.py", *args, "data", cwd=copy)
    args += ["--decode", decode]
    assert str(image.relative_to(copy)) in error_of("main-wds.py", *args, "--dataset", "orig", cwd=copy)
    if kind == "cut off":
        shard = copy / "shards/imagenet-val-000000.tar"
        shard.write_bytes(shard.read_bytes().replace(whole[:1000], bytes(1000)))
        message = error_of("main-wds.py", *args, cwd=copy)
        assert "imagenet-val-000000.tar: sample 0000007" in message and "not a readable image" in message


def test_checkpoints(small, tmp_path):
    """Another file, another dictionary, another architecture, and weights of other shapes."""
    state = {"epoch": 1, "arch": "resnet50", "best_acc1": 0.0, "state_dict": {}, "optimizer": {}, "scheduler": {}}
    weights = models.get_model("squeezenet1_1").state_dict()
    (tmp_path / "text.tar").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.tar")
    torch.save(state, tmp_path / "arch.tar")
    torch.save({**state, "arch": "shufflenet_v2_x0_5", "state_dict": weights}, tmp_path / "shape.tar")
    for name, fix in (("text.tar", ""), ("other.tar", ""), ("arch.tar", "--arch resnet50"), ("shape.tar", "not fit")):
        message = error_of("main-orig.py", *FAST, small / "data", "--resume", name, cwd=tmp_path)
        assert name in message and fix in message


def test_more_ranks_than_samples(script, tmp_path):
    write_folders(tmp_path / "data", train=1, val=1, classes=["a"])
    write_shards(tmp_path / "shards", noise, train=[1], validation=[1])
    args = ["data"] if script == "main-orig.py" else []
    message = error_of(script, *FAST, *args, *spawned_ranks(), cwd=tmp_path)
    assert message == f"{script}: 2 ranks but 1 training samples: start fewer processes"


def test_checkpoint_cannot_be_written(small, tmp_path):
    """A folder is in its place; no partial file is left."""
    (tmp_path / "checkpoint.pth.tar").mkdir()
    args = [*FAST, "--shards", small / "shards", "--image-size", 32]
    assert "can't write checkpoint.pth.tar" in error_of("main-wds.py", *args, cwd=tmp_path)
    assert set(os.listdir(tmp_path)) <= {"checkpoint.pth.tar", "model_best.pth.tar"}


@pytest.mark.slow
def test_pretrained_without_a_network(tmp_path):
    env = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    message = error_of("main-orig.py", *FAST, "--pretrained", cwd=tmp_path, env=env)
    assert "shufflenet" in message and str(tmp_path) in message
