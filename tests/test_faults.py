"""Unreliable servers, failing commands, malicious and damaged shards: all samples, or an error that names the shard."""

import collections
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from commands import checkpoint, lines_of, load, run, spawned_ranks, torchrun, wait_until
from make_data import picture, samples, tar, write_shards
from print_samples import assert_complete, column, load_samples, order_and_draws

main_wds = load("main-wds.py")
DataError = main_wds.DataError
INDEX = "_info.json"
TRAIN = [f"imagenet-train-00000{i}.tar" for i in range(4)]
VAL = [f"imagenet-validation-00000{i}.tar" for i in range(2)]
FAST = ["-a", "shufflenet_v2_x0_5", "-j", 2, "-b", 16, "--image-size", 32, "--epochs", 1, "--seed", 1, "--no-accel"]
SHORT_PAUSES = [0.05, 0.1, 0.15, 0.2, 0.25]


def retries(stderr):
    """[(url, pause)] of the lines that announce one."""
    return re.findall(r"^(.+?): .*; retrying in (\S+) s$", stderr, re.M)


# ---------------------------------------------------------------------------- temporary faults


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Shards of 61 to 79 KB, except for one with a single sample. An image is the sample's number, and padding."""
    image = b"%d" + b" " * 3000
    return write_shards(tmp_path_factory.mktemp("numbered"), image, train=[13, 1, 17, 16], validation=[4, 7])


FAULTS = {
    "none": {},
    "disconnects": {
        TRAIN[0]: [("cut", 30_000), ("cut", 200), ("reset", 50_000), 500],
        TRAIN[2]: [429, ("cut", 0), 503],
        TRAIN[3]: [("unsized", 20_000)],
        VAL[1]: [500, ("cut", 99)],
    },
    "wrong-lengths": {
        TRAIN[0]: [("short", 40_000)],
        TRAIN[2]: [("long", 1 << 40)],
        TRAIN[3]: [("slow", 700)] * 4,
        VAL[1]: [("long", 10_000)],
    },
}


def needs_retry(fault):
    return isinstance(fault, int) or fault[0] not in ("long", "slow")  # these send all there is


@pytest.mark.parametrize("ranks, workers", [(1, [0, 2]), (2, [2])])
@pytest.mark.slow
def test_temporary_server_faults(ranks, workers, numbered, server, tmp_path):
    """The ranks get the same batches as from local files. Each retry is one line on stderr, and there are no others."""
    server.folder = numbered
    cases = []
    for number in workers:
        cases.append({"workers": number, "shards": str(numbered)})
        for name, faults in FAULTS.items():
            cases.append({"workers": number, "shards": f"{server.url}/{name}/{number}"})
            server.faults.update({f"/{name}/{number}/{file}": of_file for file, of_file in faults.items()})
    args = ["--epochs", 1, "--shuffle", 8]
    found, stderr = load_samples(cases, *args, cwd=tmp_path, ranks=ranks, constants={"PAUSES": SHORT_PAUSES})
    retried = collections.Counter(url.removeprefix(server.url) for url, _ in retries(stderr))
    assert len(stderr.splitlines()) == retried.total(), stderr
    results = iter(found)
    for number in workers:
        local = next(results)
        assert_complete(local)
        for name, faults in FAULTS.items():
            assert order_and_draws(next(results)) == order_and_draws(local), name
            for file in (INDEX, *TRAIN, *VAL):
                path = f"/{name}/{number}/{file}"
                without_faults = server.requests[f"/none/{number}/{file}"]
                assert without_faults > 0
                assert server.requests[path] == without_faults + retried[path], path
                expected = sum(needs_retry(fault) for fault in faults.get(file, []))
                if number == 0:
                    assert retried[path] == expected, path
                else:  # a worker may have all its samples before the connection breaks
                    assert min(expected, 1) <= retried[path] <= expected, path


