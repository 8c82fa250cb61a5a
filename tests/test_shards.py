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

import pytest
from conftest import error_of, load, run
from PIL import Image
from test_plan import read as planned
from test_plan import sizes

main_wds, makeshards = load("main-wds.py"), load("makeshards.py")
DataError = makeshards.DataError
TRAIN, VAL = [13, 1, 0, 17, 16], [4, 0, 7]  # 47 and 11 samples: primes; fewer shards than 3 ranks x 3 workers
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Before a stream is read again; test_faults.py has the real ones."""
    monkeypatch.setattr(makeshards, "PAUSES", (0,))


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


# ---------------------------------------------------------------------------- epochs, over real processes

CASES = [{"workers": workers, "shuffle": shuffle} for workers in (0, 1, 3) for shuffle in (8, 0)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank's loaders give in two epochs of batches of 5 a rank, for each case: see seen.py."""
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
    """The samples' numbers; 1: the augmentation's draws; 2: the loading processes."""
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
    """The same seed gives the same in other processes, however workers start; without one, runs differ as a whole."""
    one = {"workers": 1, "shuffle": 8}
    starts = [{**one, "start_method": method} for method in ("fork", "spawn", "forkserver")]
    seeds = [{**one, "seed": 2}, {**one, "seed": None}, {**one, "seed": None}]
    *others, resumed = seen(2, [*starts, *seeds, {**one, "start_epoch": 1}])
    trains = [
        [[column(rank["train"][epoch], i) for rank in result] for epoch in (0, 1) for i in (0, 1)]
        for result in [seen(2, CASES)[CASES.index(one)], *others]
    ]
    assert trains[0] == trains[1] == trains[2] == trains[3]
    assert trains[0][2:] == [[column(rank["train"][0], i) for rank in resumed] for i in (0, 1)]
    for a, b in itertools.combinations(trains[3:], 2):
        assert all(x[rank] != y[rank] for x, y in zip(a, b, strict=True) for rank in (0, 1))
    assert all({*train[i][0], *train[i][1]} == set(range(47)) for train in trains for i in (0, 2))


def test_a_batch_stays_as_it_is_while_it_is_in_hand(seen):
    """However long, and whatever the main process reads by itself: workers use memory again, but not that in use."""
    changes = [{}, {"hold": 0.1}, {"peek": True}]
    cases = [{"workers": workers, "shuffle": 1, **change} for workers in (1, 2, 3) for change in changes]
    runs = [[column(epoch) for epoch in (*rank["train"], *rank["val"])] for (rank,) in seen(1, cases)]
    for first, held, peeked in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        assert sorted(first[0]) == sorted(first[1]) == list(range(47)) and first == held == peeked


# ---------------------------------------------------------------------------- reading


def read(url, first, last, length):
    found = makeshards.read_shard(str(url), first, last, length)
    return [(sample["__key__"], sample.get("cls"), sample.get("image")) for sample in found]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The URL of tmp_path, while a server on this machine gives its files out."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield re.search("http://[^/]*", server.stdout.readline())[0]
    server.kill()
    server.communicate()


@pytest.mark.parametrize("how", ["", "file:", "pipe:cat ", "http:"])
def test_any_part_of_a_shard(how, tmp_path, request):
    """Samples, and padding, large enough that a command which is hung up on notices."""
    content = samples(range(5), b"%d" * 50_000)
    (tmp_path / "a.tar").write_bytes(tar(content) + bytes(1 << 18))
    url = (request.getfixturevalue("served") if how == "http:" else f"{how}{tmp_path}") + "/a.tar"
    url += " || exit 5" if "pipe" in how else ""
    for first, last in itertools.combinations(range(6), 2):
        assert read(url, first, last, 5) == [(f"{n:04d}", b"3", content[2 * n + 1][1]) for n in range(first, last)]
    for length in (4, 6):
        with pytest.raises(DataError, match=rf"a\.tar.*: 5 samples, but {length} were expected"):
            read(url, 2, length, length)


@pytest.mark.parametrize("command", ["cat %s; exit 3", "head -c 5000 %s", "cat %s.not", "exit 1"])
def test_a_command_that_fails(command, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar(samples(range(5), b"%d" * 3000)))
    with pytest.raises(DataError, match=r"pipe:.*: (broken after \d of its 5|1) samples"):
        read("pipe:" + command.replace("%s", f"{tmp_path}/a.tar") + " 2>&-", 2, 5, 5)


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
        members += [("._x.jpg", b"no"), ("b/._x.jpg", b"no"), (".DS_Store", b"no"), ("LICENSE", b"no")]
        members.append((f"{key}.{'CLS' if key == 'a' else 'cls'}", b"7"))
        expected.append((key, b"7", image))
    (tmp_path / "a.tar").write_bytes(tar(members, form))
    assert makeshards.count_samples(f"{tmp_path}/a.tar") == len(keys)
    assert read(tmp_path / "a.tar", 0, len(keys), len(keys)) == expected
    assert read(f"pipe:cat {tmp_path}/a.tar", 3, len(keys), len(keys)) == expected[3:]


