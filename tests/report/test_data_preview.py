"""Lines that `t5g2 data` prints of a run's first batches."""

import re
import sys
import types
from typing import Any

import pytest

from t5g2.commands import data as data_module
from t5g2.report import data_preview
from tests import tiny
from tests.data import corpus


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
