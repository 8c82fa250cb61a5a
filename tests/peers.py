#!/usr/bin/env python3
"""Compare how fast main-wds.py loads training images with two other loaders, DALI and litdata, in one run.

    pip install nvidia-dali-cuda120 litdata            the others; one that is not installed is left out
    python tests/peers.py                              ./data and its ./shards, by two workers
    python tests/peers.py --workers 16 --images 50000 --batch-size 512 --data DIR --shards DIR

Only loading is measured, on the CPU, from a loader's start to the last batch of its epoch. All read the same images
in shuffled batches of one size, with the same number of processes or threads, and make the same of them: random crops
(area 0.08 to 1, aspect 3/4 to 4/3) resized to 224 x 224, bilinearly and with antialiasing, half of them mirrored.

orig/pil    main-wds.py --dataset orig --decode pil: Pillow on the files of --data, to normalised float32. The base.
wds/tensor  main-wds.py --dataset wds --decode tensor: on --shards, to uint8. The device would normalise it.
dali        DALI on the CPU, on the same shards, to uint8: its webdataset reader with its buffer of 1024 samples, its
            decoder of random crops, which leaves out what is not in the crop, resize and flip, in --workers threads.
            (decoders.image and random_resized_crop took longer.) The decoder is exact, without use_fast_idct. A short
            last batch costs it a full one: take many --images.
litdata     Its StreamingDataset on chunks of 64 MB, which litdata.optimize writes into a temporary folder from the same
            JPEG bytes, read in place. It decodes by itself, with torchvision; then v2's transforms, on uint8.

An epoch is of as many whole shards as hold --images, or of all of them several times over. Each loader must deliver
each class as often as it occurs, in images whose colours are orig/pil's on average. Each run is a process of its own;
its start, making the loader and litdata's chunks are not in it. The first round is a warm-up and not counted.
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
BASE, OURS = "orig/pil", ("orig/pil", "wds/tensor")
PEERS = {"dali": "nvidia-dali-cuda120", "litdata": "litdata"}  # what pip installs
INSTALLED = {(dist.metadata["Name"] or "").lower(): dist.version for dist in distributions()}
SIZE, AREA, ASPECT = 224, (0.08, 1.0), (3 / 4, 4 / 3)  # as v2.RandomResizedCrop has them, and main-wds.py
AUGMENT = v2.Compose([v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True), v2.RandomHorizontalFlip()])


def fail(message):
    print(f"peers: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- what all of them read


def make_plan(args):
    """The options, and what an epoch reads: "urls" and "lengths" of shards, the same "samples" as (path, class)."""
    main_wds, plan = script(), {**vars(args), "urls": [], "lengths": [], "samples": []}
    try:
        files = datasets.ImageFolder(os.path.join(args.data, "train")).samples
        urls, lengths, *_ = main_wds.list_shards(args.shards, "train")
    except (OSError, main_wds.DataError) as error:
        fail(main_wds.first_line(error))
    by_key = {os.path.splitext(os.path.basename(file[0]))[0].replace(".", "_"): file for file in files}  # --filekey
    by_key |= {f"{i:07d}": file for i, file in enumerate(files)}
    for url, length in zip(urls, lengths, strict=True):
        keys = [sample["__key__"] for sample in main_wds.read_tar(url)]
        if len(keys) != length or not by_key.keys() >= set(keys):
            fail(f"{url}: not a shard of the images in {args.data}/train; make the shards anew")
        plan["urls"].append(url)
        plan["lengths"].append(length)
        plan["samples"] += [by_key[key] for key in keys]
        if len(plan["samples"]) >= args.images:
            break
    times = math.ceil(args.images / len(plan["samples"]))
    return plan | {key: times * plan[key] for key in ("urls", "lengths", "samples")}


def pack(sample):
    """For litdata.optimize: the JPEG's own bytes, and the class."""
    from litdata.types import Jpeg

    return Jpeg(path=sample[0]), sample[1]


def make_chunks(plan, folder):
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):  # or it leaves them behind
        os.environ[name] = os.path.join(folder, name)
    import litdata

    say(f"litdata.optimize: {len(plan['samples'])} images")
    plan["chunks"] = os.path.join(folder, "chunks")
    options = {"chunk_bytes": "64MB", "num_workers": plan["workers"], "verbose": False}
    litdata.optimize(pack, plan["samples"], plan["chunks"], **options)


# ---------------------------------------------------------------------------- the loaders: (images, classes) in batches


