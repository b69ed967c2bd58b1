"""Reads the image processor of a folder: how transformers would make a tower's inputs from pixels.

It is in processor_config.json under image_processor (transformers 5), else in preprocessor_config.json. A field that is
absent, and a folder without either file, has the value of Gemma 3's processor, or of SigLIP's for a dual encoder.

Source: transformers 5.23.0, image_processing_base.py, models/gemma3/image_processing_gemma3.py and
models/siglip/image_processing_siglip.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.data.images import ImageProcessor, Resampling

PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
FILES = (PROCESSOR_FILE, PREPROCESSOR_FILE)
# the filter of each class
CLASSES: dict[str, Resampling] = {"Gemma3ImageProcessor": "bilinear", "SiglipImageProcessor": "bicubic"}
SUFFIXES = ("Fast", "Pil")
FIX = "download it again, or remove it"
# fields that would change the pixels, with the values that leave them as they are here
FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (None, True),
    "do_convert_rgb": (None, True),
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "do_grayscale": (None, False),
}


def read(folder: Path, *, default: Resampling) -> ImageProcessor:
    """Returns the image processor of a folder.

    Args:
      default: filter of a folder whose files give none.

    Raises:
      UserError: a file is damaged; a value of another type; a processor, or a value of a field, that is not supported.
    """
    file, data = _fields(folder)
    name = data.get("image_processor_type", data.get("feature_extractor_type"))
    if name is not None:
        default = CLASSES.get(_base_class(name), default)
    _check_supported(file, data, name)
    resample = data.get("resample")
    filters = {int(Image.Resampling[name.upper()]): name for name in get_args(Resampling)}
    if resample is not None and (type(resample) is not int or resample not in filters):
        numbers = ", ".join(f"{number} ({filters[number]})" for number in sorted(filters))
        raise _unsupported(file, "resample", resample, f"Pillow's numbers of filters: {numbers}")
    return ImageProcessor(
        resampling=default if resample is None else filters[resample],
        scale=_number(file, data, "rescale_factor", 1 / 255) if _boolean(file, data, "do_rescale") else 1.0,
        **_normalization(file, data),
    )


def has_files(folder: Path) -> bool:
    """True if a folder says how its tower's inputs are made."""
    return any((folder / name).is_file() for name in FILES)


def to_dict(processor: ImageProcessor, size: int, *, family: Literal["Gemma3", "Siglip"] = "Gemma3") -> dict[str, Any]:
    """Returns a preprocessor_config.json of a model of a family, whose images have this size in pixels."""
    return {
        "processor_class": f"{family}Processor",
        "image_processor_type": f"{family}ImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": int(Image.Resampling[processor.resampling.upper()]),
        "do_rescale": True,
        "rescale_factor": processor.scale,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


def _fields(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Returns (the file that has the image processor, its fields)."""
    file = folder / PROCESSOR_FILE
    if file.is_file():
        nested = files.read_json_object(file, fix=FIX).get("image_processor")
        if isinstance(nested, Mapping):
            return file, nested
        if nested is not None:
            raise _unsupported(file, "image_processor", nested, "an object that holds the settings of a processor")
    file = folder / PREPROCESSOR_FILE
    return file, files.read_json_object(file, fix=FIX) if file.is_file() else {}


def _base_class(name: Any) -> str:
    for suffix in SUFFIXES:
        name = str(name).removesuffix(suffix)
    return name


def _check_supported(file: Path, data: Mapping[str, Any], name: Any) -> None:
    if name is not None and _base_class(name) not in CLASSES:
        raise _unsupported(file, "image_processor_type", name, ", ".join(CLASSES))
    for key, allowed in FIXED.items():
        if data.get(key) not in allowed:
            raise _unsupported(file, key, data[key], f"{str(allowed[1]).lower()}; images are resized, as RGB, whole")
    if data.get("do_pan_and_scan"):
        raise _unsupported(
            file, "do_pan_and_scan", data["do_pan_and_scan"], "false; give the number of crops where text is generated"
        )
    size = data.get("size")
    # the tower takes one size, so only the shape matters
    square = type(size) is int or (isinstance(size, Mapping) and size.get("height", 0) == size.get("width"))
    if size is not None and not square:
        raise _unsupported(file, "size", size, "a height and a width that are equal")


def _normalization(file: Path, data: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    if not _boolean(file, data, "do_normalize"):
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values = {}
    for name in ("mean", "std"):
        value = data.get(f"image_{name}")
        numbers = [0.5] * 3 if value is None else [value] * 3 if _is_number(value) else value
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise _unsupported(file, f"image_{name}", value, "a number, or three of them")
        if name == "std" and not all(number > 0 for number in numbers):
            raise _unsupported(file, "image_std", value, "numbers above 0")
        values[name] = tuple(map(float, numbers))
    return values


def _boolean(file: Path, data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise _unsupported(file, key, value, "true or false")
    return value is not False


def _number(file: Path, data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key)
    if value is not None and not (_is_number(value) and value > 0):
        raise _unsupported(file, key, value, "a number above 0")
    return default if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unsupported(file: Path, key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{file}: {key} = {value!r}; supported: {allowed}. Change the file, or give another folder")
