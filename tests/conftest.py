"""What the tests share: small datasets made once, and a way to run the project's commands as a user types them."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script, *args, cwd, status=0, env=None, timeout=300, typed=False):
    """Run a script of the project with this Python; returns (stdout, stderr) once the status is as expected.

    The three scripts are forked from a process that has imported them, which saves four seconds: see test_resume.py.
    Where `typed`, and by test_run.py and test_readme.py, they are run as a user types them.
    """
    if script in SCRIPTS and not env and not typed:
        return forked(None, script, *args, cwd=cwd, status=status, timeout=timeout)
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    env = {"PYTHONWARNINGS": "error", **(env or {})}  # so that no warning goes unseen
    return run_command(command, cwd=cwd, status=status, env=env, timeout=timeout)


def run_command(command, *, cwd, status=0, env=None, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}  # the tests are many, and the cores few
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == status, f"{command}\nstatus {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def forked(ranks, script, *args, cwd, status=0, timeout=300):
    """As run(), without importing PyTorch anew: as many ranks as torchrun would start, or for None one process alone.

    What rank 0 tells.
    """
    if not SERVER:
        from test_resume import Server

        SERVER.append(Server())
    server, environment = SERVER[0], {}
    if ranks:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks}
    with tempfile.TemporaryDirectory() as output:
        pids = []
        for rank in range(ranks or 1):
            folder = Path(output, str(rank))
            folder.mkdir()
            if ranks:
                environment |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            env = {name: str(value) for name, value in environment.items()}
            request = {"script": script, "args": list(map(str, args)), "cwd": str(cwd), "output": str(folder)}
            pids.append(server.start(**request, env=env))
        found = [server.ask(pid=pid, timeout=timeout) for pid in pids]
        for pid, each in zip(pids, found, strict=True):
            if each is None:
                os.killpg(pid, signal.SIGKILL)
        stdout, stderr = (Path(output, "0", name).read_text() for name in ("out", "err"))
    assert found == [status] * len(pids), f"{script} {args}\nstatus {found}\n{stdout}\n{stderr}"
    return stdout, stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SCRIPTS = ("main-orig.py", "main-wds.py", "makeshards.py")
SERVER = []  # which ends when this process does


def error_of(script, *args, cwd, env=None):
    """The one line with which a script refuses bad input: status 2, no traceback."""
    _, stderr = run(script, *args, cwd=cwd, status=2, env=env)
    lines = [line for line in stderr.splitlines() if "Terminating process" not in line]  # PyTorch's log of the others
    assert len(lines) == 1 and lines[0].startswith(f"{script}: "), stderr
    return lines[0]


def load(script):
    """A script as a module, for its pure functions."""
    name = script.replace("-", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def summary(stdout):
    """[(Acc@1, Acc@5)] of each validation."""
    return [(float(a), float(b)) for a, b in re.findall(r"^ \* Acc@1 (\S+) Acc@5 (\S+)$", stdout, re.M)]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with data/ (80 training and 30 validation images, 10 classes) and shards/ (of 30 samples)."""
    folder = tmp_path_factory.mktemp("small")
    run("tests/sample.py", "--train", 8, "--val", 3, cwd=folder)
    (folder / "shards").mkdir()
    run("makeshards.py", "--maxcount", 30, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with the whole sample in data/ and its shards in shards/."""
    folder = tmp_path_factory.mktemp("sample")
    run("tests/sample.py", cwd=folder)
    (folder / "shards").mkdir()
    run("makeshards.py", cwd=folder)
    return folder
