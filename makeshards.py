#!/usr/bin/env python3
"""Write ImageNet's folders of images as WebDataset shards: tar files of 1000 samples each, and their index.

    ln -s /data/imagenet ./data       where your ImageNet is: torchvision's train/ and val/, or Kaggle's ILSVRC/
    mkdir ./shards                    about as large as ImageNet's files: 155 GB
    python makeshards.py              1282 training and 50 validation shards; after a stop the same command goes on
    python makeshards.py --verify     read them back, and compare them with the index and with the folders
    python makeshards.py --data ./pets --shards ./pet-shards --maxcount 500      any folder of images per class
    python makeshards.py --resize 384         smaller shards: larger images are scaled to a shorter side of 384 pixels
    python makeshards.py --index './theirs/train-{000..146}.tar'       of shards that others wrote: ./theirs/_info.json

A sample is two files of the tar: KEY.jpg, the image file's own bytes, and KEY.cls, its class as a decimal number. The
class is torchvision's: the place of the image's folder among the sorted class folders. KEY is the place of the image
in torchvision.datasets.ImageFolder. Training samples are written in random order, drawn from --seed over the whole
split, so that a shard is itself a random sample. The same folders and options give the same bytes, with any number of
workers; with --resize, the same version of Pillow too.

A shard gets its name when it is whole, and the index is written last; until then .train.json tells what is there.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import http.client
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder, imagenet
from tqdm import tqdm
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

INDEX = "_info.json"  # its name and shape are those that timm reads and the hub's ImageNet shards have
INDEX_NAMES = {"train": "train", "val": "validation"}  # of the splits
OPTIONS = ("maxcount", "seed", "filekey", "resize", "quality")  # what decides on the bytes, besides the images
MOST = {"maxcount": 10**9, "workers": 4096, "resize": 65535, "quality": 100}  # of the options that are numbers
IMAGES = ("jpg", "jpeg", "png", "webp")  # endings of the image in a sample; its class ends in cls
QUALITY = 90  # of scaled images: at 4:4:4 it is smaller than 95 at 4:2:0, and as near to the original
HTTP = ("http://", "https://")  # what urllib reads; webdataset's commands read other URLs
PAUSES = (1, 2, 4, 8, 16)  # seconds before a remote file is read once more
PATIENCE = 60  # seconds for which a server may be silent
EVERY = 60  # seconds between two lines about the progress, where the output is no terminal


def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTION ...]",
        description="Write ImageNet's folders of images as WebDataset shards. Defaults stand in brackets.",
    )
    parser.error = fail
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument_group("what to read and to write").add_argument
    add("--data", default="./data", metavar="DIR", help="folder that holds train/ and val/ (%(default)s)")
    add("--shards", default="./shards", metavar="DIR", help="folder of the shards, which must exist (%(default)s)")
    add("--splits", default="train,val", metavar="LIST", help="splits, divided by commas (%(default)s)")
    add("--check", action="store_true", help="first decode each image, and list all bad ones (off)")
    add("--workers", type=int, default=cores, metavar="N", help="processes (as many as cores: %(default)s)")
    add = parser.add_argument_group("what the shards are like").add_argument
    add("--maxcount", type=int, default=1000, metavar="N", help="samples a shard (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the training samples' order (%(default)s)")
    add("--filekey", action="store_true", help="key: the file's name without its ending (its number)")
    add("--resize", type=int, metavar="N", help="scale larger images to a shorter side of N (off)")
    add("--quality", type=int, metavar="Q", help=f"of the scaled images' JPEG, 1 to 100 ({QUALITY})")
    group = parser.add_argument_group("instead of writing shards")
    add = group.add_mutually_exclusive_group().add_argument
    add("--verify", action="store_true", help="read them; exit with 1 if something is wrong (off)")
    add("--index", metavar="URLS", help="write the index of these: pattern, glob or URL (none)")
    args = parser.parse_args()
    args.splits = args.splits.split(",")
    if not set(args.splits) <= INDEX_NAMES.keys():
        fail(f"--splits {','.join(args.splits)}: a comma-separated list of train and val")
    if args.quality is not None and args.resize is None:
        fail(f"--quality {args.quality}: only images that --resize scales are encoded; give --resize too")
    for name, most in MOST.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            fail(f"--{name} {value}: it must be from 1 to {most}")
    args.quality = args.quality or (args.resize and QUALITY)
    return args


class DataError(Exception):
    """Input that can't be used; the message names it and the way out. main() prints it, whatever process it is from."""


