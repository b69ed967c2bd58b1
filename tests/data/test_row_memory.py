"""Sizes are compared with the memory of the machine before anything is allocated, and with each other at once."""

import pytest

from t5g2.core import machine
from t5g2.core.errors import UserError
from t5g2.data import packed_rows, row_memory
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import Pipeline
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2
from tests.data import corpus


def huge(**changes):
    fields = {
        "sources": (Source(TextFiles("/nowhere"), UL2()),),
        "tokenizer": Bytes(),
        "rows": 4,
        "streams": 4,
        "encoder_length": 2**20,
        "decoder_length": 2**20,
        "chunk_tokens": 1000,
    }
    return DataConfig(**(fields | changes))


def test_bytes_of_a_row(tmp_path):
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    arrays = packed_rows.empty_rows(config, 1)
    assert row_memory.row_bytes(config) == (sum(array.nbytes for array in arrays.values()),) * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"streams": 2**16, "packing_rows": 4096},
        {"prefetch": 1024, "rows": 2**16, "streams": 2**16, "packing_rows": 1},
        {"streams": 2**16, "packing_rows": 4096, "workers": 1024},
    ],
)
def test_rows_that_do_not_fit_are_refused_before_a_text_is_looked_for(changes):
    with pytest.raises(UserError, match=r"would take about [\d,]+ GiB, and this machine has \d.*; lower streams"):
        Pipeline(huge(**changes), seed=0)


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    config = corpus.mixed(tmp_path, rows=4, streams=4)
    for text, fits in (("max\n", True), (str(2**40), True), ("1000\n", False)):
        limit.write_text(text)
        monkeypatch.setattr(machine, "LIMITS", (str(limit), "/nowhere"))
        if fits:
            row_memory.check(config, range(4))
            continue
        with pytest.raises(UserError, match="this machine has 0"):
            row_memory.check(config, range(4))


def test_what_is_searched_for_a_message_is_not_tried_one_by_one(monkeypatch):
    tried, lengths = [], UL2.lengths
    monkeypatch.setattr(UL2, "lengths", lambda self, tokens: tried.append(tokens) or lengths(self, tokens))
    with pytest.raises(UserError, match=r"lower chunk_tokens to 1165085$"):
        huge(chunk_tokens=2**24, sources=(Source(TextFiles("/nowhere"), UL2(sentinels="cyclic")),))
    assert len(tried) < 50
    with pytest.raises(UserError, match=r"nearest streams that fit: 32771, 65542, 98313$"):
        huge(rows=32771, streams=2**16)
    with pytest.raises(UserError, match=r"rows = 6 and streams = 4: .*nearest streams that fit: 2, 3, 6$"):
        huge(rows=6, streams=4)


@pytest.mark.parametrize("tokens", [17, 100, 12_345])
def test_the_longest_chunk_is_that_of_a_search_one_by_one(tokens):
    with pytest.raises(UserError) as refused:
        huge(chunk_tokens=20_000, decoder_length=tokens)
    objective = UL2()
    longest = max(n for n in range(9, 20_001) if objective.lengths(n)[1] <= tokens)
    assert str(refused.value).endswith(f"lower chunk_tokens to {longest}")
