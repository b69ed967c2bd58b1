"""Runs, adaptations and teachers of GGUF files and foreign folders: what may be given, is recorded, and is said."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from t5g2 import cli
from t5g2.checkpoint import export_folder, import_folder
from t5g2.checkpoint.import_folder import open_any
from t5g2.core import sharding
from t5g2.core.errors import UserError
from t5g2.data.tokenizers import registry
from t5g2.jobs import dry_run, teacher_cache
from t5g2.models import build
from t5g2.models.config import to_dict
from t5g2.models.distillation import Distillation
from t5g2.train import adaptation, files_of_weights, restore, resume
from t5g2.train import experiment as experiments
from t5g2.train import plan as plans
from t5g2.train import workdir as workdirs
from t5g2.train.state import TrainState
from t5g2.train.weight_origin import Adapt
from tests import hub_cache
from tests.checkpoint import gguf_files
from tests.checkpoint.test_gguf import PIECES

ADDRESS = "hf://owner/tiny@{}/tiny.gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file in 8 bits, and the cache of this machine in a folder of its own."""
    root = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T5G2_CACHE", str(root / "cache"))
        (root / "files").mkdir()
        gguf_files.write(root / "files" / "tiny.gguf", "Q8_0")
        yield root / "files" / "tiny.gguf"


def node(model, **parts):
    source = {"text": {"kind": "python"}, "objective": {"kind": "causal"}, "name": "text"}
    lengths = {"encoder_length": 0, "decoder_length": 32, "chunk_tokens": 31}
    return {
        "model": model,
        "data": {"sources": [source], "rows": 8, "streams": 8, **lengths},
        "optim": {"schedule": {"kind": "constant", "peak": 1e-3}},
        "train": {"steps": 2},
        **parts,
    }


@pytest.fixture(scope="module")
def given(file, tmp_path_factory):
    """The same model in every form that it may be given in, by the name of the form."""
    root = tmp_path_factory.mktemp("forms")
    import_folder.import_model(file, root / "model folder")
    export_folder.export_model(root / "model folder", root / "Hugging Face folder")
    with hub_cache.empty(root / "hub", offline=True) as cache:
        hub_cache.add(cache, "owner/tiny", file.parent)
        hub_cache.add(cache, "owner/folder", root / "Hugging Face folder")
        forms = {name: str(root / name) for name in ("model folder", "Hugging Face folder")}
        addresses = {"address": "hf://owner/folder", "address of a file": ADDRESS.format("main")}
        yield forms | {"GGUF file": str(file)} | addresses


@pytest.mark.parametrize("form", ["model folder", "Hugging Face folder", "GGUF file", "address", "address of a file"])
def test_a_run_begins_with_a_model_in_any_format(given, form, caplog):
    """Its architecture, weights, tokenizer and settings of generation are those of the model."""
    source = given[form]
    experiment = experiments.build(node({"folder": source}, init={"params": source}))
    model = import_folder.open_any(source)
    assert experiment.model == model.config == import_folder.open_any(given["model folder"]).config
    assert experiment.data.tokenizer.encode("the cat").tolist() == [PIECES.index(piece) for piece in ("the", "▁cat")]
    assert files_of_weights.read(experiment.init, experiment).generation_config["eos_token_id"] == 1
    lines = dry_run._origin(experiment, ()).splitlines()
    assert lines[0] == f"weights: from init.params, {experiment.init.params}"
    # an export has no room for the notes
    assert any(map(is_of_quantisation, lines)) == (form not in ("Hugging Face folder", "address"))
    params, provenance = restore.initial_params(plans.make(experiment, sharding.make(experiment.mesh)))
    np.testing.assert_array_equal(params.embedder.table[...], model.leaves["embedder.table", None].read())
    assert provenance == model.provenance


