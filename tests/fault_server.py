"""An HTTP server that fails as a test tells it to."""

import collections
import contextlib
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FaultServer(ThreadingHTTPServer):
    """Serves the files of a folder, under any path. Request number i for a path fails as faults[path][i] says.

    A fault is an HTTP status, or a pair (kind, n):
        "cut"      closes the connection after n bytes
        "unsized"  the same, without a Content-Length header
        "reset"    resets the connection after n bytes
        "stall"    sends nothing more after n bytes, and waits until the client closes the connection
        "silent"   the same, before the status line; n is ignored
        "long"     sends everything, with a Content-Length that is n bytes too large
        "short"    sends everything, with a Content-Length that is n bytes too small
        "slow"     sends everything, n bytes at a time
    """

    daemon_threads = True
    request_queue_size = 64
    host = "127.0.0.1"

    def __init__(self, folder):
        super().__init__((self.host, 0), Handler)
        self.folder = folder
        self.faults = {}
        self.requests = collections.Counter()  # for each path, as it was requested
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Override the log on stderr."""

    def do_GET(self):
        with self.server.lock:
            number = self.server.requests[self.path]
            self.server.requests[self.path] += 1
        faults = self.server.faults.get(self.path, [])
        fault = faults[number] if number < len(faults) else ("none", 0)
        path = self.server.folder / unquote(urlsplit(self.path).path).rpartition("/")[2]
        with contextlib.suppress(OSError):  # the client closed the connection
            if isinstance(fault, int):
                self.send_error(fault)
            elif not path.is_file():
                self.send_error(404)
            else:
                self.send(path.read_bytes(), *fault)

    def send(self, data, kind, n):
        if kind == "silent":
            self.connection.recv(1)  # returns when the client closes the connection
            return
        length = len(data)
        if kind == "long":
            length += n
        if kind == "short":
            length -= n
        self.send_response(200)
        if kind != "unsized":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind in ("cut", "unsized", "reset", "stall"):
            self.wfile.write(data[:n])
        elif kind == "slow":
            for start in range(0, len(data), n):
                self.wfile.write(data[start : start + n])
                time.sleep(0.001)
        else:
            self.wfile.write(data)
        if kind == "stall":
            self.connection.recv(1)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
