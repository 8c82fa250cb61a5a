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
import re
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
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

# isort: split
# and for the shards:
import functools
import glob
import gzip
import itertools
import json
import threading
import urllib.request
import warnings
from multiprocessing.util import Finalize
from urllib.error import HTTPError

import webdataset as wds
from torch.utils.data import default_collate, get_worker_info
from torchvision.io import ImageReadMode
from webdataset.gopen import set_options
from webdataset.shardlists import expand_urls
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
    parser.error = usage_error
    add = parser.add_argument
    count = at_least(1)
    number = at_least(0)
    real = at_least(0, float)
    add("--dataset", "--loader", choices=LOADERS, default="wds", help="read shards or folders (default: %(default)s)")
    add("--data", metavar="DIR", default="./data", help="orig: path to the dataset (default: %(default)s)")
    add("--shards", metavar="DIR", default="./shards", help=f"wds: folder or URL with {INDEX} (default: %(default)s)")
    add("--trainshards", metavar="URLS", help="wds: pattern of the training shards (default: beside the index)")
    add("--valshards", metavar="URLS", help="wds: pattern of the validation shards (default: beside the index)")
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
    nodes = max(args.world_size, 1)
    if args.rank >= nodes or (nodes > 1 and args.rank < 0):
        fail(f"--rank {args.rank}, --world-size {args.world_size}: give both, the rank from 0 to {nodes - 1}")
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


def usage_error(message):
    hint = "; quote patterns such as 'a-{0..9}.tar', or the shell expands them" if ".tar" in message else ""
    fail(message + hint)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def print_line(line, error=False):
    """Print a line, without the passwords in URLs. Write errors (closed terminal, full disk) do not stop training."""
    file = sys.stderr if error else sys.stdout
    if not file:  # it was closed before the start
        return
    try:
        line = re.sub(r"://\S*@", "://", line).encode(file.encoding or "utf-8", "backslashreplace")
        file.write(line.decode(file.encoding or "utf-8") + "\n")  # in one write: other processes write there too
        file.flush()
    except OSError:  # discard what follows; else Python would fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def print_error(message):
    print_line(f"{os.path.basename(sys.argv[0])}: {message}", error=True)


# ---------------------------------------------------------------------------- main


def main():
    try:
        start(parse_args())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:  # else the process has printed the reason
            print_error(f"{error}; the other processes of this node were terminated")
        sys.exit(max(error.exit_code, 1))
    except Exception as error:
        # an error of a spawned process arrives as the text of its traceback
        _, is_data_error, message = f"{type(error).__name__}: {error}".rpartition("DataError: ")
        if not is_data_error:
            raise
        print_error(message.strip())
        sys.exit(2)


def start(args):
    """Run as one of torchrun's processes, start the processes of this node, or run as the only process."""
    args.start_method = mp.get_start_method()
    if sys.platform == "linux":  # Python 3.14's forkserver would pickle the dataset, and exits on signals to the group
        args.start_method = "fork"
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
    if torchrun:
        args.dist_url = "env://"
        args.multiprocessing_distributed = False
    if args.dist_url == "env://":
        for name in ("RANK", "WORLD_SIZE"):  # of this process, or with --multiprocessing-distributed of this node
            if not os.environ.get(name, "").isdecimal():
                fail(f"--dist-url env://: {name} is not set in the environment; torchrun sets it")
            setattr(args, name.lower(), int(os.environ[name]))
    args.rank = max(args.rank, 0)
    args.world_size = max(args.world_size, 1)
    if args.rank >= args.world_size:
        fail(f"RANK {args.rank}, WORLD_SIZE {args.world_size}: the rank must be from 0 to {args.world_size - 1}")
    if torchrun:
        run_worker(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), args)
    elif args.multiprocessing_distributed:
        has_gpus = torch.accelerator.is_available() and not args.no_accel
        spawn(torch.accelerator.device_count() if has_gpus else 2, args)
    else:
        run_worker(args.gpu, 1, args)


def spawn(nprocs, args):
    """Run the processes of this node. A signal may be sent to this process only, so it is forwarded."""
    args.world_size *= nprocs
    context = mp.spawn(run_worker, (nprocs, args), nprocs=nprocs, join=False)
    received = []

    def pass_on(number, _):
        received.append(number)
        for process in context.processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException:
        if not received:
            raise
    if received:
        sys.exit(128 + received[0])


