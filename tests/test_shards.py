"""How main-wds.py finds, divides and reads shards: epochs are exact, and damaged shards are errors that name them."""

import functools
import itertools
import json
import math
import os
import random
import re
import socket
import sys
import tarfile

import pytest
import torch
from commands import error_of, free_port, load, spawned_ranks, wait_until
from fault_server import FaultServer
from make_data import picture, samples, tar, write_shards
from print_samples import DRAW, NUMBER, PID, assert_complete, column, load_samples, order_and_draws
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
        for result in by_rank:
            first, second = result["train"]
            assert column(first) != column(second)
            assert not {*column(first, DRAW)} & {*column(second, DRAW)}
            assert len({*column(first, PID), *column(second, PID)}) == max(case["workers"], 1)


def test_augmentation_depends_on_the_sample_only(loaded):
    """Besides the seed and the epoch: not on the ranks, the workers or the order."""
    for epoch in (0, 1):
        drawn = [{}, {}]
        for ranks, cases in ((1, CASES), (2, CASES)):
            for by_rank in loaded(ranks, cases):
                for result in by_rank:
                    for number, draw, _ in itertools.chain(*result["train"][epoch]):
                        assert drawn[epoch].setdefault(number, draw) == draw
        assert len(drawn[epoch]) == len(set(drawn[epoch].values())) == sum(TRAIN)


def test_samples_are_shuffled_within_shards(loaded):
    largest = list(range(14, 31))
    with_buffer = loaded(1, CASES)[0][0]
    first, second = [[number for number in column(epoch) if number in largest] for epoch in with_buffer["train"]]
    assert sorted(first) == sorted(second) == largest
    assert first != second and largest not in (first, second)


@pytest.mark.slow
def test_order_depends_on_the_seed_only(loaded):
    """It is the same in other processes, however workers are started, and after --start-epoch."""
    case = {"workers": 1, "shuffle": 8}
    expected = loaded(1, CASES)[CASES.index(case)]
    changes = [{"start_method": "spawn"}, {"seed": 2}, {"seed": 0}, {"start_epoch": 1}]
    spawned, seed_2, seed_0, second_epoch = loaded(1, [{**case, **change} for change in changes])
    assert order_and_draws(second_epoch, 0) == order_and_draws(expected, 1)
    for epoch in (0, 1):
        assert order_and_draws(spawned, epoch) == order_and_draws(expected, epoch)
        for one, other in itertools.combinations((expected, seed_2, seed_0), 2):
            assert column(one[0]["train"][epoch]) != column(other[0]["train"][epoch])
        for by_rank in (expected, seed_2, seed_0):
            assert_complete(by_rank, epoch)


# ---------------------------------------------------------------------------- ShardDataset in another training loop


def test_without_a_seed(loaded):
    """Each run has an order and an augmentation of its own, which all ranks share."""
    case = {"workers": 1, "shuffle": 8, "seed": None}
    first, second = loaded(2, [case, case])
    for by_rank in (first, second):
        assert_complete(by_rank, 0)
        assert_complete(by_rank, 1)
    for part in (NUMBER, DRAW):
        assert column(first[0]["train"][0], part) != column(second[0]["train"][0], part)


def as_uint8(data):
    """uint8 (2, 2, 3), filled with the sample's number."""
    return torch.full((2, 2, 3), int(data), dtype=torch.uint8)


def urls_and_lengths(folder):
    """Of write_shards()'s training shards."""
    urls, lengths, *_ = main_wds.find_shards(str(folder), "train")
    return urls, lengths


def loader_of(urls, lengths, transform, batch_size, workers, **options):
    dataset = main_wds.ShardDataset(urls, lengths, "", transform, batch_size, workers=workers, **options)
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def assert_batch_is_intact(images, target):
    """All values of an image are its sample's number, which is its class."""
    assert (images == target.view(-1, 1, 1, 1)).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_may_be_kept(workers, tmp_path):
    """No batch is overwritten by a later one."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    loader = loader_of(urls, lengths, as_uint8, 2, workers)
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

    loader = loader_of(urls, lengths, transform, 2, workers, reuse_memory=True)
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
    assert len(list(loader_of(urls, lengths, as_uint8, 4, workers, train=train))) == 6
    for shard, change in [(0, 1), (2, -1)] if workers else itertools.product(range(3), (-1, 1)):
        wrong = list(lengths)
        wrong[shard] += change
        loader = loader_of(urls, wrong, as_uint8, 4, workers, train=train)
        message = rf"{urls[shard]}: can't be read \({lengths[shard]} samples, but {wrong[shard]} "
        with pytest.raises(DataError, match=message) as error:
            list(loader)
        ERRORS.append(error)


def test_position_of_a_complete_epoch(tmp_path):
    """Nothing is read. The epoch that follows is a whole one."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    end = loader_of(urls, lengths, as_uint8, 4, 2).dataset.state_dict(12)
    for batch_size in (4, 5):
        loader = loader_of(["missing.tar"] * len(urls), lengths, as_uint8, batch_size, 2)
        loader.dataset.load_state_dict(end)
        assert list(loader) == [] and len(loader) == 12
        with pytest.raises(DataError, match="the rest of epoch 0 has been read") as error:
            list(loader)
        ERRORS.append(error)
        loader.dataset.set_epoch(1)
        assert len(loader) == math.ceil(47 / batch_size)
        with pytest.raises(DataError, match="missing") as error:
            list(loader)
        ERRORS.append(error)


