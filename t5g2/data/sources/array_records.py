"""Records that are read by number: ArrayRecord files, and data sets of TensorFlow Datasets without TensorFlow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from t5g2.core.errors import UserError, unknown
from t5g2.core.optional import require
from t5g2.data.shards.array_record import open_reader
from t5g2.data.sources import local_copies
from t5g2.data.sources.data_files import find_files
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.numbered_records import Records, ValidRecords, feature_text, plain_features, scan
from t5g2.data.sources.validation import (
    Field,
    JsonRecords,
    LocatedDocuments,
    json_text,
    list_of_texts,
)


@dataclass(frozen=True)
class ArrayRecord:
    """ArrayRecord files with one document per record.

    A record is text in UTF-8, or a JSON object with a field of text. Records of TensorFlow Datasets (tf.train.Example)
    are read by `Tfds`.

    Attributes:
      path: a file, a folder (the data files below it, data_files.py) or a pattern such as "corpus/*.array_record";
        local, or at a URL, of which a copy is kept.
      field: the key of the text; "" = the record is the text.
    """

    path: str
    field: str = "text"

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, files in the order of their names.

        Raises:
          UserError: no file is found; one is empty, damaged or cut off; a record has no such text (unless such records
            are skipped).
        """
        return self._open(self.field or None, on_bad_record)

    def open_fields(self, fields: tuple[str, str], *, on_bad_record: OnBadRecord = "stop") -> LocatedDocuments:
        """Returns the documents as in `open`, each a JSON list of the texts under these keys, none of them empty."""
        return self._open(fields, on_bad_record)

    def open_records(self, *, on_bad_record: OnBadRecord = "stop") -> JsonRecords:
        """Returns the whole records, of all fields."""
        return JsonRecords(self._open(None, on_bad_record))

    def _open(self, field: Field, on_bad_record: OnBadRecord) -> ValidRecords:
        files = tuple((file, local_copies.plain_copy(file)) for file in find_files(self.path))
        return scan(_ArrayRecords(files, field), self.path, on_bad_record)


