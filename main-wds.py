#!/usr/bin/env python3
"""Train a torchvision classifier on ImageNet.

    python main-wds.py                              one process: on a GPU if there is one, else on the CPU
    python main-wds.py --shards https://HOST/imagenet          shards on a web server
    python main-wds.py --dataset orig --data DIR    from folders of images, to compare
    python main-wds.py -a resnet50 --gpu 1          one GPU of several
    torchrun --nproc-per-node=8 main-wds.py         eight GPUs of this node, one process each
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 main-wds.py
    python main-wds.py --multiprocessing-distributed           all GPUs of this node; without a GPU two CPU processes
    python main-wds.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://HOST:29500
    python main-wds.py --resume checkpoint.pth.tar             continue where SIGTERM or Ctrl-C stopped a run
    python main-wds.py --evaluate --pretrained                 validate a pre-trained model
    python main-wds.py --dummy                                 measure the speed without any data
    makeshards.py writes the shards; diff main-orig.py main-wds.py shows what reading them adds

For two nodes, run the torchrun line on both, or the --world-size line with --rank 0 on the first and --rank 1 on the
second. Each epoch writes checkpoint.pth.tar to the current folder, and model_best.pth.tar if it is the best so far.
"""

import argparse
import difflib
import io
import math
import os
import random
import signal
import sys
import tempfile
import time
import zlib

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

# isort: split
# and for the shards:
import functools
import hashlib
import itertools
import json
import re
import threading
import urllib.request
import warnings
from http.client import InvalidURL
from multiprocessing.util import Finalize
from urllib.error import HTTPError
from urllib.parse import quote

import webdataset as wds
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchvision.io import ImageReadMode
from webdataset.gopen import set_options
from webdataset.tariterators import group_by_keys, tar_file_expander

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels: red, green, blue, from 0 to 1
STD = (0.229, 0.224, 0.225)
TRAIN_SIZE, VAL_SIZE = 1_281_167, 50_000  # of ImageNet, for --dummy
NUM_CLASSES = 1000  # outputs of torchvision's classifiers; a dataset may use fewer
ARCHS_URL = "https://pytorch.org/vision/stable/models.html"
ARCHS = [name for name in models.list_models(module=models) if name not in ("googlenet", "inception_v3")]


# ---------------------------------------------------------------------------- options


