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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps, features

from t5g2.core.bounds import checked
from t5g2.core.errors import UserError, unknown

Resampling = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Pixels = UInt8[np.ndarray, "H W 3"]

# Pillow has AVIF from 11.3 on, where it was built with it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))
ALLOWED = "images are JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"
# 256 MiB as RGB. Pillow warns of a decompression bomb above this number (PIL.Image.MAX_IMAGE_PIXELS); here it is an
# error.
MAX_PIXELS = 89_478_485
# of a file: twice the size of MAX_PIXELS without compression
MAX_BYTES = 2**29

# the first bytes of files, for the message: (offset, bytes, name)
OTHER_FORMATS = (
    (128, b"DICM", "a DICOM file"),
    (0, b"%PDF", "a PDF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftypmif1", "a HEIC"),
    (0, b"<svg", "an SVG"),
    (0, b"<?xml", "an SVG or other XML"),
)
KNOWN_FORMATS = (
    (0, b"\xff\xd8", "a JPEG"),
    (0, b"\x89PNG", "a PNG"),
    (0, b"RIFF", "a WebP"),
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (0, b"II*\x00", "a TIFF"),
    (0, b"MM\x00*", "a TIFF"),
    (4, b"ftypavi", "an AVIF"),
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


@dataclass(frozen=True)
@checked
class ImageProcessor:
    """Rule that makes a tower's inputs from pixels: resized, then (x * scale - mean) / std for each colour.

    The defaults are those of Gemma 3 and SigLIP: x / 127.5 - 1, in [-1, 1].
    """

    resampling: Resampling = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def is_default(self) -> bool:
        """True if the values are x / 127.5 - 1, whatever the resampling is."""
        return (self.scale, self.mean, self.std) == (1 / 255, (0.5,) * 3, (0.5,) * 3)

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value that a pixel can have."""
        ends = [(x * self.scale - mean) / std for x in (0, 255) for mean, std in zip(self.mean, self.std, strict=True)]
        return min(ends), max(ends)


DEFAULT_PROCESSOR = ImageProcessor()


def read(source: str | os.PathLike | bytes | IO[bytes], *, name: str | None = None) -> Pixels:
    """Returns uint8[H, W, 3], the pixels of an image file as RGB.

    The image is rotated to its EXIF orientation, as every viewer and transformers' load_image do (transformers'
    processors ignore the tag of an image that is already open). Colours of a palette are looked up; transparency is
    dropped, as in transformers: the colour underneath shows. Grey of 16 bits is scaled to 8, whereas transformers,
    through Pillow, makes everything above 255 white. CMYK becomes RGB without a colour profile, and other profiles are
    ignored. Of an animation, the first frame is read.

    Args:
      source: a file, its content, or a file that is open for reading bytes.
      name: name of the image in errors; None = the file's path.

    Raises:
      UserError: the file does not exist, has none of FORMATS, is damaged or cut off, or has more than MAX_PIXELS.
    """
    if isinstance(source, str | os.PathLike):
        name = str(source) if name is None else name
        source = read_bytes(source, name=name)
    elif not isinstance(source, bytes):
        name = "the image given as an open file" if name is None else name
        source = _read_open(source, name)
    name = "the image given as bytes" if name is None else name
    if len(source) > MAX_BYTES:
        raise UserError(
            f"{name} has more than {MAX_BYTES >> 20} MiB, too many for any image within the size limit; {_size_limit()}"
        )
    return _pixels(lambda: _decode(source, name), name)


def from_pillow(image: Image.Image) -> Pixels:
    """Returns uint8[H, W, 3] of an image that Pillow has opened; as `read`, but its EXIF orientation is left as it is.

    Raises:
      UserError: the image is empty, damaged or cut off, or has more than MAX_PIXELS.
    """
    name = f"the {image.format or 'image'} given as a PIL image"

    def load() -> Image.Image:
        _check_size(image, name)
        image.load()
        return image

    return _pixels(load, name)


def read_bytes(path: str | os.PathLike, *, name: str | None = None) -> bytes:
    """Returns the content of an image file, or as much of it as `read` needs to find it too large.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = Path(path).expanduser()
    name = str(path) if name is None else name
    if path.exists() and not path.is_file():  # a pipe might be waited for without end
        raise UserError(f"{name} is {'a folder' if path.is_dir() else 'not a file'}; give the file of one image")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name!r} cannot be opened: {reason}; give the path of an image") from None


