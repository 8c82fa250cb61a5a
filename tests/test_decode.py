"""Every kind of file that ImageNet holds decodes to the same pixels with all decoders, and is augmented alike."""

import argparse
import io
import random
import sys

import numpy
import pytest
from conftest import load, run
from PIL import Image, ImageFile
from torchvision import datasets
from torchvision.transforms import v2

main_wds = load("main-wds.py")
PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=numpy.uint8)).resize((120, 90))
GREY16 = Image.fromarray(numpy.arange(9000, dtype=numpy.uint16).reshape(90, 100) * 7)


def saved(image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


def turned(orientation):
    """A JPEG whose EXIF asks for a rotation or a reflection, which the original ignores."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(exif=exif)


ORIENTATION = b"\x01\x12\0\x03\0\0\0\x01"  # the tag in EXIF: a number of 16 bits, one value
SOF = b"\xff\xc0\x00\x11\x08"  # the frame's header, up to the bits of a value; height and width follow
TWELVE_BITS = saved().replace(SOF, SOF[:-1] + b"\x0c")  # which no decoder supports
HUGE_JPEG = saved().replace(SOF + b"\x00\x5a\x00\x78", SOF + 2 * b"\xea\x60")  # 60,000 x 60,000 pixels, it says
HUGE_PNG = saved(Image.new("1", (14_000, 14_000)), format="PNG")


@pytest.fixture(params=["TorchCodec", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """Lets decode_tensor() find this decoder, as on a machine without the ones before it."""
    if request.param != "TorchCodec":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # importing it is an ImportError
    if request.param == "Pillow":
        monkeypatch.setattr(main_wds.torch.ops, "image", None)
    found = main_wds.jpeg_decoder.__wrapped__()  # behind the cache
    monkeypatch.setattr(main_wds, "jpeg_decoder", lambda: found)
    assert found[0] == request.param
    return request.param


@pytest.mark.parametrize(
    "data",
    [
        saved(),
        saved(PICTURE.convert("L")),
        saved(PICTURE.convert("CMYK")),
        saved(keep_rgb=True),
        saved(progressive=True),
        *map(turned, range(1, 9)),
        turned(6).replace(ORIENTATION, ORIENTATION[:4] + bytes(4)),
        saved() + b"trailing bytes",
        saved(format="PNG"),
        saved(PICTURE.convert("P"), format="PNG"),
        saved(GREY16, format="PNG"),
        saved(format="WEBP"),
    ],
    ids=["jpeg", "grey", "cmyk", "rgb", "progressive", *(f"exif {i}" for i in range(1, 9)), "broken exif", "trailing",
         "png", "palette", "png16", "webp"],
)  # fmt: skip
def test_same_pixels(data, decoder):
    tensor, pil = main_wds.decode_tensor(data), main_wds.decode_pil(data)
    assert tensor.shape == (3, pil.height, pil.width) and tensor.dtype == main_wds.torch.uint8 and pil.mode == "RGB"
    assert numpy.array_equal(tensor.numpy(), numpy.asarray(pil).transpose(2, 0, 1))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff\xd9", saved(format="PNG")[:99], b"GIF89a", b"text", TWELVE_BITS])
def test_what_none_decodes_is_an_error(data, decoder):
    for decode in (main_wds.decode_tensor, main_wds.decode_pil):
        with pytest.raises(main_wds.DataError, match="not a readable image"):
            decode(data)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_truncated_jpeg_is_an_error(options, decoder):
    """Wherever it was cut off, were it one byte before its end."""
    data = saved(**options)
    for size in (*range(0, len(data) - 20, 97), *range(len(data) - 20, len(data))):
        for decode in (main_wds.decode_tensor, main_wds.decode_pil):
            with pytest.raises(main_wds.DataError, match="not a readable image"):
                decode(data[:size])


@pytest.mark.parametrize("data", [HUGE_JPEG, HUGE_PNG], ids=["jpeg", "png"])
def test_a_decompression_bomb_is_not_decoded(data, decoder, monkeypatch):
    decoded = []
    monkeypatch.setattr(main_wds, "jpeg_decoder", lambda: (decoder, decoded.append))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    for decode in (main_wds.decode_tensor, main_wds.decode_pil):
        with pytest.raises(main_wds.DataError, match="decompression bomb"):
            decode(data)
    assert not decoded


@pytest.mark.parametrize("height, width", [(375, 500), (90, 1100), (1100, 90), (3, 2), (1, 1)])
def test_crops_are_drawn_as_torchvision_draws_them(height, width):
    """The distributions of the crops' places and sizes: no larger a Kolmogorov-Smirnov distance than chance gives."""
    random.seed(0)
    main_wds.torch.manual_seed(0)
    image, n = main_wds.torch.empty(3, height, width), 4000
    ours = [main_wds.crop_box(height, width) for _ in range(n)]
    theirs = [v2.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    assert all(0 <= top <= height - h and 0 <= left <= width - w and h * w > 0 for top, left, h, w in ours)
    for a, b in zip(numpy.array(ours).T, numpy.array(theirs).T, strict=True):
        values = numpy.union1d(a, b)
        distance = abs(
            numpy.searchsorted(numpy.sort(a), values, "right") - numpy.searchsorted(numpy.sort(b), values, "right")
        )
        assert distance.max() / n < 0.05


def test_random_crop_is_torchvisions_of_the_same_box():
    decoded = main_wds.decode_tensor(saved())
    mirrored = 0
    for seed in range(40):
        random.seed(seed)
        box = main_wds.crop_box(*decoded.shape[1:])
        random.seed(seed)
        ours, theirs = main_wds.random_crop(decoded, 48), v2.functional.resized_crop(decoded, *box, [48, 48])
        assert ours.shape == (3, 48, 48) and main_wds.channels_last(ours).is_contiguous()
        away = [(ours.int() - image.int()).abs().max() for image in (theirs, theirs.flip(2))]
        same = [bool(most <= 1) for most in away]  # processors without AVX2 round otherwise
        assert sum(same) == 1
        mirrored += same[1]
    assert 10 < mirrored < 30


def test_both_options_give_the_same_validation(tmp_path):
    """Normalised as the network gets them: a mean absolute difference of less than 1/255 of the pixels' range."""
    args = argparse.Namespace(image_size=224, augmentation="full", dummy=False)
    run("tests/sample.py", "--train", 1, cwd=tmp_path)
    images = datasets.ImageFolder(tmp_path / "data" / "val").imgs
    assert len(images) == 200
    means = []
    for path, _ in images:
        pil, tensor = (
            main_wds.make_transform(argparse.Namespace(**vars(args), decode=decode), "val")(
                main_wds.load_image(path, main_wds.DECODERS[decode])
            )
            for decode in ("pil", "tensor")
        )
        mean, std = main_wds.torch.tensor(main_wds.MEAN), main_wds.torch.tensor(main_wds.STD)
        assert tensor.dtype == main_wds.torch.uint8 and tensor.shape == (224, 224, 3)
        means.append(float((pil.permute(1, 2, 0) * std + mean - tensor / 255).abs().mean()))
    assert 0 < numpy.mean(means) < 1 / 255 and max(means) < 2 / 255
