#!/usr/bin/env python3
"""Write ImageNet's folders of images as WebDataset shards: tar files of 1000 samples each, and their index.

    ln -s /data/imagenet ./data       where your ImageNet is: torchvision's train/ and val/, or Kaggle's ILSVRC/
    mkdir ./shards                    takes about as much disk as the images, 155 GB
    python makeshards.py              1282 training and 50 validation shards; run it again to resume
    python makeshards.py --check      the same, but decode each image first
    python makeshards.py --verify     read the shards and compare them with their index and with the images
    python makeshards.py --data ./pets --shards ./pet-shards --maxcount 500      any images in a folder per class
    python makeshards.py --resize 384         smaller shards: scale larger images to a shorter side of 384 pixels
    python makeshards.py --index './theirs/train-{000..146}.tar'       write ./theirs/_info.json for existing shards

A sample is two members of a tar: KEY.jpg, the image file's own bytes (KEY.png for a .png, and so on), and KEY.cls, its
class as a decimal number: the position of its folder among the sorted class folders of train/. KEY is the index of
the image in torchvision.datasets.ImageFolder. Training samples are shuffled over the whole split, so that each shard is
a random subset. The same images and options give the same bytes for any number of workers; with --resize, only with the
same version of Pillow.

Shards are renamed once complete, and the index is written last. Until then, .train.json has the plan.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import stat
import sys
import tarfile
import threading
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import webdataset as wds
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from tqdm import tqdm
from webdataset.gopen import set_options
from webdataset.shardlists import expand_urls

INDEX = "_info.json"  # in the format of timm's reader and the Hugging Face Hub's ImageNet shards
INDEX_NAMES = {"train": "train", "val": "validation"}  # of the splits
IMAGES = {ending.lstrip(".") for ending in IMG_EXTENSIONS}  # in a sample; its class is in "cls"
NUM_CLASSES = 1000  # outputs of main-wds.py's models
QUALITY = 90  # of scaled images: at 4:4:4 it is smaller than 95 at 4:2:0, and as close to the original


# ---------------------------------------------------------------------------- options


def parse_args():
    parser = argparse.ArgumentParser(description="Write folders of images as WebDataset shards", allow_abbrev=False)
    parser.error = usage_error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("--data", default="./data", metavar="DIR", help="folder that holds train/ and val/ (default: %(default)s)")
    add("--shards", default="./shards", metavar="DIR", help="existing folder to write to (default: %(default)s)")
    add("--splits", default="train,val", metavar="LIST", help="comma-separated splits (default: %(default)s)")
    add("--maxcount", type=in_range(10**9), default=1000, metavar="N", help="samples per shard (default: %(default)s)")
    add("--filekey", action="store_true", help="use file names without extension as keys (default: numbers)")
    add("--seed", type=int, default=0, metavar="N", help="seed for shuffling training samples (default: %(default)s)")
    add("--workers", type=in_range(4096), default=cores, metavar="N", help="processes (default: cores, %(default)s)")
    add("--check", action="store_true", help="decode each image, and list all that can't be decoded")
    add("--resize", type=in_range(65535), metavar="N", help="scale larger images to a shorter side of N pixels")
    add("--quality", type=in_range(100), metavar="Q", help=f"JPEG quality of scaled images (default: {QUALITY})")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--verify", action="store_true", help="check the shards, don't write; exit 1 on any problem")
    group.add_argument("--index", metavar="URLS", help="write only the index of existing shards: braces or glob")
    args = parser.parse_args()
    args.splits = args.splits.split(",")
    if not set(args.splits) <= INDEX_NAMES.keys():
        fail(f"--splits {','.join(args.splits)}: must be train, val, or train,val")
    if args.quality is not None and args.resize is None:
        fail(f"--quality {args.quality}: only images scaled by --resize are encoded; add --resize")
    args.quality = args.quality or (args.resize and QUALITY)
    return args


def in_range(most):
    """An argparse type: integers from 1 to most."""

    def number(text):
        value = int(text)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between 1 and {most}")
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


def count(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------- main


def main():
    for stream in (sys.stdout, sys.stderr):  # their encoding may lack letters of file names
        if stream:  # it may be closed
            stream.reconfigure(errors="backslashreplace")
    status = 2
    try:
        args = parse_args()
        pool = start_workers(args.workers)
        try:
            if args.index is not None:
                sys.exit(write_index(args, pool))
            if args.verify:
                sys.exit(verify(args, pool))
            sys.exit(write(args, pool))
        finally:
            pool.shutdown(cancel_futures=True)
    except (DataError, OSError) as error:
        message = error
    except BrokenProcessPool:
        message = "a worker was killed, perhaps because memory ran out; rerun this command"
    except KeyboardInterrupt:
        message = "interrupted; run it again"
        status = 130
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)


def start_workers(number):
    """The pool of worker processes, once all are running. Until then Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(number, initializer=init_worker)
    try:
        list(pool.map(abs, range(number)))
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: --workers {number}: can't start them ({error})", file=sys.stderr)
        os._exit(2)  # the pool's shutdown would wait for the missing ones
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return pool


