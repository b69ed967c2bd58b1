"""Data sets of Hugging Face's library datasets: of the hub, of a folder of files, or as `save_to_disk` wrote them.

The library prepares a data set once, as Arrow files in its cache, from which examples are read by number.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from t5g2.core.errors import OS_ERRORS, UserError, storage_problem
from t5g2.core.optional import require
from t5g2.data.sources.documents import Documents, OnBadRecord
from t5g2.data.sources.numbered_records import Records, feature_text, plain_features, scan
from t5g2.data.sources.validation import LocatedDocuments, list_of_texts

# files of `save_to_disk`: of a data set, and of several splits
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class HfDataset:
    """A data set of the library datasets, read by number (pip install 't5g2[datasets]').

    A data set of the hub is downloaded into the library's cache, or read from it where there is no network.

    Attributes:
      path: OWNER/NAME at the hub; a folder of files that the library reads (jsonl, parquet, csv, text, …), in the order
        of their names; or a folder that `save_to_disk` wrote, of one data set (its split is train) or of several.
      name: configuration of the data set; "" = its only one, or the one that it names as its default.
      split: as in datasets: "train", "train[:1%]", "train+test".
      field: the column of the text; a dot leads into a nested one: "passage.text".
      revision: branch, tag or commit of a data set of the hub; "" = its main branch.
      cache_dir: folder of prepared data sets; "" = the library's own, HF_DATASETS_CACHE.
    """

    path: str
    name: str = ""
    split: str = "train"
    field: str = "text"
    revision: str = ""
    cache_dir: str = ""

    def open(self, *, on_bad_record: OnBadRecord = "stop") -> Documents:
        """Returns the documents, in the order of the split.

        Raises:
          UserError: there is no such data set, configuration, split or column; it cannot be downloaded, or a file of it
            is damaged; an example has no text (unless such examples are skipped).
        """
        return scan(_Examples(self, self.field), str(self), on_bad_record)

    def open_fields(self, fields: tuple[str, str], *, on_bad_record: OnBadRecord = "stop") -> LocatedDocuments:
        """Returns the documents as in `open`, each a JSON list of the texts of these columns, none of them empty."""
        return scan(_Examples(self, fields), str(self), on_bad_record)

    def open_records(self) -> "HfRecords":
        """Returns the whole examples, of all columns."""
        return HfRecords(_Examples(self, ()))


class _Examples(Records):
    """Examples of a split.

    Args:
      field: the column of the text, or the columns of the texts; a dot leads into a nested one; () = all columns.
    """

    def __init__(self, config: HfDataset, field: str | tuple[str, ...]):
        self._config, self._field = config, field
        # of a data set in files, its pickle holds their names; reopening it in a worker could find another revision
        self._examples = _open(config, (field,) if isinstance(field, str) else field)

    def __len__(self) -> int:
        return len(self._examples)

    @override
    def location(self, index: int) -> str:
        return f"{self._config.path}, split {self._config.split}, example {index}"

    @override
    def text(self, index: int) -> str:
        example = self.example(index)
        try:
            if isinstance(self._field, str):
                return feature_text(example, self._field)
            return list_of_texts({name: feature_text(example, name) for name in self._field})
        except TypeError:  # a nested column may be empty in an example
            raise ValueError(f"no text under {self._field!r}: a column that it is in is null") from None

    def example(self, index: int) -> Any:
        """Returns an example as the library gives it."""
        return self._examples[index]


class HfRecords(Sequence[Mapping[str, Any]]):
    """Examples of a data set as Python holds them; an image is {"bytes", "path"}, as it is stored."""

    def __init__(self, examples: _Examples):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return plain_features(self._examples.example(index))


def _open(config: HfDataset, fields: Sequence[str]) -> Any:
    """Returns the split, of the columns that these fields are in, or of all; its media are not decoded.

    Raises:
      UserError: as HfDataset.open.
    """
    library = require("datasets", "datasets")
    failures = (library.exceptions.DatasetsError, ValueError, RuntimeError, OSError)
    try:
        examples = _saved_split(library, config) if _is_saved(config.path) else _loaded_split(library, config)
    except failures as error:
        problem = storage_problem(error)
        if problem is not None and problem.errno in OS_ERRORS:  # a full disk, and no wrong setting
            raise problem from None
        raise _explained(library, config, error) from None
    columns = list(dict.fromkeys(field.split(".")[0] for field in fields))
    for field in fields:
        features: Any = examples.features
        for key in field.split("."):
            if not isinstance(features, Mapping) or key not in features:
                setting = "`inputs` and `targets` to two" if len(fields) > 1 else "`field` to one"
                raise UserError(
                    f"{config.path} has no column {field!r}; it has {', '.join(examples.column_names)}: set {setting} "
                    f"of them"
                )
            features = features[key]
    examples = examples.with_format(None)  # a saved one may give tensors
    examples = examples.select_columns(columns) if columns else examples
    for name, feature in examples.features.items():
        if getattr(feature, "decode", False) is True:
            examples = examples.cast_column(name, replace(feature, decode=False))
    return examples


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in (SAVED, SAVED_SPLITS))


def _loaded_split(library: Any, config: HfDataset) -> Any:
    return library.load_dataset(
        config.path,
        config.name or None,
        split=config.split,
        revision=config.revision or None,
        cache_dir=config.cache_dir or None,
    )


def _saved_split(library: Any, config: HfDataset) -> Any:
    saved = library.load_from_disk(config.path)
    splits = saved if isinstance(saved, Mapping) else {"train": saved}
    lengths = {name: len(examples) for name, examples in splits.items()}
    parts = library.ReadInstruction.from_spec(config.split).to_absolute(lengths)
    return library.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _explained(library: Any, config: HfDataset, error: Exception) -> UserError:
    """Returns the error with what the user can do about it."""
    cause = error.__cause__ if isinstance(error, library.exceptions.DatasetGenerationError) else None
    reason = " ".join(str(cause or error).split())[:300].rstrip(".")
    kind = f"{config.path}, split {config.split!r}"
    if isinstance(error, library.exceptions.DatasetsError) and not isinstance(error, FileNotFoundError):
        return UserError(f"{kind}: a file is damaged or not of its format ({reason}); mend it, or get it again")
    if isinstance(error, ConnectionError):
        return UserError(
            f"{kind}: the hub cannot be reached, and the cache on this machine has no such data set ({reason}); check "
            f"the network and that HF_HUB_OFFLINE is not set, load it where there is a network, or give a folder"
        )
    if isinstance(error, OSError):
        return UserError(
            f"{kind} cannot be read ({reason}); give OWNER/NAME of a data set of the hub that you may read (`hf auth "
            f"login` for a private or a gated one), or a folder of files"
        )
    return UserError(f"{kind} cannot be opened ({reason}); correct path, name, split or revision")
