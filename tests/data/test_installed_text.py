"""The text of configs/gemma3_270m.py: what is held out is not trained on, and documents have their lengths."""

import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def installed_text(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS))
    import installed_text

    yield installed_text
    sys.modules.pop("installed_text")


def test_documents_are_trained_on_or_held_out(installed_text):
    """By name, the same ones in every process; a tenth is held out."""
    documents = {f"document {i}": f"text {i}" for i in range(2_000)}
    training, heldout = installed_text.by_hash(documents)
    assert training | heldout == documents
    assert not training.keys() & heldout.keys()
    assert 150 < len(heldout) < 250
    assert "document 11" in training
    assert "document 12" in heldout


def test_texts_of_the_library_are_trained_on_or_held_out(installed_text):
    training, heldout = installed_text.python()
    assert len(training) > 100
    assert len(heldout) > 10
    assert not set(training.values()) & set(heldout.values())


def test_a_kind_has_at_most_so_many_characters(installed_text):
    """Documents are cut to the longest, and come in an order that neither their number nor their texts change."""
    documents = {f"document {i}": "x" * (1_000 * i) for i in range(1, 12)}
    whole = installed_text.up_to(10**6, "python", documents)
    assert {name: len(text) for name, text in whole.items()} == {
        f"python document {i}": min(1_000 * i, installed_text.LONGEST) for i in range(1, 12)
    }
    part = installed_text.up_to(9_000, "python", documents)
    assert 0 < sum(map(len, part.values())) <= 9_000
    assert list(part) == list(whole)[: len(part)]
