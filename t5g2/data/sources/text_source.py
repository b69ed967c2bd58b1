"""Every kind of text source, by its name in configs."""

from t5g2.core.own_classes import OpenTable
from t5g2.data.shards.token_shards import Tokens
from t5g2.data.sources.array_records import ArrayRecord, Tfds
from t5g2.data.sources.dialogues import Chat
from t5g2.data.sources.documents import Openable
from t5g2.data.sources.hf_dataset import HfDataset
from t5g2.data.sources.image_text import ImageJsonl, ImageParquet, WebDataset
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.python_text import PythonText
from t5g2.data.sources.seqio_source import Seqio
from t5g2.data.sources.text_files import Jsonl, Parquet, TextFiles
from t5g2.data.sources.text_pairs import TextPairs

TextSource = (
    PythonText
    | TextFiles
    | Jsonl
    | Parquet
    | ArrayRecord
    | Tfds
    | HfDataset
    | Seqio
    | Tokens
    | Chat
    | TextPairs
    | LabelledText
    | ImageJsonl
    | ImageParquet
    | WebDataset
    | Openable
)


BY_NAME = OpenTable(
    Openable,
    {
        "python": PythonText,
        "text": TextFiles,
        "jsonl": Jsonl,
        "parquet": Parquet,
        "array_record": ArrayRecord,
        "tfds": Tfds,
        "hf_dataset": HfDataset,
        "seqio": Seqio,
        "tokens": Tokens,
        "chat": Chat,
        "pairs": TextPairs,
        "labelled": LabelledText,
        "image_jsonl": ImageJsonl,
        "image_parquet": ImageParquet,
        "webdataset": WebDataset,
    },
)