@pytest.mark.slow
def test_stalled_server(numbered, server, tmp_path):
    """After a timeout the shard is read again; the batches are the same as from local files."""
    server.folder = numbered
    server.faults = {f"/{TRAIN[0]}": [("stall", 30_000)], f"/{TRAIN[3]}": [("silent", 0)]}
    cases = [{"shards": str(numbered)}, {"shards": server.url}]
    constants = {"PAUSES": SHORT_PAUSES, "TIMEOUT": 5}
    args = ["--epochs", 1, "--shuffle", 8, "-j", 2]
    (local, remote), stderr = load_samples(cases, *args, cwd=tmp_path, constants=constants)
    assert order_and_draws(remote) == order_and_draws(local)
    assert {server.url + path for path in server.faults} <= {url for url, _ in retries(stderr)}, stderr


FLAKY = """#!/bin/sh
# flaky SHARD MARK BYTES STATUS: print so many bytes and exit with that status or, if MARK exists, print everything
if mkdir "$2" 2>&-; then head -c "$3" "$1"; exit "$4"; fi
exec cat "$1"
"""
FIRST_RUNS = ["30000 1", "30000 0", "0 1", "10000000 7"]  # bytes and status; the last one prints everything


def test_command_that_fails_once(numbered, tmp_path):
    """The batches are the same as from the file; no process is left."""
    flaky = tmp_path / "flaky"
    flaky.write_text(FLAKY)
    flaky.chmod(0o755)
    shard = tmp_path / "large.tar"
    shard.write_bytes((numbered / TRAIN[2]).read_bytes() + bytes(1 << 20))
    shutil.copy(numbered / VAL[1], tmp_path)
    splits = {}
    for split, name, length in (("train", "large.tar", 17), ("validation", VAL[1], 7)):
        splits[split] = {"num_samples": length, "filenames": [name], "shard_lengths": [length]}
    (tmp_path / INDEX).write_text(json.dumps({"splits": splits}))
    cases = []
    for workers in (0, 2):
        addresses = [str(tmp_path), f"pipe:cat {tmp_path}/{{}}"]
        for i, first_run in enumerate(FIRST_RUNS):
            mark = f"{tmp_path}/mark-{workers}-{i}-{{}}"
            command = f"case {{}} in large.tar) {flaky} {shard} {mark} {first_run};; *) cat {tmp_path}/{{}};; esac"
            addresses.append(f"pipe:{command}")
        cases += [{"workers": workers, "shards": address, "index": f"{tmp_path}/{INDEX}"} for address in addresses]
    args = ["--epochs", 1, "--shuffle", 8]
    found, stderr = load_samples(cases, *args, cwd=tmp_path, constants={"PAUSES": SHORT_PAUSES})
    for local, *others in (found[:6], found[6:]):
        assert sorted(column(local[0]["train"][0])) == list(range(14, 31))
        for other in others:
            assert order_and_draws(other) == order_and_draws(local), stderr
    marks = [re.search(r"mark-\d-\d", url)[0] for url, _ in retries(stderr)]
    assert sorted(marks) == [f"mark-{workers}-{i}" for workers in (0, 2) for i in range(3)], stderr
    assert len(stderr.splitlines()) == len(marks), stderr
    assert processes_with(f"{tmp_path}/") == []


@pytest.mark.slow
def test_same_weights_despite_disconnects(small, server, tmp_path):
    """Training from a server that disconnects gives bitwise the weights of training from local shards."""
    server.folder = small / "shards"
    server.faults = {
        "/imagenet-train-000000.tar": [("cut", 900_000), ("cut", 800_000)],
        "/imagenet-train-000002.tar": [("reset", 100_000)],
        "/imagenet-val-000000.tar": [("cut", 500)],
    }
    weights = []
    for name, shards in (("local", small / "shards"), ("remote", server.url)):
        folder = tmp_path / name
        folder.mkdir()
        _, stderr = run("main-wds.py", *FAST, "--shards", shards, cwd=folder)
        weights.append(checkpoint(folder)["state_dict"])
    assert {url for url, _ in retries(stderr)} == {server.url + path for path in server.faults}
    assert len(retries(stderr)) == len(stderr.splitlines())
    local, remote = weights
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[name], remote[name]) for name in local)


# ---------------------------------------------------------------------------- permanent faults


