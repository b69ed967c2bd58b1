"""Inputs of the Python API, checked and converted to arrays: tokens, masks, images, prompts.

B rows, T length, I images of a row, K tokens of an image.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence, Set
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from t5g2.core.batch import Sequences, image_blocks
from t5g2.core.errors import UserError
from t5g2.data import image_tokens
from t5g2.data import images as image_files
from t5g2.data.image_tokens import START_OF_IMAGE
from t5g2.data.images import DEFAULT_PROCESSOR, ImageProcessor
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.models.config import ImageConfig, SiglipTextConfig, TextConfig

_CROPPED = f"Here is the original image {START_OF_IMAGE} and here are some crops to help you see better "


def tokens(name: str, values: Any, stack: TextConfig) -> Int[np.ndarray, "B T"]:
    """Returns token ids as int32[B, T].

    Args:
      name: name of the argument, for messages.
      values: rows of ids.
      stack: the stack that reads them.

    Raises:
      UserError: the shape is not [rows, length], or an id is outside the vocabulary.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{name} has rows of different lengths; pad them to one length, and mask the padding") from None
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}; it must be whole numbers of shape [rows, length], such as "
            f"[[2, 17, 4]]"
        )
    # the id of the image token may lie above the vocabulary
    known = (array >= 0) & (array < stack.vocab_size)
    if stack.images is not None:
        known |= array == stack.images.token
    if not known.all():
        raise UserError(
            f"{name} holds the id {array[~known][0]}; ids of this model's vocabulary are 0 to {stack.vocab_size - 1}"
        )
    return array.astype(np.int32)


def mask(name: str, values: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "B T"]:
    """Returns bool[B, T], True where there is a token; values None = everywhere.

    Raises:
      UserError: the mask does not have the shape of the tokens, or holds other values than 0 and 1.
    """
    if values is None:
        return np.ones(shape, bool)
    array = np.asarray(values)
    if array.shape != shape or not np.isin(array, (0, 1)).all():
        raise UserError(
            f"{name} is {array.dtype}{list(array.shape)}; it must be bool or 0 and 1 of shape {list(shape)}, that of "
            f"the tokens"
        )
    return array.astype(bool)


def sequences(
    tokens_BT: np.ndarray, valid_BT: np.ndarray, *, counted: bool, image_token: int | None = None
) -> Sequences:
    """Returns tokens with segments and positions; for tokens [7 8 9], of which the first is padding:

        tokens [0 8 9]   segments [0 1 1]   positions [0 1 2], or counted [0 0 1]

    Args:
      tokens_BT: token ids.
      valid_BT: True where there is a token, False at padding.
      counted: positions count tokens only, not columns.
      image_token: runs of this token become blocks; None = no blocks.
    """
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    # columns before the first token get position 0; they are padding, so no token attends to them
    if counted:
        positions_BT = np.maximum(np.cumsum(valid_BT, axis=1, dtype=np.int32) - 1, 0)
    # ids at padding are arbitrary; 0 keeps them from being taken for image tokens
    tokens_BT = np.where(valid_BT, tokens_BT, 0)
    blocks = None if image_token is None else image_blocks(tokens_BT, image_token)
    return Sequences(tokens_BT, valid_BT.astype(np.int32), positions_BT, blocks)


def images(
    images_by_row: Any, rows: int, size: int, processor: ImageProcessor = DEFAULT_PROCESSOR
) -> tuple[Float[np.ndarray, "B I H W 3"], list[int]]:
    """Returns (float32 images as the tower reads them, rows with fewer filled up with zeros; the number of each row).

    Args:
      images_by_row: an array [B, I, H, W, 3]; or for each row a list of images, or one image. An image is a file
        (its path, its content, or open), a PIL image, or an array [H, W, 3]: whole numbers from 0 to 255 of any size,
        or floats of the tower's size in the range of the processor's values, which is [-1, 1] by default.

    Raises:
      UserError: there is no list of rows, or one of another length; a file is not an image; numbers are out of range
        or of another size.
    """
    images_by_row = _image_rows(images_by_row, rows)
    by_row = [[prepare_image(image, size, processor) for image in row] for row in images_by_row]
    counts = [len(row) for row in by_row]
    array = np.zeros((rows, max(counts, default=0), size, size, 3), np.float32)
    for row, prepared_row in enumerate(by_row):
        for number, image in enumerate(prepared_row):
            array[row, number] = image
    return array, counts


