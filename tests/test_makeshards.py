"""makeshards.py: what it writes, that it writes the same each time, and what it refuses."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset as wds
from conftest import ROOT, error_of, load, run
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2


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
    assert stdout.splitlines() == ["train: 1 shard, 80 samples written", "val: 1 shard, 30 samples written"]
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
        data, maxcount, seed, filekey, resize, quality = "data", 1000, 0, False, None, None

    shapes = {}
    for split, size in (("train", pair.TRAIN_SIZE), ("val", pair.VAL_SIZE)):
        plan, shards = makeshards.plan_split(Args, split, [(f"{i}", 0) for i in range(size)], ["class"])
        assert [len(shard) for shard in shards] == plan["shard_lengths"]
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
    assert stdout.splitlines() == ["train: 1 shard, 6 samples already there", "val: 1 shard, 6 samples written"]
    assert all((pets / "shards" / name).stat().st_mtime_ns == time for name, time in first.items())
    with open(pets / "shards" / "_info.json") as file:
        assert list(json.load(file)["splits"]) == ["train", "validation"]


@pytest.mark.parametrize("args", [["--splits", "test"], ["--maxcount", "0"], ["--maxcount", "many"], ["--bogus"],
                                  ["--workers", "4097"]])  # fmt: skip
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


@pytest.mark.parametrize("name", ["__cat", "._cat"])
def test_filekey_that_readers_skip(name, pets):
    os.rename(pets / "data/train/cat/cat_1.jpg", pets / f"data/train/cat/{name}.jpg")
    message = error_of("makeshards.py", "--filekey", cwd=pets)
    assert f"cat/{name}.jpg: " in message and "leave --filekey out" in message
    assert nothing_written(pets / "shards")
    run("makeshards.py", cwd=pets)


@pytest.mark.parametrize("name", ["k\u00e4tzchen", "\u732b", "c" * 96, "c" * 97, "\u732b" * 80])
def test_filekey_with_other_letters_or_long(name, pets):
    """Only those that a plain header can't hold have another one; webdataset and tar read both."""
    os.rename(pets / "data/val/cat/cat_1.jpg", pets / f"data/val/cat/{name}.jpg")
    run("makeshards.py", "--filekey", cwd=pets)
    shard = pets / "shards/imagenet-val-000000.tar"
    keys = [f"cat_{i}" for i in (0, 2)] + [name] + [f"dog_{i}" for i in range(3)]
    assert [sample["__key__"] for sample in wds.WebDataset(str(shard), shardshuffle=False)] == keys
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, env={"LC_ALL": "C.UTF-8"}, check=True)
    assert [line.removesuffix(".jpg") for line in listed.stdout.splitlines() if line.endswith(".jpg")] == keys
    more = len(shard.read_bytes().split(b"PaxHeader")) - 1
    assert more == (0 if name.isascii() and len(name) < 97 else 2)


def test_names_of_members(pets):
    """The image's has the file's own ending, in lower case; .jpeg becomes .jpg."""
    for i, ending in enumerate(("JPEG", "PNG", "webp")):
        image = pets / f"data/train/cat/cat_{i}.jpg"
        Image.open(image).save(image.with_suffix(f".{ending}"))
        image.unlink()
    run("makeshards.py", "--filekey", cwd=pets)
    names = {name for name, _ in members(pets / "shards", "train") if name.startswith("cat") and "cls" not in name}
    assert names == {"cat_0.jpg", "cat_1.png", "cat_2.webp"}


