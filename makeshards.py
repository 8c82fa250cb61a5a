#!/usr/bin/env python3
"""Write ImageNet's folders of images as WebDataset shards: tar files of 1000 samples each, and their index.

    ln -s /data/imagenet ./data       where your ImageNet is, holding train/ and val/
    mkdir ./shards                    about as large as ImageNet's files: 155 GB
    python makeshards.py              1282 training and 50 validation shards
    python makeshards.py --data ./pets --shards ./pet-shards --maxcount 500      any folder of images per class
    python makeshards.py --resize 384         smaller shards: larger images are scaled to a shorter side of 384 pixels

A sample is two files of the tar: KEY.jpg, the image file's own bytes, and KEY.cls, its class as a decimal number. The
class is torchvision's: the place of the image's folder among the sorted class folders. KEY is the place of the image
in torchvision.datasets.ImageFolder. Training samples are written in random order, drawn from --seed over the whole
split, so that a shard is itself a random sample. The same folders and options give the same bytes; with --resize, the
same version of Pillow too.

With --resize N an image whose shorter side is above N pixels is scaled and encoded anew; the others stay as they are.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tarfile

from PIL import Image, UnidentifiedImageError
from torchvision import datasets
from tqdm import tqdm

INDEX = "_info.json"  # its name and shape are those that timm reads and the hub's ImageNet shards have
INDEX_NAMES = {"train": "train", "val": "validation"}  # of the splits
QUALITY = 90  # of scaled images: at 4:4:4 it is smaller than 95 at 4:2:0, and as near to the original


def parse_args():
    parser = argparse.ArgumentParser(description="Write ImageNet's folders of images as WebDataset shards.")
    parser.error = fail
    add = parser.add_argument
    add("--data", default="./data", metavar="DIR", help="folder that holds train/ and val/ (%(default)s)")
    add("--shards", default="./shards", metavar="DIR", help="folder to write to, which must exist (%(default)s)")
    add("--splits", default="train,val", metavar="LIST", help="splits to write (%(default)s)")
    add("--maxcount", type=int, default=1000, metavar="N", help="samples a shard (%(default)s)")
    add("--filekey", action="store_true", help="the key is the file's name without its ending")
    add("--seed", type=int, default=0, metavar="N", help="of the training samples' order (%(default)s)")
    add("--resize", type=int, metavar="N", help="scale larger images to a shorter side of N pixels (off)")
    add("--quality", type=int, metavar="Q", help=f"with --resize: of the scaled images' JPEG, 1 to 100 ({QUALITY})")
    args = parser.parse_args()
    args.splits = args.splits.split(",")
    if not set(args.splits) <= {"train", "val"}:
        fail(f"--splits {','.join(args.splits)}: a comma-separated list of train and val")
    if args.maxcount < 1:
        fail(f"--maxcount {args.maxcount}: it must be at least 1")
    args.resize = parse_resize(args.resize, args.quality)
    return args


def parse_resize(shorter_side, quality):
    """What --resize and --quality ask for, as the index says it: None where images are not scaled."""
    if shorter_side is None:
        if quality is not None:
            fail(f"--quality {quality}: only images that --resize scales are encoded; give --resize too")
        return None
    quality = QUALITY if quality is None else quality
    if shorter_side < 1:
        fail(f"--resize {shorter_side}: it must be at least 1 pixel")
    if not 1 <= quality <= 100:
        fail(f"--quality {quality}: it must be 1 to 100")
    return {"shorter_side": shorter_side, "quality": quality}


def fail(message):
    """Say in one line what is wrong with the user's input, and stop with status 2."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- main