@pytest.mark.parametrize("ranks", [1, 2])
def test_shard_that_disappears(ranks, small, server, tmp_path):
    """Exit status 2; the last line names the shard and the reason, the others are retries."""
    server.folder = small / "shards"
    path = "/imagenet-val-000000.tar"
    server.faults = {path: [("cut", 70_000)] * ranks + [404] * 9}
    options = ["-j", 2, *spawned_ranks()] if ranks == 2 else ["-j", 0]
    _, stderr = run("main-wds.py", *FAST, *options, "--evaluate", "--shards", server.url, cwd=tmp_path, status=2)
    *others, last = lines_of(stderr)
    assert last.startswith(f"main-wds.py: {server.url}{path}: can't be read (HTTP Error 404")
    assert others and {url for url, _ in retries("\n".join(others))} == {server.url + path}
    assert len(retries(stderr)) == len(others)


@pytest.fixture
def read(server, monkeypatch, capfd):
    """A function that reads a shard of 8 samples: (keys or error, number of requests, announced pauses)."""
    content = tar(samples(range(8), b"%d" * 40_000))
    (server.folder / "a.tar").write_bytes(content)
    monkeypatch.setattr(main_wds, "PAUSES", (0.01, 0.02))

    def read(faults, first=0, last=8):
        server.requests.clear()
        server.faults["/a.tar"] = faults
        try:
            found = [sample["__key__"] for sample in main_wds.read_shard(f"{server.url}/a.tar", 8, range(first, last))]
        except DataError as error:
            found = str(error)
            assert found.startswith(f"{server.url}/a.tar: ") and "\n" not in found
        pauses = [float(pause) for _, pause in retries(capfd.readouterr().err)]
        return found, server.requests["/a.tar"], pauses

    return read


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_permanent_http_error_is_not_retried(status, read):
    found, requests, pauses = read([status] * 9)
    assert f"HTTP Error {status}" in found
    assert requests == 1 and pauses == []


TEMPORARY = [408, 429, 500, 503, ("cut", 0), ("reset", 20_000), ("unsized", 200_000), ("short", 50_000)]
TEMPORARY += [("stall", 20_000), ("silent", 0)]  # 20 KB are less than a sample


@pytest.mark.parametrize("fault", TEMPORARY)
def test_retries_end_without_progress(fault, read, monkeypatch):
    """One retry per pause; samples that were read before are no progress."""
    if fault in (("stall", 20_000), ("silent", 0)):
        monkeypatch.setattr(main_wds, "TIMEOUT", 0.5)
    found, _, pauses = read([fault] * 9)
    assert isinstance(found, str)
    assert pauses == [0.01, 0.02]


def test_progress_resets_the_retries(read):
    """A server that sends one more sample per request does not end the run, also if these samples are skipped."""
    size = len(tar(samples(range(8), b"%d" * 40_000))) // 8
    cuts = [("cut", size * i + 20_000) for i in range(2, 8)]
    twice = [cut for cut in cuts for _ in range(2)]
    assert read(twice) == ([f"{i:04d}" for i in range(8)], 1 + len(twice), [0.01, 0.02] * len(cuts))
    assert read(cuts, first=7) == (["0007"], 1 + len(cuts), [0.01] * len(cuts))


def index_error(url):
    with pytest.raises(DataError) as error:
        main_wds.find_shards(url, "train")
    return str(error.value)


INDEX_FAULTS = [503, 429, ("reset", 5), ("stall", 5), ("silent", 0), ("cut", 70), ("unsized", 70), ("short", 70)]


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_index_is_read_again(fault, server, monkeypatch, capfd):
    """After each pause, like a shard. If it still fails, the error names its URL."""
    write_shards(server.folder, train=[13, 1])
    monkeypatch.setattr(main_wds, "PAUSES", (0.01, 0.02))
    if fault in (("stall", 5), ("silent", 0)):
        monkeypatch.setattr(main_wds, "TIMEOUT", 0.5)
    url = f"{server.url}/faulty"
    server.faults[f"/faulty/{INDEX}"] = [fault, fault]
    assert main_wds.find_shards(url, "train")[1] == [13, 1]
    assert retries(capfd.readouterr().err) == [(f"{url}/{INDEX}", "0.01"), (f"{url}/{INDEX}", "0.02")]
    server.requests.clear()
    server.faults[f"/faulty/{INDEX}"] = [fault] * 9
    message = index_error(url)
    assert message.startswith(f"{url}/{INDEX}: can't be read (") and "\n" not in message
    assert server.requests[f"/faulty/{INDEX}"] == 3
    assert len(retries(capfd.readouterr().err)) == 2


