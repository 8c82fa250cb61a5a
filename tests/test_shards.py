"""How main-wds.py finds, divides and reads shards: epochs are exact, and damaged shards are errors that name them."""

import functools
import gzip
import itertools
import json
import re
import signal
import sys
import tarfile

import pytest
import torch
from commands import SMALL_RUN, error_of, free_port, load, spawned_ranks, summary, wait_until
from make_data import noise, picture, samples, tar, write_shards
from print_samples import DRAW, PID, assert_complete, column, load_samples, order_and_draws
from test_plan import batch_sizes_of_sampler, batches_of_rank

main_wds = load("main-wds.py")
DataError = main_wds.DataError
TRAIN = [13, 1, 0, 17, 16]  # 47 samples, a prime; and fewer shards than 3 ranks x 3 workers
VAL = [4, 0, 7]
TRAIN_NAMES = [f"imagenet-train-{i:06}.tar" for i in range(len(TRAIN))]
ERRORS = []  # kept until the end: an error holds its loader, whose workers PyTorch would wait for, 5 s each
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
SMALL = ["-a", "shufflenet_v2_x0_5", "-b", 4, "--image-size", 32, "--epochs", 1, "--no-accel"]


@pytest.fixture(autouse=True)
def one_short_retry(monkeypatch):
    monkeypatch.setattr(main_wds, "PAUSES", (0,))


# ---------------------------------------------------------------------------- epochs, over real processes

CASES = [{"workers": workers, "shuffle": shuffle} for workers in (0, 1, 3) for shuffle in (8, 0)]


each_number_of_ranks = pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A function of the ranks and cases that returns what each rank's loaders yield in two epochs: see load_samples."""
    folder = write_shards(tmp_path_factory.mktemp("numbered"), train=TRAIN, validation=VAL)

    @functools.cache
    def loaded(ranks, cases):
        found, _ = load_samples(json.loads(cases), "--shards", folder, "--epochs", 2, cwd=folder, ranks=ranks)
        return found

    return lambda ranks, cases: loaded(ranks, json.dumps(cases))


@each_number_of_ranks
def test_epochs_are_exact(ranks, loaded):
    """All training samples, in main-orig.py's batch sizes and the plan's order; each validation sample once."""
    for case, by_rank in zip(CASES, loaded(ranks, CASES), strict=True):
        for epoch in (0, 1):
            for rank, result in enumerate(by_rank):
                batches = result["train"][epoch]
                assert [len(batch) for batch in batches] == batch_sizes_of_sampler(47, rank, ranks, 5)
                assert result["len"] == {"train": len(batches), "val": len(result["val"][epoch])}
                if case["shuffle"] == 0:
                    plan = batches_of_rank(TRAIN, epoch, rank, ranks, case["workers"], 5, seed=1)
                    assert [column([batch]) for batch in batches] == plan
            assert_complete(by_rank, epoch)


@each_number_of_ranks
def test_epochs_differ(ranks, loaded):
    """In order and augmentation; the workers stay the same."""
    for case, by_rank in zip(CASES, loaded(ranks, CASES), strict=True):
        draws = []
        for result in by_rank:
            first, second = result["train"]
            assert column(first) != column(second)
            draws += column(first, DRAW) + column(second, DRAW)
            assert len({*column(first, PID), *column(second, PID)}) == max(case["workers"], 1)
        assert len(set(draws)) == len(draws)


def test_samples_are_shuffled_within_shards(loaded):
    largest = list(range(14, 31))
    with_buffer = loaded(1, CASES)[0][0]
    first, second = [[number for number in column(epoch) if number in largest] for epoch in with_buffer["train"]]
    assert sorted(first) == sorted(second) == largest
    assert first != second and largest not in (first, second)


@pytest.mark.slow
def test_order_depends_on_the_seed_only(loaded):
    """It is the same in other processes, however workers are started, and after --start-epoch. No seed is seed 0."""
    case = {"workers": 1, "shuffle": 8}
    expected = loaded(1, CASES)[CASES.index(case)]
    changes = [{"start_method": "spawn"}, {"seed": 2}, {"seed": 0}, {"seed": None}, {"start_epoch": 1}]
    spawned, seed_2, seed_0, no_seed, second_epoch = loaded(1, [{**case, **change} for change in changes])
    assert order_and_draws(second_epoch, 0) == order_and_draws(expected, 1)
    for epoch in (0, 1):
        assert order_and_draws(spawned, epoch) == order_and_draws(expected, epoch)
        assert order_and_draws(no_seed, epoch) == order_and_draws(seed_0, epoch)
        for one, other in itertools.combinations((expected, seed_2, seed_0), 2):
            assert column(one[0]["train"][epoch]) != column(other[0]["train"][epoch])
        for by_rank in (expected, seed_2, seed_0):
            assert_complete(by_rank, epoch)


