#!/usr/bin/env python3
"""Train a torchvision classifier on ImageNet, read from folders (main-orig.py) or WebDataset shards (main-wds.py).

    python main-wds.py --shards ./shards            one process, on the GPU if there is one, else on the CPU
    python main-wds.py --dataset orig --data DIR    the same from folders, to compare
    python main-wds.py --gpu 1 -a resnet50          one GPU of several
    torchrun --nproc-per-node=8 main-wds.py         eight GPUs of this node, a process each
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 main-wds.py         of two
    python main-wds.py --multiprocessing-distributed           every GPU of this node; without a GPU two CPU processes
    python main-wds.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://HOST:29500      of two
    python main-wds.py --resume checkpoint.pth.tar             go on where SIGTERM or Ctrl-C has stopped a run
    python main-wds.py --evaluate --pretrained                 measure a trained network
    python main-wds.py --dummy                                 find the speed without any data
    makeshards.py writes the shards; diff main-orig.py main-wds.py shows what they take

Of the forms for two nodes the first is typed on both alike, the second with --rank 1 on the other. Each epoch writes
checkpoint.pth.tar to the current folder, and the best so far model_best.pth.tar too.
"""

import argparse
import difflib
import io
import math
import os
import random
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

# isort: split
# and for the shards:
import functools
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.util import Finalize

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

import makeshards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, red, green, blue, in 0..1
TRAIN_SIZE, VAL_SIZE = 1_281_167, 50_000  # of ImageNet, which --dummy imitates
NUM_CLASSES = 1000  # outputs of torchvision's classifiers; a dataset may use fewer
ARCHS = [name for name in models.list_models(module=models) if name not in ("googlenet", "inception_v3")]


# ---------------------------------------------------------------------------- options


def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTION ...]",
        description="Train a torchvision classifier on ImageNet. The default of each option stands in brackets.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=33),
    )
    parser.error = fail
    count, number = at_least(1), at_least(0)
    add = parser.add_argument_group("data").add_argument
    add("-j", "--workers", type=number, default=4, metavar="N", help="loading processes of this node (%(default)s)")
    add("--dummy", action="store_true", help="noise of ImageNet's size, without files (off)")
    add("--dataset", "--loader", choices=LOADERS, default="wds", metavar="NAME", help="wds or orig (%(default)s)")
    add("--data", metavar="DIR", default="./data", help="orig: holds train/ and val/ (%(default)s)")
    add("--decode", choices=["tensor", "pil"], default="tensor", help="torchvision's or Pillow's (%(default)s)")
    add("--augmentation", choices=["full", "simple"], default="full", help="simple: as in validation (%(default)s)")
    add("--image-size", type=count, default=224, metavar="N", help="pixels a side (%(default)s)")
    add = parser.add_argument_group("data from shards").add_argument
    add("--shards", metavar="DIR", default="./shards", help="folder or URL with _info.json (%(default)s)")
    add("--trainshards", metavar="URLS", help="instead: brace pattern, glob or URL (none)")
    add("--valshards", metavar="URLS", help="the same for validation (none)")
    add("--trainsize", type=count, metavar="N", help="samples, if remote without index (none)")
    add("--valsize", type=count, metavar="N", help="the same for validation (none)")
    add("--shuffle", type=number, default=1000, metavar="N", help="samples in a worker's buffer (%(default)s)")
    add("--checkpoint-steps", type=count, metavar="N", help="a checkpoint each N steps, too (off)")
    add = parser.add_argument_group("training").add_argument
    add("-a", "--arch", default="resnet18", help="a classifier of torchvision (%(default)s)")
    add("--pretrained", action="store_true", help="begin with torchvision's weights (off)")
    add("--epochs", type=number, default=90, metavar="N", help="train up to this epoch (%(default)s)")
    add("--start-epoch", type=number, metavar="N", help="first epoch (0, or as --resume says)")
    add("-b", "--batch-size", type=count, default=256, metavar="N", help="of this node, over its GPUs (%(default)s)")
    add("--lr", "--learning-rate", type=float, default=0.1, metavar="LR", help="at the start (%(default)s)")
    add("--momentum", type=float, default=0.9, metavar="M", help="of SGD (%(default)s)")
    add("--wd", "--weight-decay", type=float, default=1e-4, dest="weight_decay", metavar="W", help="(%(default)s)")
    add("--seed", type=number, metavar="N", help="make the run repeatable, but slower (off)")
    add("--amp", action="store_true", help="bfloat16 and channels last (off)")
    add = parser.add_argument_group("checkpoints and output").add_argument
    add("--resume", metavar="PATH", help="go on from this checkpoint (none)")
    add("-e", "--evaluate", action="store_true", help="validate once and stop (off)")
    add("-p", "--print-freq", type=count, default=10, metavar="N", help="steps between two lines (%(default)s)")
    add = parser.add_argument_group("devices and processes").add_argument
    add("--gpu", type=number, metavar="N", help="use this GPU alone (all there are)")
    add("--no-accel", action="store_true", help="use the CPU even where there is a GPU (off)")
    add("--multiprocessing-distributed", action="store_true", help="a process for each GPU of this node (off)")
    add("--world-size", type=int, default=-1, metavar="N", help="number of nodes (one)")
    add("--rank", type=int, default=-1, metavar="N", help="this node's number, from 0 (none)")
    add("--dist-url", default="tcp://127.0.0.1:23456", metavar="URL", help="meeting point (%(default)s)")
    add("--dist-backend", default="nccl", metavar="NAME", help="without CUDA it becomes gloo (%(default)s)")
    args = parser.parse_args()
    args.memory_format = torch.channels_last if args.amp else torch.contiguous_format
    if args.arch not in ARCHS:
        close = difflib.get_close_matches(args.arch, ARCHS) or ["resnet18", "resnet50"]
        fail(f"--arch {args.arch}: not a single-output classifier of torchvision; try {', '.join(close)}")
    nodes = max(args.world_size, 1)
    if args.rank >= nodes or (nodes > 1 and args.rank < 0):
        fail(f"--rank {args.rank}, --world-size {args.world_size}: give both, the rank from 0 to {nodes - 1}")
    return args


