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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder, imagenet
from tqdm import tqdm
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

INDEX = "_info.json"  # its name and shape are those that timm reads and the hub's ImageNet shards have
INDEX_NAMES = {"train": "train", "val": "validation"}  # of the splits
OPTIONS = ("maxcount", "seed", "filekey", "resize", "quality")  # what decides on the bytes, besides the images
IMAGES = ("jpg", "jpeg", "png", "webp")  # endings of the image in a sample
QUALITY = 90  # of scaled images: at 4:4:4 it is smaller than 95 at 4:2:0, and as near to the original
EVERY = 60  # seconds between two lines about the progress, where the output is no terminal


def parse_args():
    parser = argparse.ArgumentParser(description="Write ImageNet's folders of images as WebDataset shards.")
    parser.error = fail
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--data", default="./data", metavar="DIR", help="folder that holds train/ and val/ (%(default)s)")
    add("--shards", default="./shards", metavar="DIR", help="folder to write to, which must exist (%(default)s)")
    add("--splits", default="train,val", metavar="LIST", help="splits to write (%(default)s)")
    add("--maxcount", type=int, default=1000, metavar="N", help="samples a shard (%(default)s)")
    add("--filekey", action="store_true", help="the key is the file's name without its ending")
    add("--seed", type=int, default=0, metavar="N", help="of the training samples' order (%(default)s)")
    add("--workers", type=int, default=cores, metavar="N", help="processes (as many as cores: %(default)s)")
    add("--check", action="store_true", help="decode every image before it is written, and list all that are bad")
    add("--resize", type=int, metavar="N", help="scale larger images to a shorter side of N pixels (off)")
    add("--quality", type=int, metavar="Q", help=f"with --resize: of the scaled images' JPEG, 1 to 100 ({QUALITY})")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--verify", action="store_true", help="write nothing; read the shards, and exit with 1 if something is wrong")
    only("--index", metavar="URLS", help="write the index of these shards: a brace pattern, a glob or a URL")
    args = parser.parse_args()
    args.splits = args.splits.split(",")
    if not set(args.splits) <= INDEX_NAMES.keys():
        fail(f"--splits {','.join(args.splits)}: a comma-separated list of train and val")
    if args.quality is not None and args.resize is None:
        fail(f"--quality {args.quality}: only images that --resize scales are encoded; give --resize too")
    if args.resize is not None and args.quality is None:
        args.quality = QUALITY
    for name in ("maxcount", "workers", "resize", "quality"):
        value, most = getattr(args, name), 100 if name == "quality" else sys.maxsize
        if value is not None and not 1 <= value <= most:
            fail(f"--{name} {value}: it must be {'1 to 100' if most == 100 else 'at least 1'}")
    return args


class DataError(Exception):
    """Input that can't be used; the message names it and the way out. main() prints it, whatever process it is from."""


def fail(message):
    raise DataError(message)


# ---------------------------------------------------------------------------- main


