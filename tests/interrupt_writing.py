"""makeshards.py, stopped at a chosen point or observed. Environment variables of the run:

HOLD_AT=N    once N shards are in place, workers print "held" before they rename another, and wait for a signal
KILL_AT=N    the main process kills itself before it flushes, renames or removes a file for the Nth time
FILE_SIZE=N  files cannot grow beyond N bytes, as on a full disk
LOG=PATH     all processes append their flushes, renames and removals: [pid, call, inode, new name] in JSON
"""

import functools
import glob
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys

from commands import ROOT, load


def main():
    multiprocessing.set_start_method("fork", force=True)  # so that the workers are changed, too
    file_size = int(os.environ.get("FILE_SIZE", -1))
    if file_size >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    parent = os.getpid()
    calls = itertools.count(1)
    for function in (os.fsync, os.replace, os.unlink):
        setattr(os, function.__name__, watched(function, parent, calls))
    sys.argv[0] = str(ROOT / "makeshards.py")
    load("makeshards.py").main()


def watched(function, parent, calls):
    @functools.wraps(function)
    def wrapper(file, *target):
        if os.getpid() != parent:
            hold(*target)
        elif next(calls) == int(os.environ.get("KILL_AT", 0)):
            os.kill(parent, signal.SIGKILL)
        if "LOG" in os.environ:
            call = [os.getpid(), function.__name__, os.stat(file).st_ino, *map(os.path.basename, target)]
            with open(os.environ["LOG"], "ab", buffering=0) as log:
                log.write(json.dumps(call).encode() + b"\n")
        return function(file, *target)

    return wrapper


def hold(target=None):
    """In a worker: don't return if HOLD_AT shards are in place and a file is to be renamed to `target`."""
    if target and "HOLD_AT" in os.environ:
        there = glob.glob("imagenet-*.tar", root_dir=os.path.dirname(target))
        if len(there) >= int(os.environ["HOLD_AT"]):
            os.write(1, b"held\n")  # in one piece: other workers write, too
            signal.pause()
