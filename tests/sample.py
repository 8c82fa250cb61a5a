#!/usr/bin/env python3
"""Write a small dataset in ImageNet's format, for those who don't have ImageNet.

    python tests/sample.py --data ./data                                   write it, unless ./data exists
    python tests/sample.py --data ./data --shards ./shards --remove        delete it and its shards

Ten classes of textures and shapes in random colors, sizes and positions: 1300 training and 200 validation images. The
distribution of image and file sizes is about ImageNet's: mostly 500x375 pixels, some small images, some of several
megapixels, 110 KB per image. torchvision.datasets.ImageNet reads it. The same seed and version of Pillow give the same
bytes. Ctrl-C stops it without leaving anything behind.
"""

import argparse
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

CLASSES = {
    "n90000001": "horizontal stripes",
    "n90000002": "vertical stripes",
    "n90000003": "diagonal stripes",
    "n90000004": "checkerboard",
    "n90000005": "grid of dots",
    "n90000006": "discs",
    "n90000007": "squares",
    "n90000008": "triangles",
    "n90000009": "rings",
    "n90000010": "crosses",
}
SIZES = [  # weight, width, height: about ImageNet's distribution
    (46, 500, 375), (16, 375, 500), (11, 500, 333), (5, 333, 500), (5, 500, 500), (4, 400, 300),
    (4, 320, 240), (3, 200, 150), (1, 110, 140), (3, 800, 600), (1, 1280, 960), (0.6, 1600, 1200), (0.4, 2592, 1944),
]  # fmt: skip
MARK = ".sample"  # a file that marks ./data as the sample
BATCH_SIZE = 32  # for training on the sample, on a laptop
TRAINING = ["--image-size", "48", "--lr", "0.02", "--workers", "2"]  # likewise


def file_names(train, val):
    """(path relative to the data folder, wnid) of each image: `train` and `val` images per class."""
    for wnid in CLASSES:
        for i in range(train):
            yield f"train/{wnid}/{wnid}_{i + 1}.JPEG", wnid
    wnids = list(CLASSES)
    for i in range(val * len(wnids)):
        wnid = wnids[i % len(wnids)]
        yield f"val/{wnid}/ILSVRC2012_val_{i + 1:08d}.JPEG", wnid


def draw_pattern(draw, kind, rng, width, height):
    """Draw the texture or the shapes of a class in white, with random sizes and positions."""
    unit = min(width, height) / rng.uniform(5, 11)
    if kind.endswith("stripes"):
        sign = rng.choice([1, -1])
        angles = {"horizontal": 0.0, "vertical": math.pi / 2, "diagonal": sign * math.pi / 4}
        angle = angles[kind.removesuffix(" stripes")] + rng.uniform(-0.15, 0.15)
        dx = math.cos(angle)
        dy = math.sin(angle)
        reach = math.hypot(width, height)
        count = int(reach / unit)
        for k in range(-count, count + 1):
            x = width / 2 - dy * unit * (k + 0.2)
            y = height / 2 + dx * unit * (k + 0.2)
            ends = [(x - reach * dx, y - reach * dy), (x + reach * dx, y + reach * dy)]
            draw.line(ends, fill=255, width=max(2, round(unit / 2)))
    elif kind in ("checkerboard", "grid of dots"):
        x0 = rng.uniform(-unit, 0)
        y0 = rng.uniform(-unit, 0)
        for row in range(int(height / unit) + 2):
            for column in range(int(width / unit) + 2):
                x = x0 + column * unit
                y = y0 + row * unit
                if kind == "grid of dots":
                    draw.ellipse([x, y, x + 0.6 * unit, y + 0.6 * unit], fill=255)
                elif (row + column) % 2:
                    draw.rectangle([x, y, x + unit, y + unit], fill=255)
    else:
        for _ in range(rng.randint(9, 18)):
            x = rng.uniform(0, width)
            y = rng.uniform(0, height)
            r = unit * rng.uniform(0.6, 1.3)
            draw_shape(draw, kind, x, y, r, rng.uniform(0, 2 * math.pi))


def draw_shape(draw, kind, x, y, r, angle):
    """Draw one shape of radius r centered on (x, y), rotated by an angle in radians."""
    if kind == "discs":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif kind == "rings":
        draw.ellipse([x - r, y - r, x + r, y + r], outline=255, width=max(2, round(0.35 * r)))
    elif kind == "crosses":
        for arm in (angle, angle + math.pi / 2):
            dx = r * math.cos(arm)
            dy = r * math.sin(arm)
            draw.line([x - dx, y - dy, x + dx, y + dy], fill=255, width=max(2, round(0.5 * r)))
    else:
        sides = {"squares": 4, "triangles": 3}[kind]
        draw.regular_polygon((x, y, r), sides, math.degrees(angle), fill=255)


def noise(rng, size, cells, mode="RGB"):
    """An image of smooth random colors, about `cells` of them along the longer side."""
    from PIL import Image

    scale = cells / max(size)
    small = tuple(max(2, min(side, round(side * scale))) for side in size)
    pixels = rng.randbytes(small[0] * small[1] * len(mode))
    return Image.frombytes(mode, small, pixels).resize(size, Image.Resampling.BICUBIC)


def draw_image(kind, rng):
    """An RGB image of a class: two layers of cloudy color; the pattern of the class is a mask between them."""
    from PIL import Image, ImageDraw

    _, width, height = rng.choices(SIZES, [weight for weight, _, _ in SIZES])[0]
    size = (width, height)
    mask = Image.new("L", size, 0)
    draw_pattern(ImageDraw.Draw(mask), kind, rng, width, height)
    dark = tuple(rng.randint(0, 110) for _ in range(3))
    light = tuple(rng.randint(145, 255) for _ in range(3))
    colors = [dark, light] if rng.random() < 0.5 else [light, dark]
    layers = [Image.blend(Image.new("RGB", size, color), noise(rng, size, 6), 0.3) for color in colors]
    image = Image.composite(*layers, mask)
    for cells, share in ((40, 0.12), (180, 0.14), (500, 0.17)):
        image = Image.blend(image, noise(rng, size, cells), share)
    return image