def image_list(images: Any) -> list[Any]:
    """Returns a list of images, or an array [I, H, W, 3], as a list.

    Raises:
      UserError: there is none; or it is a single image, or no list at all.
    """
    images = _as_list(images, "images is one image; give a list of them: [image]", "give a list of images")
    if not images:
        raise UserError("images is empty; give a list of at least one")
    return images


def prepare_image(image: Any, size: int, processor: ImageProcessor) -> Float[np.ndarray, "H W 3"]:
    """Returns one image as float32, as the tower reads it; `image` as in `images`."""
    array = pixels(image)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return image_files.preprocess(array, size, processor)
    low, high = processor.limits
    if array.shape != (size, size, 3) or not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"an image is {array.dtype}{list(array.shape)}; arrays are whole numbers from 0 to 255 of shape [height, "
            f"width, 3], or floats in [{low:g}, {high:g}] of the tower's own size, [{size}, {size}, 3]"
        )
    # pixels of 0 to 255 or 0 to 1 as floats are the common mistakes; the first is caught here
    slack = 1e-6 * (high - low)
    if not ((low - slack <= array) & (array <= high + slack)).all():
        raise UserError(
            f"an image of floats reaches from {array.min():g} to {array.max():g}; floats must lie in "
            f"[{low:g}, {high:g}], as the model's image processor makes them, or give it as uint8"
        )
    return array.astype(np.float32)


def pixels(image: Any) -> np.ndarray:
    """Returns an image as an array: uint8[H, W, 3] of a file or a PIL image; whole numbers as uint8, floats unchanged.

    Raises:
      UserError: as images.read; whole numbers that are not 0 to 255.
    """
    if isinstance(image, Image.Image):
        return image_files.from_pillow(image)
    if isinstance(image, str | PathLike | bytes) or hasattr(image, "read"):
        return image_files.read(image)
    array = np.asarray(image)
    if array.dtype == object:
        raise UserError(
            f"an image is of type {type(image).__name__}; give a file (its path, its content, or open), a PIL image "
            f"or an array"
        )
    if np.issubdtype(array.dtype, np.integer) and array.dtype != np.uint8 and array.size:
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise UserError(
                f"an image of {array.dtype} reaches from {low} to {high}; whole numbers are 0 to 255, so scale it"
            )
        array = array.astype(np.uint8)
    return array


def with_crops(prompts: Sequence[str], images_by_prompt: Any, most_crops: int) -> tuple[list[str], list[list[Any]]]:
    """Returns (the prompts, the images of each with the crops of long images after them), known as pan-and-scan.

    The words around the crops are those of transformers' Gemma3Processor.

    Raises:
      UserError: as `images` and `prompt`; images of floats, which have the tower's size already and cannot be cropped.
    """
    rows = _image_rows(images_by_prompt, len(prompts))
    texts, images = [], []
    for text, row in zip(prompts, rows, strict=True):
        arrays = [pixels(image) for image in row]
        # floats have the tower's size already, so crops would lose resolution
        if any(array.dtype != np.uint8 for array in arrays):
            raise UserError("crops are made of files, PIL images and uint8 arrays; give one, or crops=0")
        parts = image_tokens.split(text, len(row))
        prompt_text, prompt_images = parts[0], []
        for array, part in zip(arrays, parts[1:], strict=True):
            crops = image_files.pan_and_scan(array, max_crops=most_crops)
            prompt_images += [array, *crops]
            prompt_text += _CROPPED + " ".join([START_OF_IMAGE] * len(crops)) if crops else START_OF_IMAGE
            prompt_text += part
        texts.append(prompt_text)
        images.append(prompt_images)
    return texts, images