def run_worker(gpu, ngpus_per_node, args):
    """main_worker(), with a readable error if the connection to another rank or a data worker fails."""
    try:
        main_worker(gpu, ngpus_per_node, args)
        if args.distributed:
            dist.destroy_process_group()
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        if "shared memory" in text or "No space left on device" in text:
            fail("/dev/shm is full: lower --workers or --batch-size, or enlarge it (docker run --shm-size)")
        if "DataLoader worker (pid" in text or isinstance(error, (ConnectionError, EOFError)):
            fail(f"a data worker died ({first_line(error)}); if out of memory, lower --workers or --batch-size")
        if not args.distributed or not (isinstance(error, dist.DistError) or "gloo" in text):
            raise
        if re.search("connection (closed|reset) by|broken pipe|remote process exit", text, re.IGNORECASE):
            time.sleep(5)  # let the other rank print its reason first
            reason = f"which failed or was killed ({first_line(error)})"
            fail(f"rank {args.rank} lost the connection to another rank, {reason}")
        fail(f"rank {args.rank}: {text}")


def main_worker(gpu, ngpus_per_node, args):
    """Train and validate in one of the ngpus_per_node processes of this node."""
    mp.set_start_method(args.start_method, force=True)  # with mp.spawn's, data workers take seconds to start
    if args.multiprocessing_distributed:
        args.rank = args.rank * ngpus_per_node + gpu
    args.distributed = args.world_size > 1
    if args.workers and len(tempfile.gettempdir()) > 75:  # PyTorch would drop all batches, silently
        fail(f"TMPDIR={tempfile.gettempdir()}: too long for the workers' sockets; at most 75 characters")
    if args.batch_size < ngpus_per_node:
        fail(f"--batch-size {args.batch_size}: too small for the {ngpus_per_node} processes of this node")
    args.ngpus_per_node = ngpus_per_node
    device = pick_device(gpu, args)
    args.device = device
    init_process_group(args)
    check_ranks_agree(args, shared_options(args))
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
    check_image_size(model, args)
    run = Run(args, state)
    make_train_loader, make_val_loader = LOADERS["orig" if args.dummy else args.dataset]
    val_loader = DeviceLoader(make_val_loader(args), run)
    train_loader = None if args.evaluate else DeviceLoader(make_train_loader(args), run, checkpoint)
    if args.evaluate:
        validate(val_loader, model, criterion, args)
        return
    check_ranks_agree(args, {"number of batches": len(train_loader)})
    check_writable(args)
    if first_epoch >= args.epochs:
        say(args, f"=> all epochs are done (--epochs {args.epochs}); increase it to continue")
    for epoch in range(first_epoch, args.epochs):
        set_seed(args, epoch)
        train_loader.set_epoch(epoch)
        train(train_loader, model, criterion, optimizer, epoch, device, args, train_loader.first_step)
        acc1 = validate(val_loader, model, criterion, args)
        scheduler.step()
        is_best = acc1 > best_acc1
        best_acc1 = max(acc1, best_acc1)
        if args.rank == 0:
            save_checkpoint(state(epoch + 1), is_best)


def pick_device(gpu, args):
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
    if 1 < count < args.ngpus_per_node:
        fail(f"{args.ngpus_per_node} processes on this node, but it has {count} GPUs: start one process per GPU")
    if count > 1:
        torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def init_process_group(args):
    if not args.distributed:
        return
    backend = args.dist_backend
    try:
        if backend == "nccl":
            backend = dist.get_default_backend_for_device(args.device)  # e.g. gloo on a CPU
        dist.init_process_group(backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank)
    except (RuntimeError, ValueError) as error:
        fail(f"--dist-url {args.dist_url}, --dist-backend {backend}: the ranks can't meet: {error}")


def shared_options(args):
    """{option: value} of those that must be the same on all nodes."""
    of_a_node = {"data", "shards", "trainshards", "valshards", "resume", "dist_url", "ngpus_per_node"}
    of_a_rank = {"rank", "gpu", "device"}
    shared = vars(args).keys() - of_a_node - of_a_rank
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in sorted(shared)}
    return {"script": os.path.basename(sys.argv[0]), **options}


def check_ranks_agree(args, values):
    """Raise DataError if a value differs between ranks; training would hang otherwise."""
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
    return make_loader(args, Subset(dataset, range(args.rank, len(dataset), args.world_size)))


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
    check_ranks_agree(args, {f"number of {split} images": len(dataset)})
    say(args, f"=> {split}: {len(dataset)} images, {len(classes)} classes")
    return dataset


