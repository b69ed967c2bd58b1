"""Sources of texts with images: JSON lines with paths, parquet with bytes, tar shards of WebDataset.

An image stands where its text says <start_of_image>, or in front of the text if it says so nowhere. Every image is read
when a source is opened, and decoded if it has not been before (sound_images.py), so that what is bad is known, and
counted, before a run begins; after that an image is read where it is when its turn comes, and what is kept in memory is
where everything stands.

A record is bad if its text or an image cannot be had, if it does not say <start_of_image> once for each image, or if no
text follows the last image: then there is nothing to ask for. A record may have no image; it is a text.
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

from t5g2.core.errors import UserError
from t5g2.data import image_tokens
from t5g2.data import images as pictures
from t5g2.data.image_tokens import START_OF_IMAGE
from t5g2.data.sources import local_copies, tar
from t5g2.data.sources.documents import OnBadRecord
from t5g2.data.sources.image_documents import ImageDocuments, ImageSource
from t5g2.data.sources.image_validation import ValidatedImages
from t5g2.data.sources.text_files import find_files, line_spans
from t5g2.data.sources.validation import RecordValidator, SourceSummary, json_text

THREADS = min(8, os.cpu_count() or 1)  # that read and decode images while a source is opened
ENDINGS = ("jpg", "jpeg", "png", "webp")  # of images in a tar file
Span = tuple[int, int]  # first byte, bytes


@dataclass(frozen=True)
class ImageJsonl(ImageSource):
    """Files with a JSON object a line: {"text": "A cat: <start_of_image> asleep", "images": ["cats/1.png"]}.

    Attributes:
      path: a file, a folder (all .jsonl below it) or a pattern such as "corpus/*.jsonl"; plain, or compressed if the
        name ends in .gz or .zst.
      field: the key of the text.
      images_field: the key of the images' paths, a list or one path, relative to the file's folder.
      folder: what paths are relative to instead; files at a URL need it, because images are read from local files.
    """

    path: str
    field: str = "text"
    images_field: str = "images"
    folder: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """The documents; empty lines are none.

        Raises:
          UserError: no file is found, all are empty, or a record is bad (unless those are skipped).
        """
        names = _files(self.path, ".jsonl")
        if any(map(local_copies.is_url, names)) and not self.folder:
            raise UserError(f"{self.path} is a URL, and images are local files; say in which folder they are: `folder`")
        files = tuple(map(local_copies.plain_copy, names))
        folders = tuple(self.folder or str(Path(name).parent) for name in names)

        def samples() -> Iterator[_Sample]:
            for number, name in enumerate(names):
                for place, offset, data in line_spans(files[number]):
                    at = (number, offset, len(data))
                    yield _Sample(f"{name}, {place}", at, lambda data=data, number=number: read(data, number))

        def read(data: bytes, number: int) -> _Read:
            text, paths = _line(data, self, folders[number])
            return text, [(path, pictures.read_bytes(path)) for path in paths]

        return _Listed(self, names, files, folders, *_scan(samples(), self.path, on_bad_record))


@dataclass(frozen=True)
class ImageParquet(ImageSource):
    """Parquet files, a document a row (pip install 't5g2[parquet]').

    They are written out once, as copies.py says of all parquet files.

    Attributes:
      path: a file, a folder (all .parquet below it) or a pattern such as "corpus/*.parquet".
      field: the column of the text.
      images_field: the column of the images: bytes, Hugging Face's {"bytes": …, "path": …}, or a list of either.
    """

    path: str
    field: str = "text"
    images_field: str = "images"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """The documents.

        Raises:
          UserError: no file is found, all are empty, one is damaged or has no such columns, or a record is bad (unless
            those are skipped).
        """
        names = _files(self.path, ".parquet")
        what = ("image rows", self.field, self.images_field)
        files = tuple(local_copies.converted_copy(name, self._convert, what) for name in names)

        def samples() -> Iterator[_Sample]:
            for number, (name, file) in enumerate(zip(names, files, strict=True)):
                with open(file, "rb") as data:
                    while line := data.readline():
                        record, text = json.loads(line), (data.tell() - len(line), len(line) - 1)
                        images = _spans(data.tell(), record["sizes"])
                        read = _reader(file, text, images, self.field, problem=record.get("problem", ""))
                        yield _Sample(f"{name}, row {record['row']}", (number, *text), read, images)
                        data.seek(sum(record["sizes"]), os.SEEK_CUR)

        return _Held(names, files, self.field, "row", *_scan(samples(), self.path, on_bad_record))

    def _convert(self, source: BinaryIO, out: BinaryIO) -> None:
        """Writes a line of JSON for each row, and its images behind it."""
        columns = {"field": self.field, "images_field": self.images_field}
        file, row = local_copies.parquet_file(source, **columns), 0
        for batch in file.iter_batches(batch_size=64, columns=[*columns.values()]):
            for record in batch.to_pylist():
                row += 1
                line: dict[str, Any] = {"row": row, self.field: record[self.field]}
                try:
                    images = _image_bytes(record[self.images_field])
                except ValueError as error:
                    images, line["problem"] = [], f"{error} under {self.images_field!r}"
                line["sizes"] = [len(image) for image in images]
                out.write(local_copies.json_line(line) + b"".join(images))


@dataclass(frozen=True)
class WebDataset(ImageSource):
    """Tar files as WebDataset has them: the members of a sample follow each other and share what is before the first
    dot of their names, such as 00017.jpg and 00017.txt.

    Its images are its members whose names end in jpg, jpeg, png or webp, in the order of the archive. What else a
    sample has is not read.

    Attributes:
      path: a file, a folder (all .tar below it) or a pattern such as "shards/*.tar"; here or at a URL, of which a copy
        is kept; plain, or compressed if the name ends in .gz or .zst.
      field: the key of the text in the sample's .json; "" = the text is the sample's .txt.
    """

    path: str
    field: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> ImageDocuments:
        """The samples.

        Raises:
          UserError: no file is found, all are empty, one is no tar file, or a sample is bad or cut off (unless those
            are skipped).
        """
        names = _files(self.path, ".tar")
        files = tuple(map(local_copies.plain_copy, names))

        def samples() -> Iterator[_Sample]:
            for number, (name, file) in enumerate(zip(names, files, strict=True)):
                with open(file, "rb") as data:
                    for sample in tar.samples(data, name):
                        yield self._sample(sample, number, name, file)

        return _Held(names, files, self.field or None, "sample", *_scan(samples(), self.path, on_bad_record))

    def _sample(self, sample: tar.Sample, number: int, name: str, file: str) -> "_Sample":
        wanted = "json" if self.field else "txt"
        endings = [member.ending for member in sample.members]
        images = tuple((m.offset, m.size) for m in sample.members if m.ending.rpartition(".")[2] in ENDINGS)
        text: Span = next(((m.offset, m.size) for m in sample.members if m.ending == wanted), (0, 0))
        problem = sample.damage
        if not problem and (wanted not in endings or not images or len(set(endings)) < len(endings)):
            problem = (
                f"the sample has {', '.join(endings)}; it needs one .{wanted} for its text (see `field`), and images, "
                f"each by another ending ({', '.join(ENDINGS)}, 1.png and so on)"
            )
        read = _reader(file, text, images, self.field or None, problem=problem)
        return _Sample(f"{name}, sample {sample.key!r}", (number, text[0], text[1]), read, images)


ImageText = ImageJsonl | ImageParquet | WebDataset

_Read = tuple[str, Sequence[tuple[str, bytes]]]  # a text; of each image a name and what its file holds


class _Sample(NamedTuple):
    """A record as it is found.

    Attributes:
      place: in words.
      at: number of the file, and where in it the text's record is.
      read: a ValueError says what is wrong.
      images: where they are, if they are in the same file.
    """

    place: str
    at: tuple[int, int, int]
    read: Callable[[], _Read]
    images: tuple[Span, ...] = ()


class _Index(NamedTuple):
    """Where the sound records are.

    Attributes:
      texts: int64[documents, 3]: number of the file, first byte, bytes.
      ends: int64[1 + documents]: how many images the documents before each have, and all of them.
      images: int64[images, 2], first byte and bytes of each; none where images are files of their own.
    """

    texts: np.ndarray
    ends: np.ndarray
    images: np.ndarray


class _Indexed(ImageDocuments):
    """What both kinds of documents have: `names` of files for people, `files` to read, and where records are."""

    names: tuple[str, ...]
    files: tuple[str, ...]
    index: _Index

    def __len__(self) -> int:
        return len(self.index.texts)

    def count(self, index: int) -> int:
        return int(self.index.ends[index + 1] - self.index.ends[index])

    def record(self, index: int) -> bytes:
        """The bytes of the text's record."""
        file, *span = self.index.texts[index].tolist()
        return _bytes(self.files[file], *span)


