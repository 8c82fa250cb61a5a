"""makeshards.py --verify, --check and --index: each fault is named, and nothing else is said or changed."""

import bz2
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset as wds
from conftest import ROOT, error_of, load, run, run_command
from PIL import Image
from test_shards import found_by

makeshards = load("makeshards.py")
OTHER = ["--resize", 20, "--filekey", "--seed", 5, "--maxcount", 5]
TRAIN = [f"imagenet-train-{i:06d}.tar" for i in range(3)]
VAL = [f"imagenet-val-{i:06d}.tar" for i in range(3)]  # of samples 0 1 2, 3 4 5 and 6 7; 0 to 3 are of class 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """data/ with two classes of four images a split, their shards in shards/ and, otherwise written, in other/."""
    folder = tmp_path_factory.mktemp("made")
    for i, (split, name, n) in enumerate(itertools.product(("train", "val"), ("cat", "dog"), range(4))):
        (folder / "data" / split / name).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / "data" / split / name / f"{name}_{n}.jpg", quality=90)
    for shards in ("shards", "other"):
        (folder / shards).mkdir()
    run("makeshards.py", "--shards", "shards", "--maxcount", 3, cwd=folder)
    run("makeshards.py", "--shards", "other", *OTHER, cwd=folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of data/ and shards/, to be spoilt."""
    for name in ("data", "shards"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def files(folder):
    """{path: (bytes, time)} of all that is in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def call(monkeypatch, capsys):
    """As conftest's run() of makeshards.py, but in this process, which has torchvision; status None is any."""
    monkeypatch.setattr(makeshards, "ProcessPoolExecutor", lambda workers, initializer: ThreadPoolExecutor(workers))
    monkeypatch.setattr(makeshards, "lock", lambda folder: None)  # which lasts as long as the process

    def call(script, *args, cwd, status=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.simplefilter("error")
            makeshards.main()
        stdout, stderr = capsys.readouterr()
        assert status in (None, end.value.code or 0), f"status {end.value.code}\n{stdout}\n{stderr}"
        return stdout, stderr

    return call


def refusal(call, *args, cwd):
    """The line with which main() refuses; nothing is changed on disk."""
    before = files(cwd)
    _, stderr = call("makeshards.py", *args, cwd=cwd, status=2)
    assert re.fullmatch("makeshards.py: .+\n", stderr) and before == files(cwd), stderr
    return stderr


def check_faults(call, folder, expected, *args):
    """--verify lists as many faults as are expected, each with one of these texts, and changes nothing on disk."""
    before = files(folder)
    stdout, stderr = call("makeshards.py", "--verify", *args, cwd=folder, status=1 if expected else 0)
    lines = [line for line in stdout.splitlines() if not re.match(r"(train|val): \d+ shards?, ", line)]
    summary = [line for line in lines if re.match(r"\d+ problems? |no problems found", line)]
    left = [line for line in lines if line not in summary]
    for text in expected:
        found = [line for line in left if text in line]
        assert found, f"{text}\nis not in\n{stdout}"
        left.remove(found[0])
    assert not left and stderr == "" and before == files(folder), stdout
    assert sum(int(line.split()[0]) for line in summary if line[0] != "n") == len(expected), stdout


# ---------------------------------------------------------------------------- --verify


def test_good_shards_are_good(made, call, tmp_path):
    """As they are typed, with the folders and without them; options of the run that wrote them aren't needed."""
    before = files(made)
    stdout, stderr = run("makeshards.py", "--verify", cwd=made)
    assert stderr == "" and stdout.splitlines() == [
        "train: 3 shards, 8 samples, compared with the index and ./data; images not decoded (see --check)",
        "val: 3 shards, 8 samples, compared with the index and ./data; images not decoded (see --check)",
        "no problems found",
    ]
    stdout, _ = call("makeshards.py", "--verify", "--shards", "other", "--check", cwd=made)
    assert stdout.splitlines()[0] == "train: 2 shards, 8 samples, compared with the index and ./data"
    assert before == files(made)
    shutil.copytree(made / "shards", tmp_path / "shards")
    stdout, _ = call("makeshards.py", "--verify", "--check", "--splits", "val", "--workers", 1, cwd=tmp_path)
    assert stdout.splitlines() == ["val: 3 shards, 8 samples, compared with the index", "no problems found"]
    for args in ([], ["--shards", made / "other"], ["--data", made / "data"]):
        check_faults(call, tmp_path, [], *args)


def read_tar(path):
    with tarfile.open(path) as shard:
        return [(member.name, shard.extractfile(member).read()) for member in shard]


def tar(members):
    """The bytes of a tar of [(name, bytes)] without padding after its end mark."""
    blocks = []
    for name, data in members:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        blocks += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(blocks) + bytes(1024)


def edit_index(folder, change):
    """Let change(index, its entry of the validation split) change the index."""
    path = folder / "shards/_info.json"
    index = json.loads(path.read_text())
    change(index, index["splits"]["validation"])
    path.write_text(json.dumps(index))


def hash_again(index, _, folder):
    """Make the digests those of the shards, so that it isn't they that tell of a fault."""
    for entry in index["splits"].values():
        paths = [folder / "shards" / name for name in entry["filenames"]]
        entry["shard_sha256"] = [p.exists() and hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def labelled(members, label):
    return [(members[0][0], label), *members[1:]]


THIRD = "sample 0000003 does not hold one image and one valid class"
# of the second shard, whose members are 3.cls 3.jpg 4.cls 4.jpg 5.cls 5.jpg:
# name: (its members then, [faults that the shards alone show], [faults that only the folder shows])
MEMBERS = {
    "byte of an image": (lambda m: [*m[:3], (m[3][0], flip(m[3][1], 700)), *m[4:]], [],
                         ["sample 0000004 does not hold the bytes of ./data/val/dog/dog_0.jpg"]),
    "wrong class": (lambda m: labelled(m, b"1"), [], ["sample 0000003 of class 1 is not one of the images"]),
    "class out of range": (lambda m: labelled(m, b"2"), [THIRD], []),
    "negative class": (lambda m: labelled(m, b"-1"), [THIRD], []),
    "class in words": (lambda m: labelled(m, b"cat"), [THIRD], []),
    "empty class": (lambda m: labelled(m, b""), [THIRD], []),
    "no class": (lambda m: m[1:], [THIRD], []),
    "no image": (lambda m: m[:1] + m[2:], [THIRD], []),
    "two images": (lambda m: [m[0], ("0000003.png", m[1][1]), *m[1:]], [THIRD], []),
    "sample gone": (lambda m: m[:2] + m[4:], ["2 samples, but 3 by the index"], []),
    "one more sample": (lambda m: [*m, ("6.cls", b"0"), ("6.jpg", b"")], ["4 samples, but 3"], ["sample 6 of class"]),
    "another key": (lambda m: [("7.cls", b"0"), ("7.jpg", m[1][1]), *m[2:]], [], ["sample 7 of class 0 is not one"]),
    "key twice in a row": (lambda m: m[:2] + m[:2] + m[4:], [THIRD, "2 samples, but 3 by the index"], []),
    "key twice": (lambda m: m[:4] + m[:2], ["sample 0000003"], []),
}  # fmt: skip


def check_damage(call, folder, alone, with_folder):
    """With the digests that were written, with none and with new ones, each without the folder and with it."""
    digest = ["imagenet-val-000001.tar: not the bytes that were written"]  # of a shard of which nothing else is known
    check_faults(call, folder, alone or digest, "--data", "none")
    check_faults(call, folder, [*alone, *with_folder] or digest)
    for change in (lambda _, entry: entry.update(shard_sha256=[None] * 3), lambda *args: hash_again(*args, folder)):
        edit_index(folder, change)
        check_faults(call, folder, alone, "--data", "none", "--splits", "val")
        check_faults(call, folder, [*alone, *with_folder])


@pytest.mark.parametrize("case", MEMBERS)
def test_damaged_samples(case, copy, call):
    shard = copy / "shards" / VAL[1]
    change, *faults = MEMBERS[case]
    shard.write_bytes(tar(change(read_tar(shard))))
    check_damage(call, copy, *[[f"{VAL[1]}: {text}" for text in texts] for texts in faults])


def ends(members):
    """Where each member begins, and where the last one ends."""
    return list(itertools.accumulate((512 + len(data) + -len(data) % 512 for _, data in members), initial=0))


# name: (the shard's bytes, of its bytes and ends(), [faults that the shards alone show])
BYTES = {
    "empty": (lambda data, _: b"", ["broken after 0 samples"]),
    "cut off in a member": (lambda data, at: data[: at[3] + 900], ["broken after 1 sample ("]),
    "cut off in a header": (lambda data, at: data[: at[2] + 100], ["broken after 0 samples ("]),
    "cut off in a sample": (lambda data, at: data[: at[3]], ["broken after 1 sample ("]),
    "cut off after a sample": (lambda data, at: data[: at[4]], ["broken after 1 sample ("]),
    "no end mark": (lambda data, at: data[: at[-1]], ["broken after 2 samples"]),
    "half an end mark": (lambda data, at: data[: at[-1] + 512], ["broken after 2 samples"]),
    "something at its end": (lambda data, at: data + b"x", ["broken after 2 samples"]),
    "byte of a header": (lambda data, at: flip(data, at[2] + 5), ["broken after 0 samples ("]),
    "no tar": (lambda data, at: b"x" * len(data), ["broken after 0 samples"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes(case, copy, call):
    shard = copy / "shards" / VAL[1]
    change, faults = BYTES[case]
    shard.write_bytes(change(shard.read_bytes(), ends(read_tar(shard))))
    check_damage(call, copy, [f"{VAL[1]}: {text}" for text in faults], [])


def test_a_key_in_two_shards(copy, call):
    shards = copy / "shards"
    (shards / VAL[1]).write_bytes(tar([*read_tar(shards / VAL[1])[:4], *read_tar(shards / VAL[0])[:2]]))
    check_damage(
        call, copy, ["sample 0000000 is also in"], [f"{VAL[1]}: sample 0000000 of class 0 is not one of the images"]
    )


def test_missing_and_replaced_shards(copy, call):
    shards = copy / "shards"
    shutil.copy(shards / VAL[0], shards / VAL[1])  # of as many samples
    twice = [f"sample 000000{i} is also in" for i in range(3)]
    strays = [f"{VAL[1]}: sample 000000{i} of class 0 is not one of the images" for i in range(3)]
    check_damage(call, copy, twice, strays)
    os.unlink(shards / VAL[1])
    faults = [f"{VAL[1]}: no such shard"]
    check_faults(call, copy, faults)
    check_faults(call, copy, faults, "--data", "none")
    check_faults(call, copy, [], "--splits", "train")


def test_other_folders(copy, call):
    """Files that aren't those of the shards: changed, new, gone and renamed ones, and classes."""
    data = copy / "data"
    path = data / "val/cat/cat_1.jpg"
    before = path.read_bytes()
    path.write_bytes(flip(before, 700))
    check_faults(call, copy, [f"{VAL[0]}: sample 0000001 does not hold the bytes of ./data/val/cat/cat_1.jpg"])
    check_faults(call, copy, [], "--splits", "train")
    check_faults(call, copy, [], "--data", "none")
    path.write_bytes(before + b"x")
    check_faults(call, copy, [f"{VAL[0]}: sample 0000001 does not hold the bytes of ./data/val/cat/cat_1.jpg"])
    path.write_bytes(before)
    other = "./data/{}: its images are not those of the shards (".format
    shutil.copy(path, data / "train/dog/dog_9.jpg")
    check_faults(call, copy, [other("train") + "images"])
    os.rename(data / "train/dog/dog_9.jpg", data / "train/cat/cat_9.jpg")
    os.unlink(data / "train/cat/cat_0.jpg")
    check_faults(call, copy, [other("train") + "other files"])
    os.unlink(data / "train/cat/cat_9.jpg")
    os.unlink(data / "val/dog/dog_0.jpg")
    check_faults(call, copy, [other("train") + "images", other("val") + "images"])
    check_faults(call, copy, [other("val") + "images"], "--splits", "val")


def test_renamed_classes(copy, call):
    """In the folders, with the order kept or not; and in the index, which then tells readers wrong names."""
    for split in ("train", "val"):
        os.rename(copy / "data" / split / "dog", copy / "data" / split / "eel")
    other = "./data/{}: its images are not those of the shards (classes)".format
    check_faults(call, copy, [other("train"), other("val")])
    for split in ("train", "val"):
        os.rename(copy / "data" / split / "eel", copy / "data" / split / "ant")
    check_faults(call, copy, [other("train"), other("val")])
    check_faults(call, copy, [], "--data", "none")


def test_renamed_classes_in_the_index(copy, call):

    edit_index(copy, lambda index, _: index.update(classes=["cat", "eel"]))
    check_faults(
        call, copy, ["./data/train: its images are not those of the shards (classes)", "./data/val: its images"]
    )


def test_wrong_counts_in_the_index(copy, call):
    edit_index(copy, lambda _, entry: entry.update(shard_lengths=[3, 2, 3]))
    faults = [f"{VAL[1]}: 3 samples, but 2 by the index", f"{VAL[2]}: 2 samples, but 3 by the index"]
    check_faults(call, copy, faults, "--data", "none")
    check_faults(call, copy, [*faults, "./data/val: its images are not those of the shards (shard_lengths)"])


@pytest.mark.parametrize("lengths, total", [([3, 3, 2], 9), ([3, 4, 2], 8)])
def test_an_index_that_contradicts_itself(lengths, total, copy, call):
    edit_index(copy, lambda _, entry: entry.update(shard_lengths=lengths, num_samples=total))
    for args in (["--verify"], ["--verify", "--data", "none"], ["--maxcount", 3]):
        message = refusal(call, *args, cwd=copy)
        assert "filenames, shard_lengths and num_samples do not agree" in message


def test_a_shard_less_in_the_index(copy, call):
    def shorten(_, entry):
        for name in ("filenames", "shard_lengths", "shard_sha256"):
            del entry[name][1]
        entry["num_samples"] -= 3

    edit_index(copy, shorten)
    check_faults(call, copy, ["./data/val: its images are not those of the shards (shard_lengths)"])


def test_all_faults_at_once(copy):
    """As it is typed: in both splits, of five shards and of the folder."""
    shards = copy / "shards"
    os.unlink(shards / TRAIN[0])
    (shards / TRAIN[1]).write_bytes(flip((shards / TRAIN[1]).read_bytes(), 3000))
    key = read_tar(shards / TRAIN[1])[1][0].removesuffix(".jpg")
    members = read_tar(shards / VAL[0])
    (shards / VAL[0]).write_bytes(tar([("0000000.cls", b"9"), members[1], *members[3:]]))
    edit_index(copy, lambda *args: hash_again(*args, copy))
    (shards / VAL[1]).write_bytes((shards / VAL[1]).read_bytes()[:-10240])
    image = copy / "data/val/dog/dog_3.jpg"
    image.write_bytes(flip(image.read_bytes(), 700))
    faults = [
        f"{TRAIN[0]}: no such shard",
        f"{TRAIN[1]}: sample {key} does not hold the bytes of",
        f"{VAL[0]}: sample 0000000 does not hold one image and one valid class",
        f"{VAL[0]}: sample 0000001 does not hold one image and one valid class",
        f"{VAL[1]}: broken after ",
        f"{VAL[2]}: sample 0000007 does not hold the bytes of",
    ]
    check_faults(functools.partial(run, typed=True), copy, faults)


NO_INDEX = ["", "{", "no JSON", "null", "5", "[]", '[{"splits": {}}]', "{}", '{"classes": []}', '{"splits": []}',
            "\udcff", '{"splits": {"train": {}, "validation": {}}}', '{"splits": {"train": {"filenames": ["a"]}}}',
            '{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}',
            '{"splits": {"train": {"filenames": [5], "shard_lengths": [1]}}}',
            '{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": ["1"]}}}',
            '{"splits": {"train": {"filenames": ["a", "b"], "shard_lengths": [1, 1], "shard_sha256": ["1"]}}}',
            '{"filenames": ["a.tar"], "shard_lengths": [1]}']  # fmt: skip


@pytest.mark.parametrize("text", NO_INDEX)
def test_no_index_but_something_else(text, copy, call):
    """Status 2 and a line that names it, whatever is in its place."""
    (copy / "shards/_info.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "_info.json: not an index" in refusal(call, "--verify", "--splits", "train", cwd=copy)


def test_a_folder_for_an_index(copy, call):
    (copy / "shards/_info.json").unlink()
    (copy / "shards/_info.json").mkdir()
    assert "[Errno 21] Is a directory: './shards/_info.json'" in refusal(call, "--verify", cwd=copy)


def test_no_index(copy, call):
    (copy / "shards/_info.json").write_text('{"splits": {}}')
    assert "_info.json there that names train shards" in refusal(call, "--verify", cwd=copy)
    os.unlink(copy / "shards/_info.json")
    assert "no _info.json there" in error_of("makeshards.py", "--verify", cwd=copy)
    (copy / "shards/.train.json").write_text('{"splits": {}}')
    assert "its train shards are unfinished; run makeshards.py again" in refusal(call, "--verify", cwd=copy)
    assert "no _info.json there" in refusal(call, "--verify", "--shards", "none", cwd=copy)


def advice(call, folder, *args):
    """The last line of --verify, which has found something."""
    stdout, _ = call("makeshards.py", "--verify", *args, cwd=folder, status=1)
    return stdout.splitlines()[-1]


def test_the_advice(copy, call):
    """Damaged shards are replaced by the same command; other images need another folder; others' shards neither."""
    shard = copy / "shards" / VAL[1]
    good = shard.read_bytes()
    shard.write_bytes(flip(good, 700))
    rewrite = "1 problem of the shards: run the command that wrote the shards again to replace them"
    assert advice(call, copy) == rewrite
    stdout, _ = call("makeshards.py", "--maxcount", 3, cwd=copy)
    assert stdout.splitlines()[1] == "val: 3 shards, 8 samples written, 2 of the shards earlier"
    assert shard.read_bytes() == good
    image = copy / "data/val/cat/cat_1.jpg"
    image.write_bytes(image.read_bytes() + b"x")
    assert advice(call, copy) == "1 problem with the images: fix them, then write them to another --shards"
    os.unlink(copy / "shards/_info.json")
    call("makeshards.py", "--index", "shards/*.tar", cwd=copy)
    shard.write_bytes(flip(good, 700))
    assert advice(call, copy) == "1 problem of the shards"


def test_images_are_decoded_if_asked_for(copy, call):
    """A JPEG cut off in the middle, which was written as it was."""
    path = copy / "data/val/cat/cat_2.jpg"
    path.write_bytes(path.read_bytes()[:900])
    (copy / "out").mkdir()
    call("makeshards.py", "--shards", "out", "--maxcount", 3, cwd=copy)
    stdout, _ = call("makeshards.py", "--verify", "--shards", "out", cwd=copy)
    assert stdout.count("; images not decoded (see --check)\n") == 2 and stdout.endswith("no problems found\n")
    fault = f"{VAL[0]}: sample 0000002 can't be decoded (image file is truncated"
    check_faults(call, copy, [fault], "--shards", "out", "--check")
    stdout, _ = call("makeshards.py", "--shards", "out", "--maxcount", 3, "--check", cwd=copy)
    assert stdout.count("already there, those not checked: use --verify --check\n") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names there are bytes")
def test_names_that_are_not_utf8(copy, call):
    """Don't end the report."""
    path = copy / "data/val/cat/cat_1.jpg"
    os.rename(path, path.with_name("cat_1\udcff.jpg"))
    (copy / "out").mkdir()
    call("makeshards.py", "--shards", "out", cwd=copy)
    path.with_name("cat_1\udcff.jpg").write_bytes(b"other")
    stdout, _ = run("makeshards.py", "--verify", "--shards", "out", cwd=copy, status=1, typed=True)
    assert r"does not hold the bytes of ./data/val/cat/cat_1\udcff.jpg" in stdout
    assert stdout.splitlines()[-1].startswith("1 problem with the images")


def special(kind):
    member = tarfile.TarInfo("0000004.jpg")
    member.type = kind
    member.linkname = "0000003.jpg"
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_under_the_name_of_a_sample(kind, copy, call):
    """Readers skip them, and so would lose the sample."""
    shard = copy / "shards" / VAL[1]
    members = read_tar(shard)
    shard.write_bytes(tar(members[:3])[:-1024] + special(kind) + tar(members[4:]))
    check_faults(call, copy, [f"{VAL[1]}: broken after 1 sample (0000004.jpg is a link or another special file"])
    os.unlink(copy / "shards/_info.json")
    assert "0000004.jpg is a link" in refusal(call, "--index", "shards/*.tar", cwd=copy)


def test_two_tars_in_one_file(copy, call):
    shard = copy / "shards" / VAL[1]
    shard.write_bytes(2 * shard.read_bytes())
    check_faults(call, copy, [f"{VAL[1]}: broken after 2 samples (damaged, or more than one tar)"])


def test_checksums_in_full_width(copy, call):
    """Seven digits and a zero byte, as other languages' writers have them; Python writes six, a zero and a space."""
    shard = copy / "shards" / VAL[1]
    data = bytearray(shard.read_bytes())
    for place in ends(read_tar(shard))[:-1]:
        data[place + 148 : place + 156] = b"0" + data[place + 148 : place + 154] + b"\0"
    shard.write_bytes(data)
    os.unlink(copy / "shards/_info.json")
    call("makeshards.py", "--index", "shards/*.tar", cwd=copy)
    assert json.loads((copy / "shards/_info.json").read_text())["splits"]["validation"]["shard_lengths"] == [3, 3, 2]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(compress, copy, call, listed):
    """They are counted like others, and main-wds.py reads them; a cut is found."""
    for name in VAL:
        path = copy / "shards" / name
        path.with_suffix(".tar.gz").write_bytes(compress(path.read_bytes()))
    os.unlink(copy / "shards/_info.json")
    call("makeshards.py", "--index", "shards/imagenet-val-*.tar.gz", cwd=copy)
    urls, lengths = listed("val", "--evaluate", "--shards", copy / "shards")
    assert lengths == [3, 3, 2] and all(url.endswith(".tar.gz") for url in urls)
    main_wds = load("main-wds.py")
    keys = [s["__key__"] for url, n in zip(urls, lengths, strict=True) for s in main_wds.read_shard(url, n, 0, n)]
    assert keys == [f"{i:07d}" for i in range(8)]
    path = copy / "shards" / f"{VAL[1]}.gz"
    path.write_bytes(path.read_bytes()[:-3000])
    check_faults(call, copy, [f"{VAL[1]}.gz: broken after "], "--splits", "val")


# ---------------------------------------------------------------------------- --check


def test_check_lists_all_bad_images(made, tmp_path):
    """Those of a split, with path and reason, and the split stays out of the index; after mending, a clean run's."""
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "good").mkdir()
    keys = [name[:-4] for i in (0, 1) for name, _ in read_tar(made / "shards" / TRAIN[i]) if name.endswith("jpg")]
    names = [(("cat", "dog")[int(key) // 4], int(key) % 4) for key in keys]
    train = [f"./data/train/{name}/{name}_{n}.jpg" for name, n in names]  # of the first two shards of three
    val = ["./data/val/cat/cat_2.jpg", "./data/val/dog/dog_3.jpg"]
    original = (tmp_path / train[0]).read_bytes()
    half = len(original) // 2
    bad = {
        train[0]: (original[:half], "image file is truncated"),
        train[1]: (original[:half] + b"\xff\xd8" * 50 + original[half + 100 :], "broken data stream"),
        train[3]: (b"", "empty"),
        train[4]: (b"GIF is not a JPEG", "not an image"),
        val[0]: (original[:-300], "image file is truncated"),
        val[1]: (b"\xff\xd8\xff\xe0 and no more", ""),
    }
    for path, (data, _) in bad.items():
        (tmp_path / path).write_bytes(data)
    args = "makeshards.py", "--shards", "good", "--maxcount", 3, "--check"
    for split, paths in (("train", [train[i] for i in (0, 1, 3, 4)]), ("val", val)):
        stdout, stderr = run(*args, cwd=tmp_path, status=2)
        *lines, last = stderr.splitlines()
        expected = [f"{path}: can't be read as an image ({bad[path][1]}" for path in paths]
        assert len(lines) == len(expected)
        assert all(any(text in line for line in lines) for text in expected), stderr
        assert last.startswith(f"makeshards.py: --check: {len(paths)} bad {split} images, listed above; fix")
        there = content(tmp_path / "good")
        if split == "train":
            assert "_info.json" not in there and stdout == ""
        else:
            assert list(json.loads(there["_info.json"])["splits"]) == ["train"]
            unchecked = "1 of the shards earlier, those not checked: use --verify --check"
            assert stdout == f"train: 3 shards, 8 samples written, {unchecked}\n"
        bad_ones = {*TRAIN[:2], *VAL} if split == "train" else {VAL[0], VAL[2]}
        assert {name for name in there if name.endswith((".tar", ".tmp"))} == {*TRAIN, *VAL} - bad_ones
        for path in paths:
            shutil.copy(made / path, tmp_path / path)
    stdout, _ = run(*args, cwd=tmp_path)
    assert stdout.startswith("train: 3 shards, 8 samples already there, those not checked: use --verify --check\n")
    assert content(tmp_path / "good") == content(made / "shards")


def test_without_check_images_are_not_decoded(copy, call):
    """A JPEG that is cut off, or broken in the middle, is written as it is; training reads what there is of it."""
    path = copy / "data/val/cat/cat_2.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (copy / "out").mkdir()
    call("makeshards.py", "--shards", "out", cwd=copy)
    assert dict(read_tar(copy / "out" / VAL[0]))["0000002.jpg"] == data[: len(data) // 2]


def test_check_changes_no_byte(made, tmp_path):
    """Nor with --resize, which scales the images that --check has decoded as those that it has not."""
    run("makeshards.py", "--data", made / "data", "--shards", tmp_path, "--check", *OTHER, cwd=tmp_path)
    assert content(tmp_path) == content(made / "other")


# ---------------------------------------------------------------------------- --index

THEIRS = {"train-00.tar": 3, "train-01.tar": 2, "val-00.tar": 2}
BY_SPLIT = {"train": ["train-00.tar", "train-01.tar"], "val": ["val-00.tar"]}


def write_theirs(folder, names=THEIRS):
    """Shards as others write them: by TarWriter, keys with folders, other endings of images, and other members."""
    folder.mkdir()
    number = itertools.count()
    for name, count in names.items():
        with wds.TarWriter(str(folder / name)) as shard:
            for i in itertools.islice(number, count):
                ending = ("jpeg", "png", "JPG", "webp")[i % 4]
                pixels = np.full((8, 8, 3), i, np.uint8)
                sample = {
                    "__key__": f"n0/{i % 2}/{i:05d}",
                    "cls": i % 2,
                    "json": {"n": i},
                    "txt": "a cat",
                    "seg.png": b"0",
                }
                shard.write({**sample, ending: wds.writer.imageencoder(pixels, ending.lower())})
    return folder


@pytest.fixture
def theirs(tmp_path):
    return write_theirs(tmp_path / "theirs")


def check_index(path, folder, splits=BY_SPLIT, counts=THEIRS):
    """The index is one of these splits, with their shards' counts, digests and nothing else."""
    index = json.loads(path.read_text())
    assert list(index) == ["splits"] and list(index["splits"]) == [makeshards.INDEX_NAMES[split] for split in splits]
    for split, names in splits.items():
        assert index["splits"][makeshards.INDEX_NAMES[split]] == {
            "name": makeshards.INDEX_NAMES[split],
            "num_samples": sum(counts[name] for name in names),
            "filenames": names,
            "shard_lengths": [counts[name] for name in names],
            "shard_sha256": [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names],
        }


@pytest.fixture
def listed(monkeypatch):
    """([url], [length]) that main-wds.py finds for a split by a command line."""
    return functools.partial(found_by, monkeypatch)


def test_index_of_local_shards(theirs, call, listed):
    """Of both splits at once, by their names; main-wds.py reads by it, and --verify finds them good."""
    before = files(theirs)
    stdout, stderr = run("makeshards.py", "--index", "theirs/*.tar", cwd=theirs.parent, typed=True)
    assert stderr == "" and stdout.splitlines() == [
        "train: 2 shards, 5 samples",
        "val: 1 shard, 2 samples",
        "written to theirs/_info.json",
    ]
    check_index(theirs / "_info.json", theirs)
    index = files(theirs).pop("_info.json")[0]
    assert {**before, "_info.json": 0} == {**files(theirs), "_info.json": 0}
    for split, names in BY_SPLIT.items():
        urls = [f"{theirs}/{name}" for name in names]
        assert listed(split, "--shards", theirs) == (urls, [THEIRS[name] for name in names])
    assert listed("train", "--trainshards", f"{theirs}/train-*.tar")[1] == [3, 2]
    check_faults(call, theirs.parent, [], "--shards", "theirs")
    shard = theirs / "train-01.tar"
    good = shard.read_bytes()
    with tarfile.open(shard) as opened:
        place = next(member.offset_data for member in opened if member.size > 100)
    shard.write_bytes(flip(good, place + 50))
    check_faults(call, theirs.parent, ["theirs/train-01.tar: not the bytes"], "--shards", "theirs")
    shard.write_bytes(good)
    for cwd, patterns in (  # and it is the same index by any pattern
        (theirs.parent, ["theirs/train-0{0..1}.tar", "./theirs/val-00.tar"]),
        (theirs.parent, [f"{theirs}/{{val-00,train-00,train-01}}.tar"]),
        (theirs, ["{train,val}-*.tar"]),
        (theirs, ["train-0[01].tar::val-00.tar"]),
    ):
        os.unlink(theirs / "_info.json")
        for pattern in patterns:
            call("makeshards.py", "--index", pattern, cwd=cwd)
        assert (theirs / "_info.json").read_bytes() == index, patterns


def test_index_of_a_split_that_names_do_not_tell(call, tmp_path):
    counts = {"part-0.tar": 2, "part-1.tar": 1, "train-val.tar": 1}
    theirs = write_theirs(tmp_path / "theirs", counts)
    for pattern in ("theirs/part-*.tar", "theirs/train-val.tar", "theirs/*.tar"):
        assert "--splits train or --splits val" in refusal(call, "--index", pattern, cwd=tmp_path)
    call("makeshards.py", "--index", "theirs/part-*.tar", "--splits", "train", cwd=tmp_path)
    check_index(theirs / "_info.json", theirs, {"train": ["part-0.tar", "part-1.tar"]}, counts)
    assert "names train shards already" in refusal(call, "--index", "theirs/*.tar", "--splits", "train", cwd=tmp_path)
    call("makeshards.py", "--index", "theirs/train-val.tar", "--splits", "val", cwd=tmp_path)  # goes beside the other
    both = {"train": ["part-0.tar", "part-1.tar"], "val": ["train-val.tar"]}
    check_index(theirs / "_info.json", theirs, both, counts)
    assert "already" in refusal(call, "--index", "theirs/train-val.tar", "--splits", "val", cwd=tmp_path)


def test_index_of_our_own_shards(copy, call):
    """Without a plan --verify compares with the index alone; and what makeshards.py wrote isn't taken for its own."""
    assert "already" in refusal(call, "--index", "shards/*.tar", cwd=copy)
    os.unlink(copy / "shards/_info.json")
    call("makeshards.py", "--index", "shards/*.tar", cwd=copy)
    check_index(copy / "shards/_info.json", copy / "shards", {"train": TRAIN, "val": VAL},
                dict(zip(TRAIN + VAL, [3, 3, 2] * 2, strict=True)))  # fmt: skip
    stdout, _ = call("makeshards.py", "--verify", "--check", cwd=copy)
    assert stdout.splitlines()[-2:] == ["val: 3 shards, 8 samples, compared with the index", "no problems found"]
    assert "its index names no classes" in refusal(call, "--maxcount", 3, cwd=copy)


BAD = {  # name: (the shard's bytes, or its members; [what the line says])
    "empty": b"",
    "text": b"<html>404</html>",
    "cut off": lambda data, at: data[: at[-2] + 700],
    "cut off between samples": lambda data, at: data[: at[2]],
    "no end mark": lambda data, at: data[: at[-1]],
    "byte of a header": lambda data, at: flip(data, at[2] + 5),
}


@pytest.mark.parametrize("case", [*BAD, "no class", "no image", "missing"])
def test_index_of_a_broken_shard(case, copy, call):
    """One line that names the shard, and no index."""
    shard = copy / "shards" / VAL[1]
    data, members = shard.read_bytes(), read_tar(shard)
    if case == "missing":
        os.unlink(shard)
    elif case == "no class":
        shard.write_bytes(tar(members[:2] + members[3:]))
    elif case == "no image":
        shard.write_bytes(tar(members[:3] + members[4:]))
    else:
        shard.write_bytes(BAD[case](data, ends(members)) if callable(BAD[case]) else BAD[case])
    os.unlink(copy / "shards/_info.json")
    line = refusal(call, "--index", "shards/imagenet-val-00000{0..2}.tar", cwd=copy)
    assert f"shards/{VAL[1]}: " in line and ("sample 0000004" in line) == (case in ("no class", "no image"))


def test_an_unknown_scheme(theirs, call):
    error = refusal(call, "--index", "nowhere://theirs/train-0.tar", "--shards", "theirs", cwd=theirs.parent)
    assert "no gopen handler" in error


def test_wrong_patterns(theirs, call):
    shutil.copytree(theirs, theirs.parent / "other")
    for pattern, expected in (
        ("theirs/train-{0..1.tar", "theirs/train-{0..1.tar"),
        ("theirs/none-train-*.tar", "theirs/none-train-*.tar"),
        ("nowhere/train-00.tar", "nowhere/train-00.tar"),
        ("theirs/train-00.tar::val-00.tar", "no shard matches"),
        ("theirs/train-00.tar::other/val-00.tar", "in one folder"),
        ("theirs/train-${nothing}.tar", "nothing"),
    ):
        assert expected in refusal(call, "--index", pattern, cwd=theirs.parent)
    (theirs / "_info.json").write_text("[]")
    assert "not an index" in refusal(call, "--index", "theirs/*.tar", cwd=theirs.parent)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Gives files out; below cut/ a file is to be longer than what is sent, as when a connection breaks."""

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/cut"))

    def send_header(self, name, value):
        longer = name == "Content-Length" and self.path.startswith("/cut")
        super().send_header(name, str(int(value) + 10240) if longer else value)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(theirs, monkeypatch):
    """The URL of `theirs`, while a server on this machine gives its files out."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Handler, directory=str(theirs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_index_of_remote_shards(served, theirs, call, listed):
    """The index is written to --shards; beside the remote shards, main-wds.py finds it."""
    cwd = theirs.parent
    (cwd / "shards").mkdir()
    stdout, stderr = run("makeshards.py", "--index", f"{served}/{{train-00,train-01,val-00}}.tar", cwd=cwd)
    assert stdout.splitlines()[-1] == "written to ./shards/_info.json" and stderr == ""
    assert os.listdir(cwd / "shards") == ["_info.json"] and "_info.json" not in os.listdir(theirs)
    check_index(cwd / "shards/_info.json", theirs)
    shutil.copy(cwd / "shards/_info.json", theirs)
    assert listed("train", "--shards", served) == ([f"{served}/train-00.tar", f"{served}/train-01.tar"], [3, 2])
    assert listed("val", "--evaluate", "--valshards", f"{served}/val-00.tar") == ([f"{served}/val-00.tar"], [2])
    check_faults(call, cwd, [], "--shards", "theirs")
    (cwd / "other").mkdir()
    call("makeshards.py", "--index", f"{served}/val-00.tar", "--shards", "other", cwd=cwd)
    check_index(cwd / "other/_info.json", theirs, {"val": ["val-00.tar"]})


def test_index_of_remote_shards_that_fail(served, theirs, call):
    """Missing, cut off, or with a connection that breaks in the zeros at its end: a line that names it, no index."""
    cwd = theirs.parent
    (cwd / "shards").mkdir()
    error = error_of("makeshards.py", "--index", f"{served}/train-0{{0..2}}.tar", cwd=cwd)
    assert "train-02.tar: broken after 0 samples (HTTP Error 404: " in error
    assert not os.listdir(cwd / "shards")
    assert "cut/train-00.tar: broken" in refusal(call, "--index", f"{served}/cut/train-00.tar", cwd=cwd)
    shard = theirs / "train-01.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    assert "train-01.tar: broken" in refusal(call, "--index", f"{served}/train-0{{0..1}}.tar", cwd=cwd)


def test_index_of_remote_shards_without_a_folder_for_it(served, theirs, call):

    assert "mkdir ./shards" in refusal(call, "--index", f"{served}/train-00.tar", cwd=theirs.parent)


def test_an_index_that_cannot_be_written(theirs, tmp_path):
    """The folder is named, which is the shards', not --shards. A limit on the size of files stands for a full disk."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); del sys.argv[0]; "
    limit += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit, str(ROOT / "makeshards.py"), "--index", f"{theirs}/*.tar"]
    _, stderr = run_command(command, cwd=tmp_path, status=2)
    assert stderr == f"makeshards.py: {theirs}/_info.json: can't be written (File too large)\n"
    assert "_info.json" not in os.listdir(theirs)
