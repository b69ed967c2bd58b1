"""Sources of texts with images: JSON lines with paths, parquet with bytes, tar shards of WebDataset.

A text has <start_of_image> in the place of each of its images; without any, the images come before the text. Opening a
source reads every image, and decodes it if that has not been done before (image_validation.py), so that bad records are
known and counted before a run begins. After that only offsets are kept in memory, and an image is read from its file
when a row needs it.

A record is bad if its text or an image cannot be read, if the text does not have <start_of_image> once for each image,
or if no text follows the last image, which leaves no target. A record without images is an ordinary text.
"""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError
from t5g2.data import image_tokens
from t5g2.data import images as image_files
from t5g2.data.image_tokens import START_OF_IMAGE
from t5g2.data.sources import local_copies, parquet, tar
from t5g2.data.sources.data_files import find_files
from t5g2.data.sources.documents import OnBadRecord
from t5g2.data.sources.image_documents import ImageDocuments, ImageSource
from t5g2.data.sources.image_validation import ValidatedImages
from t5g2.data.sources.text_files import line_spans
from t5g2.data.sources.validation import RecordValidator, SourceSummary, decode_json, json_text, text_under

THREADS = min(8, os.cpu_count() or 1)  # threads that read and decode images while a source is opened
ENDINGS = ("jpg", "jpeg", "png", "webp")  # of images in a tar file
Span = tuple[int, int]  # first byte, bytes


@dataclass(frozen=True)
class ImageJsonl(ImageSource):
    """Files with a JSON object per line: {"text": "A cat: <start_of_image> asleep", "images": ["cats/1.png"]}.

    Attributes:
      path: a file, a folder (all .jsonl below it) or a pattern such as "corpus/*.jsonl"; plain, or compressed if the
        name ends in .gz or .zst.
      field: the key of the text.
      images_field: the key of the images' paths, a list or one path, relative to the file's folder.
      folder: the folder that paths are relative to; "" = the file's own. Files at a URL need it, because images are
        local files.
    """

    path: str
    field: str = "text"
    images_field: str = "images"
    folder: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """Returns the documents; empty lines are ignored.

        Raises:
          UserError: no file is found, all are empty, or a record is bad (unless bad records are skipped).
        """
        names = _files(self.path, ".jsonl")
        if any(map(local_copies.is_url, names)) and not self.folder:
            raise UserError(f"{self.path} is a URL, and images are local files; name their folder: `folder`")
        files = tuple(map(local_copies.plain_copy, names))
        folders = tuple(self.folder or str(Path(name).parent) for name in names)

        def samples() -> Iterator[_Sample]:
            for number, name in enumerate(names):
                for location, offset, data in line_spans(files[number]):
                    span = (number, offset, len(data))
                    # defaults bind the values of this line, because a thread calls the lambda later
                    yield _Sample(f"{name}, {location}", span, lambda data=data, number=number: read(data, number))

        def read(data: bytes, number: int) -> _Read:
            text, paths = _parse_line(data, self, folders[number])
            return text, [(path, image_files.read_bytes(path)) for path in paths]

        return _PathDocuments(self, names, files, folders, *_scan(samples(), self.path, on_bad_record))