def preprocess(
    image: Pixels, size: int, processor: ImageProcessor = DEFAULT_PROCESSOR
) -> Float[np.ndarray, "size size 3"]:
    """Returns float32[size, size, 3], the input of an image tower.

    Raises:
      UserError: as in `resize`.
    """
    pixels_HWC = resize(image, size, resampling=processor.resampling).astype(np.float32)
    if processor.is_default:
        # as models/image_embeddings.py computes it from uint8 in training
        return pixels_HWC / np.float32(127.5) - np.float32(1)
    mean, std = np.asarray(processor.mean, np.float32), np.asarray(processor.std, np.float32)
    return (pixels_HWC * np.float32(processor.scale) - mean) / std


def resize(image: Pixels, size: int, *, resampling: Resampling = "bilinear") -> UInt8[np.ndarray, "size size 3"]:
    """Returns uint8[size, size, 3]: the image at size x size, whatever its aspect ratio was.

    Resampled by Pillow on uint8: antialiased, and rounded to whole numbers.

    Args:
      image: uint8[H, W, 3].
      resampling: "bilinear" (Gemma 3), "bicubic" (the published preprocessor of MedSigLIP; its training resampled
        bilinearly without antialiasing, according to its sample code), or another filter of Pillow.

    Raises:
      UserError: the image is another array, or there is no such resampling.
    """
    if resampling not in get_args(Resampling):
        raise unknown("resampling", resampling, get_args(Resampling))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"the image is {image.dtype}{list(image.shape)}; it must be uint8[height, width, 3]")
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[resampling.upper()]))


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


def _read_open(file: IO[bytes], name: str) -> bytes:
    try:
        data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}; give a file that is open for reading") from None
    if not isinstance(data, bytes):
        raise UserError(f"{name} gives {type(data).__name__} instead of bytes; open it with mode 'rb'")
    return data


def _pixels(load: Callable[[], Image.Image], name: str) -> Pixels:
    """Returns the pixels of the image that `load` returns; what Pillow raises becomes a UserError."""
    with warnings.catch_warnings():
        # Pillow warns of sizes, which are checked, and of odd metadata, which is not used
        warnings.simplefilter("ignore")
        try:
            return _to_rgb(load(), name)
        except UserError:
            raise
        except Image.DecompressionBombError:
            raise UserError(f"{name} declares more than {2 * MAX_PIXELS} pixels; {_size_limit()}") from None
        except DECODER_ERRORS as error:
            raise UserError(f"{name} cannot be read, it is damaged or cut off: {error}; get it again") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width * height:
        raise UserError(f"{name} has {width} x {height} pixels, so it is empty; give one that has some")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels; {_size_limit()}")


def _decode(data: bytes, name: str) -> Image.Image:
    """Returns the image, loaded and upright."""
    if not data:
        raise UserError(f"{name} is empty; {ALLOWED}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is {_describe_format(data)}; {ALLOWED}, so convert it or get it again") from None
    # checked before loading, which would allocate the pixels
    _check_size(image, name)
    if image.format == "PNG":
        # loading does not check a PNG's checksums, and an image that was verified cannot be loaded
        image.verify()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, name: str) -> Pixels:
    if image.mode == "F":
        raise UserError(f"{name} holds floats, whose range is unknown; convert it to 8 or 16 bits")
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
    for offset, start, name in KNOWN_FORMATS:
        if data[offset : offset + len(start)] == start:
            return f"{name} that is damaged, cut off or of an unknown kind"
    return "not an image"


def _size_limit() -> str:
    return f"images have at most {MAX_PIXELS} pixels, so make it smaller"
