"""makeshards.py: what it writes, that it writes the same each time, and what it refuses."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, error_of, load, run
from PIL import Image
from torchvision import datasets


def members(folder, split):
    """[(name, bytes)] of all shards of the split, in order."""
    found = []
    for path in sorted(folder.glob(f"imagenet-{split}-*.tar")):
        with tarfile.open(path) as shard:
            found += [(member.name, shard.extractfile(member).read()) for member in shard]
    return found


def folder_of_images(root, classes, count=3, splits=("train", "val"), **save):
    for split in splits:
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (k, i, len(split))).save(folder / f"{name}_{i}.jpg", **save)


@pytest.fixture
def pets(tmp_path):
    """data/ with two classes, three images each a split, and an empty shards/."""
    folder_of_images(tmp_path / "data", ["cat", "dog"])
    (tmp_path / "shards").mkdir()
    return tmp_path


def test_as_the_readme_types_it(small, tmp_path):
    """ln -s, mkdir and makeshards.py: every file's own bytes once, ImageFolder's classes, counts at the end."""
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "shards").mkdir()
    stdout, _ = run("makeshards.py", cwd=tmp_path)
    assert stdout.splitlines() == ["train: 1 shards, 80 samples written", "val: 1 shards, 30 samples written"]
    for split, count in (("train", 80), ("val", 30)):
        imgs = datasets.ImageFolder(small / "data" / split).imgs
        content = members(tmp_path / "shards", split)
        keys = [name.removesuffix(".cls") for name, _ in content if name.endswith(".cls")]
        assert [name for name, _ in content] == [f"{key}.{end}" for key in keys for end in ("cls", "jpg")]
        assert sorted(map(int, keys)) == list(range(count))
        assert (keys == sorted(keys)) == (split == "val")  # training samples are shuffled over the whole split
        for name, data in content:
            path, label = imgs[int(name.partition(".")[0])]
            with open(path, "rb") as file:
                assert data == (file.read() if name.endswith("jpg") else str(label).encode())


def test_index(small):
    with open(small / "shards" / "_info.json") as file:
        index = json.load(file)
    assert list(index["splits"]) == ["train", "validation"]
    train = index["splits"]["train"]
    assert (train["name"], train["num_samples"], train["shard_lengths"]) == ("train", 80, [30, 30, 20])
    assert train["filenames"] == [f"imagenet-train-{i:06d}.tar" for i in range(3)]
    assert index["splits"]["validation"]["shard_lengths"] == [30]
    assert index["classes"] == datasets.ImageFolder(small / "data" / "train").classes
    for name, length in zip(train["filenames"], train["shard_lengths"], strict=True):
        with tarfile.open(small / "shards" / name) as shard:
            assert len(shard.getmembers()) == 2 * length


def test_imagenet_has_1282_and_50_shards():
    """The plan for splits of ImageNet's size, without its files."""
    makeshards, pair = load("makeshards.py"), load("main-orig.py")

    class Args:
        maxcount, seed, filekey = 1000, 0, False

    class Folder:
        root = ""

    shapes = {}
    for split, size in (("train", pair.TRAIN_SIZE), ("val", pair.VAL_SIZE)):
        Folder.imgs = [(f"{i}", 0) for i in range(size)]
        plan = makeshards.plan_split(Args, split, Folder)
        shapes[split] = len(plan["filenames"]), plan["shard_lengths"][0], plan["shard_lengths"][-1]
        assert sum(plan["shard_lengths"]) == plan["num_samples"] == size
    assert shapes == {"train": (1282, 1000, 167), "val": (50, 1000, 1000)}