def init_worker():
    """In a worker: exit on Ctrl-C without a traceback, and when the main process ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(parent):
    parent.join()
    os._exit(1)


def in_parallel(pool, function, jobs, what, total=None):
    """The results of function(*job), each (samples, ...), in order; with a progress bar (in logs, each minute)."""
    tqdm.monitor_interval = 0  # no monitor thread: forking a process with threads may deadlock
    pause = 0 if sys.stderr.isatty() else 60
    with tqdm(total=total, desc=what, unit=" images", mininterval=pause or 0.1, delay=pause) as bar:
        for result in pool.map(function, *zip(*jobs, strict=True)):
            bar.update(result[0])
            yield result


# ---------------------------------------------------------------------------- finding the images


def split_folder(args, split):
    kaggle = os.path.join(args.data, "ILSVRC", "Data", "CLS-LOC")
    return os.path.join(kaggle if os.path.isdir(kaggle) else args.data, split)


def training_classes(args, index):
    """The sorted names of the class folders in --data's train/, else from the index: they number both splits."""
    folder = split_folder(args, "train")
    known = index.get("classes")
    if os.path.isdir(folder) or not known:
        classes = class_folders(args, "train")
        if known and known != classes:
            fail(f"--shards {args.shards}: its shards and {folder} have different classes; use another --shards")
        return classes
    return known


def class_folders(args, split):
    folder = split_folder(args, split)
    archive = os.path.join(args.data, f"ILSVRC2012_img_{split}.tar")
    if os.path.exists(archive) and not os.path.exists(folder):
        code = f"from torchvision.datasets import ImageNet; ImageNet({args.data!r}, '{split}')"
        command = f'python -c "{code}"' + (", and the same with 'val'" if split == "train" else "")
        fail(f"--data {args.data}: holds ImageNet's archives; unpack them with torchvision and scipy: {command}")
    try:
        names, _ = find_classes(folder)
        dangling = [entry.name for entry in list(os.scandir(folder)) if not os.path.exists(entry.path)]
        if dangling:
            raise FileNotFoundError(f"{folder}/{dangling[0]} is a link to nothing")
        return names
    except OSError as error:
        hint = "; if val/ is missing, add --splits train" if split == "val" else ""
        fail(f"--data {args.data}: {first_line(error)}; {split}/ must hold a folder of images for each class{hint}")


def find_images(args, split, classes):
    """[(path, class)] of the images of a split, in the order of torchvision's ImageFolder."""
    folder = split_folder(args, split)
    if split == "val" and os.path.isdir(folder) and any(map(is_image, os.listdir(folder))):
        return find_flat_images(args, folder, classes)
    names = class_folders(args, split)
    check_classes(folder, names, classes)
    found = []
    try:
        for name in tqdm(names, desc=f"finding {split} images", unit=" classes", delay=3, leave=False):
            label = classes.index(name)
            before = len(found)
            for root, _, files in sorted(os.walk(os.path.join(folder, name), onerror=raise_error, followlinks=True)):
                found += [(os.path.join(root, file), label) for file in sorted(files) if is_image(file)]
            if len(found) == before:
                raise FileNotFoundError(f"no images in {folder}/{name}")
    except OSError as error:
        fail(f"--data {args.data}: {first_line(error)}; {split}/ must hold a folder of images for each class")
    return found


