"""Control characters of texts, keys and names reach a terminal as escapes, whatever prints them."""

import io
import json
import logging

import pytest

from t5g2 import cli
from t5g2.core import logs
from t5g2.core.terminal import escaped
from t5g2.data import preview
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import Pipeline
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import Causal
from tests.data import corpus

CLEAR, TITLE = "\x1b[2J", "\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢\t\n", "plain é 漢\t\n"),
        (f"a{CLEAR}b", r"a\x1b[2Jb"),
        (TITLE, r"\x1b]0;title\x07"),
        ("over\rwritten\b", r"over\rwritten\x08"),
        ("\x9b1m\x7f\x00", r"\x9b1m\x7f\x00"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\udc80", r"\udc80"),
    ],
)
def test_escapes(text, shown):
    assert escaped(text) == shown
    shown.encode()


def test_rows_of_a_text_with_control_characters(tmp_path):
    line = json.dumps({"text": f"good {CLEAR} text \r\n of some length"})
    corpus.write_files(tmp_path, a__jsonl=line)
    source = Source(Jsonl(str(tmp_path)), Causal(), name="na\x1bme")
    config = DataConfig((source,), Bytes(), rows=1, encoder_length=0, decoder_length=64, chunk_tokens=60, streams=1)
    with Pipeline(config, seed=0) as pipeline:
        text = preview.format_row(pipeline.next(), 0, config)
    assert r"good \x1b[2J text ␍⏎ of" in text
    assert "\x1b" not in text


def test_messages_and_log_lines(tmp_path, capsys, monkeypatch):
    """A key that is not known, from a file; a log line with a name."""
    corpus.write_files(tmp_path, a__jsonl=json.dumps({f"te{CLEAR}xt": 1}))
    text = {"kind": "jsonl", "path": str(tmp_path)}
    source = json.dumps([{"text": text, "objective": {"kind": "causal"}}])
    arguments = ["--config=configs/quickstart.py:source", f"--config.data.sources={source}"]
    assert cli.main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert r"the record is an object with te\x1b[2Jxt" in said
    assert "\x1b" not in said
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    handler = logs._AboveTheBar()
    handler.setFormatter(logs._LineFormatter("%(message)s"))
    handler.emit(logging.makeLogRecord({"msg": "source %s\nis read", "args": (TITLE,), "levelno": logging.INFO}))
    assert stream.getvalue() == "source \\x1b]0;title\\x07\nis read\n"