def fail(message):
    raise DataError(message)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def count(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------- main


def main():
    status = 2
    try:
        args = parse_args()
        pool = ProcessPoolExecutor(args.workers, initializer=begin_worker)
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the workers know what to do at Ctrl-C
            list(pool.map(abs, range(args.workers)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            task = write_index if args.index else verify if args.verify else write
            sys.exit(task(args, pool))
        finally:
            pool.shutdown(cancel_futures=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # now for Ctrl-C that came as they started
    except DataError as error:
        message = error
    except OSError as error:
        message = f"--shards {args.shards}: {error}; the same command goes on where it was"
    except BrokenProcessPool:
        message = "a worker was killed, perhaps for want of memory; the same command goes on where it was"
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on where it was", 130
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(status)


def begin_worker():
    """Let a worker end when the main process does, even if that is killed, and without a word at Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_parallel(pool, function, jobs, what, total=None):
    """What function(*job) returns, (images, bytes, ...), for each job in turn; with a bar, or a line a minute."""
    tqdm.monitor_interval = 0  # no thread, for workers may be forked
    images, size, start = 0, 0, time.monotonic()
    told = start
    with tqdm(total=total, desc=what, unit=" images", disable=not sys.stderr.isatty()) as bar:
        for result in pool.map(function, *zip(*jobs, strict=True)):
            images, size, now = images + result[0], size + result[1], time.monotonic()
            speed = f"{size / 1e6 / max(now - start, 1e-3):.0f} MB/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(result[0])
            if bar.disable and now - told >= EVERY:
                print(f"{what}: {images} of {total or '?'} images, {speed}", file=sys.stderr, flush=True)
                told = now
            yield result


# ---------------------------------------------------------------------------- reading the folders


def split_folder(args, split):
    kaggle = os.path.join(args.data, "ILSVRC", "Data", "CLS-LOC")
    return os.path.join(kaggle if os.path.isdir(kaggle) else args.data, split)


def find_images(args, split):
    """([(path, class)], names of the class folders) of a split, as torchvision's ImageFolder has them."""
    folder = split_folder(args, split)
    try:
        if split == "val" and not any(os.path.isdir(os.path.join(folder, name)) for name in os.listdir(folder)):
            return find_flat_images(args, folder)
        found = ImageFolder(folder)
        return found.imgs, found.classes
    except OSError as error:
        fail(f"--data {args.data}: {str(error).rstrip('. ')}; {split}/ must hold a folder of images for each class")


def unpack(args):
    """Unpack torchvision's own archives of splits that have no folder yet. torchvision checks their MD5 sums."""
    for split in args.splits:
        archive, folder = os.path.join(args.data, f"ILSVRC2012_img_{split}.tar"), os.path.join(args.data, split)
        if os.path.exists(folder) or not os.path.exists(archive):
            continue
        lock(args.data)
        print(f"unpacking {archive} to {folder}, which takes as much disk again", flush=True)
        try:
            shutil.rmtree(f"{folder}.unpacking", ignore_errors=True)  # what a run that was killed has left
            if split == "val" and not os.path.exists(os.path.join(args.data, imagenet.META_FILE)):
                imagenet.parse_devkit_archive(args.data)  # for the classes; needs scipy
            getattr(imagenet, f"parse_{split}_archive")(args.data, folder=f"{split}.unpacking")
            os.rename(f"{folder}.unpacking", folder)
        except (OSError, RuntimeError, ImportError) as error:
            way_out = "; pip install it" if isinstance(error, ImportError) else ""
            fail(f"{archive}: torchvision can't unpack it: {str(error).rstrip('. ')}{way_out}")


@functools.cache
def lock(folder):
    """Hold the folder until this run ends, however it ends; refuse if another run holds it."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another run is writing to it; wait until it has ended")
    except OSError:
        pass  # a file system without locks


def find_flat_images(args, folder):
    """The same for Kaggle's val/, whose images lie side by side, with their classes in a table."""
    tables = [os.path.join(parent, "LOC_val_solution.csv") for parent in (args.data, f"{folder}/../../../..")]
    table = next(filter(os.path.exists, tables), None)
    if table is None:
        fail(f"{folder}: no class folders; move its images into a folder for each class, as train/ has them, or put "
             f"Kaggle's LOC_val_solution.csv into {args.data}")  # fmt: skip
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            wnids = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (AttributeError, KeyError, IndexError, ValueError, csv.Error) as error:
        fail(f"{table}: not Kaggle's table of ImageId and PredictionString ({error!r})")
    if odd := sorted(wnids.keys() ^ {name for name in os.listdir(folder) if not name.startswith(".")}):
        fail(f"{folder}: it and {table} must name the same images; they differ in {len(odd)}, as {odd[0]}")
    number = {wnid: i for i, wnid in enumerate(sorted(set(wnids.values())))}
    found = sorted((number[wnid], name) for name, wnid in wnids.items())
    return [(os.path.join(folder, name), label) for label, name in found], list(number)


def one_list_of_classes(args, found):
    differing = []
    for one, other in itertools.permutations(found, 2):
        if only := sorted(set(found[one][1]).difference(found[other][1])):
            differing.append(f"{one}/ alone has {count(len(only), 'class folder')}, as {', '.join(only[:5])}")
    if differing:
        fail(f"--data {args.data}: train/ and val/ differ: {'; '.join(differing)}")
    return next(iter(found.values()))[1]


def read_image(path, plan, check):
    """The file's own bytes, when they begin as an image does; if that is to be scaled, a JPEG's."""
    try:
        data = Path(path).read_bytes()
        if check:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        if plan["resize"] or not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            with Image.open(io.BytesIO(data)) as image:  # reads the header alone, size and all
                if plan["resize"] and min(image.size) > plan["resize"]:
                    return scale(image, plan["resize"], plan["quality"])
        return data
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text shows the bytes' address in memory
            what = "Pillow finds no image in it" if data else "it is empty"
        fail(f"{path}: not a readable image ({what}); fix it, and run this again")


def scale(image, shorter_side, quality):
    """The image as a JPEG with that shorter side, without the EXIF data, profile or comment of its file.

    Bicubic: after validation's Resize(256) nearer to the original than Lanczos where N is 256, nearly as near where it
    is 384, a little smaller and faster. 4:4:4: nearer than 4:2:0 of a higher quality that takes as many bytes.
    """
    width, height = (int(shorter_side * side / min(image.size)) for side in image.size)  # as torchvision's Resize
    # a JPEG of four times that size or more is halved as it is decoded, never below twice: faster, and as good
    halved = image.draft(None, (2 * width, 2 * height))
    box = halved[1] if halved else None
    pixels = image if image.mode == "L" else image.convert("RGB")  # as training does; grey gives the same RGB
    pixels = pixels.resize((width, height), Image.Resampling.BICUBIC, box)
    pixels.info = {}  # Pillow would write its comment
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


# ---------------------------------------------------------------------------- planning the shards


def plan_split(args, split, images, classes):
    """(the split's entry in the index, of shards not yet written, and the samples of each: [(key, path, class)])."""
    samples = [(key, *image) for key, image in zip(make_keys(args, images), images, strict=True)]
    if split == "train":
        random.Random(args.seed).shuffle(samples)
    shards = [samples[first : first + args.maxcount] for first in range(0, len(samples), args.maxcount)]
    names = [f"imagenet-{split}-{i:06d}.tar" for i in range(len(shards))]
    entry = index_entry(split, names, [len(shard) for shard in shards], [None] * len(shards))
    entry["shard_files"] = [hash_names(shard, classes) for shard in shards]
    entry["plan"] = {"images": len(images), **{name: getattr(args, name) for name in OPTIONS}}
    return entry, shards


def index_entry(split, filenames, lengths, digests):
    entry = {"name": INDEX_NAMES[split], "num_samples": sum(lengths), "filenames": filenames}
    return {**entry, "shard_lengths": lengths, "shard_sha256": digests}


def counts(entry):
    return f"{count(len(entry['filenames']), 'shard')}, {count(entry['num_samples'], 'sample')}"


def make_keys(args, images):
    """A key for each image, unique and without a dot, for at a dot WebDataset begins the member's ending."""
    if not args.filekey:
        return [f"{i:07d}" for i in range(len(images))]
    keys = [os.path.splitext(os.path.basename(path))[0].replace(".", "_") for path, _ in images]
    first = {}
    for key, (path, _) in zip(keys, images, strict=True):
        if key.startswith("__") or not key.isascii() or len(key) > 90:  # readers skip it, or the tar needs more headers
            fail(f"--filekey: {path}: a key must be ASCII, at most 90 characters and without __ before it; "
                 "leave --filekey out")  # fmt: skip
        if first.setdefault(key, path) != path:
            fail(f"--filekey: {first[key]} and {path} would have the same key; leave --filekey out")
    return keys


def hash_names(samples, classes):
    """By which a later run knows a shard's images: keys, classes, file names and sizes, not what is in the files."""
    digest = hashlib.sha256()
    for key, path, label in samples:
        size = os.path.getsize(path) if os.path.exists(path) else "gone"  # which read_image() will tell
        line = f"{key} {label} {classes[label]}/{os.path.basename(path)} {size}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def difference(earlier, entry):
    """In what the shards that an earlier run wrote differ from those that are planned; None if in nothing."""
    for name, value in entry["plan"].items():
        if (other := earlier.get("plan", {}).get(name)) != value:
            there, here = ("off" if x is None or x is False else x for x in (other, value))
            return f"{name}: {there} there, {here} here"
    if earlier["shard_lengths"] != entry["shard_lengths"]:
        return "shard_lengths"
    files = zip(earlier["shard_sha256"], earlier["shard_files"], entry["shard_files"], strict=True)
    return "other files" if any(written and theirs != ours for written, theirs, ours in files) else None


# ---------------------------------------------------------------------------- writing


def write(args, pool):
    """Write the shards that are not there yet."""
    if not os.path.isdir(args.shards):
        fail(f"--shards {args.shards}: no such folder; make it first: mkdir {args.shards}")
    lock(args.shards)
    unpack(args)
    found = {split: find_images(args, split) for split in args.splits}
    classes = one_list_of_classes(args, found)
    index = read_index(os.path.join(args.shards, INDEX))
    if index["splits"] and index.get("classes") != classes:
        fail(f"--shards {args.shards}: its shards are of other classes than --data {args.data}; give another "
             "--shards, or --data")  # fmt: skip
    index["classes"] = classes
    plans = {split: plan_split(args, split, *found[split]) for split in args.splits}
    for split, (entry, _) in plans.items():
        entry["shard_sha256"] = known_digests(args, index, split, entry)
    try:
        for split, (entry, shards) in plans.items():
            state = write_split(args, pool, index, split, entry, shards)
            print(f"{split}: {counts(entry)} {state}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # so that no worker writes any more
        for name in os.listdir(args.shards):
            if re.fullmatch(r"(imagenet-\w+-\d+\.tar|(_info|\.train|\.val)\.json)\.tmp", name):
                os.unlink(os.path.join(args.shards, name))


def known_digests(args, index, split, entry):
    """The SHA-256 of shards that an earlier run wrote, None for others; refuses those of another plan."""
    name = INDEX if INDEX_NAMES[split] in index["splits"] else f".{split}.json"
    earlier = read_index(os.path.join(args.shards, name))["splits"].get(INDEX_NAMES[split])
    if earlier is None:
        for shard in sorted(os.listdir(args.shards)):
            if re.fullmatch(rf"imagenet-{split}-\d+\.tar", shard):
                fail(f"--shards {args.shards}: {shard} is there without an index; take it away or give another folder")
        return entry["shard_sha256"]
    if what := difference(earlier, entry):
        fail(f"--shards {args.shards}: its {split} shards are of another plan ({what}); give another --shards, or take "
             f"them and {name} away")  # fmt: skip
    return earlier["shard_sha256"]


def write_split(args, pool, index, split, entry, shards):
    """See to the split's shards, and then name them in the index. What came of it, in words."""
    journal, problems, kept = os.path.join(args.shards, f".{split}.json"), [], 0
    paths, digests = [os.path.join(args.shards, name) for name in entry["filenames"]], entry["shard_sha256"]
    task = functools.partial(write_shard, plan=entry["plan"], check=args.check)
    results = in_parallel(pool, task, zip(paths, list(digests), shards, strict=True), split, entry["num_samples"])
    for i, (_, _, sha256, bad) in enumerate(results):
        problems += bad
        if sha256:
            digests[i] = sha256
            # first, so that a later run knows of each shard that is there
            write_json(journal, {"splits": {entry["name"]: entry}})
            os.replace(f"{paths[i]}.tmp", paths[i])
        elif not bad:
            kept += 1
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        fail(f"--check: {count(len(problems), f'bad {split} image')}, listed above; fix them, and run this again")
    if kept < len(paths) or entry["name"] not in index["splits"]:
        index["splits"][entry["name"]] = entry
        write_json(os.path.join(args.shards, INDEX), index)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal)
    return "already there" if kept == len(paths) else f"written, {kept} of the shards earlier" if kept else "written"


def write_shard(path, known, samples, plan, check):
    """In a worker: (samples, bytes, sha256, messages on bad images) of a shard, written to PATH.tmp.

    The digest is None where nothing is to be renamed: the shard is there, as it was written, or has bad images.
    """
    if known and os.path.exists(path) and hashlib.sha256(Path(path).read_bytes()).hexdigest() == known:
        return len(samples), os.path.getsize(path), None, []
    sha256, problems = hashlib.sha256(), []
    with open(f"{path}.tmp", "wb") as file:
        for key, image, label in samples:
            try:
                data = member(f"{key}.cls", b"%d" % label) + member(f"{key}.jpg", read_image(image, plan, check))
                sha256.update(data)
                file.write(data)
            except DataError as error:
                if not check:
                    raise
                problems.append(str(error))
        end = bytes(1024 + -(file.tell() + 1024) % tarfile.RECORDSIZE)
        sha256.update(end)
        file.write(end)
        file.flush()
        os.fsync(file.fileno())
    return len(samples), os.path.getsize(file.name), None if problems else sha256.hexdigest(), problems


def member(name, data):
    """A file of a tar: header, content, padding. The bytes are those of webdataset's TarWriter, in less time."""
    header = tarfile.TarInfo(name)  # owner and mtime are 0: the same bytes each time
    header.size, header.mode = len(data), 0o444
    return b"".join((header.tobuf(), data, bytes(-len(data) % tarfile.BLOCKSIZE)))


def write_json(path, value):
    """Write the file as a whole or not at all, and not before what was renamed earlier is on disk."""
    with open(f"{path}.tmp", "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems can't
        os.fsync(folder)
    os.close(folder)
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------- checking and indexing shards


def verify(args, pool):
    """Compare the shards with their index, and with the folders where they are there. The exit status."""
    index, problems = read_index(os.path.join(args.shards, INDEX)), []
    for split in args.splits:
        if INDEX_NAMES[split] in index["splits"]:
            problems += verify_split(args, pool, index, split)
        elif os.path.exists(os.path.join(args.shards, f".{split}.json")):
            fail(f"--shards {args.shards}: its {split} shards are unfinished; run makeshards.py again")
        else:
            fail(f"--shards {args.shards}: no {INDEX} there that names {split} shards; write them, or give --splits")
    number = len(problems)
    last = f"{count(number, 'thing')} {'is' if number == 1 else 'are'} wrong" if problems else "nothing is wrong"
    if problems and any("plan" in entry for entry in index["splits"].values()):
        last += "; the command that wrote the shards writes damaged ones anew"
    print(*problems, last, sep="\n")
    return 1 if problems else 0


def verify_split(args, pool, index, split):
    """Messages on what is wrong with the split's shards, each read by a worker."""
    entry, problems, compared, first = index["splits"][INDEX_NAMES[split]], [], "the index", {}
    paths = [os.path.join(args.shards, name) for name in entry["filenames"]]
    digests, planned = entry.get("shard_sha256") or [None] * len(paths), [()] * len(paths)
    try:
        if "plan" in entry and os.path.isdir(split_folder(args, split)):
            planned, compared = plan_again(args, split, index), f"the index and {args.data}"
    except DataError as error:
        problems.append(str(error))
    num_classes, same_bytes = len(index.get("classes", ())) or sys.maxsize, not entry.get("plan", {}).get("resize")
    task = functools.partial(check_shard, num_classes=num_classes, same_bytes=same_bytes)
    jobs = zip(paths, entry["shard_lengths"], planned, strict=True)
    results = in_parallel(pool, task, jobs, split, entry["num_samples"])
    for path, known, (_, _, sha256, keys, bad) in zip(paths, digests, results, strict=True):
        for key in keys:
            if key in first:
                bad.append(f"{path}: sample {key} is in {first[key]}, too")
            first[key] = path
        if not bad and known not in (None, sha256):
            bad.append(f"{path}: not the bytes that were written, by their SHA-256")
        problems += bad
    print(f"{split}: {count(len(paths), 'shard')}, {count(len(first), 'sample')}, compared with {compared}", flush=True)
    return problems


def plan_again(args, split, index):
    """The samples of each shard, as the folder has them now; DataError if they are not those of the shards."""
    entry, (images, classes) = index["splits"][INDEX_NAMES[split]], find_images(args, split)
    options_then = argparse.Namespace(**{**vars(args), **entry["plan"]})
    plan, shards = plan_split(options_then, split, images, classes)
    if what := difference(entry, plan) or ("classes" if classes != index.get("classes") else None):
        fail(f"{args.data}: its {split} images are not those of the shards ({what})")
    return shards


def write_index(args, pool):
    """Count the samples of shards, and name them in an index: beside them if they are local, else in --shards."""
    urls = expand(args.index)
    folder, *others = sorted({os.path.dirname(url) or "." for url in urls})
    if others:
        fail(f"--index {args.index}: in {folder} and {others[0]}; an index is of the shards in one folder")
    path = os.path.join(folder if os.path.isdir(folder) else args.shards, INDEX)
    if not os.path.isdir(os.path.dirname(path)):
        fail(f"--index {args.index}: no folder {args.shards} for the index; make it first: mkdir {args.shards}")
    index, alone = read_index(path), len(args.splits) == 1
    by_split = {split: [url for url in urls if alone or split in os.path.basename(url)] for split in args.splits}
    if sorted(itertools.chain(*by_split.values())) != sorted(urls):
        fail(f"--index {args.index}: of the training or the validation shards? give --splits train or --splits val")
    for split, chosen in by_split.items():
        if not chosen:
            continue
        if INDEX_NAMES[split] in index["splits"]:
            fail(f"{path}: it names {split} shards already; take it away first")
        lengths, digests = [], []
        for length, _, sha256, _, bad in in_parallel(pool, check_shard, zip(chosen), split):
            if bad:
                fail(f"--index {args.index}: {bad[0]}")
            lengths.append(length)
            digests.append(sha256)
        entry = index_entry(split, list(map(os.path.basename, chosen)), lengths, digests)
        index["splits"][entry["name"]] = entry
        print(f"{split}: {counts(entry)}", flush=True)
    write_json(path, index)
    print(f"named in {path}")


def check_shard(url, length=None, planned=(), num_classes=sys.maxsize, same_bytes=False):
    """In a worker: (samples, bytes, sha256, keys, messages on what is wrong) of a shard.

    It is read into memory as a whole, about 115 MB of ImageNet. Its samples must be those that are planned, if any are.
    """
    keys, problems, data, files = [], [], b"", {key: file for key, *file in planned}
    try:
        data = read_whole(url)
        for sample in tar_samples(io.BytesIO(data)):
            keys.append(sample["__key__"])
            if what := fault(sample, files, num_classes, same_bytes):
                problems.append(f"{url}: sample {keys[-1]} {what}")
        if length not in (None, len(keys)):
            problems.append(f"{url}: {count(len(keys), 'sample')}, but {length} by the index")
        if data[-1024:] != bytes(1024):
            raise ValueError("cut off in its end mark")
    except DataError as error:
        problems.append(str(error))
    except Exception as error:  # a broken tar may raise anything
        gone = getattr(error, "code", None) == 404 or (isinstance(error, FileNotFoundError) and error.filename == url)
        what = "no such shard" if gone else f"broken after {count(len(keys), 'sample')} ({first_line(error)})"
        problems.append(f"{url}: {what}")
    return len(keys), len(data), hashlib.sha256(data).hexdigest(), keys, problems


def read_whole(url):
    """The bytes of a shard; a remote one that breaks off is read again, after growing pauses."""
    for pause in pauses(url):
        try:
            with open_stream(url) as stream:
                return stream.read()
        except (OSError, http.client.HTTPException) as error:
            if pause is None or getattr(error, "code", None) == 404:
                raise
            retry(url, first_line(error), pause)


def fault(sample, files, num_classes, same_bytes):
    """What is wrong with a sample, None if nothing; `files` are those of the folder, {key: (path, class)}, if any."""
    image, cls = sample.get("image"), sample.get("cls") or b""
    label = int(cls) if cls.strip().isdigit() else num_classes
    path, wanted = files.get(sample["__key__"], (None, None if files else label))
    if image is None or label >= num_classes:
        return "does not hold one image and a class that there is"
    if label != wanted:
        return f"of class {label} is not one of the folder"
    if path and same_bytes and image != Path(path).read_bytes():
        return f"does not hold the bytes of {path}"
    return None


# ---------------------------------------------------------------------------- finding and reading shards


def is_local(url):
    return "://" not in url and not url.startswith(("pipe:", "file:"))


def expand(pattern):
    """The paths and URLs that a pattern names: braces are expanded, and in paths globs, too."""
    try:
        urls = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # of unbalanced braces, of unknown variables
        fail(f"{pattern}: {first_line(error)}")
    found = []
    for url in urls:
        plain = os.path.exists(url) or not (is_local(url) and glob.has_magic(url))
        found += [url] if plain else sorted(glob.glob(url)) or fail(f"{url}: no shard matches")
    return found


def read_index(path):
    """The index in a file or at a URL, once it is known to agree with itself; one of no splits if there is none.

    A name in it must be that of a file below it: it is opened, and one like pipe: would be run as a command.
    """
    try:
        index = read_json(path)
        for entry in index["splits"].values():
            names, lengths, plan = entry["filenames"], entry["shard_lengths"], entry.get("plan")
            more = [entry[key] if plan else entry.get(key, names) for key in ("shard_sha256", "shard_files")]
            for name, length, *_ in zip(names, lengths, *more, strict=True):
                outside = name.startswith("/") or ":" in name or ".." in name.split("/")
                if outside or not isinstance(length, int) or length < 0:
                    raise ValueError(f"{name!r}: {length!r}")
            totals = [entry["num_samples"], sum(lengths), plan["images"] if plan else sum(lengths)]
            if len(set(totals)) > 1:
                raise ValueError("num_samples: {}, but the sum of shard_lengths is {}, for {} images".format(*totals))
            if len(set(names)) < len(names):
                raise ValueError("a name is there twice")
        return index
    except FileNotFoundError:
        return {"splits": {}}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        fail(f"{path}: not an index of shards below it ({what}); take it away, and write another with --index")


def read_json(url):
    """What the file at the path or URL holds; FileNotFoundError if it is not there, or a command does not give it."""
    for pause in pauses(url):
        try:
            with open_stream(url) as stream:
                return json.loads(stream.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            if url.startswith(HTTP) and getattr(error, "code", None) not in (403, 404):
                retry(url, first_line(error), pause)
            elif isinstance(error, ValueError):
                raise
            elif is_local(url) and os.path.lexists(url):
                fail(f"{url}: {first_line(error)}")
            else:
                raise FileNotFoundError(url) from None


def pauses(url):
    """Seconds to wait if a try fails, for each try; None for the last one, which is a local file's only one."""
    return (None,) if is_local(url) else (*PAUSES, None)


def retry(url, what, pause):
    """Wait, and say so; where there is no pause left, DataError."""
    if pause is None:
        fail(f"{url}: {what}")
    sys.stderr.write(f"{url}: {what}; reading it again in {pause} s\n")
    time.sleep(pause)


def tar_samples(stream):
    """Each sample of a tar as {"__key__", "image": bytes, "cls": bytes}.

    A sample is the files, one after the other, that share a name up to the first dot. Where two of them are its image,
    or its class, that is None. Stricter than webdataset's reader, which takes a shard that was cut off between two
    files for a whole one.
    """
    sample = {}
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=Header) as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if checked(member).issparse() or not member.isreg():
                continue
            if not stem or not ending or stem.startswith("__"):  # hidden; and webdataset's own
                continue
            key, what = folder + slash + stem, "image" if ending.lower() in IMAGES else ending.lower()
            if key != sample.get("__key__"):
                if sample:
                    yield sample
                sample = {"__key__": key}
            if what in ("image", "cls"):
                data = tar.extractfile(member).read()
                sample[what] = data if what not in sample else None  # two are as bad as none
        if sample:
            yield sample
        while rest := tar.fileobj.read(1 << 16):  # the padding
            if rest.strip(b"\0"):
                raise ValueError("what follows its end is not empty: it is damaged, or more than one tar")


class Header(tarfile.TarInfo):
    """A file's header in a tar; one that is damaged is an error, and not an end of the tar."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # the end mark
                raise
            raise tarfile.ReadError(f"cut off or damaged: {error}") from error  # which tarfile takes for an end, too


def checked(member):
    """The member, if its size can be true. (Asked again once a PAX header may have given it another.)"""
    if not 0 <= member.size < 1 << 30:  # a lie, which tarfile would follow without end
        raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
    return member


def open_stream(url):
    """A local file, an http(s) server's, or what webdataset opens with a command: gs:, pipe: and the like.

    An http server that is silent for PATIENCE seconds raises TimeoutError.
    """
    if url.startswith(HTTP):
        return urllib.request.urlopen(url, timeout=PATIENCE)
    if is_local(url):
        return open(url, "rb")
    try:
        return gopen(url)
    except ValueError as error:  # it knows of no such URLs, or is told to refuse them
        fail(f"{url}: {first_line(error)}")


if __name__ == "__main__":
    main()