def is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS)


def raise_error(error):
    raise error


def check_classes(folder, names, classes):
    """Report missing classes; DataError for those that train/ does not have."""
    numbered = set(classes)
    others = [name for name in names if name not in numbered]
    if others:
        number = count(len(others), "class folder")
        fail(f"{folder}: {number} that train/ does not have, e.g. {', '.join(others[:5])}")
    if len(names) < len(classes):
        print(f"{folder}: has {len(names)} of the {len(classes)} training classes", flush=True)


def find_flat_images(args, folder, classes):
    """[(path, class)] of Kaggle's val/, whose images are in one folder, with their classes in a CSV file."""
    tables = [os.path.join(parent, "LOC_val_solution.csv") for parent in (args.data, f"{folder}/../../../..")]
    table = next(filter(os.path.exists, tables), None)
    if table is None:
        fail(f"{folder}: images outside class folders; move them into a folder for each class, as in train/, "
             f"or put Kaggle's LOC_val_solution.csv into {args.data}")  # fmt: skip
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            wnids = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (AttributeError, KeyError, IndexError, ValueError, csv.Error) as error:
        fail(f"{table}: not Kaggle's table of ImageId and PredictionString ({type(error).__name__})")
    differing = sorted(wnids.keys() ^ {name for name in os.listdir(folder) if not name.startswith(".")})
    if differing:
        number = count(len(differing), "image")
        fail(f"{folder}: must hold the images that {table} lists; they differ in {number}, e.g. {differing[0]}")
    check_classes(folder, sorted(set(wnids.values())), classes)
    number = {wnid: i for i, wnid in enumerate(classes)}
    found = sorted((number[wnid], name) for name, wnid in wnids.items())
    return [(os.path.join(folder, name), label) for label, name in found]


def read_image(path, resize, quality, check):
    """(extension, bytes) of an image file; of a JPEG if it is scaled. DataError if it is not an image."""
    ending = path.rpartition(".")[2].lower().replace("jpeg", "jpg")
    try:
        data = read_file(path)
        if check:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        if resize or not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            with Image.open(io.BytesIO(data)) as image:  # reads the header only
                if resize and min(image.size) > resize:
                    return "jpg", scale(image, resize, quality)
        return ending, data
    except Exception as error:  # Pillow raises nearly any type on broken files
        what = getattr(error, "strerror", None) or first_line(error)
        if isinstance(error, UnidentifiedImageError):
            what = "not an image" if data else "empty"
        what = what.partition(" <_io.")[0]  # without the address of the bytes
        fail(f"{path}: can't be read as an image ({what}); fix it, then run this again")


def read_file(path):
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block
        raise OSError("not a regular file")
    return Path(path).read_bytes()


def scale(image, shorter_side, quality):
    """The image as a JPEG with that shorter side, without the EXIF data, profile or comment of its file.

    Bicubic: after validation's Resize(256) it is closer to the original than Lanczos if N is 256, nearly as close if it
    is 384, and a little smaller and faster. 4:4:4: closer than 4:2:0 at a higher quality that takes as many bytes.
    """
    width, height = (int(shorter_side * side / min(image.size)) for side in image.size)  # as torchvision's Resize
    # a JPEG of at least four times that size is halved while it is decoded, never below twice: faster, and as good
    halved = image.draft(None, (2 * width, 2 * height))
    box = halved[1] if halved else None
    pixels = image if image.mode == "L" else image.convert("RGB")  # as training does; gray gives the same RGB
    pixels = pixels.resize((width, height), Image.Resampling.BICUBIC, box)
    pixels.info = {}  # Pillow would write its comment
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


# ---------------------------------------------------------------------------- planning the shards


