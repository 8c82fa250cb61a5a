"""Other programs read the shards that makeshards.py writes: every sample once, with its class, bytes and pixels."""

import io
import itertools
import os
import random
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset as wds
from commands import run
from make_data import picture
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

SPLITS = {"train": "train", "val": "validation"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_XET": "1"}
FORMATS = {".webp": "WEBP", ".png": "PNG"}
# file names of each class; {} is the class
TRAIN_NAMES = ["{}_10.JPEG", "{}_2.JPEG", "{}_7.JPEG", "{}_9.JPEG"]
VAL_NAMES = {
    "numbers": ["{} with space.jpg", "{}.v1.2.png", "{} \u00e4\u732b.webp", "{}" + "l" * 120 + ".jpg"],
    "filekey": ["{} with space.jpg", "{}.v1.2.png", "{} + (1).webp", "{}" + "l" * 87 + ".jpg"],
}


def encoded(seed, suffix):
    """The bytes of a small image. As in ImageNet, one is grayscale, one is CMYK, and one is a PNG named .JPEG."""
    image = Image.frombytes("RGB", (16, 12), random.Random(seed).randbytes(16 * 12 * 3))
    mode = {0: "L", 1: "CMYK"}.get(seed, "RGB")
    image_format = "PNG" if seed == 2 else FORMATS.get(suffix, "JPEG")
    return picture(image.convert(mode), format=image_format, quality=95)


def pixels(image):
    return np.asarray(image.convert("RGB")).tobytes()


class Shards:
    """Shards in a folder and, by torchvision's ImageFolder, what they must hold.

    expected: {split: {key: (class, bytes)}}
    endings: {split: {key: ending of the image's member}}
    """

    def __init__(self, folder, filekey, data):
        self.folder = folder
        self.expected = {}
        self.endings = {}
        for split in SPLITS:
            self.expected[split] = {}
            self.endings[split] = {}
            for i, (path, label) in enumerate(ImageFolder(data / split).imgs):
                stem, ending = os.path.splitext(os.path.basename(path))
                key = stem.replace(".", "_") if filekey else f"{i:07d}"
                with open(path, "rb") as file:
                    self.expected[split][key] = label, file.read()
                self.endings[split][key] = ending[1:].lower().replace("jpeg", "jpg")

    def paths(self, split):
        return sorted(map(str, self.folder.glob(f"imagenet-{split}-*.tar")))

    def pixels(self, split):
        """{key: (class, pixels)}"""
        found = {}
        for key, (label, data) in self.expected[split].items():
            found[key] = label, pixels(Image.open(io.BytesIO(data)))
        return found


@pytest.fixture(scope="module", params=["numbers", "filekey"])
def shards(request, tmp_path_factory):
    """12 training and 12 validation samples, the latter with unusual file names, in shards of 5, 5 and 2 each."""
    folder = tmp_path_factory.mktemp(request.param)
    for split, names in (("train", TRAIN_NAMES), ("val", VAL_NAMES[request.param])):
        seeds = itertools.count(0 if split == "train" else 100)
        for name in ("n03", "n01", "n02"):
            (folder / "data" / split / name).mkdir(parents=True)
            for pattern in names:
                path = folder / "data" / split / name / pattern.format(name)
                path.write_bytes(encoded(next(seeds), path.suffix))
    (folder / "shards").mkdir()
    options = ["--filekey"] if request.param == "filekey" else []
    run("makeshards.py", "--maxcount", 5, *options, cwd=folder)
    return Shards(folder / "shards", bool(options), folder / "data")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The libraries of Hugging Face use no network, and no files in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}.items():
            patch.setenv(name, value)
        yield


def import_or_skip(name):
    return pytest.importorskip(name, reason=f"no {name}: see tests/requirements.txt", exc_type=ImportError)


def by_key(found):
    """{key: (the rest)} of samples (key, ...), all of which have different keys."""
    found = [(key, tuple(rest)) for key, *rest in found]
    assert len(dict(found)) == len(found)
    return dict(found)


# ---------------------------------------------------------------------------- tar


