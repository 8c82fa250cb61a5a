"""makeshards.py writes the same shards from each layout of ImageNet; other folders of images work, too."""

import csv
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import sys

import numpy as np
import pytest
from commands import error_of, run, run_command
from make_data import noise, picture, read_tar, tar
from PIL import Image
from torchvision.datasets import ImageFolder, ImageNet, imagenet

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
IDS = dict(zip(WNIDS, (4, 2, 6, 1, 5), strict=True))  # the devkit's, in another order than the classes
TRUTH = [WNIDS[i] for i in (3, 0, 4, 0, 2, 1, 1, 4, 3, 2)]  # classes of the validation images
ARCHIVES = {split: name for split, (name, _) in imagenet.ARCHIVE_META.items()}

NUMBERS = itertools.count()
TRAIN = {f"{wnid}/{wnid}_{i}.JPEG": noise(next(NUMBERS)) for wnid in WNIDS for i in (10, 2, 3)}
VAL = {f"{wnid}/ILSVRC2012_val_{i:08d}.JPEG": noise(next(NUMBERS)) for i, wnid in enumerate(TRUTH, 1)}
FLAT = {name.partition("/")[2]: data for name, data in VAL.items()}


def write_files(folder, files):
    """Write files, {path: bytes}, below the folder, and return it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read_files(folder):
    """{path: bytes} of the files below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def makeshards(cwd, *options):
    """Write shards of 4 samples to shards/; returns stdout."""
    (cwd / "shards").mkdir(exist_ok=True)
    return run("makeshards.py", "--maxcount", 4, *options, cwd=cwd)[0]


def refused(cwd, *options):
    """The error of makeshards.py, which must not change shards/."""
    (cwd / "shards").mkdir(exist_ok=True)
    before = read_files(cwd / "shards")
    message = error_of("makeshards.py", "--maxcount", 4, *options, cwd=cwd)
    assert read_files(cwd / "shards") == before
    return message


def read_index(cwd):
    return json.loads((cwd / "shards/_info.json").read_text())


def assert_like_image_folder(cwd, data="data", splits=("train", "val")):
    """The shards hold each image of torchvision's ImageFolder once, under its number, with its class and bytes."""
    index = read_index(cwd)
    for split in splits:
        entry = index["splits"]["train" if split == "train" else "validation"]
        found = []
        for name, length in zip(entry["filenames"], entry["shard_lengths"], strict=True):
            members = read_tar(cwd / "shards" / name)
            assert len(members) == 2 * length
            found += members
        dataset = ImageFolder(cwd / data / split)
        expected = []
        for i, (path, label) in enumerate(dataset.imgs):
            ending = path.rpartition(".")[2].lower().replace("jpeg", "jpg")
            with open(path, "rb") as file:
                expected += [(f"{i:07d}.cls", b"%d" % label), (f"{i:07d}.{ending}", file.read())]
        assert sorted(found) == sorted(expected)
        assert index["classes"] == dataset.classes and entry["num_samples"] == len(dataset)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """data/ with train/ and val/ and nothing else, and its shards in shards/, with which the others are compared."""
    folder = tmp_path_factory.mktemp("plain")
    write_files(folder / "data/train", TRAIN)
    write_files(folder / "data/val", VAL)
    assert "val: 3 shards, 10 samples written" in makeshards(folder)
    return folder


def assert_same_shards(cwd, plain):
    ours = read_files(cwd / "shards")
    assert len(ours) == 8  # 4 + 3 shards and the index
    assert ours == read_files(plain / "shards")


# ---------------------------------------------------------------------------- torchvision.datasets.ImageNet


@pytest.fixture(scope="module")
def archives():
    """ImageNet's three archives as they are downloaded, with few images: {name: bytes}."""
    scipy_io = pytest.importorskip("scipy.io", reason="torchvision reads the devkit with scipy", exc_type=ImportError)
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    synsets = [(i, wnid, f"name of {wnid}, another", "", 0, [], 0) for wnid, i in IDS.items()]
    synsets.append((3, "n00000001", "not a class", "", 2, [1, 2], 1))  # because it has children
    kinds = [(name, "O" if name in ("WNID", "words", "gloss", "children") else "u2") for name in names]
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(sorted(synsets), dtype=kinds)})
    truth = "".join(f"{IDS[wnid]}\n" for wnid in TRUTH).encode()
    devkit = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    classes = []
    for wnid in WNIDS:
        files = [(name.partition("/")[2], data) for name, data in TRAIN.items() if name.startswith(wnid)]
        classes.append((f"{wnid}.tar", tar(files)))
    return {
        ARCHIVES["train"]: tar(classes),
        ARCHIVES["val"]: tar(FLAT.items()),
        ARCHIVES["devkit"]: tar(
            [(f"ILSVRC2012_devkit_t12/data/{name}", data) for name, data in devkit.items()], mode="w:gz"
        ),
    }


def archive_meta(archives):
    """What torchvision knows of the archives: ours instead of the real ones."""
    return {split: (name, hashlib.md5(archives[name]).hexdigest()) for split, name in ARCHIVES.items()}


