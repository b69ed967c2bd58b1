"""The files of configs/tasks: what their records are, and a run of each on a tiny model."""

import dataclasses
import json

import numpy as np
import pytest

from t5g2 import cli
from t5g2.checkpoint.folder import save_model
from t5g2.core.errors import UserError
from t5g2.data.sources.python_text import PythonText
from t5g2.data.sources.record_templates import RecordList
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.haystack import running_words
from t5g2.jobs import task_files
from tests import tiny, weights
from tests.data import tokenizer_files

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)


@pytest.fixture
def scores_of(tmp_path, monkeypatch):
    """The scores of a folder on the tasks of a file, each on its first records alone."""

    def few(task, keep):
        changes = {"data": RecordList(task.data.records[:keep]), "examples": None}
        if hasattr(task, "max_new_tokens"):
            changes["max_new_tokens"] = 2
        if hasattr(task, "train"):
            changes["train"] = RecordList(task.train.records[:600])
        return dataclasses.replace(task, **changes)

    def scores_of(model, tasks, *, keep, name=""):
        kept = [few(task, keep) for task in task_files.load([tasks]) if task.name.startswith(name)]
        monkeypatch.setattr(task_files, "load", lambda names: kept)
        flags = [f"--model={tmp_path / model}", f"--tasks={tasks}", f"--out={tmp_path / 'out'}", "--rows=4"]
        assert cli.main(["evaluate", *flags]) == 0
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
        return {name: score["value"] for name, score in scores.items()}

    return scores_of


@pytest.fixture
def model(tmp_path):
    """A tiny model in the folder `model`."""
    save_model(tmp_path / "model", weights.model(STACK), tokenizer=TOKENIZER.to_dict())
    return "model"


def test_held_out_text_is_completed_and_filled_in(model, scores_of):
    tasks = task_files.load(["heldout_text:7"])
    assert [task.name for task in tasks] == ["completion", "completion_loss", "filling", "filling_choice"]
    assert {task.examples for task in tasks} == {7}
    records = tasks[0].data.records
    assert len(records) > 50
    for record in records:
        assert record["with_gap"].replace("____", record["gap"]) == f"{record['beginning']} {record['rest']}"
        assert record["rest"].startswith(record["next"])
        assert record["gap"] in record["choices"]
        assert len(set(record["choices"])) == 4
    assert task_files.load(["heldout_text:7"])[0].data == tasks[0].data, "the same records each time"
    scores = scores_of(model, "heldout_text", keep=3)
    assert 0 < scores["completion_loss/bits_per_byte"] < 20
    assert 0 <= scores["filling_choice/accuracy"] <= 1
    assert {"completion/chrf", "completion/rouge1", "filling/exact_match"} <= scores.keys()


def test_functions_and_docstrings_find_each_other(model, scores_of):
    scores = scores_of(model, "docstrings:5", keep=4, name="docstring_retrieval")
    assert scores["docstring_retrieval/query_to_text@5"] == scores["docstring_retrieval/text_to_query@5"] == 1


def test_names_in_a_hundred_languages(model, scores_of):
    pytest.importorskip("babel", reason="the extra `eval` is not installed")
    names, coverage = task_files.load(["locales:1"])
    records, texts = names.data.records, coverage.data.records
    assert len({record["locale"] for record in records}) == len(records) == len(texts) > 100
    german = {name: own for record in task_files.load(["locales:150"])[0].data.records if record["locale"] == "de"
              for name, own in [(record["english"], record["own"])]}  # fmt: skip
    assert german["Germany"] == "Deutschland"
    assert all(own != english for english, own in german.items())
    assert all(f"{record['english']} =" not in record["solved"] for record in records)
    first = records[0]["locale"]
    scores = scores_of(model, "locales:1", keep=2)
    assert scores[f"locale_coverage/bytes_per_token/{first}"] == scores["locale_coverage/bytes_per_token"] == 1
    assert scores["locale_coverage/unknown"] == 0
    assert 0 <= scores[f"locale_names/chrf/{first}"] <= 100


