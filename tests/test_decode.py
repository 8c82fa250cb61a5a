"""Every kind of file that ImageNet holds decodes to the same pixels with both decoders."""

import io

import numpy
import pytest
from conftest import load
from PIL import Image

main_wds = load("main-wds.py")
PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=numpy.uint8)).resize((120, 90))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn by 90 degrees: ignored, as the original does
GREY16 = Image.fromarray(numpy.arange(9000, dtype=numpy.uint16).reshape(90, 100) * 7)


def saved(image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


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
    "data", [b"", b"\xff\xd8\xff\xd9", saved()[:1000], saved(format="PNG")[:1000], b"GIF89a", b"text"]
)
def test_what_neither_decodes_is_named(data):
    for decode in (main_wds.decode_tensor, main_wds.decode_pil):
        with pytest.raises(main_wds.DataError, match="some name: not a readable image"):
            decode(("some name", data))


def test_the_fast_decoder_is_there():
    """Else all of the above is Pillow's work."""
    assert hasattr(main_wds.torch.ops.image, "decode_jpeg")