def plan_split(args, split, images, classes):
    """(the split's entry in the index, with shards not yet written; each shard's samples: [(key, path, class)])."""
    samples = [(key, *image) for key, image in zip(make_keys(args, images), images, strict=True)]
    if split == "train":
        random.Random(args.seed).shuffle(samples)
    shards = [samples[first : first + args.maxcount] for first in range(0, len(samples), args.maxcount)]
    names = [f"imagenet-{split}-{i:06d}.tar" for i in range(len(shards))]
    entry = index_entry(split, names, [len(shard) for shard in shards], [None] * len(shards))
    options = {name: getattr(args, name) for name in ("maxcount", "seed", "filekey", "resize", "quality")}
    entry["plan"] = {"images": len(images), **options, "files": hash_names(samples, classes, split_folder(args, split))}
    return entry, shards


def index_entry(split, filenames, lengths, digests):
    entry = {"name": INDEX_NAMES[split], "num_samples": sum(lengths), "filenames": filenames}
    return {**entry, "shard_lengths": lengths, "shard_sha256": digests}


def summary(entry):
    return f"{count(len(entry['filenames']), 'shard')}, {count(entry['num_samples'], 'sample')}"


def make_keys(args, images):
    """A key for each image, unique and without a dot: the key of a member ends at its first dot."""
    if not args.filekey:
        return [f"{i:07d}" for i in range(len(images))]
    keys = [os.path.splitext(os.path.basename(path))[0].replace(".", "_") for path, _ in images]
    first = {}
    for key, (path, _) in zip(keys, images, strict=True):
        if key.startswith("__"):  # webdataset skips it
            fail(f"--filekey: {path}: a key must not begin with __ or a dot; rename the file or leave --filekey out")
        if first.setdefault(key, path) != path:
            fail(f"--filekey: {first[key]} and {path} would have the same key; leave --filekey out")
    return keys


def hash_names(samples, classes, folder):
    """SHA-256 of the keys, classes and paths, in order. The files are not read: there may be millions."""
    digest = hashlib.sha256()
    for key, path, label in samples:
        name = path.removeprefix(f"{folder}/").removeprefix(f"{classes[label]}/")
        digest.update(f"{key} {label} {classes[label]}/{name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def difference(earlier, plan):
    """How an earlier run's plan differs from this run's; None if it does not."""
    for name, value in plan.items():
        other = (earlier or {}).get(name)
        if other == value:
            continue
        if name == "files":
            return "other files"
        there, here = ("off" if option is None or option is False else option for option in (other, value))
        return f"{name}: {there} then, {here} now"
    return None


# ---------------------------------------------------------------------------- writing


def write(args, pool):
    """Write the shards that are not there yet."""
    if not os.path.isdir(args.shards):
        fail(f"--shards {args.shards}: no such folder; create it first: mkdir {shlex.quote(args.shards)}")
    lock(args.shards)
    index = read_index(args.shards)
    classes = training_classes(args, index)
    if len(classes) > NUM_CLASSES:
        print(f"{len(classes)} classes, but main-wds.py's models have {NUM_CLASSES} outputs", flush=True)
    if index["splits"] and index.get("classes") != classes:
        fail(f"--shards {args.shards}: its index lists no classes; use another --shards")
    index["classes"] = classes
    plans = {split: plan_split(args, split, find_images(args, split, classes), classes) for split in args.splits}
    for split, (entry, _) in plans.items():
        digests = known_digests(args, index, split, entry["plan"])
        entry["shard_sha256"] = [digests.get(name) for name in entry["filenames"]]
    try:
        for split, (entry, shards) in plans.items():
            outcome = write_split(args, pool, index, split, entry, shards)
            print(f"{split}: {summary(entry)} {outcome}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # so that no worker still writes
        remove_leftovers(args.shards)


def remove_leftovers(folder):
    """Remove partial files, and the plan of a split without shards."""
    for name in os.listdir(folder):
        if re.fullmatch(r"(imagenet-\w+-\d+\.tar|(_info|\.\w+)\.json)\.tmp", name):
            os.unlink(os.path.join(folder, name))
    for split in INDEX_NAMES:
        if not list_shards(folder, split):
            remove_plan(folder, split)


def remove_plan(folder, split):
    for name in (plan_name(split), digests_name(split)):
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))


