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
from conftest import run
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

SPLITS = {"train": "train", "val": "validation"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_XET": "1"}
NAMES = ["{0}_10.JPEG", "{0}_2.JPEG", "{0}_7.JPEG", "{0}_9.JPEG"]
NAMES_OF_KEYS = [
    "{0} with space.jpg",
    "{0}.v1.2.png",
    "{0} + (1).webp",
    "{0}" + "l" * 87 + ".jpg",
]
NAMES_BY_HAND = ["{0} with space.jpg", "{0}.v1.2.png", "{0} \u00e4\u732b.webp", "{0}" + "l" * 120 + ".jpg"]


def encode(seed, **how):
    """A small image: mostly JPEG, and as in ImageNet a grey one, a CMYK one, and a PNG whose name says JPEG."""
    image, out = Image.frombytes("RGB", (16, 12), random.Random(seed).randbytes(16 * 12 * 3)), io.BytesIO()
    mode, form = {0: ("L", "JPEG"), 1: ("CMYK", "JPEG"), 2: ("RGB", "PNG")}.get(seed, ("RGB", "JPEG"))
    image.convert(mode).save(out, how.get("format", form), quality=95)
    return out.getvalue()


class Shards:
    """Shards in a folder, and what is in them by torchvision: {key: (class, bytes)} of a split."""

    def __init__(self, folder, filekey, data):
        self.folder, self.expected, self.endings = folder, {}, {}
        for split in SPLITS:
            imgs = ImageFolder(data / split).imgs
            names = [os.path.splitext(os.path.basename(path))[0].replace(".", "_") for path, _ in imgs]
            keys = names if filekey else [f"{i:07d}" for i in range(len(imgs))]
            self.expected[split] = {}
            self.endings[split] = {}
            for key, (path, label) in zip(keys, imgs, strict=True):
                with open(path, "rb") as file:
                    self.expected[split][key] = label, file.read()
                self.endings[split][key] = os.path.splitext(path)[1][1:].lower().replace("jpeg", "jpg")

    def paths(self, split):
        return sorted(map(str, self.folder.glob(f"imagenet-{split}-*.tar")))

    def pixels(self, split):
        """{key: (class, pixels)}, as readers give them that decode."""
        expected = self.expected[split].items()
        return {key: (label, pixels(Image.open(io.BytesIO(data)))) for key, (label, data) in expected}


def pixels(image):
    return np.asarray(image.convert("RGB")).tobytes()


@pytest.fixture(scope="module", params=["plain", "filekey"])
def shards(request, tmp_path_factory):
    """12 training samples in 3 shards of 5, 5 and 2, and 12 validation samples, with odd names, in as many."""
    folder = tmp_path_factory.mktemp(request.param)
    for split, names in (("train", NAMES), ("val", NAMES_OF_KEYS if request.param == "filekey" else NAMES_BY_HAND)):
        for k, name in enumerate(["n03", "n01", "n02"]):
            (folder / "data" / split / name).mkdir(parents=True)
            for i, pattern in enumerate(names):
                path = folder / "data" / split / name / pattern.format(name)
                form = {".webp": {"format": "WEBP"}, ".png": {"format": "PNG"}}.get(path.suffix, {})
                path.write_bytes(encode(100 * (split == "val") + 4 * k + i, **form))
    (folder / "shards").mkdir()
    options = ["--filekey"] if request.param == "filekey" else []
    run("makeshards.py", "--maxcount", 5, *options, cwd=folder)
    return Shards(folder / "shards", bool(options), folder / "data")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing is looked for in the network, nor kept at home."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}.items():
            patch.setenv(name, value)
        yield


def imported(name):
    return pytest.importorskip(name, reason=f"no {name}: see tests/requirements.txt", exc_type=ImportError)


def once(found):
    """{key: the rest} of samples, of which no key comes twice."""
    found = [(key, tuple(rest)) for key, *rest in found]
    assert len(dict(found)) == len(found)
    return dict(found)


# ---------------------------------------------------------------------------- tar


@pytest.mark.parametrize("split", SPLITS)
def test_tar(shards, split, tmp_path):
    """`tar` lists KEY.cls and the image of each sample, next to each other, and unpacks the images' own bytes."""
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


def test_members_are_plain_ustar(shards):
    """A header of one block for each file, nothing else: no owner, no time, and no PAX headers, where names allow."""
    odd = any(not key.isascii() for key in shards.expected["val"])
    for split in SPLITS:
        for path in shards.paths(split):
            with open(path, "rb") as file:
                data, at = file.read(), 0
            while any(data[at : at + 512]):
                header = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict")
                assert data[at + 257 : at + 265] == b"ustar\x0000"
                if header.type == tarfile.REGTYPE:
                    assert (header.mode, header.uid, header.gid, header.mtime) == (0o444, 0, 0, 0)
                    assert not any(data[at + 157 : at + 257]) and not any(data[at + 265 : at + 329])  # link, names
                else:  # of a key that is long or not ASCII
                    assert header.type == tarfile.XHDTYPE and odd and split == "val"
                at += 512 + -(-header.size // 512) * 512
            assert len(data) % tarfile.RECORDSIZE == 0 and len(data) - at >= 1024


# ---------------------------------------------------------------------------- webdataset


IMAGE = "jpg;png;webp"  # whichever there is


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset(shards, split):
    """As its README reads: in the shards' order; and shuffled, by two workers."""
    dataset = wds.WebDataset(shards.paths(split), shardshuffle=False).decode("pil")
    found = once((key, label, pixels(image)) for key, image, label in dataset.to_tuple("__key__", IMAGE, "cls"))
    assert found == shards.pixels(split)
    pattern = f"{shards.folder}/imagenet-{split}-{{000000..000002}}.tar"
    dataset = wds.WebDataset(pattern, shardshuffle=3, seed=1).shuffle(5).to_tuple("__key__", "cls", IMAGE)
    found = once((key, int(label), data) for key, label, data in wds.WebLoader(dataset, batch_size=None, num_workers=2))
    assert found == shards.expected[split]


# ---------------------------------------------------------------------------- timm


@pytest.mark.parametrize(("split", "name"), SPLITS.items())
def test_timm(shards, split, name):
    """Its create_dataset finds the index: each sample once in validation and, in batches that go up, in training."""
    create_dataset = imported("timm.data").create_dataset
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
    """load_dataset: from its cache, and streamed. It needs images of one ending, so validation is not for it here."""
    datasets = imported("datasets")
    datasets.disable_progress_bars()
    files = {"train": shards.paths("train")}
    for streaming in (False, True):
        dataset = datasets.load_dataset(
            "webdataset", data_files=files, split="train", cache_dir=str(tmp_path), streaming=streaming
        )
        assert isinstance(dataset.features["jpg"], datasets.Image) and dataset.features["cls"].dtype == "int64"
        found = once((row["__key__"], row["cls"], pixels(row["jpg"])) for row in dataset)
        assert found == shards.pixels("train"), streaming
    undecoded = dataset.cast_column("jpg", datasets.Image(decode=False))
    assert once((row["__key__"], row["cls"], row["jpg"]["bytes"]) for row in undecoded) == shards.expected["train"]