@dataclass(frozen=True)
class ImageParquet(ImageSource):
    """Parquet files with one document per row (pip install 't5g2[parquet]').

    Like all parquet files, they are copied once to a form that can be read by offset (local_copies.py).

    Attributes:
      path: a file, a folder (all .parquet below it) or a pattern such as "corpus/*.parquet".
      field: the column of the text.
      images_field: the column of the images: bytes, Hugging Face's {"bytes": …, "path": …}, or a list of either.
    """

    path: str
    field: str = "text"
    images_field: str = "images"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """Returns the documents.

        Raises:
          UserError: no file is found, all are empty, one is damaged or lacks a column, or a record is bad (unless bad
            records are skipped).
        """
        names = _files(self.path, ".parquet")
        variant = ("image rows", self.field, self.images_field)
        files = tuple(local_copies.converted_copy(name, self._convert, variant) for name in names)

        def samples() -> Iterator[_Sample]:
            for number, (name, file) in enumerate(zip(names, files, strict=True)):
                with open(file, "rb") as data:
                    while line := data.readline():
                        record: Any = decode_json(line)
                        text = (data.tell() - len(line), len(line) - 1)
                        images = _consecutive_spans(data.tell(), record["sizes"])
                        read = _reader(file, text, images, self.field, problem=record.get("problem", ""))
                        yield _Sample(f"{name}, row {record['row']}", (number, *text), read, images)
                        # skips the images; the next row's line follows
                        data.seek(sum(record["sizes"]), os.SEEK_CUR)

        return _EmbeddedDocuments(names, files, self.field, "row", *_scan(samples(), self.path, on_bad_record))

    def _convert(self, source: BinaryIO, out: BinaryIO) -> None:
        """Writes each row as a line of JSON with the sizes of its images, and then the images."""
        columns = {"field": self.field, "images_field": self.images_field}
        file, row = parquet.open_table(source, **columns), 0
        # small batches, because images are large
        for batch in file.iter_batches(batch_size=64, columns=[*columns.values()]):
            for record in batch.to_pylist():
                row += 1
                line: dict[str, Any] = {"row": row, self.field: record[self.field]}
                try:
                    images = _image_bytes(record[self.images_field])
                except ValueError as error:
                    # kept with the row: the copy also serves runs with another on_bad_record
                    images, line["problem"] = [], f"{error} under {self.images_field!r}"
                line["sizes"] = [len(image) for image in images]
                out.write(parquet.json_line(line) + b"".join(images))


@dataclass(frozen=True)
class WebDataset(ImageSource):
    """Tar files in the format of WebDataset, one document per sample.

    The members of a sample follow each other, and their names are the same up to the first dot, such as 00017.jpg and
    00017.txt. A sample's images are its members whose names end in jpg, jpeg, png or webp, in the order of the archive.
    Other members are ignored.

    Attributes:
      path: a file, a folder (all .tar below it) or a pattern such as "shards/*.tar"; local, or at a URL, of which a
        copy is kept; plain, or compressed if the name ends in .gz or .zst.
      field: the key of the text in the sample's .json; "" = the text is the sample's .txt.
    """

    path: str
    field: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """Returns the samples.

        Raises:
          UserError: no file is found, all are empty, one is not a tar file, or a sample is bad or cut off (unless bad
            samples are skipped).
        """
        names = _files(self.path, ".tar")
        files = tuple(map(local_copies.plain_copy, names))

        def samples() -> Iterator[_Sample]:
            for number, (name, file) in enumerate(zip(names, files, strict=True)):
                with open(file, "rb") as data:
                    for sample in tar.samples(data, name):
                        yield self._sample(sample, number, name, file)

        return _EmbeddedDocuments(
            names, files, self.field or None, "sample", *_scan(samples(), self.path, on_bad_record)
        )

    def _sample(self, sample: tar.TarSample, number: int, name: str, file: str) -> "_Sample":
        text_ending = "json" if self.field else "txt"
        endings = [member.ending for member in sample.members]
        images = tuple((m.offset, m.size) for m in sample.members if m.ending.rpartition(".")[2] in ENDINGS)
        text: Span = next(((m.offset, m.size) for m in sample.members if m.ending == text_ending), (0, 0))
        problem = sample.damage
        if not problem and (text_ending not in endings or not images or len(set(endings)) < len(endings)):
            problem = (
                f"the sample has {', '.join(endings)}; it needs one .{text_ending} for its text (see `field`), and "
                f"images, each by another ending ({', '.join(ENDINGS)}, 1.png and so on)"
            )
        read = _reader(file, text, images, self.field or None, problem=problem)
        return _Sample(f"{name}, sample {sample.key!r}", (number, text[0], text[1]), read, images)


ImageText = ImageJsonl | ImageParquet | WebDataset

_Read = tuple[str, Sequence[tuple[str, bytes]]]  # a text; for each image its name and its file's content


