"""makeshards.py --verify, --check and --index report every fault and nothing else. They change no shard."""

import bz2
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
import webdataset as wds
from commands import error_of, load, run
from make_data import noise, read_tar, tar, write_folders
from test_shards import found_by

OTHER = ["--resize", 20, "--filekey", "--seed", 5, "--maxcount", 5]
TRAIN = [f"imagenet-train-{i:06d}.tar" for i in range(3)]
VAL = [f"imagenet-val-{i:06d}.tar" for i in range(3)]  # of samples 0 1 2, 3 4 5 and 6 7; 0 to 3 are of class 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """data/ with two classes of four images per split, their shards in shards/, and others, of OTHER, in other/."""
    folder = tmp_path_factory.mktemp("made")
    write_folders(folder / "data", 4, 4, ["cat", "dog"])
    for shards in ("shards", "other"):
        (folder / shards).mkdir()
    run("makeshards.py", "--shards", "shards", "--maxcount", 3, cwd=folder)
    run("makeshards.py", "--shards", "other", *OTHER, cwd=folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of data/ and shards/ that the test may damage."""
    for name in ("data", "shards"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def members(*numbers):
    """The members of these validation samples."""
    found = []
    for n in numbers:
        label = b"0" if n < 4 else b"1"
        found += [(f"{n:07d}.cls", label), (f"{n:07d}.jpg", noise(8 + n))]
    return found


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def files(folder):
    """{path: (bytes, modification time)} of all files in a folder and below."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_index(folder, change):
    """Let change(index, its entry of the validation split) edit the index."""
    path = folder / "shards/_info.json"
    index = json.loads(path.read_text())
    change(index, index["splits"]["validation"])
    path.write_text(json.dumps(index))


def error_without_changes(*args, cwd):
    """The line with which makeshards.py refuses, leaving all files as they are."""
    before = files(cwd)
    line = error_of("makeshards.py", *args, cwd=cwd)
    assert files(cwd) == before
    return line


def check_faults(folder, expected, *args):
    """--verify reports exactly one fault for each of these texts, leaving all files as they are."""
    before = files(folder)
    stdout, stderr = run("makeshards.py", "--verify", *args, cwd=folder, status=1 if expected else 0)
    lines = [line for line in stdout.splitlines() if not re.match(r"(train|val): \d+ shards?, ", line)]
    totals = [line for line in lines if re.match(r"\d+ problems? |no problems found", line)]
    faults = [line for line in lines if line not in totals]
    for text in expected:
        matching = [line for line in faults if text in line]
        assert matching, f"{text}\nis not in\n{stdout}"
        faults.remove(matching[0])
    assert not faults and stderr == "" and files(folder) == before, stdout
    if expected:
        assert sum(int(line.split()[0]) for line in totals) == len(expected), stdout
    else:
        assert totals == ["no problems found"]


def check_damage(folder, of_shards, of_images=()):
    """--verify reports these faults: of_images only if data/ is there. Of other bytes alone, only digests tell."""
    check_faults(folder, of_shards or ["imagenet-val-000001.tar: changed since it was written"], "--data", "none")
    edit_index(folder, lambda _, entry: entry.update(shard_sha256=[None] * 3))
    check_faults(folder, [*of_shards, *of_images])


# ---------------------------------------------------------------------------- --verify


def test_intact_shards(made, tmp_path):
    """With and without the images. The options with which the shards were written are not needed."""
    before = files(made)
    stdout, stderr = run("makeshards.py", "--verify", cwd=made)
    assert stderr == "" and stdout.splitlines() == [
        "train: 3 shards, 8 samples, compared with the index and ./data; images not decoded (see --check)",
        "val: 3 shards, 8 samples, compared with the index and ./data; images not decoded (see --check)",
        "no problems found",
    ]
    stdout, _ = run("makeshards.py", "--verify", "--shards", "other", "--check", cwd=made)
    assert stdout.splitlines()[0] == "train: 2 shards, 8 samples, compared with the index and ./data"
    assert files(made) == before
    shutil.copytree(made / "shards", tmp_path / "shards")
    stdout, _ = run("makeshards.py", "--verify", "--check", "--splits", "val", "--workers", 1, cwd=tmp_path)
    assert stdout.splitlines() == ["val: 3 shards, 8 samples, compared with the index", "no problems found"]
    for args in (["--shards", made / "other"], ["--data", made / "data"]):
        check_faults(tmp_path, [], *args)


SECOND = members(3, 4, 5)  # of VAL
NO_SAMPLE = ["sample 0000003 does not hold one image and one valid class"]
CHANGED_IMAGE = [*SECOND[:3], ("0000004.jpg", flip(SECOND[3][1], 700)), *SECOND[4:]]


# (members of the second shard, [faults of the shard], [faults that only a comparison with the images shows])
@pytest.mark.parametrize(
    "damaged, of_shard, of_images",
    [
        pytest.param(CHANGED_IMAGE, [], ["sample 0000004 differs from ./data/val/dog/dog_0.jpg"],
                     id="byte of an image"),
        pytest.param([("0000003.cls", b"1"), *SECOND[1:]], [], ["sample 0000003 of class 1 matches no image in --data"],
                     id="wrong class"),
        pytest.param([("0000003.cls", b"2"), *SECOND[1:]], NO_SAMPLE, [], id="class out of range"),
        pytest.param([("0000003.cls", b"-1"), *SECOND[1:]], NO_SAMPLE, [], id="negative class"),
        pytest.param([("0000003.cls", b"cat"), *SECOND[1:]], NO_SAMPLE, [], id="class not a number"),
        pytest.param([("0000003.cls", b""), *SECOND[1:]], NO_SAMPLE, [], id="empty class"),
        pytest.param(SECOND[1:], NO_SAMPLE, [], id="no class"),
        pytest.param([SECOND[0], *SECOND[2:]], NO_SAMPLE, [], id="no image"),
        pytest.param([SECOND[0], ("0000003.png", b""), *SECOND[1:]], NO_SAMPLE, [], id="two images"),
        pytest.param(members(3, 5), ["2 samples, but 3 in the index"], [], id="missing sample"),
        pytest.param([*SECOND, ("6.cls", b"0"), ("6.jpg", b"")], ["4 samples, but 3"], ["sample 6 of class"],
                     id="extra sample"),
        pytest.param([("7.cls", b"0"), ("7.jpg", SECOND[1][1]), *SECOND[2:]], [], ["sample 7 of class 0 matches"],
                     id="other key"),
        pytest.param(members(3, 3, 5), [*NO_SAMPLE, "2 samples, but 3 in the index"], [], id="same key twice in a row"),
        pytest.param(members(3, 4, 3), ["sample 0000003"], [], id="same key twice"),
    ],
)  # fmt: skip
def test_damaged_samples(damaged, of_shard, of_images, copy):
    shard = copy / "shards" / VAL[1]
    assert read_tar(shard) == SECOND
    shard.write_bytes(tar(damaged))
    check_damage(copy, [f"{VAL[1]}: {text}" for text in of_shard], [f"{VAL[1]}: {text}" for text in of_images])


INTACT = tar(SECOND)
START = [0]  # of each member, and the end of the last one
for _, data in SECOND:
    START.append(START[-1] + 512 + -(-len(data) // 512) * 512)


@pytest.mark.parametrize(
    "damaged, samples",
    [
        pytest.param(b"", 0, id="empty"),
        pytest.param(INTACT[: START[2] + 100], 0, id="cut off in a header"),
        pytest.param(INTACT[: START[3] + 900], 1, id="cut off in a member"),
        pytest.param(INTACT[: START[3]], 1, id="cut off between members"),
        pytest.param(INTACT[: START[4]], 1, id="cut off between samples"),
        pytest.param(INTACT[: START[-1]], 2, id="no end mark"),
        pytest.param(INTACT[: START[-1] + 512], 2, id="half an end mark"),
        pytest.param(INTACT + b"x", 2, id="something after the end mark"),
        pytest.param(2 * INTACT, 2, id="two tar files"),
        pytest.param(flip(INTACT, START[2] + 5), 0, id="byte of a header"),
        pytest.param(b"<html>404</html>" * 1000, 0, id="not a tar file"),
    ],
)
def test_damaged_shards(damaged, samples, copy):
    """--verify reports the shard, and --index refuses it."""
    (copy / "shards" / VAL[1]).write_bytes(damaged)
    check_damage(copy, [f"{VAL[1]}: broken after {samples} sample"])
    os.unlink(copy / "shards/_info.json")
    line = error_without_changes("--index", "shards/imagenet-val-00000{0..2}.tar", cwd=copy)
    assert f"shards/{VAL[1]}: broken after {samples} sample" in line


def test_key_in_two_shards(copy):
    (copy / "shards" / VAL[1]).write_bytes(tar(members(3, 4, 0)))
    check_damage(copy, ["sample 0000000 is also in"], [f"{VAL[1]}: sample 0000000 of class 0 matches no image"])


def test_replaced_and_missing_shards(copy):
    shards = copy / "shards"
    shutil.copy(shards / VAL[0], shards / VAL[1])  # of as many samples
    twice = [f"sample 000000{i} is also in" for i in range(3)]
    others = [f"{VAL[1]}: sample 000000{i} of class 0 matches no image in --data" for i in range(3)]
    check_damage(copy, twice, others)
    os.unlink(shards / VAL[1])
    missing = [f"{VAL[1]}: no such shard"]
    check_faults(copy, missing)
    check_faults(copy, missing, "--data", "none")
    check_faults(copy, [], "--splits", "train")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_place_of_an_image(kind, copy):
    """Training would skip them."""
    link = tarfile.TarInfo("0000004.jpg")
    link.type = kind
    link.linkname = "0000003.jpg"
    (copy / "shards" / VAL[1]).write_bytes(tar([*SECOND[:3], (link, b""), *SECOND[4:]]))
    check_faults(copy, [f"{VAL[1]}: broken after 1 sample (0000004.jpg is a link or another special file"])
    os.unlink(copy / "shards/_info.json")
    assert "0000004.jpg is a link" in error_without_changes("--index", "shards/*.tar", cwd=copy)


def test_changed_images(copy):
    """Files in data/ that have changed, and ones that were added, moved or removed, since the shards were written."""
    data = copy / "data"
    path = data / "val/cat/cat_1.jpg"
    original = path.read_bytes()
    for changed in (flip(original, 700), original + b"x"):
        path.write_bytes(changed)
        check_faults(copy, [f"{VAL[0]}: sample 0000001 differs from ./data/val/cat/cat_1.jpg"])
    check_faults(copy, [], "--splits", "train")
    check_faults(copy, [], "--data", "none")
    path.write_bytes(original)
    other_train = "./data/train: its images are not those of the shards ("
    other_val = "./data/val: its images are not those of the shards ("
    shutil.copy(path, data / "train/dog/dog_9.jpg")
    check_faults(copy, [other_train + "images"])
    os.rename(data / "train/dog/dog_9.jpg", data / "train/cat/cat_9.jpg")
    os.unlink(data / "train/cat/cat_0.jpg")
    check_faults(copy, [other_train + "other files"])
    os.unlink(data / "train/cat/cat_9.jpg")
    os.unlink(data / "val/dog/dog_0.jpg")
    check_faults(copy, [other_train + "images", other_val + "images"])
    check_faults(copy, [other_val + "images"], "--splits", "val")


OTHER_CLASSES = [f"./data/{split}: its images are not those of the shards (classes)" for split in ("train", "val")]


@pytest.mark.parametrize("name", ["eel", "ant"])
def test_renamed_class_folder(name, copy):
    """Whether or not the classes are numbered as before."""
    for split in ("train", "val"):
        os.rename(copy / "data" / split / "dog", copy / "data" / split / name)
    check_faults(copy, OTHER_CLASSES)
    check_faults(copy, [], "--data", "none")


def test_renamed_class_in_the_index(copy):
    edit_index(copy, lambda index, _: index.update(classes=["cat", "eel"]))
    check_faults(copy, OTHER_CLASSES)


def test_wrong_lengths_in_the_index(copy):
    edit_index(copy, lambda _, entry: entry.update(shard_lengths=[3, 2, 3]))
    faults = [f"{VAL[1]}: 3 samples, but 2 in the index", f"{VAL[2]}: 2 samples, but 3 in the index"]
    check_faults(copy, faults, "--data", "none")
    check_faults(copy, [*faults, "./data/val: its images are not those of the shards (shard_lengths)"])


def test_index_without_one_of_the_shards(copy):
    def shorten(_, entry):
        for name in ("filenames", "shard_lengths", "shard_sha256"):
            del entry[name][1]
        entry["num_samples"] -= 3

    edit_index(copy, shorten)
    check_faults(copy, ["./data/val: its images are not those of the shards (shard_lengths)"])


def test_all_faults_are_reported(copy):
    """In both splits: of four shards, with and without digests that fit, and of an image."""
    shards = copy / "shards"
    os.unlink(shards / TRAIN[0])
    (shards / TRAIN[1]).write_bytes(flip((shards / TRAIN[1]).read_bytes(), 2000))
    key = read_tar(shards / TRAIN[1])[1][0].removesuffix(".jpg")
    zero, one, two = (members(n) for n in range(3))
    (shards / VAL[0]).write_bytes(tar([("0000000.cls", b"9"), zero[1], one[1], *two]))

    def hash_again(index, _):
        for entry in index["splits"].values():
            paths = [shards / name for name in entry["filenames"]]
            entry["shard_sha256"] = [p.exists() and hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]

    edit_index(copy, hash_again)
    (shards / VAL[1]).write_bytes((shards / VAL[1]).read_bytes()[:-10240])
    image = copy / "data/val/dog/dog_3.jpg"
    image.write_bytes(flip(image.read_bytes(), 700))
    faults = [
        f"{TRAIN[0]}: no such shard",
        f"{TRAIN[1]}: sample {key} differs from",
        f"{VAL[0]}: sample 0000000 does not hold one image and one valid class",
        f"{VAL[0]}: sample 0000001 does not hold one image and one valid class",
        f"{VAL[1]}: broken after ",
        f"{VAL[2]}: sample 0000007 differs from",
    ]
    check_faults(copy, faults)


def entry(**values):
    """An index with an entry of one shard, changed by these values."""
    one = {"filenames": ["a.tar"], "shard_lengths": [1], "num_samples": 1, **values}
    return json.dumps({"splits": {"train": one}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "\udcff",
        "{}",
        '{"splits": []}',
        '{"splits": {"train": {}}}',
        entry(shard_lengths=[]),
        entry(shard_lengths=["1"]),
        entry(filenames=[5]),
        entry(shard_sha256=["1", "2"]),
        entry(num_samples=2),
        entry(filenames=["a.tar", "a.tar"], shard_lengths=[1, 1], num_samples=2),
    ],
)
def test_invalid_index(text, copy):
    (copy / "shards/_info.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for args in (["--verify", "--splits", "train"], ["--maxcount", 3]):
        assert "_info.json: not an index" in error_without_changes(*args, cwd=copy)


def test_missing_index(copy):
    index = copy / "shards/_info.json"
    index.write_text('{"splits": {}}')
    assert "_info.json there that lists train shards" in error_without_changes("--verify", cwd=copy)
    os.unlink(index)
    assert "no _info.json there" in error_without_changes("--verify", cwd=copy)
    assert "no _info.json there" in error_without_changes("--verify", "--shards", "none", cwd=copy)
    (copy / "shards/.train.json").write_text('{"splits": {}}')
    assert "its train shards are incomplete; run makeshards.py again" in error_without_changes("--verify", cwd=copy)
    index.mkdir()
    assert "Is a directory: './shards/_info.json'" in error_without_changes("--verify", cwd=copy)


def last_line(folder, *args):
    """What --verify advises once it has found something."""
    stdout, _ = run("makeshards.py", "--verify", *args, cwd=folder, status=1)
    return stdout.splitlines()[-1]


def test_advice(copy):
    """Run makeshards.py again to replace damaged shards, but only if it wrote them; other images need other shards."""
    shard = copy / "shards" / VAL[1]
    good = shard.read_bytes()
    shard.write_bytes(flip(good, 700))
    assert re.match("1 problem with the shards: rerun ", last_line(copy))
    stdout, _ = run("makeshards.py", "--maxcount", 3, cwd=copy)
    assert stdout.splitlines()[1] == "val: 3 shards, 8 samples written, 2 of the shards by an earlier run"
    assert shard.read_bytes() == good
    image = copy / "data/val/cat/cat_1.jpg"
    image.write_bytes(image.read_bytes() + b"x")
    assert re.match("1 problem with the images: .* another --shards", last_line(copy))
    os.unlink(copy / "shards/_info.json")
    run("makeshards.py", "--index", "shards/*.tar", cwd=copy)
    shard.write_bytes(flip(good, 700))
    assert last_line(copy) == "1 problem with the shards"


def test_images_are_decoded_only_with_check(copy):
    """Without --check, a truncated JPEG is written as it is, and --verify accepts it."""
    path = copy / "data/val/cat/cat_2.jpg"
    path.write_bytes(path.read_bytes()[:900])
    (copy / "out").mkdir()
    run("makeshards.py", "--shards", "out", "--maxcount", 3, cwd=copy)
    assert dict(read_tar(copy / "out" / VAL[0]))["0000002.jpg"] == path.read_bytes()
    stdout, _ = run("makeshards.py", "--verify", "--shards", "out", cwd=copy)
    assert stdout.count("; images not decoded (see --check)\n") == 2 and stdout.endswith("no problems found\n")
    fault = f"{VAL[0]}: sample 0000002 can't be decoded (image file is truncated"
    check_faults(copy, [fault], "--shards", "out", "--check")
    stdout, _ = run("makeshards.py", "--shards", "out", "--maxcount", 3, "--check", cwd=copy)
    assert stdout.count("already there; these were not checked: use --verify --check\n") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes only on Linux")
def test_file_names_that_are_not_utf8(copy):
    path = copy / "data/val/cat/cat_1\udcff.jpg"
    os.rename(copy / "data/val/cat/cat_1.jpg", path)
    (copy / "out").mkdir()
    run("makeshards.py", "--shards", "out", cwd=copy)
    path.write_bytes(b"other")
    stdout, _ = run("makeshards.py", "--verify", "--shards", "out", cwd=copy, status=1)
    assert r"differs from ./data/val/cat/cat_1\udcff.jpg" in stdout
    assert stdout.splitlines()[-1].startswith("1 problem with the images")


# ---------------------------------------------------------------------------- --check


def test_check_lists_all_bad_images(made, tmp_path):
    """Their split stays out of the index. Once they are fixed, the shards are those of an uninterrupted run."""
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "good").mkdir()
    numbers = []  # of the images in the first two of three training shards
    for name in TRAIN[:2]:
        numbers += [int(member[:-4]) for member, _ in read_tar(made / "shards" / name) if member.endswith(".jpg")]
    classes = ["cat" if n < 4 else "dog" for n in numbers]
    paths = [f"./data/train/{name}/{name}_{n % 4}.jpg" for name, n in zip(classes, numbers, strict=True)]
    data = (tmp_path / paths[0]).read_bytes()
    half = len(data) // 2
    bad_train = {
        paths[0]: (data[:half], "image file is truncated"),
        paths[1]: (data[:half] + b"\xff\xd8" * 50 + data[half + 100 :], "broken data stream"),
        paths[3]: (b"", "empty"),
        paths[4]: (b"GIF is not a JPEG", "not an image"),
    }
    bad_val = {
        "./data/val/cat/cat_2.jpg": (data[:-300], "image file is truncated"),
        "./data/val/dog/dog_3.jpg": (b"\xff\xd8\xff\xe0 and no more", ""),
    }
    for path, (bad, _) in {**bad_train, **bad_val}.items():
        (tmp_path / path).write_bytes(bad)
    command = "makeshards.py", "--shards", "good", "--maxcount", 3, "--check"

    def check_bad(split, bad, shards):
        """stdout, once it has been checked that these images are listed, and only these shards are there."""
        stdout, stderr = run(*command, cwd=tmp_path, status=2)
        *lines, last = stderr.splitlines()
        assert len(lines) == len(bad)
        for path, (_, reason) in bad.items():
            assert any(f"{path}: can't be read as an image ({reason}" in line for line in lines), stderr
        assert last.startswith(f"makeshards.py: --check: {len(bad)} bad {split} images")
        assert {name for name in os.listdir(tmp_path / "good") if name.endswith((".tar", ".tmp"))} == shards
        for path in bad:
            shutil.copy(made / path, tmp_path / path)
        return stdout

    assert check_bad("train", bad_train, {TRAIN[2]}) == ""
    assert "_info.json" not in os.listdir(tmp_path / "good")
    stdout = check_bad("val", bad_val, {*TRAIN, VAL[1]})
    assert stdout.startswith("train: 3 shards, 8 samples written, 1 of the shards by an earlier run; these were not ")
    assert list(json.loads((tmp_path / "good/_info.json").read_text())["splits"]) == ["train"]
    stdout, _ = run(*command, cwd=tmp_path)
    assert stdout.startswith("train: 3 shards, 8 samples already there; these were not checked: ")
    assert content(tmp_path / "good") == content(made / "shards")


# ---------------------------------------------------------------------------- --index

THEIRS = {"train-00.tar": 3, "train-01.tar": 2, "val-00.tar": 2}
BY_SPLIT = {"train": ["train-00.tar", "train-01.tar"], "val": ["val-00.tar"]}


def write_theirs(folder, lengths=THEIRS):
    """Shards of another writer: folders in their keys, images of several formats, and members of other kinds."""
    folder.mkdir()
    number = itertools.count()
    for name, length in lengths.items():
        with wds.TarWriter(str(folder / name)) as shard:
            for i in itertools.islice(number, length):
                sample = {"__key__": f"n0/{i % 2}/{i:05d}", "cls": i % 2, "json": {"n": i}, "txt": "a cat"}
                ending = ("jpeg", "png", "JPG", "webp")[i % 4]
                pixels = np.full((8, 8, 3), i, np.uint8)
                image = wds.writer.imageencoder(pixels, ending.lower())
                shard.write({**sample, "seg.png": b"0", ending: image})
    return folder


@pytest.fixture
def theirs(tmp_path):
    return write_theirs(tmp_path / "theirs")


def check_index(path, folder, splits=BY_SPLIT, lengths=THEIRS):
    """The index has only the splits' names, shards, lengths and digests."""
    expected = {}
    for split, names in splits.items():
        name = {"train": "train", "val": "validation"}[split]
        expected[name] = {
            "name": name,
            "num_samples": sum(lengths[name] for name in names),
            "filenames": names,
            "shard_lengths": [lengths[name] for name in names],
            "shard_sha256": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names],
        }
    assert json.loads(path.read_text()) == {"splits": expected}


@pytest.fixture
def listed(monkeypatch):
    """A function of a split and options: ([url], [length]) that main-wds.py finds."""
    return functools.partial(found_by, monkeypatch)


def test_index_of_local_shards(theirs, listed):
    """Of both splits, told apart by their names. main-wds.py and --verify use it."""
    before = files(theirs)
    stdout, stderr = run("makeshards.py", "--index", "theirs/*.tar", cwd=theirs.parent)
    assert stderr == "" and stdout.splitlines() == [
        "train: 2 shards, 5 samples",
        "val: 1 shard, 2 samples",
        "written to theirs/_info.json",
    ]
    check_index(theirs / "_info.json", theirs)
    index = (theirs / "_info.json").read_bytes()
    after = files(theirs)
    del after["_info.json"]
    assert after == before
    for split, names in BY_SPLIT.items():
        urls = [f"{theirs}/{name}" for name in names]
        assert listed(split, "--shards", theirs) == (urls, [THEIRS[name] for name in names])
    check_faults(theirs.parent, [], "--shards", "theirs")
    shard = theirs / "train-01.tar"
    good = shard.read_bytes()
    with tarfile.open(shard) as opened:
        image = next(member for member in opened if member.size > 100)
    shard.write_bytes(flip(good, image.offset_data + 50))
    check_faults(theirs.parent, ["theirs/train-01.tar: changed since it was written"], "--shards", "theirs")
    shard.write_bytes(good)
    for cwd, patterns in (  # that find the same shards
        (theirs.parent, ["theirs/train-0{0..1}.tar", "./theirs/val-00.tar"]),
        (theirs.parent, [f"{theirs}/{{val-00,train-00,train-01}}.tar"]),
        (theirs, ["{train,val}-*.tar"]),
        (theirs, ["train-0[01].tar::val-00.tar"]),
    ):
        os.unlink(theirs / "_info.json")
        for pattern in patterns:
            run("makeshards.py", "--index", pattern, cwd=cwd)
        assert (theirs / "_info.json").read_bytes() == index, patterns


def test_index_of_shards_whose_names_do_not_tell_the_split(tmp_path):
    """--splits is required, and a split is added to the index if it is not there yet."""
    lengths = {"part-0.tar": 2, "part-1.tar": 1, "train-val.tar": 1}
    theirs = write_theirs(tmp_path / "theirs", lengths)
    for pattern in ("theirs/part-*.tar", "theirs/train-val.tar", "theirs/*.tar"):
        assert "--splits train or --splits val" in error_without_changes("--index", pattern, cwd=tmp_path)
    splits = {}
    for split, names in (("train", ["part-0.tar", "part-1.tar"]), ("val", ["train-val.tar"])):
        splits[split] = names
        args = "--index", "::".join(f"theirs/{name}" for name in names), "--splits", split
        run("makeshards.py", *args, cwd=tmp_path)
        check_index(theirs / "_info.json", theirs, splits, lengths)
        assert f"already lists {split} shards" in error_without_changes(*args, cwd=tmp_path)


def test_index_of_our_own_shards(copy):
    """It replaces a lost index for reading and for --verify, but makeshards.py cannot resume by it."""
    assert "already" in error_without_changes("--index", "shards/*.tar", cwd=copy)
    os.unlink(copy / "shards/_info.json")
    run("makeshards.py", "--index", "shards/*.tar", cwd=copy)
    lengths = dict(zip(TRAIN + VAL, [3, 3, 2] * 2, strict=True))
    check_index(copy / "shards/_info.json", copy / "shards", {"train": TRAIN, "val": VAL}, lengths)
    stdout, _ = run("makeshards.py", "--verify", "--check", cwd=copy)
    assert stdout.splitlines()[-2:] == ["val: 3 shards, 8 samples, compared with the index", "no problems found"]
    assert "its index lists no classes" in error_without_changes("--maxcount", 3, cwd=copy)


@pytest.mark.parametrize("missing", ["0000004.cls", "0000004.jpg"])
def test_index_of_a_shard_with_an_incomplete_sample(missing, copy):
    (copy / "shards" / VAL[1]).write_bytes(tar([(name, data) for name, data in SECOND if name != missing]))
    os.unlink(copy / "shards/_info.json")
    line = error_without_changes("--index", "shards/imagenet-val-*.tar", cwd=copy)
    assert f"shards/{VAL[1]}: sample 0000004" in line


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(compress, copy, listed):
    """--index counts them, main-wds.py reads them, and --verify notices if one is truncated."""
    for name in VAL:
        path = copy / "shards" / name
        path.with_suffix(".tar.gz").write_bytes(compress(path.read_bytes()))
    os.unlink(copy / "shards/_info.json")
    run("makeshards.py", "--index", "shards/imagenet-val-*.tar.gz", cwd=copy)
    urls, lengths = listed("val", "--evaluate", "--shards", copy / "shards")
    assert lengths == [3, 3, 2] and all(url.endswith(".tar.gz") for url in urls)
    main_wds = load("main-wds.py")
    keys = [s["__key__"] for url, n in zip(urls, lengths, strict=True) for s in main_wds.read_shard(url, n, range(n))]
    assert keys == [f"{i:07d}" for i in range(8)]
    path = copy / "shards" / f"{VAL[1]}.gz"
    path.write_bytes(path.read_bytes()[:-3000])
    check_faults(copy, [f"{VAL[1]}.gz: broken after "], "--splits", "val")


def test_wrong_patterns(theirs):
    shutil.copytree(theirs, theirs.parent / "other")
    for pattern, expected in (
        ("theirs/train-{0..1.tar", "theirs/train-{0..1.tar"),
        ("theirs/none-train-*.tar", "theirs/none-train-*.tar"),
        ("theirs/train-0{0..2}.tar", "theirs/train-02.tar"),
        ("nowhere/train-00.tar", "nowhere/train-00.tar"),
        ("theirs/train-00.tar::val-00.tar", "val-00.tar: no shard matches"),
        ("theirs/train-00.tar::other/val-00.tar", "one folder"),
        ("theirs/train-${nothing}.tar", "nothing"),
    ):
        assert expected in error_without_changes("--index", pattern, cwd=theirs.parent)
    unknown = error_without_changes("--index", "nowhere://x/train-0.tar", "--shards", "theirs", cwd=theirs.parent)
    assert "nowhere://x/train-0.tar: " in unknown
    (theirs / "_info.json").write_text("[]")
    assert "not an index" in error_without_changes("--index", "theirs/*.tar", cwd=theirs.parent)


@pytest.fixture
def served(theirs, server):
    """The URL at which a server on this machine serves `theirs`; connections for cut/train-00.tar break at its end."""
    server.folder = theirs
    server.faults = {"/cut/train-00.tar": [("long", 10240)] * 9}
    return server.url


def test_index_of_remote_shards(served, theirs, listed):
    """It is written to --shards. main-wds.py finds it there or, once it has been copied, beside the shards."""
    cwd = theirs.parent
    line = error_without_changes("--index", f"{served}/train-00.tar", cwd=cwd)
    assert "mkdir ./shards" in line
    (cwd / "shards").mkdir()
    stdout, stderr = run("makeshards.py", "--index", f"{served}/{{train-00,train-01,val-00}}.tar", cwd=cwd)
    assert stdout.splitlines()[-1] == "written to ./shards/_info.json" and stderr == ""
    assert os.listdir(cwd / "shards") == ["_info.json"] and "_info.json" not in os.listdir(theirs)
    check_index(cwd / "shards/_info.json", theirs)
    shutil.copy(cwd / "shards/_info.json", theirs)
    assert listed("train", "--shards", served) == ([f"{served}/train-00.tar", f"{served}/train-01.tar"], [3, 2])
    index = cwd / "shards/_info.json"
    assert listed("val", "--shards", served, "--index", index) == ([f"{served}/val-00.tar"], [2])
    check_faults(cwd, [], "--shards", "theirs")
    (cwd / "other").mkdir()
    run("makeshards.py", "--index", f"{served}/val-00.tar", "--shards", "other", cwd=cwd)
    check_index(cwd / "other/_info.json", theirs, {"val": ["val-00.tar"]})


def test_index_of_broken_remote_shards(served, theirs):
    """A missing shard, a connection that breaks after the last sample, and a truncated shard."""
    cwd = theirs.parent
    (cwd / "shards").mkdir()
    line = error_without_changes("--index", f"{served}/train-0{{0..2}}.tar", cwd=cwd)
    assert "train-02.tar: broken after 0 samples (HTTP Error 404: " in line
    assert "cut/train-00.tar: broken" in error_without_changes("--index", f"{served}/cut/train-00.tar", cwd=cwd)
    shard = theirs / "train-01.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    assert "train-01.tar: broken" in error_without_changes("--index", f"{served}/train-0{{0..1}}.tar", cwd=cwd)


def test_index_that_cannot_be_written(theirs, start):
    """The error names its path. A file size limit stands in for a full disk."""
    limited = start("--index", theirs / "*.tar", script="tests/interrupt_writing.py", env={"FILE_SIZE": 400})
    _, (line,) = limited.finish(2, lines=1)
    assert line == f"makeshards.py: {theirs}/_info.json: can't be written (File too large)"
    assert "_info.json" not in os.listdir(theirs)