def list_shards(folder, split):
    return sorted(glob.glob(f"imagenet-{split}-[0-9]*.tar", root_dir=folder))


@functools.cache
def lock(folder):
    """DataError if another run is writing to the folder. The lock is released when this process ends."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another run is writing to it; wait until it has ended")
    except OSError:
        pass  # a file system without locks


def known_digests(args, index, split, plan):
    """{shard: SHA-256} of those that an earlier run wrote; DataError if its plan differs."""
    name = INDEX
    earlier = index["splits"].get(INDEX_NAMES[split])
    stray = list_shards(args.shards, split)
    if stray and not earlier:
        name = plan_name(split)
        earlier = read_index(args.shards, name)["splits"].get(INDEX_NAMES[split])
        if not earlier:
            fail(f"--shards {args.shards}: {stray[0]} exists without an index; delete it or use another --shards")
    if not earlier:
        return {}
    differing = difference(earlier.get("plan", {}), plan)
    if differing:
        what = f"its {split} shards were written with other options or images ({differing})"
        fail(f"--shards {args.shards}: {what}; use another --shards")
    if name == INDEX:
        return dict(zip(earlier["filenames"], earlier["shard_sha256"], strict=True))
    return read_digests(os.path.join(args.shards, digests_name(split)))


# What is known of an unfinished split: its plan, as an index without digests, and the digests of the shards so far.


def plan_name(split):
    return f".{split}.json"


def digests_name(split):
    return f".{split}.sha256"


def read_digests(path):
    """{shard: SHA-256}, from lines as sha256sum writes them. A shard whose line is missing is written again."""
    if not os.path.exists(path):
        return {}
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", Path(path).read_text(), re.M)}


def write_split(args, pool, index, split, entry, shards):
    """Write the missing shards of a split, then list them all in the index. Returns the outcome in words."""
    if entry["name"] not in index["splits"]:
        write_json(os.path.join(args.shards, plan_name(split)), {"splits": {entry["name"]: entry}})
    paths = [os.path.join(args.shards, name) for name in entry["filenames"]]
    digests_path = os.path.join(args.shards, digests_name(split))
    task = functools.partial(write_shard, plan=entry["plan"], check=args.check, digests_path=digests_path)
    jobs = zip(paths, entry["shard_sha256"], shards, strict=True)
    results = list(in_parallel(pool, task, jobs, split, entry["num_samples"]))
    problems = [message for *_, messages in results for message in messages]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        fail(f"--check: {count(len(problems), f'bad {split} image')}, listed above; fix them, then run this again")
    written = sum(is_new for _, _, is_new, _ in results)
    if written or entry["name"] not in index["splits"]:
        entry["shard_sha256"] = [sha256 for _, sha256, _, _ in results]
        index["splits"][entry["name"]] = entry
        write_json(os.path.join(args.shards, INDEX), index)
    remove_plan(args.shards, split)
    kept = len(paths) - written
    outcome = f"written, {kept} of the shards by an earlier run" if kept else "written"
    if not written:
        outcome = "already there"
    return f"{outcome}; these were not checked: use --verify --check" if args.check and kept else outcome


def write_shard(path, known, samples, plan, check, digests_path):
    """In a worker: (samples, SHA-256, whether it was written now, messages on bad images) of a shard.

    An existing shard is kept if its SHA-256 is the known one.
    """
    if known and os.path.exists(path) and hash_file(path) == known:
        return len(samples), known, False, []
    problems = []
    try:
        with open(f"{path}.tmp", "wb") as file:
            with wds.TarWriter(file, user="", group="", encoder=False, mtime=0) as tar:  # the same bytes each time
                for key, image, label in samples:
                    try:
                        ending, data = read_image(image, plan["resize"], plan["quality"], check)
                        tar.write({"__key__": key, "cls": b"%d" % label, ending: data})
                    except DataError as error:
                        if not check:
                            raise
                        problems.append(str(error))
            file.flush()
            os.fsync(file.fileno())
        if problems:
            return len(samples), None, False, problems
        sha256 = hash_file(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        with open(digests_path, "a") as file:
            file.write(f"{sha256}  {os.path.basename(path)}\n")
    except OSError as error:
        fail(f"{path}: can't be written ({error.strerror}); run this again to resume")
    return len(samples), sha256, True, []


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, value):
    """Write the file completely or not at all, and only after earlier renames are on disk."""
    try:
        with open(f"{path}.tmp", "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        with contextlib.suppress(OSError):  # not supported by some file systems
            os.fsync(folder)
        os.close(folder)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        if os.path.exists(f"{path}.tmp"):
            os.unlink(f"{path}.tmp")
        fail(f"{path}: can't be written ({error.strerror})")


# ---------------------------------------------------------------------------- verifying


def verify(args, pool):
    """Compare the shards with their index, and with the images if they are there. Returns the exit status."""
    index = read_index(args.shards)
    damaged = []
    differing = []
    for split in args.splits:
        if INDEX_NAMES[split] in index["splits"]:
            verify_split(args, pool, index, split, damaged, differing)
        elif os.path.exists(os.path.join(args.shards, plan_name(split))):
            fail(f"--shards {args.shards}: its {split} shards are incomplete; run makeshards.py again")
        else:
            fail(f"--shards {args.shards}: no {INDEX} there that lists {split} shards; write them, or use --splits")
    for message in damaged + differing:
        print(message)
    written_here = any("plan" in entry for entry in index["splits"].values())
    if damaged:
        way_out = ": rerun the command that wrote them to replace them" if written_here else ""
        print(f"{count(len(damaged), 'problem')} with the shards{way_out}")
    if differing:
        print(f"{count(len(differing), 'problem')} with the images: fix them, then write them to another --shards")
    if not damaged and not differing:
        print("no problems found")
    return 1 if damaged or differing else 0


def verify_split(args, pool, index, split, damaged, differing):
    """Add messages to both lists: what is wrong with the split's shards, and with the images in --data or in them."""
    entry = index["splits"][INDEX_NAMES[split]]
    paths = [os.path.join(args.shards, name) for name in entry["filenames"]]
    planned = [()] * len(paths)
    compared = "the index"
    if "plan" in entry and os.path.isdir(split_folder(args, split)):
        try:
            planned = plan_again(args, split, index)
            compared = f"the index and {args.data}"
        except DataError as error:
            differing.append(str(error))
    num_classes = len(index.get("classes", ())) or sys.maxsize
    same_bytes = not entry.get("plan", {}).get("resize")
    task = functools.partial(check_shard, num_classes=num_classes, same_bytes=same_bytes, decode=args.check)
    jobs = zip(paths, entry["shard_lengths"], planned, strict=True)
    results = in_parallel(pool, task, jobs, split, entry["num_samples"])
    first = {}
    for path, known, (_, sha256, keys, bad, images) in zip(paths, entry["shard_sha256"], results, strict=True):
        for key in keys:
            if key in first:
                bad.append(f"{path}: sample {key} is also in {first[key]}")
            first[key] = path
        if known not in (None, sha256):  # then the shard is damaged
            bad += images
            images = []
            if not bad:
                bad.append(f"{path}: changed since it was written (SHA-256 differs)")
        damaged += bad
        differing += images
    decoded = "" if args.check else "; images not decoded (see --check)"
    number = f"{count(len(paths), 'shard')}, {count(len(first), 'sample')}"
    print(f"{split}: {number}, compared with {compared}{decoded}", flush=True)