def test_signal_while_the_index_is_read_again(start, monkeypatch):
    """It ends the run at once: there is no step yet after which it could stop."""
    run = start(*FAST, "--shards", "http://127.0.0.1:9")
    wait_until(lambda: "retrying in 2 s" in run.output(), run.output)
    _, lines = run.kill(signal.SIGINT).finish(128 + signal.SIGINT, lines=None)
    assert all("refused" in line for line in lines)


def test_missing_index_or_server(server, monkeypatch):
    message = index_error(server.url)
    assert message.startswith(f"{server.url}/{INDEX}: can't be read (HTTP Error 404") and "check --shards" in message
    assert server.requests == {f"/{INDEX}": 1}
    monkeypatch.setattr(main_wds, "PAUSES", (0,))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        message = index_error(url)
    assert message.startswith(f"{url}/{INDEX}: ") and "refused" in message


def test_command_that_fails_to_print_the_index(tmp_path, monkeypatch, capfd):
    """Its exit status is named."""
    monkeypatch.setattr(main_wds, "PAUSES", (0,))
    write_shards(tmp_path, train=[13, 1])
    for command in ("exit 7; {}", f"cat {tmp_path}/{{}}; exit 7"):
        assert index_error(f"pipe:{command}").startswith(f"pipe:{command.replace('{}', INDEX)}: can't be read (exit 7)")
    assert len(retries(capfd.readouterr().err)) == 2


def test_control_characters_of_a_server_are_escaped(start, tmp_path, monkeypatch):
    """They could change the terminal, or forge lines."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        run = start(*FAST, "--shards", f"http://127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 404 \x1b[31mred\x9b2J\r\n\r\n")
        _, (line,) = run.finish(status=2, lines=1)
    assert "HTTP Error 404: \\x1b[31mred\\x9b2J" in line and line.isprintable()


# ---------------------------------------------------------------------------- processes and files of commands


def processes_with(text):
    """The command lines that contain the text, and this process's zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (folder / "stat").read_text().rpartition(") ")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if text in command or (int(parent) == os.getpid() and state == "Z"):
            found.append(command or "a zombie")
    return found


def open_files():
    """What this process has open; each pipe and socket has its own name."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself
            found.add(os.readlink(path))
    return found


@pytest.mark.parametrize("command", ["cat %s", "cat %s | cat", "curl -s file://%s", "cat %s; true"])
def test_no_command_outlives_its_shard(command, tmp_path, monkeypatch):
    """If only a part is read, if reading is abandoned, if the number of samples is wrong, and if the tar is damaged."""
    if not shutil.which(command.split()[0]):
        pytest.skip("needs curl")
    content = tar(samples(range(5), b"%d" * 100_000))
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "damaged.tar").write_bytes(content[:101_888] + b"x" * 9 + content[101_897:])
    monkeypatch.setattr(main_wds, "PAUSES", ())
    files = open_files()
    url = "pipe:" + command
    assert len(list(main_wds.read_shard(url % f"{tmp_path}/a.tar", 5, range(1, 3)))) == 2
    reader = main_wds.read_shard(url % f"{tmp_path}/a.tar", 5, range(5))
    next(reader)
    del reader
    for name, length in (("a.tar", 4), ("damaged.tar", 5)):
        with pytest.raises(DataError):
            list(main_wds.read_shard(url % f"{tmp_path}/{name}", length, range(length)))
    assert processes_with(f"{tmp_path}/") == []
    assert open_files() <= files


# ---------------------------------------------------------------------------- malicious shards

GOOD = samples(range(4), picture())
REGULAR = tarfile.REGTYPE
SPARSE = tarfile.GNUTYPE_SPARSE
LONG_NAME = tarfile.GNUTYPE_LONGNAME
PAX = tarfile.XHDTYPE
NOT_FILES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def padded(data):
    """The data in whole blocks of a tar."""
    return data + bytes(-len(data) % 512)


def header(name, kind, size, changes=()):
    """A tar header with these changes (offset, data), and the checksum that belongs to it."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    for offset, data in changes:
        block[offset : offset + len(data)] = data
    return with_checksum(block)


