#!/usr/bin/env python3
"""For test_faults.py: a server that stumbles, and main-wds.py as it is but for what the environment's CHANGES says.

    CHANGES='{"PAUSES": [0.1], "TIMEOUT": 1}' python tests/faults.py --shards URL ...          main-wds.py's options
    python tests/faults.py read a.tar:4 b.tar:5          decode their samples, each shard in a process of its own

The second prints JSON: for each shard [what came, how much its process grew, in MiB], where what came is a list of
[key, class, digest of the pixels], or the DataError's text, or {"other": any other exception, or a hang}.
"""

import collections
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Gives out the files of a folder, under any path. Request number i for a path fails as faults[path][i] says.

    A fault is a status, or a pair: ("cut", n) and ("reset", n) hang up after n bytes, ("stall", n) is silent after
    them until the client hangs up, ("silent", 0) before the answer, ("long", n) and ("short", n) tell a length that
    many bytes off, ("slow", n) gives n bytes at a time, ("bare", n) is a cut where no length was told.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, {}, collections.Counter()
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        with self.server.lock:
            turn = self.server.asked[self.path]
            self.server.asked[self.path] += 1
        faults = self.server.faults.get(self.path, ())
        fault = next(itertools.islice(faults, turn, None), ("", 0))
        path = self.server.folder / self.path.rpartition("/")[2]
        try:
            if isinstance(fault, int) or not path.is_file():
                self.send_error(404 if isinstance(fault, tuple) else fault)
            else:
                self.answer(path.read_bytes(), *fault)
        except OSError:  # the client has what it wants
            pass

    def answer(self, data, what, n):
        if what == "silent":
            self.connection.recv(1)
            return
        self.send_response(200)
        if what != "bare":
            self.send_header("Content-Length", str(len(data) + {"long": n, "short": -n}.get(what, 0)))
        self.end_headers()
        given = data[:n] if what in ("cut", "reset", "stall", "bare") else data
        each = n if what == "slow" else len(data)
        for i in range(0, len(given), each):
            self.wfile.write(given[i : i + each])
            time.sleep(0.001)
        if what == "stall":
            self.connection.recv(1)
        elif what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def retries(stderr):
    """[(url, what happened, pause)] of the lines that tell of them."""
    return re.findall(r"^(.+?): (.*); retrying in (\S+) s$", stderr, re.M)


class Hang(BaseException):
    """No error that anyone could catch as one of a shard."""


def hang(*_):
    raise Hang("nothing for 5 s")


def read(argument):
    """What comes out of a shard, and this process's growth: in a child, whose memory is limited, and time."""
    path, _, length = argument.rpartition(":")
    ours, theirs = os.pipe()
    with open("/proc/self/statm") as file:
        size, before = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(5)
        try:
            found = list(decoded(path, int(length)))
        except main_wds.DataError as error:
            found = str(error)
        except BaseException as error:
            found = {"other": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.alarm(0)
        os.write(theirs, json.dumps(found).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours) as stream:
        found = json.loads(stream.read() or '{"other": "died"}')
    return found, (os.wait4(child, 0)[2].ru_maxrss * 1024 - before) >> 20


def decoded(path, length):
    args = types.SimpleNamespace(decode="tensor", image_size=32, augmentation="full", dummy=False)
    transform = main_wds.v2.Compose([main_wds.decode_tensor, main_wds.make_transform(args, "val")])
    for sample in main_wds.read_shard(path, length, 0, length):
        ((image, label),) = main_wds.decode_samples([sample], transform, main_wds.NUM_CLASSES)
        yield sample["__key__"], label, hashlib.sha256(image.numpy().tobytes()).hexdigest()


if __name__ in ("__main__", "__mp_main__"):  # there too: what the ranks are started with must have the changes
    from conftest import load

    main_wds = load("main-wds.py")
    vars(main_wds).update(json.loads(os.environ.get("CHANGES", "{}")))

if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        main_wds.torch.set_num_threads(1)
        print(json.dumps([read(argument) for argument in sys.argv[2:]]))
    else:
        main_wds.main()