def plan_again(args, split, index):
    """The samples of each shard, planned again from --data; DataError if its images are not the shards'."""
    entry = index["splits"][INDEX_NAMES[split]]
    folder = split_folder(args, split)
    classes = class_folders(args, "train") if os.path.isdir(split_folder(args, "train")) else index.get("classes")
    if classes != index.get("classes"):
        fail(f"{folder}: its images are not those of the shards (classes)")
    options_then = argparse.Namespace(**{**vars(args), **entry["plan"]})
    plan, shards = plan_split(options_then, split, find_images(args, split, classes), classes)
    what = difference(entry["plan"], plan["plan"])
    if what or entry["shard_lengths"] != plan["shard_lengths"]:
        fail(f"{folder}: its images are not those of the shards ({what or 'shard_lengths'})")
    return shards


def check_shard(url, length=None, planned=(), num_classes=sys.maxsize, same_bytes=False, decode=False):
    """In a worker: (samples, SHA-256, keys, messages on the shard, messages on its images) of a shard.

    It is read into memory, about 115 MB for ImageNet. Its samples must be those of `planned`, if there are any.
    """
    keys = []
    problems = []
    images = []
    data = b""
    files = {key: file for key, *file in planned}
    try:
        with open_shard(url) as stream:
            set_options(stream, ignore_errors=True)  # a command's status; an incomplete shard is found below
            data = stream.read()
        for sample in tar_samples(data):
            keys.append(sample["__key__"])
            name = f"{url}: sample {keys[-1]}"
            label = int(sample["cls"]) if (sample.get("cls") or b"").strip().isdigit() else num_classes
            if sample.get("image") is None or label >= num_classes:
                problems.append(f"{name} does not hold one image and one valid class")
                continue
            path, wanted = files.get(keys[-1], (None, None if planned else label))
            what = compare(sample["image"], path if same_bytes else None, decode)
            if label != wanted:
                what = f"of class {label} matches no image in --data"
            if what:
                images.append(f"{name} {what}")
        if length not in (None, len(keys)):
            problems.append(f"{url}: {count(len(keys), 'sample')}, but {length} in the index")
    except FileNotFoundError:
        problems.append(f"{url}: no such shard")
    except Exception as error:  # a damaged tar may raise nearly anything
        problems.append(f"{url}: broken after {count(len(keys), 'sample')} ({first_line(error)})")
    return len(keys), hashlib.sha256(data).hexdigest(), keys, problems, images


