"""What the fork server can change in a run before it starts, so that tests see more of it: see commands.become()."""

import functools
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from commands import load


def record():
    """Write each batch that a rank trains with as a line of `seenRANK`, and a byte to `decoded` per training sample.

    Steps are slowed down, also in validation, so that a signal sent at a step arrives within the next one.
    """
    main_wds = load("main-wds.py")
    batches = main_wds.DeviceLoader.__iter__
    shard_loader = main_wds.shard_loader
    decoded = os.open("decoded", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(self):
        with open(f"seen{self.args.rank}" if self.order else os.devnull, "a", buffering=1) as file:
            for images, target in batches(self):
                print(*target.tolist(), file=file)
                time.sleep(0.04)
                yield images, target

    def counted(transform, data):
        os.write(decoded, b".")
        return transform(data)

    def counting_loader(urls, lengths, transform, *args, train=True, **options):
        transform = functools.partial(counted, transform) if train else transform
        return shard_loader(urls, lengths, transform, *args, train=train, **options)

    main_wds.DeviceLoader.__iter__ = recorded
    main_wds.shard_loader = counting_loader


def record_beside_a_child():
    """record(), in a process that has a child which is not one of the loader's."""
    mp.get_context("fork").Process(target=outlive).start()
    record()


def outlive():
    """Ignore SIGTERM, and create the file `survived` two seconds after the run's checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while not os.path.exists("checkpoint.pth.tar"):
        time.sleep(0.05)
    time.sleep(2)
    Path("survived").touch()


def save_checkpoints():
    """Instead of training, write checkpoints for ever; all values in one are its epoch, and even epochs are the best.

    The first epoch is the argument of the command.
    """
    main_wds = load("main-wds.py")
    first = int(sys.argv[1])
    draw = random.Random(first)
    net = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    net(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    for epoch in itertools.count(first):
        for tensor in (*net.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())):
            tensor.fill_(epoch)
        position = {"position": {"step": epoch}} if draw.random() < 0.3 else {}
        state = {"epoch": epoch, "best_acc1": float(epoch), "state_dict": net.state_dict(), **position}
        main_wds.save_checkpoint({**state, "optimizer": optimizer.state_dict()}, is_best=epoch % 2 == 0)
        print(epoch, flush=True)