@pytest.mark.parametrize("split", SPLITS)
def test_tar(shards, split, tmp_path):
    """`tar` lists KEY.cls and the image of each sample, next to each other, and extracts the original bytes."""
    names = []
    for path in shards.paths(split):
        listing = subprocess.check_output(["tar", "tf", path], text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
        names += listing.splitlines()
        subprocess.check_output(["tar", "xf", path, "-C", tmp_path])
    keys = [name.removesuffix(".cls") for name in names[::2]]
    endings = shards.endings[split]
    assert names == [f"{key}.{end}" for key in keys for end in ("cls", endings[key])]
    assert sorted(keys) == sorted(shards.expected[split]) and len(set(keys)) == 12
    for key, (label, data) in shards.expected[split].items():
        assert (tmp_path / f"{key}.cls").read_bytes() == b"%d" % label
        assert (tmp_path / f"{key}.{endings[key]}").read_bytes() == data


@pytest.mark.parametrize("split", SPLITS)
def test_members_are_plain_ustar(shards, split):
    """A header of one block before each file, without owner, time or PAX headers."""
    for path in shards.paths(split):
        with open(path, "rb") as file:
            data = file.read()
        end = 0
        with tarfile.open(path) as shard:
            for member in shard:
                assert member.offset == end and member.offset_data == end + tarfile.BLOCKSIZE
                assert data[end + 257 : end + 265] == b"ustar\x0000"
                assert member.type == tarfile.REGTYPE
                assert (member.mode, member.uid, member.gid, member.mtime) == (0o444, 0, 0, 0)
                assert member.uname == member.gname == member.linkname == ""
                blocks = -(-member.size // tarfile.BLOCKSIZE)
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
        assert len(data) % tarfile.RECORDSIZE == 0
        assert len(data) >= end + 2 * tarfile.BLOCKSIZE and not any(data[end:])


# ---------------------------------------------------------------------------- webdataset


IMAGE = "jpg;png;webp"  # any of them


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset(shards, split):
    """Decoded, in the shards' order; and shuffled and not decoded, by two workers."""
    dataset = wds.WebDataset(shards.paths(split), shardshuffle=False).decode("pil")
    found = by_key((key, label, pixels(image)) for key, image, label in dataset.to_tuple("__key__", IMAGE, "cls"))
    assert found == shards.pixels(split)
    pattern = f"{shards.folder}/imagenet-{split}-{{000000..000002}}.tar"
    dataset = wds.WebDataset(pattern, shardshuffle=3, seed=1).shuffle(5).to_tuple("__key__", "cls", IMAGE)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=2)
    found = by_key((key, int(label), data) for key, label, data in loader)
    assert found == shards.expected[split]


# ---------------------------------------------------------------------------- timm


@pytest.mark.parametrize(("split", "name"), SPLITS.items())
def test_timm(shards, split, name):
    """create_dataset uses the index and yields each sample once. In training, timm pads the last batch; here, none."""
    create_dataset = import_or_skip("timm.data").create_dataset
    expected = sorted(shards.pixels(split).values())
    for workers, training in ((0, False), (2, False), (0, True)):
        dataset = create_dataset("wds/x", root=str(shards.folder), split=name, batch_size=4, is_training=training)
        dataset.set_loader_cfg(num_workers=workers)
        assert len(dataset) == 12
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=list)
        batches = [[(label, pixels(image)) for image, label in batch] for batch in loader]
        assert sorted(itertools.chain(*batches)) == expected, (workers, training)


# ---------------------------------------------------------------------------- Hugging Face datasets


def test_hugging_face_datasets(shards, tmp_path):
    """load_dataset, cached and streaming. It expects one image format, so it cannot read the validation split here."""
    datasets = import_or_skip("datasets")
    datasets.disable_progress_bars()
    files = {"train": shards.paths("train")}
    for streaming in (False, True):
        dataset = datasets.load_dataset(
            "webdataset", data_files=files, split="train", cache_dir=str(tmp_path), streaming=streaming
        )
        assert isinstance(dataset.features["jpg"], datasets.Image) and dataset.features["cls"].dtype == "int64"
        found = by_key((row["__key__"], row["cls"], pixels(row["jpg"])) for row in dataset)
        assert found == shards.pixels("train"), streaming
    undecoded = dataset.cast_column("jpg", datasets.Image(decode=False))
    assert by_key((row["__key__"], row["cls"], row["jpg"]["bytes"]) for row in undecoded) == shards.expected["train"]
