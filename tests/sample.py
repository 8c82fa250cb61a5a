#!/usr/bin/env python3
"""A small dataset in ImageNet's own format, for those who have no ImageNet.

    python tests/sample.py --data ./data                        write it, where there is nothing yet
    python tests/sample.py --data ./data --shards ./shards --remove      take it and its shards away again

Ten classes of textures and shapes in random colours, sizes and places; 1300 training and 200 validation images whose
sizes and bytes are distributed as ImageNet's (mostly 500x375, some small, some of several megapixels, about 110 KB).
torchvision.datasets.ImageNet opens it. The same seed and Pillow give the same bytes.
"""

import argparse
import functools
import io
import json
import math
import os
import random
import shutil
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
SIZES = [  # weight, width, height; about what ImageNet holds
    (46, 500, 375), (16, 375, 500), (11, 500, 333), (5, 333, 500), (5, 500, 500), (4, 400, 300),
    (4, 320, 240), (3, 200, 150), (1, 110, 140), (3, 800, 600), (1, 1280, 960), (0.6, 1600, 1200), (0.4, 2592, 1944),
]  # fmt: skip
MARK = ".sample"  # the file by which ./data is known to be the sample
BATCH_SIZE = 32  # this and what follows suits the training on it, on a laptop
TRAINING = ["--image-size", "48", "--lr", "0.02", "--workers", "2"]


def file_names(train, val):
    """Paths below the data folder, with their class's wnid: `train` and `val` images of each class."""
    for wnid in CLASSES:
        for i in range(train):
            yield f"train/{wnid}/{wnid}_{i + 1}.JPEG", wnid
    for i in range(val * len(CLASSES)):
        wnid = list(CLASSES)[i % len(CLASSES)]
        yield f"val/{wnid}/ILSVRC2012_val_{i + 1:08d}.JPEG", wnid


def pattern(draw, kind, rng, width, height):
    """Draw the class's texture or shapes in white, in random size, phase and places."""
    unit = min(width, height) / rng.uniform(5, 11)
    if kind in ("horizontal stripes", "vertical stripes", "diagonal stripes"):
        angle = {"h": 0.0, "v": math.pi / 2, "d": rng.choice([1, -1]) * math.pi / 4}[kind[0]] + rng.uniform(-0.15, 0.15)
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        reach = math.hypot(width, height)
        for k in range(-int(reach / unit), int(reach / unit) + 1):
            x, y = (half + across[d] * unit * (k + 0.2) for d, half in enumerate((width / 2, height / 2)))
            ends = [(x - reach * along[0], y - reach * along[1]), (x + reach * along[0], y + reach * along[1])]
            draw.line(ends, fill=255, width=max(2, round(unit / 2)))
    elif kind in ("checkerboard", "grid of dots"):
        x0, y0 = rng.uniform(-unit, 0), rng.uniform(-unit, 0)
        for row in range(int(height / unit) + 2):
            for column in range(int(width / unit) + 2):
                x, y = x0 + column * unit, y0 + row * unit
                if kind == "grid of dots":
                    draw.ellipse([x, y, x + 0.6 * unit, y + 0.6 * unit], fill=255)
                elif (row + column) % 2:
                    draw.rectangle([x, y, x + unit, y + unit], fill=255)
    else:
        for _ in range(rng.randint(9, 18)):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), unit * rng.uniform(0.6, 1.3)
            shape(draw, kind, x, y, r, rng.uniform(0, 2 * math.pi))


def shape(draw, kind, x, y, r, turn):
    """One shape of radius r around (x, y), turned by an angle."""
    if kind == "discs":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif kind == "rings":
        draw.ellipse([x - r, y - r, x + r, y + r], outline=255, width=max(2, round(0.35 * r)))
    elif kind == "crosses":
        for arm in (turn, turn + math.pi / 2):
            dx, dy = r * math.cos(arm), r * math.sin(arm)
            draw.line([x - dx, y - dy, x + dx, y + dy], fill=255, width=max(2, round(0.5 * r)))
    else:
        draw.regular_polygon((x, y, r), {"squares": 4, "triangles": 3}[kind], math.degrees(turn), fill=255)


def noise(rng, size, cells, mode="RGB"):
    """Smooth random colours, about `cells` of them along the longer side."""
    from PIL import Image

    scale = cells / max(size)
    small = tuple(max(2, min(side, round(side * scale))) for side in size)
    pixels = rng.randbytes(small[0] * small[1] * len(mode))
    return Image.frombytes(mode, small, pixels).resize(size, Image.Resampling.BICUBIC)