def encode(path, wnid, seed):
    """The bytes of the file at that path: a JPEG; as in ImageNet, a few are grayscale, one is CMYK and one a PNG."""
    rng = random.Random(f"{seed} {path}")
    image = draw_image(CLASSES[wnid], rng)
    buffer = io.BytesIO()
    if path.endswith("n90000003_7.JPEG"):
        image.save(buffer, "PNG")
        return buffer.getvalue()
    if path.endswith("n90000006_7.JPEG"):
        image = image.convert("CMYK")
    elif rng.random() < 0.015:
        image = image.convert("L")
    image.save(buffer, "JPEG", quality=rng.randint(85, 96))
    return buffer.getvalue()


def write_image(name, folder, seed):
    path, wnid = name
    os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
    with open(os.path.join(folder, path), "wb") as file:
        file.write(encode(path, wnid, seed))


def write_sample(args):
    """Write the sample to a temporary folder, and rename that once it is complete."""
    signals = []

    def note_signal(number, _):
        signals.append(number)

    signal.signal(signal.SIGINT, note_signal)

    import torch
    from tqdm import tqdm

    names = list(file_names(args.train, args.val))
    folder = tempfile.mkdtemp(prefix=".sample-", dir=os.path.dirname(os.path.abspath(args.data)))
    try:
        os.chmod(folder, 0o755)
        writer = functools.partial(write_image, folder=folder, seed=args.seed)
        with ProcessPoolExecutor() as pool:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the workers inherit this, and ignore Ctrl-C
            results = pool.map(writer, names, chunksize=8)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for _ in tqdm(results, total=len(names), unit=" images", disable=not sys.stderr.isatty()):
                if signals:
                    pool.shutdown(cancel_futures=True)
                    break
        if signals:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("sample: stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        wnid_to_classes = {wnid: (name,) for wnid, name in CLASSES.items()}
        val_wnids = [wnid for path, wnid in names if path.startswith("val/")]
        torch.save((wnid_to_classes, val_wnids), os.path.join(folder, "meta.bin"))
        with open(os.path.join(folder, MARK), "w") as mark:
            mark.write(f"{args.train} {args.val} images per class, from tests/sample.py; ./run clean deletes them\n")
        os.rename(folder, args.data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.data}: {len(names) - len(val_wnids)} training and {len(val_wnids)} validation images of "
          f"{len(CLASSES)} classes, a sample in ImageNet's format")  # fmt: skip


def remove_sample(args):
    """Delete the files of the sample and those that makeshards.py made of it, then the folders that are empty."""
    if args.shards and not os.path.islink(args.shards):
        names = names_of_shards(args.shards)
        if names:
            remove(args.shards, names)
    mark = os.path.join(args.data, MARK)
    if os.path.isfile(mark) and not os.path.islink(args.data):
        with open(mark) as file:
            train, val = file.read().split()[:2]
        names = [path for path, _ in file_names(int(train), int(val))]
        remove(args.data, [*names, "meta.bin"])


def names_of_shards(folder):
    """The files of the sample's shards and index in the folder; an empty list if it has none, or another dataset's."""
    try:
        with open(os.path.join(folder, "_info.json")) as file:
            info = json.load(file)
        names = [os.path.basename(name) for split in info["splits"].values() for name in split["filenames"]]
        return [*names, "_info.json"] if info["classes"] == list(CLASSES) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not an index of makeshards.py's
        return []


def remove(folder, names):
    """Delete these files, then the folders that are empty. Print the outcome, and the first file that is in the way."""
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
    others = [os.path.join(parent, name) for parent, _, found in os.walk(folder) for name in found if name != MARK]
    if not others and os.path.exists(os.path.join(folder, MARK)):  # kept until all else is deleted
        os.unlink(os.path.join(folder, MARK))
    subfolders = {os.path.dirname(name) for name in names} | {"train", "val", ""}
    for subfolder in sorted(subfolders, key=len, reverse=True):
        path = os.path.join(folder, subfolder)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    if others:
        print(f"{folder}: the sample was deleted, but {others[0]} is not part of it; delete it, then run this again")
    else:
        print(f"{folder}: deleted")


def main():
    parser = argparse.ArgumentParser(description="Write, or delete, a small dataset in ImageNet's format.")
    add = parser.add_argument
    add("--data", default="./data", help="folder of the dataset (default: %(default)s)")
    add("--shards", help="with --remove: folder of its shards")
    add("--remove", action="store_true", help="delete the sample and its shards")
    add("--training", action="store_true", help="print arguments for main-wds.py, if --data or ./shards is the sample")
    add("--train", type=int, default=130, metavar="N", help="training images per class (default: %(default)s)")
    add("--val", type=int, default=20, metavar="N", help="validation images per class (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the images (default: %(default)s)")
    args = parser.parse_args()
    if args.training:
        if os.path.exists(os.path.join(args.data, MARK)) or names_of_shards("./shards"):
            print(*TRAINING, "--batch-size", BATCH_SIZE, "--epochs", 5)
    elif args.remove:
        remove_sample(args)
    elif os.path.lexists(args.data):
        print(f"{args.data}: already there, left as it is")
    else:
        write_sample(args)


if __name__ == "__main__":
    main()
