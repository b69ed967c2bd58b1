"""Runs, adaptations and teachers of GGUF files: what they are recorded as, and what is said of their weights."""

import json

import pytest

from t5g2 import cli
from t5g2.checkpoint import import_folder
from t5g2.jobs import teacher_cache
from t5g2.models.config import to_dict
from t5g2.models.distillation import Distillation
from t5g2.train import adaptation
from t5g2.train import experiment as experiments
from t5g2.train.weight_origin import Adapt
from tests import hub_cache
from tests.checkpoint import test_gguf as gguf_files

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