def draw_image(kind, rng):
    """An RGB image of the class: two layers of cloudy colour, one showing through the other by the class's pattern."""
    from PIL import Image, ImageDraw

    _, width, height = rng.choices(SIZES, [weight for weight, _, _ in SIZES])[0]
    size = width, height
    mask = Image.new("L", size, 0)
    pattern(ImageDraw.Draw(mask), kind, rng, width, height)
    dark, light = (tuple(rng.randint(low, low + 110) for _ in "rgb") for low in (0, 145))
    colours = [dark, light] if rng.random() < 0.5 else [light, dark]
    layers = [Image.blend(Image.new("RGB", size, colour), noise(rng, size, 6), 0.3) for colour in colours]
    image = Image.composite(*layers, mask)
    for cells, share in ((40, 0.12), (180, 0.14), (500, 0.17)):
        image = Image.blend(image, noise(rng, size, cells), share)
    return image


def encode(path, wnid, seed):
    """The bytes of the file at that path: JPEG, and as in ImageNet a few grey ones, a CMYK one and a PNG."""
    rng = random.Random(f"{seed} {path}")
    image, buffer = draw_image(CLASSES[wnid], rng), io.BytesIO()
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
    """Write all of it beside its place and move it there when it is whole."""
    import torch
    from tqdm import tqdm

    names = list(file_names(args.train, args.val))
    folder = tempfile.mkdtemp(prefix=".sample-", dir=os.path.dirname(os.path.abspath(args.data)))
    os.chmod(folder, 0o755)
    try:
        with ProcessPoolExecutor() as pool:
            writer = functools.partial(write_image, folder=folder, seed=args.seed)
            bar = functools.partial(tqdm, total=len(names), unit=" images", disable=not sys.stderr.isatty())
            for _ in bar(pool.map(writer, names, chunksize=8)):
                pass
        wnid_to_classes = {wnid: (name,) for wnid, name in CLASSES.items()}
        val_wnids = [wnid for path, wnid in names if path.startswith("val/")]
        torch.save((wnid_to_classes, val_wnids), os.path.join(folder, "meta.bin"))
        with open(os.path.join(folder, MARK), "w") as mark:
            mark.write(f"{args.train} {args.val} images a class by tests/sample.py; ./run clean takes it away\n")
        os.rename(folder, args.data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.data}: {len(names) - len(val_wnids)} training and {len(val_wnids)} validation images of "
          f"{len(CLASSES)} classes, a sample in ImageNet's format")  # fmt: skip


def remove_sample(args):
    """Take away the files that write_sample and makeshards.py made of it, and the folders that are then empty."""
    if args.shards and not os.path.islink(args.shards) and (names := names_of_shards(args.shards)):
        remove(args.shards, names)
    mark = os.path.join(args.data, MARK)
    if os.path.isfile(mark) and not os.path.islink(args.data):
        with open(mark) as file:
            counts = [int(word) for word in file.read().split()[:2]]
        remove(args.data, [path for path, _ in file_names(*counts)] + ["meta.bin"])


def names_of_shards(folder):
    """The sample's shards in the folder and their index; nothing if it holds those of another dataset, or none."""
    try:
        with open(os.path.join(folder, "_info.json")) as file:
            info = json.load(file)
        names = [os.path.basename(name) for split in info["splits"].values() for name in split["filenames"]]
        return [*names, "_info.json"] if info["classes"] == list(CLASSES) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not an index of ours
        return []


def remove(folder, names):
    for name in names:
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
    others = [os.path.join(parent, name) for parent, _, found in os.walk(folder) for name in found if name != MARK]
    if not others and os.path.exists(os.path.join(folder, MARK)):  # it stays as long as there is something left to do
        os.unlink(os.path.join(folder, MARK))
    for parent in sorted({os.path.dirname(name) for name in names} | {"train", "val", ""}, key=len, reverse=True):
        path = os.path.join(folder, parent)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    kept = (
        f"the sample is gone, but {others[0]} is not of it; take that away, and run this again" if others else "removed"
    )
    print(f"{folder}: {kept}")


def main():
    parser = argparse.ArgumentParser(description="Write, or remove, a small dataset in ImageNet's format.")
    parser.add_argument("--data", default="./data", help="its folder (%(default)s)")
    parser.add_argument("--shards", help="with --remove: the folder of its shards")
    parser.add_argument("--remove", action="store_true", help="take the sample and its shards away")
    parser.add_argument(
        "--training", action="store_true", help="print arguments for main-wds.py, if this is the sample"
    )
    parser.add_argument("--train", type=int, default=130, metavar="N", help="training images a class (%(default)s)")
    parser.add_argument("--val", type=int, default=20, metavar="N", help="validation images a class (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
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
