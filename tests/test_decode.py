"""Every kind of file that ImageNet holds decodes to the same pixels with both decoders, and is augmented alike."""

import argparse
import io
import random

import numpy
import pytest
from conftest import load, run
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

main_wds = load("main-wds.py")
PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=numpy.uint8)).resize((120, 90))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees: ignored, as the original does
GREY16 = Image.fromarray(numpy.arange(9000, dtype=numpy.uint16).reshape(90, 100) * 7)


def saved(image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


TWELVE_BITS = saved().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")  # of which neither knows what to do


@pytest.mark.parametrize(
    "data",
    [
        saved(),
        saved(PICTURE.convert("L")),
        saved(PICTURE.convert("CMYK")),
        saved(progressive=True),
        saved(exif=EXIF),
        saved() + b"trailing bytes",
        saved(format="PNG"),
        saved(PICTURE.convert("P"), format="PNG"),
        saved(GREY16, format="PNG"),
        saved(format="WEBP"),
    ],
    ids=["jpeg", "grey", "cmyk", "progressive", "exif", "trailing", "png", "palette", "png16", "webp"],
)
def test_same_pixels(data):
    tensor, pil = main_wds.decode_tensor(("name", data)), main_wds.decode_pil(("name", data))
    assert tensor.shape == (3, pil.height, pil.width) and pil.mode == "RGB"
    assert numpy.array_equal(tensor.numpy(), numpy.asarray(pil).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff\xd9", saved()[:1000], saved(format="PNG")[:1000], b"GIF89a", b"text", TWELVE_BITS]
)
def test_what_neither_decodes_is_named(data):
    for decode in (main_wds.decode_tensor, main_wds.decode_pil):
        with pytest.raises(main_wds.DataError, match="some name: not a readable image"):
            decode(("some name", data))


def test_the_fast_decoder_is_there():
    """Else all of the above is Pillow's work."""
    assert hasattr(main_wds.torch.ops.image, "decode_jpeg")


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
    decoded = main_wds.decode_tensor(("name", saved()))
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


def test_both_decoders_give_the_same_validation(tmp_path):
    """Normalised as the network gets them: a mean absolute difference of less than 1/255 of the pixels' range."""
    args = argparse.Namespace(image_size=224, augmentation="full", dummy=False)
    run("tests/sample.py", "--train", 1, cwd=tmp_path)
    images = datasets.ImageFolder(tmp_path / "data" / "val", loader=main_wds.read_file).imgs
    assert len(images) == 200
    means = []
    for path, _ in images:
        pil, tensor = (
            main_wds.make_transform(argparse.Namespace(**vars(args), decode=decode), "val")(main_wds.read_file(path))
            for decode in ("pil", "tensor")
        )
        mean, std = main_wds.torch.tensor(main_wds.MEAN), main_wds.torch.tensor(main_wds.STD)
        assert tensor.dtype == main_wds.torch.uint8 and tensor.shape == (224, 224, 3)
        means.append(float((pil.permute(1, 2, 0) * std + mean - tensor / 255).abs().mean()))
    assert 0 < numpy.mean(means) < 1 / 255 and max(means) < 2 / 255