def with_checksum(block):
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(record, value):
    """A PAX header with one record."""
    text = f" {record}={value}\n".encode()
    text = b"%d" % (len(text) + 2) + text  # its own length, of two digits
    return header("pax", PAX, len(text)) + padded(text)


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.devmajor = 1
    info.devminor = 5  # /dev/zero
    return info, b""


def with_members(make_members):
    """A shard with further members within each sample: make_members(key) returns them."""
    members = []
    for label, image in zip(GOOD[::2], GOOD[1::2], strict=True):
        members += [label, *make_members(label[0].removesuffix(".cls")), image]
    return tar(members, tarfile.PAX_FORMAT)


def with_block(block):
    """A shard with these bytes between two samples."""
    whole = tar(GOOD)
    place = whole.index(b"0002.cls")
    return whole[:place] + block + whole[place:]


def with_image(data):
    """A shard with this data as the image of sample 0002."""
    return tar([(name, data if name == "0002.jpg" else content) for name, content in GOOD])


def with_key(key):
    """A shard with this key instead of 0002."""
    return tar([(name.replace("0002", key), data) for name, data in GOOD], tarfile.PAX_FORMAT)


def png(width, height):
    """A PNG that claims this size but has few pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")):
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


def harmless_shards(created):
    """{name: a shard that yields its four samples}. One that was executed or unpacked would create that file."""
    pickled = pickle.dumps(Evil(f"touch {created}"))
    code = f"__import__('os').system('touch {created}')"
    endings = ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "mp", "json", "cbor", "so", "sh"]
    commands = ["%s.py", f"%s.{code}", f"%s.$(touch {created})", f"|touch {created}"]
    hidden = ["../.jpg", "..", "/", "a/../.cls", ".jpg"]
    links = list(itertools.product(("jpg", "cls"), NOT_FILES, ("/etc/passwd", str(created), "/dev/zero")))
    return {
        "pickles": with_members(lambda key: [(f"{key}.{ending}", pickled) for ending in endings]),
        "commands": with_members(lambda key: [(name.replace("%s", key), code.encode()) for name in commands]),
        "hidden files": with_members(lambda key: [(name, b"x") for name in hidden]),
        "links and devices": with_members(
            lambda key: [link(f"{key}.{ending}", kind, target) for ending, kind, target in links]
        ),
        "key above the folder": with_key(f"..{created}"),
        "absolute key": with_key(str(created)),
        "folder of 1 GB": with_block(header("x", tarfile.DIRTYPE, 1 << 30)),
    }


def refused_shards():
    """{name: (a shard, what its error says)}"""
    large_jpeg = picture().replace(b"\x08" + struct.pack(">HH", 30, 40), b"\x08" + struct.pack(">HH", 65500, 65500), 1)
    lines_in_key = [(name.replace("0002", "00\n02"), b"") for name, _ in samples([2])]
    sparse_of_4_gb = header("x.jpg", SPARSE, 512, [(483, b"%011o\0" % (1 << 32))]) + bytes(512)
    return {
        "url of webdataset": (with_members(lambda key: [(f"{key}.__url__", b"pipe:touch x")]), "duplicate file name"),
        "pickled image": (with_image(pickle.dumps(Evil("true"))), "sample 0002: not a readable image"),
        "pickled class": (tar([("0000.cls", pickle.dumps(Evil("true"))), *GOOD[1:]]), "sample 0000: its class"),
        "lines in a key": (tar([*lines_in_key, *samples([3, 4, 5])]), "sample 00\n02"),  # escaped when it is printed
        "large jpeg": (with_image(large_jpeg), "sample 0002: not a readable image"),
        "large png": (with_image(png(60_000, 60_000)), "sample 0002: not a readable image"),
        "file of 1 GB": (with_block(header("x.jpg", REGULAR, 1 << 30)), "can't be read"),
        "name of 1 GB": (with_block(header("././@LongLink", LONG_NAME, 1 << 30)), "can't be read"),
        "pax header of 1 PB": (with_block(header("pax", PAX, 1 << 50)), "can't be read"),  # Python 3.12 ends there
        "sparse file of 4 GB": (with_block(sparse_of_4_gb), "(MemoryError)"),
        "negative size": (with_block(header("x", LONG_NAME, 0, [(124, b"\xff" * 11 + b"\0")])), ".tar: "),
        "negative pax size": (with_block(pax("size", -1536) + header("x.jpg", REGULAR, 0)), ".tar: "),
        "huge pax size": (with_block(pax("size", 1 << 70) + header("x.jpg", REGULAR, 0)), "can't be read"),
        "pax size, not a number": (with_block(pax("GNU.sparse.realsize", "x") + header("x.jpg", REGULAR, 0)), ".tar: "),
        "truncated sparse file": (tar(samples([0]))[:2048] + header("x.jpg", SPARSE, 0, [(482, b"\1")]), ".tar: "),
        "nested pax headers": (with_block(pax("path", "ab") * 2000), "can't be read"),
    }


HARMLESS = list(harmless_shards("/created"))
REFUSED = {name: message for name, (_, message) in refused_shards().items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{name of a shard: (result, growth in MiB)}, each from a process of its own: see read_isolated.py."""
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "shards").mkdir()
    (folder / "cwd").mkdir()
    shards = {"good": tar(GOOD), **harmless_shards(folder / "created")}
    shards |= {name: shard for name, (shard, _) in refused_shards().items()}
    for name, content in shards.items():
        (folder / "shards" / f"{name}.tar").write_bytes(content)
    before = sorted(folder.rglob("*"))
    arguments = [f"{folder}/shards/{name}.tar:4" for name in shards]
    stdout, stderr = run("tests/read_isolated.py", *arguments, cwd=folder / "cwd", env={"PYTHONWARNINGS": "default"})
    assert sorted(folder.rglob("*")) == before, stderr  # nothing was executed or unpacked
    return dict(zip(shards, json.loads(stdout), strict=True))


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_shard_is_read(name, results):
    """The classes and pixels are those of the good shard. It takes at most 100 MiB more memory."""
    found, growth = results[name]
    expected, usual = results["good"]
    assert isinstance(found, list), found
    assert [sample[1:] for sample in found] == [sample[1:] for sample in expected]
    assert growth - usual < 100


