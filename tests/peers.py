#!/usr/bin/env python3
"""Compare how fast main-wds.py and two other libraries, DALI and litdata, load training images.

    pip install nvidia-dali-cuda120 litdata            the others; one that is not installed is left out
    python tests/peers.py                              ./data and its shards in ./shards, with two workers
    python tests/peers.py --workers 16 --images 50000 --batch-size 512 --data DIR --shards DIR

Only loading is measured, on the CPU: from starting a loader to the last batch of its epoch. All loaders read the same
images in shuffled batches of the same size, with the same number of processes or threads, and apply the same
augmentation: random crops (area 0.08 to 1, aspect ratio 3/4 to 4/3), resized to 224 x 224 pixels, bilinear with
antialiasing, half of them flipped.

orig/pil    main-wds.py --dataset orig --decode pil: Pillow, from the files in --data, to normalized float32. The base.
wds/tensor  main-wds.py --dataset wds --decode tensor: from --shards to uint8, to be normalized on the device.
dali        DALI on the CPU, from the same shards to uint8: its webdataset reader with its default buffer of 1024
            samples, image_random_crop, which decodes the crop only, resize and flip, in --workers threads.
            (decoders.image and random_resized_crop were slower.) It decodes exactly, without use_fast_idct. A short
            last batch takes it as long as a full one, so use many --images.
litdata     StreamingDataset, from chunks of 64 MB, which litdata.optimize writes to a temporary folder from the same
            JPEG files. It decodes with torchvision; then v2's transforms are applied, on uint8.

An epoch is as many whole shards as hold --images, or all of them several times. Each loader must return each class as
often as it occurs, and images whose average colors are those of orig/pil. Each run is a process of its own; starting
it, creating the loader and writing litdata's chunks are not measured. The first round is a warm-up and not counted.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions

import torch
from bench import cpu_name, say, script, shard_loader
from torchvision import datasets
from torchvision.transforms import v2

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = "orig/pil"
OURS = (BASE, "wds/tensor")
PEERS = {"dali": "nvidia-dali-cuda120", "litdata": "litdata"}  # the names of the packages
INSTALLED = {(dist.metadata["Name"] or "").lower(): dist.version for dist in distributions()}
SIZE = 224
AREA = (0.08, 1.0)  # this and ASPECT are the defaults of v2.RandomResizedCrop, as in main-wds.py
ASPECT = (3 / 4, 4 / 3)
AUGMENT = v2.Compose([v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True), v2.RandomHorizontalFlip()])


def fail(message):
    print(f"peers: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- the images of an epoch


def make_plan(args):
    """The options, and an epoch: "urls" and "lengths" of shards, and the same images as "samples": (path, class)."""
    main_wds = script()
    try:
        files = datasets.ImageFolder(os.path.join(args.data, "train")).samples
        urls, lengths, *_ = main_wds.find_shards(args.shards, "train")
    except (OSError, main_wds.DataError) as error:
        fail(main_wds.first_line(error))
    by_key = {}
    for file in files:  # with makeshards.py --filekey
        name, _ = os.path.splitext(os.path.basename(file[0]))
        by_key[name.replace(".", "_")] = file
    for i, file in enumerate(files):
        by_key[f"{i:07d}"] = file
    plan = {**vars(args), "urls": [], "lengths": [], "samples": []}
    for url, length in zip(urls, lengths, strict=True):
        keys = [sample["__key__"] for sample in main_wds.read_shard(url, length, range(length))]
        if not by_key.keys() >= set(keys):
            fail(f"{url}: not a shard of the images in {args.data}/train; write the shards again")
        plan["urls"].append(url)
        plan["lengths"].append(length)
        plan["samples"] += [by_key[key] for key in keys]
        if len(plan["samples"]) >= args.images:
            break
    times = math.ceil(args.images / len(plan["samples"]))
    return plan | {key: times * plan[key] for key in ("urls", "lengths", "samples")}


def pack(sample):
    """For litdata.optimize: the bytes of the JPEG file, and the class."""
    from litdata.types import Jpeg

    return Jpeg(path=sample[0]), sample[1]


def make_chunks(plan, folder):
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):  # else it would leave these behind
        os.environ[name] = os.path.join(folder, name)
    import litdata

    say(f"litdata.optimize: {len(plan['samples'])} images")
    plan["chunks"] = os.path.join(folder, "chunks")
    options = {"chunk_bytes": "64MB", "num_workers": plan["workers"], "verbose": False}
    litdata.optimize(pack, plan["samples"], plan["chunks"], **options)


# ---------------------------------------------------------------------------- the loaders: batches of (images, classes)


def make_ours(name, plan):
    main_wds = script()
    dataset, decode = name.split("/")
    sys.argv = ["main-wds.py", "--dataset", dataset, "--decode", decode, "--workers", str(plan["workers"])]
    sys.argv += ["--batch-size", str(plan["batch_size"]), "--data", plan["data"], "--shards", plan["shards"]]
    args = main_wds.parse_args()
    args.rank = 0
    args.world_size = 1
    args.distributed = False
    args.device = torch.device("cpu")
    if dataset == "wds":
        return shard_loader(args, plan["urls"], plan["lengths"])
    loader = main_wds.make_train_loader_orig(args)
    loader.dataset.samples = plan["samples"]
    return loader


def make_dali(plan):
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=plan["batch_size"], num_threads=plan["workers"], device_id=None)
    def pipeline():
        endings = ["jpg;jpeg;png;webp", "cls"]
        files, classes = fn.readers.webdataset(paths=plan["urls"], ext=endings, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            files, random_area=AREA, random_aspect_ratio=ASPECT, adjust_orientation=False
        )
        images = fn.flip(fn.resize(images, size=[SIZE, SIZE]), horizontal=fn.random.coin_flip())
        return images, fn.pad(classes, fill_value=ord(" "))  # text, padded to one length per batch

    batches = DALIGenericIterator(
        [pipeline()],
        ["images", "classes"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        prepare_first_batch=False,  # so that it is measured, too
    )
    return map(unpack, batches)


def unpack(outputs):
    """For DALI: (images, classes) of a batch."""
    (batch,) = outputs  # of the only pipeline
    classes = [int(bytes(text)) for text in batch["classes"].tolist()]
    return batch["images"], torch.tensor(classes)


def augment(sample):
    """For litdata: the transform of a sample."""
    return AUGMENT(sample[0]), sample[1]


def make_litdata(plan):
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(plan["chunks"], shuffle=True, transform=augment)
    return StreamingDataLoader(dataset, batch_size=plan["batch_size"], num_workers=plan["workers"])


# ---------------------------------------------------------------------------- one run


def measure(name, path):
    """Read one epoch; print {"rate": images/s, "colors": what colors() returns, in the warm-up only} as JSON."""
    with open(path) as file:
        plan = json.load(file)
    if name == "dali":
        loader = make_dali(plan)
    elif name == "litdata":
        loader = make_litdata(plan)
    else:
        loader = make_ours(name, plan)
    found = []
    sums = torch.zeros(6)
    start = time.perf_counter()
    for images, classes in loader:
        shapes = [(len(classes), 3, SIZE, SIZE), (len(classes), SIZE, SIZE, 3)]
        dtype = torch.float32 if name == BASE else torch.uint8
        if images.shape not in shapes or images.dtype != dtype:
            fail(f"{name} returned {images.dtype} of shape {tuple(images.shape)}")
        found += classes.tolist()
        if plan["warm_up"]:
            sums += colors(images) * len(images)
    rate = len(found) / (time.perf_counter() - start)
    if sorted(found) != sorted(label for _, label in plan["samples"]):
        fail(f"{name} returned {len(found)} images of {len(plan['samples'])}, or other classes")
    print(json.dumps({"rate": rate, "colors": (sums / len(found)).tolist()}))


def colors(images):
    """The means of R, G and B and then their standard deviations, in 0..255, of a batch (uint8, or normalized)."""
    axes = (0, 1, 2) if images.shape[-1] == 3 else (0, 2, 3)
    std, mean = torch.std_mean(images.float(), axes)
    if images.dtype != torch.uint8:
        main_wds = script()
        scale = 255 * torch.tensor(main_wds.STD)
        std = std * scale
        mean = mean * scale + 255 * torch.tensor(main_wds.MEAN)
    return torch.cat([mean, std])


def run(name, plan, folder):
    path = os.path.join(folder, "plan.json")
    with open(path, "w") as file:
        json.dump(plan, file)
    command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--measure", name, path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        fail(f"{name} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------- the table


def table(rates):
    """Print the median of each loader's runs, and of their ratios to the base in the same round."""
    say("\nloader      images/s  times orig/pil")
    for name, values in rates.items():
        ratios = sorted(a / b for a, b in zip(values, rates[BASE], strict=True))
        spread = f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})" if name != BASE else ""
        say(f"{name:<10}  {statistics.median(values):8.1f}  {statistics.median(ratios):5.2f}{spread}")
    say("")