def test_a_bad_image_may_be_fixed_or_changed(pets):
    """If it is in no shard yet. What is in one stays as it is: --verify tells that the file has changed."""
    image = pets / "data/val/dog/dog_2.jpg"
    good, options = image.read_bytes(), ("--maxcount", 2, "--workers", 1)
    for bad in (b"", None):  # empty, and a link to nothing
        image.unlink()
        image.write_bytes(bad) if bad is not None else image.symlink_to("nowhere")
        message = error_of("makeshards.py", *options, cwd=pets)
        assert "dog/dog_2.jpg: can't be read as an image" in message
    assert {"imagenet-val-000000.tar", ".val.json"} <= set(os.listdir(pets / "shards"))
    image.unlink()
    image.write_bytes(good)
    os.rename(pets / "data/val/cat/cat_0.jpg", pets / "data/val/cat/cat_9.jpg")
    message = error_of("makeshards.py", *options, cwd=pets)
    assert "its val shards were written with other options or images (other files)" in message
    os.rename(pets / "data/val/cat/cat_9.jpg", pets / "data/val/cat/cat_0.jpg")
    written = pets / "data/val/cat/cat_0.jpg"
    written.write_bytes(written.read_bytes() + b"x")
    stdout, _ = run("makeshards.py", *options, cwd=pets)
    assert re.search(r"val: 3 shards, 6 samples written, \d of the shards earlier", stdout)
    stdout, _ = run("makeshards.py", "--verify", cwd=pets, status=1)
    assert stdout.splitlines()[-2:] == [
        "./shards/imagenet-val-000000.tar: sample 0000000 does not hold the bytes of ./data/val/cat/cat_0.jpg",
        "1 problem with the images: fix them, then write them to another --shards",
    ]


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
        "empty file": "cat/cat_1.jpg: can't be read as an image (empty); fix it",
        "text": "cat/cat_1.jpg: can't be read as an image (not an image); fix it",
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
        shutil.copytree(pets / "data/val/cat", pets / "data/val/bird")
    if case in ("empty file", "text"):
        (pets / "data/val/cat/cat_1.jpg").write_text("" if case == "empty file" else "GIF is not a JPEG")
    if case == "no shards":
        os.rmdir(pets / "shards")
    assert expected in error_of("makeshards.py", cwd=pets)
    if case in ("empty file", "text"):  # the training shards, which came first, are whole
        assert sorted(os.listdir(pets / "shards")) == ["_info.json", "imagenet-train-000000.tar"]
    else:
        assert case == "no shards" or nothing_written(pets / "shards")


