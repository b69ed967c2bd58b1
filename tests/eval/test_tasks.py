"""Held-out loss against the plain sum over logits; on eight devices; packed or not; samples and fillings."""

import dataclasses
import functools
import json
import random
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from t5g2.core import sharding as meshes
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import finite_batches
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import evaluation as evaluations
from t5g2.eval import tasks
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.generation import Output
from t5g2.eval.tasks import EvalContext, HeldoutLoss, Samples, TaskResult
from t5g2.models.loss_config import LossConfig
from t5g2.objectives import UL2, Causal, Denoiser, PrefixLM, PrefixLMDecoder
from tests import tiny, weights
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
T5GEMMA = dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)
MIXTURE = UL2(tasks=(Denoiser("short", rate=0.3, mean_span=3.0), Denoiser("suffix", rate=0.5, weight=3.0)))
WORDS = "the a cat dog sat ran on under mat tree and then it saw".split()


def evaluate(model, tasks, context):
    return Evaluator(tasks, context).run(model)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    draw = random.Random(0)
    for i in range(3):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=40)))
    return TextFiles(str(folder))


@pytest.fixture(scope="module")
def t5gemma():
    return weights.model(T5GEMMA)


@functools.cache
def context_of(text, *, encoder_length=48, objective=MIXTURE, **changes):
    source = Source(text, objective if encoder_length else Causal())
    data = DataConfig(
        sources=(source,),
        tokenizer=TOKENIZER,
        rows=8,
        encoder_length=encoder_length,
        decoder_length=48,
        chunk_tokens=24,
        streams=4,
        **changes,
    )
    return EvalContext(data, seed=1, loss=LossConfig(tile_tokens=128), compute=FLOAT32)


def plain_means(model, task, setting):
    """Mean loss, accuracy and bytes per denoiser from all logits of every batch, tokens in Python loops."""
    data = dataclasses.replace(setting.data, sources=(Source(task.text, task.objective, name=task.name),))
    forward = jax.jit(lambda e, d: jax.nn.log_softmax(model.logits(model.hidden(e, d, compute=FLOAT32))))
    found = {}
    for denoiser in task.objective.denoisers:
        losses, right, sizes = [], [], []
        seed = derive_seed(setting.seed, "held-out loss")
        for host in finite_batches(data, seed=seed, denoiser=denoiser, examples=task.examples):
            batch = host.batch
            scores = np.asarray(forward(batch.encoder, batch.decoder))
            for b, t in zip(*np.nonzero(batch.weights), strict=True):
                if not TOKENIZER.special_tokens.is_sentinel(batch.targets[b, t]):
                    losses.append(-float(scores[b, t, batch.targets[b, t]]))
                    right.append(int(np.argmax(scores[b, t])) == batch.targets[b, t])
                    sizes.append(int(0 <= batch.targets[b, t] - TOKENIZER.special_tokens.first_byte < 256))
        found[denoiser] = (np.mean(losses), np.mean(right), np.mean(sizes))
    return found