def main():
    status = 2
    try:
        args = parse_args()
        pool = ProcessPoolExecutor(args.workers, initializer=begin_worker)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the workers know what to do at Ctrl-C
        try:
            list(pool.map(abs, range(args.workers)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            task = write_index if args.index else verify if args.verify else write
            sys.exit(task(args, pool))
        finally:
            pool.shutdown(cancel_futures=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except DataError as error:
        message = error
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


def in_parallel(pool, args, function, jobs, what, total=None):
    """What function(*job) returns, (images, bytes, ...), for each job as it is done; with a bar, or a line a minute."""
    tqdm.monitor_interval = 0  # no thread, for workers may be forked
    jobs, images, size, start = iter(jobs), 0, 0, time.monotonic()
    running, said = {pool.submit(function, *job) for job in itertools.islice(jobs, 2 * args.workers)}, start
    with tqdm(total=total, desc=what, unit=" images", disable=not sys.stderr.isatty()) as bar:
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, *job) for job in itertools.islice(jobs, len(done))}  # few wait at a time
            for result in [future.result() for future in done]:
                images, size, now = images + result[0], size + result[1], time.monotonic()
                speed = f"{size / 1e6 / max(now - start, 1e-3):.0f} MB/s"
                bar.set_postfix_str(speed, refresh=False)
                bar.update(result[0])
                if bar.disable and now - said >= EVERY:
                    print(f"{what}: {images} of {total or '?'} images, {speed}", file=sys.stderr, flush=True)
                    said = now
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


def unpack(data, split):
    """Unpack torchvision's own archive of the split, if that is all there is. torchvision checks its MD5 sum."""
    archive, partial = os.path.join(data, f"ILSVRC2012_img_{split}.tar"), f"{split}.unpacking"
    folder = os.path.join(data, split)
    if os.path.exists(folder) or not os.path.exists(archive):
        return
    try:
        held = lock(data)
        if not os.path.exists(folder):
            print(f"unpacking {archive} to {folder}, which takes as much disk again", flush=True)
            shutil.rmtree(os.path.join(data, partial), ignore_errors=True)
            if split == "val" and not os.path.exists(os.path.join(data, imagenet.META_FILE)):
                imagenet.parse_devkit_archive(data)  # for the classes; needs scipy
            getattr(imagenet, f"parse_{split}_archive")(data, folder=partial)
            os.rename(os.path.join(data, partial), folder)
        os.close(held)
    except (OSError, RuntimeError, ImportError) as error:
        way_out = "; pip install it" if isinstance(error, ImportError) else ""
        fail(f"{archive}: torchvision can't unpack it: {str(error).rstrip('. ')}{way_out}")


def lock(folder):
    """Wait for another run that holds the folder, and hold it until the descriptor is closed or this run ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # on a file system without locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if sys.stderr.isatty():
                print(f"waiting for another run in {folder}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def find_flat_images(args, folder):
    """The same for Kaggle's val/, whose images lie side by side, with their classes in a table."""
    tables = [os.path.join(place, "LOC_val_solution.csv") for place in (args.data, f"{folder}/../../../..")]
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
        fail(f"{folder}: it and {table} must name the same images, but {len(odd)} are in one alone, as {odd[0]}")
    number = {wnid: i for i, wnid in enumerate(sorted(set(wnids.values())))}
    found = sorted((number[wnid], name) for name, wnid in wnids.items())
    return [(os.path.join(folder, name), label) for label, name in found], list(number)


def one_list_of_classes(args, found):
    for (one, (_, ours)), (_, (_, theirs)) in itertools.permutations(found.items(), 2):
        if only := sorted(set(ours).difference(theirs)):
            few = ", ".join(only[:5])
            fail(f"--data {args.data}: train/ and val/ differ: {len(only)} class folders are in {one}/ alone, as {few}")
    return next(iter(found.values()))[1]


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def read_image(path, plan, check):
    """The file's own bytes, when they begin as an image does; if that is to be scaled, a JPEG's."""
    try:
        data = read_file(path)
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
        fail(f"{path}: not a readable image ({what}); mend it, and run this again")


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
    source = hashlib.sha256()  # by which a later run knows the same files; not by their content
    for path, label in images:
        source.update(f"{classes[label]}/{os.path.basename(path)}\n".encode("utf-8", "surrogateescape"))
    samples = [(key, *image) for key, image in zip(make_keys(args, images), images, strict=True)]
    if split == "train":
        random.Random(args.seed).shuffle(samples)
    shards = [samples[first : first + args.maxcount] for first in range(0, len(samples), args.maxcount)]
    entry = {
        "name": INDEX_NAMES[split],
        "num_samples": len(samples),
        "filenames": [f"imagenet-{split}-{i:06d}.tar" for i in range(len(shards))],
        "shard_lengths": list(map(len, shards)),
        "shard_sha256": [None] * len(shards),
        "plan": {"images": len(images), **{name: getattr(args, name) for name in OPTIONS}, "files": source.hexdigest()},
    }
    return entry, shards


def make_keys(args, images):
    """A key for each image, unique and without a dot, for at a dot WebDataset begins the member's ending."""
    if not args.filekey:
        return [f"{i:07d}" for i in range(len(images))]
    keys = [os.path.splitext(os.path.basename(path))[0].replace(".", "_") for path, _ in images]
    first = {}
    for key, (path, _) in zip(keys, images, strict=True):
        if first.setdefault(key, path) != path:
            fail(f"--filekey: {first[key]} and {path} would have the same key; leave --filekey out")
    return keys


def difference(theirs, ours):
    """In what shards that are there differ from those that are planned; None if in nothing."""
    for name, value in ours["plan"].items():
        if (other := theirs.get("plan", {}).get(name)) != value:
            there, here = ("off" if x is None or x is False else x for x in (other, value))
            return "other files" if name == "files" else f"{name}: {there} there, {here} here"
    return None


# ---------------------------------------------------------------------------- writing


def write(args, pool):
    """Write the shards that are not there yet. A second run in the folder waits for the first one."""
    if not os.path.isdir(args.shards):
        fail(f"--shards {args.shards}: no such folder; make it first: mkdir {args.shards}")
    for split in args.splits:
        unpack(args.data, split)
    found = {split: find_images(args, split) for split in args.splits}
    classes = one_list_of_classes(args, found)
    plans = {split: plan_split(args, split, *found[split]) for split in args.splits}
    try:
        lock(args.shards)
    except OSError as error:
        fail(f"--shards {args.shards}: {error.strerror or error}")
    try:
        index = read_json(os.path.join(args.shards, INDEX)) or {"splits": {}, "classes": classes}
        if index.get("classes") != classes:
            fail(f"--shards {args.shards}: its shards are of other classes; give another --shards")
        for split, (entry, _) in plans.items():
            entry["shard_sha256"] = known_digests(args, index, split, entry)
        for split, (entry, shards) in plans.items():
            state = write_split(args, pool, index, split, entry, shards)
            print(f"{split}: {len(shards)} shards, {entry['num_samples']} samples {state}", flush=True)
    except OSError as error:
        fail(f"--shards {args.shards}: {error.strerror or error}; the same command goes on where it was")
    finally:
        pool.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            for name in os.listdir(args.shards):
                if re.fullmatch(r"(imagenet-\w+-\d+\.tar|(_info|\.train|\.val)\.json)\.tmp", name):
                    os.unlink(os.path.join(args.shards, name))


def known_digests(args, index, split, entry):
    """The digests of shards that an earlier run wrote, None for others; refuses those of another plan."""
    place = INDEX if INDEX_NAMES[split] in index["splits"] else f".{split}.json"
    theirs = (read_json(os.path.join(args.shards, place)) or {"splits": {}})["splits"].get(INDEX_NAMES[split])
    there = sorted(name for name in os.listdir(args.shards) if re.fullmatch(rf"imagenet-{split}-\d+\.tar", name))
    same = theirs is None or theirs["shard_lengths"] == entry["shard_lengths"]
    if theirs and (what := difference(theirs, entry) or (None if same else "shard_lengths")):
        fail(f"--shards {args.shards}: its {split} shards are of another plan ({what}); give another --shards, or take "
             f"them and {place} away")  # fmt: skip
    if there and not theirs:
        fail(f"--shards {args.shards}: {there[0]} is there without an index; take it away or give another --shards")
    return (theirs or {}).get("shard_sha256") or entry["shard_sha256"]


def write_split(args, pool, index, split, entry, shards):
    """See to the split's shards, and then name them in the index. What came of it, in words."""
    journal, bad, there = os.path.join(args.shards, f".{split}.json"), [], 0
    paths = [os.path.join(args.shards, name) for name in entry["filenames"]]
    jobs = list(zip(range(len(paths)), paths, entry["shard_sha256"], shards, strict=True))
    task = functools.partial(write_shard, plan=entry["plan"], check=args.check)
    for _, _, number, sha256, wrong in in_parallel(pool, args, task, jobs, split, entry["num_samples"]):
        there, bad = there + (not sha256 and not wrong), bad + wrong
        if sha256:
            entry["shard_sha256"][number] = sha256
            write_json(
                journal, {"splits": {entry["name"]: entry}}
            )  # first, so that a later run knows of each shard that is there
            os.replace(f"{paths[number]}.tmp", paths[number])
    if bad:
        print(*bad, sep="\n", file=sys.stderr)
        fail(f"--check: {len(bad)} of the {split} images are bad, those above; mend them, and run this again")
    if there < len(paths) or INDEX_NAMES[split] not in index["splits"]:
        index["splits"][INDEX_NAMES[split]] = entry
        write_json(os.path.join(args.shards, INDEX), index)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(journal)
    return "already there" if there == len(paths) else f"written{f', {there} of the shards earlier' if there else ''}"


def write_shard(number, path, known, samples, plan, check):
    """In a worker: (samples, bytes, number, sha256, messages on bad images) of a shard, written to PATH.tmp.

    The digest is None where nothing is to be renamed: the shard is there, as it was written, or has bad images.
    """
    if known and os.path.exists(path) and hash_file(path) == known:
        return len(samples), os.path.getsize(path), number, None, []
    with open(f"{path}.tmp", "wb") as file:
        shard, bad = Hashed(file), []
        for key, image, label in samples:
            try:
                data = read_image(image, plan, check)
            except DataError as error:
                if not check:
                    raise
                bad.append(str(error))
                continue
            shard.write(member(f"{key}.cls", b"%d" % label) + member(f"{key}.jpg", data))
        shard.write(bytes(1024 + -(shard.size + 1024) % tarfile.RECORDSIZE))
        file.flush()
        os.fsync(file.fileno())
    return len(samples), shard.size, number, None if bad else shard.sha256.hexdigest(), bad


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


def read_json(path):
    """The index in the file; None if there is no file."""
    try:
        with open(path) as file:
            index = json.load(file)
        for entry in index["splits"].values():
            digests = entry.get("shard_sha256", entry["filenames"])
            for name, length, _ in zip(entry["filenames"], entry["shard_lengths"], digests, strict=True):
                if not isinstance(length, int) or name.startswith("/") or ":" in name or ".." in name.split("/"):
                    raise ValueError(f"{name!r}: {length!r}")
            if "plan" in entry and not entry["plan"].keys() >= {"images", *OPTIONS}:
                raise ValueError(f"plan: {entry['plan']}")
        return index
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        fail(f"{path}: not an index ({error!r}); take it away or give another --shards")


# ---------------------------------------------------------------------------- reading shards


def verify(args, pool):
    """Compare the shards with their index, and with the folders where they are there. The exit status."""
    index, problems = read_json(os.path.join(args.shards, INDEX)) or {"splits": {}}, []
    for split in args.splits:
        entry = index["splits"].get(INDEX_NAMES[split])
        if entry is None:
            fail(f"--shards {args.shards}: no {INDEX} there that names {split} shards; write them, or give --splits")
        paths, lengths = [os.path.join(args.shards, name) for name in entry["filenames"]], entry["shard_lengths"]
        digests, shards = entry.get("shard_sha256") or [None] * len(paths), [()] * len(paths)
        compared, first = "the index", {}
        if entry.get("num_samples") != sum(lengths) or ("plan" in entry and entry["plan"]["images"] != sum(lengths)):
            problems.append(f"{args.shards}/{INDEX}: {split} has {entry.get('num_samples')} samples, but its shards "
                            f"{sum(lengths)}, of {entry.get('plan', entry).get('images', 'some')} images")  # fmt: skip
        if "plan" in entry and os.path.isdir(split_folder(args, split)):
            vars(args).update((name, entry["plan"][name]) for name in OPTIONS)
            images, classes = find_images(args, split)
            plan, planned = plan_split(args, split, images, classes)
            what = difference(entry, plan) or ("classes" if classes != index.get("classes") else None)
            if what or len(planned) != len(paths):
                problems.append(
                    f"{args.data}: its {split} images are not those of the shards ({what or 'more shards'})"
                )
            else:
                shards, compared = planned, f"the index and {args.data}"
        jobs, num_classes = zip(range(len(paths)), paths, shards, strict=True), len(index.get("classes", ()))
        task = functools.partial(read_shard, num_classes=num_classes or sys.maxsize, compare=not args.resize)
        for count, _, i, sha256, keys, wrong in in_parallel(pool, args, task, jobs, split, sum(lengths)):
            problems += wrong
            if count != lengths[i]:
                problems.append(f"{paths[i]}: {count} samples, but {lengths[i]} by the index")
            elif digests[i] not in (None, sha256):
                problems.append(f"{paths[i]}: not the bytes that were written, by their SHA-256")
            for key in keys:
                if key in first:
                    problems.append(f"{paths[i]}: sample {key} is in {paths[first[key]]}, too")
                first[key] = i
        print(f"{split}: {len(paths)} shards, {len(first)} samples, compared with {compared}", flush=True)
    print(*problems, f"{len(problems)} things are wrong" if problems else "nothing is wrong", sep="\n")
    return 1 if problems else 0


def write_index(args, pool):
    """Count the samples of shards, and name them in an index: beside them if they are local, else in --shards."""
    try:
        urls = [name for url in expand_urls(args.index) for name in sorted(glob.glob(url)) or [url]]
    except (ValueError, AssertionError) as error:  # of unbalanced braces
        fail(f"--index {args.index}: {error}")
    lost = [url for url in urls if "://" not in url and glob.has_magic(url) and not os.path.exists(url)]
    if lost:
        fail(f"--index {lost[0]}: no shard matches")
    folder, *others = sorted({os.path.dirname(url) for url in urls})
    if others:
        fail(f"--index {args.index}: in {folder} and {others[0]}; an index is of the shards in one folder")
    path = os.path.join((folder or ".") if os.path.isdir(folder or ".") else args.shards, INDEX)
    if not os.path.isdir(os.path.dirname(path)):
        fail(f"--index {args.index}: no folder {args.shards} for the index; make it first: mkdir {args.shards}")
    index = read_json(path) or {"splits": {}}
    by_split = {split: [url for url in urls if split in os.path.basename(url)] for split in args.splits}
    by_split = {args.splits[0]: urls} if len(args.splits) == 1 else by_split
    if sorted(itertools.chain(*by_split.values())) != sorted(urls):
        fail(f"--index {args.index}: of the training or the validation shards? give --splits train or --splits val")
    for split, chosen in by_split.items():
        if chosen and INDEX_NAMES[split] in index["splits"]:
            fail(f"{path}: it names {split} shards already; take it away first")
        lengths, digests = [0] * len(chosen), [None] * len(chosen)
        for count, _, i, sha256, _, wrong in in_parallel(pool, args, read_shard, enumerate(chosen), split):
            if wrong:
                fail(f"--index {args.index}: {wrong[0]}")
            lengths[i], digests[i] = count, sha256
        if chosen:
            entry = {"name": INDEX_NAMES[split], "num_samples": sum(lengths), "shard_lengths": lengths}
            entry |= {"filenames": [os.path.basename(url) for url in chosen], "shard_sha256": digests}
            index["splits"][INDEX_NAMES[split]] = entry
            print(f"{split}: {len(chosen)} shards, {sum(lengths)} samples", flush=True)
    try:
        write_json(path, index)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    print(f"named in {path}")


def read_shard(number, url, planned=(), num_classes=sys.maxsize, compare=False):
    """In a worker: (samples, bytes, number, sha256, keys, messages on what is wrong) of a shard.

    Its samples must be those that are planned, if any are: (key, path, class), with the path's bytes if they compare.
    """
    keys, wrong, shard, files = [], [], Hashed(None), {key: file for key, *file in planned}
    try:
        with contextlib.closing(open(url, "rb") if os.path.exists(url) else gopen(url)) as shard.file:
            for sample in read_samples(shard, url):
                key, images = sample["__key__"], [sample[ending] for ending in IMAGES if ending in sample]
                label = int(sample["cls"]) if sample.get("cls", b"").strip().isdigit() else num_classes
                path, wanted = files.get(key, (None, None if planned else label))
                keys.append(key)
                if len(images) != 1 or label >= num_classes:
                    wrong.append(f"{url}: sample {key} does not hold one image and a class that there is")
                elif label != wanted:
                    wrong.append(f"{url}: sample {key} of class {label} is not one of the folder")
                elif path and compare and images[0] != read_file(path):
                    wrong.append(f"{url}: sample {key} does not hold the bytes of {path}")
    except Exception as error:  # a broken tar may raise anything
        wrong.append(f"{url}: broken after {len(keys)} samples ({error})")
    return len(keys), shard.size, number, shard.sha256.hexdigest(), keys, wrong


def read_samples(shard, url):
    """The samples of a Hashed tar, grouped as webdataset does; ValueError if it is damaged or cut off."""
    with tarfile.open(fileobj=shard, mode="r|") as tar:
        files = ({"fname": m.name, "data": tar.extractfile(m).read(), "__url__": url} for m in tar if m.isreg())
        yield from group_by_keys(file for file in files if not file["fname"].startswith("__"))
    while shard.read(1 << 20):
        pass
    if shard.content > tar.offset or shard.size < tar.offset + 1024:  # where tarfile stopped there must be zeros
        raise ValueError(f"it is damaged or cut off at byte {tar.offset}")


def hash_file(path):
    with open(path, "rb") as file:
        shard = Hashed(file)
        while shard.read(1 << 20):
            pass
    return shard.sha256.hexdigest()


class Hashed:
    """A file that is hashed and counted as it is written or read; from `content` on, what was read is zeros."""

    def __init__(self, file):
        self.file, self.sha256, self.size, self.content = file, hashlib.sha256(), 0, 0

    def write(self, data):
        self.sha256.update(data)
        self.size += self.file.write(data)

    def read(self, size):
        data = self.file.read(size)
        self.sha256.update(data)
        if content := len(data.rstrip(b"\0")):
            self.content = self.size + content
        self.size += len(data)
        return data


if __name__ == "__main__":
    main()
