"""makeshards.py: what the shards contain, that the same command writes the same bytes, and what it refuses."""

import filecmp
import io
import json
import os
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import webdataset as wds
from commands import ROOT, error_of, load, run, run_command
from make_data import noise, picture, read_tar, write_folders
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2


def members(folder, split):
    """[(name, bytes)] of all shards of the split, in order."""
    return [member for path in sorted(folder.glob(f"imagenet-{split}-*.tar")) for member in read_tar(path)]


def content(folder):
    """{name: (bytes, time)} of the files in the folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def same_files(one, other):
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.fixture
def pets(tmp_path):
    """data/ with two classes of three images per split, and an empty shards/."""
    write_folders(tmp_path / "data", 3, 3, ["cat", "dog"])
    (tmp_path / "shards").mkdir()
    return tmp_path


def run_limited(limit, *args, cwd):
    """The one line on stderr of makeshards.py, which must exit with status 2, under a limit such as "-n 64"."""
    command = ["bash", "-c", f'ulimit {limit} && exec "$@"', "-", sys.executable, str(ROOT / "makeshards.py"), *args]
    _, stderr = run_command(command, cwd=cwd, status=2)
    (line,) = stderr.splitlines()
    return line


# ---------------------------------------------------------------------------- what is written


def test_contents(small, tmp_path):
    """With the README's commands: each file's own bytes once, with ImageFolder's class and number."""
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "shards").mkdir()
    stdout, _ = run("makeshards.py", cwd=tmp_path)
    assert stdout.splitlines() == ["train: 1 shard, 80 samples written", "val: 1 shard, 30 samples written"]
    for split, count in (("train", 80), ("val", 30)):
        imgs = datasets.ImageFolder(small / "data" / split).imgs
        found = members(tmp_path / "shards", split)
        keys = [name.removesuffix(".cls") for name, _ in found if name.endswith(".cls")]
        assert [name for name, _ in found] == [f"{key}.{ending}" for key in keys for ending in ("cls", "jpg")]
        assert sorted(map(int, keys)) == list(range(count))
        assert (keys == sorted(keys)) == (split == "val")  # only training samples are shuffled
        for name, data in found:
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
    assert index["classes"] == datasets.ImageNet(small / "data", "train").wnids  # the sample has torchvision's meta.bin
    for name, length in zip(train["filenames"], train["shard_lengths"], strict=True):
        assert len(read_tar(small / "shards" / name)) == 2 * length


@pytest.mark.slow
def test_imagenet_has_1282_and_50_shards():
    """The plan for splits of ImageNet's size, without the files."""
    options = Namespace(data="data", maxcount=1000, seed=0, filekey=False, resize=None, quality=None)
    sizes = load("main-orig.py")
    shapes = {}
    for split, size in (("train", sizes.TRAIN_SIZE), ("val", sizes.VAL_SIZE)):
        images = [(str(i), 0) for i in range(size)]
        entry, shards = load("makeshards.py").plan_split(options, split, images, ["class"])
        lengths = entry["shard_lengths"]
        assert [len(shard) for shard in shards] == lengths
        assert sum(lengths) == entry["num_samples"] == size
        shapes[split] = (len(entry["filenames"]), lengths[0], lengths[-1])
    assert shapes == {"train": (1282, 1000, 167), "val": (50, 1000, 1000)}


def test_reproducible_bytes(pets):
    """The same bytes on every run. --seed changes the order of the training samples, and nothing else."""
    for name, seed in (("shards", 0), ("again", 0), ("other", 1)):
        (pets / name).mkdir(exist_ok=True)
        run("makeshards.py", "--shards", name, "--seed", seed, "--maxcount", 4, cwd=pets)
    tars = [f"imagenet-{split}-{i:06d}.tar" for split in ("train", "val") for i in range(2)]
    assert sorted(os.listdir(pets / "shards")) == ["_info.json", *tars]
    assert same_files(pets / "shards", pets / "again")
    assert members(pets / "shards", "train") != members(pets / "other", "train")
    assert sorted(members(pets / "shards", "train")) == sorted(members(pets / "other", "train"))
    assert members(pets / "shards", "val") == members(pets / "other", "val")


