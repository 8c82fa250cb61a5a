"""The shards as main-wds.py finds, divides and reads them: exact over real processes, and broken ones by name."""

import functools
import io
import itertools
import json
import math
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import error_of, free_port, load, run, run_command
from PIL import Image
from test_plan import read as planned
from test_plan import sizes

main_wds = load("main-wds.py")
DataError = main_wds.DataError
TRAIN, VAL = [13, 1, 0, 17, 16], [4, 0, 7]  # 47 and 11 samples: primes; fewer shards than 3 ranks x 3 workers
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Before a stream is read again; test_faults.py has the real ones."""
    monkeypatch.setattr(main_wds, "PAUSES", (0,))


def tar(members, form=tarfile.USTAR_FORMAT):
    """The bytes of a tar that holds members (name or TarInfo, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as shard:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return out.getvalue()


def samples(numbers, image=b"%d"):
    """The members of numbered samples; a %d in the image becomes the number."""
    files = [[(f"{n:04d}.cls", b"3"), (f"{n:04d}.jpg", image.replace(b"%d", b"%d" % n))] for n in numbers]
    return list(itertools.chain(*files))


def write_shards(folder, image=b"%d", **splits):
    """Shards of the lengths given for each split, with samples numbered from 0, and the index; the hub's names."""
    number, index = itertools.count(), {}
    for split, lengths in splits.items():
        names = [f"imagenet1k-{split}-{i:0{4 if split == 'train' else 2}}.tar" for i in range(len(lengths))]
        index[split] = {"num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        for name, length in zip(names, lengths, strict=True):
            (folder / name).write_bytes(tar(samples(itertools.islice(number, length), image)))
    (folder / "_info.json").write_text(json.dumps({"splits": index}))
    return folder


SMALL = ["-a", "shufflenet_v2_x0_5", "-b", 4, "--image-size", 32, "--epochs", 1, "--no-accel"]


def picture():
    image = io.BytesIO()
    Image.new("RGB", (40, 30)).save(image, "JPEG")
    return image.getvalue()


# ---------------------------------------------------------------------------- epochs, over real processes

CASES = [{"workers": workers, "shuffle": shuffle} for workers in (0, 1, 3) for shuffle in (8, 0)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank's loaders yield in two epochs of batches of 5 per rank, for each case: see seen.py."""
    folder = write_shards(tmp_path_factory.mktemp("numbered"), train=TRAIN, validation=VAL)
    env = {"PYTHONWARNINGS": "error,ignore:This DataLoader will create"}  # more workers than there are cores
    runs = itertools.count()

    @functools.cache
    def see(ranks, cases):
        args = ["--ranks", ranks, "--cases", cases, "--dist-url", f"file://{folder}/{next(runs)}", "-b", 5 * ranks]
        stdout, _ = run("tests/seen.py", *args, "--shards", folder, "--epochs", 2, "--seed", 1, cwd=folder, env=env)
        return json.loads(stdout)

    return lambda ranks, cases: see(ranks, json.dumps(cases))


def column(batches, i=0):
    """The samples' numbers; 1: the augmentation's draws; 2: the processes that loaded them."""
    return [sample[i] for batch in batches for sample in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_epochs_are_exact(ranks, seen):
    """Each sample once and the allowed padding, in main-orig.py's batches, by the plan; validation each once."""
    for case, by_rank in zip(CASES, seen(ranks, CASES), strict=True):
        for epoch in (0, 1):
            for rank, result in enumerate(by_rank):
                train, val = result["train"][epoch], result["val"][epoch]
                assert [len(batch) for batch in train] == sizes(47, rank, ranks, 5)
                assert result["len"] == {"train": len(train), "val": len(val)}
                if not case["shuffle"]:
                    plan = planned(TRAIN, epoch, rank, ranks, case["workers"], 5, seed=1)
                    assert [column([batch]) for batch in train] == plan
            everyone = [n for result in by_rank for n in column(result["train"][epoch])]
            assert set(everyone) == set(range(47)) and len(everyone) == math.ceil(47 / ranks) * ranks
            assert sorted(n for result in by_rank for n in column(result["val"][epoch])) == list(range(47, 58))
        for result in by_rank:
            first, second = (column(epoch) for epoch in result["train"])
            assert first != second
            processes = {pid for epoch in result["train"] for pid in column(epoch, 2)}
            assert len(processes) == max(case["workers"], 1)  # which live on to the second epoch
        draws = [draw for result in by_rank for epoch in result["train"] for draw in column(epoch, 1)]
        assert len(set(draws)) == len(draws)  # each rank, worker and epoch has its own


def test_two_epochs_differ_within_shards_too(seen):
    largest = range(14, 31)
    first, second = ([n for n in column(epoch) if n in largest] for epoch in seen(1, CASES)[0][0]["train"])
    assert sorted(first) == sorted(second) == list(largest)
    assert first != second and list(largest) not in (first, second)


def test_seeds_and_ways_to_start_workers(seen):
    """The same seed gives the same in other processes, however workers start; without a seed it is seed 0's order."""
    one = {"workers": 1, "shuffle": 8}
    starts = [{**one, "start_method": method} for method in ("fork", "spawn", "forkserver")]
    seeds = [{**one, "seed": 2}, {**one, "seed": 0}, {**one, "seed": None}]
    *others, resumed = seen(2, [*starts, *seeds, {**one, "start_epoch": 1}])
    trains = [
        [[column(rank["train"][epoch], i) for rank in result] for epoch in (0, 1) for i in (0, 1)]
        for result in [seen(2, CASES)[CASES.index(one)], *others]
    ]
    assert trains[0] == trains[1] == trains[2] == trains[3]
    assert trains[0][2:] == [[column(rank["train"][0], i) for rank in resumed] for i in (0, 1)]
    assert trains.pop() == trains[-1]
    for a, b in itertools.combinations(trains[3:], 2):
        assert all(x[rank] != y[rank] for x, y in zip(a, b, strict=True) for rank in (0, 1))
    assert all({*train[i][0], *train[i][1]} == set(range(47)) for train in trains for i in (0, 2))


def test_a_batch_stays_as_it_is_while_it_is_in_hand(seen):
    """However long: workers use memory again, but not that in use."""
    cases = [{"workers": workers, "shuffle": 1, "hold": hold} for workers in (1, 2, 3) for hold in (0, 0.1)]
    runs = [[column(epoch) for epoch in (*rank["train"], *rank["val"])] for (rank,) in seen(1, cases)]
    for first, held in zip(runs[::2], runs[1::2], strict=True):
        assert sorted(first[0]) == sorted(first[1]) == list(range(47)) and first == held


# ---------------------------------------------------------------------------- shard_loader(), in a loop of one's own


def as_float(data):
    """float32 (3, 2, 2) that holds the sample's number, as Pillow's path would give floats."""
    return torch.full((3, 2, 2), float(data))


def as_bytes(data):
    return torch.full((2, 2, 3), int(data), dtype=torch.uint8)


def paths(folder):
    """(urls, lengths) of write_shards()'s training shards."""
    return main_wds.list_shards(str(folder), "train")[:2]


@pytest.mark.parametrize("transform", [as_float, as_bytes])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_kept(workers, transform, tmp_path):
    """All of them at once are the same as one by one: none is overwritten by a later one."""
    urls, lengths = paths(write_shards(tmp_path, train=TRAIN))
    loader = main_wds.shard_loader(urls, lengths, transform, 2, workers)
    for epoch in (0, 1):
        loader.dataset.set_epoch(epoch)
        one_by_one = [(images.flatten(1)[:, 0].tolist(), images.dtype) for images, _ in loader]
        kept = list(loader)
        assert [(images.flatten(1)[:, 0].tolist(), images.dtype) for images, _ in kept] == one_by_one
        assert sorted(n for batch, _ in one_by_one for n in batch) == list(range(47)) and len(loader) == len(kept)
        for images, target in kept:
            assert (images == images.flatten(1)[:, 0].view(-1, 1, 1, 1)).all() and target.tolist() == [3] * len(images)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_count_of_every_shard_is_checked(workers, train, tmp_path):
    """One sample too few or too many in the first, a middle or the last shard is an error by its name."""
    urls, lengths = paths(write_shards(tmp_path, train=[9, 8, 7]))
    assert len(list(main_wds.shard_loader(urls, lengths, as_bytes, 4, workers, train=train))) == 6
    for shard, change in itertools.product(range(3), (-1, 1)):
        wrong = [length + change * (i == shard) for i, length in enumerate(lengths)]
        loader = main_wds.shard_loader(urls, wrong, as_bytes, 4, workers, train=train)
        with pytest.raises(DataError, match=f"{urls[shard]}: {lengths[shard]} samples, but {wrong[shard]} by its"):
            list(loader)


# ---------------------------------------------------------------------------- reading


def read(url, first, last, length):
    for sample in main_wds.read_shard(str(url), length, first, last):
        (ending,) = main_wds.IMAGES & sample.keys()
        yield sample["__key__"], sample["cls"], sample[ending]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL of tmp_path, which a server on this machine gives out."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield re.search("http://[^/]*", server.stdout.readline())[0]
    server.kill()
    server.communicate()


@pytest.mark.parametrize("how", ["", "file:", "pipe:cat ", "http:"])
def test_any_part_of_a_shard(how, tmp_path, request):
    """Samples, and padding, are large enough for a command to notice that its pipe is closed."""
    content = samples(range(5), b"%d" * 50_000)
    (tmp_path / "a.tar").write_bytes(tar(content) + bytes(1 << 18))
    url = (request.getfixturevalue("served") if how == "http:" else f"{how}{tmp_path}") + "/a.tar"
    url += " || exit 5" if "pipe" in how else ""
    for first, last in itertools.combinations(range(6), 2):
        expected = [(f"{n:04d}", b"3", content[2 * n + 1][1]) for n in range(first, last)]
        assert list(read(url, first, last, 5)) == expected
    for length in (4, 6):
        with pytest.raises(DataError, match=rf"a\.tar.*: 5 samples, but {length} by its index"):
            list(read(url, 2, length, length))


@pytest.mark.parametrize("command", ["head -c 5000 %s", "cat %s.not", "exit 1"])
def test_a_command_that_fails(command, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(samples(range(5), b"%d" * 3000)))
    with pytest.raises(DataError, match=r"pipe:.*: (broken after \d of its 5|1) samples"):
        list(read("pipe:" + command.replace("%s", f"{tmp_path}/a.tar") + " 2>&-", 2, 5, 5))


@pytest.mark.parametrize("form", FORMATS)
def test_members_that_others_write(form, tmp_path):
    keys = ["a", "./b", "train/n01/c", "v1.2/d", "é/ж", "x" * 90 + "/" + "é" * 40, "last"]
    if form != tarfile.USTAR_FORMAT:
        keys += ["y" * 300, "ж" * 60]
    endings = itertools.cycle(["jpg", "jpeg", "png", "webp", "JPG", "JPEG"])
    members, expected = [], []
    for key in keys:
        image = key.encode() * 100
        members += [(f"{key}.{next(endings)}", image), (f"{key}.json", b"{}"), (f"{key}.seg.png", b"no")]
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo(f"{key}x.jpg")
            other.type, other.linkname = kind, "a.jpg"
            members.append((other, b""))
        members += [("._x.jpg", b"no"), (".DS_Store", b"no"), ("b/LICENSE", b"no")]
        members.append((f"{key}.{'CLS' if key == 'a' else 'cls'}", b"7"))
        expected.append((key, b"7", image))
    (tmp_path / "a.tar").write_bytes(tar(members, form))
    assert list(read(tmp_path / "a.tar", 0, len(keys), len(keys))) == expected
    assert list(read(f"pipe:cat {tmp_path}/a.tar", 3, len(keys), len(keys))) == expected[3:]


# ---------------------------------------------------------------------------- broken shards


def outcomes(content, path):
    """What workers get that read all of a shard of 3, skip two, and read one: (first, last, samples or None)."""
    path.write_bytes(content)
    for first, last in ((0, 3), (2, 3), (0, 1)):
        try:
            yield first, last, list(read(path, first, last, 3))
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "3" in str(error).removeprefix(str(path)), error
            yield first, last, None


def test_cut_off_anywhere(tmp_path):
    """In a header, in data, in padding, between members, in the end mark: no sample is lost silently."""
    whole = tar(samples(range(3), b"%d" * 300))
    good = [(f"{n:04d}", b"3", b"%d" % n * 300) for n in range(3)]
    mark = -(-len(whole.rstrip(b"\0")) // 512) * 512  # from there on nothing can be missing
    for cut in range(mark + 1024):
        for first, last, found in outcomes(whole[:cut], tmp_path / "a.tar"):
            if last == 3:
                assert found == (good[first:last] if cut >= mark else None), (cut, first)
            else:  # this worker may not reach the place; the one that does reports it
                assert found in (good[first:last], None)


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_byte(form, tmp_path):
    """The header's checksum shows it; in the data of a long name's own header nothing can, but no other error comes."""
    key = "é" * 70 if form != tarfile.USTAR_FORMAT else "0001"
    content = samples(range(3))
    content[2:4] = [(f"{key}.cls", b"3"), (f"{key}.jpg", b"1")]
    whole, good = tar(content, form), [("0000", b"3", b"0"), (key, b"3", b"1"), ("0002", b"3", b"2")]
    checked = range(2048, 2560)  # the header of the second sample, or of its name
    for place in [*checked, *range(2560, 2760)]:
        for change in (1, 0x80, 0xFF):
            broken = bytearray(whole)
            broken[place] ^= change
            for first, last, found in outcomes(broken, tmp_path / "a.tar"):
                assert place not in checked or found in (good[first:last], None)


@pytest.mark.parametrize("size", [-513, 3, 10**5, 2**36, 2**62, 2**70])
def test_a_size_that_lies(size, tmp_path):
    whole, member = tar(samples(range(3), b"%d" * 2000)), tarfile.TarInfo("0001.jpg")
    member.size = size
    place = whole.index(b"0001.jpg")
    broken = whole[:place] + member.tobuf(tarfile.GNU_FORMAT) + whole[place + 512 :]
    assert [found for _, last, found in outcomes(broken, tmp_path / "a.tar") if last == 3] == [None, None]
    for first in (0, 2):
        with pytest.raises(DataError, match=r"a\.tar: (broken after 1 of its 3|2) samples"):
            list(read(f"pipe:cat {tmp_path}/a.tar", first, 3, 3))


LIMITED = """
import resource, sys
sys.path.insert(0, "%s")
from conftest import load
main_wds = load("main-wds.py")
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), resource.RLIM_INFINITY))
main_wds.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits memory as Linux does")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_member_that_claims_8_gb(workers, tmp_path):
    """A sparse one, of which the tar holds nothing: where memory does not suffice, one line names the shard."""
    image = picture()
    write_shards(tmp_path, image, train=[8], validation=[4])
    whole = tar(samples(range(4), image))
    sparse = bytearray(tarfile.TarInfo("0002.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[483:495] = b"%011o\0" % ((8 << 30) - 1)  # its size without the holes
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    place = whole.index(b"0002.jpg")
    end = whole.index(b"0003.cls")
    shard = tmp_path / "imagenet1k-validation-00.tar"
    shard.write_bytes(whole[:place] + sparse + whole[end:])
    command = [sys.executable, "-c", LIMITED % Path(__file__).parent, *SMALL, "-j", workers, "--shards", tmp_path]
    _, stderr = run_command([*map(str, command), "--evaluate"], cwd=tmp_path, status=2)
    assert re.fullmatch(rf"-c: {shard}: broken after 2 of its 4 samples \([^<>()]+\)\n", stderr), stderr


PLAIN = r"[^<>()\[\]{}]+"  # no object, tuple, list or dictionary
MESSAGES = {  # name: (the shard's URL, what is wrong with it)
    "cut": ("%s/cut.tar", PLAIN),
    "text": ("%s/text.tar", PLAIN),
    "two images": ("%s/twice.tar", rf"{PLAIN}a\.jpg{PLAIN}|a\.jpg{PLAIN}"),
    "missing": ("%s/none.tar", r"\[Errno 2\] No such file or directory: '%s/none\.tar'"),
    "command": ("pipe:cat %s/cut.tar; exit 3", PLAIN),
    "missing in a command": ("pipe:cat %s/none.tar 2>&-", PLAIN),
    "no server": ("http://127.0.0.1:%d/a.tar", r"<urlopen error \[Errno \d+\] [\w ]+>"),
    "unknown": ("nowhere://a.tar", PLAIN),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_plain(name, tmp_path, monkeypatch):
    """Without the streams, URLs and commands that webdataset adds to an error, and in one line."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "whole.tar").write_bytes(tar(samples(range(3), b"%d" * 3000)))
    (tmp_path / "cut.tar").write_bytes(tar(samples(range(3), b"%d" * 3000))[:9000])
    (tmp_path / "text.tar").write_text("no tar" * 500)
    (tmp_path / "twice.tar").write_bytes(tar([*samples([0]), ("a.jpg", b"1"), ("a.jpg", b"2"), ("a.cls", b"0")]))
    url, expected = (text.replace("%s", str(tmp_path)).replace("%d", str(free_port())) for text in MESSAGES[name])
    with pytest.raises(DataError) as error:
        list(main_wds.read_shard(url, 3, 0, 3))
    expected = rf"{re.escape(url)}: broken after \d of its 3 samples \(({expected})\)"
    assert re.fullmatch(expected, str(error.value)), error.value


@pytest.mark.parametrize("fault, ranks", [("removed", 1), ("cut", 2), ("extra", 2)])
def test_training_ends_by_name(fault, ranks, tmp_path):
    """Whichever rank and worker meets it: status 2 and one line."""
    image = picture()
    write_shards(tmp_path, image, train=[9] * 4, validation=[4])
    content = tar(samples(range({"removed": 8, "cut": 9, "extra": 10}[fault]), image))
    (tmp_path / "imagenet1k-train-0002.tar").write_bytes(content[:-9000] if fault == "cut" else content)
    args = [*SMALL, "-j", 2 * ranks]
    if ranks > 1:
        args += ["--multiprocessing-distributed", "--dist-url", f"file://{tmp_path}/store"]
    env = {"PYTHONWARNINGS": "error,ignore:This DataLoader will create"}
    message = error_of("main-wds.py", *args, "--shards", tmp_path, cwd=tmp_path, env=env)
    found = {"removed": "8 samples, but 9", "cut": "broken after . of its 9", "extra": "10 samples, but 9"}[fault]
    assert re.match(rf"main-wds.py: {tmp_path}/imagenet1k-train-0002.tar: {found}", message)


# ---------------------------------------------------------------------------- finding shards


def found_by(monkeypatch, split, *args):
    """([url], [length]) that main-wds.py finds for a split by a command line."""
    monkeypatch.setattr(sys, "argv", ["main-wds.py", *map(str, args)])
    monkeypatch.setattr(main_wds, "say", lambda args, line: None)
    args = main_wds.parse_args()
    args.rank = 0
    args.world_size = 1
    return main_wds.find_shards(args, split)[:2]


@pytest.fixture
def listed(monkeypatch):
    """{name: samples} that find_shards() finds by a command line."""

    def listed(*args, split="train"):
        urls, lengths = found_by(monkeypatch, split, *args)
        return dict(zip([url.rpartition("/")[2] for url in urls], lengths, strict=True))

    return listed


def test_lengths_are_looked_up(listed, tmp_path):
    """By file name: beside the shards if there is an index, else in that of --shards; in a command, too."""
    write_shards(tmp_path, train=TRAIN, validation=VAL)
    names = [f"imagenet1k-train-{i:04}.tar" for i in range(5)]
    everything = dict(zip(names, TRAIN, strict=True))
    assert listed("--shards", tmp_path) == everything
    assert list(listed("--shards", tmp_path, split="val").values()) == VAL
    base = f"{tmp_path}/imagenet1k-train-"
    for pattern in (f"{base}{{0000..0004}}.tar", f"{base}*.tar", f"{base}{{0000..0001}}.tar::{base}000[2-4].tar"):
        assert listed("--trainshards", pattern) == everything
    assert list(listed("--trainshards", f"{base}{{0003,0000}}.tar").values()) == [17, 13]
    pattern = f"{tmp_path}/imagenet1k-validation-{{00..02}}.tar"
    assert list(listed("--trainshards", f"{base}*.tar", "--valshards", pattern, split="val").values()) == VAL
    for command in (
        f"pipe:cat {base}{{0003..0004}}.tar | cat",
        "pipe:curl -s 'https://x/y/imagenet1k-train-{0003..0004}.tar?z=1'",
    ):
        assert list(listed("--shards", tmp_path, "--trainshards", command).values()) == [17, 16]
    (tmp_path / "elsewhere").mkdir()
    for name in names:
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    pattern = f"{tmp_path}/elsewhere/*.tar"
    assert listed("--shards", tmp_path, "--trainshards", pattern) == everything
    with pytest.raises(DataError, match=r"no _info\.json beside the shards or in --shards"):
        listed("--trainshards", pattern)
    write_shards(tmp_path / "elsewhere", train=[2, 2, 2, 2, 2])
    assert set(listed("--shards", tmp_path, "--trainshards", pattern).values()) == {2}


UNKNOWN = ["%s/x.tar", "pipe:cat %s/x.tar | cat", "pipe:cat %s/imagenet1k-train-0000.tar %s/imagenet1k-train-0001.tar"]


@pytest.mark.parametrize("pattern", UNKNOWN)
def test_lengths_that_are_not_in_the_index(pattern, listed, tmp_path):
    """A shard that is not in it, and two shards in a command."""
    write_shards(tmp_path, train=TRAIN, validation=VAL)
    (tmp_path / "x.tar").write_bytes(tar(samples(range(3))))
    pattern = pattern.replace("%s", str(tmp_path))
    with pytest.raises(DataError, match=re.escape(f"{pattern}: ") + ".*index"):
        listed("--shards", tmp_path, "--trainshards", pattern)


def test_remote_shards(listed, served, tmp_path):
    write_shards(tmp_path, train=TRAIN, validation=VAL)
    pattern = f"{served}/imagenet1k-train-{{0003..0004}}.tar"
    assert list(listed("--shards", served).values()) == TRAIN
    assert list(listed("--trainshards", pattern).values()) == [17, 16]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "_info.json").rename(tmp_path / "elsewhere/_info.json")
    assert list(listed("--trainshards", pattern, "--shards", tmp_path / "elsewhere").values()) == [17, 16]
    for args in (["--shards", served], ["--trainshards", pattern]):
        with pytest.raises(DataError, match=r"no _info\.json"):
            listed(*args)


def with_classes(folder, both=None, **splits):
    """The folder, with shards and an index that names these classes for both splits, or for each of them."""
    folder.mkdir(exist_ok=True)
    write_shards(folder, train=[3], validation=[2])
    index = json.loads((folder / "_info.json").read_text())
    index["classes"] = both
    for split, classes in splits.items():
        index["splits"][split]["classes"] = classes
    (folder / "_info.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("how", ["--shards", "patterns", "two indexes"])
def test_classes_that_differ(how, listed, tmp_path):
    """Else a validation set that lacks one of the training classes would get wrong labels."""
    args = ["--shards", tmp_path / "a"]
    if how == "patterns":
        args = ["--trainshards", f"{tmp_path}/a/*train*.tar", "--valshards", f"{tmp_path}/a/*val*.tar"]
    elif how == "two indexes":
        args = ["--trainshards", f"{tmp_path}/a/*train*.tar", "--valshards", f"{tmp_path}/b/*val*.tar"]

    def find(train, validation):
        if how == "two indexes":
            with_classes(tmp_path / "a", train)
            with_classes(tmp_path / "b", validation)
        else:
            with_classes(tmp_path / "a", train=train, validation=validation)
        return listed(*args, split="val")

    assert find(["cat", "dog"], ["cat", "dog"])
    assert find(["cat", "dog"], None) and find(None, ["cat"])  # an index may name none
    for train, validation in ((["ant", "cat"], ["cat"]), (["cat"], ["ant", "cat"])):
        with pytest.raises(DataError, match="different classes: ant"):
            find(train, validation)
        assert listed(*args, "--evaluate", split="val")
    with pytest.raises(DataError, match="different classes"):
        find(["cat", "dog"], ["dog", "cat"])


def test_evaluate_needs_validation_shards_alone(listed, tmp_path):
    write_shards(tmp_path, validation=VAL)
    assert list(listed("--shards", tmp_path, "--evaluate", split="val").values()) == VAL


def test_more_classes_than_outputs(listed, tmp_path):
    args = ["--shards", with_classes(tmp_path, [f"c{i}" for i in range(1000)])]
    assert listed(*args) and listed(*args, split="val")
    with_classes(tmp_path, [f"c{i}" for i in range(1001)])
    for split in ("train", "val"):
        with pytest.raises(DataError, match="1001 classes"):
            listed(*args, split=split)


OUTSIDE = [
    "/tmp/a.tar",
    "../a.tar",
    "a/../../a.tar",
    "pipe:touch {}",
    "a.tar::pipe:touch {}",
    "http://x/a.tar",
    "file:a",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_is_no_command(name, listed, tmp_path):
    """A name from outside is refused before anything is opened."""
    write_shards(tmp_path, train=[2])
    name, args = name.format(tmp_path / "ran"), ["--trainshards", tmp_path / "imagenet1k-train-0000.tar"]
    entry = {"num_samples": 4, "filenames": ["a.tar", name], "shard_lengths": [2, 2]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": entry}}))
    for command in (args, ["--shards", tmp_path]):
        with pytest.raises(DataError, match=r"_info\.json: not an index.*" + re.escape(name)):
            listed(*command)
    assert not (tmp_path / "ran").exists()


def test_members_that_are_twice(tmp_path):
    """Two images, or two classes: neither is taken for the right one. One that is missing is an error, too."""
    two = [("1.jpg", b"a"), ("1.png", b"b"), ("1.cls", b"0")]
    for members in (two, [*two[1:], ("1.CLS", b"1")], [two[0], *two], two[:1], two[2:]):
        (tmp_path / "a.tar").write_bytes(tar(members))
        with pytest.raises(DataError, match=r"a\.tar: broken after 0 of its 1 samples \(.*\b1\b"):
            list(main_wds.read_shard(f"{tmp_path}/a.tar", 1, 0, 1))


NO_TRAIN = '{"splits": {"validation": {"num_samples": 0, "filenames": [], "shard_lengths": []}}}'
WRONG = [
    '{"splits": {"train"', '["train"]', NO_TRAIN, {"filenames": None}, {"shard_lengths": [3]},
    {"shard_lengths": [4, -1]}, {"shard_lengths": [None, 3]}, {"num_samples": 4}, {"filenames": ["a.tar", "a.tar"]},
    {"filenames": ["a.tar", "a.tar"], "shard_lengths": [2, 2], "num_samples": 4}, "null", "",
    {"filenames": ["a.tar", "gone.tar"]}, {"num_samples": 0, "shard_lengths": [0, 0]},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_index(change, listed, tmp_path):
    """A text that is not one, or a change that makes a right one wrong."""
    entry = {"num_samples": 3, "filenames": ["a.tar", "b.tar"], "shard_lengths": [2, 1]}
    text = change if isinstance(change, str) else json.dumps({"splits": {"train": {**entry, **change}}})
    (tmp_path / "_info.json").write_text(text)
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(tar([]))
    said = "_info.json: not an index"
    for mark, other in (
        ("gone", "gone.tar: the index lists"),
        ("[0, 0]", "no samples in the train shards"),
        ("validation", "no _info.json"),
    ):
        said = other if mark in text else said
    with pytest.raises(DataError, match=said):
        listed("--shards", tmp_path)


def test_names_that_look_like_others(listed, tmp_path):
    """A file with brackets in its name is no glob, and a folder http... no server."""
    for name in ("httpshards", "x[1]"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, train=TRAIN, validation=VAL)
    assert list(listed("--trainshards", f"{tmp_path}/x[1]/imagenet1k-train-0003.tar").values()) == [17]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert list(listed("--shards", "httpshards").values()) == TRAIN
        with pytest.raises(DataError, match="no _info"):
            listed("--shards", "httpnone")


NAMES = ["train-{0..2.tar", "${NOT_SET}.tar", "none-*.tar", "train-7.tar"]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_pattern(name, listed, tmp_path):
    write_shards(tmp_path, train=TRAIN)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{name}")):
        listed("--trainshards", f"{tmp_path}/{name}")
