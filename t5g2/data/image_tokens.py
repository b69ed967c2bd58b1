"""Images in a sequence of tokens: their positions in a text, and their tokens in a row.

T length of a row of tokens, K tokens of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from t5g2.core.bounds import Size, TokenId, checked
from t5g2.core.errors import UserError
from t5g2.data.images import Resampling

START_OF_IMAGE = "<start_of_image>"


class ImageTokenLayout(Protocol):
    """Token ids of an image in a row; both a model's ImageConfig and a run's ImageRows satisfy this protocol."""

    @property
    def token(self) -> int:
        """The id of an image token."""
        ...

    @property
    def begin(self) -> int:
        """The id of the token before an image."""
        ...

    @property
    def end(self) -> int:
        """The id of the token after an image."""
        ...

    @property
    def tokens(self) -> int:
        """K, the number of image tokens of an image."""
        ...


@dataclass(frozen=True)
@checked
class ImageRows:
    """The images of a run's rows, which follow from the model and the tokenizer.

    Attributes:
      per_row: the maximum number of images in a row.
      size: width and height of an image as the image tower reads it, in pixels.
      tokens: K, the number of image tokens of an image.
      token, begin, end: the ids of an image token, and of the tokens before and after an image.
      resampling: method of resizing.
    """

    per_row: Size
    size: Size
    tokens: Size
    token: TokenId
    begin: TokenId
    end: TokenId
    resampling: Resampling = "bilinear"


def split(text: str, count: int) -> list[str]:
    """Returns the parts of a text around its images.

    Raises:
      UserError: the text has <start_of_image>, but not once for each image.
    """
    # without any <start_of_image>, the images come before the text
    parts = text.split(START_OF_IMAGE) if START_OF_IMAGE in text else [""] * count + [text]
    if len(parts) != count + 1:
        raise UserError(
            f"the text {text[:60]!r} has {START_OF_IMAGE} {len(parts) - 1} times and {count} images; write it once "
            f"for each image, or not at all"
        )
    return parts


def encode(encode_text: Callable[[str], np.ndarray], parts: list[str], layout: ImageTokenLayout) -> np.ndarray:
    """Returns int32[T]: the parts of a text with an image between neighbours, without BOS.

    An image becomes, as in transformers' Gemma3Processor: newline newline, the start token, K image tokens, the end
    token, newline newline. With bytes as ids, begin = 1, end = 2, token = 3, tokens = 4, parts ["", "Hi"]:

        [10 10  1  3  3  3  3  2 10 10 72 105]
    """
    image = np.array([layout.begin, *[layout.token] * layout.tokens, layout.end], np.int32)
    last = len(parts) - 1
    sequences = []
    for number, part in enumerate(parts):
        before, after = "\n\n" if number else "", "\n\n" if number < last else ""
        # the line breaks are encoded with the text, because a tokenizer may merge them with it
        sequences += [encode_text(before + part + after), image]
    return np.concatenate(sequences[:-1])


def replace_image_tokens(tokens: np.ndarray, layout: ImageTokenLayout, unk: int) -> np.ndarray:
    """Returns a text's tokens with unk for every image token: the text spells it, and no image belongs to it."""
    return np.where(tokens == layout.token, np.int32(max(unk, 0)), tokens)
