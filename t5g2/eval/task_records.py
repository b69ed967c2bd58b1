"""Records of evaluation tasks: any source of data as a list of dicts, and templates that are filled from them."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.seqio_source import Seqio
from t5g2.data.sources.text_files import Jsonl, Parquet
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.base import Tokenizer

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RecordList:
    """Records themselves; in Python a task takes the list of them too.

    Attributes:
      records: the fields of each record by name.
    """

    records: tuple[dict, ...]


RecordSource = TextSource | RecordList
BY_NAME = {"rows": RecordList}


def open_records(source: RecordSource, tokenizer: Tokenizer) -> Sequence[Record]:
    """Returns the records of a source, each with all of its fields.

    Files of JSON lines, parquet, ArrayRecord and data sets of TensorFlow Datasets have the fields of their records.
    Examples of seqio have the texts `inputs` and `targets`; documents of any other source have `text`.

    Args:
      tokenizer: decodes examples of seqio.

    Raises:
      UserError: the source cannot be read, or has no record.
    """
    if isinstance(source, RecordList):
        records: Sequence[Record] = source.records
    elif isinstance(source, Jsonl | Parquet | ArrayRecord | Tfds):
        if source.field != type(source).field:
            raise UserError(f"field = {source.field!r}: a task's template names the fields; leave field out")
        records = source.open_records()
    else:
        records = _DocumentRecords(source.open(), tokenizer, has_tokens=isinstance(source, Seqio))
    if not len(records):
        raise UserError(f"there are no records in {_name(source)}; give a source, or a split of it, that has some")
    return records


def _name(source: RecordSource) -> str:
    return "the list" if isinstance(source, RecordList) else str(source)


@dataclass(frozen=True, eq=False)
class _DocumentRecords(Sequence[Record]):
    """Documents as records.

    Attributes:
      has_tokens: the documents are tokens, of which the text is decoded.
    """

    documents: Documents
    tokenizer: Tokenizer
    has_tokens: bool

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Any) -> Any:
        if not self.has_tokens:
            return {"text": self.documents[index]}
        tokens = self.documents.tokens(index, self.tokenizer)
        inputs, targets = pairs.split(tokens) if self.documents.has_pairs else ([], tokens)
        texts = [self.tokenizer.decode(side, skip_special_tokens=True) for side in (inputs, targets)]
        return {"inputs": texts[0], "targets": texts[1]}


class Template:
    """A text with fields of a record in braces, as str.format has them: "Q: {question}\\nA:", "{answers[0]}".

    Raises:
      UserError: it is not a format of str.format, or has a field without a name.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"template {text!r}: {error}; write {{{{ and }}}} for braces themselves") from None
        self.fields = [name for _, name, _, _ in self._parts if name is not None]
        if not all(name and not name[0].isdigit() for name in self.fields):
            raise UserError(f"template {text!r} has a field without a name; name fields of the record: {{question}}")

    def fill(self, record: Record) -> str:
        """Returns the text of a record.

        Raises:
          UserError: the record lacks a field.
        """
        try:
            return self.text.format_map(record)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise self._problem(record, error) from None

    def values(self, record: Record) -> list[Any]:
        """Returns the values that a template stands for: those of the list, if it is one field that holds a list.

        "{answers}" of {"answers": ["a", "b"]} are ["a", "b"]; "{answer}." of {"answer": 3} are ["3."].

        Raises:
          UserError: the record lacks a field.
        """
        literal, name, spec, conversion = self._parts[0] if len(self._parts) == 1 else ("", None, None, None)
        if literal or name is None or spec or conversion:
            return [self.fill(record)]
        try:
            value, _ = string.Formatter().get_field(name, (), record)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise self._problem(record, error) from None
        return list(value) if isinstance(value, list | tuple) else [value]

    def _problem(self, record: Record, error: Exception) -> UserError:
        missing = [name for name in self.fields if name.partition("[")[0].partition(".")[0] not in record]
        what = f"no field {missing[0]!r}" if missing else f"fields that do not fit ({error})"
        return UserError(f"the record has {what} for the template {self.text!r}; it has {', '.join(record) or 'none'}")
