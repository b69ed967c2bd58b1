"""Documents with images, and what a run makes of them: chunks that are never cut, and pictures of the tower's size."""

import abc
from dataclasses import dataclass

import numpy as np

from t5g2.core.errors import UserError
from t5g2.data import image_tokens
from t5g2.data import images as pictures
from t5g2.data.image_tokens import START_OF_IMAGE, ImageRows
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.validation import MAX_PROBLEMS, ValidatedDocuments
from t5g2.data.tokenizers.base import Tokenizer


class ImageDocuments(ValidatedDocuments):
    """Texts with images; a text says <start_of_image> where each of its images stands."""

    @abc.abstractmethod
    def count(self, index: int) -> int:
        """How many images a document has."""

    @abc.abstractmethod
    def location(self, index: int) -> str:
        """Which record this is, in words."""

    @abc.abstractmethod
    def image_bytes(self, index: int, nth: int) -> bytes:
        """What the file of an image of a document holds.

        Raises:
          UserError: it is gone.
        """

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Not without knowing what an image takes: `fitted` does."""
        raise UserError(
            "texts with images have no tokens of their own: how many an image takes is the model's; read them in a run "
            "with data.images"
        )

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """As `token_lengths`."""
        return self.token_lengths(tokenizer)


@dataclass(frozen=True, eq=False)
class Fitted(Documents):
    """Those of some documents with images that fit into the rows of a run, as tokens.

    Attributes:
      numbers: int64[documents], which of `documents` these are.
      lengths: int64[documents], the tokens of each.
      too_long: how many do not fit, and `told`: the first of them and why.
    """

    documents: ImageDocuments
    rows: ImageRows
    numbers: np.ndarray
    lengths: np.ndarray
    too_long: int
    told: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Of all documents, texts and images; which of them fit follows from the settings."""
        return self.documents.fingerprint

    @property
    def characters(self) -> int:
        """Of all texts."""
        return self.documents.characters

    @property
    def skipped(self) -> int:
        """Records that could not be read, and those that do not fit."""
        return self.documents.skipped + self.too_long

    @property
    def problems(self) -> tuple[str, ...]:
        """The first of them, and what is wrong with each."""
        return (*self.documents.problems, *self.told)[:MAX_PROBLEMS]

    @property
    def is_indivisible(self) -> bool:
        """True: an image is not cut, nor taken from its text."""
        return True

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> str:
        return self.documents[int(self.numbers[index])]

    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """int64[documents]."""
        return self.lengths

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """int32[tokens] of a document, its images among them."""
        return _tokens(self[index], tokenizer, self.rows)

    def image(self, index: int, nth: int) -> pictures.Pixels:
        """uint8[size, size, 3], an image of a document as the tower is to read it.

        Raises:
          UserError: it is not what it was when the source was opened.
        """
        number = int(self.numbers[index])
        name = f"{self.documents.location(number)}, image {nth + 1}"
        image = pictures.read(self.documents.image_bytes(number, nth), name=name)
        return pictures.resize(image, self.rows.size, resampling=self.rows.resampling)


@dataclass(frozen=True)
class FilteredImageText:
    """A source of texts with images as a run reads it; it has the shape of the other sources.

    Attributes:
      text: the source.
      rows: what an image takes, and how many a row holds.
      chunk_tokens: the longest document that is read; longer ones are bad records.
    """

    text: "ImageSource"
    rows: ImageRows
    tokenizer: Tokenizer
    chunk_tokens: int

    def __str__(self) -> str:
        return str(self.text)

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Fitted:
        """The documents that fit.

        Raises:
          UserError: as the source; or one is too long or has more images than a row (unless such are skipped).
        """
        documents = self.text.open(on_bad_record=on_bad_record)
        numbers, lengths, told, too_long = [], [], [], 0
        for index in range(len(documents)):
            length = len(_tokens(documents[index], self.tokenizer, self.rows))
            problem = self._problem(length, documents.count(index))
            if not problem:
                numbers.append(index)
                lengths.append(length)
                continue
            if on_bad_record == "stop":
                raise UserError(
                    f"{documents.location(index)}: {problem}, or leave such records out: on_bad_record=skip"
                )
            too_long += 1
            if len(told) < MAX_PROBLEMS:
                told.append(f"{documents.location(index)}: {problem}")
        made = np.array(numbers, np.int64), np.array(lengths, np.int64)
        return Fitted(documents, self.rows, *made, too_long, tuple(told))

    def _problem(self, length: int, images: int) -> str:
        """Why a document does not fit; "" = it does."""
        if images > self.rows.per_row:
            return f"{images} images, and a row holds {self.rows.per_row}; raise data.images.per_row"
        if length > self.chunk_tokens:
            taken = images * (self.rows.tokens + 2)
            return (
                f"{length} tokens, {taken} of them for images, and chunk_tokens is {self.chunk_tokens}; a text with "
                f"images is not cut, so raise it"
            )
        return "" if length > 1 else "no text; write one"


class ImageSource(abc.ABC):
    """What a config names: files of texts with images."""

    @abc.abstractmethod
    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """The documents, files in the order of their names."""


def _tokens(text: str, tokenizer: Tokenizer, rows: ImageRows) -> np.ndarray:
    def encode(part: str) -> np.ndarray:
        return image_tokens.replace_image_tokens(tokenizer.encode(part), rows, tokenizer.special_tokens.unk)

    return image_tokens.encode(encode, text.split(START_OF_IMAGE), rows)