@pytest.mark.parametrize("name", REFUSED)
def test_malicious_shard_is_refused(name, results):
    """The error names the shard, without Python objects. It takes at most 100 MiB more memory."""
    found, growth = results[name]
    assert isinstance(found, str), found
    assert re.search(rf"/shards/{name}\.tar: ", found) and REFUSED[name] in found
    assert not re.search("[<>{}]", found)
    assert growth - results["good"][1] < 100


# ---------------------------------------------------------------------------- shards with random damage


def originals():
    """For each tar format, (the members' bytes with their headers, the samples that read_shard() yields)."""
    draw = random.Random(1)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = []
        good = []
        for key in ("0000", "0001", "0002", "0003", "0004", "0005"):
            if key == "0003" and form != tarfile.USTAR_FORMAT:
                key += "/é" * 60  # so long that it has a header of its own
            image = draw.randbytes(draw.randrange(900))
            members += [(f"{key}.cls", b"3"), (f"{key}.jpg", image)]
            good.append({"__key__": key, "cls": b"3", "jpg": image})
        yield [padded(tar([member], form).rstrip(b"\0")) for member in members], good


def joined(pieces):
    return b"".join(pieces) + bytes(1024)


def flip_bits(draw, pieces):
    data = bytearray(joined(pieces))
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def remove_part(draw, pieces):
    """Remove some bytes, or some blocks."""
    data = joined(pieces)
    unit = draw.choice((1, 512))
    start, end = sorted(draw.randrange(len(data) // unit) * unit for _ in range(2))
    return data[:start] + data[end:]


FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155), (482, 13)]
VALUES = [b"", b"\0", b"0" * 11 + b"\0", b"77777777777\0", b"\x80" + bytes(10) + b"\1", b"\xff" * 12, b"-1", b"9" * 8]
TYPES = [b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"7"]


def change_field(draw, pieces):
    """Change a field (offset, length) of a header, mostly with the checksum that belongs to it."""
    pieces = list(pieces)
    place = draw.randrange(len(pieces))
    block = bytearray(pieces[place][:512])
    offset, length = draw.choice(FIELDS)
    value = draw.choice([*VALUES, draw.randbytes(length), draw.choice(TYPES)])[:length]
    block[offset : offset + len(value)] = value
    if draw.random() < 0.8:
        block = with_checksum(block)
    pieces[place] = bytes(block) + pieces[place][512:]
    return joined(pieces)


