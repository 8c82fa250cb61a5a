"""Servers that stumble, shards that attack, tars of random damage, and thirty epochs: every sample once, or its name.

Where a pause would make a test long, main-wds.py is run by seen.py or faults.py with shorter ones.
"""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of, free_port, load, run
from faults import Hang, Server, retries
from PIL import Image
from test_shards import column, samples, tar, write_shards

main_wds = load("main-wds.py")
DataError = main_wds.DataError
TRAIN, VAL = [13, 1, 17, 16], [4, 7]
INDEX, FIRST, THIRD, FOURTH, VALIDATION = (
    "_info.json",
    *(f"imagenet1k-train-000{i}.tar" for i in (0, 2, 3)),
    "imagenet1k-validation-01.tar",
)
FAST = ["-a", "shufflenet_v2_x0_5", "-j", 2, "-b", 16, "--image-size", 32, "--epochs", 1, "--seed", 1, "--no-accel"]
CHANGES = {"CHANGES": json.dumps({"PAUSES": [0.05, 0.1, 0.15, 0.2, 0.25], "TIMEOUT": 1.5})}
BRIEF = {"CHANGES": json.dumps({"PAUSES": [0.1, 0.2], "TIMEOUT": 1})}
QUIET = {"PYTHONWARNINGS": "error,ignore:This DataLoader will create", "no_proxy": "127.0.0.1"}


