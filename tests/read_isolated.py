#!/usr/bin/env python3
"""Read and decode shards with main-wds.py's functions, each in a process with 4 GiB of memory and 60 s.

    python tests/read_isolated.py a.tar:4 b.tar:5          each argument is PATH:NUMBER OF SAMPLES

Prints JSON, for each shard a pair: the result, and by how many MiB its process grew. The result is a list of
[key, class, SHA-256 of the pixels], the text of a DataError, or {"unexpected": any other exception}.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import sys

import torch
from commands import load
from torchvision.transforms import v2

main_wds = load("main-wds.py")


class TimeLimitExceeded(BaseException):
    """Not an Exception, which main-wds.py would report as a damaged shard."""


def time_is_up(*_):
    raise TimeLimitExceeded


def read_in_child(path, length):
    """(result, growth in MiB) of reading a shard in a child process."""
    with open("/proc/self/statm") as file:
        pages = [int(number) for number in file.read().split()]
    size, resident = pages[0] * resource.getpagesize(), pages[1] * resource.getpagesize()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, time_is_up)
        signal.alarm(60)
        result = read(path, length)
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        result = json.loads(pipe.read() or '{"unexpected": "the process died"}')
    _, _, usage = os.wait4(child, 0)
    return result, (usage.ru_maxrss * 1024 - resident) >> 20


def read(path, length):
    try:
        return list(decoded_samples(path, length))
    except main_wds.DataError as error:
        return str(error)
    except BaseException as error:
        return {"unexpected": f"{type(error).__name__}: {str(error)[:200]}"}


def decoded_samples(path, length):
    args = argparse.Namespace(decode="tensor", image_size=32, augmentation="full", dummy=False)
    transform = v2.Compose([main_wds.decode_tensor, main_wds.make_transform(args, "val")])
    for sample in main_wds.read_shard(path, length, range(length)):
        ((image, label),) = main_wds.decode_samples(transform, 0)([sample])
        yield sample["__key__"], label, hashlib.sha256(image.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = []
    for argument in sys.argv[1:]:
        path, _, length = argument.rpartition(":")
        results.append(read_in_child(path, int(length)))
    print(json.dumps(results))
