"""makeshards.py on each of the ways in which people hold ImageNet, and on folders of their own: the same shards."""

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
from conftest import error_of, run, run_command
from PIL import Image
from torchvision.datasets import ImageFolder, ImageNet, imagenet

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
IDS = dict(zip(WNIDS, (4, 2, 6, 1, 5), strict=True))  # the devkit's, which are in another order than the classes
TRUTH = [WNIDS[i] for i in (3, 0, 4, 0, 2, 1, 1, 4, 3, 2)]  # of the validation images
ARCHIVES = {split: name for split, (name, _) in imagenet.ARCHIVE_META.items()}


def jpeg(seed, format="JPEG"):
    """The bytes of a small image of its own."""
    out = io.BytesIO()
    Image.frombytes("RGB", (16, 12), random.Random(seed).randbytes(16 * 12 * 3)).save(out, format)
    return out.getvalue()


TRAIN = {f"{wnid}/{wnid}_{i}.JPEG": jpeg(f"{wnid} {i}") for wnid in WNIDS for i in (10, 2, 3)}
VAL = {f"{wnid}/ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i) for i, wnid in enumerate(TRUTH)}
FLAT = {name.partition("/")[2]: data for name, data in VAL.items()}


def lay(folder, files):
    """Write files, {path: bytes}, below the folder, which is given back."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tree(folder):
    """The files below the folder: {path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(cwd, *options):
    """Write shards of 4 samples; what the command says."""
    (cwd / "shards").mkdir(exist_ok=True)
    return run("makeshards.py", "--maxcount", 4, *options, cwd=cwd)[0]


def refused(cwd, *options):
    """The one line of an error, when no shard is written."""
    (cwd / "shards").mkdir(exist_ok=True)
    before = tree(cwd / "shards")
    message = error_of("makeshards.py", "--maxcount", 4, *options, cwd=cwd)
    assert tree(cwd / "shards") == before
    return message


def assert_torchvisions(cwd, data="data", splits=("train", "val")):
    """Each image of torchvision's ImageFolder is in the shards once, at its place, with its class and its bytes."""
    index = json.loads((cwd / "shards/_info.json").read_text())
    for split in splits:
        found, members = ImageFolder(cwd / data / split), {}
        assert index["classes"] == found.classes
        entry = index["splits"]["train" if split == "train" else "validation"]
        for name, length in zip(entry["filenames"], entry["shard_lengths"], strict=True):
            with tarfile.open(cwd / "shards" / name) as shard:
                content = {member.name: shard.extractfile(member).read() for member in shard}
            assert len(content) == 2 * length and not members.keys() & content
            members |= content
        expected = {}
        for i, (path, label) in enumerate(found.imgs):
            ending = os.path.splitext(path)[1][1:].lower().replace("jpeg", "jpg")
            with open(path, "rb") as file:
                expected |= {f"{i:07d}.cls": b"%d" % label, f"{i:07d}.{ending}": file.read()}
        assert members == expected
        assert entry["num_samples"] == len(found)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """data/ with train/ and val/ and nothing else, and their shards in shards/: the measure for the others."""
    folder = tmp_path_factory.mktemp("plain")
    lay(folder / "data/train", TRAIN)
    lay(folder / "data/val", VAL)
    assert "val: 3 shards, 10 samples written" in make(folder)
    return folder


def assert_same(cwd, plain):
    ours, theirs = tree(cwd / "shards"), tree(plain / "shards")
    assert sorted(ours) == sorted(theirs) and len(ours) == 8  # 4 + 3 shards and the index
    assert not [name for name in ours if ours[name] != theirs[name]]


def test_plain_folders(plain):
    """train/ and val/ without a devkit."""
    assert_torchvisions(plain)


# ---------------------------------------------------------------------------- torchvision's


def tar(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def archives():
    """The three archives of ImageNet as they are downloaded, but small: {name: bytes}."""
    scipy_io = pytest.importorskip("scipy.io", reason="torchvision reads the devkit with scipy", exc_type=ImportError)
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    synsets = [(i, wnid, f"name of {wnid}, another", "", 0, [], 0) for wnid, i in IDS.items()]
    synsets.insert(2, (3, "n00000001", "none of the classes", "", 2, [1, 2], 1))  # for it has others below it
    kinds = [(name, "O" if name in ("WNID", "words", "gloss", "children") else "u2") for name in names]
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(sorted(synsets), dtype=kinds)})
    truth = "".join(f"{IDS[wnid]}\n" for wnid in TRUTH).encode()
    devkit = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth}
    classes = {wnid: {name[10:]: data for name, data in TRAIN.items() if name.startswith(wnid)} for wnid in WNIDS}
    return {
        ARCHIVES["train"]: tar({f"{wnid}.tar": tar(files) for wnid, files in classes.items()}),
        ARCHIVES["val"]: tar(FLAT),
        ARCHIVES["devkit"]: tar({f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit.items()}, "w:gz"),
    }