def test_position_is_loaded_later(tmp_path):
    """Workers that run already continue at the position. A loop may look at the first batch before the epoch."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    for workers in (0, 2):
        loader = loader_of(urls, lengths, as_uint8, 4, workers)
        whole = [target.tolist() for _, target in loader]
        for step in (3, 4):
            loader.dataset.load_state_dict(loader.dataset.state_dict(step))
            next(iter(loader))
            assert [target.tolist() for _, target in loader] == whole[step:]
        other = loader_of(urls, lengths, as_uint8, 5, workers)
        next(iter(other))
        other.dataset.load_state_dict(loader.dataset.state_dict(4))
        rest = [target.tolist() for _, target in other]
        assert len(other) == 4 + 7 and sorted(itertools.chain(*whole[:4], *rest)) == list(range(47))
        other.dataset.set_epoch(1)
        whole = [target.tolist() for _, target in other]
        assert sorted(itertools.chain(*whole)) == list(range(47))
        third = loader_of(urls, lengths, as_uint8, 3, workers)
        third.dataset.load_state_dict(other.dataset.state_dict(2))
        rest = [target.tolist() for _, target in third]
        assert sorted(itertools.chain(*whole[:2], *rest)) == list(range(47))


@pytest.mark.parametrize("workers", [0, 2])
def test_other_number_of_workers(workers, tmp_path):
    """The dataset must know it: positions depend on it."""
    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    dataset = main_wds.ShardDataset(urls, lengths, "", as_uint8, 4, workers=1)
    with pytest.raises(DataError, match=f"num_workers={workers}, but the ShardDataset has workers=1") as error:
        list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))
    ERRORS.append(error)


def test_random_state_of_the_caller_is_kept(tmp_path):
    """Without workers, loading does not change what the training loop draws next."""

    def random_image(data):
        return torch.full((2, 2, 3), random.random() + float(torch.rand(())))

    urls, lengths = urls_and_lengths(write_shards(tmp_path, train=TRAIN))
    random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), float(torch.rand(()))
    random.seed(7)
    torch.manual_seed(7)
    dataset = main_wds.ShardDataset(urls, lengths, "", random_image, 2)
    images = torch.cat([images for images, _ in dataset])
    assert len(images.unique()) == 47  # each image has drawn numbers of its own
    assert (random.random(), float(torch.rand(()))) == expected


# ---------------------------------------------------------------------------- reading


def read(url, first, last, length):
    """[(key, class, image)]"""
    found = []
    for sample in main_wds.read_shard(str(url), length, range(first, last)):
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
        with pytest.raises(DataError, match=rf"a\.tar.*: can't be read \(5 samples, but {length} "):
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
    assert message.startswith(f"{url}: can't be read (")
    assert not re.search(r"\n|_io\.|object at|environ|\{", message)


DAMAGE = {  # {what is wrong: (ranks, workers, the error)}
    "missing sample": (2, 2, r"can't be read \(8 samples, but 9 "),
    "truncated": (2, 4, r"can't be read \("),
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
        with pytest.raises(DataError, match=r"a\.tar: can't be read \(.*\b1\b"):
            read(tmp_path / "a.tar", 0, 1, 1)


# ---------------------------------------------------------------------------- finding shards


def found_by(monkeypatch, split, *args):
    """([url], [length]) of the shards that main-wds.py finds for a split with these arguments."""
    monkeypatch.setattr(sys, "argv", ["main-wds.py", *map(str, args)])
    args = main_wds.parse_args()
    return main_wds.find_shards(args.shards, split, args.index)[:2]


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


def write_classes(folder, number):
    write_shards(folder, train=[3], validation=[2])
    index = json.loads((folder / "_info.json").read_text())
    index["classes"] = [f"c{i}" for i in range(number)]
    (folder / "_info.json").write_text(json.dumps(index))


def test_more_classes_than_outputs(find, tmp_path):
    write_classes(tmp_path, 1000)
    for split in ("train", "val"):
        assert find("--shards", tmp_path, split=split)
    write_classes(tmp_path, 1001)
    for split in ("train", "val"):
        with pytest.raises(DataError, match="1001 classes"):
            find("--shards", tmp_path, split=split)


def test_split_without_samples(find, two_shards):
    with pytest.raises(DataError, match=f"--shards {two_shards}: its index lists no val samples"):
        find("--shards", two_shards, "--evaluate", split="val")
    (two_shards / "_info.json").write_text(index_text(num_samples=0, shard_lengths=[0, 0]))
    with pytest.raises(DataError, match="its index lists no train samples"):
        find("--shards", two_shards)


def test_missing_shard(find, two_shards):
    (two_shards / "b.tar").unlink()
    with pytest.raises(DataError, match=f"{two_shards}/b.tar: "):
        find("--shards", two_shards)


# ---------------------------------------------------------------------------- addresses


@pytest.fixture
def numbers_at(monkeypatch):
    """A function of main-wds.py's arguments that returns the numbers of all training samples, in the shards' order."""

    def numbers_at(*args):
        found = []
        for url, length in zip(*found_by(monkeypatch, "train", *args), strict=True):
            found += [int(sample["jpg"]) for sample in main_wds.read_tar(url, length)]
        return found

    return numbers_at


NUMBERS = list(range(sum(TRAIN)))
FOLDERS = ["plain", "a:b", "http:x", "with space", "größe/猫", "x[1]", "a{0..1}", "{}", "100%", "httpshards", "-x"]


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_any_name(name, numbers_at, tmp_path, monkeypatch):
    """Relative, absolute, with a slash at the end, and on a link."""
    (tmp_path / name).mkdir(parents=True)
    write_shards(tmp_path / name, train=TRAIN)
    monkeypatch.chdir(tmp_path)
    os.symlink(name, "link")
    for address in (name, f"{tmp_path}/{name}", f"./{name}/", "link"):
        assert numbers_at(f"--shards={address}") == NUMBERS, address


SERVED = {  # {address: the request for the index}
    "http://HOST/x": "/x/_info.json",
    "http://HOST/x/": "/x/_info.json",
    "http://HOST": "/_info.json",
    "http://HOST/x/{}?X-Amz-Signature=a/b%2Fc&n=1": "/x/_info.json?X-Amz-Signature=a/b%2Fc&n=1",
    "http://HOST/with space/größe": "/with%20space/gr%C3%B6%C3%9Fe/_info.json",
    "http://HOST/with%20space/{}": "/with%20space/_info.json",
}


@pytest.mark.parametrize("address", SERVED)
def test_address_on_a_server(address, server, numbers_at):
    write_shards(server.folder, train=TRAIN)
    assert numbers_at("--shards", address.replace("http://HOST", server.url)) == NUMBERS
    request = SERVED[address]
    shards = [request.replace("_info.json", name) for name in TRAIN_NAMES]
    assert server.requests == dict.fromkeys([request, *shards], 1)


class FaultServer6(FaultServer):
    address_family = socket.AF_INET6
    host = "::1"


def test_ipv6_address(numbers_at, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "::1,[::1]")
    write_shards(tmp_path, train=TRAIN)
    try:
        server = FaultServer6(tmp_path)
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert numbers_at("--shards", f"http://[::1]:{server.server_port}/x") == NUMBERS


def test_address_is_a_command(numbers_at, tmp_path, monkeypatch):
    """A program `aws` gets the names; a {} that occurs twice stands for the name twice."""
    shards = write_shards(tmp_path / "shards", train=TRAIN)
    aws = tmp_path / "aws"
    aws.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{shards}/${{3#s3://B/x/}}"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert numbers_at("--shards", "pipe:aws s3 cp s3://B/x/{} -") == NUMBERS
    assert numbers_at("--shards", f"pipe:test -e '{shards}/{{}}' && cat '{shards}/{{}}'") == NUMBERS


def test_index_elsewhere(numbers_at, server, tmp_path, monkeypatch):
    """At a path, also a relative one with a colon, or at a URL. It may list some of the shards."""
    shards = write_shards(tmp_path / "shards", train=TRAIN)
    elsewhere = tmp_path / "a:b"
    elsewhere.mkdir()
    index = json.loads((shards / "_info.json").read_text())
    entry = index["splits"]["train"]
    entry |= {"filenames": TRAIN_NAMES[3:], "shard_lengths": TRAIN[3:], "num_samples": sum(TRAIN[3:])}
    (elsewhere / "subset.json").write_text(json.dumps(index))
    (shards / "_info.json").unlink()
    server.folder = elsewhere
    monkeypatch.chdir(elsewhere.parent)
    for path in (elsewhere / "subset.json", "a:b/subset.json", f"{server.url}/any/subset.json?v=1"):
        assert numbers_at("--shards", shards, "--index", path) == NUMBERS[14:]
    server.folder = shards
    assert numbers_at("--shards", server.url, "--index", elsewhere / "subset.json") == NUMBERS[14:]


@pytest.mark.parametrize("option", ["--shards", "--index"])
def test_url_that_webdataset_cannot_open(option, tmp_path):
    message = error_of("main-wds.py", *SMALL, option, "s3://b/imagenet", cwd=tmp_path)
    assert message.startswith("main-wds.py: s3://b/imagenet") and "use a pipe: command" in message


UNUSABLE = ["pipe:cat shards", "http://x/y?sig=1", "http://127.0.0.1:port/x", "http://me:password@127.0.0.1/x", "none"]


def test_unusable_addresses(tmp_path):
    """Each is refused at once, and the error names the address."""
    for address in UNUSABLE:
        assert address in error_of("main-wds.py", *SMALL, "--shards", address, cwd=tmp_path)


# ---------------------------------------------------------------------------- the index


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
    "a float as length": index_text(shard_lengths=[2.0, 1]),
    "no list of classes": index_text()[:-1] + ', "classes": 5}',
    "wrong sum": index_text(num_samples=4),
    "name twice": index_text(filenames=["a.tar", "a.tar"]),
}
REFUSED = ["/tmp/a.tar", "../a.tar", "c/../../a.tar", "pipe:touch ran", "a.tar::pipe:touch ran", "http://x/a", "file:a"]
REFUSED += [
    "a;touch ran",
    "$(touch ran)",
    "`touch ran`",
    "a b.tar",
    "-a.tar",
    ".a.tar",
    "a\n.tar",
    "a.tar\n",
    "a?.tar",
    "",
]
INVALID_INDEXES |= {name: index_text(filenames=["a.tar", name]) for name in REFUSED}


@pytest.fixture
def two_shards(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar([]))
    (tmp_path / "_info.json").write_text(index_text())
    return tmp_path


@pytest.mark.parametrize("case", INVALID_INDEXES)
def test_invalid_index(case, find, two_shards, monkeypatch):
    """It is refused before any shard is opened: a name could climb out of the folder, or be a command."""
    monkeypatch.chdir(two_shards)
    assert find("--shards", two_shards) == {"a.tar": 2, "b.tar": 1}
    (two_shards / "_info.json").write_text(INVALID_INDEXES[case])
    for address in (two_shards, f"pipe:cat {two_shards}/{{}}"):
        with pytest.raises(DataError, match=r"_info\.json: (not an index|can't be read)"):
            find("--shards", address)
    assert sorted(path.name for path in two_shards.iterdir()) == ["_info.json", "a.tar", "b.tar"]


def test_names_that_are_accepted(find, tmp_path):
    (tmp_path / "a-1/b").mkdir(parents=True)
    names = ["a-1/b/c_0+=.tar", "größe.tar", "0.tar.gz", "_.tar"]
    for name in names:
        (tmp_path / name).write_bytes(tar([]))
    text = index_text(filenames=names, shard_lengths=[3, 0, 0, 0])
    (tmp_path / "_info.json").write_text(text)
    assert list(find("--shards", tmp_path).values()) == [3, 0, 0, 0]


def test_checksum_tells_shards_by_their_digests(tmp_path):
    """Not by their names. Without digests, names and lengths must do."""

    def checksum(**changes):
        (tmp_path / "_info.json").write_text(index_text(**changes))
        _, _, found, _ = main_wds.find_shards("http://127.0.0.1/x", "train", index=str(tmp_path / "_info.json"))
        return found

    digests = {"shard_sha256": ["1" * 64, "2" * 64]}
    assert checksum(**digests) == checksum(**digests, filenames=["c.tar", "d.tar"])
    assert checksum(**digests) != checksum(shard_sha256=["1" * 64, "3" * 64])
    assert checksum(**digests) != checksum()
    assert checksum() == checksum() != checksum(filenames=["c.tar", "d.tar"])
    assert checksum() != checksum(shard_lengths=[1, 2])