def main():
    args = parse_args()
    splits = {split: find_images(args, split) for split in args.splits}
    classes = one_list_of_classes(args, splits)
    plans = {split: plan_split(args, split, dataset) for split, dataset in splits.items()}
    index = read_index(args, classes)
    missing = [split for split in args.splits if not is_there(args, index, split, plans[split])]
    partial = os.path.join(args.shards, ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.mkdir(partial)
        for split in missing:
            index["splits"][INDEX_NAMES[split]] = write_split(partial, splits[split], plans[split])
        publish(args, partial, index)
    except OSError as error:
        fail(f"--shards {args.shards}: {error.strerror or error}; nothing of this run is left there")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for split in args.splits:
        plan = plans[split]
        state = "written" if split in missing else "already there"
        print(f"{split}: {len(plan['filenames'])} shards, {plan['num_samples']} samples {state}")


# ---------------------------------------------------------------------------- reading the folders


def find_images(args, split):
    """The split as torchvision's ImageFolder: `imgs` is a list of (path, class), `classes` the class folders' names."""
    try:
        return datasets.ImageFolder(os.path.join(args.data, split))
    except OSError as error:
        fail(f"--data {args.data}: {str(error).rstrip('. ')}; {split}/ must hold a folder of images for each class")


def one_list_of_classes(args, splits):
    lists = {split: dataset.classes for split, dataset in splits.items()}
    for split in {"train", "val"} - set(splits):  # one that is not written must agree too, where it is there
        if os.path.isdir(os.path.join(args.data, split)):
            lists[split] = sorted(entry.name for entry in os.scandir(os.path.join(args.data, split)) if entry.is_dir())
    differing = sorted(set.symmetric_difference(*map(set, lists.values()))) if len(lists) > 1 else []
    if differing:
        fail(f"--data {args.data}: train/ and val/ differ in their class folders, e.g. {', '.join(differing[:5])}")
    return next(iter(lists.values()))


def read_image(path, resize):
    """The file's own bytes, when Pillow finds the beginning of an image in them; if that is to be scaled, a JPEG's."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        with Image.open(io.BytesIO(data)) as image:  # reads the header alone, size and all
            return scale(image, **resize) if resize and min(image.size) > resize["shorter_side"] else data
    except Exception as error:  # Pillow raises nearly anything on broken bytes
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its text shows the bytes' address in memory
            what = "Pillow finds no image in it" if data else "it is empty"
        fail(f"{path}: not a readable image ({what}); mend it or take it away, and run this again")


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


def plan_split(args, split, dataset):
    """The split's entry in the index, and under "order" which images are written, one shard after the other."""
    order = list(range(len(dataset.imgs)))
    if split == "train":
        random.Random(args.seed).shuffle(order)
    counts = [min(args.maxcount, len(order) - first) for first in range(0, len(order), args.maxcount)]
    keys = make_keys(args, split, dataset)
    return {
        "name": INDEX_NAMES[split],
        "num_samples": len(order),
        "filenames": [f"imagenet-{split}-{i:06d}.tar" for i in range(len(counts))],
        "shard_lengths": counts,
        "source": digest(keys[i] + dataset.imgs[i][0].removeprefix(os.path.join(dataset.root, "")) for i in order),
        "resize": args.resize,
        "order": order,
        "keys": keys,
    }


def make_keys(args, split, dataset):
    """A key for each image, unique and without a dot, for at a dot WebDataset begins the member's ending."""
    if not args.filekey:
        return [f"{i:07d}" for i in range(len(dataset.imgs))]
    keys = [os.path.splitext(os.path.basename(path))[0].replace(".", "_") for path, _ in dataset.imgs]
    first = {}
    for key, (path, _) in zip(keys, dataset.imgs, strict=True):
        if first.setdefault(key, path) != path:
            fail(f"--filekey: {first[key]} and {path} would have the same key; leave --filekey out")
    return keys


def digest(lines):
    """SHA-256 over lines of text: by it a later run knows the shards of the same files in the same order."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return total.hexdigest()


# ---------------------------------------------------------------------------- writing


def write_split(folder, dataset, plan):
    """Write the split's shards into the folder, and return its entry for the index."""
    order = iter(plan["order"])
    with tqdm(total=plan["num_samples"], desc=plan["name"], unit=" images", disable=not sys.stderr.isatty()) as bar:
        for filename, count in zip(plan["filenames"], plan["shard_lengths"], strict=True):
            with open(os.path.join(folder, filename), "wb") as file:
                for i in itertools.islice(order, count):
                    path, label = dataset.imgs[i]
                    file.writelines(member(f"{plan['keys'][i]}.cls", b"%d" % label))
                    file.writelines(member(f"{plan['keys'][i]}.jpg", read_image(path, plan["resize"])))
                    bar.update()
                end = 2 * tarfile.BLOCKSIZE
                file.write(bytes(end + -(file.tell() + end) % tarfile.RECORDSIZE))
                file.flush()
                os.fsync(file.fileno())
    return {key: value for key, value in plan.items() if key not in ("order", "keys")}


def member(name, data):
    """A file of a tar: header, content, padding. The bytes are those of webdataset's TarWriter, in less time."""
    header = tarfile.TarInfo(name)  # owner and mtime are 0: the same bytes each time
    header.size, header.mode = len(data), 0o444
    return header.tobuf(), data, bytes(-len(data) % tarfile.BLOCKSIZE)


def read_index(args, classes):
    """The index that is already there, else an empty one."""
    if not os.path.isdir(args.shards):
        fail(f"--shards {args.shards}: no such folder; make it first: mkdir {args.shards}")
    path = os.path.join(args.shards, INDEX)
    if not os.path.lexists(path):
        return {"splits": {}, "classes": classes}
    try:
        with open(path) as file:
            index = json.load(file)
        same = isinstance(index["splits"], dict) and index["classes"] == classes
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not an index that this script wrote ({error}); give another --shards")
    if not same:
        fail(f"--shards {args.shards}: it holds shards of another dataset, with other classes; give another --shards")
    return index


def is_there(args, index, split, plan):
    """Whether the folder holds this very plan's shards; others are refused, for nothing is ever written over."""
    there = set(os.listdir(args.shards))
    entry = index["splits"].get(INDEX_NAMES[split])
    if entry is None:
        found = sorted(name for name in there if name.startswith(f"imagenet-{split}-") and name.endswith(".tar"))
        if found:
            fail(f"--shards {args.shards}: {found[0]} is there without an index; take it away or give another --shards")
        return False
    for key in ("num_samples", "shard_lengths", "source"):
        if entry.get(key) != plan[key]:
            what = {"num_samples": "another number of images", "shard_lengths": "another --maxcount"}
            fail(f"--shards {args.shards}: its {split} shards are of {what.get(key, 'other files or another order')}; "
                 f"take them away or give another --shards")  # fmt: skip
    if entry.get("resize") != plan["resize"]:
        theirs, ours = resize_options(entry.get("resize")), resize_options(plan["resize"])
        fail(f"--shards {args.shards}: its {split} shards were written with {theirs}, not with {ours}; "
             f"take them away or give another --shards")  # fmt: skip
    lost = [name for name in entry["filenames"] if name not in there]
    if lost:
        fail(f"--shards {args.shards}: {lost[0]} is in its index but not there; take the folder away and begin again")
    return True


def resize_options(resize):
    """The options that an entry's "resize" stands for; it may be of an index that somebody changed."""
    if not isinstance(resize, dict):
        return "no --resize"
    return f"--resize {resize.get('shorter_side')} --quality {resize.get('quality')}"


def publish(args, partial, index):
    """Move the whole shards to their names, and then the index, so that an index never names what is not there."""
    filenames = sorted(os.listdir(partial))
    with open(os.path.join(partial, INDEX), "w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for filename in [*filenames, INDEX]:
        os.replace(os.path.join(partial, filename), os.path.join(args.shards, filename))


if __name__ == "__main__":
    main()