def test_digits_are_pictures(tmp_path, scores_of):
    tasks = task_files.load(["digits"])
    assert [task.name for task in tasks] == ["digit_captions", "digit_question"]
    records = tasks[0].data.records
    assert len(records) == 297
    assert np.asarray(records[0]["image"]).shape == (128, 128, 3)
    with pytest.raises(UserError, match="unknown kind of model 'duel' of the digits; did you mean 'dual'"):
        task_files.load(["digits:duel"])
    assert {record["word"] for record in records} >= {"zero", "nine"}
    images = dataclasses.replace(tiny.IMAGES, token=7, begin=5, end=6)
    encoder = dataclasses.replace(STACK, images=images)
    config = dataclasses.replace(tiny.T5GEMMA2, encoder=encoder, decoder=STACK, eoi_id=6)
    save_model(tmp_path / "pictures", weights.model(config), tokenizer=TOKENIZER.to_dict())
    scores = scores_of("pictures", "digits", keep=3)
    assert {"digit_captions/chrf", "digit_question/exact_match"} <= scores.keys()


def test_a_dual_encoder_tells_digits_apart_after_a_linear_probe(tmp_path, scores_of):
    """Above chance, 0.1, even with random weights: an embedding of a picture is a function of it."""
    text = dataclasses.replace(tiny.SIGLIP.text, vocab_size=300, length=16)
    save_model(tmp_path / "siglip", weights.model(dataclasses.replace(tiny.SIGLIP, text=text)))
    tokenizer_files.siglip(tmp_path / "siglip")
    scores = scores_of("siglip", "digits:dual", keep=100)
    assert scores["digit_probe/accuracy"] > 0.2
    assert 0 <= scores["digit_classes/accuracy"] <= 1


def test_co_reference_at_short_lengths_fits_into_them():
    """Two passages of eight words, in a conversation of as many bytes as the length has room for."""
    [task] = task_files.load(["coreference:1024+2048"])
    cells = task.cells()
    assert [cell.length for cell in cells] == [1024] * 6 + [2048] * 6
    words = running_words(PythonText(split="heldout").open(), 2048, seed=0)
    for cell in (cells[0], cells[-1]):
        example = task.example(cell, words, TOKENIZER)
        room = cell.length - 1 - task.max_new_tokens
        # less than a turn of room is left
        assert room - 200 < len(TOKENIZER.encode(example.prompt)) <= room
        assert len(example.answers[0][10:].split()) == 8


def test_the_same_text_goes_on_after_beginnings_of_every_length(model, scores_of):
    """All records are read, in every call the same places; what is predicted begins where the beginning ends."""
    tasks = task_files.load(["continuation:64+16"])
    assert [task.name for task in tasks] == ["continuation_16", "continuation_64"]
    assert {task.examples for task in tasks} == {None}, "each name would draw others"
    short, long = (task.data.records for task in tasks)
    assert short == task_files.load(["continuation:16"])[0].data.records
    assert len(short) == 24
    for record, longer in zip(short, long, strict=True):
        assert (len(record["before"]), len(longer["before"]), len(record["end"])) == (16, 64, 256)
        assert longer["before"].endswith(record["before"])
        assert longer["end"] == record["end"]
        assert not record["before"][-1].isspace()
    scores = scores_of(model, "continuation:16+64", keep=2)
    assert {f"continuation_{length}/bits_per_byte" for length in (16, 64)} <= scores.keys()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("99999999", r"no held-out document has 99999999 characters before a place; give at most \d+$"),
        ("0", "lengths '0' of continuation; give numbers of characters"),
        ("512,x", "lengths '512,x' of continuation; give numbers of characters"),
    ],
)
def test_lengths_of_beginnings_that_cannot_be(lengths, message):
    with pytest.raises(UserError, match=message):
        task_files.load([f"continuation:{lengths}"])
