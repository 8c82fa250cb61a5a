#!/usr/bin/env python3
"""Print the samples that main-wds.py's loaders yield on each rank: real ranks, loaders and workers, but no model.

    python tests/print_samples.py --ranks 2 --cases '[{"workers": 3}, {"seed": null}]' --shards DIR --epochs 2

The options are main-wds.py's, and these:
    --ranks N           number of ranks
    --cases JSON        for each case, the options that it changes; "start_method" is that of the workers
    --constants JSON    constants of main-wds.py to replace, such as {"TIMEOUT": 1}

Prints JSON: for each case and rank, {"len": {split: len(loader)}, "train": epochs, "val": epochs}. An epoch is a list
of batches, a batch a list of samples, and a sample [number, draw, pid]: the number stored as its image, a number that
its augmentation would draw, and the process that loaded it.
"""

import argparse
import json
import math
import os
import random
import sys
import threading

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import WARNINGS, free_port, load, run

NUMBER, DRAW, PID = range(3)
main_wds = load("main-wds.py")


# ---------------------------------------------------------------------------- for the tests


def load_samples(cases, *args, cwd, ranks=1, constants=None):
    """(the JSON that this script prints, stderr) for these cases, with batches of 5 per rank."""
    options = ["--ranks", ranks, "--cases", json.dumps(cases), "--constants", json.dumps(constants or {})]
    options += ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "-b", 5 * ranks, "--seed", 1]
    spawned = any("start_method" in case for case in cases)  # workers that are not forked import the script anew
    env = {"PYTHONWARNINGS": WARNINGS} if spawned else None
    stdout, stderr = run("tests/print_samples.py", *options, *args, cwd=cwd, env=env)
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
    return json.loads(stdout), stderr


def column(batches, which=NUMBER):
    """One value of each sample."""
    return [sample[which] for batch in batches for sample in batch]


def order_and_draws(by_rank, epoch=0):
    """For each rank, the numbers and draws of its training samples, and the numbers of its validation samples."""
    found = []
    for result in by_rank:
        train = result["train"][epoch]
        found.append((column(train), column(train, DRAW), column(result["val"][epoch])))
    return found


def assert_complete(by_rank, epoch=0, train=range(47), val=range(47, 58)):
    """Each sample once over all ranks; in training, a few twice, so that all ranks get the same number."""
    numbers = [number for result in by_rank for number in column(result["train"][epoch])]
    assert set(numbers) == set(train) and len(numbers) == math.ceil(len(train) / len(by_rank)) * len(by_rank)
    assert sorted(number for result in by_rank for number in column(result["val"][epoch])) == list(val)


# ---------------------------------------------------------------------------- the script


def number_draw_pid(data):
    """Instead of a decoder. Both `random` and torch are drawn from, as the augmentations do."""
    draw = random.getrandbits(20) << 20 | int(torch.randint(1 << 20, ()))
    return torch.tensor([int(data), draw, os.getpid()])


def unchanged(image):
    return image


def no_transform(args, split):
    return unchanged


def print_nothing(args, line):
    """stdout is for the JSON only."""


def run_rank(rank, args):
    """Run all cases on this rank; rank 0 prints what all ranks got."""
    vars(main_wds).update(args.constants)
    args.rank = rank
    args.device = torch.device("cpu")
    args.distributed = args.world_size > 1
    args.batch_size //= args.world_size
    args.workers = math.ceil(args.workers / args.world_size)
    if args.distributed:
        dist.init_process_group("gloo", init_method=args.dist_url, world_size=args.world_size, rank=rank)
    results = []
    for case in args.cases:
        results.append(run_case(argparse.Namespace(**{**vars(args), **case})))
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join(5)  # of the last case's loaders: in Python 3.11 a fork while a thread ends may hang
    by_rank = [results] * args.world_size
    if args.distributed:
        dist.all_gather_object(by_rank, results)
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(list(zip(*by_rank, strict=True))))


def run_case(args):
    """Iterate over the loaders as main_worker() does."""
    mp.set_start_method(args.start_method, force=True)
    args.data_seed = main_wds.choose_seed(args, {})
    run = main_wds.Run(args, state=None)
    make_train_loader, make_val_loader = main_wds.LOADERS["wds"]
    val_loader = main_wds.RunLoader(make_val_loader(args), run)
    train_loader = main_wds.RunLoader(make_train_loader(args), run, {"epoch": 0})
    result = {"len": {"train": len(train_loader), "val": len(val_loader)}, "train": [], "val": []}
    for epoch in range(args.start_epoch or 0, args.epochs):
        main_wds.set_seed(args, epoch)
        train_loader.set_epoch(epoch)
        result["train"].append([samples.tolist() for samples, _ in train_loader])
        result["val"].append([samples.tolist() for samples, _ in val_loader])
    return result


def replace_parts():
    """Replace what decodes, transforms and prints."""
    main_wds.DECODERS["tensor"] = number_draw_pid
    main_wds.make_transform = no_transform
    main_wds.say = print_nothing


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cases", type=json.loads, default=[{}])
    parser.add_argument("--constants", type=json.loads, default={})
    own, sys.argv[1:] = parser.parse_known_args()
    args = main_wds.parse_args()
    args.cases = own.cases
    args.constants = own.constants
    args.world_size = own.ranks
    args.start_method = mp.get_start_method()
    replace_parts()
    if own.ranks == 1:
        run_rank(0, args)
    else:
        mp.spawn(run_rank, (args,), nprocs=own.ranks)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a process that this script has started, but not forked
    replace_parts()