def compare(image, path, decode):
    """What is wrong with an image, or how it differs from its file, if there is a path; or None."""
    if decode:
        try:
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
        except Exception as error:
            return f"can't be decoded ({first_line(error).partition(' <_io.')[0]})"
    try:
        if path and image != read_file(path):
            return f"differs from {path}"
    except OSError as error:
        return f"can't be compared: {path}: {error.strerror or error}"
    return None


def tar_samples(data):
    """Each sample of a tar, given its bytes, as {"__key__", "image": bytes, "cls": bytes}.

    A sample is the consecutive members whose names are the same up to the first dot. An image or class that occurs
    twice is None. Stricter than webdataset's reader, which stops silently at damage and skips links.
    """
    sample = {}
    with open_tar(data) as tar:
        for member in tar:
            if member.size < 0:  # tarfile would loop forever
                raise ValueError(f"{member.name} has a negative size")
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            what = "image" if ending.lower() in IMAGES else ending.lower()
            if not stem or stem.startswith("__") or what not in ("image", "cls"):
                continue  # hidden, webdataset's own, or other data
            if not member.isreg() or member.issparse():
                raise ValueError(f"{member.name} is a link or another special file, which readers skip")
            key = folder + slash + stem
            if key != sample.get("__key__"):
                if sample:
                    yield sample
                sample = {"__key__": key}
            sample[what] = None if what in sample else tar.extractfile(member).read()
        tar.fileobj.seek(tar.offset)  # where no further header was found
        rest = tar.fileobj.read()
        if len(rest) < 2 * tarfile.BLOCKSIZE:
            raise ValueError("truncated")
        if rest.strip(b"\0"):
            raise ValueError("damaged, or several tars in one file")
        if sample:
            yield sample


def open_tar(data):
    try:
        return tarfile.open(fileobj=io.BytesIO(data), mode="r:*")  # compressed ones too
    except tarfile.ReadError:
        raise ValueError("not a tar file" if data else "empty") from None