@dataclass(frozen=True)
class Tfds:
    """A data set of TensorFlow Datasets that is prepared as ArrayRecord (pip install 't5g2[tfds]').

    `tfds.data_source` reads it without TensorFlow. TFRecord files have no random access: prepare such a data set again
    with `tfds build --file_format=array_record`, or `builder.download_and_prepare(file_format="array_record")`. Opening
    this source downloads and prepares nothing.

    Attributes:
      name: as in tfds.builder: "wiki40b/en", "c4/en:3.0.1".
      split: as in tfds: "train", "validation[:1%]".
      field: the feature of the text; a dot leads into a nested one: "passage.text".
      data_dir: folder of data sets; "" = tfds's own, TFDS_DATA_DIR or ~/tensorflow_datasets.
    """

    name: str
    split: str = "train"
    field: str = "text"
    data_dir: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, in the order of the files.

        Raises:
          UserError: there is no such data set, split or feature; it is not prepared as ArrayRecord, or is damaged; an
            example's text is not UTF-8 (unless such examples are skipped).
        """
        return scan(_Tfds(self, self.field), str(self), on_bad_record)

    def open_fields(self, fields: tuple[str, str], *, on_bad_record: OnBadRecord = "stop") -> LocatedDocuments:
        """Returns the documents as in `open`, each a JSON list of the texts of these features, none of them empty."""
        return scan(_Tfds(self, fields), str(self), on_bad_record)

    def open_records(self) -> "TfdsRecords":
        """Returns the whole records, of all features."""
        return TfdsRecords(_Tfds(self, ()))


class _ArrayRecords(Records):
    """Records of ArrayRecord files.

    Args:
      files: pairs of the path that the user gave and the path of the local copy.
      field: key of the text, or keys of the texts; None = the record is the text.
    """

    def __init__(self, files: Sequence[tuple[str, str]], field: Field):
        self._files, self._field = tuple(files), field
        try:
            self._readers = [open_reader(local) for _, local in self._files]
            counts = [reader.num_records() for reader in self._readers]
        except RuntimeError as error:
            raise UserError(f"{self._files[0][0]} cannot be opened ({str(error)[:200]})") from None
        for (file, local), count in zip(self._files, counts, strict=True):
            # the index is at the end of a file, so a file that was cut off seems to have no records
            if not count:
                raise UserError(
                    f"{file} ({Path(local).stat().st_size:,} bytes) has no index of records: it is not an "
                    f"ArrayRecord file, or is empty, damaged or cut off; get it again, or remove it"
                )
        self._ends = np.cumsum(counts)

    def __reduce__(self):
        return _ArrayRecords, (self._files, self._field)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the number of a record's file, and the record's number in the file."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    @override
    def location(self, index: int) -> str:
        file, record = self._locate(index)
        return f"{self._files[file][0]}, record {record}"

    @override
    def text(self, index: int) -> str:
        file, record = self._locate(index)
        try:
            [data] = self._readers[file].read([record])
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{self.location(index)}: the file is damaged ({str(error)[:200]}); get it again") from None
        return json_text(data, self._field)


class _Tfds(Records):
    """Records of a data set of TensorFlow Datasets.

    Args:
      field: the feature of the text, or the features of the texts; a dot leads into a nested one.
    """

    def __init__(self, config: Tfds, field: str | tuple[str, ...]):
        self._config, self._field = config, field
        self._source, self._builder = _data_source(config, (field,) if isinstance(field, str) else field)

    def __reduce__(self):
        return _Tfds, (self._config, self._field)

    def __len__(self) -> int:
        return len(self._source)

    @override
    def location(self, index: int) -> str:
        return f"{self._config.name}, split {self._config.split}, record {index}"

    @override
    def text(self, index: int) -> str:
        record = self.record(index)
        if isinstance(self._field, str):
            return feature_text(record, self._field)
        return list_of_texts({name: feature_text(record, name) for name in self._field})

    def record(self, index: int) -> Any:
        """Returns a record as tfds gives it."""
        try:
            return self._source[index]
        except (RuntimeError, IndexError, OSError) as error:
            raise UserError(
                f"{self.location(index)}: the files in {self._builder.data_path} are damaged or cut off "
                f"({str(error)[:200]}); prepare them again"
            ) from None


class TfdsRecords(Sequence[Mapping[str, Any]]):
    """Records of a data set as Python holds them: texts, numbers and lists; pixels stay arrays."""

    def __init__(self, records: _Tfds):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        # array_record raises a ValueError past the end, and a loop over a sequence ends at an IndexError
        if index >= len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return plain_features(self._records.record(index))


def _data_source(config: Tfds, fields: Sequence[str]) -> tuple[Any, Any]:
    """Returns the data source, and the builder of its data set, which has these features."""
    tfds = require("tensorflow_datasets", "tfds")
    location = {"data_dir": config.data_dir} if config.data_dir else {}
    try:
        # try_gcs=False: nothing is looked up or downloaded
        builder = tfds.builder(config.name, try_gcs=False, **location)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"no data set {config.name!r} of TensorFlow Datasets on this machine ({reason}); prepare it, or set "
            f"data_dir to the folder that has it"
        ) from None
    if not builder.is_prepared():
        raise UserError(
            f"{config.name} is not prepared in {builder.data_path}; prepare it: tfds build {config.name} "
            f"--file_format=array_record, or set data_dir to the folder that has it"
        )
    # checked here, because a missing feature would otherwise be noticed at the first record, as a KeyError
    for field in fields:
        features = builder.info.features or {}
        for key in field.split("."):
            names = list(features.keys()) if hasattr(features, "keys") else []
            if key not in names:
                setting = "`field`" if fields == (config.field,) else "`inputs` and `targets`"
                raise UserError(
                    f"{config.name} has no feature {field!r}; it has {', '.join(builder.info.features or ())}: set "
                    f"{setting} to {'one' if setting == '`field`' else 'two'} of them"
                )
            features = features[key]
    for part in config.split.split("+"):
        if part.partition("[")[0] not in builder.info.splits:
            raise unknown(f"split of {config.name}", part, builder.info.splits)
    try:
        source = builder.as_data_source(split=config.split)
        len(source)  # a wrong slice may be noticed only here
    except ValueError as error:
        raise UserError(
            f"{config.name} has no split {config.split!r} ({str(error).strip().partition(chr(10))[0]}); give one of "
            f"{', '.join(builder.info.splits)}, or a part of one, such as train[10%:90%]"
        ) from None
    except NotImplementedError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{config.name} in {builder.data_path} cannot be read without TensorFlow ({reason}); prepare it with "
            f"--file_format=array_record"
        ) from None
    return source, builder