@dataclass(frozen=True, eq=False)
class _Listed(_Indexed):
    """Lines of files with the paths of images, each relative to its file's folder."""

    source: ImageJsonl
    names: tuple[str, ...]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    index: _Index
    summary: SourceSummary

    def __getitem__(self, index: int) -> str:
        text, paths = self._line(index)
        return START_OF_IMAGE.join(image_tokens.split(text, len(paths)))

    def location(self, index: int) -> str:
        file, offset, _ = self.index.texts[index].tolist()
        line = 1 + _bytes(self.files[file], 0, offset).count(b"\n")
        return f"{self.names[file]}, line {line}"

    def image_bytes(self, index: int, nth: int) -> bytes:
        return pictures.read_bytes(self._line(index)[1][nth])

    def _line(self, index: int) -> tuple[str, list[str]]:
        return _line(self.record(index), self.source, self.folders[self.index.texts[index][0]])


@dataclass(frozen=True, eq=False)
class _Held(_Indexed):
    """Texts and images that are in one file; the text is the record, or under `field` of it."""

    names: tuple[str, ...]
    files: tuple[str, ...]
    field: str | None
    unit: str
    index: _Index
    summary: SourceSummary

    def __getitem__(self, index: int) -> str:
        text = json_text(self.record(index), self.field)
        return START_OF_IMAGE.join(image_tokens.split(text, self.count(index)))

    def location(self, index: int) -> str:
        file, offset, _ = self.index.texts[index].tolist()
        if self.unit == "row":
            return f"{self.names[file]}, row {json.loads(self.record(index))['row']}"
        return f"{self.names[file]}, the {self.unit} whose text is at byte {offset:,}"

    def image_bytes(self, index: int, nth: int) -> bytes:
        span = self.index.images[self.index.ends[index] + nth]
        return _bytes(self.files[self.index.texts[index][0]], *span.tolist())