def make_transform(args, split):
    """From a decoded image to what the workers return. Random in training, unless --augmentation simple.

    --decode pil: float32 (3, S, S), normalized. --decode tensor: uint8 (S, S, 3), which DeviceLoader normalizes.
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
        return v2.Compose([*stages, channels_last])
    return v2.Compose([*stages, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def decode_pil(data):
    """RGB PIL image from the bytes of an image file; DataError if Pillow can't decode it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises almost any exception type on broken files
        reason = first_line(error).partition(" <_io.")[0]  # without the address of the bytes
        raise DataError(f"not a readable image ({reason})") from error


def load_image(path, decode=decode_pil):
    """An image from its file. DataError names the file if it can't be read or decoded."""
    try:
        with open(path, "rb") as file:
            return decode(file.read())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------- train, validate


def train(train_loader, model, criterion, optimizer, epoch, device, args, first_step=0):
    """Train for an epoch, or for the rest of it. `Data`: seconds of `Time` spent waiting for the loader."""
    batch_time = AverageMeter("Time", ":6.3f")
    data_time = AverageMeter("Data", ":6.3f")
    losses = AverageMeter("Loss", ":.4e")
    top1 = AverageMeter("Acc@1", ":6.2f")
    top5 = AverageMeter("Acc@5", ":6.2f")
    progress = ProgressMeter(len(train_loader), [batch_time, data_time, losses, top1, top5], f"Epoch: [{epoch}]")
    model.train()
    end = time.time()
    i = first_step - 1
    for i, (images, target) in enumerate(train_loader, first_step):
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


def check_writable(args):
    """Report now, not after the first epoch, if no checkpoint can be written to the current folder."""
    try:
        if args.rank == 0:
            tempfile.TemporaryFile(dir=".").close()
    except OSError as error:
        fail(f"can't write checkpoints to the current folder ({error.strerror}); run in another one")


def save_checkpoint(state, is_best, filename="checkpoint.pth.tar"):
    """Write the state. The previous file stays until the new one is complete and on disk."""
    buffer = io.BytesIO()  # torch.save() to a file would not report a full disk
    torch.save(state, buffer)
    # the best first: otherwise it would be missing after a kill between the two
    for name in ("model_best.pth.tar", filename) if is_best else (filename,):
        partial = f"{name}.{os.urandom(4).hex()}.partial"  # another run may use this folder
        try:
            with open(partial, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, name)
        except OSError as error:
            if os.path.exists(partial):
                os.unlink(partial)
            fail(f"can't write {name} to the current folder ({error.strerror})")


def load_checkpoint(args, model, optimizer, scheduler):
    """Load --resume, also one of pytorch/examples, into all three and return it; an initial one if there is none."""
    checkpoint = {"epoch": 0, "best_acc1": 0.0}
    if args.resume and os.path.isfile(args.resume):
        checkpoint = read_checkpoint(args, getattr(model, "module", model), optimizer, scheduler)
    elif args.resume and args.evaluate:
        fail(f"--resume {args.resume}: no checkpoint found there")
    elif args.resume:
        say(args, f"=> no checkpoint found at '{args.resume}': training starts from the beginning")
    found = {"--resume: checkpoint found": "arch" in checkpoint, "epoch": checkpoint["epoch"]}
    last = list(model.parameters())[-1].detach().cpu().numpy()  # differs between any two checkpoints
    check_ranks_agree(args, {**found, "checksum of the weights": zlib.crc32(last.tobytes())})
    return checkpoint


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
    except (RuntimeError, ValueError, KeyError) as error:
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


# ============================================================================ the shards
# From here on, main-wds.py only adds to main-orig.py: the loaders and their pipeline, its stages, the transfer to the
# device, and how a run is stopped and resumed.


def make_train_loader_wds(args):
    """The same number and sizes of batches as make_train_loader_orig, from the training shards."""
    return make_loader_wds(args, "train")


def make_val_loader_wds(args):
    """Batches of the validation shards, identical in every epoch. Under DDP each sample goes to one rank only."""
    return make_loader_wds(args, "val")


def make_loader_wds(args, split):
    urls, lengths, names = find_shards(args, split)
    transform = v2.Compose([DECODERS[args.decode], make_transform(args, split)])
    loader = shard_loader(
        urls, lengths, transform, args.batch_size, args.workers, args.rank, args.world_size, args.shuffle,
        args.seed or 0, train=split == "train", pin_memory=args.device.type == "cuda",
        reuse_memory=args.decode == "tensor",  # DeviceLoader converts these bytes immediately
    )  # fmt: skip
    loader.shards = list(zip(names, lengths, strict=True))
    check_ranks_agree(args, {f"checksum of the list of {split} shards": zlib.crc32(repr(loader.shards).encode())})
    return loader