def test_torchvision(plain, archives, tmp_path, monkeypatch):
    """As torchvision.datasets.ImageNet leaves the folder, with the archives still in it."""
    data = write_files(tmp_path / "data", archives)
    monkeypatch.setattr(imagenet, "ARCHIVE_META", archive_meta(archives))
    train = ImageNet(data, "train")
    val = ImageNet(data, "val")
    assert (data / "meta.bin").exists() and val.classes[0] == (f"name of {WNIDS[0]}", "another")
    assert read_files(data / "train") == TRAIN and read_files(data / "val") == VAL
    makeshards(tmp_path)
    assert_same_shards(tmp_path, plain)
    assert read_index(tmp_path)["classes"] == train.wnids == val.wnids


@pytest.mark.slow
def test_archives(plain, archives, tmp_path):
    """The error has the command that unpacks the archive of a split. After those, the shards are the same."""
    data = write_files(tmp_path / "data", archives)
    known = f"from torchvision.datasets import imagenet; imagenet.ARCHIVE_META = {archive_meta(archives)}\n"
    for split in ("train", "val"):
        message = refused(tmp_path)
        code = re.search('python -c "(.*?)"', message)[1]
        assert f"ImageNet('./data', '{split}')" in code and "scipy" in message
        assert ("the same with 'val'" in message) == (split == "train")
        run_command([sys.executable, "-c", known + code], cwd=tmp_path, env={"PYTHONWARNINGS": "ignore"})
    assert read_files(data / "train") == TRAIN and read_files(data / "val") == VAL
    makeshards(tmp_path)
    assert_same_shards(tmp_path, plain)


# ---------------------------------------------------------------------------- Kaggle


def solution(truth=VAL, head=("ImageId", "PredictionString")):
    """LOC_val_solution.csv: its lines are in no order, and name the class once for each box."""
    rows = []
    for i, path in enumerate(truth):
        wnid, _, name = path.partition("/")
        rows.append((name.removesuffix(".JPEG"), f"{wnid} 85 1 499 272 " * (1 + i % 3)))
    random.Random(0).shuffle(rows)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue().encode()


@pytest.fixture
def kaggle(tmp_path):
    """kaggle/ as Kaggle's archive unpacks; returns its CLS-LOC."""
    files = {"LOC_val_solution.csv": solution(), "LOC_synset_mapping.txt": b"", "ILSVRC/x": b""}
    write_files(tmp_path / "kaggle", files)
    folder = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    write_files(folder / "train", TRAIN)
    write_files(folder / "val", FLAT)
    write_files(folder / "test", {f"ILSVRC2012_test_{i:08d}.JPEG": noise(100 + i) for i in (1, 2)})
    return folder


@pytest.mark.parametrize("data", ["kaggle", "kaggle/ILSVRC/Data/CLS-LOC", "link to CLS-LOC"])
def test_kaggle(data, plain, kaggle, tmp_path):
    if data.startswith("link"):
        (tmp_path / "data").symlink_to(kaggle)
        data = "./data"
    makeshards(tmp_path, "--data", data)
    assert_same_shards(tmp_path, plain)


@pytest.mark.parametrize("case", ["image without a line", "line without an image", "folder", "another table"])
def test_kaggle_table_does_not_fit(case, kaggle, tmp_path):
    """The error names the table, and what only one of table and val/ has."""
    table = tmp_path / "kaggle/LOC_val_solution.csv"
    differing = min(FLAT).removesuffix(".JPEG")
    if case == "image without a line":
        table.write_bytes(solution([name for name in VAL if differing not in name]))
    elif case == "line without an image":
        (kaggle / "val" / f"{differing}.JPEG").unlink()
    elif case == "folder":
        differing = WNIDS[0]
        write_files(kaggle / "val", {f"{differing}/extra.JPEG": noise(200)})
    else:
        differing = ""
        table.write_bytes(solution(head=("image", "label")))
    message = refused(tmp_path, "--data", "kaggle")
    assert "LOC_val_solution.csv" in message and differing in message


# ---------------------------------------------------------------------------- links, subsets, other datasets


def test_links(plain, tmp_path):
    """data/, val/ and the class folders may be symbolic links."""
    write_files(tmp_path / "disk1", {name.replace("/", "-images/"): data for name, data in TRAIN.items()})
    (tmp_path / "disk2/imagenet/train").mkdir(parents=True)
    for wnid in WNIDS:
        (tmp_path / "disk2/imagenet/train" / wnid).symlink_to(tmp_path / "disk1" / f"{wnid}-images")
    (tmp_path / "disk2/imagenet/val").symlink_to(plain / "data/val")
    (tmp_path / "data").symlink_to("disk2/imagenet")
    makeshards(tmp_path)
    assert_same_shards(tmp_path, plain)


def link_classes(folder, source, classes):
    folder.mkdir(parents=True)
    for name in classes:
        (folder / name).symlink_to(source / name)


def read_classes(cwd, split):
    """The class of each sample of a split, in order."""
    members = [member for path in sorted((cwd / "shards").glob(f"imagenet-{split}-*.tar")) for member in read_tar(path)]
    return [int(data) for name, data in members if name.endswith(".cls")]


