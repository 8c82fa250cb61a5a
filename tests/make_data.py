"""Small shards and folders of images for the tests."""

import io
import itertools
import json
import random
import tarfile

from PIL import Image

TRAIN = [30, 1, 29, 18]  # 78 samples: with batches of 4, the last one has 2, or 3 on each of two ranks
VAL = [40, 20]


def tar(members, form=tarfile.USTAR_FORMAT, mode="w"):
    """The bytes of a tar of members (name or TarInfo, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as shard:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return out.getvalue()


def read_tar(path):
    """[(name, data)] of a tar's members."""
    with tarfile.open(path) as shard:
        return [(member.name, shard.extractfile(member).read()) for member in shard]


def picture(image=None, **options):
    """The bytes of a JPEG, or of what Image.save's options say; by default a gradient of 40 x 30 pixels."""
    out = io.BytesIO()
    image = image or Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    image.save(out, **{"format": "JPEG", **options})
    return out.getvalue()


def noise(number):
    """The bytes of a JPEG of noise, the same each time for the same number."""
    return picture(Image.frombytes("RGB", (40, 40), random.Random(number).randbytes(4800)))


def samples(numbers, image=b"%d"):
    """The members of numbered samples; each is of the class of its number.

    image: the image's bytes, in which %d becomes the number, or a function of the number that returns them.
    """
    members = []
    for n in numbers:
        data = image(n) if callable(image) else image.replace(b"%d", b"%d" % n)
        members += [(f"{n:04d}.cls", b"%d" % n), (f"{n:04d}.jpg", data)]
    return members


def write_shards(folder, image=b"%d", **splits):
    """Shards with as many samples as the lists `train` and `validation` say, numbered from 0, and their index."""
    folder.mkdir(exist_ok=True)
    number = itertools.count()
    index = {}
    for split, lengths in splits.items():
        names = [f"imagenet-{split}-{i:06}.tar" for i in range(len(lengths))]
        index[split] = {"num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        for name, length in zip(names, lengths, strict=True):
            (folder / name).write_bytes(tar(samples(itertools.islice(number, length), image)))
    (folder / "_info.json").write_text(json.dumps({"splits": index}))
    return folder


def write_folders(folder, train, val, classes=("a", "b")):
    """train/ and val/ as ImageFolder reads them, with that many images of noise per class; their names are unique."""
    numbers = itertools.count()
    for split, size in (("train", train), ("val", val)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(size):
                (folder / split / name / f"{name}_{i}.jpg").write_bytes(noise(next(numbers)))
    return folder