class _Sample(NamedTuple):
    """A record before it is validated.

    Attributes:
      location: file and record, for messages.
      span: the text's record: number of the file, first byte, bytes.
      read: returns the record, or raises a ValueError with the problem.
      images: spans of the images, if they are in the same file.
    """

    location: str
    span: tuple[int, int, int]
    read: Callable[[], _Read]
    images: tuple[Span, ...] = ()


class _Index(NamedTuple):
    """Offsets of the valid records.

    Attributes:
      texts: int64[documents, 3]: number of the file, first byte, bytes.
      image_ends: int64[1 + documents]: document i has the images image_ends[i] to image_ends[i + 1] - 1.
      images: int64[images, 2], first byte and bytes of each; empty if images are files of their own.
    """

    texts: np.ndarray
    image_ends: np.ndarray
    images: np.ndarray


class _IndexedDocuments(ImageDocuments):
    """Base class of documents whose images are files of their own, and of those whose images are in the same file.

    Attributes:
      names, files: each file's name as the user wrote it, and the path of its local copy.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    index: _Index

    def __len__(self) -> int:
        return len(self.index.texts)

    @override
    def count(self, index: int) -> int:
        return int(self.index.image_ends[index + 1] - self.index.image_ends[index])

    def record(self, index: int) -> bytes:
        """Returns the bytes of a text's record."""
        file, *span = self.index.texts[index].tolist()
        return _read_span(self.files[file], *span)


@dataclass(frozen=True, eq=False)
class _PathDocuments(_IndexedDocuments):
    """Lines with the paths of images, which are relative to the folder of the line's file."""

    source: ImageJsonl
    names: tuple[str, ...]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    index: _Index
    summary: SourceSummary

    def __getitem__(self, index: int) -> str:
        text, paths = self._parse(index)
        return START_OF_IMAGE.join(image_tokens.split(text, len(paths)))

    @override
    def location(self, index: int) -> str:
        file, offset, _ = self.index.texts[index].tolist()
        # lines are counted only for a message, so their numbers are not kept
        line = 1 + _read_span(self.files[file], 0, offset).count(b"\n")
        return f"{self.names[file]}, line {line}"

    @override
    def image_bytes(self, index: int, nth: int) -> bytes:
        return image_files.read_bytes(self._parse(index)[1][nth])

    def _parse(self, index: int) -> tuple[str, list[str]]:
        return _parse_line(self.record(index), self.source, self.folders[self.index.texts[index][0]])


@dataclass(frozen=True, eq=False)
class _EmbeddedDocuments(_IndexedDocuments):
    """Texts and images in one file.

    Attributes:
      field: key of the text; None = the record is the text.
      unit: "row" or "sample", for messages.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    field: str | None
    unit: str
    index: _Index
    summary: SourceSummary

    def __getitem__(self, index: int) -> str:
        text = json_text(self.record(index), self.field)
        return START_OF_IMAGE.join(image_tokens.split(text, self.count(index)))

    @override
    def location(self, index: int) -> str:
        file, offset, _ = self.index.texts[index].tolist()
        if self.unit == "row":
            record: Any = decode_json(self.record(index))
            return f"{self.names[file]}, row {record['row']}"
        return f"{self.names[file]}, the {self.unit} whose text is at byte {offset:,}"

    @override
    def image_bytes(self, index: int, nth: int) -> bytes:
        span = self.index.images[self.index.image_ends[index] + nth]
        return _read_span(self.files[self.index.texts[index][0]], *span.tolist())


def _files(path: str, ending: str) -> tuple[str, ...]:
    """Returns the files that a path stands for; of a folder, which may hold images too, only those with this ending.

    Raises:
      UserError: there are no such files.
    """
    names = find_files(path)
    if local_copies.is_folder(path):
        names = [name for name in names if name.removesuffix(".gz").removesuffix(".zst").endswith(ending)]
    if not names:
        raise UserError(f"no file that ends in {ending} in {path!r}; give a file, a folder with such, or a pattern")
    return tuple(names)


def _scan(samples: Iterator[_Sample], path: str, on_bad_record: OnBadRecord) -> tuple[_Index, SourceSummary]:
    """Reads every record and its images once, and returns the valid records; `path` is the source's."""
    validator, digest, known_images = RecordValidator(on_bad_record), hashlib.sha256(), ValidatedImages(path)
    texts, counts, images = [], [], []
    try:
        for sample, check in _check_ahead(samples, known_images):
            if validator.accept(sample.location, lambda check=check: check.result()[0]):
                hashes = check.result()[1]
                texts.append(sample.span)
                counts.append(len(hashes))
                images += sample.images
                digest.update(b"".join(hashes))
    finally:
        # even after an error, so that the images before the bad record need not be decoded again
        known_images.save()
    summary = validator.finish(path)
    if not summary.characters:
        raise UserError(f"{path}: no record with a text; give records with text")
    digest.update(summary.fingerprint.encode())
    index = _Index(
        np.array(texts, np.int64).reshape(-1, 3),
        np.cumsum([0, *counts], dtype=np.int64),
        np.array(images, np.int64).reshape(-1, 2),
    )
    return index, replace(summary, fingerprint=digest.hexdigest()[:16])