# ---------------------------------------------------------------------------- shard_loader() in another training loop


def as_uint8(data):
    """uint8 (2, 2, 3), filled with the sample's number."""
    return torch.full((2, 2, 3), int(data), dtype=torch.uint8)


def urls_and_lengths(folder):
    """Of write_shards()'s training shards."""
    urls, lengths, *_ = main_wds.list_shards(str(folder), "train")
    return urls, lengths


def assert_batch_is_intact(images, target):
    """All values of an image are its sample's number, which is its class."""
    assert (images == target.view(-1, 1, 1, 1)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_kept(workers, tmp_path):
    """No batch is overwritten by a later one."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    loader = main_wds.shard_loader(urls, lengths, as_uint8, 2, workers)
    for epoch in (0, 1):
        loader.dataset.set_epoch(epoch)
        batches = list(loader)
        assert len(loader) == len(batches)
        for images, target in batches:
            assert_batch_is_intact(images, target)
        assert sorted(n for _, target in batches for n in target.tolist()) == list(range(47))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_reused_memory_is_not_in_use(workers, tmp_path):
    """With reuse_memory a batch stays as it is until the next one, even once the workers have prefetched all they can.

    After k batches, the DataLoader has asked for PREFETCH more from each worker.
    """
    urls, lengths = urls_and_lengths(write_shards(tmp_path / "shards", train=TRAIN))
    decoded = tmp_path / "decoded"
    decoded.touch()

    def transform(data):
        with open(decoded, "ab", buffering=0) as file:
            file.write(b".")
        return as_uint8(data)

    loader = main_wds.shard_loader(urls, lengths, transform, 2, workers, reuse_memory=True)
    numbers = []
    for step, (images, target) in enumerate(loader, 1):
        size = min(2 * (step + workers * main_wds.PREFETCH), 47)
        wait_until(lambda size=size: decoded.stat().st_size >= size, decoded.read_bytes)
        assert_batch_is_intact(images, target)
        numbers += target.tolist()
    assert sorted(numbers) == list(range(47))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_length_of_each_shard_is_checked(workers, train, tmp_path):
    """The first, a middle and the last shard, with a sample too few or too many; with workers, only two of the six."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=[9, 8, 7]))
    assert len(list(main_wds.shard_loader(urls, lengths, as_uint8, 4, workers, train=train))) == 6
    for shard, change in [(0, 1), (2, -1)] if workers else itertools.product(range(3), (-1, 1)):
        wrong = list(lengths)
        wrong[shard] += change
        loader = main_wds.shard_loader(urls, wrong, as_uint8, 4, workers, train=train)
        with pytest.raises(DataError, match=f"{urls[shard]}: {lengths[shard]} samples, but {wrong[shard]} ") as error:
            list(loader)
        ERRORS.append(error)


# ---------------------------------------------------------------------------- reading


def read(url, first, last, length):
    """[(key, class, image)]"""
    found = []
    for sample in main_wds.read_shard(str(url), length, first, last):
        (ending,) = main_wds.IMAGES & sample.keys()
        found.append((sample["__key__"], sample["cls"], sample[ending]))
    return found


@pytest.mark.parametrize("scheme", ["", "file:", "pipe:", "http:"])
def test_any_range_of_a_shard(scheme, server, tmp_path, capfd):
    """Samples and padding are so large that a command fails when its pipe is closed early; this is not an error."""
    content = samples(range(5), b"%d" * 50_000)
    (tmp_path / "a.tar").write_bytes(tar(content) + bytes(1 << 18))
    urls = {"pipe:": f"pipe:cat {tmp_path}/a.tar || exit 5", "http:": f"{server.url}/a.tar"}
    url = urls.get(scheme, f"{scheme}{tmp_path}/a.tar")
    for first, last in itertools.combinations(range(6), 2):
        expected = [(f"{n:04d}", b"%d" % n, b"%d" % n * 50_000) for n in range(first, last)]
        assert read(url, first, last, 5) == expected
    assert capfd.readouterr().err == ""
    for length in (4, 6):
        with pytest.raises(DataError, match=rf"a\.tar.*: 5 samples, but {length} "):
            read(url, 2, length, length)


@pytest.mark.parametrize("form", FORMATS)
def test_shards_of_other_writers(form, tmp_path):
    """Any names and image formats; other members, links and devices are ignored."""
    keys = ["a", "./b", "train/n01/c", "v1.2/d", "é/ж", "x" * 90 + "/" + "é" * 40, "last"]
    if form != tarfile.USTAR_FORMAT:
        keys += ["y" * 300, "ж" * 60]
    endings = itertools.cycle(["jpg", "jpeg", "png", "webp", "JPG", "JPEG"])
    members = []
    expected = []
    for key in keys:
        image = key.encode() * 100
        members += [(f"{key}.{next(endings)}", image), (f"{key}.json", b"{}"), (f"{key}.seg.png", b"no")]
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo(f"{key}x.jpg")
            other.type = kind
            other.linkname = "a.jpg"
            members.append((other, b""))
        members += [("._x.jpg", b"no"), (".DS_Store", b"no"), ("b/LICENSE", b"no")]
        members.append((f"{key}.{'CLS' if key == 'a' else 'cls'}", b"7"))
        expected.append((key, b"7", image))
    (tmp_path / "a.tar").write_bytes(tar(members, form))
    assert read(tmp_path / "a.tar", 0, len(keys), len(keys)) == expected
    assert read(f"pipe:cat {tmp_path}/a.tar", 3, len(keys), len(keys)) == expected[3:]


# ---------------------------------------------------------------------------- damaged shards


def read_parts(content, path):
    """What workers get that read all of a shard of 3 samples, the last and the first: [(first, last, samples or None)].

    None stands for a DataError that names the shard.
    """
    path.write_bytes(content)
    found = []
    for first, last in ((0, 3), (2, 3), (0, 1)):
        try:
            part = read(path, first, last, 3)
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            part = None
        found.append((first, last, part))
    return found


def test_truncated_shard(tmp_path):
    """In a header, in data, in padding, between members, or in the end mark: no sample is lost silently."""
    whole = tar(samples(range(3), b"%d" * 300))
    good = [(f"{n:04d}", b"%d" % n, b"%d" % n * 300) for n in range(3)]
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # of the last member; the end mark follows
    sizes = {block + offset for block in range(0, end + 512, 512) for offset in (0, 1, 511)}
    for size in sizes | set(range(0, end + 1024, 10)):
        for first, last, found in read_parts(whole[:size], tmp_path / "a.tar"):
            if last == 3:
                assert found == (good[first:last] if size >= end else None), (size, first)
            else:  # this worker may not read that far; the one that does reports it
                assert found in (good[first:last], None)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.slow
def test_changed_byte_in_a_header(form, tmp_path):
    """Its checksum detects it. A long name's own header has data without a checksum: no other error than DataError."""
    key = "0001" if form == tarfile.USTAR_FORMAT else "é" * 70
    content = samples(range(3))
    content[2:4] = [(f"{key}.cls", b"1"), (f"{key}.jpg", b"1")]
    whole = tar(content, form)
    good = [("0000", b"0", b"0"), (key, b"1", b"1"), ("0002", b"2", b"2")]
    header = range(2048, 2560)  # of the second sample, or of its name
    for place in range(2048, 2760):
        for change in (1, 0x80):
            broken = bytearray(whole)
            broken[place] ^= change
            for first, last, found in read_parts(broken, tmp_path / "a.tar"):
                assert place not in header or found in (good[first:last], None)


UNREADABLE = [
    "%s/truncated.tar",
    "%s/text.tar",
    "%s/missing.tar",
    "pipe:cat '%s/missing.tar' 2>&-",
    "pipe:head -c 5000 %s/whole.tar; exit 3",
    "pipe:exit 1",
    "http://127.0.0.1:%d/no-server.tar",
    "nowhere://unknown-scheme.tar",
]


@pytest.mark.parametrize("url", UNREADABLE)
def test_unreadable_shard(url, tmp_path, monkeypatch):
    """One line that begins with the URL, without Python objects: webdataset adds streams and commands to its errors."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    whole = tar(samples(range(3), b"%d" * 3000))
    (tmp_path / "whole.tar").write_bytes(whole)
    (tmp_path / "truncated.tar").write_bytes(whole[:9000])
    (tmp_path / "text.tar").write_text("no tar" * 500)
    url = url.replace("%s", str(tmp_path)).replace("%d", str(free_port()))
    with pytest.raises(DataError) as error:
        read(url, 0, 3, 3)
    message = str(error.value)
    assert re.match(rf"{re.escape(url)}: (broken after \d of its 3|\d) samples", message)
    assert not re.search(r"\n|_io\.|object at|environ|\{", message)


DAMAGE = {  # {what is wrong: (ranks, workers, the error)}
    "missing sample": (2, 2, "8 samples, but 9 "),
    "truncated": (2, 4, "broken after . of its 9 samples"),
    "bad image": (1, 0, "sample 0003: not a readable image"),
    "bad class": (1, 2, "sample 0003: its class '1000' is not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.slow
def test_damaged_shard_ends_training(damage, tmp_path):
    """Exit status 2 and one line on stderr that names the shard, whichever rank and worker reads it."""
    ranks, workers, expected = DAMAGE[damage]
    image = picture()
    write_shards(tmp_path, image, train=[9] * 4, validation=[4])
    members = dict(samples(range(8 if damage == "missing sample" else 9), image))
    if damage == "bad image":
        members["0003.jpg"] = image[:300]
    if damage == "bad class":
        members["0003.cls"] = b"1000"
    content = tar(members.items())
    if damage == "truncated":
        content = content[:-9000]
    shard = tmp_path / TRAIN_NAMES[2]
    shard.write_bytes(content)
    args = [*SMALL, "-j", workers, "--shards", tmp_path]
    if ranks == 2:
        args += spawned_ranks()
    message = error_of("main-wds.py", *args, cwd=tmp_path)
    assert re.match(f"main-wds.py: {shard}: {expected}", message)


def test_sample_without_exactly_one_image_and_class(tmp_path):
    image = ("1.jpg", b"a")
    other_image = ("1.png", b"b")
    label = ("1.cls", b"0")
    other_label = ("1.CLS", b"1")
    wrong = [[image, other_image, label], [image, label, other_label], [image, image, label], [image], [label]]
    for members in wrong:
        (tmp_path / "a.tar").write_bytes(tar(members))
        with pytest.raises(DataError, match=r"a\.tar: broken after 0 of its 1 samples \(.*\b1\b"):
            read(tmp_path / "a.tar", 0, 1, 1)


# ---------------------------------------------------------------------------- finding shards


def found_by(monkeypatch, split, *args):
    """([url], [length]) of the shards that main-wds.py finds for a split with these arguments."""
    monkeypatch.setattr(sys, "argv", ["main-wds.py", *map(str, args)])
    args = main_wds.parse_args()
    args.rank = 0
    args.world_size = 1
    return main_wds.find_shards(args, split)[:2]


@pytest.fixture
def find(monkeypatch):
    """A function of main-wds.py's arguments that returns {file name: number of samples} of the shards it finds."""

    def find(*args, split="train"):
        urls, lengths = found_by(monkeypatch, split, *args)
        return dict(zip([url.rpartition("/")[2] for url in urls], lengths, strict=True))

    return find


@pytest.fixture
def numbered(tmp_path):
    return write_shards(tmp_path, train=TRAIN, validation=VAL)


def test_shards_of_a_folder(find, numbered):
    assert find("--shards", numbered) == dict(zip(TRAIN_NAMES, TRAIN, strict=True))
    assert list(find("--shards", numbered, split="val").values()) == VAL


PATTERNS = {
    "%s/imagenet-train-{000000..000004}.tar": TRAIN,
    "%s/imagenet-train-*.tar": TRAIN,
    "%s/imagenet-train-{000000..000001}.tar::%s/imagenet-train-00000[2-4].tar": TRAIN,
    "%s/imagenet-train-{000003,000000}.tar": [17, 13],
    "pipe:cat %s/imagenet-train-{000003..000004}.tar | cat": [17, 16],
    "pipe:curl 'https://x/imagenet-train-{000003..000004}.tar?z=1'": [17, 16],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lengths_of_a_pattern(pattern, find, numbered):
    """They are looked up in the index beside the shards; those of commands in the index of --shards."""
    full = pattern.replace("%s", str(numbered))
    shards = numbered if pattern.startswith("pipe:") else "none"
    assert list(find("--trainshards", full, "--shards", shards).values()) == PATTERNS[pattern]
    args = ["--trainshards", full, "--valshards", f"{numbered}/*validation*.tar", "--shards", shards]
    assert list(find(*args, split="val").values()) == VAL


def test_index_beside_the_shards_takes_precedence(find, numbered, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in TRAIN_NAMES:
        (numbered / name).rename(elsewhere / name)
    pattern = f"{elsewhere}/*.tar"
    assert list(find("--shards", numbered, "--trainshards", pattern).values()) == TRAIN
    with pytest.raises(DataError, match=r"no _info\.json beside the shards or in --shards"):
        find("--shards", "none", "--trainshards", pattern)
    write_shards(elsewhere, train=[2, 2, 2, 2, 2])
    assert list(find("--shards", numbered, "--trainshards", pattern).values()) == [2, 2, 2, 2, 2]


UNUSABLE_PATTERNS = [
    "%s/x.tar",
    "pipe:cat %s/x.tar | cat",
    f"pipe:cat %s/{TRAIN_NAMES[0]} %s/{TRAIN_NAMES[1]}",  # two shards in one command
    "%s/train-{0..2.tar",
    "%s/${NOT_SET}.tar",
    "%s/none-*.tar",
    "%s/train-7.tar",
]


@pytest.mark.parametrize("pattern", UNUSABLE_PATTERNS)
def test_pattern_without_shards_of_the_index(pattern, find, numbered):
    (numbered / "x.tar").write_bytes(tar(samples(range(3))))
    pattern = pattern.replace("%s", str(numbered))
    with pytest.raises(DataError, match=re.escape(f"{pattern}: ")):
        find("--shards", numbered, "--trainshards", pattern)


def test_remote_shards(find, server, numbered, tmp_path):
    pattern = f"{server.url}/imagenet-train-{{000003..000004}}.tar"
    assert list(find("--shards", server.url).values()) == TRAIN
    assert list(find("--trainshards", pattern).values()) == [17, 16]
    (tmp_path / "elsewhere").mkdir()
    (numbered / "_info.json").rename(tmp_path / "elsewhere/_info.json")
    assert list(find("--trainshards", pattern, "--shards", tmp_path / "elsewhere").values()) == [17, 16]
    for args in (["--shards", server.url], ["--trainshards", pattern]):
        with pytest.raises(DataError, match=r"no _info\.json"):
            find(*args)


def write_classes(folder, both=None, **splits):
    """Write shards, with an index that has these classes for both splits or for each split."""
    write_shards(folder, train=[3], validation=[2])
    index = json.loads((folder / "_info.json").read_text())
    index["classes"] = both
    for split, classes in splits.items():
        index["splits"][split]["classes"] = classes
    (folder / "_info.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["--shards", "patterns", "two folders"])
def test_splits_with_different_classes(layout, find, tmp_path):
    """An error, since validation would compare with the wrong labels; but --evaluate reads one split only."""
    train_folder = tmp_path / "a"
    val_folder = tmp_path / "b" if layout == "two folders" else train_folder
    args = ["--trainshards", f"{train_folder}/*train*.tar", "--valshards", f"{val_folder}/*validation*.tar"]
    if layout == "--shards":
        args = ["--shards", train_folder]

    def find_val(train, val, *more):
        if layout == "two folders":
            write_classes(train_folder, train)
            write_classes(val_folder, val)
        else:
            write_classes(train_folder, train=train, validation=val)
        return find(*args, *more, split="val")

    assert find_val(["cat", "dog"], ["cat", "dog"])
    assert find_val(["cat", "dog"], None) and find_val(None, ["cat"])  # an index need not name them
    for train, val in ((["ant", "cat"], ["cat"]), (["cat"], ["ant", "cat"])):
        with pytest.raises(DataError, match="different classes: ant"):
            find_val(train, val)
        assert find_val(train, val, "--evaluate")
    with pytest.raises(DataError, match="different classes"):
        find_val(["cat", "dog"], ["dog", "cat"])


def test_more_classes_than_outputs(find, tmp_path):
    write_classes(tmp_path, [f"c{i}" for i in range(1000)])
    for split in ("train", "val"):
        assert find("--shards", tmp_path, split=split)
    write_classes(tmp_path, [f"c{i}" for i in range(1001)])
    for split in ("train", "val"):
        with pytest.raises(DataError, match="1001 classes"):
            find("--shards", tmp_path, split=split)


def index_text(**changes):
    """An index of two shards."""
    entry = {"num_samples": 3, "filenames": ["a.tar", "b.tar"], "shard_lengths": [2, 1], **changes}
    return json.dumps({"splits": {"train": entry}})


INVALID_INDEXES = {
    "empty": "",
    "null": "null",
    "list": '["train"]',
    "truncated": '{"splits": {"train"',
    "no names": index_text(filenames=None),
    "too few lengths": index_text(shard_lengths=[3]),
    "negative length": index_text(shard_lengths=[4, -1]),
    "no length": index_text(shard_lengths=[None, 3]),
    "wrong sum": index_text(num_samples=4),
    "name twice": index_text(filenames=["a.tar", "a.tar"]),
}
OUTSIDE = ["/tmp/a.tar", "../a.tar", "c/../../a.tar", "pipe:touch ran", "a.tar::pipe:touch ran", "http://x/a", "file:a"]
INVALID_INDEXES |= {name: index_text(filenames=["a.tar", name]) for name in OUTSIDE}


@pytest.fixture
def two_shards(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar([]))
    (tmp_path / "_info.json").write_text(index_text())
    return tmp_path


@pytest.mark.parametrize("case", INVALID_INDEXES)
def test_invalid_index(case, find, two_shards, monkeypatch):
    """It is refused before any shard is opened: a name from outside the folder could be a command."""
    monkeypatch.chdir(two_shards)
    assert find("--shards", two_shards) == {"a.tar": 2, "b.tar": 1}
    (two_shards / "_info.json").write_text(INVALID_INDEXES[case])
    for args in (["--shards", two_shards], ["--trainshards", two_shards / "a.tar"]):
        with pytest.raises(DataError, match=r"_info\.json: not an index"):
            find(*args)
    assert sorted(path.name for path in two_shards.iterdir()) == ["_info.json", "a.tar", "b.tar"]


def test_split_without_samples(find, two_shards):
    with pytest.raises(DataError, match=r"no _info\.json there that .* val shards"):
        find("--shards", two_shards, "--evaluate", split="val")
    (two_shards / "_info.json").write_text(index_text(num_samples=0, shard_lengths=[0, 0]))
    with pytest.raises(DataError, match="no samples in the train shards"):
        find("--shards", two_shards)


def test_missing_shard(find, two_shards):
    (two_shards / "b.tar").unlink()
    with pytest.raises(DataError, match=f"{two_shards}/b.tar: "):
        find("--shards", two_shards)


def test_names_that_look_like_patterns_or_urls(find, tmp_path, monkeypatch):
    for name in ("httpshards", "x[1]"):
        write_shards(tmp_path / name, train=TRAIN, validation=VAL)
    assert list(find("--trainshards", f"{tmp_path}/x[1]/{TRAIN_NAMES[3]}").values()) == [17]
    monkeypatch.chdir(tmp_path)
    assert list(find("--shards", "httpshards").values()) == TRAIN
    with pytest.raises(DataError, match="no _info"):
        find("--shards", "httpnone")


def test_passwords_are_never_printed(start, shards):
    """A URL with a password is refused, but one may be part of a command."""
    url = "http://me:secret@127.0.0.1:9/imagenet-train-{000000..000003}.tar"
    _, (line,) = start(*SMALL_RUN, "--shards", shards, "--trainshards", url).finish(status=2, lines=1)
    assert line.startswith("main-wds.py: http://127.0.0.1:9/_info.json: ") and "secret" not in line
    run = start(*SMALL_RUN, "--shards", shards, "--trainshards", f"pipe:false {url}")
    wait_until(lambda: "retrying in" in run.output(), run.output)
    run.kill(signal.SIGKILL).finish(status=-signal.SIGKILL, lines=None)
    assert "pipe:false http://127.0.0.1:9/" in run.output() and "secret" not in run.output()


def test_unknown_url_schemes(start, shards):
    for args in (["--shards", "s3://b/imagenet"], ["--shards", shards, "--trainshards", "s3://b/imagenet-{0..1}.tar"]):
        _, (line,) = start(*SMALL_RUN, *args).finish(status=2, lines=1)
        assert line.startswith("main-wds.py: s3://b/imagenet") and "pipe:" in line


def test_gzip_encoded_index(start, tmp_path):
    """Some servers send it like that."""
    folder = write_shards(tmp_path / "shards", noise, train=[8], validation=[4])
    index = folder / "_info.json"
    index.write_bytes(gzip.compress(index.read_bytes()))
    out, _ = start(*SMALL_RUN, "--epochs", 1, "--shards", folder).finish()
    assert "=> train: 8 images in 1 shard" in out and len(summary(out)) == 1