def shard_loader(
    urls, lengths, transform, batch_size, workers, rank=0, world_size=1, shuffle=1000, seed=0, train=True,
    num_classes=NUM_CLASSES, pin_memory=False, reuse_memory=False,
):  # fmt: skip
    """A DataLoader of one rank's (images, target) batches, for any training loop.

    urls: paths, http(s) URLs or pipe: commands of the shards; lengths: the number of samples in each.
    transform: from the bytes of an image file to a tensor, of the same shape and dtype for all samples.
    shuffle: size of each worker's shuffle buffer, in samples; seed: must be the same on all ranks.
    reuse_memory: 9 % faster, but later batches overwrite the images: copy each batch before requesting the next.

    images: (B, *shape); target: int64 (B). Call loader.dataset.set_epoch(epoch) before each epoch. In training, each
    batch seeds `random` and torch in its process. DataError names a shard or sample that can't be read.
    """
    dataset = ShardPipeline(lengths, batch_size, rank, world_size, seed, train)
    batched = functools.partial(batched_in_place, batch_size=batch_size)
    dataset.pipeline = [
        dataset.pieces,  # 1. (shard, first, last): what this worker reads in this epoch
        functools.partial(read_shards, urls=urls, lengths=lengths),  # 2. {"__key__": "n1", "jpg": b"...", "cls": b"0"}
        wds.shuffle(shuffle if train else 0, rng=dataset.rng),  # 3. shuffled in a buffer
        dataset.skip_done,  # 4. skips the samples before the step to resume at
        functools.partial(decode_samples, transform=transform, num_classes=num_classes),  # 5. (image, class)
        batched if reuse_memory else wds.batched(batch_size, collation_fn=default_collate),  # 6. (images, target)
    ]
    options = {"prefetch_factor": PREFETCH, "persistent_workers": True} if workers else {}
    return DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options)


LOADERS = {
    "orig": (make_train_loader_orig, make_val_loader_orig),
    "wds": (make_train_loader_wds, make_val_loader_wds),
}


# ---------------------------------------------------------------------------- which worker reads what


class ShardPipeline(wds.DataPipeline):
    """A pipeline that knows its number of batches and the order of its samples, which set_epoch() changes."""

    def __init__(self, lengths, batch_size, rank, world_size, seed, train):
        super().__init__()
        self.batch_size = batch_size
        self.seed_prefix = f"{seed} {rank}"
        self.train = train
        self.plan = functools.partial(plan, lengths, batch_size, rank, world_size, seed if train else None)
        self.rng = random.Random()
        self.position = torch.tensor([0, 0]).share_memory_()  # epoch, first step; shared with persistent workers

    def __len__(self):
        return math.ceil(sum(last - first for _, first, last in self.plan()) / self.batch_size)

    def set_epoch(self, epoch, step=0):
        """The next iteration reads this epoch, from this step on."""
        self.position[:] = torch.tensor([epoch, step])

    def pieces(self):
        """Stage 1: what this worker reads. Also seeds the stages that follow for this epoch and worker."""
        epoch, step = self.position.tolist()
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # the DataLoader always starts with worker 0; after a resume, that one continues as worker step % workers
        worker = (info.id + step) % workers if info else 0
        self.done = math.ceil((step - worker) / workers) * self.batch_size
        self.seed = f"{self.seed_prefix} {epoch} {worker}"
        self.rng.seed(self.seed)
        return self.plan(epoch, worker, workers)

    def skip_done(self, samples):
        """Stage 4: the samples from the first step on. The first sample of a batch has the seed of its augmentation."""
        for i, sample in enumerate(samples):
            if self.train and i % self.batch_size == 0:
                sample["__seed__"] = f"{self.seed} {i}"
            if i >= self.done:
                yield sample


def plan(lengths, batch_size, rank, world_size, seed, epoch=0, worker=0, num_workers=1):
    """What a worker reads in an epoch: [(shard, first, last)] in reading order, the samples first <= i < last.

    The shards, in an order drawn from (seed, epoch), form one sequence of samples. Each rank reads an equal range of
    it; the last one wraps around. Without a seed, for validation, the shards are in order and no sample is taken twice.
    Each worker reads a range of whole batches of its rank's range. The DataLoader asks the workers in turn, so the last
    range, with the short batch, goes to the worker whose turn is last.
    """
    total = sum(lengths)
    order = list(range(len(lengths)))
    if seed is None:
        first = total * rank // world_size
        end = total * (rank + 1) // world_size
    else:
        random.Random(f"{seed} {epoch}").shuffle(order)
        share = math.ceil(total / world_size)
        first = rank * share % total
        end = first + share
    batches = math.ceil((end - first) / batch_size)
    for i in range(num_workers):  # in the order of their ranges
        turn = (batches + i) % num_workers
        size = batch_size * len(range(turn, batches, num_workers))  # its steps: turn, turn + num_workers, ...
        if turn == worker:
            break
        first += size
    end = min(end, first + size)
    pieces = []
    start = 0
    for shard in order + order:  # twice, for the range that wraps around
        piece = (shard, max(first - start, 0), min(end - start, lengths[shard]))
        if piece[1] < piece[2]:
            pieces.append(piece)
        start += lengths[shard]
    return pieces