class Stream(io.RawIOBase):
    """A stream that cannot seek, as from a server."""

    def __init__(self, data):
        self.data = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.data.read(size)


def test_stream_truncated_anywhere(monkeypatch, capfd):
    """In a header, in data, or between two members: one retry, and each sample once."""
    responses = []
    monkeypatch.setattr(main_wds, "PAUSES", (0, 0))
    monkeypatch.setitem(main_wds.wds.gopen_schemes, "test", lambda *_: Stream(responses.pop(0)))
    for pieces, good in originals():
        good = [{**sample, "__url__": "test://a.tar"} for sample in good]
        whole = b"".join(pieces)
        for size in range(0, len(whole), 64):
            responses[:] = [whole[:size], whole]
            assert list(main_wds.read_shard("test://a.tar", len(good), range(len(good)))) == good, size
            assert len(retries(capfd.readouterr().err)) == 1, size


def check_damaged(url, length):
    """Assert that read_shard() yields the right number of samples, or raises a DataError that names the shard."""
    try:
        found = list(main_wds.read_shard(url, length, range(length)))
    except DataError as error:
        assert str(error).startswith(f"{url}: ")
    else:
        assert len(found) == length


@pytest.mark.parametrize("source", ["file", "stream"])
@pytest.mark.slow
def test_random_damage(source, monkeypatch, tmp_path):
    """Each of 3000 tars is read or refused, without another error or a hang."""
    draw = random.Random(0)
    url = str(tmp_path / "a.tar")
    if source == "stream":
        url = "test://a.tar"
        monkeypatch.setattr(main_wds, "PAUSES", ())
        monkeypatch.setitem(main_wds.wds.gopen_schemes, "test", lambda *_: Stream(data))
    forms = list(originals())
    for number in range(3000):
        pieces, good = draw.choice(forms)
        damage = draw.choice([flip_bits, remove_part, change_field])
        data = damage(draw, pieces)
        if source == "file":
            (tmp_path / "a.tar").write_bytes(data)
        try:
            check_damaged(url, len(good))
        except BaseException as error:
            raise AssertionError(f"tar {number}, {damage.__name__}") from error


# ---------------------------------------------------------------------------- many epochs

EPOCHS = 14
IMAGE_SIZE = 192
BATCH_KIB = 8 * 3 * IMAGE_SIZE * IMAGE_SIZE // 1024  # per rank


def is_stopped(pid):
    """Whether a process was stopped by SIGSTOP."""
    try:
        return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return False


def footprint(pid):
    """(KiB of a process's private memory and its part of shared memory, number of open files)"""
    memory = re.findall(r"Pss_(?:Anon|Shmem): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return sum(map(int, memory)), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
def test_processes_do_not_grow(small, start):
    """Two ranks with two workers per split, over 14 epochs: neither memory nor open files grow after the eighth.

    Growth is the difference between the medians of three epochs and of the three before. A process that kept a batch or
    a file per epoch would grow by three. By its settings, malloc returns freed memory at once.
    """
    args = [*FAST, "-j", 4, "--epochs", EPOCHS, "--image-size", IMAGE_SIZE, "--shards", small / "shards"]
    env = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
    run = start(*args, script="tests/stop_after_epochs.py", before=torchrun(), env=env)
    epochs = []
    for _ in range(EPOCHS):
        wait_until(lambda: sum(map(is_stopped, run.alive())) == 2, run.output)
        processes = run.alive()
        epochs.append({pid: footprint(pid) for pid in processes})
        for pid in filter(is_stopped, processes):
            os.kill(pid, signal.SIGCONT)
    run.finish()
    for number, found in enumerate(epochs, 1):  # for a failure's report
        print(number, *found.values())
    steady = epochs[8:]
    pids = set.intersection(*map(set, steady))
    assert len(pids) >= 11  # the launcher, two ranks and their eight workers
    for pid in pids:
        for which, limit in ((0, 2 * BATCH_KIB), (1, 2)):
            values = [found[pid][which] for found in steady]
            growth = statistics.median(values[3:]) - statistics.median(values[:3])
            assert growth < limit, (pid, values)
