"""Images from a file to the loss: what the model is given, on one device and on eight, and that it learns from it."""

import dataclasses
import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.commands import data
from t5g2.core import sharding as meshes
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.data.images import preprocess, read
from t5g2.data.pipeline import Pipeline, to_global
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.tasks import HeldoutLoss
from t5g2.jobs import source_tokens
from t5g2.models import build
from t5g2.objectives import MultimodalPrefixLM
from t5g2.report import data_preview
from t5g2.train import config_file, image_rows, optim, plan, state, step
from t5g2.train import experiment as experiments
from t5g2.train.weight_origin import Adapt, Init
from tests import weights
from tests.data import corpus, image_corpus

CONFIG = "configs/t5gemma2_images.py"
SMALL = {
    "model.encoder.width": "32",
    "model.encoder.layers": "2",
    "model.encoder.mlp_width": "48",
    "model.encoder.head_size": "16",
    "model.encoder.images.vision.image_size": "16",
    "model.encoder.images.vision.patch_size": "4",
    "model.encoder.images.vision.width": "16",
    "model.encoder.images.vision.mlp_width": "24",
    "model.encoder.images.tokens": "4",
    "data.chunk_tokens": "60",
    "data.encoder_length": "64",
    "data.decoder_length": "64",
    "data.images.per_row": "3",
    "data.packing_rows": "2",
    "eval.tasks": "()",
    "optim.freeze": "()",
}
SMALL |= {name.replace("encoder", "decoder"): SMALL[name] for name in list(SMALL)[:4]}
RECORDS = tuple((f"<start_of_image> it is {color} now", (color,)) for color in image_corpus.NAMES)


@pytest.fixture(autouse=True)
def what_is_kept_goes_here(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))


loss_sums = jax.jit(step.loss_sums, static_argnames="options")


def load(folder, records=image_corpus.RECORDS, **changes):
    """The experiment of the config, smaller, on small images and texts of the tests."""
    image_corpus.jsonl(folder / "images", records)
    corpus.write_texts(folder / "texts", "few", 8)
    sources = [
        {
            "text": {"kind": "image_jsonl", "path": f"{folder}/images"},
            "objective": {"kind": "multimodal_prefix_lm"},
            "name": "images",
        },
        {"text": {"kind": "text", "path": f"{folder}/texts"}, "objective": {"kind": "ul2"}, "name": "text"},
    ]
    return config_file.load(CONFIG, [*SMALL.items(), ("data.sources", repr(sources)), *changes.items()])


def batch_of(experiment, *, skip=0):
    with Pipeline(experiment.data, seed=0) as pipeline:
        for _ in range(skip):
            pipeline.next()
        return pipeline.next().batch


def test_the_planned_batch_is_what_the_pipeline_gives(tmp_path, devices):
    experiment = load(tmp_path)
    planned, batch = plan.make(experiment, meshes.make(MeshShape(data=4, fsdp=2))).batch, batch_of(experiment)
    assert batch.images.shape == (8, 3, 16, 16, 3)
    assert jax.tree.structure(planned) == jax.tree.structure(batch)
    for abstract, array in zip(*map(jax.tree.leaves, (planned, batch)), strict=True):
        assert (abstract.shape, abstract.dtype) == (array.shape, array.dtype)