# ---------------------------------------------------------------------------- finding and reading the shards

INDEX = "_info.json"
INDEX_NAMES = {"train": "train", "val": "validation"}  # the splits' names in the index
IMAGES = {ending.lstrip(".") for ending in datasets.folder.IMG_EXTENSIONS}  # file extensions; the class is in "cls"
TIMEOUT = 60  # seconds that an http server may be silent
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # seconds before a remote shard is read again; their sum is five minutes


def find_shards(args, split):
    """(urls, lengths, names) of the shards of a split, "train" or "val", after checking the index."""
    patterns = {"train": args.trainshards, "val": args.valshards}
    urls, lengths, names, classes = list_shards(args.shards, split, patterns[split])
    for url in urls:
        if is_local(url) and not os.path.exists(url):
            fail(f"{url}: the index lists this shard, but it does not exist")
    if not sum(lengths):
        fail(f"{patterns[split] or args.shards}: no samples in the {split} shards")
    if split == "train" and sum(lengths) < args.world_size:
        fail(f"{args.world_size} ranks but {sum(lengths)} training samples: start fewer processes")
    if len(classes) > NUM_CLASSES:
        fail(f"--shards {args.shards}: {len(classes)} classes, but the model has {NUM_CLASSES} outputs")
    if split == "val" and not args.evaluate:
        *_, others = list_shards(args.shards, "train", args.trainshards)
        if classes and others and classes != others:
            differing = ", ".join(sorted(set(classes) ^ set(others))[:5]) or "their order"
            fail(f"training and validation shards have different classes: {differing}; write both in one run")
    number = f", {len(classes)} classes" if classes else ""
    shards = "1 shard" if len(urls) == 1 else f"{len(urls)} shards"
    say(args, f"=> {split}: {sum(lengths)} images in {shards}{number}")
    return urls, lengths, names


def list_shards(folder, split, pattern=None):
    """(urls, lengths, names, classes) of a split's shards, from the index in a folder or at a URL.

    The shards are beside the index, or where a pattern says; an index beside them then takes precedence.
    """
    folder = folder.rstrip("/")
    check_scheme(folder)
    if not pattern:
        entry = read_index(folder).get(INDEX_NAMES[split])
        if not entry:
            fail(f"--shards {folder}: no {INDEX} there that lists {split} shards; check --shards, or run makeshards.py")
        names = entry["filenames"]
        return [f"{folder}/{name}" for name in names], entry["shard_lengths"], names, entry["classes"]
    urls = expand(pattern)
    index = {}
    if is_local(urls[0]) or urls[0].startswith("http"):
        index = read_index(os.path.dirname(urls[0]) or ".")
    index = index or read_index(folder)
    if not index:
        fail(f"{pattern}: no {INDEX} beside the shards or in --shards {folder}; write one with makeshards.py --index")
    own = index.pop(INDEX_NAMES[split], None)
    entries = list(index.values())
    if own:
        entries.append(own)  # last: its names take precedence
    lengths = {}
    for entry in entries:
        classes = entry["classes"]
        lengths.update(zip(map(os.path.basename, entry["filenames"]), entry["shard_lengths"], strict=True))
    names = []
    for url in urls:
        found = file_names(url) & lengths.keys()
        if len(found) != 1:
            fail(f"{url}: matches {len(found)} shards in the index, must be 1; makeshards.py --index writes another")
        names += found
    return urls, [lengths[name] for name in names], names, classes