def make_ours(name, plan):
    main_wds, (dataset, decode) = script(), name.split("/")
    sys.argv = ["main-wds.py", "--dataset", dataset, "--decode", decode, "--workers", str(plan["workers"])]
    sys.argv += ["--batch-size", str(plan["batch_size"]), "--data", plan["data"], "--shards", plan["shards"]]
    args = main_wds.parse_args()
    args.rank, args.world_size, args.distributed, args.device = 0, 1, False, torch.device("cpu")
    if dataset == "wds":
        return shard_loader(args, plan["urls"], plan["lengths"], reuse_memory=True)
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
        return images, fn.pad(classes, fill_value=ord(" "))  # as text, of one length in a batch

    batches = DALIGenericIterator(
        [pipeline()],
        ["images", "classes"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.PARTIAL,
        prepare_first_batch=False,  # not before the clock runs
    )
    return ((b["images"], torch.tensor([int(bytes(text)) for text in b["classes"].tolist()])) for (b,) in batches)


def augment(sample):
    return AUGMENT(sample[0]), sample[1]


def make_litdata(plan):
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(plan["chunks"], shuffle=True, transform=augment)
    return StreamingDataLoader(dataset, batch_size=plan["batch_size"], num_workers=plan["workers"])


# ---------------------------------------------------------------------------- one run


def measure(name, path):
    """Read one epoch; print {"rate": images/s, "colours", in the warm-up alone: what colours() makes} as JSON."""
    with open(path) as file:
        plan = json.load(file)
    loader = {"dali": make_dali, "litdata": make_litdata}[name](plan) if name in PEERS else make_ours(name, plan)
    found, sums = [], torch.zeros(6)
    start = time.perf_counter()
    for images, classes in loader:
        shapes = (len(classes), 3, SIZE, SIZE), (len(classes), SIZE, SIZE, 3)
        if images.shape not in shapes or images.dtype != (torch.float32 if name == BASE else torch.uint8):
            fail(f"{name} made {images.dtype} of shape {tuple(images.shape)}")
        found += classes.tolist()
        if plan["warm_up"]:
            sums += colours(images) * len(images)
    rate = len(found) / (time.perf_counter() - start)
    if sorted(found) != sorted(label for _, label in plan["samples"]):
        fail(f"{name} made {len(found)} images of {len(plan['samples'])}, or of other classes")
    print(json.dumps({"rate": rate, "colours": (sums / len(found)).tolist()}))


def colours(images):
    """Mean of R, G, B and their standard deviations, in 0..255, of a batch that is uint8 or normalised."""
    axes = (0, 1, 2) if images.shape[-1] == 3 else (0, 2, 3)
    std, mean = torch.std_mean(images.float(), axes)
    if images.dtype != torch.uint8:
        main_wds = script()
        scale = 255 * torch.tensor(main_wds.STD)
        std, mean = std * scale, mean * scale + 255 * torch.tensor(main_wds.MEAN)
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
    """Print the median of each loader's runs, and of their ratios to the base's run of the same round."""
    say("\nloader      images/s  times orig/pil")
    for name, values in rates.items():
        ratios = sorted(a / b for a, b in zip(values, rates[BASE], strict=True))
        spread = f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})" if name != BASE else ""
        say(f"{name:<10}  {statistics.median(values):8.1f}  {statistics.median(ratios):5.2f}{spread}")
    say("")


def version_of(package):
    """Of the package, or of its build for another CUDA; None if there is none."""
    stem = package.rstrip("0123456789")
    return next((f"{name} {version}" for name, version in INSTALLED.items() if name.rstrip("0123456789") == stem), None)


def machine(packages):
    return f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, " + ", ".join(packages)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="./data", metavar="DIR", help="folder that holds train/ (%(default)s)")
    parser.add_argument("--shards", default="./shards", metavar="DIR", help="folder of its shards (%(default)s)")
    parser.add_argument("--images", type=int, default=4000, metavar="N", help="at least, in each run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes or threads (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="counted runs of each (%(default)s)")
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
    rates, seen = {name: [] for name in names}, {}
    with tempfile.TemporaryDirectory() as folder:
        if "litdata" in peers:
            make_chunks(plan, folder)
        say(f"an epoch is of {len(plan['samples'])} images, in {len(plan['urls'])} shards")
        for i in range(args.repeats + 1):
            for name in names:
                result = run(name, plan | {"warm_up": i == 0}, folder)
                say(f"{f'run {i}' if i else 'warm-up'}: {name} {result['rate']:.1f} images/s")
                if i:
                    rates[name].append(result["rate"])
                    continue
                seen[name] = [round(value) for value in result["colours"]]
                if max(abs(a - b) for a, b in zip(seen[name], seen[BASE], strict=True)) > 10:
                    fail(f"{name}'s colours are {seen[name]} in mean and deviation, {BASE}'s {seen[BASE]}")
    table(rates)
    names = ("torch", "torchvision", "torchcodec", "webdataset", "pillow", *map(PEERS.get, peers))
    say(f"{machine(filter(None, map(version_of, names)))}; n = {args.repeats}")
    say(f"command: python tests/peers.py {shlex.join(sys.argv[1:])}".rstrip())


if __name__ == "__main__":
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # or it would ask PyPI, each time it starts
    if sys.argv[1:2] == ["--measure"]:  # main() starts itself so
        measure(*sys.argv[2:])
    else:
        main()
