"""All kinds of files that ImageNet holds decode to the same pixels with all decoders; and the augmentation."""

import argparse
import random
import sys

import numpy
import pytest
import torch
from commands import load
from make_data import picture
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

main_wds = load("main-wds.py")
DataError = main_wds.DataError
NOISE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=numpy.uint8)).resize((120, 90))
GREY16 = Image.fromarray(numpy.arange(9000, dtype=numpy.uint16).reshape(90, 100) * 7)
ORIENTATION_TAG = b"\x01\x12\0\x03\0\0\0\x01"  # in EXIF: a number of 16 bits, one value
FRAME = b"\xff\xc0\x00\x11\x08"  # the frame header of a JPEG, up to the bits per value; height and width follow


def with_orientation(orientation):
    """A JPEG whose EXIF data asks for a rotation or reflection."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(NOISE, exif=exif)


JPEG = picture(NOISE)
IMAGES = {
    "jpeg": JPEG,
    "grey": picture(NOISE.convert("L")),
    "cmyk": picture(NOISE.convert("CMYK")),
    "rgb": picture(NOISE, keep_rgb=True),
    "progressive": picture(NOISE, progressive=True),
    "broken exif": with_orientation(6).replace(ORIENTATION_TAG, ORIENTATION_TAG[:4] + bytes(4)),
    "trailing bytes": JPEG + b"trailing bytes",
    "png": picture(NOISE, format="PNG"),
    "palette png": picture(NOISE.convert("P"), format="PNG"),
    "16-bit png": picture(GREY16, format="PNG"),
    "webp": picture(NOISE, format="WEBP"),
}
UNDECODABLE = {
    "empty": b"",
    "no frame": b"\xff\xd8\xff\xd9",
    "truncated png": picture(NOISE, format="PNG")[:99],
    "gif header": b"GIF89a",
    "text": b"text",
    "12-bit jpeg": JPEG.replace(FRAME, FRAME[:-1] + b"\x0c"),
}
BOMBS = {
    "jpeg": JPEG.replace(FRAME + b"\x00\x5a\x00\x78", FRAME + 2 * b"\xea\x60"),  # says 60,000 x 60,000 pixels
    "png": picture(Image.new("1", (14_000, 14_000)), format="PNG"),
}


@pytest.fixture(params=["TorchCodec", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """The decoder that decode_tensor() uses, because faster ones are not installed."""
    if request.param != "TorchCodec":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # importing it raises ImportError
    if request.param == "Pillow":
        monkeypatch.setattr(torch.ops, "image", None)
    main_wds.jpeg_decoder.cache_clear()
    name, _ = main_wds.jpeg_decoder()
    if name != request.param:
        pytest.skip(f"no {request.param}")
    yield
    main_wds.jpeg_decoder.cache_clear()


each_decoder = pytest.mark.usefixtures("decoder")


def decode_both(data):
    """The pixels, uint8 (3, H, W), after an assertion that both decode options give the same."""
    tensor = main_wds.decode_tensor(data)
    pil = main_wds.decode_pil(data)
    assert tensor.dtype == torch.uint8 and pil.mode == "RGB"
    assert numpy.array_equal(tensor.numpy(), numpy.asarray(pil).transpose(2, 0, 1))
    return tensor


def assert_both_fail(data, message):
    for decode in (main_wds.decode_tensor, main_wds.decode_pil):
        with pytest.raises(DataError, match=message):
            decode(data)


@each_decoder
@pytest.mark.parametrize("kind", IMAGES)
def test_all_decoders_give_the_same_pixels(kind):
    decode_both(IMAGES[kind])


@each_decoder
def test_exif_orientation_is_ignored():
    for orientation in range(1, 9):
        assert decode_both(with_orientation(orientation)).equal(decode_both(JPEG))


@each_decoder
@pytest.mark.parametrize("kind", UNDECODABLE)
def test_undecodable_data_is_an_error(kind):
    assert_both_fail(UNDECODABLE[kind], "not a readable image")


@each_decoder
@pytest.mark.parametrize("kind", ["jpeg", "progressive"])
def test_truncated_jpeg_is_an_error(kind):
    data = IMAGES[kind]
    for size in (*range(0, len(data) - 20, 97), *range(len(data) - 20, len(data))):
        assert_both_fail(data[:size], "not a readable image")


@each_decoder
@pytest.mark.parametrize("kind", BOMBS)
def test_decompression_bomb_is_an_error(kind):
    assert_both_fail(BOMBS[kind], "decompression bomb")


def ks_distance(a, b):
    """The Kolmogorov-Smirnov distance of two samples of the same size."""
    values = numpy.union1d(a, b)
    cumulative_a = numpy.searchsorted(numpy.sort(a), values, side="right") / len(a)
    cumulative_b = numpy.searchsorted(numpy.sort(b), values, side="right") / len(b)
    return abs(cumulative_a - cumulative_b).max()


@pytest.mark.parametrize("height, width", [(375, 500), (90, 1100), (1100, 90), (3, 2), (1, 1)])
def test_crop_boxes_have_the_distribution_of_torchvision(height, width):
    random.seed(0)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    ours = numpy.array([main_wds.crop_box(height, width) for _ in range(4000)])
    theirs = [v2.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    for a, b in zip(ours.T, numpy.array(theirs).T, strict=True):
        assert ks_distance(a, b) < 0.05


def test_random_crop_is_torchvisions_resized_crop_or_its_mirror_image():
    image = main_wds.decode_tensor(JPEG)
    flipped = 0
    for seed in range(40):
        random.seed(seed)
        box = main_wds.crop_box(*image.shape[1:])
        random.seed(seed)
        ours = main_wds.random_crop(image, 48)
        assert ours.shape == (3, 48, 48) and main_wds.to_hwc(ours).is_contiguous()
        theirs = v2.functional.resized_crop(image, *box, [48, 48])
        is_same, is_flipped = [
            bool((ours.int() - other.int()).abs().max() <= 1)  # CPUs without AVX2 round differently
            for other in (theirs, theirs.flip(2))
        ]
        assert is_same != is_flipped
        flipped += is_flipped
    assert 10 < flipped < 30


def test_both_decode_options_validate_on_the_same_images(small):
    """The mean difference of their normalized inputs, per image, is less than 1 of 255."""
    images = datasets.ImageFolder(small / "data/val").imgs
    assert len(images) == 30
    mean = torch.tensor(main_wds.MEAN)
    std = torch.tensor(main_wds.STD)
    transforms = {}
    for decode in main_wds.DECODERS:
        args = argparse.Namespace(decode=decode, image_size=224, augmentation="full", dummy=False)
        transforms[decode] = main_wds.make_transform(args, "val")
    differences = []
    for path, _ in images:
        pil = transforms["pil"](main_wds.load_image(path, main_wds.decode_pil))
        tensor = transforms["tensor"](main_wds.load_image(path, main_wds.decode_tensor))
        assert tensor.dtype == torch.uint8 and tensor.shape == (224, 224, 3)
        pixels = pil.permute(1, 2, 0) * std + mean
        differences.append(float((pixels - tensor / 255).abs().mean()))
    assert 0 < numpy.mean(differences) < 1 / 255
    assert max(differences) < 2 / 255
