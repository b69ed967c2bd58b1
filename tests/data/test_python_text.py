"""The standard library as text: split by name, limited in size."""

import pytest

from t5g2.core.errors import UserError
from t5g2.data.sources.python_text import PythonText


def test_python_text_is_split_by_name():
    train, heldout, everything = (PythonText(split).open() for split in ("train", "heldout", "all"))
    texts = {split: {d[i] for i in range(len(d))} for split, d in [("train", train), ("heldout", heldout)]}
    assert not texts["train"] & texts["heldout"]
    assert texts["train"] | texts["heldout"] == {everything[i] for i in range(len(everything))}
    assert len(train) + len(heldout) == len(everything)
    assert 0.02 < len(heldout) / len(everything) < 0.2
    assert train.characters > 1_000_000
    # the language reference, and modules with their docstrings
    assert any(text.startswith('The "if" statement\n') for text in texts["train"] | texts["heldout"])
    assert any(text.startswith('"""') and "\nimport " in text for text in texts["train"])


def test_python_text_can_be_small():
    small = PythonText("train", max_bytes=300_000).open()
    assert 0 < sum(len(small[i].encode()) for i in range(len(small))) <= 300_000
    larger = PythonText("train", max_bytes=600_000).open()
    assert {small[i] for i in range(len(small))} < {larger[i] for i in range(len(larger))}
    with pytest.raises(UserError, match="no document of the standard library is in split 'train' with max_bytes = 1"):
        PythonText("train", max_bytes=1).open()
    with pytest.raises(UserError, match="heldout_percent = 0; it must be at least 1 and at most 99"):
        PythonText(heldout_percent=0)
