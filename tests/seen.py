#!/usr/bin/env python3
"""What main-wds.py's loaders give each rank: its ranks, loaders and loading processes as they are, without a network.

    python tests/seen.py --ranks 2 --cases '[{"workers": 3}, {"workers": 0, "seed": null}]' --shards DIR --epochs 2

The options are main-wds.py's and these two. A case is what it changes in them; "start_method" is the workers', "hold"
the seconds for which each batch is in hand, and with "peek" the main process reads a batch before the workers start.
The environment's CHANGES are what it changes in makeshards.py's constants, as '{"PAUSES": [0.1], "PATIENCE": 1}'.
Prints JSON: for each case and rank {"len": {split: len(loader)}, "train": epochs, "val": epochs}. An epoch is a list of
batches, a batch one of samples, and a sample [number, draw, pid]: the number that stands for its image, what the
augmentation would draw, and the process that it was loaded by.
"""

import argparse
import json
import os
import random
import sys
import threading
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import load


def number_draw_pid(file):
    _, data = file
    draw = random.getrandbits(20) << 20 | int(torch.randint(1 << 20, ()))  # the two decoders' augmentations draw so
    return torch.tensor([int(data), draw, os.getpid()])


def run(args):
    """In place of main-wds.py's own: the same loop over the same loaders, for each case."""
    mine = []
    for case in args.cases:
        mine.append(see(argparse.Namespace(**{"hold": 0, "peek": False, **vars(args), **case})))
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join(5)  # of the loaders before: in Python 3.11 a fork while a thread ends may hang
    ranks = [mine] * args.world_size
    if args.distributed:
        dist.all_gather_object(ranks, mine)
    if args.rank == 0:
        print(json.dumps(list(zip(*ranks, strict=True))))


def see(args):
    mp.set_start_method(args.start_method, force=True)
    make_train_loader, make_val_loader = main_wds.LOADERS["wds"]
    val_loader = main_wds.DeviceLoader(make_val_loader(args), args)
    train_loader = main_wds.DeviceLoader(make_train_loader(args), args)
    if args.peek:
        next(iter(train_loader.sampler))
    seen = {"len": {"train": len(train_loader), "val": len(val_loader)}, "train": [], "val": []}
    for epoch in range(args.start_epoch or 0, args.epochs):
        main_wds.set_seed(args, epoch)
        train_loader.sampler.set_epoch(epoch)
        for split, loader in (("train", train_loader), ("val", val_loader)):
            seen[split].append([])
            for samples, _ in loader:
                time.sleep(args.hold)  # the workers go on meanwhile
                seen[split][-1].append(samples.tolist())
    return seen


main_wds = load("main-wds.py")  # up here, so that every process that imports this script has it so
main_wds.run, main_wds.make_transform = run, lambda args, split: number_draw_pid
vars(main_wds.makeshards).update(json.loads(os.environ.get("CHANGES", "{}")))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cases", type=json.loads, default=[{}])
    own, sys.argv[1:] = parser.parse_known_args()
    args = main_wds.parse_args()
    args.cases, args.world_size, args.no_accel, args.start_method = own.cases, own.ranks, True, mp.get_start_method()
    if own.ranks == 1:
        main_wds.main_worker(0, 0, 1, args)
    else:
        mp.spawn(main_wds.main_worker, (0, own.ranks, args), nprocs=own.ranks)