def open_shard(url):
    if is_local(url):
        return open(url, "rb")
    if url.startswith(("http://", "https://")):  # webdataset's curl would not say what is wrong
        return urllib.request.urlopen(url, timeout=60)
    return wds.gopen(url)


# ---------------------------------------------------------------------------- the index


def read_index(folder, name=INDEX):
    """The index in a folder, validated; one without splits if there is none."""
    path = os.path.join(folder, name)
    try:
        with open(path) as file:
            index = json.load(file)
        for entry in index["splits"].values():
            names = entry["filenames"]
            lengths = entry["shard_lengths"]
            entry["shard_sha256"] = entry.get("shard_sha256") or [None] * len(names)
            for name, length, _ in zip(names, lengths, entry["shard_sha256"], strict=True):
                if name.startswith("/") or ":" in name or ".." in name.split("/"):  # it could run a command
                    raise ValueError(f"{name} is not in its folder")
                if not isinstance(length, int) or length < 0:
                    raise ValueError(f"{name} has {length} samples")
            if sum(lengths) != entry["num_samples"] or len(set(names)) < len(names):
                raise ValueError("filenames, shard_lengths and num_samples do not agree")
            if not isinstance(entry.get("plan", {}), dict) or not isinstance(index.get("classes", []), list):
                raise ValueError("plan or classes")
        return index
    except FileNotFoundError:
        return {"splits": {}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        fail(f"{path}: not an index of shards ({what}); delete it, then write it again")


def write_index(args, pool):
    """Count the samples of shards and list them in an index: beside the shards if they are local, else in --shards."""
    urls = expand(args.index)
    if len(set(urls)) < len(urls):
        fail(f"--index {args.index}: lists a shard twice")
    for url in urls:
        if re.search(r"[:|;?<>'\"]", os.path.basename(url)):
            fail(f"--index {url}: must end in the shard's file name")
    folder, *others = sorted({os.path.dirname(url) or "." for url in urls})
    if others:
        fail(f"--index {args.index}: in {folder} and {others[0]}; an index covers one folder")
    folder = folder if is_local(urls[0]) else args.shards
    if not os.path.isdir(folder):
        fail(f"--index {args.index}: no folder {folder} for the index; create it: mkdir {shlex.quote(folder)}")
    lock(folder)
    path = os.path.join(folder, INDEX)
    index = read_index(folder)
    alone = len(args.splits) == 1
    by_split = {split: [url for url in urls if alone or split in os.path.basename(url)] for split in args.splits}
    if sorted(url for chosen in by_split.values() for url in chosen) != sorted(urls):
        fail(f"--index {args.index}: can't tell training from validation shards; add --splits train or --splits val")
    for split, chosen in by_split.items():
        if not chosen:
            continue
        if INDEX_NAMES[split] in index["splits"]:
            fail(f"{path}: already lists {split} shards; delete this file first")
        lengths = []
        digests = []
        results = in_parallel(pool, check_shard, zip(chosen), split)
        for url, (length, sha256, keys, bad, _) in zip(chosen, results, strict=True):
            if bad or len(set(keys)) < len(keys) or not keys:
                fail(bad[0] if bad else f"{url}: no samples, or two with the same key")
            lengths.append(length)
            digests.append(sha256)
        entry = index_entry(split, list(map(os.path.basename, chosen)), lengths, digests)
        index["splits"][entry["name"]] = entry
        print(f"{split}: {summary(entry)}", flush=True)
    write_json(path, index)
    print(f"written to {path}")


def expand(pattern):
    """The paths, URLs and commands of a pattern: braces are expanded and, in paths, globs."""
    try:
        urls = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces, unknown variables
        fail(f"{pattern}: {first_line(error)}")
    found = []
    for url in urls:
        if is_local(url):
            found += sorted(glob.glob(url)) or fail(f"{url}: no shard matches")
        else:
            found.append(url)
    return found


def is_local(url):
    return not ("://" in url or url.startswith("pipe:"))


if __name__ == "__main__":
    main()
