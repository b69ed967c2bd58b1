"""Reading of image files, preprocessing of pixels for an image tower, and a check of image tokens. NumPy and Pillow.

H height, W width, T length of a row of tokens, B rows. Sources: the Gemma 3 and SigLIP image processors of transformers
5.23.0 (image_processing_pil_gemma3.py, image_processing_pil_siglip.py), which the tests compare with.
"""

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps

from t5g2.core.errors import UserError, unknown

Resampling = Literal["bilinear", "bicubic"]
Pixels = UInt8[np.ndarray, "H W 3"]

FORMATS = ("JPEG", "PNG", "WEBP")
ALLOWED = "images are JPEG, PNG or WebP"
# 256 MiB as RGB. Pillow warns of a decompression bomb above this number (PIL.Image.MAX_IMAGE_PIXELS); here it is an
# error.
MAX_PIXELS = 89_478_485
# of a file: twice the size of MAX_PIXELS without compression
MAX_BYTES = 2**29

# the first bytes of other kinds of files, for the message: (offset, bytes, name)
OTHER_FORMATS = (
    (128, b"DICM", "a DICOM file"),
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (0, b"II*\x00", "a TIFF"),
    (0, b"MM\x00*", "a TIFF"),
    (0, b"%PDF", "a PDF"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (0, b"<svg", "an SVG"),
    (0, b"<?xml", "an SVG or other XML"),
)
# errors that Pillow's readers are known to raise on damaged files
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def read(source: str | os.PathLike | bytes, *, name: str | None = None) -> Pixels:
    """Returns uint8[H, W, 3], the pixels of an image file as RGB.

    The image is rotated to its EXIF orientation, as every viewer and transformers' load_image do (transformers'
    processors ignore the tag of an image that is already open). Colours of a palette are looked up; transparency is
    dropped, as in transformers: the colour underneath shows. Grey of 16 bits is scaled to 8, whereas transformers,
    through Pillow, makes everything above 255 white. CMYK becomes RGB without a colour profile, and other profiles are
    ignored. Of an animation, the first frame is read.

    Args:
      source: a file, or its content.
      name: name of the image in errors; None = the file's path.

    Raises:
      UserError: the file does not exist, is not a JPEG, PNG or WebP, is damaged or cut off, or has more than
        MAX_PIXELS.
    """
    if not isinstance(source, bytes):
        name = str(source) if name is None else name
        source = read_bytes(source, name=name)
    name = "the image given as bytes" if name is None else name
    if len(source) > MAX_BYTES:
        raise UserError(
            f"{name} has more than {MAX_BYTES >> 20} MiB, too many for any image within the size limit; {_size_limit()}"
        )
    with warnings.catch_warnings():
        # Pillow warns of sizes, which are checked below, and of odd metadata, which is not used
        warnings.simplefilter("ignore")
        try:
            return _to_rgb(_decode(source, name))
        except UserError:
            raise
        except Image.DecompressionBombError:
            raise UserError(f"{name} declares more than {2 * MAX_PIXELS} pixels; {_size_limit()}") from None
        except DECODER_ERRORS as error:
            raise UserError(f"{name} cannot be read, it is damaged or cut off: {error}; get it again") from None


def read_bytes(path: str | os.PathLike, *, name: str | None = None) -> bytes:
    """Returns the content of an image file, or as much of it as `read` needs to find it too large.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    name = str(path) if name is None else name
    if path.exists() and not path.is_file():  # a pipe might be waited for without end
        raise UserError(f"{name} is {'a folder' if path.is_dir() else 'not a file'}; give the file of one image")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name!r} cannot be opened: {reason}; give the path of an image") from None


def preprocess(image: Pixels, size: int, *, resampling: Resampling = "bilinear") -> Float[np.ndarray, "size size 3"]:
    """Returns float32[size, size, 3] in [-1, 1]: the resized image x as x / 127.5 - 1.

    Raises:
      UserError: as in `resize`.
    """
    pixels_HWC = resize(image, size, resampling=resampling)
    return pixels_HWC.astype(np.float32) / np.float32(127.5) - np.float32(1)


def resize(image: Pixels, size: int, *, resampling: Resampling = "bilinear") -> UInt8[np.ndarray, "size size 3"]:
    """Returns uint8[size, size, 3]: the image at size x size, whatever its aspect ratio was.

    Resampled by Pillow on uint8: antialiased, and rounded to whole numbers.

    Args:
      image: uint8[H, W, 3].
      resampling: "bilinear" (Gemma 3) or "bicubic" (the published preprocessor of MedSigLIP; its training resampled
        bilinearly without antialiasing, according to its sample code).

    Raises:
      UserError: the image is another array, or there is no such resampling.
    """
    if resampling not in get_args(Resampling):
        raise unknown("resampling", resampling, get_args(Resampling))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"the image is {image.dtype}{list(image.shape)}; it must be uint8[height, width, 3]")
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(Image.fromarray(image).resize((size, size), filters[resampling]))


def pan_and_scan(image: Pixels, *, min_ratio: float = 1.2, max_crops: int = 4, min_side: int = 256) -> list[Pixels]:
    """Returns crops that cover a long image from left to right or from top to bottom, to be read after the image.

    Their number is the rounded aspect ratio, but at least 2 and at most `max_crops`. There are none if the ratio is
    below `min_ratio`, or if a crop would be less than `min_side` pixels wide or high. The last may be narrower by the
    remainder. 600 x 300:

        ratio 2: 2 crops, columns 0-299 and 300-599

    The defaults are transformers' (processing_gemma3.py), which makes no crops by default.
    """
    height, width = image.shape[:2]
    long, short = max(height, width), min(height, width)
    if long / short < min_ratio:
        return []
    number = min(math.floor(long / short + 0.5), long // min_side)
    number = min(max(number, 2), max_crops)
    size = math.ceil(long / number)
    if min(size, short) < min_side:
        return []
    cuts = [slice(size * i, size * (i + 1)) for i in range(number)]
    return [image[:, cut] if width >= height else image[cut] for cut in cuts]


def check_images(
    tokens_BT: Int[np.ndarray, "B T"], image_token: int, *, tokens_per_image: int, images_per_row: Sequence[int]
) -> None:
    """Checks that every row of tokens has as many image tokens as its images take.

    tokens [[5 8 8 9 8 8], [5 8 8 9 9 9]], image_token = 8, tokens_per_image = 2: images_per_row [2, 1] passes.

    Raises:
      UserError: a row does not match; the message has both numbers of the first such row.
    """
    count_B = (np.asarray(tokens_BT) == image_token).sum(axis=1)
    if len(count_B) != len(images_per_row):
        raise UserError(
            f"images are given for {len(images_per_row)} rows and there are {len(count_B)} rows of tokens; give a "
            f"number for each row, 0 where there are none"
        )
    for row, (count, images) in enumerate(zip(count_B, images_per_row, strict=True)):
        if count != images * tokens_per_image:
            raise UserError(
                f"row {row} has {count} image tokens (id {image_token}) and {images} images, which take "
                f"{images * tokens_per_image} ({tokens_per_image} each); give as many of one as of the other"
            )


def _decode(data: bytes, name: str) -> Image.Image:
    """Returns the image, loaded and upright."""
    if not data:
        raise UserError(f"{name} is empty; {ALLOWED}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is {_describe_format(data)}; {ALLOWED}, so convert it or get it again") from None
    # checked before loading, which would allocate the pixels
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels; {_size_limit()}")
    if image.format == "PNG":
        # loading does not check a PNG's checksums, and an image that was verified cannot be loaded
        image.verify()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        # Pillow clips 16 bits to 8 instead of scaling them
        grey_HW = np.asarray(image).astype(np.float64) / 257  # 65535 / 255
        grey_HW = np.clip(np.round(grey_HW), 0, 255).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):
        # through RGBA, because the palette may hold transparent colours
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _describe_format(data: bytes) -> str:
    """Returns the likely format of a file that cannot be read, with an article."""
    for offset, start, name in OTHER_FORMATS:
        if data[offset : offset + len(start)] == start:
            return name
    starts = ((b"\xff\xd8", "JPEG"), (b"\x89PNG", "PNG"), (b"RIFF", "WebP"))
    damaged = next((name for start, name in starts if data.startswith(start)), None)
    return "not an image" if damaged is None else f"a {damaged} that is damaged or cut off"


def _size_limit() -> str:
    return f"images have at most {MAX_PIXELS} pixels, so make it smaller"