def read_index(folder):
    """{split: its entry in the index} of a folder or URL; {} if there is no index. DataError if it is invalid."""
    try:
        with wds.gopen(f"{folder}/{INDEX}") as stream:
            data = stream.read()
        index = json.loads(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
        for entry in index["splits"].values():
            names, lengths = entry["filenames"], entry["shard_lengths"]
            entry["classes"] = entry.get("classes") or index.get("classes") or []
            for name in names:
                if name.startswith("/") or ":" in name or ".." in name.split("/"):  # it could run a command
                    raise ValueError(f"{name} is outside the index's folder")
            if not len(set(names)) == len(names) == len(lengths) or sum(lengths) != entry["num_samples"]:
                raise ValueError("filenames, shard_lengths and num_samples are inconsistent")
            if min(lengths, default=0) < 0:
                raise ValueError("a negative length")
        return index["splits"]
    except Exception as error:  # of any type, if it is another kind of file
        if isinstance(error, FileNotFoundError) or getattr(error, "code", None) in (403, 404):
            return {}
        if isinstance(error, OSError):
            fail(f"{folder}/{INDEX}: can't be read ({reason(error)})")
        what = f"{type(error).__name__}: {reason(error)}"
        fail(f"{folder}/{INDEX}: not an index of shards ({what}); makeshards.py --index writes one")


def expand(pattern):
    """The paths, URLs and commands of a pattern: braces are expanded and, in paths, globs."""
    try:
        urls = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces, unknown variables
        fail(f"{pattern}: {first_line(error)}")
    found = []
    for url in urls:
        if is_local(url) and not os.path.exists(url):
            found += sorted(glob.glob(url)) or fail(f"{url}: no shard matches")
        else:
            check_scheme(url)
            found.append(url)
    return found


def check_scheme(url):
    if not is_local(url) and url.partition(":")[0] not in wds.gopen_schemes:
        fail(f"{url}: webdataset can't open such URLs; use --trainshards and --valshards with a pipe: command")


def file_names(url):
    """The words of a path, URL or command that may be the file name of its shard."""
    return {word.rpartition("/")[2] for word in re.split(r"[\s'\"|;<>?&=]+", url)}


def is_local(url):
    return not ("://" in url or url.startswith("pipe:"))


def read_shards(pieces, urls, lengths):
    """Stage 2: the samples of the pieces."""
    for shard, first, last in pieces:
        yield from read_shard(urls[shard], lengths[shard], first, last)


def read_shard(url, length, first, last):
    """The samples first <= i < last of a shard of `length` samples; DataError if it is damaged or has another length.

    A remote shard is reopened, skipping the samples already read. The pauses grow, and are reset after each new sample.
    """
    done = first
    pauses = iter(PAUSES)
    while True:
        count = 0
        try:
            for sample in read_tar(url):
                count += 1
                if done < count <= last:
                    yield sample
                    done = count
                    pauses = iter(PAUSES)
                if count == last < length:  # another worker reads the rest
                    return
            if count == length:
                return
            problem = f"{count} samples, but {length} in its index"
            temporary = count < length  # a connection that breaks may look like the end of the tar
        except Exception as error:  # a damaged tar may raise nearly anything
            problem = f"broken after {count} of its {length} samples ({reason(error)})"
            temporary = getattr(error, "code", 500) in (408, 429, *range(500, 600))  # any other http status is final
            temporary = temporary and not isinstance(error, (FileNotFoundError, ImportError))  # a program is missing
        pause = next(pauses, None)
        if is_local(url) or not temporary or pause is None:
            fail(f"{url}: {problem}")
        print_line(f"{url}: {problem}; retrying in {pause} s", error=True)
        time.sleep(pause)


def read_tar(url):
    """The samples of a shard, undecoded: {"__url__", "__key__", "jpg" or another extension: bytes, "cls": bytes}."""
    with wds.gopen(url) as stream:
        set_options(stream, ignore_errors=True)  # of a command's exit status: it is killed if only a part is read
        for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
            if len(IMAGES & sample.keys()) != 1 or "cls" not in sample:
                raise ValueError(f"sample {sample['__key__']} does not hold one image and one class")
            yield sample


def reason(error):
    """The message of an error without webdataset's additions, such as " @ <_io.BufferedReader name='a.tar'>"."""
    text = error.args[0] if error.args else None
    if isinstance(error, HTTPError) or not isinstance(text, str):
        return first_line(error) if isinstance(error, OSError) else type(error).__name__
    return re.split(r" @ <| dict_keys", text)[0]


def open_http(url, mode="rb", bufsize=None):
    """Replaces curl in wds.gopen(): a silent server is an error, and the status of a failure is known."""
    if "@" in url.split("/")[2]:
        raise ValueError("a user name or password in a URL; use pipe:curl with --netrc instead")
    try:
        return urllib.request.urlopen(url, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()  # its connection: webdataset keeps the error alive until garbage collection
        raise


wds.gopen_schemes.update(http=open_http, https=open_http)


# ---------------------------------------------------------------------------- decoding, batching

PREFETCH = 2  # batches that a worker prefetches; batched_in_place() relies on it


def decode_samples(samples, transform, num_classes):
    """Stage 5: (image, class) of each sample."""
    for sample in samples:
        if "__seed__" in sample:
            random.seed(sample["__seed__"])
            torch.default_generator.manual_seed(random.getrandbits(63))
        try:
            label = sample["cls"].strip()
            if not label.isdigit() or len(label) > 9 or int(label) >= num_classes:
                fail(f"its class {label[:20].decode(errors='replace')!r} is not a number from 0 to {num_classes - 1}")
            (ending,) = IMAGES & sample.keys()
            yield transform(sample[ending]), int(label)
        except DataError as error:
            name = f"{sample['__url__']}: sample {sample['__key__']}".replace("\n", " ")
            raise DataError(f"{name}: {error}") from error


def decode_tensor(data):
    """uint8 (3, H, W), RGB, from the bytes of an image file; DataError if it can't be decoded.

    JPEGs of one or three channels go to the fast decoder, all else to Pillow. EXIF orientation is ignored.
    """
    _, decode_jpeg = jpeg_decoder()
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header, in 30 µs; rejects decompression bombs
            fast = decode_jpeg and image.format == "JPEG" and image.mode in ("L", "RGB")
            exif = image.info.get("exif", b"")[:10]  # its header
        if fast and exif:  # TorchCodec would rotate the image
            data = data.replace(exif, bytes(len(exif)))
        if fast:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except Exception:  # perhaps Pillow can decode it
        pass
    return v2.functional.pil_to_tensor(decode_pil(data))


DECODERS = {"tensor": decode_tensor, "pil": decode_pil}


@functools.cache
def jpeg_decoder():
    """(name, function) of the fastest decoder available: from a JPEG's bytes, uint8 (N), to uint8 (3, H, W)."""
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


def channels_last(image):
    """(H, W, 3) from (3, H, W): the layout that decoders write, and that batches keep."""
    return image.permute(1, 2, 0)


def batched_in_place(samples, batch_size):
    """Stage 6, instead of wds.batched(): each batch of images reuses the memory of the third before it.

    The caller holds at most one batch of each worker, and the DataLoader has PREFETCH more in flight. (Also at the
    end of an epoch: no worker has two batches more than another.)
    """
    blocks = [None] * (PREFETCH + 1)
    for turn in itertools.cycle(range(len(blocks))):
        target = []
        for image, label in itertools.islice(samples, batch_size):
            if blocks[turn] is None:
                blocks[turn] = image.new_empty((batch_size, *image.shape)).share_memory_()
            blocks[turn][len(target)] = image
            target.append(label)
        if not target:
            return
        yield blocks[turn][: len(target)], torch.tensor(target)


# ---------------------------------------------------------------------------- device transfer, stopping, resuming

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Run:
    """The position of the run, and the signal received, if any."""

    def __init__(self, args, state):
        self.args = args
        self.state = state  # state(epoch): what a checkpoint holds
        self.epoch = 0
        self.position = None  # what --resume needs to continue within the epoch; None for folders
        self.signal = 0
        self.second_after = math.inf  # until then, a signal is a duplicate: a terminal and torchrun both send one
        self.workers_end = torch.tensor(False).share_memory_()
        Finalize(None, self.workers_end.fill_, [True], exitpriority=0)  # before multiprocessing waits for them
        for number in SIGNALS:
            signal.signal(number, self.note_signal)

    def note_signal(self, number, _):
        if time.monotonic() > self.second_after:
            os._exit(128 + number)
        if not self.signal:
            self.signal = number
            self.second_after = time.monotonic() + 2

    def over_ranks(self, number):
        """The maximum of the number over all ranks."""
        if not self.args.distributed:
            return number
        number = torch.tensor(number, device=self.args.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def stop_if_asked(self):
        """Write a checkpoint and exit if any rank has noted a signal. All ranks call this after the same step."""
        number = self.over_ranks(self.signal)
        if not number:
            return
        self.save()
        self.workers_end.fill_(True)
        if self.args.rank == 0:
            what = "nothing was saved since the last complete epoch"
            if self.position:
                what = f"add --resume checkpoint.pth.tar to continue (epoch {self.epoch}, step {self.position['step']})"
            print_error(f"stopped by {signal.Signals(number).name}; {what}")
        if self.args.distributed:
            self.over_ranks(0)  # waits until rank 0 has written it
            dist.destroy_process_group()
        sys.exit(128 + number)

    def save(self):
        if self.position and self.args.rank == 0:
            save_checkpoint({**self.state(self.epoch), "position": self.position}, is_best=False)


class DeviceLoader:
    """A loader's batches on the device. A signal stops the run between batches; training records its position."""

    def __init__(self, loader, run, checkpoint=None):
        self.loader = loader
        self.run = run
        self.args = run.args
        self.mean = 255 * torch.tensor(MEAN, device=run.args.device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=run.args.device).view(1, 3, 1, 1)
        self.first_step = 0
        self.resumed = {}  # {epoch: its first step}
        self.order = None  # for training shards: what determines the order of the batches, besides the epoch
        loader.worker_init_fn = functools.partial(init_worker, run.workers_end)
        resumed = checkpoint and "position" in checkpoint and self.args.start_epoch is None
        if checkpoint and isinstance(loader.dataset, ShardPipeline):
            names = ("world_size", "workers", "batch_size", "shuffle", "image_size", "decode", "augmentation")
            self.order = {"shards": loader.shards, **{name: getattr(self.args, name) for name in names}}
            self.order["seed"] = self.args.seed or 0
        elif resumed:
            say(self.args, f"=> epoch {checkpoint['epoch']} is trained again from its first step")
        if self.order and resumed:
            check_order(self.args, checkpoint["position"], self.order, checkpoint["epoch"])
            self.resumed = {checkpoint["epoch"]: checkpoint["position"]["step"]}
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # if that epoch has no steps left

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.run.epoch = epoch
        self.first_step = self.resumed.get(epoch, 0)
        if self.order:
            self.loader.dataset.set_epoch(epoch, self.first_step)
            self.run.position = {"step": self.first_step, **self.order}
        elif self.args.distributed:
            self.loader.sampler.set_epoch(epoch)

    def __iter__(self):
        """The batches from first_step on: images float32 (B, 3, S, S), normalized; target int64 (B)."""
        count = len(self)
        common = -self.run.over_ranks(-count)  # validation's number of batches may differ by one between ranks
        self.run.stop_if_asked()
        if 0 < self.first_step == count:  # only validation is left; the loader would read all shards and discard them
            return
        try:
            for step, batch in enumerate(self.loader, self.first_step + 1):
                if self.order:
                    set_seed(self.args, f"{self.run.epoch} {step}")
                yield self.to_device(*batch)
                if self.order:
                    self.run.position["step"] = step
                    if self.args.checkpoint_steps and step % self.args.checkpoint_steps == 0:
                        self.run.save()
                if step < common and (step % self.args.print_freq == 0 or not self.args.distributed):
                    self.run.stop_if_asked()  # with several ranks not at each step: it takes an all_reduce
        except BaseException:  # including those of the training step
            self.run.workers_end.fill_(True)  # they may be waiting for a server
            raise

    def to_device(self, images, target):
        device = self.args.device
        images = images.to(device, non_blocking=device.type == "cuda")
        target = target.to(device, non_blocking=device.type == "cuda")
        if images.dtype == torch.uint8:  # (B, S, S, 3)
            images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.args.memory_format)
            images.sub_(self.mean).div_(self.std)
        return images, target


def check_order(args, then, now, epoch):
    """Raise DataError if the options differ from those with which the epoch was started."""
    for name, value in now.items():
        before = then.get(name)
        if before == value:
            continue
        if name in ("workers", "batch_size") and before is not None:  # per process; the options are per node
            value *= args.ngpus_per_node
            before *= args.ngpus_per_node
        what = "other shards" if name == "shards" else f"--{name.replace('_', '-')} {before}, not {value}"
        if name == "world_size":
            what = f"{before} ranks, not {value}"
        way_out = f"the rest of the epoch would differ: use the same, or restart it with --start-epoch {epoch}"
        fail(f"--resume {args.resume}: it was saved within an epoch with {what}; {way_out}")


def check_image_size(model, args):
    """DataError if the model can't take images of --image-size; all of torchvision's take 224 pixels."""
    if args.image_size == 224:
        return
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, args.image_size, args.image_size, device=args.device))
    except Exception as error:  # of any type, by the model
        fail(f"--arch {args.arch}: it does not support --image-size {args.image_size} ({first_line(error)})")


def init_worker(workers_end, _):
    """In a worker: ignore signals, which schedulers send to all processes, and end with the main process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=watch_main, args=(workers_end,), daemon=True).start()


def watch_main(workers_end):
    """In a worker's thread: end the worker, even if it waits for a server, once the main process has ended."""
    while not workers_end and mp.parent_process().is_alive():
        time.sleep(0.2)
    if workers_end:
        time.sleep(2)  # gives the DataLoader time to end it
    os._exit(0)


if __name__ == "__main__":
    main()