def test_same_bytes_each_time_and_another_seed_another_order(pets):
    for name, seed in (("again", 0), ("other", 1)):
        (pets / name).mkdir()
        run("makeshards.py", "--shards", name, "--seed", seed, "--maxcount", 4, cwd=pets)
    run("makeshards.py", "--maxcount", 4, cwd=pets)
    names = sorted(os.listdir(pets / "shards"))
    assert names == ["_info.json", "imagenet-train-000000.tar", "imagenet-train-000001.tar",
                     "imagenet-val-000000.tar", "imagenet-val-000001.tar"]  # fmt: skip
    for name in names:
        assert (pets / "shards" / name).read_bytes() == (pets / "again" / name).read_bytes(), name
    assert members(pets / "shards", "train") != members(pets / "other", "train")
    assert sorted(members(pets / "shards", "train")) == sorted(members(pets / "other", "train"))
    assert members(pets / "shards", "val") == members(pets / "other", "val")
    # two headers and a block for each small file, and no further header
    size = (pets / "shards" / "imagenet-val-000000.tar").stat().st_size
    blocks = sum(2 + (len(data) - 1) // 512 for _, data in members(pets / "shards", "val")[:8])
    assert size == -(-(blocks + 2) * 512 // 10240) * 10240


def test_again_is_nothing_to_do_and_splits_come_one_by_one(pets):
    run("makeshards.py", "--splits", "train", cwd=pets)
    first = {path.name: path.stat().st_mtime_ns for path in (pets / "shards").glob("*.tar")}
    stdout, _ = run("makeshards.py", cwd=pets)
    assert stdout.splitlines() == ["train: 1 shards, 6 samples already there", "val: 1 shards, 6 samples written"]
    assert all((pets / "shards" / name).stat().st_mtime_ns == time for name, time in first.items())
    with open(pets / "shards" / "_info.json") as file:
        assert list(json.load(file)["splits"]) == ["train", "validation"]


@pytest.mark.parametrize("args", [["--splits", "test"], ["--maxcount", "0"], ["--maxcount", "many"], ["--bogus"]])
def test_wrong_options(args, pets):
    assert args[-1] in error_of("makeshards.py", *args, cwd=pets)


def test_filekey(pets):
    run("makeshards.py", "--filekey", cwd=pets)
    names = {name for name, _ in members(pets / "shards", "val")}
    assert names == {f"{pet}_{i}.{end}" for pet in ("cat", "dog") for i in range(3) for end in ("cls", "jpg")}
    os.rename(pets / "data/train/dog/dog_1.jpg", pets / "data/train/dog/cat_1.jpg")
    (pets / "other").mkdir()
    message = error_of("makeshards.py", "--filekey", "--shards", "other", cwd=pets)
    assert "cat/cat_1.jpg" in message and "dog/cat_1.jpg" in message
    assert os.listdir(pets / "other") == []


def test_devkit_is_no_matter(small, pets):
    """With meta.bin torchvision.datasets.ImageNet opens the folders, and its classes are the shards'."""
    found = datasets.ImageNet(small / "data", "train")
    assert len(found) == 80 and found.classes[0] == ("horizontal stripes",)
    with open(small / "shards" / "_info.json") as file:
        assert json.load(file)["classes"] == found.wnids
    run("makeshards.py", cwd=pets)  # and these have none


def nothing_written(folder):
    return not any(path.name != "keep" for path in folder.iterdir())


@pytest.mark.parametrize("case", ["no data", "flat", "empty class", "classes", "empty file", "text", "no shards"])
def test_refusals(case, pets):
    expected = {
        "no data": "data",
        "flat": "data/val",
        "empty class": "dog",
        "classes": "bird",
        "empty file": "cat/cat_1.jpg: not a readable image (it is empty)",
        "text": "cat/cat_1.jpg: not a readable image",
        "no shards": "mkdir ./shards",
    }[case]
    if case == "no data":
        shutil.rmtree(pets / "data")
    if case == "flat":
        shutil.rmtree(pets / "data/val/cat")
        os.rename(pets / "data/val/dog/dog_0.jpg", pets / "data/val/0.jpg")
        shutil.rmtree(pets / "data/val/dog")
    if case == "empty class":
        shutil.rmtree(pets / "data/val/dog")
        (pets / "data/val/dog").mkdir()
    if case == "classes":
        shutil.copytree(pets / "data/train/cat", pets / "data/train/bird")
    if case in ("empty file", "text"):
        (pets / "data/val/cat/cat_1.jpg").write_text("" if case == "empty file" else "GIF is not a JPEG")
    if case == "no shards":
        os.rmdir(pets / "shards")
    assert expected in error_of("makeshards.py", cwd=pets)
    assert case == "no shards" or nothing_written(pets / "shards")


def test_shards_of_something_else_are_left_alone(pets):
    run("makeshards.py", cwd=pets)
    before = {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    assert "maxcount" in error_of("makeshards.py", "--maxcount", 2, cwd=pets)
    assert "order" in error_of("makeshards.py", "--seed", 1, cwd=pets)
    folder_of_images(pets / "birds", ["owl", "tit"])
    assert "other classes" in error_of("makeshards.py", "--data", "birds", cwd=pets)
    folder_of_images(pets / "more", ["cat", "dog"], count=4)
    assert "number of images" in error_of("makeshards.py", "--data", "more", cwd=pets)
    assert before == {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    os.unlink(pets / "shards/imagenet-val-000000.tar")
    assert "imagenet-val-000000.tar is in its index but not there" in error_of("makeshards.py", cwd=pets)
    os.unlink(pets / "shards/_info.json")
    assert "imagenet-train-000000.tar is there without an index" in error_of("makeshards.py", cwd=pets)


def test_a_destination_that_is_full_is_left_empty(pets):
    """A limit on the size of files stands for a full disk: writing fails halfway."""
    (pets / "data/train/cat/big.jpg").write_bytes((pets / "data/train/cat/cat_0.jpg").read_bytes() + bytes(1 << 20))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))  # noqa: E731
    command = [sys.executable, str(ROOT / "makeshards.py")]
    done = subprocess.run(command, cwd=pets, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--shards ./shards" in done.stderr
    assert os.listdir(pets / "shards") == []
    os.mkdir(pets / "locked")
    os.rmdir(pets / "shards")
    (pets / "shards").write_text("a file")
    assert "shards" in error_of("makeshards.py", cwd=pets)