# ---------------------------------------------------------------------------- broken shards


def outcomes(content, path):
    """What a shard of 3 gives to a worker that reads all, skips two, and reads one: (first, last, samples or None)."""
    path.write_bytes(content)
    for first, last in ((0, 3), (2, 3), (0, 1)):
        try:
            yield first, last, read(path, first, last, 3)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and "3" in str(error).removeprefix(str(path)), error
            yield first, last, None


def test_cut_off_anywhere(tmp_path):
    """In a header, in data, in padding, between members, in the end mark: what is missing is never silently so."""
    whole = tar(samples(range(3), b"%d" * 300))
    good = [(f"{n:04d}", b"3", b"%d" % n * 300) for n in range(3)]
    mark = -(-len(whole.rstrip(b"\0")) // 512) * 512  # two blocks; after the first one nothing can be missing
    for cut in range(mark + 1024):
        for first, last, found in outcomes(whole[:cut], tmp_path / "a.tar"):
            if last == 3:
                assert found == (good[first:last] if cut >= mark + 512 else None), (cut, first)
            else:  # this worker may not come to the place; the one that does says it
                assert found in (good[first:last], None)
        if cut % 100 == 0 and cut < mark + 512:
            with pytest.raises(DataError, match=r"a\.tar: not a whole shard"):
                makeshards.count_samples(f"{tmp_path}/a.tar")


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_byte(form, tmp_path):
    """The header's checksum tells; in the data of a long name's own header nothing can, but no other error comes."""
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
            read(f"pipe:cat {tmp_path}/a.tar", first, 3, 3)


@pytest.mark.parametrize("fault, ranks", [("removed", 1), ("cut", 2), ("extra", 2)])
def test_training_ends_by_name(fault, ranks, tmp_path):
    """Whichever rank and worker meets it: status 2 and one line."""
    image = io.BytesIO()
    Image.new("RGB", (40, 30)).save(image, "JPEG")
    write_shards(tmp_path, image.getvalue(), train=[9] * 4, validation=[4])
    content = tar(samples(range({"removed": 8, "cut": 9, "extra": 10}[fault]), image.getvalue()))
    (tmp_path / "imagenet1k-train-0002.tar").write_bytes(content[:-9000] if fault == "cut" else content)
    args = ["-a", "shufflenet_v2_x0_5", "-b", 4, "-j", 2 * ranks, "--image-size", 32, "--epochs", 1, "--no-accel"]
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
    args = main_wds.parse_args()
    args.rank, args.distributed = 0, False
    return main_wds.find_shards(args, split)[:2]


@pytest.fixture
def listed(monkeypatch):
    """{name: samples} that find_shards() finds by a command line."""

    def listed(*args, split="train"):
        urls, lengths = found_by(monkeypatch, split, *args)
        return dict(zip([url.rpartition("/")[2] for url in urls], lengths, strict=True))

    return listed


@pytest.mark.parametrize("index", ["_info.json", "sizes.json", "none"])
def test_sources_of_lengths(index, listed, tmp_path):
    """An index, or counting; --trainsize is for remote ones alone."""
    write_shards(tmp_path, train=TRAIN, validation=VAL)
    if index == "_info.json":
        assert list(listed("--shards", tmp_path).values()) == TRAIN
        assert list(listed("--shards", tmp_path, split="val").values()) == VAL
    else:
        (tmp_path / "_info.json").unlink()
        if index == "sizes.json":
            sizes = {f"imagenet1k-train-{i:04}.tar": length + 1 for i, length in enumerate(TRAIN)}
            (tmp_path / "sizes.json").write_text(json.dumps(sizes))
        with pytest.raises(DataError, match=r"no _info\.json to be read there.*--trainshards"):  # sizes.json has none
            listed("--shards", tmp_path)
    base, more = f"{tmp_path}/imagenet1k-train-", index == "sizes.json"
    for pattern in (f"{base}{{0000..0004}}.tar", f"{base}*.tar", f"{base}{{0000..0001}}.tar::{base}000[2-4].tar"):
        found = listed("--trainshards", pattern, "--trainsize", 7)
        assert found == {f"imagenet1k-train-{i:04}.tar": length + more for i, length in enumerate(TRAIN)}
    pattern = f"{tmp_path}/imagenet1k-validation-{{00..02}}.tar"
    assert list(listed("--valshards", pattern, split="val").values()) == VAL


def test_remote_shards(listed, served, tmp_path):
    write_shards(tmp_path, train=TRAIN, validation=VAL)
    pattern = f"{served}/imagenet1k-train-{{0003..0004}}.tar"
    assert list(listed("--shards", served).values()) == TRAIN
    assert list(listed("--trainshards", pattern).values()) == [17, 16]
    (tmp_path / "_info.json").unlink()
    with pytest.raises(DataError, match=r"no _info\.json to be read there"):
        listed("--shards", served)
    with pytest.raises(DataError, match=r"train-0003\.tar: .*--trainsize"):
        listed("--trainshards", pattern)
    assert list(listed("--trainshards", pattern, "--trainsize", 33).values()) == [17, 16]
    with pytest.raises(DataError, match="--trainsize 4"):  # parts of 2, 2 and 0: the third would never be read
        listed("--trainshards", f"{served}/imagenet1k-train-{{0..2}}.tar", "--trainsize", 4)
    assert list(listed("--valshards", "pipe:cat a.tar", "--valsize", 5, split="val").values()) == [5]


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
    """A name from outside is refused before anything is opened, in _info.json and in sizes.json."""
    write_shards(tmp_path, train=[2])
    name, args = name.format(tmp_path / "ran"), ["--trainshards", tmp_path / "imagenet1k-train-0000.tar"]
    entry = {"num_samples": 4, "filenames": ["a.tar", name], "shard_lengths": [2, 2]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": entry}}))
    for command in (args, ["--shards", tmp_path]):
        with pytest.raises(DataError, match=r"_info\.json: not an index.*" + re.escape(name)):
            listed(*command)
    (tmp_path / "_info.json").unlink()
    (tmp_path / "sizes.json").write_text(json.dumps({name: 2}))
    with pytest.raises(DataError, match="not an index.*" + re.escape(name)):
        listed(*args)
    assert not (tmp_path / "ran").exists()


def test_members_that_are_twice(tmp_path):
    """Two images, or two classes: neither is taken for the right one. So is one that is missing."""
    two = [("1.jpg", b"a"), ("1.png", b"b"), ("1.cls", b"0")]
    for members in (two, [*two[1:], ("1.CLS", b"1")], two[:1], two[2:]):
        (tmp_path / "a.tar").write_bytes(tar(members))
        (sample,) = makeshards.read_shard(f"{tmp_path}/a.tar", 0, 1, 1)
        with pytest.raises(main_wds.DataError, match="sample 1 does not hold one image and one class"):
            main_wds.Shards.decode(None, sample)


NO_TRAIN = '{"splits": {"validation": {"num_samples": 0, "filenames": [], "shard_lengths": []}}}'
WRONG = [
    '{"splits": {"train"', '["train"]', NO_TRAIN, {"filenames": None}, {"shard_lengths": [3]},
    {"shard_lengths": [4, -1]}, {"shard_lengths": [None, 3]}, {"num_samples": 4}, {"filenames": ["a.tar", "a.tar"]},
    {"filenames": ["a.tar", "a.tar"], "shard_lengths": [2, 2], "num_samples": 4}, "null", "",
    {"filenames": ["a.tar", "gone.tar"]}, {"num_samples": 0, "shard_lengths": [0, 0]},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_index(change, listed, tmp_path):
    """A text that is none, or what makes a right one wrong."""
    entry = {"num_samples": 3, "filenames": ["a.tar", "b.tar"], "shard_lengths": [2, 1]}
    text = change if isinstance(change, str) else json.dumps({"splits": {"train": {**entry, **change}}})
    (tmp_path / "_info.json").write_text(text)
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(tar([]))
    said = "gone.tar: no such" if "gone" in text else "no samples" if "[0, 0]" in text else "_info.json: not an index"
    said = "no _info.json to be read there that names train shards" if "validation" in text else said
    with pytest.raises(DataError, match=f"{tmp_path}.*{said}"):
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


def test_more_than_one_tar(tmp_path):
    """Or a block of zeros in its midst: what follows is not left out in silence, not even where nothing is known."""
    whole = tar(samples(range(3), b"%d" * 300))
    for broken in (whole + whole, whole[:2048] + bytes(1024) + whole[2048:]):
        (tmp_path / "a.tar").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.tar: not a whole shard \(what follows its end is not empty"):
            makeshards.count_samples(f"{tmp_path}/a.tar")


NAMES = ["train-{0..2.tar", "${NOT_SET}.tar", "none-*.tar", "train-7.tar", "text.tar", "cut.tar"]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_pattern(name, listed, tmp_path):
    (tmp_path / "text.tar").write_text("no tar" * 500)
    (tmp_path / "cut.tar").write_bytes(tar(samples([1]))[:2048])
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{name}")):
        listed("--trainshards", f"{tmp_path}/{name}")