@pytest.mark.parametrize("origin", ["params", "adapt", "teacher"])
def test_a_record_is_read_where_the_cache_has_been_emptied(given, origin, tmp_path, monkeypatch):
    """The tokenizer that it names is there again, of the same hash, made of the same file."""
    file = given["GGUF file"]
    init = {"params": {"params": file}, "adapt": {"adapt": {"source": file}}, "teacher": {}}[origin]
    config = node({"folder": given["model folder"]}, init=init)
    if origin == "teacher":
        config["distill"] = {"teacher": file}
    if origin == "adapt":
        config["model"] = {"kind": "t5gemma", **dict.fromkeys(("encoder", "decoder"), to_dict(open_any(file).config))}
        config["data"]["sources"][0]["objective"] = {"kind": "prefix_lm"}
        config["data"] |= {"encoder_length": 64, "decoder_length": 64}
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "first"))
    experiment = experiments.build(config)
    record = json.loads(json.dumps(experiments.dump(experiment)))
    assert Path(record["data"]["tokenizer"]["file"]).is_relative_to(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    again = experiments.build(record)
    assert experiments.fingerprint(again) == experiments.fingerprint(experiment)
    assert again.data.tokenizer.encode("the cat").tolist() == experiment.data.tokenizer.encode("the cat").tolist()


def test_a_run_goes_on_with_another_cache(given, tmp_path, monkeypatch):
    """While the one before is still there, and with another time of the file: the tokenizer is the same."""
    file = Path(shutil.copy(given["GGUF file"], tmp_path))
    built = []
    for cache, time in (("first", 1), ("second", 1), ("second", 2)):
        os.utime(file, (time, time))
        monkeypatch.setenv("T5G2_CACHE", str(tmp_path / cache))
        built.append(experiments.build(node({"folder": str(file)}, init={"params": str(file)})))
    assert len({each.data.tokenizer.files for each in built}) == 3
    before, *others = built
    for other in others:
        assert resume.check_resume(experiments.dump(before), experiments.dump(other)) == {}
        assert experiments.fingerprint(other) == experiments.fingerprint(before)


def test_a_run_ends_where_its_folder_in_the_cache_is_gone(given, tmp_path, monkeypatch):
    """And the file has another time: the tokenizer of the same hash beside the weights is the run's."""
    file = Path(shutil.copy(given["GGUF file"], tmp_path))
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    experiment = experiments.build(node({"folder": str(file)}, init={"params": str(file)}))
    os.utime(file, (1, 1))
    shutil.rmtree(tmp_path / "cache")
    state = TrainState(2, build.make(experiment.model, key=jax.random.key(0)), None)
    workdirs.finish(tmp_path / "run", experiment, 2, state, None)
    model = open_any(tmp_path / "run" / "model")
    assert registry.from_dict(model.tokenizer, model.path) == experiment.data.tokenizer
    assert json.loads((model.path / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_run_goes_on_from_no_model(given, tmp_path):
    """An empty folder may become the workdir of a run before this one starts."""
    message = r"init\.resume, .*, is no workdir of a run: .*begin with the weights of a model alone, give init\.params"
    for form in ("model folder", "Hugging Face folder"):
        config = node({"folder": given[form]}, init={"resume": given[form]})
        config["data"]["tokenizer"] = {"kind": "bytes", "sentinels": 5}
        experiment = experiments.build(config)
        with pytest.raises(UserError, match=message):
            dry_run._origin(experiment, ())
    with pytest.raises(UserError, match=r"tiny\.gguf' is a GGUF file, .*begin with the weights alone: init\.params"):
        experiments.build(node({"folder": given["GGUF file"]}, init={"resume": given["GGUF file"]}))
    for there in (tmp_path, tmp_path / "later"):
        workdirs.require_run(there)


def test_what_is_no_model_is_named(given, tmp_path):
    (tmp_path / "a.bin").touch()
    for name, message in (
        ("none.gguf", r"none\.gguf does not exist; give a Hugging Face folder"),
        ("a.bin", r"a\.bin is a file; give the folder that it is in"),
    ):
        wrong = str(tmp_path / name)
        for config in (node({"folder": wrong}), node({"folder": given["GGUF file"]}, init={"params": wrong})):
            with pytest.raises(UserError, match=message):
                experiments.build(config)
    with pytest.raises(UserError, match=r"none\.json does not exist; give a file like the model\.json of"):
        experiments.build(node({"folder": str(tmp_path / "none.json")}))


def is_of_quantisation(note):
    return "weights were quantised: 15 tensors are Q8_0, of 28" in note


def test_an_adaptation_names_the_file_and_tells_of_its_weights(file, tmp_path, capsys):
    """In its output and its record; so does one of what was imported, or trained, before."""
    assert cli.main(["adapt", f"--source={file}", "--target=t5gemma2", f"--out={tmp_path / 'adapted'}"]) == 0
    record = json.loads((tmp_path / "adapted" / "provenance.json").read_text())
    assert record["source"] == str(file)
    assert any(map(is_of_quantisation, record["notes"]))
    assert "not in the file, and assumed: rope_local_base_freq = 10000.0" in record["notes"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("source   ")]
    assert printed == [f"source   {note}" for note in record["notes"]]

    import_folder.import_model(file, tmp_path / "imported")
    again = adaptation.adapt_folder(Adapt(str(tmp_path / "imported")), "t5gemma2", tmp_path / "again")
    assert (again.source, list(again.notes)) == (str(tmp_path / "imported"), record["notes"])
    provenance = tmp_path / "imported" / "provenance.json"
    provenance.write_text(json.dumps({"kind": "trained", "weights": json.loads(provenance.read_text())}))
    both = adaptation.adapt_folder(Adapt(f"{file},{tmp_path / 'imported'}"), "t5gemma2", tmp_path / "both")
    assert both.source == f"encoder {file}, decoder {tmp_path / 'imported'}"
    assert list(both.notes) == [f"{side}: {note}" for side in ("encoder", "decoder") for note in record["notes"]]


def test_an_adaptation_of_a_file_of_the_hub_names_its_commit(file, tmp_path):
    """Also where two commits have the same file, which has one folder in the cache."""
    with hub_cache.empty(tmp_path / "hub", offline=True) as cache:
        revisions = {"main": hub_cache.COMMIT, "new": hub_cache.OTHER_COMMIT}
        for revision, commit in revisions.items():
            hub_cache.add(cache, "owner/tiny", file.parent, commit=commit, revision=revision)
        for revision, commit in revisions.items():
            provenance = adaptation.adapt_folder(Adapt(ADDRESS.format(revision)), "t5gemma2", tmp_path / commit)
            assert provenance.source == ADDRESS.format(commit)


def test_the_logits_of_a_file_are_recorded_under_its_name(file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat at the cat " * 4)
    config = node(to_dict(import_folder.open_any(file).config), distill={"teacher": str(file)})
    config["data"]["sources"][0]["text"] = {"kind": "text", "path": str(tmp_path / "text")}
    experiment = experiments.build(config)
    how = Distillation(method="top_k", per_token=4)
    teacher_cache.cache_teacher_logits(experiment, str(file), tmp_path / "logits", how, shards=1)
    [record] = [json.loads(path.read_text()) for path in (tmp_path / "logits" / "text").glob("*.json")]
    assert record["teacher"] == str(file)