def test_subset_of_the_classes(plain, tmp_path):
    """Its classes are numbered from 0."""
    for split in ("train", "val"):
        link_classes(tmp_path / "data" / split, plain / "data" / split, WNIDS[1:4])
    makeshards(tmp_path)
    assert_like_image_folder(tmp_path)
    assert read_index(tmp_path)["classes"] == WNIDS[1:4]


@pytest.mark.parametrize("runs", [["train,val"], ["train", "val"], ["val", "train"], ["train", "val without train/"]])
def test_fewer_classes_in_val(runs, plain, tmp_path):
    """They are numbered as in train/ or, if that is gone, as in the index; also if splits are written one by one."""
    link_classes(tmp_path / "data/train", plain / "data/train", WNIDS[:4])
    link_classes(tmp_path / "data/val", plain / "data/val", [WNIDS[0], WNIDS[3]])
    for splits in runs:
        if splits == "val without train/":
            shutil.rmtree(tmp_path / "data/train")
            splits = "val"
        stdout = makeshards(tmp_path, "--splits", splits)
        assert ("2 of the 4 training classes" in stdout) == ("val" in splits)
    assert read_index(tmp_path)["classes"] == WNIDS[:4]
    assert read_classes(tmp_path, "val") == [0, 0, 3, 3]
    assert set(read_classes(tmp_path, "train")) == {0, 1, 2, 3}
    stdout, _ = run("makeshards.py", "--verify", cwd=tmp_path)
    assert "compared with the index and ./data" in stdout and "no problems found" in stdout


def test_val_alone(plain, tmp_path):
    """Without train/ and an index, its classes have no numbers."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/val").symlink_to(plain / "data/val")
    assert "data/train" in refused(tmp_path, "--splits", "val")


def test_other_classes_in_val(plain, tmp_path):
    link_classes(tmp_path / "data/train", plain / "data/train", WNIDS[1:4])
    (tmp_path / "data/val").symlink_to(plain / "data/val")
    message = refused(tmp_path)
    assert f"data/val: 2 class folders that train/ does not have, e.g. {WNIDS[0]}, {WNIDS[4]}" in message


def test_val_missing_empty_or_flat(plain, tmp_path):
    """The error names val/ and the fix; --splits train works without it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(plain / "data/train")
    message = refused(tmp_path)
    assert "data/val" in message and "--splits train" in message
    (tmp_path / "data/val").mkdir()
    assert "data/val" in refused(tmp_path)
    write_files(tmp_path / "data/val", FLAT)
    message = refused(tmp_path)
    assert "data/val" in message and "LOC_val_solution.csv" in message
    shutil.rmtree(tmp_path / "data/val")
    assert makeshards(tmp_path, "--splits", "train") == "train: 4 shards, 15 samples written\n"
    assert list(read_index(tmp_path)["splits"]) == ["train"]
    expected = {name: data for name, data in read_files(plain / "shards").items() if "-train-" in name}
    ours = read_files(tmp_path / "shards")
    del ours["_info.json"]
    assert ours == expected


def test_more_classes_than_outputs(tmp_path):
    write_files(tmp_path / "data/train", {f"{i:04d}/x.jpg": noise(0) for i in range(1001)})
    write_files(tmp_path / "data/val", {"0000/x.jpg": noise(0)})
    stdout = makeshards(tmp_path, "--maxcount", 2000)
    assert stdout.splitlines()[0] == "1001 classes, but main-wds.py's models have 1000 outputs"


def test_any_names(tmp_path):
    """Any class and file names, nested folders, and each of torchvision's extensions; other files are ignored."""
    names = ["Zebra/a b.jpg", "Zebra/nested/deeper/\u00e4.JPEG", "Zebra/a.b.c.png", "ant/1.PNG", "ant/two\nlines.webp"]
    names += ["\u65e5\u672c v1.2/\u732b.JpEg", "\u65e5\u672c v1.2/z.tiff", "\u65e5\u672c v1.2/.hidden.bmp"]
    names += ["with space/100% 'it'.jpeg", "with space/x.pgm", "ant/.jpg"]
    if sys.platform == "linux":
        names += ["ant/latin-\udce9.jpg"]  # not UTF-8
    formats = {"pgm": "PPM", "tiff": "TIFF", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}
    for k, split in enumerate(("train", "val")):
        files = {"Zebra/.DS_Store": b"x", "ant/notes.txt": b"x", "list.csv": b"x"}
        for i, name in enumerate(names):
            image = Image.new("RGB", (16, 12), (20 * i, 200 * k, 0))
            files[name] = picture(image, format=formats.get(name.rpartition(".")[2].lower(), "JPEG"))
        assert len(set(files.values())) == len(names) + 1
        write_files(tmp_path / "pets" / split, files)
    stdout = makeshards(tmp_path, "--data", tmp_path / "pets")
    assert f"train: 3 shards, {len(names)} samples written" in stdout
    assert_like_image_folder(tmp_path, "pets")
    assert read_index(tmp_path)["classes"] == ["Zebra", "ant", "with space", "\u65e5\u672c v1.2"]  # in any locale