def parse_args():
    parser = argparse.ArgumentParser(description="PyTorch ImageNet training", allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    count = at_least(1)
    number = at_least(0)
    real = at_least(0, float)
    add("--dataset", "--loader", choices=LOADERS, default="wds", help="read shards or folders (default: %(default)s)")
    add("--data", metavar="DIR", default="./data", help="orig: path to the dataset (default: %(default)s)")
    add("--shards", metavar="URL", default="./shards", help="wds: folder, URL or pipe: command (default: %(default)s)")
    add("--index", metavar="URL", help=f"wds: path or URL of the index (default: {INDEX} in --shards)")
    add("--shuffle", type=number, default=1000, metavar="N", help="wds: shuffle buffer size (default: %(default)s)")
    add("--decode", choices=DECODERS, default="tensor", help="JPEG decoder: fast or Pillow (default: %(default)s)")
    add("--augmentation", choices=["full", "simple"], default="full", help="simple: center crop (default: %(default)s)")
    add("--image-size", type=count, default=224, metavar="N", help="pixels per side (default: %(default)s)")
    add("--checkpoint-steps", type=count, metavar="N", help="wds: also save a checkpoint every N steps (default: off)")
    add("-a", "--arch", default="resnet18", help=f"model architecture, from {ARCHS_URL} (default: %(default)s)")
    add("-j", "--workers", type=number, default=4, metavar="N", help="data workers per node (default: %(default)s)")
    add("--epochs", type=number, default=90, metavar="N", help="number of epochs to run (default: %(default)s)")
    add("--start-epoch", type=number, metavar="N", help="epoch to start with (default: 0, or from --resume)")
    add("-b", "--batch-size", type=count, default=256, metavar="N", help="batch size per node (default: %(default)s)")
    add("--lr", "--learning-rate", type=real, default=0.1, help="initial learning rate (default: %(default)s)")
    add("--momentum", type=real, default=0.9, metavar="M", help="momentum (default: %(default)s)")
    add("--wd", "--weight-decay", type=real, default=1e-4, dest="weight_decay", help="decay (default: %(default)s)")
    add("-p", "--print-freq", type=count, default=10, metavar="N", help="print every N steps (default: %(default)s)")
    add("--resume", metavar="PATH", help="checkpoint to resume from (default: none)")
    add("-e", "--evaluate", action="store_true", help="validate only")
    add("--pretrained", action="store_true", help="start from torchvision's pre-trained weights")
    add("--world-size", type=int, default=-1, metavar="N", help="number of nodes (default: 1)")
    add("--rank", type=int, default=-1, metavar="N", help="rank of this node, from 0 (default: 0)")
    add("--dist-url", default="tcp://127.0.0.1:23456", metavar="URL", help="rendezvous URL (default: %(default)s)")
    add("--dist-backend", default="nccl", metavar="NAME", help="backend for CUDA devices (default: %(default)s)")
    add("--seed", type=number, metavar="N", help="make training reproducible, but slower (default: none)")
    add("--gpu", type=number, metavar="N", help="use this GPU only (default: all)")
    add("--no-accel", action="store_true", help="use the CPU even if there is an accelerator")
    add("--multiprocessing-distributed", action="store_true", help="start one process for each GPU of this node")
    add("--dummy", action="store_true", help="use fake data, as many images as ImageNet has")
    add("--amp", action="store_true", help="use bfloat16 autocast and channels-last memory format")
    args = parser.parse_args()
    args.memory_format = torch.channels_last if args.amp else torch.contiguous_format
    if args.arch not in ARCHS:
        close = difflib.get_close_matches(args.arch, ARCHS) or ["resnet18", "resnet50"]
        fail(f"--arch {args.arch}: not a single-output torchvision classifier; try {', '.join(close)}")
    return args


def at_least(low, kind=int):
    """An argparse type: numbers of at least low; integers unless kind is float."""

    def number(text):
        value = kind(text)
        if not low <= value < sys.maxsize:  # false for NaN, too
            raise argparse.ArgumentTypeError(f"{text} is less than {low}, or too large")
        return value

    return number


class DataError(Exception):
    """A user error; the message names the cause and the fix. main() prints it, whichever process raised it."""


def fail(message):
    raise DataError(message)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def print_line(line, error=False):
    """Print a line, its control characters escaped. A closed terminal or a full disk does not end training."""
    file = sys.stderr if error else sys.stdout
    line = "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
    try:
        print(line, file=file, flush=True)
    except OSError:  # discard what follows; else Python would fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# ---------------------------------------------------------------------------- main


def main():
    try:
        args = parse_args()
        torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
        if torchrun:
            args.dist_url = "env://"
            args.multiprocessing_distributed = False
        if args.dist_url == "env://":  # counts processes or, with --multiprocessing-distributed, nodes
            if args.world_size == -1:
                args.world_size = from_environment("WORLD_SIZE")
            if args.rank == -1:
                args.rank = from_environment("RANK")
        args.world_size = max(args.world_size, 1)
        if args.world_size == 1 and args.rank == -1:
            args.rank = 0
        if not 0 <= args.rank < args.world_size:
            fail(f"--rank {args.rank} --world-size {args.world_size}: give a rank from 0 to {args.world_size - 1}")
        if torchrun:
            main_worker(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), args)
        elif args.multiprocessing_distributed:
            spawn(args)
        else:
            main_worker(args.gpu, 1, args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        # that of a data worker or of a spawned process arrives as the text of its traceback
        _, is_data_error, message = f"{type(error).__name__}: {error}".rpartition("DataError: ")
        if not is_data_error:
            raise
        print_line(f"{os.path.basename(sys.argv[0])}: {message.strip()}", error=True)
        sys.exit(2)


def from_environment(name):
    value = os.environ.get(name, "")
    if not value.isdecimal():
        fail(f"--dist-url env://: {name} is not set in the environment; torchrun sets it")
    return int(value)


def spawn(args):
    """Start the processes of this node. A signal that only this process gets is forwarded to them."""
    has_gpus = torch.accelerator.is_available() and not args.no_accel
    ngpus_per_node = torch.accelerator.device_count() if has_gpus else 2
    args.world_size *= ngpus_per_node
    received = []

    def note(number, _):
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    context = mp.spawn(main_worker, (ngpus_per_node, args), nprocs=ngpus_per_node, join=False)
    forwarded = 0
    try:
        while not context.join(timeout=0.2):
            if len(received) > forwarded:
                forwarded = len(received)
                for process in context.processes:
                    if process.is_alive():
                        os.kill(process.pid, received[0])
    except mp.ProcessExitedException as error:
        if not received and error.exit_code <= 128:  # else a rank has stopped after a signal
            raise
        sys.exit(128 + received[0] if received else error.exit_code)
    if received:
        sys.exit(128 + received[0])


def main_worker(gpu, ngpus_per_node, args):
    """Train and validate in one of the ngpus_per_node processes of this node."""
    if sys.platform == "linux":  # mp.spawn's children would spawn data workers, too, which takes seconds
        mp.set_start_method("fork", force=True)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack letters of file names
    if args.multiprocessing_distributed:
        args.rank = args.rank * ngpus_per_node + gpu
    args.distributed = args.world_size > 1
    device = pick_device(gpu, ngpus_per_node, args)
    args.device = device
    if args.distributed:
        backend = args.dist_backend
        if backend == "nccl":
            backend = dist.get_default_backend_for_device(device)  # e.g. gloo on a CPU
        dist.init_process_group(backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank)
    if args.batch_size < ngpus_per_node:
        fail(f"--batch-size {args.batch_size}: too small for the {ngpus_per_node} processes of this node")
    if args.workers and len(tempfile.gettempdir()) > 75:  # PyTorch would wait forever for its workers
        fail(f"TMPDIR={tempfile.gettempdir()}: too long for the workers' sockets; at most 75 characters")
    if args.rank == 0 and not args.evaluate and not os.access(".", os.W_OK):
        fail("can't write checkpoints to the current folder; run in another one")
    args.batch_size //= ngpus_per_node
    args.workers = math.ceil(args.workers / ngpus_per_node)
    if ngpus_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:  # else the processes compete for the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ngpus_per_node))

    set_seed(args, epoch=-1)
    say(args, f"=> {'using pre-trained' if args.pretrained else 'creating'} model '{args.arch}'")
    model = make_model(args).to(device, memory_format=args.memory_format)
    say(args, f"Using device: {device}")
    if device.type == "cpu":
        say(args, "using CPU, this will be slow")
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    elif device.type == "cuda" and args.gpu is None and "RANK" not in os.environ and torch.cuda.device_count() > 1:
        if args.amp:  # DataParallel's threads would use float16 instead of bfloat16
            fail("--amp: needs one process per GPU; add --multiprocessing-distributed, or --gpu 0 to use one GPU")
        model = DataParallel(model)
    criterion = nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    checkpoint = load_checkpoint(args, model, optimizer, scheduler)
    first_epoch = checkpoint["epoch"] if args.start_epoch is None else args.start_epoch
    best_acc1 = checkpoint["best_acc1"]

    def state(epoch):
        """What a checkpoint holds; epoch is the one to resume at."""
        return {
            "epoch": epoch,
            "arch": args.arch,
            "state_dict": getattr(model, "module", model).state_dict(),
            "best_acc1": best_acc1,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }

    say(args, f"=> decoding JPEGs with {'Pillow' if args.decode == 'pil' else jpeg_decoder()[0]}")
    args.data_seed = choose_seed(args, checkpoint)
    make_train_loader, make_val_loader = LOADERS["orig" if args.dummy else args.dataset]
    val_loader = make_val_loader(args)
    train_loader = None if args.evaluate else make_train_loader(args)
    run = Run(args, state)  # from here on, a signal stops after a step
    val_loader = RunLoader(val_loader, run)
    if not args.evaluate:
        train_loader = RunLoader(train_loader, run, checkpoint)
    contents = [loader.contents for loader in (val_loader, train_loader) if loader is not None]
    weights = list(model.parameters())[-1].detach().cpu().numpy()  # differ between any two checkpoints
    facts = {"checkpoint's epoch": checkpoint["epoch"], "checksum of its weights": zlib.crc32(weights.tobytes())}
    check_ranks_agree(args, {**shared_options(args), **facts, "data": contents})
    epochs = range(first_epoch, args.epochs)
    if args.evaluate:
        validate(val_loader, model, criterion, args)
        epochs = ()
    elif not epochs:
        say(args, f"=> all epochs are done (--epochs {args.epochs}); increase it to continue")
    for epoch in epochs:
        set_seed(args, epoch)
        train_loader.set_epoch(epoch)
        train(train_loader, model, criterion, optimizer, epoch, device, args)
        acc1 = validate(val_loader, model, criterion, args)
        scheduler.step()
        is_best = acc1 > best_acc1
        best_acc1 = max(acc1, best_acc1)
        if args.rank == 0:
            save_checkpoint(state(epoch + 1), is_best)
    if args.distributed:
        dist.destroy_process_group()


def pick_device(gpu, ngpus_per_node, args):
    """The accelerator (CUDA, or whichever PyTorch finds) with index --gpu or gpu, else the CPU."""
    if args.no_accel or not torch.accelerator.is_available():
        if args.gpu is not None and not args.no_accel:
            say(args, f"=> --gpu {args.gpu} is ignored: no GPU found")
        return torch.device("cpu")
    if args.distributed and torch.accelerator.current_accelerator().type == "mps":  # it has no collectives
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = args.gpu if args.gpu is not None and not args.multiprocessing_distributed else (gpu or 0) % count
    if not 0 <= index < count:
        fail(f"--gpu {index}: this machine has {count} GPUs, numbered from 0")
    if 1 < count < ngpus_per_node:
        fail(f"{ngpus_per_node} processes on this node, but it has {count} GPUs: start one process per GPU")
    if count > 1:
        torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def shared_options(args):
    """{option: value} of those that must be the same on all ranks; batch size and workers are those of a rank."""
    of_a_node = {"data", "shards", "index", "resume", "dist_url"}
    of_a_rank = {"rank", "gpu", "device"}
    shared = vars(args).keys() - of_a_node - of_a_rank
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in sorted(shared)}
    return {"script": os.path.basename(sys.argv[0]), **options}