def test_held_out_loss_is_the_mean_over_the_mixture_of_the_plain_means(text, t5gemma):
    task, setting = HeldoutLoss(text, MIXTURE, examples=12), context_of(text)
    scores = evaluate(t5gemma, [task], setting).scores
    means = plain_means(t5gemma, task, setting)
    assert scores["heldout/loss/short"] == pytest.approx(means["short"][0], abs=1e-5)
    assert scores["heldout/loss/suffix"] == pytest.approx(means["suffix"][0], abs=1e-5)
    assert scores["heldout/loss"] == pytest.approx(0.25 * means["short"][0] + 0.75 * means["suffix"][0], abs=1e-5)
    assert scores["heldout/accuracy"] == pytest.approx(0.25 * means["short"][1] + 0.75 * means["suffix"][1], abs=1e-5)
    assert scores["heldout/perplexity"] == pytest.approx(np.exp(scores["heldout/loss"]))
    # EOS stands for no text, so that a target has less than a byte
    bytes_a_target = 0.25 * means["short"][2] + 0.75 * means["suffix"][2]
    assert 0.5 < bytes_a_target < 1
    bits = scores["heldout/loss"] / np.log(2) / bytes_a_target
    assert scores["heldout/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert abs(means["short"][0] - means["suffix"][0]) > 1e-3  # so that the weights matter


@pytest.mark.parametrize("cross", ["separate", "merged"])
def test_what_reading_the_encoder_is_worth(text, cross):
    """A hidden encoder does not matter, whatever its weights are; a visible one does."""
    stack = dataclasses.replace(tiny.T5GEMMA.encoder, vocab_size=TOKENIZER.vocab_size)
    config = T5GEMMA if cross == "merged" else dataclasses.replace(tiny.T5GEMMA, encoder=stack, decoder=stack)
    assert config.cross == cross
    model, setting = weights.model(config), context_of(text)
    visible = HeldoutLoss(text, MIXTURE, examples=12)
    hidden = dataclasses.replace(visible, name="hidden", encoder="hidden")
    before = evaluate(model, [visible, hidden], setting).scores
    model.encoder.final_norm.scale[...] = 3.0 + model.encoder.final_norm.scale[...]
    after = evaluate(model, [visible, hidden], setting).scores
    assert after["hidden/loss"] == before["hidden/loss"]
    assert abs(after["heldout/loss"] - before["heldout/loss"]) > 1e-3
    assert abs(before["hidden/loss"] - before["heldout/loss"]) > 1e-3


def test_a_decoder_only_model_has_no_encoder_to_hide(text):
    task = HeldoutLoss(text, Causal(), encoder="hidden")
    with pytest.raises(UserError, match="'heldout' hides the encoder, and the model is decoder-only; leave encoder"):
        task.prepare(context_of(text, encoder_length=0))


def test_a_decoder_only_model_is_measured_too(text):
    model = weights.model(STACK)
    task, setting = HeldoutLoss(text, Causal(), examples=12), context_of(text, encoder_length=0)
    scores = evaluate(model, [task], setting).scores
    assert scores["heldout/loss"] == pytest.approx(plain_means(model, task, setting)["causal"][0], abs=1e-5)
    assert scores["heldout/loss/causal"] == scores["heldout/loss"]


def test_a_prefix_that_sees_both_ways_is_measured_whatever_the_run_trains_on(text, devices):
    """Packed, alone and on eight devices; and not as if the prefix were read from left to right."""
    model = weights.model(STACK)
    task, setting = HeldoutLoss(text, PrefixLMDecoder("uniform"), examples=12), context_of(text, encoder_length=0)
    prefix = dataclasses.replace(setting.data, sources=(Source(text, PrefixLMDecoder()),))
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2), devices)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, meshes.shardings(model, mesh))
        spread = evaluate(placed, [task], dataclasses.replace(setting, mesh=mesh)).scores["heldout/loss"]
    alone = context_of(text, encoder_length=0, packing="none")
    others = [
        evaluate(model, [task], other).scores["heldout/loss"]
        for other in (setting, alone, dataclasses.replace(setting, data=prefix))
    ]
    mean = plain_means(model, task, setting)["prefix_lm"][0]
    assert [*others, spread] == pytest.approx([mean] * 4, rel=1e-5)
    causal = jax.jit(lambda d: jax.nn.log_softmax(model.logits(model.hidden(None, d, compute=FLOAT32))))
    losses = []
    data = dataclasses.replace(setting.data, sources=(Source(text, task.objective),))
    for host in finite_batches(data, seed=derive_seed(1, "held-out loss"), examples=12):
        scores = np.asarray(causal(host.batch.decoder._replace(blocks=None)))
        counted = host.batch.weights > 0
        losses += (-np.take_along_axis(scores, host.batch.targets[..., None], axis=-1)[..., 0][counted]).tolist()
    assert abs(np.mean(losses) - mean) > 1e-3


