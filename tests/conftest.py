"""Fixtures: small datasets, made once, and runs that end with the test."""

import contextlib
import functools
import multiprocessing
import os
import signal

import pytest
from commands import Run, fork_server, run, spawned_ranks
from fault_server import FaultServer
from make_data import TRAIN, VAL, noise, write_folders, write_shards


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long, and is run by ./run test --all only")
    multiprocessing.set_start_method("fork", force=True)  # Python 3.14's forkserver can't import scripts with a hyphen


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def no_endless_test(request):
    """A test that does not end fails: after 5 minutes or, if it is slow, after 20."""

    def fail(*_):
        fork_server.cache_clear()  # it may still be waiting for a run
        pytest.fail("the test did not end")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(1200 if request.node.get_closest_marker("slow") else 300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


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


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Shards of noise, of TRAIN and VAL samples; the class of each sample is its number."""
    return write_shards(tmp_path_factory.mktemp("noise") / "shards", noise, train=TRAIN, validation=VAL)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """32 training images and 8 for validation, of two classes, in folders."""
    return write_folders(tmp_path_factory.mktemp("folders"), train=16, val=4)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path; a test may change its folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultServer(tmp_path) as server:
        yield server


@pytest.fixture(params=["main-orig.py", "main-wds.py"])
def script(request):
    """Each of the training scripts."""
    return request.param


@pytest.fixture
def start(tmp_path):
    """A function that starts main-wds.py, or another script, in the test's folder; a failed test's runs are killed."""
    runs = []

    def start(*args, script="main-wds.py", cwd=tmp_path, **more):
        runs.append(Run(script, *args, cwd=cwd, **more))
        return runs[-1]

    yield start
    for pid in {pid for each in runs for pid in each.alive()}:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def unbroken(shards, tmp_path_factory):
    """A function of the ranks and options that returns the folder of an uninterrupted run, made once."""

    @functools.cache
    def run(ranks, *args):
        folder = tmp_path_factory.mktemp("unbroken")
        more = spawned_ranks() if ranks == 2 else []
        Run("main-wds.py", *args, "--shards", shards, *more, cwd=folder, instrument="record").finish()
        return folder

    return lambda ranks, *args: run(ranks, *map(str, args))