def at_least(low):
    """For argparse: whole numbers from low."""

    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return number


class DataError(Exception):
    """Input that can't be used; the message names it and the way out. main() prints it, whatever process it is from."""


def fail(message):
    raise DataError(message)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# ---------------------------------------------------------------------------- main


def main():
    try:
        start(parse_args())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:  # else it has said why
            sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {error}, and so the others of this node were ended\n")
        sys.exit(max(error.exit_code, 1))
    except Exception as error:
        _, known, message = f"{type(error).__name__}: {error}".rpartition("DataError: ")
        if not known:
            raise
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {message.strip()}\n")  # less another process's traceback
        sys.exit(2)


def start(args):
    """Be one process of those that torchrun has started, or start those of this node, or be the only one."""
    args.start_method = mp.get_start_method()
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys():  # torchrun started us
        rank, local_rank, args.world_size, processes = (
            int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
        args.dist_url = "env://"
        main_worker(local_rank, rank - local_rank, processes, args)
    elif args.multiprocessing_distributed:
        processes = (0 if args.no_accel else torch.accelerator.device_count()) or 2
        first_rank, args.world_size = max(args.rank, 0) * processes, max(args.world_size, 1) * processes
        context = mp.spawn(main_worker, (first_rank, processes, args), nprocs=processes, join=False)

        def end(number, _):  # the signal may have come to this process alone
            signal.signal(number, signal.SIG_IGN)
            for process in context.processes:
                process.terminate()
            sys.exit(128 + number)  # once they have ended

        signal.signal(signal.SIGINT, end)
        signal.signal(signal.SIGTERM, end)
        while not context.join():
            pass
    else:
        main_worker(0, max(args.rank, 0), 1, args)


def main_worker(local_rank, first_rank, processes, args):
    """One process of the `processes` on this node, whose ranks count from first_rank."""
    mp.set_start_method(args.start_method, force=True)  # with mp.spawn's own, loading processes take seconds to start
    args.rank = first_rank + local_rank
    args.world_size = max(args.world_size, 1)
    args.distributed = args.world_size > 1
    if args.batch_size < processes:
        fail(f"--batch-size {args.batch_size}: too few for the {processes} processes of this node")
    args.batch_size //= processes
    args.workers = math.ceil(args.workers / processes)
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # or they would fight for the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    args.device = pick_device(local_rank, args)
    if args.distributed:
        backend = "gloo" if args.dist_backend == "nccl" and args.device.type != "cuda" else args.dist_backend
        try:
            dist.init_process_group(backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank)
        except (RuntimeError, ValueError) as error:
            fail(f"--dist-url {args.dist_url}, --dist-backend {backend}: the ranks can't meet ({first_line(error)})")
    try:
        run(args)
    except RuntimeError as error:
        if not args.distributed or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(5)  # what the other says comes first
        fail(f"rank {args.rank} lost another rank, which tells why, or was killed ({first_line(error)})")
    if args.distributed:
        dist.destroy_process_group()


def pick_device(local_rank, args):
    """The accelerator (CUDA, or what else PyTorch finds) number --gpu or local_rank, else the CPU."""
    if args.no_accel or not torch.accelerator.is_available():
        return torch.device("cpu")
    if args.distributed and torch.accelerator.current_accelerator().type == "mps":  # it has no collectives
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = args.gpu if args.gpu is not None and not args.multiprocessing_distributed else local_rank % count
    if not 0 <= index < count:
        fail(f"--gpu {index}: this machine has {count}, numbered from 0")
    if count > 1:
        torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


# ---------------------------------------------------------------------------- one process's work


def run(args):
    """Train and validate for all epochs, or validate once."""
    set_seed(args, epoch=-1)
    say(args, f"=> {'using pre-trained' if args.pretrained else 'creating'} model '{args.arch}' on {args.device}")
    net = make_model(args).to(args.device, memory_format=args.memory_format)
    model = net
    if args.distributed:
        model = DistributedDataParallel(net, device_ids=None if args.device.type == "cpu" else [args.device])
    elif args.device.type == "cuda" and args.gpu is None and "RANK" not in os.environ and torch.cuda.device_count() > 1:
        if args.amp:  # its threads would take float16 for bfloat16
            fail("--amp: it takes a process for each GPU; add --multiprocessing-distributed, or --gpu 0 to use one")
        net = model = DataParallel(net)
    criterion = nn.CrossEntropyLoss().to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    state = {"epoch": args.start_epoch or 0, "best_acc1": 0.0}
    if args.resume:
        state = load_checkpoint(args, net, optimizer, scheduler)
    best_acc1 = state["best_acc1"]

    make_train_loader, make_val_loader = LOADERS["orig" if args.dummy else args.dataset]
    val_loader = DeviceLoader(make_val_loader(args), args)
    train_loader = None
    if not args.evaluate:
        save = functools.partial(save_checkpoint, args, net, optimizer, scheduler)
        train_loader = TrainLoader(make_train_loader(args), args, state, lambda **at: save(best_acc1=best_acc1, **at))
    if args.evaluate:
        validate(val_loader, net, criterion, args)
        return
    for epoch in range(state["epoch"], args.epochs):
        set_seed(args, epoch)
        if hasattr(train_loader.sampler, "set_epoch"):
            train_loader.sampler.set_epoch(epoch)
        train(train_loader, model, criterion, optimizer, epoch, args)
        acc1 = validate(val_loader, net, criterion, args)
        scheduler.step()
        is_best, best_acc1 = acc1 > best_acc1, max(acc1, best_acc1)
        save_checkpoint(args, net, optimizer, scheduler, epoch + 1, best_acc1, is_best)


def set_seed(args, epoch):
    """With --seed, begin each epoch from a state of its own, so that a resumed run draws what an unbroken one does."""
    if args.seed is not None:
        random.seed(f"{args.seed} {epoch} {args.rank}")
        torch.manual_seed(random.getrandbits(63))
        torch.backends.cudnn.deterministic = True


def say(args, line):
    """Print a line once, whatever the number of processes."""
    if args.rank == 0:
        print(line, flush=True)


def make_model(args):
    """The network --arch with its 1000 outputs; --pretrained takes the weights of torchvision's first recipe."""
    weights = None
    if args.pretrained:
        choices = models.get_model_weights(args.arch)
        names = ("IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1")  # those for images of 224 pixels
        weights = next((choices[name] for name in names if name in choices.__members__), choices.DEFAULT)
    try:
        return models.get_model(args.arch, weights=weights)
    except Exception as error:  # no network, or a file that is broken
        if not weights:
            raise
        fail(f"--pretrained: no {weights.url} in {torch.hub.get_dir()}/checkpoints ({first_line(error)})")


# ---------------------------------------------------------------------------- loaders


def make_train_loader_orig(args):
    """Batches of DIR/train, in a new order each epoch. Under DDP each rank gets as many samples as any other.

    images: float32 (B, 3, 224, 224), normalised; target: int64 (B).
    """
    dataset = open_folder(args, "train")
    if len(dataset) < args.world_size:
        fail(f"{args.world_size} ranks but {len(dataset)} training samples: start fewer processes")
    sampler = DistributedSampler(dataset, seed=args.seed or 0) if args.distributed else None
    return make_loader(args, dataset, shuffle=sampler is None, sampler=sampler)


def make_val_loader_orig(args):
    """Batches of DIR/val, in order. Under DDP each sample goes to one rank alone, so that nothing counts twice."""
    dataset = open_folder(args, "val")
    return make_loader(args, Subset(dataset, range(args.rank, len(dataset), args.world_size)))


def make_loader(args, dataset, **order):
    pin_memory = args.device.type == "cuda"
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, pin_memory=pin_memory, **order)