def test_sentinels_do_not_count_whether_they_are_trained_on_or_not(text, t5gemma):
    setting = context_of(text)
    both = [
        evaluate(t5gemma, [HeldoutLoss(text, objective, examples=6)], setting).scores["heldout/loss/short"]
        for objective in (MIXTURE, dataclasses.replace(MIXTURE, loss_on_sentinels=False))
    ]
    assert both[0] == both[1]


def test_packing_and_devices_change_nothing(text, t5gemma, devices):
    task = HeldoutLoss(text, MIXTURE, examples=12)
    packed = evaluate(t5gemma, [task], context_of(text)).scores
    alone = evaluate(t5gemma, [task], context_of(text, packing="none")).scores
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2), devices)
    with jax.set_mesh(mesh):
        placed = jax.device_put(t5gemma, meshes.shardings(t5gemma, mesh))
        spread = evaluate(placed, [task], dataclasses.replace(context_of(text), mesh=mesh)).scores
    for name, value in packed.items():
        assert alone[name] == pytest.approx(value, rel=1e-5), name
        assert spread[name] == pytest.approx(value, rel=1e-5), name


def test_examples_of_one_denoiser_share_rows(text, t5gemma, monkeypatch):
    """With one packing as with the other: best_fit would put each into a row of its own."""
    task, rows = HeldoutLoss(text, MIXTURE, examples=12), {}
    for packing in ("first_fit", "best_fit", "none"):
        filled = rows[packing] = []

        def count(model, batch, bytes_BT, filled=filled, **_):
            filled.append(int((np.asarray(batch.weights) > 0).any(axis=1).sum()))
            return np.ones(4)

        monkeypatch.setattr(tasks, "_batch_sums", count)
        evaluate(t5gemma, [task], context_of(text, packing=packing, packing_rows=16))
    assert sum(rows["none"]) == 12 * len(MIXTURE.denoisers)
    assert sum(rows["best_fit"]) == sum(rows["first_fit"]) <= 0.75 * sum(rows["none"])


def test_the_whole_text_can_be_measured_and_again(text, t5gemma):
    evaluation = Evaluator([HeldoutLoss(text, MIXTURE, examples=None)], context_of(text))
    every = HeldoutLoss(text, MIXTURE, examples=10_000)
    assert evaluation.run(t5gemma) == evaluation.run(t5gemma)
    assert evaluation.run(t5gemma) == evaluate(t5gemma, [every], context_of(text))


def test_samples_complete_and_fill_in(text, t5gemma):
    task = Samples(text, examples=2, prompt_tokens=16, span_tokens=4, max_new_tokens=6)
    outcome = evaluate(t5gemma, [task], context_of(text))
    assert outcome.scores == {}
    assert [row["kind"] for row in outcome.predictions] == ["completion"] * 2 + ["filling"] * 2
    for row in outcome.predictions:
        assert row.keys() == {"task", "kind", "prompt", "output", "reference"}
    completion, filling = outcome.predictions[1:3]
    assert (len(completion["prompt"]), len(completion["reference"])) == (16, 6)
    kept = filling["prompt"].replace("<sentinel_0>", "|").replace("<sentinel_1>", "|")
    assert len(kept) == 22 - 8 + 2
    first, second = filling["reference"].removeprefix("<sentinel_0>").split("<sentinel_1>")
    rebuilt = filling["prompt"].replace("<sentinel_0>", first).replace("<sentinel_1>", second)
    assert rebuilt == outcome.predictions[0]["prompt"] + outcome.predictions[0]["reference"]
    assert outcome == evaluate(t5gemma, [task], context_of(text))


def test_a_decoder_only_model_only_completes(text):
    model = weights.model(STACK)
    task = Samples(text, examples=2, prompt_tokens=16, span_tokens=4, max_new_tokens=6)
    outcome = evaluate(model, [task], context_of(text, encoder_length=0))
    assert [row["kind"] for row in outcome.predictions] == ["completion"] * 2