@pytest.fixture
def server(tmp_path):
    """Gives out tmp_path, until a test changes its folder."""
    server = Server(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------- each sample once, whatever happens

FAULTS = {  # of the first requests; the images' bytes are where all of these numbers lead
    "plain": {},
    "hangs up": {
        FIRST: [("cut", 30_000), ("cut", 200), ("reset", 50_000), 500],
        THIRD: [429, ("cut", 0), 503],
        FOURTH: [("bare", 20_000)],
        VALIDATION: [500, ("cut", 99)],
    },
    "stalls": {
        FIRST: [("stall", 30_000)],
        FOURTH: [("silent", 0)],
    },
    "lies": {
        FIRST: [("short", 40_000)],
        THIRD: [("long", 1 << 40)],
        FOURTH: [("slow", 700)] * 4,
        VALIDATION: [("long", 10_000)],
    },
}
UNNOTICED = ("long", "slow")  # all is there, and so all is well


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Shards of 61 KB to 79 KB, of samples that hold their number and some padding."""
    return write_shards(tmp_path_factory.mktemp("numbered"), b"%d" + b" " * 3000, train=TRAIN, validation=VAL)


def see(cases, *args, cwd, env=None):
    """(what each case's ranks saw, stderr): see seen.py."""
    args = ["-b", 5, "--epochs", 1, "--seed", 1, "--shuffle", 8, *args, "--cases", json.dumps(cases)]
    stdout, stderr = run("tests/seen.py", *args, cwd=cwd, env={**QUIET, **CHANGES, **(env or {})})
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
    return json.loads(stdout), stderr


def numbers(by_rank):
    """All that a case gave, but for the processes: each rank's samples and draws in their order."""
    epochs = [[*rank["train"], *rank["val"]] for rank in by_rank]
    return [[(column(epoch), column(epoch, 1)) for epoch in rank] for rank in epochs]


@pytest.mark.parametrize("ranks, workers", [(1, [2, 0]), (2, [2])])
def test_each_sample_once(ranks, workers, numbered, server, tmp_path):
    """As from the local files, in that order; and each request too many is one that a line on stderr tells of."""
    server.folder, names = numbered, [(n, name) for n in workers for name in FAULTS if n or name != "stalls"]
    url = lambda number, name: f"/{number}-{name.replace(' ', '-')}"  # noqa: E731
    for number, name in names:
        server.faults.update({f"{url(number, name)}/{file}": faults for file, faults in FAULTS[name].items()})
    cases = [{"shards": server.url + url(number, name), "workers": number} for number, name in names]
    cases += [{"shards": str(numbered), "workers": number} for number in workers]
    meet = ["--ranks", ranks, "-b", 5 * ranks, "--dist-url", f"file://{tmp_path}/store"]
    found, stderr = see(cases, *meet, cwd=tmp_path)
    locals_ = dict(zip(workers, found[len(names) :], strict=True))
    for local in locals_.values():
        whole = sorted(n for rank in local for n in column(rank["train"][0]))
        assert sorted(set(whole)) == list(range(47)) and len(whole) == math.ceil(47 / ranks) * ranks
        assert sorted(n for rank in local for n in column(rank["val"][0])) == list(range(47, 58))
    told = collections.Counter(url.removeprefix(server.url) for url, _, _ in retries(stderr))
    assert len(stderr.splitlines()) == told.total(), stderr
    for (number, name), other in zip(names, found, strict=False):
        assert numbers(other) == numbers(locals_[number]), name
        for file in [INDEX, *(path.name for path in numbered.glob("*.tar"))]:
            path, plain = f"{url(number, name)}/{file}", server.asked[f"{url(number, 'plain')}/{file}"]
            assert server.asked[path] == plain + told[path] and plain, path
            faults = sum(isinstance(fault, int) or fault[0] not in UNNOTICED for fault in FAULTS[name].get(file, ()))
            if number == 0:
                assert told[path] == faults, path
            else:  # a worker may have enough before it comes to the place
                assert (told[path] > 0) == (faults > 0) and told[path] <= faults, path


def test_a_command_that_fails_the_first_time(numbered, tmp_path):
    """Whatever it has given until then; a complete shard is as good as a file; and none is there in the end.

    Two workers read it, which stop at different places of it, and the main process alone.
    """
    script = '#!/bin/sh\nif mkdir "$2" 2>&-; then head -c "$3" "$1"; exit "$4"; fi\nexec cat "$1"\n'
    (tmp_path / "flaky").write_text(script)
    (tmp_path / "flaky").chmod(0o755)
    (tmp_path / "large.tar").write_bytes((numbered / THIRD).read_bytes() + bytes(1 << 20))
    fails = {"a": "30000 1", "b": "30000 0", "c": "0 1", "d": "10000000 7"}  # after so many bytes, with that status
    forms = ["%s", "pipe:cat %s", *(f"pipe:{tmp_path}/flaky %s {tmp_path}/{a}@ {how}" for a, how in fails.items())]
    lengths = {"large.tar": 17, VALIDATION: 7}  # the file's name is looked up wherever it stands in the command
    entry = {"num_samples": 24, "filenames": list(lengths), "shard_lengths": list(lengths.values())}
    (tmp_path / INDEX).write_text(json.dumps({"splits": {"train": entry}}))
    more = {"shards": str(tmp_path), "valshards": f"pipe:cat {numbered / VALIDATION}"}
    cases = [
        {"trainshards": form.replace("%s", f"{tmp_path}/large.tar").replace("@", str(workers)), "workers": workers}
        for workers, form in itertools.product((0, 2), forms)
    ]
    found, stderr = see([{**case, **more} for case in cases], cwd=tmp_path)
    for local, *others in (found[: len(forms)], found[len(forms) :]):
        assert sorted(column(local[0]["train"][0])) == list(range(14, 31))
        assert [numbers(other) for other in others] == [numbers(local)] * len(others), stderr
    told = retries(stderr)
    assert len(told) == len(stderr.splitlines()), stderr
    who = [url.split()[2].rpartition("/")[2] for url, _, _ in told]
    assert sorted(who) == ["a0", "a2", "b0", "b2", "c0", "c2"], stderr  # "d" fails after the whole shard
    assert processes(f"{tmp_path}/") == []


# ---------------------------------------------------------------------------- the network that comes of it


def weights(folder):
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]


def test_the_same_network(small, server, tmp_path):
    """Through cuts with the real pauses, which grow, and through a stall: equal to the last bit of its weights."""
    server.folder, shards = small / "shards", [f"imagenet-train-00000{i}.tar" for i in range(3)]
    server.faults = {
        f"/cut/{shards[0]}": [("cut", 900_000), ("cut", 800_000)],
        f"/cut/{shards[2]}": [("reset", 100_000)],
        f"/stall/{shards[1]}": [("stall", 700_000)],
        "/stall/imagenet-val-000000.tar": [("cut", 500)],
    }
    told = {}
    for name in ("local", "cut", "stall"):
        (tmp_path / name).mkdir()
        script, url = "tests/faults.py" if name == "stall" else "main-wds.py", f"{server.url}/{name}"
        args = [*FAST, "--shards", small / "shards" if name == "local" else url]
        _, stderr = run(script, *args, cwd=tmp_path / name, env={**QUIET, **CHANGES})
        told[name] = retries(stderr)
        assert len(told[name]) == len(stderr.splitlines()), stderr
    assert told["local"] == [] and len(told["stall"]) >= 2
    assert {pause for _, _, pause in told["stall"]} <= {"0.05", "0.1", "0.15"}
    first = [(what, pause) for url, what, pause in told["cut"] if url.endswith(shards[0])]
    assert first[0][1] == "1" and {"2"} <= {pause for _, pause in first[1:]} <= {"1", "2"}, told
    assert all(re.match(r"broken after \d+ of its 30 samples \(.+\)", what) for what, _ in first)
    local = weights(tmp_path / "local")
    for name in ("cut", "stall"):
        other = weights(tmp_path / name)
        assert local.keys() == other.keys() and all(torch.equal(local[key], other[key]) for key in local), name


# ---------------------------------------------------------------------------- a server that does not recover

NEVER = {  # the fault, the options, and what the last line tells
    "503": (503, ["-j", 0], "HTTP Error 503"),
    "cut": (("cut", 70_000), ["-j", 2, "--multiprocessing-distributed"], "unexpected end of data"),
    "stall": (("stall", 70_000), ["-j", 2], "timed out"),
}


def test_a_server_that_never_recovers(small, server, tmp_path):
    """Three tries for each who reads it, then status 2 and a last line with the shard and what happened, soon."""
    server.folder, shard = small / "shards", "imagenet-val-000000.tar"
    server.faults = {f"/{name}/{shard}": itertools.repeat(fault) for name, (fault, _, _) in NEVER.items()}

    def attempt(name):
        _, options, _ = NEVER[name]
        args = [*FAST, *options, "--dist-url", f"file://{tmp_path}/store", "--evaluate", "--shards"]
        return run("tests/faults.py", *args, f"{server.url}/{name}", cwd=tmp_path, status=2, env={**QUIET, **BRIEF})

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = dict(zip(NEVER, pool.map(attempt, NEVER), strict=True))
    assert time.monotonic() - started < 100  # most of it for starting
    for name, (_, _, expected) in NEVER.items():
        url, stderr = f"{server.url}/{name}/{shard}", ends[name][1]
        *others, last = [line for line in stderr.splitlines() if "Terminating process" not in line]
        assert last.startswith(f"faults.py: {url}: ") and expected in last and "broken after" in last, stderr
        assert others and all(line.startswith(f"{url}: ") and line.endswith(" s") for line in others), stderr
        readers = 1 if name == "503" else 2
        assert 3 <= server.asked[f"/{name}/{shard}"] <= 3 * readers
        assert len([pause for _, _, pause in retries(stderr) if pause == "0.2"]) in range(1, readers + 1)


@pytest.fixture
def read(server, monkeypatch, capfd, within):
    """Reads a shard of 8 samples, 40 KB each, from the server: (keys or error, number of requests, pauses told)."""
    server.content = tar(samples(range(8), b"%d" * 40_000))
    (server.folder / "a.tar").write_bytes(server.content)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(main_wds, "PAUSES", (0.01, 0.02))

    def read(faults, first=0, last=8):
        server.asked.clear()
        server.faults["/a.tar"] = faults
        within(20)
        try:
            found = [sample["__key__"] for sample in main_wds.read_shard(f"{server.url}/a.tar", 8, first, last)]
        except DataError as error:
            found = str(error)
            assert found.startswith(f"{server.url}/a.tar: ") and "\n" not in found
        within(0)
        return found, server.asked["/a.tar"], [float(pause) for _, _, pause in retries(capfd.readouterr().err)]

    return read


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_an_error_that_lasts(status, read):
    """The server will not give the shard: an error at once, after one request."""
    found, asked, told = read(itertools.repeat(status))
    assert f"HTTP Error {status}" in found and asked == 1 and not told


@pytest.mark.parametrize(
    "fault", [408, 429, 500, 503, ("cut", 0), ("reset", 100_000), ("bare", 200_000), ("short", 50_000)]
)
def test_tries_without_progress(fault, read):
    """One more than there are pauses; what a try gives a second time is no progress."""
    found, asked, told = read(itertools.repeat(fault))
    assert isinstance(found, str) and (asked, told) == (3, [0.01, 0.02])


def test_tries_with_progress(read, server):
    """They start anew with each new sample, so that a server that gives one more at a time ends no run."""
    each = len(server.content) // 8
    cuts = [("cut", each * i + 20_000) for i in range(2, 8)]
    expected = [f"{i:04d}" for i in range(8)]
    found, asked, told = read([cut for cut in cuts for _ in range(2)])
    assert (found, asked, told) == (expected, 1 + 2 * len(cuts), [0.01, 0.02] * len(cuts))
    found, asked, _ = read(cuts, first=7)  # samples that another worker reads are no progress
    assert isinstance(found, str) and asked == 3


def test_the_pauses():
    """They grow, and last as long as a storage service may take to restart."""
    assert main_wds.PAUSES[:5] == (1, 2, 4, 8, 16)
    assert list(main_wds.PAUSES) == sorted(main_wds.PAUSES) and 270 <= sum(main_wds.PAUSES) <= 330


def test_an_index_that_cannot_be_read(server, monkeypatch, capfd, within):
    """It is asked for once: none is there, or its URL and what is wrong, also if it was cut off without a word."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(main_wds, "TIMEOUT", 1)

    def error_at(url):
        within(20)
        with pytest.raises(DataError) as error:
            main_wds.list_shards(url, "train")
        within(0)
        return str(error.value)

    message = error_at(f"{server.url}/none")
    assert message.startswith(f"--shards {server.url}/none: no _info.json there")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        message = error_at(url)
        assert message.startswith(f"{url}/_info.json: ") and "refused" in message
    write_shards(server.folder, train=TRAIN)
    assert main_wds.list_shards(f"{server.url}/whole", "train")[1] == TRAIN
    faults = {"a": 503, "b": ("stall", 5), "c": ("cut", 70), "d": ("bare", 70), "e": ("short", 70)}
    for name, fault in faults.items():
        server.faults[f"/{name}/_info.json"] = [fault]
        message = error_at(f"{server.url}/{name}")
        assert message.startswith(f"{server.url}/{name}/_info.json: ") and "\n" not in message
        assert {"a": "503", "b": "timed out"}.get(name, "not an index") in message
    assert set(server.asked.values()) == {1} and capfd.readouterr().err == ""


# ---------------------------------------------------------------------------- what is left behind


def processes(mark):
    """Of all processes that name `mark` in their command line, and of this one's children that have ended unwaited."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if mark in command or (int(parent) == os.getpid() and state == "Z"):
            found.append(command or "a zombie")
    return found


def open_files():
    """What this process has open; each pipe and socket has a name of its own. Others than ours may close meanwhile."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder itself, once it is listed
            found.add(os.readlink(path))
    return found


@pytest.mark.parametrize("command", ["cat %s", "cat %s | cat", "curl -s file://%s", "cat %s; true"])
def test_no_command_outlives_its_shard(command, tmp_path, monkeypatch):
    """Where a worker needs a part, where the count is wrong, and where the tar is broken."""
    if not shutil.which(command.split()[0]):
        pytest.skip("no curl")
    content = tar(samples(range(5), b"%d" * 100_000))
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(content[:101_888] + b"x" * 9 + content[101_897:])
    url, files = "pipe:" + command, open_files()
    monkeypatch.setattr(main_wds, "PAUSES", ())
    assert len(list(main_wds.read_shard(url % f"{tmp_path}/a.tar", 5, 1, 3))) == 2
    for name, length in (("a", 4), ("b", 5)):
        with pytest.raises(DataError):
            list(main_wds.read_shard(url % f"{tmp_path}/{name}.tar", length, 0, length))
    assert processes(f"{tmp_path}/") == [] and open_files() <= files


def test_one_who_does_not_read_on(tmp_path, monkeypatch, capfd):
    """A command that complains of it, as curl does, is no reason to read it again."""
    (tmp_path / "a.tar").write_bytes(tar(samples(range(5), b"%d" * 100_000)) + bytes(1 << 20))
    monkeypatch.setattr(main_wds, "PAUSES", ())
    url = f"pipe:cat {tmp_path}/a.tar || exit 23"
    begun = main_wds.read_shard(url, 5, 0, 5)
    next(begun)
    begun.close()
    assert [len(list(main_wds.read_shard(url, 5, *piece))) for piece in ((0, 2), (1, 3), (3, 5))] == [2, 2, 2]
    assert capfd.readouterr().err == "" and processes(f"{tmp_path}/") == []


# ---------------------------------------------------------------------------- samples that are none


def picture(**options):
    """A JPEG, or what the options say, of 40 x 30 pixels."""
    image = io.BytesIO()
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(image, **{"format": "JPEG", **options})
    return image.getvalue()


BAD = {
    "class": (("0003.cls", b"1000"), "its class '1000' is not one"),
    "image": (("0003.jpg", picture()[:300]), "not a readable image"),
}


@pytest.mark.parametrize("bad, workers", [("image", 0), ("class", 2)])
def test_a_bad_sample_while_training(bad, workers, tmp_path):
    """In the main process, or in one of two workers: the shard and the key."""
    members = samples(range(8), picture())
    member, expected = BAD[bad]
    members[[name for name, _ in members].index(member[0])] = member
    write_shards(tmp_path, picture(), train=[8, 8], validation=[2])
    (tmp_path / "imagenet1k-train-0000.tar").write_bytes(tar(members))
    message = error_of("main-wds.py", *FAST, "-j", workers, "-b", 4, "--shards", tmp_path, cwd=tmp_path, env=QUIET)
    assert message.startswith(f"main-wds.py: {tmp_path}/{FIRST}: sample 0003") and expected in message


# ---------------------------------------------------------------------------- shards that attack


class Evil:
    """Runs a command where anyone unpickles it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def member(name, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def header(name, kind, size, change=()):
    """A header with a checksum that is right, whatever else is not."""
    block = bytearray(member(name, kind, size=size).tobuf(tarfile.GNU_FORMAT)[-512:])
    for place, data in change:
        block[place : place + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records, then):
    """A PAX header of these records, before the bytes of another."""
    text = b""
    for name, value in records.items():
        line = f" {name}={value}\n".encode()
        size = len(line) + 1
        while len(str(size)) + len(line) != size:
            size = len(str(size)) + len(line)
        text += str(size).encode() + line
    return header("pax", tarfile.XHDTYPE, len(text)) + text.ljust(-(-len(text) // 512) * 512, b"\0") + then


def resized(data, width, height):
    """A JPEG whose header lies about its size."""
    place = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2)) + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def disguised(data):
    """A JPEG with a small frame's header where only a parser looks that takes fill bytes for a marker."""
    place, body = 2 + 2 + 0xE1FF, bytearray(0xFFFD)
    start = 2 + 1 + 2  # of the segment's length field in the file
    fake = b"\xff\xc0\x00\x0b\x08\x00\x1e\x00\x28\x01\x01\x11\x00"
    body[place - start : place - start + len(fake)] = fake
    body[:2] = b"\xff\xfd"
    return data[:2] + b"\xff\xff\xe1" + bytes(body) + data[2:]


def png(width, height, *chunks):
    """A PNG of that size whose pixels are missing, and of the chunks given."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + size + b"".join(chunk(*each) for each in chunks) + pixels + chunk(b"IEND", b"")


HONEST = 4


def with_members(*extra):
    """A shard whose every honest sample has these members within it, their %s being its key."""
    members = []
    for i, each in enumerate(samples(range(HONEST), picture())):
        members.append(each)
        if i % 2 == 0:
            key = each[0].partition(".")[0]
            filled = [(m.replace(name="", deep=True) if isinstance(m, tarfile.TarInfo) else m, d) for m, d in extra]
            for (info, data), (original, _) in zip(filled, extra, strict=True):
                if isinstance(info, tarfile.TarInfo):
                    info.name = original.name.replace("%s", key)
                else:
                    info = info.replace("%s", key)
                members.append((info, data))
    return tar(members, tarfile.PAX_FORMAT)


def with_block(block):
    """A shard with these bytes between two samples."""
    whole = tar(samples(range(HONEST), picture()))
    place = whole.index(b"0002.cls")
    return whole[:place] + block + whole[place:]


def with_image(data):
    members = samples(range(HONEST), picture())
    members[5] = ("0002.jpg", data)
    return tar(members)


def renamed(form):
    """A shard whose sample 0002 has another key."""
    members = [(name.replace("0002", form), data) for name, data in samples(range(HONEST), picture())]
    return tar(members, tarfile.PAX_FORMAT)


def attacks(mark):
    """{name: (the shard, None or what its error tells)}; where one gets what it wants, the file `mark` is there."""
    evil = pickle.dumps(Evil(f"touch {mark}"))
    old = pickle.dumps(Evil(f"touch {mark}"), protocol=0)
    run_me = "__import__('os').system('touch pwned')"
    endings = ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "mp", "json", "cbor", "py", "so", "sh"]
    kinds = {
        "symlink": tarfile.SYMTYPE, "hard-link": tarfile.LNKTYPE, "character-device": tarfile.CHRTYPE,
        "block-device": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE,
    }  # fmt: skip
    links = {
        name: with_members(*[(member(f"%s.{e}", kind, linkname=t, devmajor=1, devminor=5), b"") for e in ("jpg", "cls")
                             for t in ("/etc/passwd", str(mark), "/dev/zero")])
        for name, kind in kinds.items()
    }  # fmt: skip
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.jpg", "GNU.sparse.realsize": "9"}
    plain = header("x.jpg", tarfile.REGTYPE, 512) + b"1\n0\n9\n".ljust(512, b"\0")
    deep = header("pax", tarfile.XHDTYPE, 512) + b"11 path=ab\n".ljust(512, b"\0")
    long = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 512) + b"name".ljust(512, b"\0")
    back = b"\xff" * 10 + struct.pack(">h", -512 * 3)
    shards = {
        "pickles": with_members(*((f"%s.{ending}", evil) for ending in endings)),
        "old-pickles": with_members(*((f"%s.{ending}", old) for ending in endings), ("%s.json.gz", old)),
        "python": with_members(("%s." + run_me, b""), ("%s.py", run_me.encode())),
        "python-key": (with_members((run_me + ".jpg", b""), ("__init__.py", run_me.encode())), "one image and one"),
        "commands": with_members(("%s.$(touch " + str(mark) + ")", b""), ("|touch " + str(mark), b"")),
        "hidden": with_members(("../.jpg", b"x"), ("..", b"x"), ("/", b"x"), ("a/../.cls", b"x"), (".jpg", b"x")),
        "hidden-at-the-top": (with_members(("/.x.jpg", b"x")), "one image and one class"),
        "webdataset's-keys": (with_members(("__url__.jpg", b"x"), ("__key__.cls", b"x")), "one image and one class"),
        "webdataset's-url": (with_members(("%s.__url__", b"pipe:touch x")), "duplicate file name"),
        "webdataset's-key": (with_members(("%s.__key__", b"x")), "duplicate file name"),
        "upwards": renamed(f"..{mark}"),
        "upwards-far": renamed("../" * 30 + str(mark).lstrip("/")),
        "absolute": renamed(str(mark)),
        **links,
        "old-sparse": (with_block(header("x.jpg", tarfile.GNUTYPE_SPARSE, 512, [(483, b"%011o\0" % 9)]) + bytes(512)),
                       "sample x"),
        "pax-sparse": (with_block(pax(sparse, plain)), "broken"),
        "pax-sparse-0": (with_block(pax({"GNU.sparse.size": "9", "GNU.sparse.map": "0,9"}, plain)), "sample x"),
        "empty-image": (with_image(b""), "sample 0002: not a readable image"),
        "lines-in-key": (
            tar([(name.replace("0002", "00\n02"), b"") for name, _ in samples([2])] + samples([3, 4, 5])),
            "sample ",
        ),
        "pickled-image": (with_image(evil), "sample 0002: not a readable image"),
        "large-jpeg": (with_image(resized(picture(), 65500, 65500)), "sample 0002: not a readable image"),
        "large-progressive": (with_image(resized(picture(progressive=True), 65500, 65500)), "sample 0002: not a"),
        "disguised-jpeg": (with_image(disguised(resized(picture(), 18000, 18000))), "sample 0002: not a readable"),
        "large-png": (with_image(png(60_000, 60_000)), "sample 0002: not a readable image"),
        "png-of-text": (with_image(png(40, 30, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9))] * 5)), "0002"),
        "large-webp": (with_image(b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/" + b"\xff" * 4 + bytes(13)), "sample 0002: not"),
        "text-for-class": (tar([("0.cls", old), ("0.jpg", picture())] * 1 + samples(range(1, 4), picture())), "class"),
        "sparse-backwards": (with_block(header("x.jpg", tarfile.GNUTYPE_SPARSE, 0, [(124, back)])), "broken"),
        "pax-backwards": (with_block(pax({"GNU.sparse.realsize": "0"},
                                         header("x.jpg", tarfile.REGTYPE, 0, [(124, back)]))), "broken"),
        "pax-negative": (with_block(pax({"size": "-1536"}, header("x.jpg", tarfile.REGTYPE, 0))), "broken"),
        "pax-huge": (with_block(pax({"size": str(1 << 70)}, header("x.jpg", tarfile.REGTYPE, 0))), "broken"),
        "pax-no-number": (with_block(pax({"GNU.sparse.realsize": "x"}, plain)), "broken"),
        "pax-of-1-PB": (with_block(header("pax", tarfile.XHDTYPE, 1 << 50)), "broken"),
        "name-of-1-GB": (with_block(header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 1 << 30)), "broken"),
        "name-of--256": (with_block(header("x", tarfile.GNUTYPE_LONGNAME, 0, [(124, b"\xff" * 11 + b"\0")])), ".tar: "),
        "folder-of-1-GB": with_block(header("x", tarfile.DIRTYPE, 1 << 30)),
        "file-of-1-GB": (with_block(header("x.jpg", tarfile.REGTYPE, 1 << 30)), "broken"),
        "large-sparse": (with_block(header("x.jpg", tarfile.GNUTYPE_SPARSE, 512, [(483, b"%011o\0" % (1 << 32))])
                                    + bytes(512)), "(MemoryError)"),
        "nested-pax": (with_block(deep * 2000), "broken"),
        "nested-names": (with_block(long * 2000), "broken"),
        "sparse-cut": (tar(samples([0]))[:2048] + header("x.jpg", tarfile.GNUTYPE_SPARSE, 0, [(482, b"\1")]), "broken"),
    }  # fmt: skip
    return {name: shard if isinstance(shard, tuple) else (shard, None) for name, shard in shards.items()}


ATTACKS = list(attacks(Path("/nowhere")))


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """{name: (what came, what was expected, MiB of growth)} of all attacks, each in a process of its own."""
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "shards").mkdir()
    (folder / "cwd").mkdir()
    shards = attacks(folder / "pwned")
    shards["none"] = (tar(samples(range(HONEST), picture())), None)
    for name, (content, _) in shards.items():
        (folder / "shards" / f"{name}.tar").write_bytes(content)
    before = sorted(folder.rglob("*"))
    arguments = [f"{folder}/shards/{name}.tar:{HONEST}" for name in shards]
    stdout, stderr = run("tests/faults.py", "read", *arguments, cwd=folder / "cwd", env={"PYTHONWARNINGS": "default"})
    results = zip(shards.items(), json.loads(stdout), strict=True)
    return {name: (found, folder, expected, grown) for (name, (_, expected)), (found, grown) in results} | {
        "files": (before, sorted(folder.rglob("*")), stderr)
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack(name, attacked):
    """All the honest samples, with their pixels, or one line with the shard; and 100 MiB more than without, at most."""
    found, folder, expected, grown = attacked[name]
    assert grown - attacked["none"][-1] < 100
    if expected:
        assert isinstance(found, str) and found.startswith(f"{folder}/shards/{name}.tar: "), found
        assert expected in found and not re.search("[\n<>{}]", found)  # objects, or the environment of a command
    else:
        assert isinstance(found, list), found
        assert [each[1:] for each in found] == [each[1:] for each in attacked["none"][0]]


def test_attacks_leave_nothing(attacked):
    """No file that was not there, beside the shards or where the process ran."""
    before, after, stderr = attacked["files"]
    assert after == before, stderr


# ---------------------------------------------------------------------------- damage at random

KEYS = [f"{i:04d}" for i in range(6)]


def originals():
    """[(the bytes of each member with its header, the samples)] of a tar in each format."""
    draw = random.Random(1)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        keys = [key + ("/é" * 60 if form != tarfile.USTAR_FORMAT and key == "0003" else "") for key in KEYS]
        images = [draw.randbytes(draw.randrange(900)) for _ in keys]
        members = [
            (f"{key}.{e}", d) for key, i in zip(keys, images, strict=True) for e, d in (("cls", b"3"), ("jpg", i))
        ]
        pieces = [tar([each], form)[:-1024].rstrip(b"\0") for each in members]
        pieces = [piece.ljust(-(-len(piece) // 512) * 512, b"\0") for piece in pieces]
        yield pieces, [{"__key__": key, "cls": b"3", "jpg": image} for key, image in zip(keys, images, strict=True)]


def flip(draw, pieces):
    data = bytearray(b"".join(pieces) + bytes(1024))
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(draw, pieces):
    data = b"".join(pieces) + bytes(1024)
    return data[: draw.randrange(len(data) - 512)]


def double(draw, pieces):
    """A piece of any length, or of whole blocks, comes a second time somewhere."""
    data, unit = b"".join(pieces) + bytes(1024), draw.choice((1, 512))
    start, end, place = (draw.randrange(len(data) // unit) * unit for _ in range(3))
    return data[:place] + data[min(start, end) : max(start, end)] + data[place:]


def lose(draw, pieces):
    data, unit = b"".join(pieces) + bytes(1024), draw.choice((1, 512))
    start, end = sorted(draw.randrange(len(data) // unit) * unit for _ in range(2))
    return data[:start] + data[end:]


def reorder(draw, pieces):
    return b"".join(draw.sample(pieces, len(pieces))) + bytes(1024)


FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155), (482, 13)]
VALUES = [b"", b"\0", b"0" * 11 + b"\0", b"77777777777\0", b"\x80" + bytes(10) + b"\1", b"\xff" * 12, b"-1", b"9" * 8]


def rewrite(draw, pieces):
    """A field of a header gets another value, mostly with the checksum that belongs to it."""
    pieces = list(pieces)
    place = draw.randrange(len(pieces))
    block = bytearray(pieces[place])
    start, length = draw.choice(FIELDS)
    value = draw.choice(
        [*VALUES, draw.randbytes(length), draw.choice([b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"7"])]
    )
    block[start : start + len(value[:length])] = value[:length]
    if draw.random() < 0.8:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    pieces[place] = bytes(block)
    return b"".join(pieces) + bytes(1024)


class Stream(io.RawIOBase):
    """What comes from afar: no file to seek in."""

    def __init__(self, data):
        self.data = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.data.read(size)


def test_a_stream_cut_anywhere(monkeypatch, capfd):
    """In a header, in data, or between two members: read again, and each sample once and whole."""
    monkeypatch.setattr(main_wds, "PAUSES", (0, 0))
    monkeypatch.setitem(main_wds.wds.gopen_schemes, "test", lambda *_: Stream(contents.pop()))
    for pieces, good in originals():
        whole = b"".join(pieces)
        wrong = []
        for cut in range(0, len(whole) + 1, 64):
            contents = [whole + bytes(1024), whole[:cut]]
            found = list(main_wds.read_shard("test://a.tar", len(good), 0, len(good)))
            if [{**sample, "__url__": "test://a.tar"} for sample in good] != found:
                wrong.append(cut)
            told = len(retries(capfd.readouterr().err))
            assert told == 1 or cut in wrong or cut == len(whole)  # where nothing but the end mark is missing
        assert not wrong, f"of {len(whole)} bytes"


@pytest.fixture
def within():
    """Ends what takes too long by an error that nothing takes for one of a shard."""

    def late(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def complaint(damage, url, good):
    """What is wrong with what read_shard makes of it; None if nothing is."""
    try:
        found = list(main_wds.read_shard(url, len(good), 0, len(good)))
    except DataError as error:
        return None if str(error).startswith(f"{url}: ") else f"unnamed: {error}"
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"
    if len(found) != len(good):
        return f"{len(found)} samples"
    if damage in (flip, cut):
        good = [{**sample, "__url__": url} for sample in good]
        if damage is flip:  # nothing in a tar tells whether what is in a file is right
            for sample in (*found, *good):
                sample.update(dict.fromkeys(sample.keys() & {"jpg", "cls"}, b""))
        wrong = [sample["__key__"] for sample, whole in zip(found, good, strict=True) if sample != whole]
        return f"other samples: {wrong}" if not all(key.startswith("0003/") for key in wrong) else None
    return None


@pytest.mark.parametrize("how", ["file", "stream"])
def test_damage_at_random(how, within, monkeypatch, tmp_path):
    """3000 tars: each gives as many samples as the index says or its name; no other error, no hang, nothing lost.

    Where bytes were flipped the keys are the same as well, but in a name that has a header of its own, which has no
    checksum; where the tar was cut the samples are the same altogether.
    """
    draw, complaints, url = random.Random(0), collections.Counter(), str(tmp_path / "a.tar")
    ends = collections.Counter()
    if how == "stream":
        url = "test://a.tar"
        monkeypatch.setattr(main_wds, "PAUSES", ())
        monkeypatch.setitem(main_wds.wds.gopen_schemes, "test", lambda *_: Stream(data))
    forms = list(originals())
    for _ in range(3000):
        pieces, good = draw.choice(forms)
        damage = draw.choice([flip, cut, double, lose, reorder, rewrite, rewrite])
        data = bytes(damage(draw, pieces))
        if how == "file":
            (tmp_path / "a.tar").write_bytes(data)
        within(2)
        what = complaint(damage, url, good)
        within(0)
        ends[damage.__name__] += 1
        if what:
            complaints[f"{damage.__name__}: {what}"] += 1
    assert not complaints, f"{complaints} of {ends}"


# ---------------------------------------------------------------------------- thirty epochs

EPOCHS, SIDE = 30, 128
BATCH = 8 * 3 * SIDE * SIDE // 1024  # KiB of a rank's batch as it comes from a worker


def family(pid):
    """The processes below this one, and itself."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
    found = [pid]
    for each in found:
        found += sorted(child for child, parent in parents.items() if parent == each)
    return found


def footprint(pid):
    """(KiB of a process's own memory, and of what it shares its part; open files)."""
    memory = re.findall(r"Pss_(?:Anon|Shmem): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return sum(map(int, memory)), len(os.listdir(f"/proc/{pid}/fd"))


def footprints(pid):
    found = {}
    for each in family(pid):
        with contextlib.suppress(OSError):  # it has ended
            found[each] = footprint(each)
    return found


def test_thirty_epochs(small, tmp_path):
    """From the fifth epoch on no process grows: of all 11, two ranks with two workers for each split among them.

    In six epochs, the median over all six, a process that kept a batch an epoch (384 KiB: 8 images of 128 x 128), or a
    file, would grow by six. What comes once, and what is on its way at the moment, does not change the median. The
    allocator gives back at once what is larger than 64 KiB; left to itself it keeps some MiB, now more and now fewer.
    """
    args = [*FAST, "-j", 4, "--epochs", EPOCHS, "--image-size", SIDE, "--shards", small / "shards"]
    args += ["--multiprocessing-distributed", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    env, table, started = {**os.environ, "OMP_NUM_THREADS": "1"}, [], time.monotonic()
    env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, *map(str, [ROOT / "main-wds.py", *args])]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(" * Acc@1"):
                table.append(footprints(process.pid))
    assert process.returncode == 0 and len(table) == EPOCHS
    print(f"{time.monotonic() - started:.0f} s; KiB and open files of each process after each epoch:")
    for epoch, row in enumerate(table, 1):
        print(f"{epoch:2}", *(f"{memory:6}/{files:2}" for memory, files in row.values()))
    steady = table[4:-1]  # after the last epoch the processes end
    for pid in set.intersection(*map(set, steady)):
        memory, files = zip(*(row[pid] for row in steady), strict=True)
        for values, most in ((memory, 5 * BATCH), (files, 4)):
            grown = statistics.median(after - before for before, after in zip(values, values[6:], strict=False))
            assert grown < most, (pid, values)
    assert len(set.intersection(*map(set, steady))) >= 11