def _check_ahead(samples: Iterator[_Sample], known_images: ValidatedImages) -> Iterator[tuple[_Sample, Future]]:
    """Yields the samples in their order, each with the future of its `_check`."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: collections.deque[tuple[_Sample, Future]] = collections.deque()
        for sample in samples:
            ahead.append((sample, pool.submit(_check, sample, known_images)))
            # threads decode a few samples ahead, and no more than fit into memory
            if len(ahead) > 4 * THREADS:
                yield ahead.popleft()
        yield from ahead


def _check(sample: _Sample, known_images: ValidatedImages) -> tuple[str, list[bytes]]:
    """Returns the text of a record, and a hash of each of its images.

    Raises:
      ValueError: the record is bad; the message has the reason.
    """
    try:
        text, images = sample.read()
        parts = image_tokens.split(text, len(images))
        hashes = [known_images.check(data, name=name) for name, data in images]
    except UserError as error:  # of this record alone, so it may be skipped
        raise ValueError(str(error)) from None
    if images and not parts[-1].strip():
        raise ValueError("no text after the last image, so that there is no target")
    return START_OF_IMAGE.join(parts), hashes


def _reader(file: str, text: Span, images: Sequence[Span], field: str | None, *, problem: str) -> Callable[[], _Read]:
    """Returns the function that reads a record whose images are in the same file."""

    def read() -> _Read:
        if problem:
            raise ValueError(problem)
        named = [(f"image {n} of {len(images)}", _read_span(file, *span)) for n, span in enumerate(images, start=1)]
        return json_text(_read_span(file, *text), field), named

    return read


def _parse_line(data: bytes, source: ImageJsonl, folder: str) -> tuple[str, list[str]]:
    """Returns the text of a line, and the paths of its images."""
    record: Any = decode_json(data)
    text, key = text_under(record, source.field), source.images_field
    if key not in record:
        raise ValueError(f"no images under {key!r}: the record is an object with {', '.join(record)}")
    paths = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"no list of paths under {key!r}, but {json.dumps(record[key])[:40]}")
    return text, [str(Path(folder) / path) for path in paths]


def _image_bytes(value: Any) -> list[bytes]:
    """Returns the images in a cell of a table."""
    if isinstance(value, list):
        return [image for item in value for image in _image_bytes(item)]
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise ValueError(f"a path, {value['path']!r}, and no bytes (image_jsonl reads paths)")
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"not an image, but {str(value)[:40]}")
    return [value]


def _consecutive_spans(start: int, sizes: Sequence[int]) -> tuple[Span, ...]:
    """Returns the spans of parts of these sizes that follow each other from byte `start` on."""
    ends = [start + end for end in np.cumsum(np.array([0, *sizes], np.int64)).tolist()]
    return tuple(zip(ends[:-1], sizes, strict=True))


def _read_span(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as data:
        data.seek(offset)
        content = data.read(size)
    if len(content) < size:
        raise UserError(f"{file} ends before byte {offset + size:,}; it has changed since it was opened; restore it")
    return content
