"""Records of evaluation tasks: any source of data as a list of dicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t5g2.core import pairs
from t5g2.core.errors import UserError
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.hf_dataset import HfDataset
from t5g2.data.sources.record_templates import Record, RecordList
from t5g2.data.sources.seqio_source import Seqio
from t5g2.data.sources.text_files import Jsonl, Parquet
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.base import Tokenizer

RecordSource = TextSource | RecordList
BY_NAME = {"rows": RecordList}


def open_records(source: RecordSource, tokenizer: Tokenizer) -> Sequence[Record]:
    """Returns the records of a source, each with all of its fields.

    Files of JSON lines, parquet, ArrayRecord and data sets of TensorFlow Datasets and of the library datasets have the
    fields of their records.
    Examples of seqio have the texts `inputs` and `targets`; documents of any other source have `text`.

    Args:
      tokenizer: decodes examples of seqio.

    Raises:
      UserError: the source cannot be read, or has no record.
    """
    if isinstance(source, RecordList):
        records: Sequence[Record] = source.records
    elif isinstance(source, Jsonl | Parquet | ArrayRecord | Tfds | HfDataset):
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