def test_shards_of_something_else_are_left_alone(pets):
    run("makeshards.py", cwd=pets)
    before = {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    assert "maxcount: 1000 then, 2 now" in error_of("makeshards.py", "--maxcount", 2, cwd=pets)
    assert "seed: 0 then, 1 now" in error_of("makeshards.py", "--seed", 1, cwd=pets)
    assert "filekey: off then, True now" in error_of("makeshards.py", "--filekey", cwd=pets)
    folder_of_images(pets / "birds", ["owl", "tit"])
    assert "other classes" in error_of("makeshards.py", "--data", "birds", cwd=pets)
    folder_of_images(pets / "more", ["cat", "dog"], count=4)
    assert "images: 6 then, 8 now" in error_of("makeshards.py", "--data", "more", cwd=pets)
    assert before == {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    os.unlink(pets / "shards/_info.json")
    assert "imagenet-train-000000.tar is there without an index" in error_of("makeshards.py", cwd=pets)


def test_a_fifo_among_the_images(pets):
    """Opening it would wait for ever."""
    (pets / "data/val/dog/dog_1.jpg").unlink()
    os.mkfifo(pets / "data/val/dog/dog_1.jpg")
    assert "dog_1.jpg: can't be read as an image (not a regular file)" in error_of("makeshards.py", cwd=pets)


def test_a_fifo_in_place_of_an_image_that_was_written(pets):
    run("makeshards.py", cwd=pets)
    (pets / "data/val/dog/dog_1.jpg").unlink()
    os.mkfifo(pets / "data/val/dog/dog_1.jpg")
    stdout, _ = run("makeshards.py", "--verify", cwd=pets, status=1)
    assert "can't be compared: ./data/val/dog/dog_1.jpg: not a regular file" in stdout


def test_an_image_without_a_name(pets):
    shutil.copy(pets / "data/val/cat/cat_1.jpg", pets / "data/val/cat/.jpg")
    run("makeshards.py", cwd=pets)
    assert "0000000.jpg" in dict(members(pets / "shards", "val"))


def unfinished(pets):
    """Shards of one sample each, of which some of the training split are missing: the last image is empty."""
    for i in (0, 1):
        (pets / f"data/train/cat/{'ab'[i]}").mkdir()
        for n in (1, 2):
            os.rename(pets / f"data/train/{('cat', 'dog')[i]}/{('cat', 'dog')[i]}_{n}.jpg",
                      pets / f"data/train/cat/{'ab'[i]}/{n}.jpg")  # fmt: skip
    bad = pets / "data/train/cat/b/2.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    error_of("makeshards.py", "--maxcount", 1, "--workers", 1, cwd=pets)
    assert any((pets / "shards").glob("*.tar"))
    bad.write_bytes(good)


def test_a_renamed_folder_is_noticed(pets):
    """Also one below a class, after which the same names have another order."""
    unfinished(pets)
    os.rename(pets / "data/train/cat/a", pets / "data/train/cat/z")
    assert "(other files)" in error_of("makeshards.py", "--maxcount", 1, cwd=pets)


@pytest.mark.parametrize("damage", [lambda data: data[:-9000], lambda data: data[:600] + b"x" + data[601:]])
def test_a_damaged_shard_of_an_unfinished_split(damage, pets):
    """It is known by its digest, and written again."""
    unfinished(pets)
    shard = min((pets / "shards").glob("*.tar"))
    good = shard.read_bytes()
    shard.write_bytes(damage(good))
    run("makeshards.py", "--maxcount", 1, cwd=pets)
    assert shard.read_bytes() == good
    run("makeshards.py", "--maxcount", 1, "--verify", "--check", cwd=pets)
    assert not list((pets / "shards").glob(".*"))


def test_a_class_folder_that_is_a_link_to_nothing(pets):
    """Without it the others would have other numbers."""
    shutil.rmtree(pets / "data/train/cat")
    (pets / "data/train/cat").symlink_to("/nowhere")
    assert "./data/train/cat is a link to nothing" in error_of("makeshards.py", cwd=pets)


def test_index_of_nothing_or_of_odd_names(pets):
    (pets / "empty.tar").write_bytes(bytes(10240))
    (pets / "a:b.tar").write_bytes(bytes(10240))
    for pattern, text in (
        ("", "matches"), ("empty.tar", "no samples"), ("{e,e}mpty.tar", "names a shard twice"),
        ("a:b.tar", "must end in the shard's file name"), ("pipe:cat empty.tar; true", "must end in"),
    ):  # fmt: skip
        assert text in error_of("makeshards.py", "--splits", "train", "--index", pattern, cwd=pets)
    assert not (pets / "_info.json").exists()


def test_workers_that_cannot_start(pets):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    command = [sys.executable, str(ROOT / "makeshards.py"), "--workers", "60"]
    done = subprocess.run(command, cwd=pets, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 2 and nothing_written(pets / "shards")
    assert re.fullmatch(r"makeshards.py: --workers 60: can't start them \(.*Too many open files.*\)\n", done.stderr)


def test_hints_fit_the_command(pets):
    assert error_of("makeshards.py", "--shards", "x y", cwd=pets).endswith("mkdir 'x y'")
    shutil.rmtree(pets / "data/val")
    assert "add --splits train" in error_of("makeshards.py", cwd=pets)
    shutil.rmtree(pets / "data/train")
    message = error_of("makeshards.py", "--splits", "train", cwd=pets)
    assert "val" not in message and "data/train" in message


def test_errors_show_no_objects(pets):
    """Pillow's texts may have the address of the bytes."""
    image = Image.open(pets / "data/val/cat/cat_1.jpg")
    image.save(pets / "data/val/cat/cat_1.bmp")
    data = (pets / "data/val/cat/cat_1.bmp").read_bytes()
    for content in (data[:20], data[:60], b"BM" + bytes(100), data[:14] + b"\xff" * 40):
        (pets / "data/val/cat/cat_1.bmp").write_bytes(content)
        _, stderr = run("makeshards.py", "--check", cwd=pets, status=2)
        assert "cat_1.bmp: can't be read as an image (" in stderr and "<" not in stderr, stderr


def test_a_destination_that_is_full_is_left_empty(pets):
    """A limit on the size of files stands for a full disk: writing fails halfway."""
    (pets / "data/train/cat/big.jpg").write_bytes((pets / "data/train/cat/cat_0.jpg").read_bytes() + bytes(1 << 20))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))  # noqa: E731
    command = [sys.executable, str(ROOT / "makeshards.py")]
    done = subprocess.run(command, cwd=pets, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "./shards/imagenet-train-000000.tar: can't be written (File too large)" in done.stderr
    assert os.listdir(pets / "shards") == []
    os.mkdir(pets / "locked")
    os.rmdir(pets / "shards")
    (pets / "shards").write_text("a file")
    assert "shards" in error_of("makeshards.py", cwd=pets)


# ---------------------------------------------------------------------------- --resize


def smooth(size, mode="RGB"):
    """An image of slow changes in every channel, so that its pixels stay near however it is scaled and encoded."""
    x, y = (np.linspace(0, 1, side) for side in size)
    x, y = x[None, :], y[:, None]
    planes = [40 + 150 * x + 0 * y, 210 - 130 * y + 0 * x, 60 + 120 * x * y]
    image = Image.fromarray(np.stack(planes, 2).round().astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((planes[0] * 256).astype(np.uint16))
    return image.convert(mode)


KINDS = {  # name: (size, size when the shorter side is to be 48, mode, how it is saved)
    "wide.jpg": ((173, 96), (86, 48), "RGB", {"quality": 95}),
    "tall.jpg": ((96, 173), (48, 86), "RGB", {"quality": 95}),
    "square.jpg": ((49, 49), (48, 48), "RGB", {"quality": 95}),
    "huge.jpg": ((1001, 777), (61, 48), "RGB", {"quality": 95}),  # decoded at a quarter of its size
    "progressive.jpg": ((300, 200), (72, 48), "RGB", {"progressive": True}),
    "cmyk.jpg": ((450, 300), (72, 48), "CMYK", {"quality": 95}),
    "grey.jpg": ((450, 300), (72, 48), "L", {"quality": 95}),
    "png.jpg": ((200, 100), (96, 48), "RGB", {"format": "PNG"}),  # ImageNet has one of that name
    "deep.png": ((200, 100), (96, 48), "I;16", {}),
    "palette.png": ((200, 100), (96, 48), "P", {}),
    "alpha.png": ((200, 100), (96, 48), "RGBA", {}),
    "bits.png": ((200, 100), (96, 48), "1", {}),
    "just.jpg": ((300, 48), None, "RGB", {}),  # and those that are not scaled
    "small.jpg": ((47, 40), None, "RGB", {}),
    "small_cmyk.jpg": ((40, 30), None, "CMYK", {}),
    "small.png": ((40, 30), None, "P", {}),
    "cut_short.jpg": ((40, 30), None, "RGB", {}),  # of which only the header is read
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """data/ with each kind of image in either class and split; their shards in plain/ and, at 48 pixels, in scaled/."""
    folder = tmp_path_factory.mktemp("kinds")
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / "data" / place).mkdir(parents=True)
        for name, (size, _, mode, how) in KINDS.items():
            path = folder / "data" / place / name
            smooth(size, mode).save(path, **how)
            if name == "cut_short.jpg":
                path.write_bytes(path.read_bytes()[:-20])
    for shards, *options in (("plain",), ("scaled", "--resize", 48), ("again", "--resize", 48, "--quality", 90)):
        (folder / shards).mkdir()
        run("makeshards.py", "--shards", shards, "--maxcount", 9, *options, cwd=folder)
    return folder


def by_path(folder, shards, split):
    """{path of the file below the split's folder: the bytes of its image in the shards}."""
    imgs = datasets.ImageFolder(folder / "data" / split).imgs
    images = [(int(name[:7]), data) for name, data in members(folder / shards, split) if not name.endswith(".cls")]
    return {os.path.relpath(imgs[key][0], folder / "data" / split): data for key, data in images}


@pytest.mark.parametrize("split", ["train", "val"])
def test_resize_scales_the_large_ones_and_leaves_the_others_alone(kinds, split):
    found = by_path(kinds, "scaled", split)
    assert len(found) == 2 * len(KINDS)
    for path, data in found.items():
        _, size, mode, _ = KINDS[os.path.basename(path)]
        original = (kinds / "data" / split / path).read_bytes()
        if size is None:
            assert data == original, path
            continue
        with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(original)) as source:
            expected = v2.Resize(48, v2.InterpolationMode.BICUBIC)(source.convert("RGB"))
            assert (image.format, image.mode) == ("JPEG", "L" if mode == "L" else "RGB"), path
            assert image.size == size == expected.size, path
            far = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(expected, float))
            assert far.mean() < (6 if mode in ("1", "P") else 1), (path, far.mean())  # those two are dithered


def test_resize_leaves_keys_classes_and_order_alone(kinds):
    for split in ("train", "val"):
        plain, scaled = (members(kinds / shards, split) for shards in ("plain", "scaled"))
        assert [name[:8] for name, _ in plain] == [name[:8] for name, _ in scaled]
        pairs = list(zip(plain, scaled, strict=True))
        assert all(one == other for one, other in pairs if one[0].endswith(".cls"))
        changed = sum(one != other for one, other in pairs)
        assert changed == 2 * sum(size is not None for _, size, _, _ in KINDS.values())


def test_resize_in_the_index_and_the_same_bytes_twice(kinds):
    infos = {name: json.loads((kinds / name / "_info.json").read_text()) for name in ("plain", "scaled", "again")}
    for entry, plain in zip(infos["scaled"]["splits"].values(), infos["plain"]["splits"].values(), strict=True):
        assert entry["plan"] == {**plain["plan"], "resize": 48, "quality": 90} and plain["plan"]["resize"] is None
        assert {**entry, "plan": 0, "shard_sha256": 0} == {**plain, "plan": 0, "shard_sha256": 0}
        assert not set(entry["shard_sha256"]) & set(plain["shard_sha256"])
    names = sorted(os.listdir(kinds / "scaled"))
    assert names == sorted(os.listdir(kinds / "again")) and len(names) == 9
    for name in names:
        assert (kinds / "scaled" / name).read_bytes() == (kinds / "again" / name).read_bytes(), name


def noise(size, cell, seed=0):
    """Random colours in squares of `cell` pixels: fine ones turn grey when well scaled, and alias when not."""
    cells = np.random.default_rng(seed).integers(0, 256, (size[1] // cell, size[0] // cell, 3), np.uint8)
    return Image.fromarray(cells.repeat(cell, 0).repeat(cell, 1))


def test_resize_is_antialiased_and_keeps_colour(pets):
    """Fine noise averages out, coarse colour survives, and a JPEG that is decoded smaller differs little."""
    places = [pets / "data/val/cat" / f"cat_{i}.{end}" for i, end in enumerate(("png", "png", "jpg"))]
    for path in (pets / "data/val/cat").iterdir():
        path.unlink()
    noise((960, 640), 1).save(places[0])
    noise((960, 640), 40).save(places[1])
    noise((960, 640), 40).save(places[2], quality=98, subsampling="4:4:4")
    run("makeshards.py", "--resize", 64, "--quality", 98, cwd=pets)
    for path, data in by_path(pets, "shards", "val").items():
        if path.startswith("cat"):
            with Image.open(pets / "data/val" / path) as source, Image.open(io.BytesIO(data)) as image:
                expected = np.asarray(source.resize(image.size, Image.Resampling.BICUBIC), float)
                assert np.abs(np.asarray(image, float) - expected).mean() < 4, path
                assert path != "cat/cat_0.png" or np.asarray(image, float).std() < 20


def test_quality(pets):
    """It is the encoder's: a higher one gives larger files, and all the encoder's tables are those of Pillow's."""
    for split in ("train", "val"):
        for i, pet in enumerate(("cat", "dog")):
            noise((120, 90), 3, i).save(pets / "data" / split / pet / f"{pet}_0.jpg")
    sizes = []
    for quality in (1, 50, 100):
        (pets / f"q{quality}").mkdir()
        run("makeshards.py", "--shards", f"q{quality}", "--resize", 64, "--quality", quality, cwd=pets)
        data = by_path(pets, f"q{quality}", "val")["cat/cat_0.jpg"]
        reference = io.BytesIO()
        Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=quality, subsampling="4:4:4")
        with Image.open(io.BytesIO(data)) as image, Image.open(reference) as expected:
            assert image.quantization == expected.quantization and image.layer == expected.layer  # 4:4:4 too
        sizes.append(len(data))
    assert sizes == sorted(set(sizes))


def test_resize_drops_metadata(pets):
    """A turned photograph stays as it lies in the file, as training reads it, and says nothing of turning."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "SECRET words"  # Orientation, ImageDescription
    rest = {"icc_profile": b"SECRET profile", "comment": b"SECRET comment", "dpi": (300, 300), "xmp": b"SECRET xmp"}
    path = pets / "data/val/cat/cat_0.jpg"
    smooth((300, 150)).save(path, quality=95, exif=exif, **rest)
    assert path.read_bytes().count(b"SECRET") == 4
    run("makeshards.py", "--resize", 64, cwd=pets)
    data = by_path(pets, "shards", "val")["cat/cat_0.jpg"]
    with Image.open(io.BytesIO(data)) as image, Image.open(path) as source:
        assert image.size == (128, 64) and not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert b"SECRET" not in data and b"Exif" not in data
        expected = np.asarray(source.resize((128, 64)), float)
        assert np.abs(np.asarray(image, float) - expected).mean() < 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--quality", 90], "--quality 90: only images scaled by --resize are encoded; add --resize"),
        (["--quality", 0], "argument --quality: 0 is not from 1 to 100"),
        (["--resize", 0], "argument --resize: 0 is not from 1 to 65535"),
        (["--resize", -5, "--quality", 90], "argument --resize: -5 is not from 1 to 65535"),
        (["--resize", 64, "--quality", 0], "argument --quality: 0 is not from 1 to 100"),
        (["--resize", 64, "--quality", 101], "argument --quality: 101 is not from 1 to 100"),
        (["--resize", "half"], "--resize"),
    ],
)
def test_wrong_resize(args, message, pets):
    assert message in error_of("makeshards.py", *args, cwd=pets)
    assert nothing_written(pets / "shards")


def test_shards_of_another_resize_are_left_alone(pets):
    run("makeshards.py", "--resize", 20, "--splits", "train", cwd=pets)
    before = {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    for options, what in (
        ([], "resize: 20 then, off now"),
        (["--resize", 21], "resize: 20 then, 21 now"),
        (["--resize", 20, "--quality", 80], "quality: 90 then, 80 now"),
    ):
        message = error_of("makeshards.py", *options, cwd=pets)
        assert f"its train shards were written with other options or images ({what}); use another --shards" in message
    assert before == {path.name: path.read_bytes() for path in (pets / "shards").iterdir()}
    stdout, _ = run("makeshards.py", "--resize", 20, cwd=pets)
    assert stdout.splitlines() == ["train: 1 shard, 6 samples already there", "val: 1 shard, 6 samples written"]
    (pets / "plain").mkdir()
    run("makeshards.py", "--shards", "plain", cwd=pets)
    message = error_of("makeshards.py", "--shards", "plain", "--resize", 20, cwd=pets)
    assert "resize: off then, 20 now" in message


def test_a_large_image_that_cannot_be_decoded(pets):
    """Without --resize only its header is read; with it, one line names the path and nothing is left."""
    path = pets / "data/val/dog/dog_2.jpg"
    noise((300, 200), 1).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:20000])
    message = error_of("makeshards.py", "--resize", 64, cwd=pets)
    assert "dog/dog_2.jpg: can't be read as an image (image file is truncated" in message
    assert sorted(os.listdir(pets / "shards")) == ["_info.json", "imagenet-train-000000.tar"]
    (pets / "plain").mkdir()
    run("makeshards.py", "--shards", "plain", cwd=pets)
    assert by_path(pets, "plain", "val")["dog/dog_2.jpg"] == path.read_bytes()
