"""Documents with images, and the ones that fit the rows of a run, with images at the image tower's size."""

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.data import image_tokens, images
from t5g2.data.image_tokens import START_OF_IMAGE, ImageRows
from t5g2.data.sources.documents import OnBadRecord
from t5g2.data.sources.filtered_documents import FilteredDocuments
from t5g2.data.sources.validation import LocatedDocuments
from t5g2.data.tokenizers.base import Tokenizer


class ImageDocuments(LocatedDocuments):
    """Texts with images; a text has one <start_of_image> in the place of each image."""

    @abc.abstractmethod
    def count(self, index: int) -> int:
        """Returns the number of a document's images."""

    @abc.abstractmethod
    def image_bytes(self, index: int, nth: int) -> bytes:
        """Returns the content of a document's image file.

        Raises:
          UserError: the file is missing or shorter than before.
        """

    @override
    def token_lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Raises UserError: only FilteredImageText knows the tokens of an image."""
        raise UserError(
            "the tokens of an image depend on the model, so a text with images has no number of tokens by itself; read "
            "it in a run with data.images"
        )

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """Raises UserError, as `token_lengths`."""
        return self.token_lengths(tokenizer)


@dataclass(frozen=True, eq=False)
class FilteredImageDocuments(FilteredDocuments):
    """Documents with images that fit the rows of a run."""

    documents: ImageDocuments
    rows: ImageRows

    @override
    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """Returns int32[tokens] of a document, image tokens included."""
        return _encode(self[index], tokenizer, self.rows)

    def image(self, index: int, nth: int) -> images.Pixels:
        """Returns uint8[size, size, 3], a document's image as the image tower reads it.

        Raises:
          UserError: the file has changed since the source was opened.
        """
        number = int(self.numbers[index])
        name = f"{self.documents.location(number)}, image {nth + 1}"
        image = images.read(self.documents.image_bytes(number, nth), name=name)
        return images.resize(image, self.rows.size, resampling=self.rows.resampling)


class ImageSource(abc.ABC):
    """Base class of the sources of texts with images."""

    @abc.abstractmethod
    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """Returns the documents, files in the order of their names."""


@dataclass(frozen=True)
class FilteredImageText:
    """A source of texts with images, as a run reads it; it has the interface of the other sources.

    Attributes:
      text: the source.
      rows: number of tokens of an image, and maximum number of images in a row.
      chunk_tokens: the longest document that is read; longer ones are bad records.
    """

    text: ImageSource
    rows: ImageRows
    tokenizer: Tokenizer
    chunk_tokens: int

    def __str__(self) -> str:
        return str(self.text)

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> FilteredImageDocuments:
        """Returns the documents that fit.

        Raises:
          UserError: as in the source's `open`; or a document is too long or has more images than a row (unless such
            documents are skipped).
        """
        documents = self.text.open(on_bad_record=on_bad_record)

        def checks() -> Iterator[tuple[int, str]]:
            for index in range(len(documents)):
                length = len(_encode(documents[index], self.tokenizer, self.rows))
                yield length, self._problem(length, documents.count(index))

        return FilteredImageDocuments.select(documents, checks(), on_bad_record=on_bad_record, rows=self.rows)

    def _problem(self, length: int, image_count: int) -> str:
        """Returns the reason why a document does not fit; "" = it fits."""
        if image_count > self.rows.per_row:
            return f"{image_count} images, and a row holds {self.rows.per_row}; raise data.images.per_row"
        if length > self.chunk_tokens:
            # two more tokens per image: those before and after it
            of_images = image_count * (self.rows.tokens + 2)
            return (
                f"{length} tokens, {of_images} of them for images, and chunk_tokens is {self.chunk_tokens}; a text "
                f"with images is not cut, so raise it"
            )
        return "" if length > 1 else "no text; write one"


def _encode(text: str, tokenizer: Tokenizer, rows: ImageRows) -> np.ndarray:
    def encode_part(part: str) -> np.ndarray:
        return image_tokens.replace_image_tokens(tokenizer.encode_document(part), rows, tokenizer.special_tokens.unk)

    # the documents have <start_of_image> once for each image (image_text.py)
    return image_tokens.encode(encode_part, text.split(START_OF_IMAGE), rows)