def test_torchvisions_with_meta_bin(plain, archives, tmp_path, monkeypatch):
    """As torchvision.datasets.ImageNet leaves it, with the archives still there: they are not unpacked again."""
    data = lay(tmp_path / "data", archives)
    known = {split: (name, hashlib.md5(archives[name]).hexdigest()) for split, name in ARCHIVES.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", known)
    train, val = (ImageNet(data, split) for split in ("train", "val"))
    assert (data / "meta.bin").exists() and val.classes[0] == (f"name of {WNIDS[0]}", "another")
    assert tree(data / "train") == TRAIN and tree(data / "val") == VAL
    make(tmp_path)
    assert_same(tmp_path, plain)
    assert json.loads((tmp_path / "shards/_info.json").read_text())["classes"] == train.wnids == val.wnids


def test_torchvisions_archives_alone(plain, archives, tmp_path):
    """Refused with the commands that unpack them; once those have run, the shards are the same."""
    data = lay(tmp_path / "data", archives)
    message = refused(tmp_path)
    assert "unpack them with torchvision and scipy" in message
    code = re.search('python -c "(.*?)"', message)[1]
    assert message.endswith(f"""python -c "{code}", and the same with 'val'""")
    md5 = {split: (name, hashlib.md5(archives[name]).hexdigest()) for split, name in ARCHIVES.items()}
    known = f"from torchvision.datasets import imagenet; imagenet.ARCHIVE_META = {md5}\n"  # take ours for the real ones
    for split in ("train", "val"):
        command = [sys.executable, "-c", known + code.replace("train", split)]
        run_command(command, cwd=tmp_path, env={"PYTHONWARNINGS": "ignore"})
    assert tree(data / "train") == TRAIN and tree(data / "val") == VAL
    make(tmp_path)
    assert_same(tmp_path, plain)


def test_one_archive_alone(plain, archives, tmp_path):
    data = lay(tmp_path / "data", {ARCHIVES["val"]: archives[ARCHIVES["val"]]})
    (data / "train").symlink_to(plain / "data/train")
    message = refused(tmp_path)
    assert "ImageNet('./data', 'val')" in message and "train" not in message
    make(tmp_path, "--splits", "train")


# ---------------------------------------------------------------------------- Kaggle's


def solution(truth=VAL, head=("ImageId", "PredictionString")):
    """LOC_val_solution.csv: its lines are in no order, and name the class once for each box."""
    rows = [(path.split("/")[1][:-5], path.split("/")[0]) for path in truth]
    random.Random(0).shuffle(rows)
    out = io.StringIO()
    boxes = [(image, f"{wnid} 85 1 499 272 " * (1 + i % 3)) for i, (image, wnid) in enumerate(rows)]
    csv.writer(out, lineterminator="\n").writerows([head, *boxes])
    return out.getvalue().encode()


@pytest.fixture
def kaggle(tmp_path):
    """kaggle/ as Kaggle's archive unpacks; its CLS-LOC."""
    lay(tmp_path / "kaggle", {"LOC_val_solution.csv": solution(), "LOC_synset_mapping.txt": b"", "ILSVRC/x": b""})
    folder = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    lay(folder / "train", TRAIN)
    lay(folder / "val", FLAT)
    lay(folder / "test", {f"ILSVRC2012_test_{i:08d}.JPEG": jpeg(f"test {i}") for i in (1, 2)})
    return folder


@pytest.mark.parametrize("case", ["--data at its root", "--data at CLS-LOC", "./data, a link to CLS-LOC"])
def test_kaggles(case, plain, kaggle, tmp_path):
    options = {"root": ["--data", "kaggle"], "CLS-LOC": ["--data", kaggle]}.get(case.rpartition(" ")[2], [])
    if case.startswith("./data"):
        (tmp_path / "data").symlink_to(kaggle)
        options = []
    make(tmp_path, *options)
    assert_same(tmp_path, plain)


@pytest.mark.parametrize("case", ["image without a line", "line without an image", "another table"])
def test_kaggles_table_that_does_not_fit(case, kaggle, tmp_path):
    """The error names the table, and what is in one of the two alone: among 50,000 nobody finds it otherwise."""
    table, (first, *_) = tmp_path / "kaggle/LOC_val_solution.csv", FLAT
    if case == "image without a line":
        table.write_bytes(solution([name for name in VAL if not name.endswith(first)]))
    elif case == "line without an image":
        (kaggle / "val" / first).unlink()
    else:
        table.write_bytes(solution(head=("image", "label")))
    message = refused(tmp_path, "--data", "kaggle")
    assert "LOC_val_solution.csv" in message
    assert case == "another table" or first.removesuffix(".JPEG") in message


def test_kaggles_with_a_folder(kaggle, tmp_path):
    """It does not make the images beside it disappear."""
    lay(kaggle / "val", {f"{WNIDS[0]}/extra.JPEG": jpeg("extra")})
    assert f"they differ in 1 image, e.g. {WNIDS[0]}" in refused(tmp_path, "--data", "kaggle")


# ---------------------------------------------------------------------------- links, subsets, and folders of one's own


def test_links(plain, tmp_path):
    """./data, val/ and the class folders may be links to anywhere."""
    lay(tmp_path / "disk1", {f"{name[:9]}-images/{name[10:]}": data for name, data in TRAIN.items()})
    (tmp_path / "disk2/imagenet/train").mkdir(parents=True)
    for wnid in WNIDS:
        (tmp_path / "disk2/imagenet/train" / wnid).symlink_to(tmp_path / "disk1" / f"{wnid}-images")
    (tmp_path / "disk2/imagenet/val").symlink_to(plain / "data/val")
    (tmp_path / "data").symlink_to("disk2/imagenet")
    make(tmp_path)
    assert_same(tmp_path, plain)


def link_classes(folder, source, classes):
    folder.mkdir(parents=True)
    for name in classes:
        (folder / name).symlink_to(source / name)


def labels(cwd, split):
    """{key: class} of a split's samples."""
    found = {}
    for path in sorted((cwd / "shards").glob(f"imagenet-{split}-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".cls"):
                    found[member.name[:-4]] = int(shard.extractfile(member).read())
    return found


def test_a_subset_of_the_classes(plain, tmp_path):
    """Linked into both splits they are a dataset of their own, numbered from 0."""
    for split in ("train", "val"):
        link_classes(tmp_path / "data" / split, plain / "data" / split, WNIDS[1:4])
    make(tmp_path)
    assert_torchvisions(tmp_path)
    assert json.loads((tmp_path / "shards/_info.json").read_text())["classes"] == WNIDS[1:4]


@pytest.mark.parametrize("runs", [["train,val"], ["train", "val"], ["val", "train"], ["train", "val without train/"]])
def test_fewer_classes_in_val(runs, plain, tmp_path):
    """They are numbered as in train/, or as in the index that is there, also if the splits are written one by one."""
    link_classes(tmp_path / "data/train", plain / "data/train", WNIDS[:4])
    link_classes(tmp_path / "data/val", plain / "data/val", [WNIDS[0], WNIDS[3]])
    for splits in runs:
        if "without" in splits:
            shutil.rmtree(tmp_path / "data/train")
        stdout = make(tmp_path, "--splits", splits.partition(" ")[0])
        assert ("./data/val: 2 of the 4 training classes\n" in stdout) == ("val" in splits)
    assert json.loads((tmp_path / "shards/_info.json").read_text())["classes"] == WNIDS[:4]
    expected = [WNIDS.index(wnid) for wnid in sorted(TRUTH) if wnid in (WNIDS[0], WNIDS[3])]
    assert list(labels(tmp_path, "val").values()) == expected
    assert set(labels(tmp_path, "train").values()) == {0, 1, 2, 3}
    stdout, _ = run("makeshards.py", "--verify", cwd=tmp_path)
    assert "compared with the index and ./data" in stdout and "no problems found" in stdout


def test_val_without_its_classes(plain, tmp_path):
    """Neither train/ nor an index: there is nothing to number them by."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/val").symlink_to(plain / "data/val")
    assert "data/train" in refused(tmp_path, "--splits", "val")


def test_other_classes_in_val(plain, tmp_path):
    link_classes(tmp_path / "data/train", plain / "data/train", WNIDS[1:4])
    (tmp_path / "data/val").symlink_to(plain / "data/val")
    message = refused(tmp_path)
    assert f"data/val: 2 class folders that train/ does not have, e.g. {WNIDS[0]}, {WNIDS[4]}" in message


def test_more_classes_than_outputs(tmp_path):
    image = jpeg("one")
    for split in ("train", "val"):
        lay(tmp_path / "data" / split, {f"{i:04d}/x.jpg": image for i in range(1001 if split == "train" else 1)})
    stdout = make(tmp_path, "--maxcount", 2000)
    assert stdout.splitlines()[0] == "1001 classes, but main-wds.py's models have 1000 outputs"


def test_folders_of_ones_own(tmp_path):
    """Any names, nested folders, and every ending that torchvision knows; other files are let alone."""
    names = ["Zebra/a b.jpg", "Zebra/nested/deeper/\u00e4.JPEG", "Zebra/a.b.c.png", "ant/1.PNG", "ant/two\nlines.webp"]
    names += ["\u65e5\u672c v1.2/\u732b.JpEg", "\u65e5\u672c v1.2/z.tiff", "\u65e5\u672c v1.2/.hidden.bmp"]
    names += ["with space/100% 'it'.jpeg", "with space/x.pgm"]
    if sys.platform == "linux":
        names += ["ant/latin-\udce9.jpg"]  # a name that is not UTF-8
    formats = {"jpg": "JPEG", "pgm": "PPM", "tiff": "TIFF", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}
    for split in ("train", "val"):
        ends = [formats.get(name.rpartition(".")[2].lower(), "JPEG") for name in names]
        files = {name: jpeg(f"{split} {i}", end) for i, (name, end) in enumerate(zip(names, ends, strict=True))}
        others = {"Zebra/.DS_Store": b"x", "ant/notes.txt": b"x", "list.csv": b"x"}
        lay(tmp_path / "pets" / split, {**files, **others})
    stdout = make(tmp_path, "--data", tmp_path / "pets")
    assert f"train: 3 shards, {len(names)} samples written" in stdout
    assert_torchvisions(tmp_path, "pets")
    classes = json.loads((tmp_path / "shards/_info.json").read_text())["classes"]
    assert classes == ["Zebra", "ant", "with space", "\u65e5\u672c v1.2"]  # as Python sorts them, in any locale


def test_val_missing_empty_or_flat(plain, tmp_path):
    """The training split alone is written without it; else an error says what to do, and nothing is written."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(plain / "data/train")
    assert "data/val" in refused(tmp_path)
    (tmp_path / "data/val").mkdir()
    message = refused(tmp_path)
    assert "data/val" in message and "folder" in message
    lay(tmp_path / "data/val", FLAT)
    message = refused(tmp_path)
    assert (
        message.startswith("makeshards.py: ./data/val: images outside of class folders")
        and "LOC_val_solution.csv" in message
    )
    assert "a folder for each class, as train/ has them" in message
    shutil.rmtree(tmp_path / "data/val")
    stdout = make(tmp_path, "--splits", "train")
    assert stdout.splitlines() == ["train: 4 shards, 15 samples written"]
    assert_torchvisions(tmp_path, splits=["train"])
    assert list(json.loads((tmp_path / "shards/_info.json").read_text())["splits"]) == ["train"]
    ours, theirs = tree(tmp_path / "shards"), tree(plain / "shards")
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("imagenet-train-"))
