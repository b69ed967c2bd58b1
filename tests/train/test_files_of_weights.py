"""The files beside the weights that a run starts from, in the model folder that it writes."""

import dataclasses
import json
import logging

import jax
import pytest
from PIL import Image

from t5g2.api import loading
from t5g2.checkpoint import folder as folders
from t5g2.core import sharding as meshes
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.data import image_processor
from t5g2.data.image_tokens import ImageRows
from t5g2.data.images import ImageProcessor
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.models import build
from t5g2.models.config import to_dict
from t5g2.train import experiment as experiments
from t5g2.train import files_of_weights, image_rows
from t5g2.train import plan as plans
from t5g2.train import workdir as workdirs
from t5g2.train.state import TrainState
from t5g2.train.weight_origin import Adapt, Init
from tests import tiny
from tests.data import tokenizer_files

DECODER = dataclasses.replace(tiny.GEMMA3, vocab_size=768)
ENCODER_DECODER = dataclasses.replace(tiny.T5GEMMA2, encoder=DECODER, decoder=DECODER)
IMPORT = {"kind": "import", "source": "elsewhere"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An imported model folder that says everything beside its weights."""
    root = tmp_path_factory.mktemp("weights")
    pieces = HuggingFace(str(tokenizer_files.huggingface(root)))
    params = build.make(ENCODER_DECODER, key=jax.random.key(0))
    (root / "chat_template.jinja").write_text("{{ messages }}")
    (root / "preprocessor_config.json").write_text('{"resample": 3}')
    folders.save_model(
        root / "model",
        params,
        tokenizer=pieces.to_dict(),
        provenance=IMPORT,
        generation_config={"eos_token_id": [1, 106], "top_k": 64},
        extra_files=(*pieces.files, root / "chat_template.jinja", root / "preprocessor_config.json"),
    )
    return root / "model"


def experiment_from(weights, **parts):
    source = {"text": {"kind": "python"}, "objective": {"kind": "prefix_lm"}}
    lengths = {"rows": 8, "encoder_length": 64, "decoder_length": 64, "chunk_tokens": 32, "streams": 8}
    return experiments.build(
        {
            "model": to_dict(ENCODER_DECODER),
            "data": {"sources": [source], **lengths},
            "optim": {"schedule": {"kind": "constant", "peak": 1e-3}},
            "train": {"steps": 2},
            "init": {"params": str(weights)},
            **parts,
        }
    )


def test_a_trained_model_has_the_files_of_its_weights(weights, tmp_path):
    """It ends its texts where the weights' model does; its encoder was trained without BOS, and reads none."""
    assert loading.load(weights).encoder_bos
    experiment = experiment_from(weights)
    params = build.make(ENCODER_DECODER, key=jax.random.key(1))
    workdirs.finish(tmp_path, experiment, 2, TrainState(2, params, None), IMPORT)
    model = loading.load(tmp_path / "model")
    assert model.stop_ids == (1, 106)
    assert not model.encoder_bos
    assert model.folder.provenance == {"kind": "trained", "weights": IMPORT}
    assert model.resampling == "bicubic"
    names = ["chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
    assert [file.name for file in model.folder.extra_files] == names
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["top_k"] == 64


def test_of_a_run_that_goes_on_from_another_ones_state(weights, tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    workdirs.write_experiment(tmp_path / "first", experiment_from(weights), None)
    second = experiment_from(
        weights, init={"resume": str(tmp_path / "first")}, data=experiments.dump(experiment_from(weights))["data"]
    )
    assert workdirs.first_init(second) == Init(params=str(weights))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdirs.first_init(dataclasses.replace(second, init=Init("~/first"))) == Init(params=str(weights))


def test_another_tokenizer_has_other_ids(weights):
    """The template and the ids of the end belong to the tokenizer of the weights, the image processor does not."""
    experiment = experiment_from(weights)
    bytes_data = dataclasses.replace(experiment.data, tokenizer=Bytes())
    other = files_of_weights.read(experiment.init, dataclasses.replace(experiment, data=bytes_data))
    assert [file.name for file in other.files] == ["preprocessor_config.json"]
    assert other.generation_config is None


def test_of_two_sources_the_decoders_files_count(weights, tmp_path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "decoder" / "tokenizer.json").write_bytes((weights / "tokenizer.json").read_bytes())
    found = files_of_weights.read(Init(adapt=Adapt(f"{weights},{tmp_path / 'decoder'}")), experiment_from(weights))
    assert found.generation_config == {"eos_token_id": 7}
    assert weights / "chat_template.jinja" in found.files


def test_weights_that_are_gone_at_the_end(weights, tmp_path, caplog):
    """The trained weights are written in any case."""
    experiment = experiment_from(weights)
    with caplog.at_level(logging.WARNING, logger="t5g2"):
        found = files_of_weights.read_or_warn(Init(params=str(tmp_path / "gone")), experiment)
    assert found == files_of_weights.FilesOfWeights(experiment.data.tokenizer.files, None, None)
    assert "gone does not exist any more" in caplog.text


def test_a_tokenizer_whose_file_is_gone_at_the_end(weights, tmp_path, caplog):
    """The same file beside the weights takes its place; without one the trained weights are written in any case."""
    file = tmp_path / "tokenizer.json"
    file.write_bytes((weights / "tokenizer.json").read_bytes())
    data = experiments.dump(experiment_from(weights))["data"]
    data["tokenizer"] = {"kind": "huggingface", "file": str(file)}
    experiment = experiment_from(weights, data=data)
    file.unlink()
    assert weights / "tokenizer.json" in files_of_weights.read(experiment.init, experiment).files
    (tmp_path / "others").mkdir()
    for folder in (tmp_path / "others", tmp_path / "gone"):
        with caplog.at_level(logging.WARNING, logger="t5g2"):
            found = files_of_weights.read_or_warn(Init(params=str(folder)), experiment)
        assert found.files == ()
    missing = (
        f"the model folder has no tokenizer.json: the file of the run's tokenizer, {file}, does not exist any more"
    )
    assert caplog.text.count(missing) == 2
    assert f"{file}, the file of the run's tokenizer, does not exist any more" in caplog.text


def test_a_damaged_file_is_named_when_the_run_starts(weights, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((weights / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        files_of_weights.read(Init(params=str(tmp_path)), experiment_from(weights))


def test_samples_of_a_run_end_where_its_weights_end_texts(weights):
    """The tokens of generation_config.json, which the evaluation of a run takes beside the tokenizer's EOS."""
    experiment = experiment_from(weights)
    plan = plans.make(experiment, meshes.make(MeshShape(), jax.devices()[:1]))
    assert plan.eval_context(range(8)).stop_ids == (1, 106)
    new = dataclasses.replace(experiment, init=Init(), data=dataclasses.replace(experiment.data, tokenizer=Bytes()))
    assert files_of_weights.stop_ids(new.init, new) == ()


@pytest.fixture
def with_images(weights):
    """Returns an experiment from initial weights, with images of a filter, or on text; no weight is read."""
    tokenizer = HuggingFace(str(weights / "tokenizer.json"))
    ids = {name: tokenizer.id(role) for name, role in image_rows.NAMES.items()}
    images = dataclasses.replace(tiny.IMAGES, **ids)
    model = dataclasses.replace(ENCODER_DECODER, encoder=dataclasses.replace(DECODER, images=images))
    text = experiment_from(weights)

    def make(init, resampling=None):
        rows = resampling and ImageRows(1, size=16, tokens=4, resampling=resampling, **ids)
        data = dataclasses.replace(text.data, images=rows)
        return dataclasses.replace(text, model=model, init=init, data=data)

    return make


@pytest.mark.parametrize(
    ("file", "trained", "read"),
    [
        ('{"resample": 3}', "lanczos", "lanczos"),
        ('{"resample": 3}', "bicubic", None),
        ('{"resample": 3}', None, None),
        (None, "bicubic", "bicubic"),
        (None, "bilinear", None),
        ("{}", "bicubic", "bicubic"),
    ],
)
def test_images_are_read_as_they_were_in_training(with_images, tmp_path, file, trained, read):
    """A model that was trained with one filter is not read with another; a file that says the same is copied."""
    if file is not None:
        (tmp_path / "preprocessor_config.json").write_text(file)
        (tmp_path / "processor_config.json").write_text(f'{{"image_processor": {file}}}')
    experiment = with_images(Init(params=str(tmp_path)), trained)
    beside = files_of_weights.read(experiment.init, experiment)
    copied = {path.name for path in beside.files if path.name in image_processor.FILES}
    assert copied == (set(image_processor.FILES) if file and not read else set())
    written = beside.image_processor
    assert (written and written["resample"]) == (read and int(Image.Resampling[read.upper()]))
    # the same where the weights are gone at the end: what training did is known
    again = files_of_weights.read_or_warn(Init(params=str(tmp_path / "gone")), experiment).image_processor
    expected = trained if trained not in (None, "bilinear") else None
    assert (again and again["resample"]) == (expected and int(Image.Resampling[expected.upper()]))


def test_a_tower_of_its_own_brings_its_image_processor(with_images, tmp_path):
    """As an adaptation by `t5g2 adapt` has it: the numbers of the tower's folder, as a processor of the model."""
    fields = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.25, 0.5, 0.75]}
    for name, data in (("source", {"resample": 0}), ("tower", fields), ("silent", None)):
        (tmp_path / name).mkdir()
        if data is not None:
            (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(data))

    def written(tower):
        init = Init(adapt=Adapt(str(tmp_path / "source"), vision=str(tmp_path / tower)))
        return files_of_weights.read(init, with_images(init))

    assert written("tower").image_processor == image_processor.to_dict(
        ImageProcessor("bicubic", mean=(0.25, 0.5, 0.75)), 16
    )
    assert not {path.name for path in written("tower").files} & set(image_processor.FILES)
    assert written("silent").image_processor is None
    assert tmp_path / "source" / "preprocessor_config.json" in written("silent").files


def test_the_written_model_reads_images_as_in_training(with_images, weights, tmp_path):
    experiment = with_images(Init(params=str(weights)), "lanczos")
    params = build.make(experiment.model, key=jax.random.key(1))
    workdirs.finish(tmp_path, experiment, 2, TrainState(2, params, None), None)
    assert loading.load(tmp_path / "model").resampling == "lanczos"