def open_folder(args, split):
    """DIR/train or DIR/val as torchvision's ImageFolder, whose classes are the sorted names of the class folders."""
    transform = make_transform(args, split)
    if args.dummy:  # one image of noise again and again, so that no time goes into making it
        image = transform(Image.frombytes("RGB", (224, 224), random.randbytes(3 * 224 * 224)))
        size = TRAIN_SIZE if split == "train" else VAL_SIZE
        return TensorDataset(image.expand(size, *image.shape), torch.arange(size) % NUM_CLASSES)
    try:
        dataset = datasets.ImageFolder(os.path.join(args.data, split), transform, loader=read_file)
        classes, _ = datasets.folder.find_classes(os.path.join(args.data, "train"))
    except OSError as error:
        fail(f"{args.data}: {first_line(error)}; it must hold train/ and val/, each with a folder of images per class")
    differing = sorted(set(dataset.classes) ^ set(classes))
    if differing:
        fail(f"{args.data}: train/ and val/ differ in their class folders, e.g. {', '.join(differing[:5])}")
    if len(classes) > NUM_CLASSES:
        fail(f"{args.data}: {len(classes)} class folders, but the network has {NUM_CLASSES} outputs")
    return dataset


def make_transform(args, split):
    """From (name, bytes) of an image file to what workers hand over. Random for the training split, unless "simple".

    --decode pil: float32 (3, S, S), normalised. --decode tensor: uint8 (S, S, 3), which DeviceLoader normalises.
    """
    decode, size = decode_pil if args.decode == "pil" else decode_tensor, args.image_size
    stages = [decode, v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    if split == "train" and args.augmentation == "full":
        stages = [decode, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        if args.decode == "tensor":  # the same in half the time
            stages = [decode, functools.partial(random_crop, size=size)]
    if args.dummy:
        stages = [v2.CenterCrop(size)]
    if args.decode == "tensor":
        return v2.Compose([*stages, v2.PILToTensor(), channels_last])
    return v2.Compose([*stages, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def read_file(path):
    try:
        with open(path, "rb") as file:
            return path, file.read()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def decode_pil(file):
    """An RGB PIL image from (name, bytes) of an image file. DataError gives the name if Pillow can't read it."""
    name, data = file
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        raise DataError(f"{name}: not a readable image ({first_line(error)})") from error


# ---------------------------------------------------------------------------- train, validate


def train(train_loader, model, criterion, optimizer, epoch, args):
    """One epoch. `Data` in the printed lines is the part of `Time` spent waiting for the loader."""
    batch_time, data_time = Meter("Time", "6.3f"), Meter("Data", "6.3f")
    losses, top1, top5 = Meter("Loss", ".4e"), Meter("Acc@1", "6.2f"), Meter("Acc@5", "6.2f")
    meters = [batch_time, data_time, losses, top1, top5]
    model.train()
    end = time.time()
    for i, (images, target) in enumerate(train_loader):
        data_time.update(time.time() - end)
        images = images.to(args.device, non_blocking=True, memory_format=args.memory_format)
        target = target.to(args.device, non_blocking=True)

        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output = model(images)
            loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target)
        losses.update(loss.detach(), len(images))
        top1.update(acc1, len(images))
        top5.update(acc5, len(images))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if i % args.print_freq == 0:
            loss.item()  # waits for the device, or its work would count as waiting for the next batch
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0:
            say(args, progress(f"Epoch: [{epoch}]", i + 1, len(train_loader), meters))


@torch.no_grad()
def validate(val_loader, net, criterion, args):
    """Top-1 accuracy in percent over the samples of all ranks, each counted once.

    Takes the network inside DDP: ranks may have different numbers of batches, and DDP's forward would wait for all.
    """
    batch_time = Meter("Time", "6.3f")
    losses, top1, top5 = Meter("Loss", ".4e"), Meter("Acc@1", "6.2f"), Meter("Acc@5", "6.2f")
    meters = [batch_time, losses, top1, top5]
    if args.distributed:  # ranks keep running statistics of their own in batch norm; the checkpoint has rank 0's
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    net.eval()
    end = time.time()
    for i, (images, target) in enumerate(val_loader):
        images = images.to(args.device, non_blocking=True, memory_format=args.memory_format)
        target = target.to(args.device, non_blocking=True)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output = net(images)
            loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target)
        losses.update(loss, len(images))
        top1.update(acc1, len(images))
        top5.update(acc5, len(images))
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0 and i + 1 < len(val_loader):
            say(args, progress("Test: ", i + 1, len(val_loader), meters))
    if args.distributed:
        add_up([losses, top1, top5], args.device)
    say(args, progress("Test: ", len(val_loader), len(val_loader), meters))  # its averages are those over all ranks
    say(args, f" * Acc@1 {top1.average:.3f} Acc@5 {top5.average:.3f}")
    return top1.average


@torch.no_grad()
def accuracy(output, target):
    """Percentage of samples whose class is the first, and among the first five, of the outputs (B, 1000)."""
    hits = output.topk(5, dim=1).indices == target[:, None]
    return 100 * hits[:, 0].float().mean(), 100 * hits.any(dim=1).float().mean()


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(args, net, optimizer, scheduler, epoch, best_acc1, is_best=False, **more):
    """Rank 0 writes checkpoint.pth.tar, of which the next epoch is `epoch`. The network is the bare torchvision one."""
    if args.rank > 0:
        return
    net = net.module if isinstance(net, DataParallel) else net
    state = {
        "epoch": epoch,
        "arch": args.arch,
        "state_dict": net.state_dict(),
        "best_acc1": best_acc1,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        **more,
    }
    for name in ("model_best.pth.tar", "checkpoint.pth.tar") if is_best else ("checkpoint.pth.tar",):
        try:  # the one before stays until the new one is whole and on disk
            with open(f"{name}.partial", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{name}.partial", name)
        except (OSError, RuntimeError) as error:
            if os.path.exists(f"{name}.partial"):
                os.unlink(f"{name}.partial")
            fail(f"{os.getcwd()}: can't write {name} there ({first_line(error)})")


def load_checkpoint(args, net, optimizer, scheduler):
    """Fill all three from --resume, ours or pytorch/examples', and return what else it holds."""
    net = net.module if isinstance(net, DataParallel) else net
    try:
        state = torch.load(args.resume, map_location="cpu", weights_only=True)
        state["epoch"], state["best_acc1"] = int(state["epoch"]), float(state["best_acc1"])
        # DataParallel and DDP put "module." before the names, for AlexNet and VGG after their "features."
        weights = {name.replace("module.", ""): value for name, value in state["state_dict"].items()}
        arch, others = state["arch"], (state["optimizer"], state["scheduler"])
    except Exception as error:  # torch.load raises nearly anything on a file that is no checkpoint
        what = first_line(error).partition(". ")[0]  # without advice to run what the file may hold
        fail(f"--resume {args.resume}: no checkpoint of this script ({what})")
    if arch != args.arch:
        fail(f"--resume {args.resume}: it holds a {arch}; add --arch {arch}")
    try:
        net.load_state_dict(weights)
        optimizer.load_state_dict(others[0])
        scheduler.load_state_dict(others[1])
    except (RuntimeError, ValueError, KeyError) as error:
        fail(f"--resume {args.resume}: it does not fit {args.arch} ({first_line(error)})")
    say(args, f"=> loaded checkpoint '{args.resume}' (epoch {state['epoch']})")
    return {name: state[name] for name in ("epoch", "best_acc1", "position") if name in state}


# ---------------------------------------------------------------------------- meters


class Meter:
    """The last value of a quantity and its average weighted by n. Tensors stay on their device until printed."""

    def __init__(self, name, form):
        self.name, self.form, self.value, self.sum, self.count = name, form, 0.0, 0.0, 0

    def update(self, value, n=1):
        self.value = value
        self.sum += value * n
        self.count += n

    @property
    def average(self):
        return float(self.sum) / max(self.count, 1)

    def __str__(self):
        return f"{self.name} {float(self.value):{self.form}} ({self.average:{self.form}})"


def progress(prefix, i, total, meters):
    """One printed line; `Epoch: [3][ 10/100]`, then each meter as value (average), tab-separated."""
    return "\t".join([f"{prefix}[{i:{len(str(total))}}/{total}]", *map(str, meters)])


def add_up(meters, device):
    """Make the meters' averages those over all ranks."""
    totals = torch.tensor([[float(m.sum), m.count] for m in meters], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    for meter, (total, count) in zip(meters, totals.tolist(), strict=True):
        meter.sum, meter.count = total, count


# ============================================================================ the shards
# From here on main-wds.py only adds to main-orig.py: how shards are divided, decoded and made into batches, and how an
# epoch is stopped and resumed. How they are found and read is in makeshards.py, which checks them with the same code.

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or sys.maxsize  # 89 million; what is larger Pillow refuses, or warns of
PREFETCH = 2  # batches that a worker makes ahead: the DataLoader's prefetch_factor, on which Shards.batches relies


def make_train_loader_wds(args):
    """Batches of the training shards as make_train_loader_orig's are of the folders: as many, and as large."""
    shards = Shards(args, "train")
    if sum(shards.lengths) < args.world_size:
        fail(f"{args.world_size} ranks but {sum(shards.lengths)} training samples: start fewer processes")
    shards.set_epoch(0)  # from now on the training loop sets it
    return make_loader_wds(args, shards)


def make_val_loader_wds(args):
    """Batches of the validation shards, in order. Under DDP each sample goes to one rank alone."""
    return make_loader_wds(args, Shards(args, "val"))


def make_loader_wds(args, shards):
    return DataLoader(  # the workers make the batches, and live on from epoch to epoch
        shards,
        batch_size=None,
        num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
        prefetch_factor=PREFETCH if args.workers else None,
        persistent_workers=args.workers > 0,
    )


LOADERS = {
    "orig": (make_train_loader_orig, make_val_loader_orig),
    "wds": (make_train_loader_wds, make_val_loader_wds),
}


class Shards(IterableDataset):
    """One rank's batches of an epoch. In a worker of the DataLoader: that worker's share of them, by plan()."""

    def __init__(self, args, split):
        self.urls, self.lengths, self.seed = find_shards(args, split)
        self.rank, self.world_size, self.batch_size = args.rank, args.world_size, args.batch_size
        self.workers, self.shuffle, self.transform = args.workers, args.shuffle, make_transform(args, split)
        # the epoch, -1 for validation, and its first batch; shared, so that the workers see what the training loop sets
        self.start, self.resumed = torch.tensor([-1, 0]).share_memory_(), (None, 0)

    def set_epoch(self, epoch):
        self.start[:] = torch.tensor([epoch, self.resumed[1] if epoch == self.resumed[0] else 0])

    def resume(self, args, epoch, position):
        """Begin that epoch where a checkpoint says; DataError if the rest of its batches would not be the same now."""
        self.seed = position["seed"] if args.seed is None else self.seed
        for name, value in self.order().items():
            if value != (then := position.get(name)):
                what = f"it stopped within an epoch, with {name} {then!s:.40}, not {value!s:.40}"
                way_out = f"give the same, or begin the epoch anew with --start-epoch {epoch}"
                fail(f"--resume {args.resume}: {what}; samples would be lost or come twice: {way_out}")
        self.resumed = (epoch, position["step"])

    def order(self):
        """What decides on the order of the batches, besides the epoch."""
        shards = [[os.path.basename(url), length] for url, length in zip(self.urls, self.lengths, strict=True)]
        names = ("seed", "shuffle", "world_size", "workers", "batch_size")  # the last two are of a rank
        return {"shards": shards, **{name: getattr(self, name) for name in names}}

    def pieces(self, worker, num_workers):
        epoch = None if self.start[0] < 0 else int(self.start[0])
        return plan(self.lengths, epoch, self.seed, self.rank, self.world_size, worker, num_workers, self.batch_size)

    def __len__(self):
        samples = sum(last - first for _, first, last in self.pieces(0, 1))
        return max(math.ceil(samples / self.batch_size) - int(self.start[1]), 0)

    def __iter__(self):
        if not len(self):  # resumed after the epoch's last batch
            return iter(())
        info = get_worker_info()
        number, num_workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, step = self.start.tolist()
        worker = (number + step) % num_workers  # for the loader asks its first one for the batch of that step
        pieces, done = self.pieces(worker, num_workers), len(range(worker, step, num_workers))
        stages, seeds = [lambda: read_pieces(pieces, self.urls, self.lengths)], itertools.repeat(None)
        if epoch >= 0:
            seeds = (f"{self.seed} {epoch} {self.rank} {i}" for i in itertools.count(step + number, num_workers))
            draws = random.Random(f"{self.seed} {epoch} {self.rank} of worker {worker}")
            stages.append(wds.shuffle(self.shuffle, rng=draws))  # of undecoded samples: about 100 KB each
            stages.append(lambda samples: itertools.islice(samples, done * self.batch_size, None))
        return iter(wds.DataPipeline(*stages, lambda samples: self.batches(samples, seeds)))

    def decode(self, sample):
        """(image, class) from a sample of read_pieces."""
        name = f"{sample['__url__']}: sample {sample['__key__']}".replace("\n", " ")
        if sample.get("image") is None or sample.get("cls") is None:
            raise DataError(f"{name} does not hold one image and one class")
        label = sample["cls"].strip()
        if not label.isdigit() or len(label) > 9 or int(label) >= NUM_CLASSES:
            raise DataError(f"{name}: its class {sample['cls'][:20]!r} is not one from 0 to {NUM_CLASSES - 1}")
        return self.transform((name, sample["image"])), int(label)

    def batches(self, samples, seeds):
        """(images, target) of each --batch-size samples, decoded: the last of the pipeline's stages.

        The images of every third batch lie in the same shared memory, for fresh memory would take 0.2 ms a sample. By
        then the DataLoader has done with a batch: it has PREFETCH waiting from each worker, and one in hand. (Also at
        the end, when it asks the others for what a worker no longer has, as plan() gives no worker two batches more
        than another.) So copy a batch that you want to keep, and let PREFETCH be the DataLoader's prefetch_factor.
        """
        memory = [None] * (PREFETCH + 1)
        with ThreadPoolExecutor(1) as thread:  # its memory stays apart from the reader's: 3 percent faster
            for turn, seed in zip(itertools.cycle(range(len(memory))), seeds, strict=False):
                batch = list(itertools.islice(samples, self.batch_size))
                if not batch:
                    return
                memory[turn], target = thread.submit(self.decode_batch, batch, memory[turn], seed).result()
                yield memory[turn][: len(batch)], target

    def decode_batch(self, samples, memory, seed):
        """The samples' images in the memory, which is made if it is None, and their classes."""
        if seed:  # for the augmentation: each batch has its own, so that an epoch may begin with any
            random.seed(seed)
            torch.manual_seed(random.getrandbits(63))
        target = []
        for i, sample in enumerate(samples):
            image, label = self.decode(sample)
            if memory is None:
                memory = image.new_empty((len(samples), *image.shape)).share_memory_()
            memory[i] = image
            target.append(label)
        return memory, torch.tensor(target)


# ---------------------------------------------------------------------------- who reads what


def plan(lengths, epoch, seed, rank, world_size, worker, num_workers, batch_size):
    """What a worker reads in an epoch: a list of (shard, first, last) in reading order, the samples first <= i < last.

    The shards, in an order drawn from (seed, epoch), lie end to end. Each rank takes an equal stretch of the line, the
    last one wrapping round to its start; epoch None is validation, in order and without wrapping. Each worker takes
    a stretch of whole batches out of its rank's. The loader asks the workers in turn for a batch, so the stretch that
    ends the rank's, with the short batch, goes to the worker whose turn comes last.
    """
    order, total = list(range(len(lengths))), sum(lengths)
    if epoch is None:
        first, end = total * rank // world_size, total * (rank + 1) // world_size
    else:
        random.Random(f"{seed} {epoch}").shuffle(order)
        share = math.ceil(total / world_size)
        first = rank * share % total
        end = first + share
    batches = math.ceil((end - first) / batch_size)
    turns = [(batches + i) % num_workers for i in range(num_workers)]  # the workers in the order of their stretches
    before = turns[: turns.index(worker)]
    first += batch_size * sum(len(range(w, batches, num_workers)) for w in before)
    end = min(end, first + batch_size * len(range(worker, batches, num_workers)))
    pieces, start = [], 0
    for shard in order + order:  # twice, for the stretch that wraps round
        piece = (shard, max(first - start, 0), min(end - start, lengths[shard]))
        if piece[1] < piece[2]:
            pieces.append(piece)
        start += lengths[shard]
    return pieces


def find_shards(args, split):
    """(urls, samples in each, seed) of a split, found or drawn by rank 0 and the same on all ranks."""
    found = [None]
    if args.rank == 0:
        pattern, size = (args.trainshards, args.trainsize) if split == "train" else (args.valshards, args.valsize)
        seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
        try:
            found = [(*makeshards.list_shards(args.shards, split, pattern, size), seed)]
        except makeshards.DataError as error:  # for all ranks: they wait for what comes
            found = [error]
    if args.distributed:
        dist.broadcast_object_list(found, device=args.device)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def read_pieces(pieces, urls, lengths):
    """The samples of the plan: {"__url__", "__key__", "image": bytes, "cls": bytes}, none of them decoded."""
    for shard, first, last in pieces:
        yield from makeshards.read_shard(urls[shard], first, last, lengths[shard])


# ---------------------------------------------------------------------------- from a file's bytes to a tensor


def decode_tensor(file):
    """uint8 (3, H, W), in RGB, from (name, bytes) of an image file. DataError gives the name if nothing can read it.

    Torchvision decodes whole JPEGs of one or three channels. What else there is, CMYK and PNG, broken and cut off, goes
    to Pillow, and so does everything once torchvision has no decoder: since 0.29 its Python function, though not this
    operator below it, warns at each call that it will go.
    """
    _, data = file
    if hasattr(torch.ops.image, "decode_jpeg") and data.endswith(b"\xff\xd9") and 0 < jpeg_pixels(data) <= MAX_PIXELS:
        try:  # mode 0: the channels as they are; and EXIF's orientation is left alone, as Pillow does
            image = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, False)
            if image.shape[0] in (1, 3):
                return image.expand(3, -1, -1)
        except RuntimeError:  # perhaps Pillow can
            pass
    return v2.functional.pil_to_tensor(decode_pil(file))


def jpeg_pixels(data):
    """Pixels of a JPEG by its header, for a small file may unpack to gigabytes; 0 if that is not where it should be."""
    i = 2
    while data[:2] == b"\xff\xd8" and data[i : i + 1] == b"\xff" and len(data) >= i + 9:
        if data[i + 1] < 0xC0 or data[i + 1] == 0xFF or data[i + 1] in range(0xD0, 0xDB):  # none that has a length here
            return 0
        if data[i + 1] in range(0xC0, 0xD0) and data[i + 1] not in (0xC4, 0xC8, 0xCC):  # a frame's header
            return int.from_bytes(data[i + 5 : i + 7], "big") * int.from_bytes(data[i + 7 : i + 9], "big")
        i += 2 + int.from_bytes(data[i + 2 : i + 4], "big")
    return 0


def random_crop(image, size):
    """uint8 (3, size, size) from (3, H, W): a random part of the image, in half of all cases mirrored.

    The distribution is that of v2.RandomResizedCrop and v2.RandomHorizontalFlip, which take 0.5 ms of a sample's 1.7.
    This takes half of that: it draws plain numbers, not tensors, and lays out the crop as the resizing works fastest.
    """
    top, left, height, width = crop_box(*image.shape[1:])
    crop = image[None, :, top : top + height, left : left + width].clone(memory_format=torch.channels_last)
    image = nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(2) if random.random() < 0.5 else image


def crop_box(height, width):
    """(top, left, height, width) of 8 to 100 percent of an image, 3:4 to 4:3, as v2.RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def channels_last(image):
    """(H, W, 3) from (3, H, W): how the decoder laid it out in memory, and how the batch stays."""
    return image.permute(1, 2, 0)


# ---------------------------------------------------------------------------- to the device, and what stops and resumes


class DeviceLoader:
    """Brings a loader's uint8 batches to the device and normalises them there; others pass as they are.

    On a GPU that happens in a stream of its own, for a batch while the one before is worked on.
    """

    def __init__(self, loader, args):
        self.loader, self.device, self.memory_format = loader, args.device, args.memory_format
        self.sampler = loader.dataset if isinstance(loader.dataset, Shards) else loader.sampler
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.mean, self.std = (255 * torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        loader.worker_init_fn = leave_signals
        Finalize(None, end_workers, exitpriority=0)  # atexit is too late for the processes of mp.spawn

    def __len__(self):
        return len(self.sampler) if isinstance(self.sampler, Shards) else len(self.loader)

    def __iter__(self):
        yield from self.ahead() if self.stream else map(self.bring, self.loader)

    def ahead(self):
        """The batches, each handed out once the copy of the next one has begun."""
        ready = None
        self.stream.wait_stream(torch.cuda.current_stream())
        for batch in self.loader:
            with torch.cuda.stream(self.stream):
                coming = self.bring(batch)
            if ready:
                yield ready
            torch.cuda.current_stream().wait_stream(self.stream)
            for tensor in coming:  # or its memory might be given away while the training still reads it
                tensor.record_stream(torch.cuda.current_stream())
            ready = coming
        if ready:
            yield ready

    def bring(self, batch):
        """(images, target) on the device: float32 (B, 3, H, W), normalised; int64 (B)."""
        images, target = (tensor.to(self.device, non_blocking=self.device.type == "cuda") for tensor in batch)
        if images.dtype == torch.uint8:  # (B, H, W, 3), one byte a channel up to here
            images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
            images.sub_(self.mean).div_(self.std)
        return images, target


class TrainLoader(DeviceLoader):
    """The training loop's batches. SIGTERM and SIGINT end them between two, on all ranks between the same two.

    From shards it goes on there when the checkpoint is resumed that save(epoch=, position=) has written: at a signal,
    each --checkpoint-steps, and at the end of an epoch, so that validation may be interrupted at any moment.
    """

    def __init__(self, loader, args, state, save):
        super().__init__(loader, args)
        self.args, self.save, self.caught, self.doing, self.pid = args, save, 0, "outside", os.getpid()
        self.exact, self.way_on = isinstance(self.sampler, Shards), "--resume goes on after the last whole epoch"
        self.group = dist.new_group(backend="gloo") if args.distributed else None  # NCCL has none for the CPU
        if self.exact and "position" in state and args.start_epoch is None:
            self.sampler.resume(args, state["epoch"], state["position"])
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # an epoch may have no step left
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if os.getpid() != self.pid:  # a loading process that has just been forked
            return
        self.caught = self.caught or number
        if self.doing == "fetching":  # which may take long: where data comes slowly, or not at all
            self.doing = "a step"
            raise KeyboardInterrupt
        while frame and frame.f_code is not save_checkpoint.__code__:  # which goes on to its end
            frame = frame.f_back
        if self.doing == "outside" and not frame:  # in validation, say
            self.stop(self.caught)

    def stop(self, number):
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: None)  # with SIG_IGN, Python would complain of one that came with the first
        if self.args.rank == 0:
            script, name = os.path.basename(sys.argv[0]), signal.Signals(number).name
            sys.stderr.write(f"{script}: stopped by {name}; {self.way_on}\n")
        sys.exit(128 + number)

    def __iter__(self):
        batches, (epoch, step) = super().__iter__(), self.sampler.start.tolist() if self.exact else (0, 0)
        while True:
            try:
                self.doing, batch = "fetching", None
                batch = None if self.caught else next(batches, None)
                self.doing = "a step"
            except BaseException:
                self.doing = "a step"
                if not self.caught:
                    raise
            number = self.agree_on_signal()
            if number or batch is None:
                break
            if self.exact:
                set_seed(self.args, f"{epoch} {step}")
            yield batch
            step += 1
            if step % (self.args.checkpoint_steps or sys.maxsize) == 0:
                self.save_position(epoch, step)
        self.save_position(epoch, step)
        if number and self.group:
            dist.barrier(self.group)  # until the checkpoint is there
            dist.destroy_process_group()
        self.doing = "outside"
        if number or self.caught:
            self.stop(number or self.caught)

    def agree_on_signal(self):
        """The signal that some rank has got, or 0. The ranks of a node need 0.1 ms a step for it."""
        number = torch.tensor(self.caught)
        if self.group:
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return int(number)

    def save_position(self, epoch, step):
        if self.exact:
            self.save(epoch=epoch, position={"step": step, **self.sampler.order()})
            self.way_on = f"--resume checkpoint.pth.tar goes on after step {step} of epoch {epoch}"


def leave_signals(_):
    """In a loading process: leave to the main one what Ctrl-C and schedulers send to all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # of the thread that hands over a batch, when the main process has gone


def end_workers():
    """At the main process's end: end the loading processes, which ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the DataLoader would call it an error
    threading.excepthook = lambda _: None  # as would the thread that pins memory
    for process in mp.active_children():
        process.kill()


if __name__ == "__main__":
    main()