def version_of(package):
    """The name and version of the package, or of its build for another CUDA version; None if there is none."""
    stem = package.rstrip("0123456789")
    for name, version in INSTALLED.items():
        if name.rstrip("0123456789") == stem:
            return f"{name} {version}"
    return None


def machine(packages):
    return f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, " + ", ".join(packages)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="./data", metavar="DIR", help="folder that holds train/ (default: %(default)s)")
    add("--shards", default="./shards", metavar="DIR", help="folder of its shards (default: %(default)s)")
    add("--images", type=int, default=4000, metavar="N", help="minimum per run (default: %(default)s)")
    add("--batch-size", type=int, default=256, metavar="N", help="(default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes or threads (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="runs after the warm-up (default: %(default)s)")
    args = parser.parse_args()
    for name in ("images", "batch_size", "workers", "repeats"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    return args


def main():
    args = parse_args()
    peers = [name for name, package in PEERS.items() if version_of(package)]
    for name in PEERS.keys() - set(peers):
        say(f"{name} is left out: pip install {PEERS[name]}")
    plan = make_plan(args)
    names = [*OURS, *peers]
    rates = {name: [] for name in names}
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        if "litdata" in peers:
            make_chunks(plan, folder)
        say(f"an epoch is {len(plan['samples'])} images in {len(plan['urls'])} shards")
        for i in range(args.repeats + 1):
            for name in names:
                result = run(name, plan | {"warm_up": i == 0}, folder)
                say(f"{f'run {i}' if i else 'warm-up'}: {name} {result['rate']:.1f} images/s")
                if i:
                    rates[name].append(result["rate"])
                    continue
                seen[name] = [round(value) for value in result["colors"]]
                if max(abs(a - b) for a, b in zip(seen[name], seen[BASE], strict=True)) > 10:
                    fail(f"{name}: means and deviations of its colors are {seen[name]}, but {BASE}'s are {seen[BASE]}")
    table(rates)
    names = ("torch", "torchvision", "torchcodec", "webdataset", "pillow", *map(PEERS.get, peers))
    say(f"{machine(filter(None, map(version_of, names)))}; n = {args.repeats}")
    say(f"command: python tests/peers.py {shlex.join(sys.argv[1:])}".rstrip())


if __name__ == "__main__":
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # else it would ask PyPI at each start
    if sys.argv[1:2] == ["--measure"]:  # how main() starts each run
        measure(*sys.argv[2:])
    else:
        main()