def check_whole(**numbers: Any) -> None:
    """Raises UserError unless all are whole numbers, of Python or of numpy."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise UserError(f"{name} is {number!r} of type {type(number).__name__}; it must be a whole number")


def check_texts(name: str, texts: Any) -> list[str]:
    """Returns texts as a list.

    Raises:
      UserError: they are no list, or not all of them texts that UTF-8 can hold.
    """
    if isinstance(texts, str):
        raise UserError(f"{name} is one text; give a list of them: [text]")
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray | Mapping | Set):
        raise UserError(f"{name} is {texts!r} of type {type(texts).__name__}; it must be a list of texts")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name}[{number}] is {text!r} of type {type(text).__name__}; it must be a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name}[{number}] has half of a character, U+{ord(text[error.start]):04X}, at place {error.start}; "
                f"it must be text that UTF-8 can hold"
            ) from None
    return texts


def prompt(tokenizer: Tokenizer, text: str, count: int, config: ImageConfig | None) -> np.ndarray:
    """Returns int32[T], a prompt with `count` images, without BOS.

    Images are at the places of <start_of_image> in the text, or in front if there is none; their tokens are those of
    image_tokens.encode.

    Raises:
      UserError: the numbers of images and of <start_of_image> differ.
    """
    if not count:
        return tokenizer.encode(text)
    assert config is not None
    return image_tokens.encode(tokenizer.encode, image_tokens.split(text, count), config)


def siglip_tokens(tokenizer: Tokenizer, texts: Sequence[str], config: SiglipTextConfig) -> Int[np.ndarray, "B T"]:
    """Returns int32[B, length], texts in the form of SigLIP's training (as in transformers' SiglipTokenizer).

    They are in lower case, without punctuation, cut to length - 1 tokens; </s> ends a text and fills up its row.
    """
    # SigLIP's text tower has no mask: it was trained on rows filled up with </s>
    rows = np.full((len(texts), config.length), tokenizer.special_tokens.eos, np.int32)
    punctuation = str.maketrans("", "", string.punctuation)
    for row, text in zip(rows, texts, strict=True):
        plain = re.sub(r"\s+", " ", text.lower().translate(punctuation)).strip()
        ids = tokenizer.encode(plain)[: config.length - 1]
        row[: len(ids)] = ids
    return rows


def siglip_ids(values: Any, config: SiglipTextConfig) -> Int[np.ndarray, "B T"]:
    """Returns token ids as int32[B, length].

    Raises:
      UserError: the shape is not [texts, length], or an id is outside the vocabulary.
    """
    array = np.asarray(values)
    is_valid = array.ndim == 2 and array.shape[1] == config.length and np.issubdtype(array.dtype, np.integer)
    if not is_valid or array.min(initial=0) < 0 or array.max(initial=0) >= config.vocab_size:
        raise UserError(
            f"texts is {array.dtype}{list(array.shape)}; give a list of texts, or ids from 0 to "
            f"{config.vocab_size - 1} of shape [texts, {config.length}]"
        )
    return array.astype(np.int32)


def _image_rows(images_by_row: Any, rows: int) -> list[list[Any]]:
    """Returns the images of each row as a list; a row is given as a list, an array [I, H, W, 3], or a single image.

    Raises:
      UserError: there is no list of rows, or one of another length.
    """
    fix = "give a list for each row, [] for a row without images"
    listed = _as_list(images_by_row, "images is one image; give a list of images for each row: [[image]]", fix)
    if len(listed) != rows:
        raise UserError(f"images are given for {len(listed)} rows and there are {rows}; {fix}")
    is_list = [isinstance(row, list | tuple) or getattr(row, "ndim", 0) == 4 for row in listed]
    return [list(row) if many else [row] for row, many in zip(listed, is_list, strict=True)]


def _as_list(images: Any, single: str, fix: str) -> list[Any]:
    """Returns images, or rows of them, as a list.

    Raises:
      UserError: it is one image, which a list would take apart (the message `single`); or has no order, or is no list.
    """
    is_open = hasattr(images, "read")
    if (
        isinstance(images, str | PathLike | bytes | bytearray | Image.Image)
        or is_open
        or getattr(images, "ndim", 4) == 3
    ):
        raise UserError(single)
    if not isinstance(images, Iterable) or isinstance(images, Mapping | Set) or getattr(images, "ndim", 4) < 3:
        raise UserError(f"images is of type {type(images).__name__}; {fix}")
    return list(images)