def test_member_names(pets):
    """The image's member has the file's extension in lower case; .jpeg becomes .jpg."""
    for i, ending in enumerate(("JPEG", "PNG", "webp")):
        image = pets / f"data/train/cat/cat_{i}.jpg"
        Image.open(image).save(image.with_suffix(f".{ending}"))
        image.unlink()
    run("makeshards.py", "--filekey", cwd=pets)
    names = {name for name, _ in members(pets / "shards", "train") if name.startswith("cat") and "cls" not in name}
    assert names == {"cat_0.jpg", "cat_1.png", "cat_2.webp"}


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
def test_filekey_that_webdataset_skips(name, pets):
    os.rename(pets / "data/train/cat/cat_1.jpg", pets / f"data/train/cat/{name}.jpg")
    assert f"cat/{name}.jpg: " in error_of("makeshards.py", "--filekey", cwd=pets)
    assert os.listdir(pets / "shards") == []
    run("makeshards.py", cwd=pets)


@pytest.mark.parametrize("name", ["k\u00e4tzchen", "\u732b", "c" * 96, "c" * 97, "\u732b" * 80])
def test_filekey_non_ascii_or_long(name, pets):
    """webdataset and tar read the keys. Only names that do not fit into a plain header get an extended one."""
    os.rename(pets / "data/val/cat/cat_1.jpg", pets / f"data/val/cat/{name}.jpg")
    run("makeshards.py", "--filekey", cwd=pets)
    shard = pets / "shards/imagenet-val-000000.tar"
    keys = ["cat_0", "cat_2", name, "dog_0", "dog_1", "dog_2"]
    assert [sample["__key__"] for sample in wds.WebDataset(str(shard), shardshuffle=False)] == keys
    listed, _ = run_command(["tar", "tf", shard], cwd=pets, env={"LC_ALL": "C.UTF-8"})
    assert [line.removesuffix(".jpg") for line in listed.splitlines() if line.endswith(".jpg")] == keys
    fits = name.isascii() and len(f"{name}.jpg") <= 100
    assert shard.read_bytes().count(b"PaxHeader") == (0 if fits else 2)


# ---------------------------------------------------------------------------- what is refused


INVALID = [  # options, and what the error names
    (["--splits", "test"], "--splits test"),
    (["--maxcount", 0], "--maxcount: 0 "),
    (["--maxcount", "many"], "--maxcount"),
    (["--workers", 4097], "--workers: 4097 "),
    (["--bogus"], "--bogus"),
    (["--resize", 0], "--resize: 0 "),
    (["--resize", "half"], "--resize"),
    (["--resize", 64, "--quality", 0], "--quality: 0 "),
    (["--resize", 64, "--quality", 101], "--quality: 101 "),
    (["--quality", 90], "add --resize"),
]


@pytest.mark.parametrize("args, expected", INVALID, ids=[" ".join(map(str, args)) for args, _ in INVALID])
def test_invalid_options(args, expected, pets):
    assert expected in error_of("makeshards.py", *args, cwd=pets)
    assert os.listdir(pets / "shards") == []


def test_missing_images(pets):
    """A class without images, a class folder that is a dangling link, and no folder at all; nothing is written."""
    folder = pets / "data/train/cat"
    for path in folder.iterdir():
        path.unlink()
    assert "no images in ./data/train/cat" in error_of("makeshards.py", cwd=pets)
    folder.rmdir()
    folder.symlink_to("/nowhere")  # ignoring it would change the numbers of the other classes
    assert "./data/train/cat is a link to nothing" in error_of("makeshards.py", cwd=pets)
    shutil.rmtree(pets / "data")
    assert "--data ./data: " in error_of("makeshards.py", cwd=pets)
    assert os.listdir(pets / "shards") == []


def test_destination_is_not_a_folder(pets):
    assert error_of("makeshards.py", "--shards", "x y", cwd=pets).endswith("mkdir 'x y'")
    (pets / "file").touch()
    assert "--shards file: " in error_of("makeshards.py", "--shards", "file", cwd=pets)


