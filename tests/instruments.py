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
    """Write what a rank trains with: each batch as a line of `seenRANK`, and the step's seed as one of `seedsRANK`.

    For each training sample that is decoded, write a byte to `decoded`.

    After HOLD_AT training steps, an environment variable, the run waits for a signal.
    """
    main_wds = load("main-wds.py")
    batches = main_wds.RunLoader.__iter__
    create = main_wds.ShardDataset.__init__
    steps = itertools.count(1)
    decoded = os.open("decoded", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(self):
        names = [f"{name}{self.run.args.rank}" if self.keeps_position else os.devnull for name in ("seen", "seeds")]
        with open(names[0], "a", buffering=1) as seen, open(names[1], "a", buffering=1) as seeds:
            for images, target in batches(self):
                print(*target.tolist(), file=seen)
                print(torch.initial_seed(), file=seeds)
                yield images, target
                if self.keeps_position and next(steps) == int(os.environ.get("HOLD_AT", 0)):
                    wait_for_signal(self.run)

    def counted(transform, data):
        os.write(decoded, b".")
        return transform(data)

    def counting(self, urls, lengths, checksum, transform, *args, train=True, **options):
        transform = functools.partial(counted, transform) if train else transform
        create(self, urls, lengths, checksum, transform, *args, train=train, **options)

    main_wds.RunLoader.__iter__ = recorded
    main_wds.ShardDataset.__init__ = counting


def wait_for_signal(run):
    while not run.stop_signal.number:
        time.sleep(0.01)


def record_and_stop_at_a_fork():
    """record(), in a process that sends itself SIGTERM right after it has forked for the STOP_AT-th time."""
    forks = itertools.count(1)

    def forked():
        if next(forks) == int(os.environ["STOP_AT"]):
            os.kill(os.getpid(), signal.SIGTERM)

    os.register_at_fork(after_in_parent=forked)
    record()


def record_beside_a_child():
    """record(), in a process that has a child which is not one of the loader's."""
    mp.get_context("fork").Process(target=outlive).start()
    record()


def outlive():
    """Wait for a file named `go`, and create the file `survived`."""
    while not os.path.exists("go"):
        time.sleep(0.05)
    Path("survived").touch()


def stay_in_a_step():
    """Print "held" in the first training step, and stay there for an hour."""
    script = load(Path(sys.argv[0]).name)

    def stay(*_, **__):
        print("held", flush=True)
        time.sleep(3600)

    script.accuracy = stay  # each step calls it


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
