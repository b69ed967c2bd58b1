"""Lines that `t5g2 data` prints of a run's first batches."""

import re
import sys
import types
from typing import Any

import pytest

from t5g2.commands import data as data_module
from t5g2.data import spellings
from t5g2.data.config import Source
from t5g2.data.sources.text_files import Jsonl, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import HuggingFace, SentencePiece
from t5g2.objectives import Causal
from t5g2.report import data_preview
from tests import tiny
from tests.data import corpus, tokenizer_files


def test_special_tokens_are_in_colour_in_a_terminal_and_shares_beside_weights(tmp_path, capsys, monkeypatch):
    data = corpus.mixed(tmp_path, rows=8, streams=8)
    run: Any = types.SimpleNamespace(data=data, model=tiny.T5GEMMA2, train=types.SimpleNamespace(seed=0))
    preview = data_preview.measure(run)
    data_module.show(preview, rows=2)
    plain = capsys.readouterr().out
    assert "\033" not in plain
    assert "<sentinel_0>" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    data_module.show(preview, rows=2)
    coloured = capsys.readouterr().out
    assert "\033[36m<sentinel_0>\033[0m" in coloured
    assert re.sub(r"\033\[(36|0)m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    data_module.show(preview, rows=2)
    assert capsys.readouterr().out == plain
    shares = re.findall(r"(\w+) ([\d.]+)% \(weight (\d+) of (\d+)\)", plain)
    assert [(name, int(weight)) for name, _, weight, _ in shares] == [
        (name, source.weight) for name, source in zip(data.names, data.sources, strict=True)
    ]
    for _, share, weight, whole in shares:
        assert float(share) == pytest.approx(100 * int(weight) / int(whole), abs=12)


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_spelled_special_tokens_are_counted(tmp_path, kind):
    """Not what the vocabulary lacks, and not in bytes, which have no spellings."""
    file = getattr(tokenizer_files, kind)(tmp_path)
    tokenizer = {"huggingface": HuggingFace, "sentencepiece": SentencePiece}[kind](str(file))
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a <bos> and <unused0><unused0>"}\n{"text": "<eos <unused0> \U0001f40b"}\n'
    )
    documents = Jsonl(str(tmp_path / "a.jsonl")).open()
    assert spellings.count(documents, tokenizer) == ({"<unused0>": 3, "<bos>": 1}, 2)
    assert spellings.count(documents, tokenizer, characters=1) == ({"<unused0>": 2, "<bos>": 1}, 1)
    assert spellings.count(documents, Bytes()) == ({}, 0)


def test_the_counts_are_said_with_what_they_are_read_as(tmp_path, capsys):
    tokenizer = HuggingFace(str(tokenizer_files.huggingface(tmp_path)))
    (tmp_path / "a.txt").write_text("a cat sat <unused0> on <bos> a mat\n" * 40)
    sources = (Source(TextFiles(str(tmp_path / "a.txt")), Causal()),)
    data = corpus.decoder_only(tmp_path, rows=2, streams=2, sources=sources, tokenizer=tokenizer)
    run: Any = types.SimpleNamespace(data=data, model=tiny.GEMMA3, train=types.SimpleNamespace(seed=0))
    data_module.show(data_preview.measure(run), rows=0)
    assert (
        "special tokens spelled in 0: <bos> 40, <unused0> 40 (the first 1 documents), read as text: "
        "data.tokenizer.special_tokens_in_text\n"
    ) in capsys.readouterr().out
