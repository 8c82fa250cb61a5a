#!/usr/bin/env python3
"""Train a torchvision classifier on ImageNet.

    python main-orig.py DIR                         one process: on a GPU if there is one, else on the CPU
    python main-orig.py -a resnet50 --gpu 1 DIR     one GPU of several
    torchrun --nproc-per-node=8 main-orig.py DIR    eight GPUs of this node, one process each
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 main-orig.py DIR
    python main-orig.py --multiprocessing-distributed DIR      all GPUs of this node; without a GPU two CPU processes
    python main-orig.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://HOST:29500 DIR
    python main-orig.py --resume checkpoint.pth.tar DIR        continue after the last complete epoch
    python main-orig.py --evaluate --pretrained DIR            validate a pre-trained model
    python main-orig.py --dummy                                measure the speed without any data
    DIR holds train/ and val/, each with a folder of images per class

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
    add("data", metavar="DIR", nargs="?", default="imagenet", help="path to the dataset (default: %(default)s)")
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

    val_loader = make_val_loader_orig(args)
    train_loader = None if args.evaluate else make_train_loader_orig(args)
    contents = [len(loader.dataset) for loader in (val_loader, train_loader) if loader is not None]
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
        if args.distributed:
            train_loader.sampler.set_epoch(epoch)
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
    of_a_node = {"data", "resume", "dist_url"}
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
        dataset = datasets.ImageFolder(os.path.join(args.data, split), transform, loader=load_image)
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
    """From an RGB image to float32 (3, 224, 224), normalized. Random for the training split."""
    stages = [v2.Resize(256), v2.CenterCrop(224)]
    if split == "train":
        stages = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
    if args.dummy:
        stages = []
    return v2.Compose([*stages, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def decode_pil(data):
    """RGB PIL image from the bytes of an image file; DataError if Pillow can't decode it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises almost any exception type on broken files
        reason = first_line(error).partition(" <_io.")[0]  # without the address of the bytes
        raise DataError(f"not a readable image ({reason})") from error


def load_image(path):
    """RGB PIL image from its file. DataError names the file if it can't be read or decoded."""
    try:
        with open(path, "rb") as file:
            return decode_pil(file.read())
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
    i = -1
    for i, (images, target) in enumerate(train_loader):
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
    say(args, f"=> loaded checkpoint '{args.resume}' (epoch {checkpoint['epoch']})")
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


if __name__ == "__main__":
    main()
