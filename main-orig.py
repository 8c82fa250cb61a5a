#!/usr/bin/env python3
"""Train a torchvision classifier on ImageNet, read from folders (main-orig.py) or WebDataset shards (main-wds.py).

    python main-orig.py DIR                         one process, on the GPU if there is one, else on the CPU
    python main-orig.py --gpu 1 -a resnet50 DIR     one GPU of several
    torchrun --nproc-per-node=8 main-orig.py DIR    eight GPUs of this node, a process each
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 main-orig.py DIR    of two
    python main-orig.py --multiprocessing-distributed DIR      every GPU of this node; without a GPU two CPU processes
    python main-orig.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://HOST:29500 DIR    of two
    python main-orig.py --resume checkpoint.pth.tar DIR        go on after the last whole epoch
    python main-orig.py --evaluate --pretrained DIR            measure a trained network
    python main-orig.py --dummy                                find the speed without any data
    DIR holds train/ and val/, and each of these a folder of images per class (./run sample makes some)

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
    parser.usage += " [DIR]"
    add("data", metavar="DIR", nargs="?", default="imagenet", help="holds train/ and val/ (%(default)s)")
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

    val_loader = make_val_loader_orig(args)
    train_loader = None if args.evaluate else make_train_loader_orig(args)
    if args.evaluate:
        validate(val_loader, net, criterion, args)
        return
    for epoch in range(state["epoch"], args.epochs):
        set_seed(args, epoch)
        if args.distributed:
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
    """From (name, bytes) of an image file to float32 (3, 224, 224), normalised. Random for the training split."""
    stages = [decode_pil, v2.Resize(256), v2.CenterCrop(224)]
    if split == "train":
        stages = [decode_pil, v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
    if args.dummy:
        stages = []
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


if __name__ == "__main__":
    main()
