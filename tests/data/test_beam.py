"""Tokens by an Apache Beam pipeline: the files that are made without one. Runs where Beam is: `make test-beam`."""

import importlib.util
import sys

import pytest

from t5g2 import cli
from t5g2.core.errors import UserError
from t5g2.data.shards import beam, token_shards
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.tokenizers.byte_level import Bytes

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache-beam is not installed; `make test-beam` runs these, in an environment of their own",
)


@pytest.fixture
def job(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "the text of record {i}, of its own length{i * "!"}"}}\n' for i in range(40)))
    return token_shards.Job(Jsonl(str(file)).open(on_bad_record="stop"), Bytes(), {}, 7)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_without_beam_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 't5g2\[beam\]'"):
        beam.pipeline("--runner=DirectRunner")


@needs_beam
@pytest.mark.parametrize("more", ["", " --direct_num_workers=2 --direct_running_mode=multi_threading"])
def test_a_pipeline_makes_the_same_files(job, tmp_path, more):
    said = token_shards.write(job, tmp_path / "alone")
    assert token_shards.write(job, tmp_path / "beam", run=beam.pipeline(f"--runner=DirectRunner{more}")) == said
    assert contents(tmp_path / "beam") == contents(tmp_path / "alone")


@needs_beam
def test_a_pipeline_makes_what_is_missing(job, tmp_path):
    token_shards.write(job, tmp_path / "alone")
    token_shards.write(job, tmp_path / "beam")
    lost = tmp_path / "beam" / job.tokens_file(3)
    kept = tmp_path / "beam" / job.tokens_file(4)
    before = kept.stat().st_mtime_ns
    lost.unlink()
    token_shards.write(job, tmp_path / "beam", run=beam.pipeline("--runner=DirectRunner"))
    assert kept.stat().st_mtime_ns == before
    assert contents(tmp_path / "beam") == contents(tmp_path / "alone")


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [("--runer=DirectRunner", "knows no option --runer"), ("--runner=NoRunner", "NoRunner")],
)
def test_options_that_beam_does_not_know(options, message):
    with pytest.raises(UserError, match=message):
        beam.pipeline(options)


@needs_beam
def test_by_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i} " * 20)
    (tmp_path / "config.py").write_text(
        "def get_config():\n"
        "    text = {'kind': 'text', 'path': 'text'}\n"
        "    stack = {'vocab_size': 384, 'width': 32, 'layers': 1, 'mlp_width': 48, 'heads': 4, 'kv_heads': 2, "
        "'head_size': 8, 'window': 8, 'pattern': ['global']}\n"
        "    data = {'sources': [{'text': text, 'objective': {'kind': 'causal'}}], 'tokenizer': {'kind': 'bytes'}, "
        "'chunk_tokens': 40, 'rows': 4, 'encoder_length': 0, 'decoder_length': 64, 'streams': 4}\n"
        "    optim = {'optimizer': {'kind': 'adamw'}, 'schedule': {'kind': 'constant', 'peak': 1e-3}}\n"
        "    return {'model': {'kind': 'gemma', **stack}, 'data': data, 'optim': optim, 'train': {'steps': 1}}\n"
    )
    for out, more in (("alone", []), ("beam", ["--beam=--runner=DirectRunner"])):
        assert cli.main(["tokenize", "--config=config.py", f"--out={out}", "--shards=3", *more]) == 0
    assert contents(tmp_path / "beam" / "0") == contents(tmp_path / "alone" / "0")
    capsys.readouterr()
    assert cli.main(["tokenize", "--config=config.py", "--out=wrong", "--beam=--runner=NoRunner"]) == 2
    assert "NoRunner" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
