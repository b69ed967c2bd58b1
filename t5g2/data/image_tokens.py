"""Images among tokens: where they stand in a text, and the tokens that they take in a row.

T length of a row of tokens, K tokens of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data.images import Resampling

START_OF_IMAGE = "<start_of_image>"


class ImageTokenLayout(Protocol):
    """What an image is in a row of tokens: a model's ImageConfig, a run's ImageRows."""

    @property
    def token(self) -> int:
        """The id of an image token."""
        ...

    @property
    def begin(self) -> int:
        """The id of what stands before an image."""
        ...

    @property
    def end(self) -> int:
        """The id of what stands after an image."""
        ...

    @property
    def tokens(self) -> int:
        """K, how many image tokens an image takes."""
        ...


@dataclass(frozen=True)
class ImageRows:
    """The images of a run's rows; what they are follows from the model and the tokenizer.

    Attributes:
      per_row: the most images of a row.
      size: of an image as the tower reads it, in pixels.
      tokens: that an image takes.
      token, begin, end: the ids of an image token, and of what stands before and after an image's.
      resampling: how images are brought to the size.
    """

    per_row: int
    size: int
    tokens: int
    token: int
    begin: int
    end: int
    resampling: Resampling = "bilinear"

    def __post_init__(self):
        if self.per_row < 1:
            raise UserError(f"per_row = {self.per_row}; a row has room for at least 1 image")


def split(text: str, count: int) -> list[str]:
    """The parts of a text around its images.

    Raises:
      UserError: it says <start_of_image>, and not as often as there are images.
    """
    parts = text.split(START_OF_IMAGE) if START_OF_IMAGE in text else [""] * count + [text]
    if len(parts) != count + 1:
        raise UserError(
            f"the text {text[:60]!r} says {START_OF_IMAGE} {len(parts) - 1} times and has {count} images; say it "
            f"once for each, or not at all"
        )
    return parts


def encode(encode_text: Callable[[str], np.ndarray], parts: list[str], layout: ImageTokenLayout) -> np.ndarray:
    """int32[T]: the parts of a text with an image between each two, without BOS.

    An image becomes, as in transformers' Gemma3Processor: newline newline, the start token, K image tokens, the end
    token, newline newline. With bytes as ids, begin = 1, end = 2, token = 3, tokens = 4, parts ["", "Hi"]:

        [10 10  1  3  3  3  3  2 10 10 72 105]
    """
    image = np.array([layout.begin, *[layout.token] * layout.tokens, layout.end], np.int32)
    last = len(parts) - 1
    chunks = []
    for number, part in enumerate(parts):
        before, after = "\n\n" if number else "", "\n\n" if number < last else ""
        chunks += [encode_text(before + part + after), image]
    return np.concatenate(chunks[:-1])


def replace_image_tokens(tokens: np.ndarray, layout: ImageTokenLayout, unk: int) -> np.ndarray:
    """The tokens of a text, an image token that it spells out as unk: there is no image to stand for."""
    return np.where(tokens == layout.token, np.int32(max(unk, 0)), tokens)