UNREADABLE = {
    "empty": "(empty)",
    "text": "(not an image)",  # Pillow's own message contains the address of an object
    "cut-off BMP": "(Truncated File Read)",
    "dangling link": "(No such file or directory)",
    "FIFO": "(not a regular file)",  # opening it would block
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_image(kind, pets):
    """The error names the file. The training split, which is written first, is complete."""
    image = pets / "data/val/dog/dog_1.jpg"
    image.unlink()
    if kind == "dangling link":
        image.symlink_to("nowhere")
    elif kind == "FIFO":
        os.mkfifo(image)
    else:
        contents = {"empty": b"", "text": b"GIF is not a JPEG", "cut-off BMP": picture(format="BMP")[:20]}
        image.write_bytes(contents[kind])
    message = error_of("makeshards.py", cwd=pets)
    assert f"dog/dog_1.jpg: can't be read as an image {UNREADABLE[kind]}" in message and "<" not in message
    assert sorted(os.listdir(pets / "shards")) == ["_info.json", "imagenet-train-000000.tar"]


def test_existing_shards_are_kept(pets):
    """Splits can be written one by one. With other options or images, the error names the difference."""
    run("makeshards.py", "--splits", "train", cwd=pets)
    stdout, _ = run("makeshards.py", cwd=pets)
    assert stdout.splitlines() == ["train: 1 shard, 6 samples already there", "val: 1 shard, 6 samples written"]
    with open(pets / "shards" / "_info.json") as file:
        assert list(json.load(file)["splits"]) == ["train", "validation"]
    (pets / "resized").mkdir()
    run("makeshards.py", "--shards", "resized", "--resize", 20, cwd=pets)
    before = {name: content(pets / name) for name in ("shards", "resized")}
    write_folders(pets / "birds", 3, 3, ["owl", "tit"])
    write_folders(pets / "more", 4, 4, ["cat", "dog"])
    resized = ["--shards", "resized"]
    for options, difference in (
        (["--maxcount", 2], "maxcount: 1000 then, 2 now"),
        (["--seed", 1], "seed: 0 then, 1 now"),
        (["--filekey"], "filekey: off then, True now"),
        (["--resize", 20], "resize: off then, 20 now"),
        (["--data", "birds"], "different classes"),
        (["--data", "more"], "images: 6 then, 8 now"),
        (resized, "resize: 20 then, off now"),
        ([*resized, "--resize", 21], "resize: 20 then, 21 now"),
        ([*resized, "--resize", 20, "--quality", 80], "quality: 90 then, 80 now"),
    ):
        message = error_of("makeshards.py", *options, cwd=pets)
        assert difference in message and "use another --shards" in message
    stdout, _ = run("makeshards.py", *resized, "--resize", 20, cwd=pets)
    assert stdout.splitlines() == [f"{split}: 1 shard, 6 samples already there" for split in ("train", "val")]
    assert before == {name: content(pets / name) for name in ("shards", "resized")}
    os.unlink(pets / "shards/_info.json")
    assert "imagenet-train-000000.tar exists without an index" in error_of("makeshards.py", cwd=pets)


def test_index_rejects_invalid_patterns(pets):
    for name in ("empty.tar", "a:b.tar"):
        (pets / name).write_bytes(bytes(10240))
    for pattern, expected in (
        ("", "matches"),
        ("empty.tar", "no samples"),
        ("{e,e}mpty.tar", "lists a shard twice"),
        ("a:b.tar", "must end in the shard's file name"),
        ("pipe:cat empty.tar; true", "must end in the shard's file name"),
    ):
        assert expected in error_of("makeshards.py", "--splits", "train", "--index", pattern, cwd=pets)
    assert not (pets / "_info.json").exists()


@pytest.mark.slow
def test_workers_cannot_start(pets):
    line = run_limited("-n 64", "--workers", "60", cwd=pets)
    assert line.startswith("makeshards.py: --workers 60: ") and "Too many open files" in line
    assert os.listdir(pets / "shards") == []


# ---------------------------------------------------------------------------- resuming after an error


def test_resume_after_an_image_is_fixed(pets):
    """Images that are in a shard already are not read again; --verify reports those that have changed since."""
    image = pets / "data/val/dog/dog_2.jpg"
    good = image.read_bytes()
    image.write_bytes(b"")
    options = ["--maxcount", 2, "--workers", 1]
    assert "dog/dog_2.jpg: " in error_of("makeshards.py", *options, cwd=pets)
    assert {"imagenet-val-000000.tar", ".val.json"} <= set(os.listdir(pets / "shards"))
    image.write_bytes(good)
    changed = pets / "data/val/cat/cat_0.jpg"
    changed.write_bytes(changed.read_bytes() + b"x")
    fifo = pets / "data/val/cat/cat_1.jpg"
    fifo.unlink()
    os.mkfifo(fifo)  # opening it would block
    stdout, _ = run("makeshards.py", *options, cwd=pets)
    assert re.search(r"val: 3 shards, 6 samples written, \d of the shards by an earlier run", stdout)
    stdout, _ = run("makeshards.py", "--verify", cwd=pets, status=1)
    shard = "./shards/imagenet-val-000000.tar"
    assert f"{shard}: sample 0000000 differs from ./data/val/cat/cat_0.jpg" in stdout
    assert f"{shard}: sample 0000001 can't be compared: ./data/val/cat/cat_1.jpg: not a regular file" in stdout


@pytest.fixture
def unfinished(pets):
    """Some of the training shards, of one sample each; the first run stopped at an image that was empty then.

    The class cat has the folders a/ and b/, which hold images of the same names.
    """
    for number, name in enumerate(("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")):
        image = pets / "data/train/cat" / name
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(noise(100 + number))
    image.write_bytes(b"")
    assert "cat/b/2.jpg" in error_of("makeshards.py", "--maxcount", 1, "--workers", 1, cwd=pets)
    assert any((pets / "shards").glob("*.tar")) and not (pets / "shards/_info.json").exists()
    image.write_bytes(noise(200))
    return pets


def test_resume_after_a_folder_is_renamed(unfinished):
    """Also one below a class, where the files keep their names."""
    os.rename(unfinished / "data/train/cat/a", unfinished / "data/train/cat/z")
    assert "(other files)" in error_of("makeshards.py", "--maxcount", 1, cwd=unfinished)


def test_resume_with_a_damaged_shard(unfinished):
    """Its digest shows that it must be written again."""
    shard = min((unfinished / "shards").glob("*.tar"))
    good = shard.read_bytes()
    shard.write_bytes(good[:600] + b"x" + good[601:])
    assert shard.read_bytes() != good
    run("makeshards.py", "--maxcount", 1, cwd=unfinished)
    assert shard.read_bytes() == good
    run("makeshards.py", "--maxcount", 1, "--verify", "--check", cwd=unfinished)
    assert not list((unfinished / "shards").glob(".*"))


# ---------------------------------------------------------------------------- --resize


def smooth(size, mode="RGB"):
    """An image of gradients in every channel: its pixels change little, however it is scaled and encoded."""
    x = np.linspace(0, 1, size[0])[None, :]
    y = np.linspace(0, 1, size[1])[:, None]
    planes = [40 + 150 * x + 0 * y, 210 - 130 * y + 0 * x, 60 + 120 * x * y]
    if mode == "I;16":
        return Image.fromarray((planes[0] * 256).astype(np.uint16))
    return Image.fromarray(np.stack(planes, 2).round().astype(np.uint8)).convert(mode)


KINDS = {  # name: (size, size after --resize 48 or None if it is kept, mode, options of save())
    "wide.jpg": ((173, 96), (86, 48), "RGB", {"quality": 95}),
    "tall.jpg": ((96, 173), (48, 86), "RGB", {"quality": 95}),
    "square.jpg": ((49, 49), (48, 48), "RGB", {"quality": 95}),
    "huge.jpg": ((1001, 777), (61, 48), "RGB", {"quality": 95}),  # decoded at a quarter of its size
    "progressive.jpg": ((300, 200), (72, 48), "RGB", {"progressive": True}),
    "cmyk.jpg": ((450, 300), (72, 48), "CMYK", {"quality": 95}),
    "grey.jpg": ((450, 300), (72, 48), "L", {"quality": 95}),
    "png.jpg": ((200, 100), (96, 48), "RGB", {"format": "PNG"}),  # ImageNet has a PNG named .JPEG
    "deep.png": ((200, 100), (96, 48), "I;16", {}),
    "palette.png": ((200, 100), (96, 48), "P", {}),
    "alpha.png": ((200, 100), (96, 48), "RGBA", {}),
    "bits.png": ((200, 100), (96, 48), "1", {}),
    "just.jpg": ((300, 48), None, "RGB", {}),  # these are not larger, and stay as they are
    "small.jpg": ((47, 40), None, "RGB", {}),
    "small_cmyk.jpg": ((40, 30), None, "CMYK", {}),
    "small.png": ((40, 30), None, "P", {}),
    "cut_short.jpg": ((40, 30), None, "RGB", {}),  # only its header is read
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """data/ with each kind of image in each class and split; its shards in plain/, and of 48 pixels in the others."""
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
    root = folder / "data" / split
    imgs = datasets.ImageFolder(root).imgs
    images = [(int(name[:7]), data) for name, data in members(folder / shards, split) if not name.endswith(".cls")]
    return {os.path.relpath(imgs[key][0], root): data for key, data in images}


def pixels(image):
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.parametrize("split", ["train", "val"])
def test_resize_scales_only_larger_images(kinds, split):
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
            error = np.abs(pixels(image) - pixels(expected)).mean()
            assert error < (6 if mode in ("1", "P") else 1), (path, error)  # those two are dithered


def test_resize_keeps_keys_classes_and_order(kinds):
    for split in ("train", "val"):
        plain = members(kinds / "plain", split)
        scaled = members(kinds / "scaled", split)
        assert [name[:8] for name, _ in plain] == [name[:8] for name, _ in scaled]
        pairs = list(zip(plain, scaled, strict=True))
        assert all(one == other for one, other in pairs if one[0].endswith(".cls"))
        changed = sum(one != other for one, other in pairs)
        assert changed == 2 * sum(size is not None for _, size, _, _ in KINDS.values())


def test_resize_is_reproducible_and_in_the_index(kinds):
    """The index of the scaled shards differs in the plan and the digests alone."""
    assert same_files(kinds / "scaled", kinds / "again") and len(os.listdir(kinds / "scaled")) == 9
    splits = {name: json.loads((kinds / name / "_info.json").read_text())["splits"] for name in ("plain", "scaled")}
    for split, plain in splits["plain"].items():
        entry = splits["scaled"][split]
        assert plain["plan"]["resize"] is None
        assert entry["plan"] == {**plain["plan"], "resize": 48, "quality": 90}
        assert {**entry, "plan": 0, "shard_sha256": 0} == {**plain, "plan": 0, "shard_sha256": 0}
        assert not set(entry["shard_sha256"]) & set(plain["shard_sha256"])


def mosaic(size, cell, seed=0):
    """Random colors in squares of `cell` pixels: fine ones average to gray when well scaled, and alias when not."""
    cells = np.random.default_rng(seed).integers(0, 256, (size[1] // cell, size[0] // cell, 3), np.uint8)
    return Image.fromarray(cells.repeat(cell, 0).repeat(cell, 1))


def test_resize_is_antialiased(pets):
    """Fine noise averages out, coarse color stays, and a JPEG that is decoded at a smaller size differs little."""
    folder = pets / "data/val/cat"
    for path in folder.iterdir():
        path.unlink()
    mosaic((960, 640), 1).save(folder / "fine.png")
    mosaic((960, 640), 40).save(folder / "coarse.png")
    mosaic((960, 640), 40).save(folder / "coarse.jpg", quality=98, subsampling="4:4:4")
    run("makeshards.py", "--resize", 64, "--quality", 98, cwd=pets)
    found = by_path(pets, "shards", "val")
    for name in ("fine.png", "coarse.png", "coarse.jpg"):
        with Image.open(folder / name) as source, Image.open(io.BytesIO(found[f"cat/{name}"])) as image:
            assert image.size == (96, 64)
            expected = source.resize(image.size, Image.Resampling.BICUBIC)
            assert np.abs(pixels(image) - pixels(expected)).mean() < 4, name
            assert name != "fine.png" or pixels(image).std() < 20


@pytest.mark.parametrize("quality", [1, 50, 100])
def test_quality(quality, pets):
    """The tables and the subsampling are those that Pillow uses for this quality at 4:4:4."""
    mosaic((120, 90), 3).save(pets / "data/val/cat/cat_0.jpg")
    run("makeshards.py", "--splits", "val", "--resize", 64, "--quality", quality, cwd=pets)
    reference = picture(quality=quality, subsampling="4:4:4")
    data = by_path(pets, "shards", "val")["cat/cat_0.jpg"]
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(reference)) as expected:
        assert image.quantization == expected.quantization and image.layer == expected.layer


def test_resize_drops_metadata(pets):
    """A rotated photograph keeps the orientation of its pixels, as in training, and loses its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation
    exif[0x010E] = "SECRET words"  # ImageDescription
    rest = {"icc_profile": b"SECRET profile", "comment": b"SECRET comment", "dpi": (300, 300), "xmp": b"SECRET xmp"}
    path = pets / "data/val/cat/cat_0.jpg"
    smooth((300, 150)).save(path, quality=95, exif=exif, **rest)
    assert path.read_bytes().count(b"SECRET") == 4
    run("makeshards.py", "--resize", 64, cwd=pets)
    data = by_path(pets, "shards", "val")["cat/cat_0.jpg"]
    assert b"SECRET" not in data and b"Exif" not in data
    with Image.open(io.BytesIO(data)) as image, Image.open(path) as source:
        assert image.size == (128, 64) and not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert np.abs(pixels(image) - pixels(source.resize((128, 64)))).mean() < 1


def test_resize_of_a_truncated_image(pets):
    """Without --resize only the header is read; with it, the error names the file."""
    path = pets / "data/val/dog/dog_2.jpg"
    mosaic((300, 200), 1).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:20000])
    message = error_of("makeshards.py", "--resize", 64, cwd=pets)
    assert "dog/dog_2.jpg: can't be read as an image (image file is truncated" in message
    assert sorted(os.listdir(pets / "shards")) == ["_info.json", "imagenet-train-000000.tar"]
    (pets / "plain").mkdir()
    run("makeshards.py", "--shards", "plain", cwd=pets)
    assert by_path(pets, "plain", "val")["dog/dog_2.jpg"] == path.read_bytes()
