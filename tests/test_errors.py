"""Bad input: one line on stderr that names the thing, exit status 2, no traceback (design section 7)."""

import itertools
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import error_of, load, run
from torchvision import models

FAST = ["-a", "shufflenet_v2_x0_5", "-j", "2", "-b", "16", "--epochs", "1"]


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small dataset and its shards, to be spoilt."""
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
        ("main-wds.py", ["-b", "1", "--multiprocessing-distributed"], "too few for the 2"),
    ],
)
def test_options(script, args, expected, tmp_path):
    assert expected in error_of(script, *args, cwd=tmp_path)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_too_many_classes(script, copy, tmp_path):
    for split, i in itertools.product(("train", "val"), range(991)):
        (tmp_path / "data" / split / f"n{i:08}").mkdir()
        shutil.copy(next((copy / "data/val/n90000001").iterdir()), tmp_path / "data" / split / f"n{i:08}")
    args = [tmp_path / "data"] if script == "main-orig.py" else ["--dataset", "orig", "--data", tmp_path / "data"]
    assert "1001 class folders, but the model has 1000 outputs" in error_of(script, *FAST, *args, cwd=tmp_path)


def test_too_many_classes_in_shards(copy):
    path = copy / "shards/_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": [f"n{i:08}" for i in range(1001)]}))
    assert "1001 classes, but the model has 1000 outputs" in error_of("main-wds.py", *FAST, cwd=copy)


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py"])
def test_an_image_that_has_gone(script):
    with pytest.raises(load(script).DataError, match=r"none\.jpg: No such file"):
        load(script).load_image("none.jpg")


def test_folders(copy, tmp_path):
    orig = lambda *args: error_of("main-orig.py", *FAST, "data", *args, cwd=copy)  # noqa: E731
    os.rename(copy / "data/val/n90000001", copy / "data/val/n90000099")
    assert "n90000001, n90000099" in orig()
    shutil.rmtree(copy / "data/val")
    (copy / "data/val").mkdir()
    shutil.copy(next(copy.glob("data/train/*/*")), copy / "data/val/flat.JPEG")
    assert "data/val" in orig() and "folder of images per class" in orig()
    shutil.rmtree(copy / "data")
    assert "data/val" in orig() and "must hold train/ and val/" in orig()
    os.unlink(copy / "shards/imagenet-val-000000.tar")
    assert "imagenet-val-000000.tar" in error_of("main-wds.py", *FAST, cwd=copy)
    os.unlink(copy / "shards/_info.json")
    assert "makeshards.py" in error_of("main-wds.py", *FAST, cwd=copy)
    assert "none*.tar" in error_of("main-wds.py", *FAST, "--valshards", "shards/none*.tar", cwd=copy)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 cut off"], ids=["empty", "cut off"])
@pytest.mark.parametrize("decode", ["pil", "tensor"])
def test_an_image_that_is_none(content, decode, copy):
    """From the folder its path is named, from the shard the shard and the key."""
    victim = sorted(copy.glob("data/val/*/*"))[7]
    whole = victim.read_bytes()
    victim.write_bytes(content or b"")
    args = [*FAST, "--evaluate", "--decode", decode]
    if decode == "pil":
        assert str(victim.relative_to(copy)) in error_of("main-orig.py", *FAST, "--evaluate", "data", cwd=copy)
    assert victim.name in error_of("main-wds.py", *args, "--dataset", "orig", cwd=copy)
    shard = copy / "shards/imagenet-val-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(whole[:1000], bytes(1000)))
    message = error_of("main-wds.py", *args, cwd=copy)
    assert "imagenet-val-000000.tar: sample 0000007" in message and "not a readable image" in message


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda split: split.update(num_samples=81), "num_samples"),
        (lambda split: split["shard_lengths"].append(1), "_info.json"),
        (lambda split: split.pop("filenames"), "filenames"),
        (lambda split: split.update(shard_lengths=[29, 31, 20]), "by its index"),
    ],
)
def test_an_index_that_disagrees(change, expected, copy):
    path = copy / "shards/_info.json"
    index = json.loads(path.read_text())
    change(index["splits"]["train"])
    path.write_text(json.dumps(index))
    assert expected in error_of("main-wds.py", *FAST, "--image-size", 32, cwd=copy)


def test_checkpoints(small, tmp_path):
    resume = lambda path: error_of("main-orig.py", *FAST, small / "data", "--resume", path, cwd=tmp_path)  # noqa: E731
    (tmp_path / "text.tar").write_text("this is no checkpoint")
    assert "text.tar" in resume("text.tar")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.tar")
    assert "other.tar" in resume("other.tar")
    state = {"epoch": 1, "arch": "resnet50", "best_acc1": 0.0, "state_dict": {}, "optimizer": {}, "scheduler": {}}
    torch.save(state, tmp_path / "arch.tar")
    assert "--arch resnet50" in resume("arch.tar")
    state.update(arch="shufflenet_v2_x0_5", state_dict=models.get_model("squeezenet1_1").state_dict())
    torch.save(state, tmp_path / "shape.tar")
    assert "shape.tar: it does not fit" in resume("shape.tar")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_something_is_not_run(small, tmp_path):
    """Nor is it advised to run it, as PyTorch's own message does."""
    (tmp_path / "evil.tar").write_bytes(pickle.dumps({"epoch": Malicious()}))
    assert "evil.tar" in error_of("main-orig.py", *FAST, small / "data", "--resume", "evil.tar", cwd=tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_more_ranks_than_samples(tmp_path):
    run("tests/sample.py", "--train", 1, "--val", 1, cwd=tmp_path)
    shutil.rmtree(tmp_path / "data/val")
    for wnid in os.listdir(tmp_path / "data/train"):
        if wnid != "n90000001":
            shutil.rmtree(tmp_path / "data/train" / wnid)
    shutil.copytree(tmp_path / "data/train", tmp_path / "data/val")
    (tmp_path / "shards").mkdir()
    run("makeshards.py", cwd=tmp_path)
    ddp = ["--multiprocessing-distributed", "--dist-url", "tcp://127.0.0.1:29872"]
    for args in (["main-orig.py", "data"], ["main-wds.py"]):
        message = error_of(*args, *FAST, *ddp, cwd=tmp_path)
        assert message == f"{args[0]}: 2 ranks but 1 training samples: start fewer processes"


def test_a_checkpoint_that_cannot_be_written(small, tmp_path):
    """A folder in its place; then nothing half-written is left."""
    (tmp_path / "checkpoint.pth.tar").mkdir()
    args = [*FAST, "--shards", small / "shards", "--image-size", 32]
    assert "can't write checkpoint.pth.tar" in error_of("main-wds.py", *args, cwd=tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_the_ranks_cannot_meet(small, tmp_path):
    args = [*FAST, "--shards", small / "shards", "--multiprocessing-distributed", "--dist-url", "pigeon://here"]
    assert "--dist-url pigeon://here" in error_of("main-wds.py", *args, cwd=tmp_path)


def test_no_network_for_pretrained(tmp_path):
    env = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    message = error_of("main-orig.py", *FAST, "--pretrained", cwd=tmp_path, env=env)
    assert "shufflenet" in message and str(tmp_path) in message


@pytest.mark.parametrize("script", ["main-orig.py", "main-wds.py", "makeshards.py"])
def test_a_pattern_that_the_shell_expanded(script, tmp_path):
    option = {"main-orig.py": "data", "main-wds.py": "--trainshards", "makeshards.py": "--index"}[script]
    message = error_of(script, option, *(["a-0.tar"] if option[0] == "-" else []), "a-1.tar", "a-2.tar", cwd=tmp_path)
    assert "a-2.tar; quote patterns such as 'a-{0..9}.tar'" in message
