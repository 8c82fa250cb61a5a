#!/usr/bin/env python3
"""What main-wds.py's loaders yield on each rank: the real ranks, loaders and workers, but no model.

    python tests/seen.py --ranks 2 --cases '[{"workers": 3}, {"workers": 0, "seed": null}]' --shards DIR --epochs 2

The options are main-wds.py's and these two. A case holds the options that it changes, on each rank; besides them
"start_method" is that of the workers, and "hold" the seconds for which each batch is kept. CHANGES in the environment,
as '{"PAUSES": [0.1], "TIMEOUT": 1}', replaces constants of main-wds.py. Prints JSON: for each case and rank {"len":
{split: len(loader)}, "train": epochs, "val": epochs}. An epoch is a list of batches, a batch one of samples, and a
sample [number, draw, pid]: the number that stands for its image, what the augmentation would draw, and the process that
loaded it.
"""

import argparse
import json
import math
import os
import random
import sys
import threading
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import load


def number_draw_pid(data):
    draw = random.getrandbits(20) << 20 | int(torch.randint(1 << 20, ()))  # the two decoders' augmentations draw so
    return torch.tensor([int(data), draw, os.getpid()])


def unchanged(image):
    return image


def see_rank(rank, args):
    """Print what all ranks see of each case, if this is rank 0."""
    args.rank = rank
    args.device = torch.device("cpu")
    args.distributed = args.world_size > 1
    args.batch_size //= args.world_size
    args.workers = math.ceil(args.workers / args.world_size)
    main_wds.init_process_group(args)
    mine = []
    for case in args.cases:
        mine.append(see(argparse.Namespace(**{"hold": 0, **vars(args), **case})))
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            thread.join(5)  # of the loaders before: in Python 3.11 a fork while a thread ends may hang
    ranks = [mine] * args.world_size
    if args.distributed:
        dist.all_gather_object(ranks, mine)
        dist.destroy_process_group()
    if args.rank == 0:
        print(json.dumps(list(zip(*ranks, strict=True))))


def see(args):
    """The loop of main-wds.py's main_worker() over its loaders."""
    mp.set_start_method(args.start_method, force=True)
    run = main_wds.Run(args, state=None)
    make_train_loader, make_val_loader = main_wds.LOADERS["wds"]
    val_loader = main_wds.DeviceLoader(make_val_loader(args), run)
    train_loader = main_wds.DeviceLoader(make_train_loader(args), run, {"epoch": 0})
    seen = {"len": {"train": len(train_loader), "val": len(val_loader)}, "train": [], "val": []}
    for epoch in range(args.start_epoch or 0, args.epochs):
        main_wds.set_seed(args, epoch)
        train_loader.set_epoch(epoch)
        for split, loader in (("train", train_loader), ("val", val_loader)):
            seen[split].append([])
            for samples, _ in loader:
                time.sleep(args.hold)  # the workers continue meanwhile
                seen[split][-1].append(samples.tolist())
    return seen


def say_nothing(args, line):
    """Standard output is for JSON only."""


main_wds = load("main-wds.py")  # up here, so that every process that imports this script has it so
main_wds.DECODERS["tensor"] = number_draw_pid
main_wds.make_transform = lambda args, split: unchanged
main_wds.say = say_nothing
vars(main_wds).update(json.loads(os.environ.get("CHANGES", "{}")))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cases", type=json.loads, default=[{}])
    own, sys.argv[1:] = parser.parse_known_args()
    args = main_wds.parse_args()
    args.cases = own.cases
    args.world_size = own.ranks
    args.start_method = mp.get_start_method()
    if own.ranks == 1:
        see_rank(0, args)
    else:
        mp.spawn(see_rank, (args,), nprocs=own.ranks)