def check_ranks_agree(args, values):
    """Raise DataError if a value differs between ranks: training would hang, or not be what was asked for."""
    if not args.distributed:
        return
    by_rank = [None] * args.world_size
    dist.all_gather_object(by_rank, values)
    for name, first in by_rank[0].items():
        for rank, others in enumerate(by_rank):
            if others.get(name) != first:
                fail(f"{name} is {first} on rank 0 but {others.get(name)} on rank {rank}; it must be the same")


def set_seed(args, epoch):
    """With --seed, give each epoch a random state of its own, so that a resumed run draws the same numbers."""
    if args.seed is not None:
        random.seed(f"{args.seed} {epoch} {args.rank}")
        torch.manual_seed(random.getrandbits(63))
        torch.backends.cudnn.deterministic = True


def say(args, line):
    """Print a line on rank 0 only."""
    if args.rank == 0:
        print_line(line)


def make_model(args):
    """The model --arch with its 1000 outputs; --pretrained loads torchvision's V1 weights, for 224 pixels."""
    weights = None
    if args.pretrained:
        choices = models.get_model_weights(args.arch)
        names = ("IMAGENET1K_V1", "IMAGENET1K_SWAG_LINEAR_V1")
        weights = next((choices[name] for name in names if name in choices.__members__), choices.DEFAULT)
    try:
        return models.get_model(args.arch, weights=weights)
    except Exception as error:  # no network, or a broken file
        if not weights:
            raise
        fail(f"--pretrained: no {weights.url} in {torch.hub.get_dir()}/checkpoints ({first_line(error)})")


# ---------------------------------------------------------------------------- loaders


def make_train_loader_orig(args):
    """Batches of DIR/train, in a new order each epoch. Under DDP all ranks get the same number of samples.

    images: float32 (B, 3, 224, 224), normalized; target: int64 (B).
    """
    dataset = open_folder(args, "train")
    if len(dataset) < args.world_size:
        fail(f"{args.world_size} ranks but {len(dataset)} training samples: start fewer processes")
    sampler = DistributedSampler(dataset, seed=args.seed or 0) if args.distributed else None
    return make_loader(args, dataset, shuffle=sampler is None, sampler=sampler)


def make_val_loader_orig(args):
    """Batches of DIR/val, in order. Under DDP each sample goes to one rank only, so that none counts twice."""
    dataset = open_folder(args, "val")
    return make_loader(args, dataset, sampler=range(args.rank, len(dataset), args.world_size))


def make_loader(args, dataset, **order):
    pin_memory = args.device.type == "cuda"
    return DataLoader(dataset, args.batch_size, num_workers=args.workers, pin_memory=pin_memory, **order)


def open_folder(args, split):
    """DIR/train or DIR/val as torchvision's ImageFolder, whose classes are the sorted names of the class folders."""
    transform = make_transform(args, split)
    if args.dummy:  # always the same random image: generating it must take no time
        image = transform(Image.frombytes("RGB", (224, 224), random.randbytes(3 * 224 * 224)))
        size = TRAIN_SIZE if split == "train" else VAL_SIZE
        return TensorDataset(image.expand(size, *image.shape), torch.arange(size) % NUM_CLASSES)
    try:
        load = functools.partial(load_image, decode=DECODERS[args.decode])
        dataset = datasets.ImageFolder(os.path.join(args.data, split), transform, loader=load)
        classes, _ = datasets.folder.find_classes(os.path.join(args.data, "train"))
    except OSError as error:
        fail(f"{args.data}: {first_line(error)}; it must hold train/ and val/, each with a folder of images per class")
    differing = sorted(set(dataset.classes) ^ set(classes))
    if differing:
        fail(f"{args.data}: train/ and val/ have different class folders, e.g. {', '.join(differing[:5])}")
    if len(classes) > NUM_CLASSES:
        fail(f"{args.data}: {len(classes)} class folders, but the model has {NUM_CLASSES} outputs")
    say(args, f"=> {split}: {len(dataset)} images, {len(classes)} classes")
    return dataset