def _files(path: str, ending: str) -> tuple[str, ...]:
    """The files that a path means; of a folder, in which images may be too, those of one ending.

    Raises:
      UserError: there are none.
    """
    names = find_files(path)
    if local_copies.is_folder(path):
        names = [name for name in names if name.removesuffix(".gz").removesuffix(".zst").endswith(ending)]
    if not names:
        raise UserError(f"no file that ends in {ending} in {path!r}; give a file, a folder with such, or a pattern")
    return tuple(names)


def _scan(samples: Iterator[_Sample], where: str, on_bad_record: OnBadRecord) -> tuple[_Index, SourceSummary]:
    """Reads every record and its images once."""
    scan, digest, sound = RecordValidator(on_bad_record), hashlib.sha256(), ValidatedImages(where)
    texts, counts, images = [], [], []
    try:
        for sample, checked in _checked(samples, sound):
            if scan.accept(sample.place, lambda checked=checked: checked.result()[0]):
                hashes = checked.result()[1]
                texts.append(sample.at)
                counts.append(len(hashes))
                images += sample.images
                digest.update(b"".join(hashes))
    finally:
        sound.save()
    scanned = scan.finish(where)
    if not scanned.characters:
        raise UserError(f"{where}: no record with a text; give some")
    digest.update(scanned.fingerprint.encode())
    index = _Index(
        np.array(texts, np.int64).reshape(-1, 3),
        np.cumsum([0, *counts], dtype=np.int64),
        np.array(images, np.int64).reshape(-1, 2),
    )
    return index, replace(scanned, fingerprint=digest.hexdigest()[:16])


def _checked(samples: Iterator[_Sample], sound: ValidatedImages) -> Iterator[tuple[_Sample, Future]]:
    """The samples in their order, each with what `_check` makes of it; threads work a little ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        ahead: collections.deque[tuple[_Sample, Future]] = collections.deque()
        for sample in samples:
            ahead.append((sample, pool.submit(_check, sample, sound)))
            if len(ahead) > 4 * THREADS:
                yield ahead.popleft()
        yield from ahead


def _check(sample: _Sample, sound: ValidatedImages) -> tuple[str, list[bytes]]:
    """The text of a record, and a hash of each of its images.

    Raises:
      ValueError: it is bad; says how.
    """
    try:
        text, images = sample.read()
        parts = image_tokens.split(text, len(images))
        hashes = [sound.check(data, name=name) for name, data in images]
    except UserError as error:  # of one record, not of all
        raise ValueError(str(error)) from None
    if images and not parts[-1].strip():
        raise ValueError("no text after the last image, so that there is nothing to ask for")
    return START_OF_IMAGE.join(parts), hashes


def _reader(file: str, text: Span, images: Sequence[Span], field: str | None, *, problem: str) -> Callable[[], _Read]:
    """What reads a record whose images are in the same file."""

    def read() -> _Read:
        if problem:
            raise ValueError(problem)
        named = [(f"image {n} of {len(images)}", _bytes(file, *span)) for n, span in enumerate(images, start=1)]
        return json_text(_bytes(file, *text), field), named

    return read


def _line(data: bytes, source: ImageJsonl, folder: str) -> tuple[str, list[str]]:
    """The text of a line, and where its images are."""
    text, key = json_text(data, source.field), source.images_field
    record = json.loads(data)
    if key not in record:
        raise ValueError(f"no images under {key!r}: the record is an object with {', '.join(record)}")
    paths = record[key] if isinstance(record[key], list) else [record[key]]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"no list of paths under {key!r}, but {json.dumps(record[key])[:40]}")
    return text, [str(Path(folder) / path) for path in paths]


def _image_bytes(value: Any) -> list[bytes]:
    """The images in a cell of a table."""
    if isinstance(value, list):
        return [image for item in value for image in _image_bytes(item)]
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise ValueError(f"a path, {value['path']!r}, and no bytes (image_jsonl reads paths)")
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"no image, but {str(value)[:40]}")
    return [value]


def _spans(start: int, sizes: Sequence[int]) -> tuple[Span, ...]:
    """Where parts of these sizes are that follow each other."""
    ends = [start + end for end in np.cumsum(np.array([0, *sizes], np.int64)).tolist()]
    return tuple(zip(ends[:-1], sizes, strict=True))


def _bytes(file: str, offset: int, size: int) -> bytes:
    with open(file, "rb") as data:
        data.seek(offset)
        found = data.read(size)
    if len(found) < size:
        raise UserError(f"{file} ends before byte {offset + size:,}; it has changed since it was opened")
    return found
