"""Pairs of two texts of a record: the same from every kind of file, one token sequence each, EOS once."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from t5g2.core import pairs, settings
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig, Source
from t5g2.data.corpus import open_source
from t5g2.data.pipeline import Pipeline
from t5g2.data.shards import token_shards
from t5g2.data.shards.token_shards import Tokens
from t5g2.data.sources import text_source
from t5g2.data.sources.array_records import ArrayRecord
from t5g2.data.sources.text_files import Jsonl, Parquet
from t5g2.data.sources.text_pairs import TextPairs
from t5g2.data.sources.text_source import TextSource
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import Causal, Seq2Seq

TOKENIZER = Bytes()
EOS = TOKENIZER.special_tokens.eos
RECORDS = [
    {"inputs": "What is 2 + 2?", "targets": "4", "id": 1},
    {"inputs": 'a "quoted"\nline', "targets": "zwölf", "id": None},
    {"inputs": "<eos>", "targets": "[1]", "id": 3},
]


def jsonl(folder, records=RECORDS):
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Jsonl(str(folder / "a.jsonl"))


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "a.parquet")
    return Parquet(str(folder / "a.parquet"))


def array_record(folder):
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()
    return ArrayRecord(str(folder / "a.array_record"))


@pytest.mark.parametrize("make", [jsonl, parquet, array_record])
def test_the_two_texts_of_a_record_are_a_pair(tmp_path, monkeypatch, make):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    opened = TextPairs(make(tmp_path)).open()
    for documents in (opened, pickle.loads(pickle.dumps(opened))):
        assert documents.has_pairs
        assert len(documents) == 3
        for i, record in enumerate(RECORDS):
            inputs, targets = pairs.split(documents.tokens(i, TOKENIZER))
            assert inputs.tolist() == TOKENIZER.encode_plain(record["inputs"]).tolist()
            assert targets.tolist() == [*TOKENIZER.encode_plain(record["targets"]).tolist(), EOS]
    assert opened.fingerprint == TextPairs(jsonl(tmp_path)).open().fingerprint


def test_fields_are_named_and_eos_can_be_left_to_the_objective(tmp_path):
    source = TextPairs(jsonl(tmp_path), inputs="targets", targets="inputs", eos=False)
    inputs, targets = pairs.split(source.open().tokens(0, TOKENIZER))
    assert (TOKENIZER.decode(inputs), TOKENIZER.decode(targets)) == ("4", "What is 2 + 2?")
    with_eos = TextPairs(jsonl(tmp_path), inputs="targets", targets="inputs")
    assert with_eos.open().fingerprint != source.open().fingerprint, "its tokens are others"


def data(folder, objective, text, **changes):
    fields: dict[str, Any] = {"rows": 2, "streams": 1, "encoder_length": 32, "decoder_length": 16, "chunk_tokens": 40}
    return DataConfig((Source(text, objective),), TOKENIZER, **fields | changes)


def test_a_batch_has_the_pairs_as_they_are(tmp_path):
    """Every example is a pair: the encoder has the inputs alone, the decoder the targets and one EOS."""
    config = data(tmp_path, Seq2Seq(24, 12), TextPairs(jsonl(tmp_path)), packing="none")
    with Pipeline(config, seed=0) as pipeline:
        rows = [pipeline.next().batch for _ in range(3)]
    read = set()
    for batch in rows:
        assert batch.encoder is not None
        for row in range(2):
            tokens = np.asarray(batch.encoder.tokens[row])[np.asarray(batch.encoder.segments[row]) > 0]
            targets = np.asarray(batch.targets[row])[np.asarray(batch.decoder.segments[row]) > 0]
            assert targets[-1] == EOS
            read.add((TOKENIZER.decode(tokens), TOKENIZER.decode(targets[:-1])))
    assert read == {(record["inputs"], record["targets"]) for record in RECORDS}


def test_pairs_that_do_not_fit_are_bad_records(tmp_path):
    source = TextPairs(
        jsonl(tmp_path, [*RECORDS, {"inputs": "x" * 25, "targets": "y"}, {"inputs": "x", "targets": "y" * 12}])
    )
    with pytest.raises(
        UserError, match=r"a\.jsonl, the record at byte \d+: a pair of 25 and 2 tokens; up to 24 and 12, "
    ):
        open_source(Source(source, Seq2Seq(24, 12)), data(tmp_path, Seq2Seq(24, 12), source))
    skipping = data(tmp_path, Seq2Seq(24, 12), source, on_bad_record="skip", max_skipped=0.5)
    chunks = open_source(skipping.sources[0], skipping)
    assert (len(chunks), chunks.documents.skipped) == (3, 2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"inputs": "a"}, r"no text under 'targets': the record is an object with inputs"),
        ({"inputs": "a", "targets": ["b"]}, r"no text under 'targets', but \[\"b\"\]"),
        ({"inputs": "a", "targets": ""}, r"the text under 'targets' is empty"),
        ({"inputs": "", "targets": "b"}, r"the text under 'inputs' is empty"),
        (
            {"inputs": "\ud800", "targets": "b"},
            r"U\+D800 at place \d+ of the text is half of a character, which UTF-8 cannot hold",
        ),
        ([1], r"no text under 'inputs': the record is not an object"),
    ],
)
def test_a_record_without_two_texts(tmp_path, record, message):
    source = TextPairs(jsonl(tmp_path, [RECORDS[0], record]))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{message}.*on_bad_record=skip"):
        source.open()
    opened = source.open(on_bad_record="skip")
    assert (len(opened), opened.skipped) == (1, 1)


def test_a_missing_column_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"no column 'answer'; it has inputs, targets, id: set `targets` to one of them"
    ):
        TextPairs(parquet(tmp_path), targets="answer").open()


def test_what_excludes_each_other(tmp_path):
    with pytest.raises(UserError, match=r"records\.field = 'body': pairs have two fields; name them by inputs and tar"):
        TextPairs(Jsonl("x", field="body"))
    with pytest.raises(UserError, match="inputs and targets are both 'a'; name two fields"):
        TextPairs(Jsonl("x"), "a", "a")
    with pytest.raises(UserError, match="source '0': its text and its objective both append EOS"):
        data(tmp_path, Seq2Seq(24, 12, eos=True), TextPairs(Jsonl("x")))
    source = TextPairs(jsonl(tmp_path))
    config = data(tmp_path, Seq2Seq(24, 12), source)
    with pytest.raises(UserError, match="has pairs of inputs and targets, and its objective takes text"):
        open_source(Source(source, Causal()), config)
    with pytest.raises(
        UserError, match=r"has text, and its objective takes pairs; .* those of the kind pairs or of seqio"
    ):
        open_source(Source(Jsonl(str(tmp_path / "a.jsonl"), "inputs"), Seq2Seq(24, 12)), config)


def test_a_config_names_it(tmp_path):
    node = {"kind": "pairs", "records": {"kind": "jsonl", "path": "x"}, "inputs": "q", "targets": "a"}
    source = settings.build(TextSource, node, tables=(text_source.BY_NAME,))
    assert source == TextPairs(Jsonl("x"), "q", "a")
    dumped = settings.dump(source, tables=(text_source.BY_NAME,))
    assert settings.build(TextSource, dumped, tables=(text_source.BY_NAME,)) == source
    with pytest.raises(UserError, match=r"unknown text\.records\.kind 'text'"):
        settings.build(
            TextSource, node | {"records": {"kind": "text", "path": "x"}}, where="text", tables=(text_source.BY_NAME,)
        )


def test_pairs_are_kept_as_tokens(tmp_path):
    documents = TextPairs(jsonl(tmp_path)).open()
    token_shards.write(token_shards.Job(documents, TOKENIZER, {"kind": "pairs"}, 2), tmp_path / "tokens")
    kept = Tokens(str(tmp_path / "tokens")).open()
    assert kept.has_pairs
    assert kept.fingerprint == documents.fingerprint
    for i in range(3):
        np.testing.assert_array_equal(kept.tokens(i, TOKENIZER), documents.tokens(i, TOKENIZER))