def make_transform(args, split):
    """From a decoded image to what the workers return. Random in training, unless --augmentation simple.

    --decode pil: float32 (3, S, S), normalized. --decode tensor: uint8 (S, S, 3), which to_device() normalizes.
    """
    size = args.image_size
    stages = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    if split == "train" and args.augmentation == "full":
        stages = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        if args.decode == "tensor":  # equivalent, in half the time
            stages = [functools.partial(random_crop, size=size)]
    if args.dummy:
        stages = [v2.PILToTensor(), v2.CenterCrop(size)]
    if args.decode == "tensor":
        return v2.Compose([*stages, to_hwc])
    return v2.Compose([*stages, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def decode_pil(data):
    """RGB PIL image from the bytes of an image file; DataError if Pillow can't decode it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises almost any exception type on broken files
        reason = first_line(error).partition(" <_io.")[0]  # without the address of the bytes
        raise DataError(f"not a readable image ({reason})") from error


def load_image(path, decode):
    """An image from its file. DataError names the file if it can't be read or decoded."""
    try:
        with open(path, "rb") as file:
            return decode(file.read())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------- train, validate


def train(train_loader, model, criterion, optimizer, epoch, device, args):
    """Train for an epoch. `Data`: seconds of `Time` spent waiting for the loader."""
    batch_time = AverageMeter("Time", ":6.3f")
    data_time = AverageMeter("Data", ":6.3f")
    losses = AverageMeter("Loss", ":.4e")
    top1 = AverageMeter("Acc@1", ":6.2f")
    top5 = AverageMeter("Acc@5", ":6.2f")
    progress = ProgressMeter(len(train_loader), [batch_time, data_time, losses, top1, top5], f"Epoch: [{epoch}]")
    model.train()
    end = time.time()
    i = train_loader.first_step - 1
    for i, (images, target) in enumerate(train_loader, train_loader.first_step):
        data_time.update(time.time() - end)
        images = images.to(device, non_blocking=True, memory_format=args.memory_format)
        target = target.to(device, non_blocking=True)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            output = model(images)
            loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        losses.update(loss.detach(), images.size(0))
        top1.update(acc1, images.size(0))
        top5.update(acc5, images.size(0))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if i % args.print_freq == 0:
            loss.item()  # waits for the device; else its work would count as waiting for the next batch
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0 and args.rank == 0:
            progress.display(i + 1)
    if i + 1 != len(train_loader):
        fail(f"the training loader ended after {i + 1} of {len(train_loader)} batches")


@torch.no_grad()
def validate(val_loader, model, criterion, args):
    """Top-1 accuracy in percent over the samples of all ranks, each counted once."""
    batch_time = AverageMeter("Time", ":6.3f")
    losses = AverageMeter("Loss", ":.4e")
    top1 = AverageMeter("Acc@1", ":6.2f")
    top5 = AverageMeter("Acc@5", ":6.2f")
    progress = ProgressMeter(len(val_loader), [batch_time, losses, top1, top5], "Test: ")
    if args.distributed:
        model = model.module  # ranks may have different numbers of batches; DDP's forward would wait for all
        for buffer in model.buffers():  # batch norm's statistics differ by rank; the checkpoint has rank 0's
            dist.broadcast(buffer, 0)
    model.eval()
    end = time.time()
    i = -1
    for i, (images, target) in enumerate(val_loader):
        images = images.to(args.device, non_blocking=True, memory_format=args.memory_format)
        target = target.to(args.device, non_blocking=True)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            output = model(images)
            loss = criterion(output, target)
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        losses.update(loss, images.size(0))
        top1.update(acc1, images.size(0))
        top5.update(acc5, images.size(0))
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0 and i + 1 < len(val_loader) and args.rank == 0:
            progress.display(i + 1)
    if i + 1 != len(val_loader):
        fail(f"the validation loader ended after {i + 1} of {len(val_loader)} batches")
    if args.distributed:
        for meter in (losses, top1, top5):
            meter.all_reduce(args.device)
    if args.rank == 0:
        progress.display(len(val_loader))  # its averages are those over all ranks
        print_line(f" * Acc@1 {top1.avg:.3f} Acc@5 {top5.avg:.3f}")
    return top1.avg


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(state, is_best, filename="checkpoint.pth.tar"):
    """Write the state. The previous file stays until the new one is complete and on disk."""
    # the best first: otherwise it would be missing after a kill between the two
    for name in ("model_best.pth.tar", filename) if is_best else (filename,):
        path = os.path.realpath(name)  # a link stays, and its target is replaced
        if os.path.exists(path) and not os.path.isfile(path):  # such as /dev/null
            fail(f"can't write {name}: {path} is not a regular file")
        partial = f"{path}.{os.urandom(4).hex()}.partial"  # another run may use this folder
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__context__  # of torch.save()'s RuntimeError
            if not isinstance(cause, OSError):
                raise
            fail(f"can't write {name} ({cause.strerror})")
        finally:
            if os.path.exists(partial):
                os.unlink(partial)


def load_checkpoint(args, model, optimizer, scheduler):
    """Load --resume, also one of pytorch/examples, into all three and return it; an initial one if there is none."""
    if args.resume and os.path.isfile(args.resume):
        return read_checkpoint(args, getattr(model, "module", model), optimizer, scheduler)
    if args.resume and args.evaluate:
        fail(f"--resume {args.resume}: no checkpoint found there")
    if args.resume:
        say(args, f"=> no checkpoint found at '{args.resume}': training starts from the beginning")
    return {"epoch": 0, "best_acc1": 0.0}


def read_checkpoint(args, model, optimizer, scheduler):
    """Load the file into all three. DataError if it is not a checkpoint, or is for another model."""
    say(args, f"=> loading checkpoint '{args.resume}'")
    try:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        checkpoint["epoch"] = int(checkpoint["epoch"])
        checkpoint["best_acc1"] = float(checkpoint["best_acc1"])
        # DataParallel and DDP put "module." before the names; for AlexNet and VGG after "features."
        weights = {name.replace("module.", ""): value for name, value in checkpoint["state_dict"].items()}
        missing = {"arch", "optimizer", "scheduler"} - checkpoint.keys()
        if missing:
            fail(f"no {', '.join(sorted(missing))} in it")
    except Exception as error:  # torch.load raises nearly any type on other files
        reason = first_line(error).partition(". ")[0]  # without PyTorch's advice to load unsafely
        fail(f"--resume {args.resume}: not a checkpoint of this script ({reason})")
    if checkpoint["arch"] != args.arch:
        fail(f"--resume {args.resume}: it is for {checkpoint['arch']}; add --arch {checkpoint['arch']}")
    given = optimizer.param_groups[0]
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    except Exception as error:  # of any type, if it was not written by this script
        fail(f"--resume {args.resume}: it does not fit {args.arch} ({first_line(error)})")
    where = f"epoch {checkpoint['epoch']}"
    if "position" in checkpoint:
        where += f", step {checkpoint['position']['step']}"
    say(args, f"=> loaded checkpoint '{args.resume}' ({where})")
    group = optimizer.param_groups[0]
    kept = []
    for option, name in (("--lr", "initial_lr"), ("--momentum", "momentum"), ("--wd", "weight_decay")):
        if group.get(name) != given[name]:
            kept.append(f"{option} {group.get(name)}, not {given[name]}")
    if kept and not args.evaluate:
        say(args, f"=> the checkpoint's options are kept: {', '.join(kept)}")
    return checkpoint


# ---------------------------------------------------------------------------- meters


class AverageMeter:
    """The last value of a quantity and its average, weighted by n. Tensors stay on their device until printed."""

    def __init__(self, name, fmt=":f"):
        self.name = name
        self.fmt = fmt
        self.val = 0.0
        self.sum = 0.0
        self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n

    @property
    def avg(self):
        return float(self.sum) / max(self.count, 1)

    def all_reduce(self, device):
        """Average over all ranks."""
        total = torch.tensor([float(self.sum), self.count], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        self.sum, self.count = total.tolist()

    def __str__(self):
        return f"{{}} {{{self.fmt}}} ({{{self.fmt}}})".format(self.name, float(self.val), self.avg)


class ProgressMeter:
    """Prints lines such as `Epoch: [3][ 10/100]`, then each meter as value (average), separated by tabs."""

    def __init__(self, num_batches, meters, prefix=""):
        self.num_batches = num_batches
        self.meters = meters
        self.prefix = prefix

    def display(self, batch):
        width = len(str(self.num_batches))
        line = [f"{self.prefix}[{batch:{width}}/{self.num_batches}]", *map(str, self.meters)]
        print_line("\t".join(line))


@torch.no_grad()
def accuracy(output, target, topk=(1,)):
    """For each k, the percentage of samples whose class is among the top k outputs (B, classes)."""
    ranked = output.topk(max(topk), dim=1).indices
    hits = ranked == target[:, None]
    return [100 * hits[:, :k].any(dim=1).float().mean() for k in topk]


# ============================================================================ the lesson
# From here on, main-wds.py only adds to main-orig.py. This first part is what training from shards takes, in the order
# in which a sample passes it: a worker's pipeline, what each worker reads, reading, decoding, batching, the device.


class ShardDataset(IterableDataset):
    """The (images, target) batches of one rank. Each worker of its DataLoader runs the pipeline for a part of them."""

    def pipeline(self, epoch, worker, workers, earlier_steps):
        """A worker's batches of an epoch, after its earlier steps. The attributes are explained in __init__()."""
        rng = shuffle_rng(self.seed, epoch, self.rank, worker)
        if self.reuse_memory:
            batched = batched_in_place(self.batch_size)
        else:
            batched = wds.batched(self.batch_size, collation_fn=default_collate)
        return wds.DataPipeline(
            functools.partial(self.pieces, epoch, worker, workers),  # 1. (shard, numbers): which samples to read
            read_shards(self.urls, self.lengths),  # 2. {"__key__": "n1", "jpg": b"...", "cls": b"0"}
            wds.shuffle(self.shuffle, rng=rng),  # 3. the same, shuffled in a buffer
            wds.slice(earlier_steps * self.batch_size, None),  # 4. after a resume: drops those of earlier steps
            decode_samples(self.transform, f"{self.seed} {epoch}"),  # 5. (image, class)
            batched,  # 6. (images, target)
        )

    def __iter__(self):
        """In a worker: its batches, from the position on."""
        epoch, start, step = self.current.tolist()
        worker, workers = worker_at(step - start, self.workers)
        if step and self.finished[worker]:
            fail(f"the rest of epoch {epoch} has been read: call set_epoch() with the next one")
        if step < len(self):  # else only validation is left
            yield from self.pipeline(epoch, worker, workers, steps_of(worker, workers, step - start))
        self.finished[worker] = True

    def __init__(
        self, urls, lengths, checksum, transform, batch_size, rank=0, world_size=1, workers=0, shuffle=1000, seed=0,
        train=True, reuse_memory=False,
    ):  # fmt: skip
        """The batches of any training loop: DataLoader(dataset, batch_size=None, num_workers=dataset.workers).

        urls: paths, http(s) URLs or pipe: commands of the shards; lengths: the number of samples in each.
        checksum: any string that tells these shards from others; find_shards() returns one.
        transform: from the bytes of an image file to a tensor, of the same shape and dtype for all samples.
        batch_size, workers: those of a rank. They must be the same on all ranks, as must shuffle and seed.
        shuffle: size of each worker's shuffle buffer, in samples. seed: an int, for the order and the augmentation.
        train: False, for validation, reads each sample exactly once and in order; ranks may get different numbers.
        reuse_memory: faster, but later batches overwrite the images: copy each batch before requesting the next, with
        the DataLoader's prefetch_factor at 2.

        images: (B, *shape); target: int64 (B). DataError names a shard or sample that can't be read.
        """
        super().__init__()
        self.urls = urls
        self.lengths = lengths
        self.checksum = checksum
        self.transform = transform
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.shuffle = shuffle if train else 0
        self.seed = seed if train else None
        self.reuse_memory = reuse_memory
        self.options = {  # with the epoch, all that the order depends on
            "ranks": world_size,
            "workers": workers,
            "batch_size": batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }
        self.runs = [(0, self.options)]  # of this epoch: see used_samples()
        # shared with the workers, which may run already:
        self.current = torch.tensor([0, 0, 0]).share_memory_()  # epoch, first step of its last run, first step to make
        self.used = torch.zeros(sum(lengths), dtype=torch.bool).share_memory_()  # samples that earlier runs have used
        self.finished = torch.zeros(max(workers, 1), dtype=torch.bool).share_memory_()  # workers that have read all

    @property
    def position(self):
        """Where the next iteration starts: {"epoch", "step", "shards": checksum, "runs": see used_samples()}."""
        epoch, _, step = self.current.tolist()
        return {"epoch": epoch, "step": step, "shards": self.checksum, "runs": self.runs}

    def pieces(self, epoch, worker=0, workers=1):
        """plan() for this rank; by default, as if one worker read all of it."""
        samples = samples_left(self.lengths, self.used)
        return plan(samples, self.batch_size, self.rank, self.world_size, self.seed, epoch, worker, workers)

    def __len__(self):
        """The number of batches of the epoch, including those before the position."""
        epoch, start, _ = self.current.tolist()
        return start + math.ceil(sum(len(numbers) for _, numbers in self.pieces(epoch)) / self.batch_size)

    def set_epoch(self, epoch):
        """Call it before each epoch. That of a loaded position continues there; any other begins at its first step."""
        if epoch != self.current[0]:
            self.runs = [(0, self.options)]
            self.current[:] = torch.tensor([epoch, 0, 0])
            self.used.zero_()
            self.finished.zero_()

    def state_dict(self, step):
        """The position after this step of the epoch: a small dict for a checkpoint."""
        return {**self.position, "step": step}

    def load_state_dict(self, position):
        """The next iteration continues at this position. DataError if it was saved with other shards.

        If it was saved with other options, what is left of its epoch is divided anew. All ranks must load it.
        """
        if position["shards"] != self.checksum or "runs" not in position:
            fail("the position was saved with other shards, or by an earlier version")
        runs = position["runs"]
        _, options = runs[-1]
        if options != self.options:
            runs = [*runs, (position["step"], self.options)]
        start, _ = runs[-1]
        self.runs = runs
        self.current[:] = torch.tensor([position["epoch"], start, position["step"]])
        self.used[:] = used_samples(self.lengths, position["epoch"], runs)
        self.finished.zero_()


def worker_at(steps, workers):
    """(worker, workers) for plan(): the part of a run that this process continues, after this number of its steps.

    The DataLoader asks its worker 0 first; after a resume, that one takes the part whose turn it is.
    """
    info = get_worker_info()
    number = info.num_workers if info else 0
    if number != workers:
        fail(f"the DataLoader has num_workers={number}, but the ShardDataset has workers={workers}")
    if info is None:  # without workers, the main process is the only one
        return 0, 1
    return (info.id + steps) % workers, workers


def make_train_loader_wds(args):
    """The same number and sizes of batches as make_train_loader_orig, from the training shards."""
    return make_loader_wds(args, "train")


def make_val_loader_wds(args):
    """Batches of the validation shards, identical in every epoch. Under DDP each sample goes to one rank only."""
    return make_loader_wds(args, "val")


def make_loader_wds(args, split):
    urls, lengths, checksum, classes = find_shards(args.shards, split, args.index)
    if split == "train" and sum(lengths) < args.world_size:
        fail(f"{args.world_size} ranks but {sum(lengths)} training samples: start fewer processes")
    number = f", {len(classes)} classes" if classes else ""
    say(args, f"=> {split}: {sum(lengths)} images, {len(urls)} shard{'s' if len(urls) > 1 else ''}{number}")
    transform = v2.Compose([DECODERS[args.decode], make_transform(args, split)])
    dataset = ShardDataset(
        urls, lengths, checksum, transform, args.batch_size, args.rank, args.world_size, args.workers, args.shuffle,
        args.data_seed, train=split == "train",
        reuse_memory=args.decode == "tensor",  # whose bytes to_device() converts, so copies
    )  # fmt: skip
    return DataLoader(
        dataset, batch_size=None, num_workers=args.workers, pin_memory=args.device.type == "cuda",
        persistent_workers=args.workers > 0, prefetch_factor=PREFETCH if args.workers else None,
    )  # fmt: skip


LOADERS = {
    "orig": (make_train_loader_orig, make_val_loader_orig),
    "wds": (make_train_loader_wds, make_val_loader_wds),
}


# ---------------------------------------------------------------------------- which worker reads what


def plan(samples, batch_size, rank, world_size, seed, epoch=0, worker=0, workers=1):
    """What a worker reads in an epoch: [(shard, numbers)] in reading order, with the numbers of samples, ascending.

    samples: for each shard, the numbers of those to read: all, or what earlier runs of the epoch have left.

    The shards, in an order drawn from (seed, epoch), form one sequence of samples. Each rank reads an equal range of
    it; where the ranges go beyond its end, they continue at its start, so that at most world_size - 1 samples are read
    twice. Without a seed, for validation, the shards are in order, and ranges differ by a sample instead.

    Worker w makes the batches of the steps w, w + workers, ..., from a range of its rank's range. The ranges are laid
    out so that the last one, with the short batch, is that of the worker which makes the last step: with 5 batches and
    2 workers, worker 1 reads the first two, and worker 0 the other three.
    """
    total = sum(map(len, samples))
    order = list(range(len(samples)))
    if seed is None:
        first = total * rank // world_size
        end = total * (rank + 1) // world_size
    else:
        random.Random(f"{seed} {epoch}").shuffle(order)
        share = math.ceil(total / world_size)
        first = rank * share % max(total, 1)  # an earlier run may have left nothing
        end = first + share
    batches = math.ceil((end - first) / batch_size)
    for i in range(workers):
        current = (batches + i) % workers
        size = batch_size * steps_of(current, workers, batches)
        if current == worker:
            break
        first += size
    end = min(end, first + size)
    pieces = []
    start = 0
    for shard in order + order:  # twice, for ranges that continue at the start
        numbers = samples[shard][max(first - start, 0) : max(end - start, 0)]
        if numbers:
            pieces.append((shard, numbers))
        start += len(samples[shard])
    return pieces


def steps_of(worker, workers, steps):
    """How many of a run's first `steps` steps this worker makes: worker, worker + workers, ..."""
    return len(range(worker, steps, workers))


def shuffle_rng(seed, epoch, rank, worker):
    """The random generator of a worker's shuffle buffer."""
    return random.Random(f"{seed} {epoch} {rank} {worker}")


# ---------------------------------------------------------------------------- reading

IMAGES = {ending.lstrip(".") for ending in datasets.folder.IMG_EXTENSIONS}  # file extensions; the class is in "cls"


@wds.pipelinefilter  # read_shards(urls, lengths) is then a stage: it gets the pieces when the pipeline runs
def read_shards(pieces, urls, lengths):
    """Stage 2: the samples of the pieces."""
    for shard, numbers in pieces:
        yield from read_shard(urls[shard], lengths[shard], numbers)


def read_shard(url, length, numbers):
    """The samples of a shard with these numbers, which ascend. DataError if it is damaged or too short.

    If the last sample is read, the shard must not hold more than `length`. retry() continues after the samples already
    read when a connection breaks.
    """
    samples = retry(url, functools.partial(read_tar, url, length))
    end = numbers[-1] + 1
    if end == length:
        end = None  # reads on after the last sample, so that read_tar() compares their number
    wanted = set(numbers)
    for number, sample in enumerate(itertools.islice(samples, end)):
        if number in wanted:
            yield sample


def read_tar(url, length):
    """The samples of a shard, undecoded: {"__url__", "__key__", "jpg" or another extension: bytes, "cls": bytes}."""
    count = 0
    with wds.gopen(url) as stream:
        set_options(stream, ignore_errors=True)  # a pipe: command fails if it is closed before its end
        for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
            if len(IMAGES & sample.keys()) != 1 or "cls" not in sample:
                raise ValueError(f"sample {sample['__key__']} does not hold one image and one class")
            yield sample
            count += 1
    if count != length:
        error = EOFError if count < length else DataError  # a connection that breaks may look like the end of the tar
        raise error(f"{count} samples, but {length} in its index")


# ---------------------------------------------------------------------------- decoding


@wds.pipelinefilter
def decode_samples(samples, transform, epoch_seed):
    """Stage 5: (image, class) of each sample. Its augmentation depends on the seed, the epoch and its key only."""
    in_main = get_worker_info() is None  # there, the training loop draws from `random` and torch, too
    for sample in samples:
        try:
            label = sample["cls"].strip()
            if not label.isdigit() or len(label) > 9 or int(label) >= NUM_CLASSES:
                fail(f"its class {label[:20].decode(errors='replace')!r} is not a number from 0 to {NUM_CLASSES - 1}")
            (ending,) = IMAGES & sample.keys()
            state = random.getstate() if in_main else None
            with torch.random.fork_rng(devices=[], enabled=in_main):
                random.seed(f"{epoch_seed} {sample['__key__']}")
                torch.default_generator.manual_seed(random.getrandbits(63))
                image = transform(sample[ending])
            if in_main:
                random.setstate(state)
        except DataError as error:
            raise DataError(f"{sample['__url__']}: sample {sample['__key__']}: {error}") from error
        yield image, int(label)


def decode_tensor(data):
    """uint8 (3, H, W), RGB, from the bytes of an image file; DataError if it can't be decoded.

    JPEGs of one or three channels go to the fast decoder, all else to Pillow. EXIF orientation is ignored.
    """
    _, decode_jpeg = jpeg_decoder()
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header, in 30 µs; rejects decompression bombs
            fast = decode_jpeg and image.format == "JPEG" and image.mode in ("L", "RGB")
            exif = image.info.get("exif", b"")[:10]  # its header
        if fast and exif:  # without this header TorchCodec does not find the orientation
            data = data.replace(exif, bytes(len(exif)))
        if fast:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception:  # Pillow decodes it, or raises the error
        pass
    return v2.functional.pil_to_tensor(decode_pil(data))


DECODERS = {"tensor": decode_tensor, "pil": decode_pil}


@functools.cache
def jpeg_decoder():
    """(name, function) of the fastest decoder here, or (name, None); from a JPEG's uint8 (bytes,) to (3, H, W)."""
    try:
        from torchcodec.decoders import decode_jpeg  # 0.16 or newer

        return "TorchCodec", decode_jpeg
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another PyTorch
        pass
    if hasattr(torch.ops.image, "decode_jpeg"):  # its wrapper in torchvision.io prints a deprecation warning
        return "torchvision", lambda data: torch.ops.image.decode_jpeg(data, ImageReadMode.RGB.value, False)
    return "Pillow", None


def random_crop(image, size):
    """uint8 (3, size, size) from (3, H, W): a random part of the image, flipped horizontally with probability 0.5.

    The distribution is that of v2.RandomResizedCrop and v2.RandomHorizontalFlip. This takes half of their 0.5 ms: it
    draws Python numbers, not tensors, and stores the crop in the memory layout that is fastest to resize.
    """
    top, left, height, width = crop_box(*image.shape[1:])
    crop = image[None, :, top : top + height, left : left + width].clone(memory_format=torch.channels_last)
    image = nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(2) if random.random() < 0.5 else image


def crop_box(height, width):
    """(top, left, height, width) of 8 to 100 % of an image, aspect 3:4 to 4:3, as v2.RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        h = round(math.sqrt(area / ratio))
        w = round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def to_hwc(image):
    """(H, W, 3) from (3, H, W), without a copy: this is how the values lie in memory, after decoding and cropping."""
    return image.permute(1, 2, 0)


# ---------------------------------------------------------------------------- batching, the device

PREFETCH = 2  # batches that each worker prepares in advance; batched_in_place() relies on it


@wds.pipelinefilter
def batched_in_place(samples, batch_size):
    """Stage 6, instead of wds.batched(): each batch of images reuses the memory of the third before it.

    That is enough: of a worker's batches, the caller holds at most one, and the DataLoader requests PREFETCH more.
    """
    blocks = [None] * (PREFETCH + 1)
    for i in itertools.cycle(range(len(blocks))):
        target = []
        for image, label in itertools.islice(samples, batch_size):
            if blocks[i] is None:  # shared, so that the main process gets the batch without a copy
                blocks[i] = image.new_empty((batch_size, *image.shape)).share_memory_()
            blocks[i][len(target)] = image
            target.append(label)
        if not target:
            return
        yield blocks[i][: len(target)], torch.tensor(target)


def to_device(batches, device, memory_format=torch.contiguous_format):
    """The batches on the device. uint8 images (B, H, W, 3) become normalized float32 (B, 3, H, W); others are kept."""
    mean = 255 * torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(STD, device=device).view(1, 3, 1, 1)
    for images, target in batches:
        images = images.to(device, non_blocking=device.type == "cuda")
        target = target.to(device, non_blocking=device.type == "cuda")
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
            images.sub_(mean).div_(std)
        yield images, target


# ============================================================================ the service
# How a run finds its shards, reads on when a server fails, stops and resumes.

INDEX = "_info.json"
INDEX_NAMES = {"train": "train", "val": "validation"}  # the splits' names in the index


def find_shards(address, split, index=None):
    """(urls, lengths, checksum, classes) of the shards of a split, "train" or "val", from their index.

    address: a folder, a URL prefix, or a URL or pipe: command in which {} stands for a file's name.
    index: the path or URL of the index, if it is not at the address.
    checksum: SHA-256 over the shards' digests in the index, or over their names if it has none, and their lengths.
    """
    content = read_index(address, index)
    entry = content["splits"].get(INDEX_NAMES[split])
    if not entry or not entry["num_samples"]:
        fail(f"--shards {address}: its index lists no {split} samples; check --shards, or run makeshards.py")
    classes = content["classes"]
    if len(classes) > NUM_CLASSES:
        fail(f"--shards {address}: {len(classes)} classes, but the model has {NUM_CLASSES} outputs")
    lengths = entry["shard_lengths"]
    urls = [file_at(address, name) for name in entry["filenames"]]
    for url in urls:
        if is_local(url) and not os.path.exists(url):
            fail(f"{url}: the index lists this shard, but it does not exist")
    contents = [entry.get("shard_sha256") or entry["filenames"], lengths]
    checksum = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return urls, lengths, checksum, classes


def read_index(address, index=None):
    """The index, checked. DataError if it can't be read or is not one."""
    url = file_at(address, INDEX)
    if index:
        url = os.path.join(".", index) if is_local(index) else index
    try:
        (content,) = retry(url, functools.partial(read_json, url))
    except DataError as error:
        fail(f"{error}; check --shards and --index, or write the index with makeshards.py")
    try:
        for entry in content["splits"].values():
            names = entry["filenames"]
            lengths = entry["shard_lengths"]
            for name in names:  # it becomes a part of paths, URLs and commands
                if not re.fullmatch(r"\w[\w./=+-]*", name) or ".." in name:
                    raise ValueError(f"the file name {name!r}")
            numbers = all(isinstance(length, int) and length >= 0 for length in lengths)
            if not numbers or not len(set(names)) == len(names) == len(lengths) or sum(lengths) != entry["num_samples"]:
                raise ValueError("filenames, shard_lengths and num_samples are inconsistent")
        content["classes"] = list(content.get("classes") or [])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        fail(f"{url}: not an index of shards ({what}); makeshards.py --index writes one")
    return content


def read_json(url):
    """The content of a JSON file, as the only item."""
    with wds.gopen(url) as stream:
        data = stream.read()
    yield json.loads(data)


def file_at(address, name):
    """The path, URL or command of the file with this name."""
    if is_local(address):
        return os.path.join(".", address, name)  # with a slash before any colon: gopen() would take it for a URL
    if "{}" in address:
        return address.replace("{}", name)
    if address.startswith("pipe:") or "?" in address:
        fail(f"--shards {address}: it must hold {{}}, which stands for the name of a file")
    return f"{address.rstrip('/')}/{name}"


def is_local(url):
    return not ("://" in url or url.startswith("pipe:"))


# ---------------------------------------------------------------------------- reading again

TIMEOUT = 60  # seconds that an http server may be silent
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # seconds before a remote file is read again; their sum is five minutes


def retry(url, read):
    """What read() yields. If a server breaks off, read() is called again, and what it has already yielded is skipped.

    The pauses before that grow, and are reset after each new item. DataError if none is left, or if the error is final.
    """
    done = 0
    pauses = iter(PAUSES)
    while True:
        try:
            for item in itertools.islice(read(), done, None):
                yield item
                done += 1
                pauses = iter(PAUSES)
            return
        except Exception as error:  # a damaged tar may raise nearly anything
            problem = f"{url}: can't be read ({reason(error)})"
            final = isinstance(error, (DataError, FileNotFoundError, ImportError, InvalidURL))
            if isinstance(error, HTTPError):
                final = error.code not in (408, 429, *range(500, 600))
        pause = None if final or is_local(url) else next(pauses, None)
        if pause is None:
            fail(problem)
        print_line(f"{problem}; retrying in {pause} s", error=True)
        time.sleep(pause)


def reason(error):
    """The message of an error without webdataset's additions, such as " @ <_io.BufferedReader name='a.tar'>"."""
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else None)
    status = re.search(r"exit -?\d+(?= \(read\))", str(text))
    if status:  # of a command, whose environment webdataset adds
        return status[0]
    if isinstance(error, HTTPError) or not isinstance(text, str):
        text = first_line(error) if isinstance(error, OSError) else type(error).__name__
    return re.split(r" @ <| dict_keys", text)[0]


def open_http(url, mode="rb", bufsize=None):
    """Replaces curl in wds.gopen(): a silent server is an error, and the status of a failure is known."""
    try:
        return urllib.request.urlopen(quote(url, safe=":/?#[]@!$&'()*+,;=~%"), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()  # its connection: webdataset keeps the error alive until garbage collection
        raise


def open_other(url, mode="rb", bufsize=None):
    fail("webdataset can't open such URLs; use a pipe: command")


wds.gopen_schemes.update(http=open_http, https=open_http, __default__=open_other)


# ---------------------------------------------------------------------------- stopping

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """The number of the first signal that asked this process to stop, 0 before. A later one ends it at once."""

    def __init__(self):
        self.number = 0
        self.second_after = math.inf  # until then, a signal is a duplicate: a terminal and torchrun both send one
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, _):
        if time.monotonic() > self.second_after:
            os._exit(128 + number)
        if not self.number:
            self.number = number
            self.second_after = time.monotonic() + 2


class Run:
    """Stops between two steps once a rank has received a signal, with a checkpoint that holds the position, if any."""

    def __init__(self, args, state):
        self.args = args
        self.state = state  # state(epoch): what a checkpoint holds
        self.position = None  # that of ShardDataset.state_dict(), once training from shards begins
        self.stop_signal = StopSignal()
        self.ended = torch.tensor(False).share_memory_()  # the workers look at it
        Finalize(None, self.ended.fill_, [True], exitpriority=0)  # before multiprocessing waits for them

    def stop_if_asked(self):
        """All ranks call this after the same step."""
        number = max_over_ranks(self.args, self.stop_signal.number)
        if not number:
            return
        self.save()
        self.ended.fill_(True)
        if self.args.rank == 0:
            what = "nothing was saved since the last complete epoch"
            if self.position:
                where = f"epoch {self.position['epoch']}, step {self.position['step']}"
                what = f"add --resume checkpoint.pth.tar to continue ({where})"
            name = signal.Signals(number).name
            print_line(f"{os.path.basename(sys.argv[0])}: stopped by {name}; {what}", error=True)
        if self.args.distributed:
            max_over_ranks(self.args, 0)  # waits until rank 0 has written the checkpoint
            dist.destroy_process_group()
        sys.exit(128 + number)

    def save(self):
        if self.position and self.args.rank == 0:
            save_checkpoint({**self.state(self.position["epoch"]), "position": self.position}, is_best=False)


def max_over_ranks(args, number):
    if not args.distributed:
        return number
    number = torch.tensor(number, device=args.device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def init_worker(ended, _):
    """In a worker: ignore signals, which schedulers send to all processes, and end with the run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch_run, args=(ended,), daemon=True).start()


def watch_run(ended):
    """In a worker's thread: end the worker, even if it waits for a server, once the run has ended."""
    while not ended and mp.parent_process().is_alive():
        time.sleep(0.2)
    if ended:
        time.sleep(2)  # gives the DataLoader time to end it
    os._exit(0)


# ---------------------------------------------------------------------------- the position, resuming


def used_samples(lengths, epoch, runs):
    """Which samples an epoch's runs have used before the last of them: bool (N), for the N samples of all shards.

    runs: [(first step, options)]; resuming with the same options does not start another run. The options of a run and
    its number of steps determine which samples it has used: this runs the same stages over numbers, without reading,
    for all of its ranks and workers.
    """
    offsets = list(itertools.accumulate(lengths, initial=0))
    used = bytearray(sum(lengths))
    for (start, options), (end, _) in itertools.pairwise(runs):
        left = samples_left(lengths, torch.frombuffer(used, dtype=torch.bool))
        ranks = options["ranks"]
        workers = max(options["workers"], 1)
        batch_size = options["batch_size"]
        seed = options["seed"]
        for rank, worker in itertools.product(range(ranks), range(workers)):
            pieces = plan(left, batch_size, rank, ranks, seed, epoch, worker, workers)
            samples = (offsets[shard] + number for shard, numbers in pieces for number in numbers)
            shuffled = wds.shuffle(options["shuffle"], rng=shuffle_rng(seed, epoch, rank, worker))(samples)
            for sample in itertools.islice(shuffled, batch_size * steps_of(worker, workers, end - start)):
                used[sample] = True
    return torch.frombuffer(used, dtype=torch.bool)


def samples_left(lengths, used):
    """For each shard, the numbers of the samples that are not used: a list, or a range if it is the whole shard."""
    left = []
    for length, flags in zip(lengths, used.split(lengths), strict=True):
        numbers = range(length)
        if flags.any():
            numbers = (~flags).nonzero().flatten().tolist()
        left.append(numbers)
    return left


def choose_seed(args, checkpoint):
    """The seed of the order and the augmentation: --seed, else that of the position to resume at, else a random one."""
    seed = random.SystemRandom().getrandbits(31)
    runs = checkpoint.get("position", {}).get("runs")
    if runs:
        _, options = runs[-1]
        seed = options["seed"]
    if args.seed is not None:
        seed = args.seed
    seeds = [seed]
    if args.distributed:
        dist.broadcast_object_list(seeds, src=0)  # that of rank 0; check_ranks_agree() compares --seed
    return seeds[0]


def resume(args, dataset, checkpoint):
    """Let the training dataset continue at the position of the checkpoint, if it has one."""
    position = checkpoint.get("position", {})
    if not position.get("step") or args.start_epoch is not None:
        return
    epoch = checkpoint["epoch"]
    if not isinstance(dataset, ShardDataset):
        say(args, f"=> epoch {epoch} is trained again from its first step")
        return
    try:
        dataset.load_state_dict(position)
    except DataError as error:
        fail(f"--resume {args.resume}: {error}; restart the epoch with --start-epoch {epoch}")
    _, earlier = position["runs"][-1]
    changes = []
    for name, value in dataset.options.items():
        if value != earlier[name]:
            changes.append(f"{name.replace('_', ' ')} {value}, not {earlier[name]}")
    if changes:
        say(args, f"=> the rest of epoch {epoch} is divided anew ({'; '.join(changes)})")


class RunLoader:
    """The batches of a loader, on the device. The run may stop between two batches; training keeps its position."""

    def __init__(self, loader, run, checkpoint=None):
        """checkpoint: for training only; it may hold the position to resume at."""
        self.loader = loader
        self.run = run
        self.first_step = 0
        loader.worker_init_fn = functools.partial(init_worker, run.ended)
        if checkpoint:
            resume(run.args, loader.dataset, checkpoint)
        of_shards = isinstance(loader.dataset, ShardDataset)
        self.keeps_position = of_shards and checkpoint is not None
        self.contents = loader.dataset.checksum if of_shards else len(loader.dataset)

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        if self.keeps_position:
            self.loader.dataset.set_epoch(epoch)
            self.run.position = self.loader.dataset.position
            self.first_step = self.run.position["step"]
        elif self.run.args.distributed:
            self.loader.sampler.set_epoch(epoch)

    def __iter__(self):
        """The batches from first_step on."""
        args = self.run.args
        count = len(self)
        common = -max_over_ranks(args, -count)  # validation's number of batches may differ by one between ranks
        self.run.stop_if_asked()
        if 0 < self.first_step == count:  # only validation is left
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # without a step of the optimizer
        try:
            batches = to_device(self.loader, args.device, args.memory_format)
            for step, batch in enumerate(batches, self.first_step + 1):
                if self.keeps_position:
                    set_seed(args, f"{self.run.position['epoch']} {step}")
                yield batch
                if self.keeps_position:
                    self.run.position = self.loader.dataset.state_dict(step)
                    if args.checkpoint_steps and step % args.checkpoint_steps == 0:
                        self.run.save()
                if step < common and (step % args.print_freq == 0 or not args.distributed):
                    self.run.stop_if_asked()  # with several ranks not at each step: it takes an all_reduce
        except BaseException:  # including those of the training step
            self.run.ended.fill_(True)  # the workers may be waiting for a server
            raise


if __name__ == "__main__":
    main()