@pytest.mark.parametrize(
    ("policy", "kinds", "prompt"),
    [
        (UL2(sentinels="mask"), ["completion", "filling"], r"^.{5}<mask>.{4}<mask>.{5}$"),
        (MIXTURE, ["completion", "filling"], r"^.{5}<sentinel_0>.{4}<sentinel_1>.{5}$"),
        (UL2().only("suffix_r75"), ["completion"], None),
        (PrefixLM(), ["completion"], None),
    ],
)
def test_a_gap_is_what_the_training_had_for_one(text, t5gemma, policy, kinds, prompt):
    """A model that has never seen a gap is asked to fill none in."""
    task = Samples(text, examples=1, prompt_tokens=16, span_tokens=4, max_new_tokens=6)
    outcome = evaluate(t5gemma, [task], context_of(text, objective=policy))
    assert [row["kind"] for row in outcome.predictions] == kinds
    if prompt is not None:
        assert re.match(prompt, outcome.predictions[1]["prompt"], re.DOTALL)


def test_tasks_are_chosen_by_name(text, t5gemma):
    task = HeldoutLoss(text, MIXTURE, name="news", examples=2)
    evaluation = Evaluator([task, Samples(text)], context_of(text))
    assert "news/loss/short" in evaluation.run(t5gemma, ["news"]).scores
    with pytest.raises(UserError, match="unknown evaluation task 'new'; did you mean 'news'"):
        evaluation.run(t5gemma, ["new"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda text: HeldoutLoss(text, MIXTURE, examples=0),
            "examples = 0; it must be at least 1 and at most 2147483647, or None",
        ),
        (lambda text: Samples(text, prompt_tokens=0), "prompt_tokens = 0; it must be at least 1"),
        (lambda text: Samples(text, span_tokens=40), "span_tokens = 40: two spans may be at most half of a chunk"),
    ],
)
def test_impossible_tasks_are_errors(text, make, message):
    with pytest.raises(UserError, match=message):
        make(text)


@pytest.mark.parametrize(
    ("make", "encoder_length", "message"),
    [
        (
            lambda text: HeldoutLoss(text, PrefixLMDecoder()),
            48,
            "task 'heldout' does not fit the run's data: .* PrefixLMDecoder, is for a decoder-only model, and enc.* 48",
        ),
        (
            lambda text: HeldoutLoss(text, PrefixLM(), name="news"),
            0,
            "task 'news' does not fit the run's data: .* PrefixLM, makes encoder inputs, and encoder_length is 0",
        ),
        (
            lambda text: Samples(text, prompt_both_ways=True),
            48,
            "task 'samples' has prompt_both_ways, which is for a decoder-only model.* leave prompt_both_ways out",
        ),
    ],
)
def test_tasks_for_the_other_kind_of_model_are_errors(text, make, encoder_length, message):
    with pytest.raises(UserError, match=message):
        Evaluator([make(text)], context_of(text, encoder_length=encoder_length))


def test_scores_and_predictions_are_files(tmp_path):
    outcome = TaskResult(
        {"heldout/loss": 2.5, "heldout/perplexity": float("inf")}, [{"prompt": "ä\n"}, {"prompt": "b"}]
    )
    evaluations.write(tmp_path / "new", 7, outcome)
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert scores == {"step": 7, "heldout/loss": 2.5, "heldout/perplexity": None}
    lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == outcome.predictions


def test_samples_end_at_eos_and_at_the_ends_of_the_weights(text, monkeypatch):
    seen = []

    def complete(_, prompts, *, setup):
        seen.append(setup.options.stop_ids)
        return [Output(prompt) for prompt in prompts]

    monkeypatch.setattr(tasks, "complete", complete)
    task = Samples(text, examples=1, prompt_tokens=16, span_tokens=4, max_new_tokens=6)
    eos = TOKENIZER.special_tokens.eos
    model = SimpleNamespace(config=T5GEMMA)
    for ids in ((), (106,), (106, eos)):
        task.prepare(dataclasses.replace(context_of(text), stop_ids=ids))(model)
    assert seen == [(eos,), (eos, 106), (eos, 106)]