def test_the_loss_is_that_of_the_model_given_the_images_as_floats(tmp_path):
    """Directly: the images as data.images prepares them for a prompt, logits of all, cross-entropy of those asked."""
    experiment = load(tmp_path)
    batch, model = batch_of(experiment), weights.model(experiment.model)
    assert {0, 1} == set(np.unique(batch.sources))
    floats = np.zeros(batch.images.shape, np.float32)
    by_color = {c: preprocess(read(image_corpus.picture(c)), 16) for c in image_corpus.NAMES}
    for row, i in np.argwhere(batch.images.any(axis=(2, 3, 4))).tolist():
        [color] = [c for c, p in by_color.items() if np.array_equal(np.round((p + 1) * 127.5), batch.images[row, i])]
        floats[row, i] = by_color[color]
    hidden = jax.jit(lambda images: model.hidden(batch.encoder, batch.decoder, images, compute=experiment.compute))
    logits = np.asarray(jax.jit(model.logits)(hidden(floats)), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    total, sums = loss_sums(model, batch, step.StepOptions(experiment.compute, 6, 2))
    np.testing.assert_allclose(float(total), np.sum(losses * batch.weights), rtol=1e-5)
    assert int(sums.tokens) == np.sum(batch.encoder.segments > 0) + np.sum(batch.decoder.segments > 0)
    blank, _ = loss_sums(
        model, batch._replace(images=np.zeros_like(batch.images)), step.StepOptions(experiment.compute, 6, 2)
    )
    assert abs(float(blank - total)) > 1e-2, "the images make no difference"


def update(experiment, batch, shape, microbatches, devices):
    """The metrics of one update, and the weights after it."""
    mesh = meshes.make(MeshShape(*shape), devices[: math.prod(shape)])
    updates = optim.make(experiment.optim, experiment.train.steps, build.abstract(experiment.model))
    abstract = state.abstract(experiment.model, updates, mesh=mesh, param_dtype="float32")
    place = meshes.batch_sharding(mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch)
    settings = step.StepOptions(experiment.compute, 6, 2, microbatches)
    compiled = step.lower_step(step.make_train_step(updates, settings), abstract, shapes, mesh=mesh).compile()
    host = jax.device_get(weights.model(experiment.model))  # parts of an array of the host need no programs
    params = jax.device_put(host, jax.tree.map(lambda x: x.sharding, abstract.params))
    there = to_global(batch, place, rows=len(batch.targets))
    after, metrics = compiled(state.fresh(params, updates, abstract), there, None)
    return jax.device_get(metrics), jax.device_get(after.params)


@pytest.mark.long
def test_a_mesh_and_microbatches_compute_the_same(tmp_path, devices):
    # so that the weights' differences are about the gradients themselves
    near_sgd = {"optim.optimizer": "{'kind': 'adamw', 'eps': 1.0}", "optim.decay": "()"}
    experiment = load(tmp_path, **near_sgd, **{"optim.schedule": "{'kind': 'constant', 'peak': 1.0}"})
    batch = batch_of(experiment)
    alone, params = update(experiment, batch, (1, 1, 1), 1, devices)
    assert alone.finite
    for shape, microbatches in (((2, 2, 2), 1), ((2, 1, 2), 4)):
        metrics, there = update(experiment, batch, shape, microbatches, devices)
        for name in ("total", "loss", "weight", "source_loss", "denoiser_loss", "tokens", "gradient_norm"):
            np.testing.assert_allclose(getattr(metrics, name), getattr(alone, name), rtol=2e-5, err_msg=name)
        for a, b in zip(*map(jax.tree.leaves, (there, params)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    before, paths = weights.model(experiment.model), jax.tree.leaves(tree.paths(params))
    pairs = zip(paths, *map(jax.tree.leaves, (params, before)), strict=True)
    moved = {path.split(".")[0] for path, a, b in pairs if not np.array_equal(a, b)}
    assert {"projector", "encoder", "decoder"} <= moved
    assert "vision" not in moved, "an image tower is frozen"


@pytest.mark.long
def test_it_learns_what_is_in_the_images(tmp_path):
    """The texts differ by a color, one of five, that only the image shows; other texts are learned beside them."""
    experiment = load(tmp_path, RECORDS, **{"optim.schedule.peak": "2e-2", "train.steps": "100"})
    updates = optim.make(experiment.optim, experiment.train.steps, build.abstract(experiment.model))
    settings = step.StepOptions(experiment.compute, len(experiment.data.denoisers), 2)
    train = jax.jit(step.make_train_step(updates, settings))
    params = weights.model(experiment.model)
    now, losses = state.TrainState(jnp.int32(0), params, jax.jit(updates.init)(params)), []
    with Pipeline(experiment.data, seed=0) as pipeline:
        for _ in range(experiment.train.steps):
            now, metrics = train(now, pipeline.next().batch)
            losses.append(np.asarray(metrics.source_loss / metrics.source_weight))
        held = [pipeline.next().batch for _ in range(8)]
    first, last = np.mean(losses[:10], axis=0), np.mean(losses[-10:], axis=0)
    assert last[0] < 0.05 * first[0], "texts with images"
    assert last[1] < 0.9 * first[1], "texts"

    def summed(batches):
        return sum(float(loss_sums(now.params, batch, settings)[1].source_loss[0]) for batch in batches)

    examples = sum(int((batch.encoder.tokens == 7).sum()) // 4 for batch in held)
    right, wrong = summed(held), summed(b._replace(images=np.roll(b.images, 1, axis=0)) for b in held)
    assert right / examples < 0.75 * math.log(len(RECORDS)), "no better than without looking"
    assert wrong > 2 * right


def test_held_out_texts_with_images_are_measured(tmp_path):
    experiment = load(tmp_path, RECORDS)
    mesh = meshes.make(MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        setting = plan.make(experiment, mesh).eval_context(range(8))
        text = experiment.data.sources[0].text
        task = HeldoutLoss(text, MultimodalPrefixLM(), name="seen", examples=None)
        model = weights.model(experiment.model)
        scores = task.prepare(setting)(model).scores
    total = weight = 0.0
    alone = dataclasses.replace(experiment.data, sources=experiment.data.sources[:1], packing="none")
    seen = set()
    with Pipeline(alone, seed=3) as pipeline:
        while len(seen) < len(RECORDS):
            batch = pipeline.next().batch
            for row in range(8):
                one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
                words = Bytes().decode(one.targets[0], skip_special_tokens=True)
                if words not in seen:
                    seen.add(words)
                    _, sums = loss_sums(model, one, step.StepOptions(experiment.compute, 1, 1))
                    total, weight = total + float(sums.loss), weight + float(sums.weight)
    assert scores["seen/loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_decoder_only_model_reads_them_too(tmp_path):
    """Also where the image token has no row of its own in the embedding, as in Gemma 3."""
    image_corpus.jsonl(tmp_path / "images", RECORDS)
    stack = dataclasses.replace(load(tmp_path / "other").model.encoder, vocab_size=364)
    losses = []
    for token in (7, 364):

        class Own(Bytes):
            def named(self, token=token):
                return super().named() | {"image": token}

            @property
            def special_tokens(self, token=token):
                return dataclasses.replace(super().special_tokens, image=token)

        images = dataclasses.replace(stack.images, token=token)
        experiment = experiments.build(
            {
                "model": dataclasses.replace(stack, images=images),
                "data": {
                    "sources": [
                        {
                            "text": {"kind": "image_jsonl", "path": f"{tmp_path}/images"},
                            "objective": {"kind": "multimodal_prefix_lm_decoder"},
                        }
                    ],
                    "tokenizer": Own(),
                    "images": {"per_row": 3},
                    "rows": 4,
                    "streams": 4,
                    "encoder_length": 0,
                    "decoder_length": 64,
                    "chunk_tokens": 40,
                },
                "optim": {"schedule": {"kind": "constant", "peak": 0.1}},
                "train": {"steps": 3},
                "compute": {"dtype": "float32"},
            }
        )
        batch = batch_of(experiment)
        assert (batch.targets == token).sum() >= 4 * 4
        model = weights.model(experiment.model)
        settings = step.StepOptions(experiment.compute)
        gradient = jax.jit(jax.value_and_grad(step.loss_sums, has_aux=True), static_argnums=2)
        (total, sums), gradients = gradient(model, batch, settings)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
        losses.append(float(total / sums.weight))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_number_of_images_of_a_row_is_printed(tmp_path, capsys):
    experiment = load(tmp_path)
    seen = data_preview.measure(experiment)
    with Pipeline(experiment.data, seed=experiment.train.seed) as pipeline:
        batches = [pipeline.next().batch for _ in range(data_preview.BATCHES)]
    count = sum(int(b.images.any(axis=(2, 3, 4)).sum()) for b in batches)
    assert seen.images == count
    data.show(seen, rows=1)
    line = f"{count / (8 * data_preview.BATCHES):.1f} images a row, which has room for 3: data.images.per_row\n"
    assert line in capsys.readouterr().out


def test_texts_with_images_are_not_kept_as_tokens(tmp_path, capsys):
    experiment = load(tmp_path)
    source_tokens.tokenize_sources(experiment.data, tmp_path / "out", shards=1)
    assert "text: 8 documents" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["text"]
    with pytest.raises(UserError, match="source 'images' has images and cannot be kept as tokens; a run reads it as "):
        source_tokens.tokenize_sources(experiment.data, tmp_path / "other", names=["images"])


def test_what_images_are_is_the_models(tmp_path):
    experiment = load(tmp_path)
    rows = experiment.data.images
    assert (rows.per_row, rows.size, rows.tokens, rows.token, rows.begin, rows.end) == (3, 16, 4, 7, 5, 6)
    assert experiments.build(experiments.dump(experiment)) == experiment
    assert load(tmp_path, **{"data.images": "{'per_row': 2, 'resampling': 'bicubic'}"}).data.images == (
        dataclasses.replace(rows, per_row=2, resampling="bicubic")
    )


def test_a_released_size_takes_the_settings_that_its_config_tells():
    """Those of its docstring, with bytes for the tokenizer and their ids for the model."""
    lines = runpy.run_path("configs/t5gemma2.py")["__doc__"].splitlines()
    docstring = " ".join(" ".join(lines).replace(chr(92), " ").split())
    sources = docstring.partition("--config.data.sources='")[2].partition("'")[0]
    freeze = docstring.partition("--config.optim.freeze='")[2].partition("'")[0]
    ids = {"token": 7, "begin": 5, "end": 6}
    changes = [(f"model.encoder.images.{name}", str(token)) for name, token in ids.items()]
    changes += [("data.sources", sources), ("optim.freeze", freeze), ("data.images.per_row", "8")]
    made = config_file.load("configs/t5gemma2.py:4b-4b", [*changes, ("model.eoi_id", "6")])
    assert made.data.names == ("text", "images")
    images = made.data.images
    assert images is not None
    assert (images.per_row, images.size, images.tokens, images.token) == (8, 896, 256, 7)
    assert made.optim.is_frozen("vision.patches.kernel")
    assert not made.optim.is_frozen("projector.kernel")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.images": "None"}, r"its texts have images, and data\.images is not set; set the number"),
        ({"data.images": "{'size': 32, 'per_row': 1}"}, r"images has \{'size': 32\}, and the model \{'size': 16, "),
        ({"data.images": "{}"}, r"config\.data\.images lacks per_row, which ImageRows has no default for"),
        ({"data.images.per_rows": "1"}, r"'per_rows' in config\.data\.images \(ImageRows\); did you mean 'per_row'"),
        ({"model.encoder.images": "None", "data.images": "None"}, r"texts have images, and data\.images is not set"),
        (
            {"model.encoder.images": "None", "data.images": "{'per_row': 1, 'size': 1, 'tokens': 1, 'token': 1, "
             "'begin': 1, 'end': 1}"},
            r"data\.images is set, and the model has no image tower; leave it out, or take a model that has one",
        ),
        (
            {"model.encoder.images.token": "9"},
            r"the tokenizer has \{'image': 7\} and the model \{'image': 9, 'start_of_image': 5, 'end_of_image': 6\}",
        ),
        ({"distill": "{'teacher': 'x'}"}, r"distill and data\.images are both set; a teacher reads no images"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **changes)


def test_images_of_the_initial_weights_are_processed_as_in_training(tmp_path, caplog):
    rows, init = load(tmp_path).data.images, Init(params=str(tmp_path))
    image_rows.check_processor(rows, init)
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.5, 0.5, 0.5], "rescale_factor": 0.00392156862745098, "resample": 2}')
    image_rows.check_processor(rows, init)
    assert not caplog.records
    file.write_text('{"resample": 1}')
    image_rows.check_processor(rows, Init(adapt=Adapt("elsewhere", vision=str(tmp_path))))
    assert "by data.images.resampling = bilinear, and by lanczos in the image processor of" in caplog.text
    file.write_text('{"do_normalize": false}')
    with pytest.raises(UserError, match=r"gives pixels from 0 to 1 \(mean .*; training reads them as x / 127.5 - 1"):
        image_rows.check_processor(rows, init)
    image_rows.check_processor(None, init)  # a run on text
