"""Probes: the states they read, their loss and gradient, a run of one, its scores, and everything that is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef

from t5g2 import cli
from t5g2.checkpoint import folder as folders
from t5g2.core import tree
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import finite_batches
from t5g2.data.sources.labelled_text import LabelledText
from t5g2.data.sources.record_templates import RecordList
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.metrics.labels import F1, RocAuc
from t5g2.eval.probe_scores import ProbeScores
from t5g2.eval.task_interface import EvalContext
from t5g2.eval.tasks import HeldoutLoss
from t5g2.models import flops, probe_head
from t5g2.models.config import ProbeConfig
from t5g2.objectives import Probe, ProbeDecoder
from t5g2.train import adaptation, config_file, step
from t5g2.train import experiment as experiments
from t5g2.train.optim import Freeze, OptimConfig
from t5g2.train.schedules import Constant
from t5g2.train.weight_origin import Adapt
from tests import tiny, weights
from tests.e2e.run_results import metrics
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
MODELS = {
    "gemma": STACK,
    "t5gemma2": dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK),
    "t5gemma": dataclasses.replace(
        tiny.T5GEMMA,
        encoder=dataclasses.replace(tiny.T5GEMMA.encoder, vocab_size=TOKENIZER.vocab_size),
        decoder=dataclasses.replace(tiny.T5GEMMA.decoder, vocab_size=TOKENIZER.vocab_size),
    ),
}
CLASSES = ("low", "mid", "high")
# of two lengths, each of which is a program of the states that are compared with
TEXTS = ("cat", "dogs run far", "one", "a mole sleep", "it saw a dog", "under a tree", "box", "sat on a mat")
RECORDS = tuple({"text": text, "kind": CLASSES[n % 3], "number": f"{n / 2 - 1}"} for n, text in enumerate(TEXTS))


def probed(name, classes=CLASSES, state="last"):
    return dataclasses.replace(MODELS[name], probe=ProbeConfig(tuple(classes), state))


def labelled(classes=CLASSES, records=RECORDS):
    return LabelledText(RecordList(tuple(records)), label="{kind}" if classes else "{number}", classes=tuple(classes))


def data_of(config, text=None):
    encoder_decoder = config.is_encoder_decoder
    source = Source(text or labelled(config.probe.classes), Probe() if encoder_decoder else ProbeDecoder(), name="s")
    return DataConfig((source,), TOKENIZER, 2, 48 if encoder_decoder else 0, 48, 16, streams=2, packing_rows=2)


@jax.jit
def states_of(model, tokens):
    """The states that a probe may read, of one text without padding."""
    sides = Sequences(tokens, jnp.ones_like(tokens), jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])
    if not model.config.is_encoder_decoder:
        return model.hidden(None, sides, compute=FLOAT32)[0], None
    bos = np.full((1, 1), TOKENIZER.special_tokens.bos, np.int32)
    decoder = Sequences(bos, np.ones_like(bos), np.zeros_like(bos))
    encoded = model.encode(sides, compute=FLOAT32)
    return encoded[0], model.decode(decoder, encoded, sides, compute=FLOAT32)[0, 0]


def states(name, state):
    """float64[N, D]: of each text, by NumPy, the state that a probe reads."""
    model, rows = weights.model(MODELS[name]), []
    for record in RECORDS:
        tokens = TOKENIZER.encode(record["text"])
        if not model.config.is_encoder_decoder:
            tokens = np.append(TOKENIZER.special_tokens.bos, tokens)
        own, first = jax.device_get(states_of(model, tokens[None].astype(np.int32)))
        kinds = {"last": own[-1], "first": own[0], "mean": own.mean(axis=0), "decoder_first": first}
        rows.append(kinds[state])
    return np.array(rows, np.float64)


@pytest.mark.parametrize(
    ("name", "state", "classes"),
    [
        ("gemma", "last", CLASSES),
        ("gemma", "mean", ()),
        ("t5gemma", "last", CLASSES),
        ("t5gemma2", "mean", ()),
        ("t5gemma2", "decoder_first", CLASSES),
    ],
)
def test_loss_and_gradient_are_those_of_a_linear_model_on_the_states(name, state, classes):
    """Of texts that are packed: logistic regression by scikit-learn's log_loss, least squares by NumPy."""
    config = probed(name, classes, state)
    model = weights.model(config)
    loss, count, kernel, bias, correct = 0.0, 0.0, 0.0, 0.0, 0.0
    for host_batch in finite_batches(data_of(config), seed=0):
        assert np.sum(host_batch.example_ids >= 0) > 2, "the rows hold several texts"
        total, sums, gradients = jax.jit(step.gradients_of, static_argnums=2)(
            model, host_batch.batch, step.StepOptions(FLOAT32)
        )
        loss, count, correct = loss + float(total), count + float(sums.weight), correct + float(sums.correct)
        kernel, bias = kernel + np.asarray(gradients.probe.kernel[...]), bias + np.asarray(gradients.probe.bias[...])

    x_ND, head = states(name, state), model.probe
    y_NC = x_ND @ np.asarray(head.kernel[...], np.float64) + np.asarray(head.bias[...], np.float64)
    if classes:
        labels = [CLASSES.index(record["kind"]) for record in RECORDS]
        p_NC = np.exp(y_NC) / np.exp(y_NC).sum(axis=1, keepdims=True)
        expected = log_loss(labels, p_NC, labels=[0, 1, 2])
        slope_NC = p_NC - np.eye(3)[labels]
        assert correct == np.sum(p_NC.argmax(axis=1) == labels)
    else:
        numbers = np.array([float(record["number"]) for record in RECORDS])
        expected, slope_NC = np.mean((y_NC[:, 0] - numbers) ** 2), 2 * (y_NC - numbers[:, None])
    assert count == len(RECORDS)
    assert loss / count == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(kernel, x_ND.T @ slope_NC, atol=2e-4)
    np.testing.assert_allclose(bias, slope_NC.sum(axis=0), atol=2e-4)


@pytest.mark.parametrize(
    ("state", "expected"),
    [("last", [[2, 5, 0]]), ("first", [[1, 3, 0]]), ("mean", [[1.5, 4, 0]])],
)
def test_states_of_a_packed_row(state, expected):
    segments = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    side = Sequences(segments, segments, np.array([[0, 1, 0, 1, 2, 0]], np.int32))
    states_BSD = np.array([1, 2, 3, 4, 5, np.nan], np.float32)[None, :, None]
    pooled = probe_head.pooled(states_BSD, side, np.array([[1, 2, 0]], np.int32), state)
    np.testing.assert_allclose(pooled[..., 0], expected)


def test_an_encoder_s_probe_costs_no_decoder():
    counts = flops.Counts(encoder_tokens=10, decoder_tokens=1, encoder_local=20, encoder_global=30, cross=10)
    parts = flops.training(probed("t5gemma2"), counts, frozen_vision=True)
    assert {part.partition("/")[0] for part in parts} == {"encoder", "head"}
    assert parts["head"] == 3 * 2 * 32 * 3
    alone = flops.training(probed("t5gemma2"), counts, frozen_vision=True, frozen_body=True)
    assert alone == {part: 2 * flop // 3 if part == "head" else flop // 3 for part, flop in parts.items()}
    decoder = flops.training(probed("t5gemma2", state="decoder_first"), counts, frozen_vision=True)
    assert {"decoder", "cross"} <= {part.partition("/")[0] for part in decoder}


def test_scores_are_those_of_scikit_learn_on_the_states():
    model = weights.model(probed("t5gemma2"))
    context = EvalContext(data_of(model.config), seed=1, compute=FLOAT32)
    task = ProbeScores(data=RECORDS, name="p", label="{kind}", metrics=("accuracy", "f1", "mcc", F1(positive="high")))
    result = Evaluator([task], context).run(model)
    head = model.probe
    y_NC = states("t5gemma2", "last") @ np.asarray(head.kernel[...], np.float64)
    y_NC = y_NC + np.asarray(head.bias[...], np.float64)
    right, answers = [CLASSES.index(record["kind"]) for record in RECORDS], y_NC.argmax(axis=1)
    p_NC = np.exp(y_NC) / np.exp(y_NC).sum(axis=1, keepdims=True)
    assert result.scores == pytest.approx(
        {
            "p/loss": log_loss(right, p_NC, labels=[0, 1, 2]),
            "p/accuracy": np.mean(answers == right),
            "p/f1_macro": f1_score(right, answers, average="macro"),
            "p/f1": f1_score(np.array(right) == 2, answers == 2),
            "p/mcc": matthews_corrcoef(right, answers),
        },
        rel=1e-5,
    )
    np.testing.assert_allclose([p["probabilities"] for p in result.predictions], p_NC, atol=1e-5)
    assert [p["output"] for p in result.predictions] == [CLASSES[n] for n in answers]


CONFIG = """
from t5g2.data.tokenizers.byte_level import Bytes

WORDS = ("tree", "mat", "dog", "cat", "house", "moon", "sun", "cup")
RECORDS = [{"text": f"{a} {b} {end}", "label": kind} for a in WORDS for b in WORDS[:4]
           for kind, end in (("up", "ab"), ("down", "xy"))]
TEXT = {"kind": "labelled", "records": {"kind": "rows", "records": RECORDS}, "classes": ["up", "down"]}


def get_config(folder):
    from ml_collections import ConfigDict

    config = ConfigDict()
    config.model = {"folder": folder, "probe": {"classes": ["up", "down"]}}
    config.data = {"sources": [{"text": TEXT, "objective": {"kind": "probe"}}], "chunk_tokens": 24, "rows": 8,
                   "encoder_length": 48, "decoder_length": 16, "streams": 8, "packing_rows": 1}
    config.optim = {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 0.1},
                    "freeze": [{"pattern": "probe.*", "end": 0}, {"pattern": "*"}]}
    config.train = {"steps": 20}
    config.compute = {"dtype": "float32"}
    task = {"kind": "probe", "name": "texts", "data": TEXT["records"], "metrics": ["accuracy"]}
    config.eval = {"tasks": [task]}
    config.save = {"every_steps": 10}
    config.init = {"params": folder}
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder and a config of a probe of it."""
    made = tmp_path_factory.mktemp("probe")
    folders.save_model(made / "model", weights.model(MODELS["t5gemma2"]), tokenizer=TOKENIZER.to_dict())
    (made / "config.py").write_text(CONFIG)
    return made


def train(folder, workdir, *changes):
    return cli.main(["train", f"--config={folder / 'config.py'}:{folder / 'model'}", f"--workdir={workdir}", *changes])


def test_a_linear_probe_learns_what_is_separable_and_changes_nothing_else(folder, tmp_path, capsys, one_device):
    """Begun again half-way, saved as a model folder, which is scored as in the run."""
    assert train(folder, tmp_path / "run", "--config.train.steps=10") == 0
    assert train(folder, tmp_path / "run") == 0
    recorded = metrics(tmp_path / "run")
    assert recorded[0, "eval/texts/loss"] > 0.3
    assert recorded[20, "eval/texts/accuracy"] == 1
    before, after = (folders.open_model(path) for path in (folder / "model", tmp_path / "run" / "model"))
    assert after.config == dataclasses.replace(before.config, probe=ProbeConfig(("up", "down")))
    assert after.leaves.keys() - before.leaves.keys() == {("probe.kernel", None), ("probe.bias", None)}
    for key, leaf in before.leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf.read()), np.asarray(after.leaves[key].read()), tree.name(key))

    (tmp_path / "tasks.py").write_text(
        f"import runpy\n\nRECORDS = runpy.run_path({str(folder / 'config.py')!r})['RECORDS']\n\n"
        "def get_tasks():\n    from t5g2.eval.tasks import ProbeScores\n\n"
        "    return [ProbeScores(data=RECORDS, name='texts', metrics=('accuracy', 'auc'))]\n"
    )
    evaluate = ["evaluate", f"--tasks={tmp_path / 'tasks.py'}", f"--out={tmp_path / 'out'}", "--rows=8"]
    assert cli.main([*evaluate, f"--model={tmp_path / 'run' / 'model'}"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["texts/accuracy"]["value"] == scores["texts/auc"]["value"] == 1
    assert scores["texts/loss"]["value"] == pytest.approx(recorded[20, "eval/texts/loss"], rel=1e-4)
    capsys.readouterr()
    shutil_out = tmp_path / "other"
    assert cli.main(["evaluate", *evaluate[1:2], f"--out={shutil_out}", f"--model={folder / 'model'}"]) == 2
    assert "asks the model's probe, and the model has none" in capsys.readouterr().err
    assert cli.main(["export", f"--model={tmp_path / 'run' / 'model'}", f"--out={tmp_path / 'hf'}"]) == 2
    assert "the model has a probe, for which transformers' classes have no place" in capsys.readouterr().err


def test_the_whole_model_is_trained_unless_it_is_frozen(folder, tmp_path):
    """On eight devices, with its scores."""
    changes = ["--config.train.steps=2", "--config.optim.freeze=[]", "--config.optim.schedule.peak=1e-3"]
    assert train(folder, tmp_path / "run", *changes) == 0
    assert {(0, "eval/texts/accuracy"), (2, "eval/texts/accuracy")} <= metrics(tmp_path / "run").keys()
    before, after = (folders.open_model(path).leaves for path in (folder / "model", tmp_path / "run" / "model"))
    same = {key[0] for key, leaf in before.items() if np.array_equal(leaf.read(), after[key].read())}
    # the decoder is not run for a state of the encoder, and no text has the token of its own vector
    assert {path.partition(".")[0] for path in same - {"embedder.eoi"}} == {"decoder"}


def test_a_folder_with_a_probe_goes_on_with_it_and_another_probe_is_new(folder, tmp_path):
    config = probed("t5gemma2", ("a", "b"))
    folders.save_model(tmp_path / "probed", weights.model(config), tokenizer=TOKENIZER.to_dict())
    own = adaptation.open_same_architecture(str(tmp_path / "probed"), config, seed=1)
    np.testing.assert_array_equal(
        own.leaves["probe.kernel", None].read(), weights.weights(config)["probe.kernel", None]
    )
    other = adaptation.open_same_architecture(str(tmp_path / "probed"), probed("t5gemma2", ("a", "b", "c")), seed=1)
    assert np.asarray(other.leaves["probe.kernel", None].read()).shape == (32, 3)
    assert not np.any(other.leaves["probe.bias", None].read())
    with pytest.raises(UserError, match="holds another architecture"):
        adaptation.open_same_architecture(str(tmp_path / "probed"), MODELS["t5gemma2"])


def test_an_adapted_model_has_a_new_probe_and_the_source_s_is_dropped(tmp_path):
    folders.save_model(tmp_path / "source", weights.model(probed("gemma")), tokenizer=TOKENIZER.to_dict())
    target = probed("t5gemma2", ("a", "b"))
    model, provenance = adaptation.adapt_into(Adapt(str(tmp_path / "source")), target, seed=3)
    assert model.config == target
    assert 0 < np.std(np.asarray(model.probe.kernel[...])) < 0.05
    assert not np.any(np.asarray(model.probe.bias[...]))
    rows = {row["target"]: row["source"] for row in provenance.to_dict()["leaves"]}
    assert rows["probe.kernel"] == "-"
    assert "a probe is of the model that it was trained with" in provenance.table()


def changed(folder, **changes):
    plain = experiments.dump(config_file.load(f"{folder / 'config.py'}:{folder / 'model'}"))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = plain
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        node[last] = value
    return plain


TASK = {"kind": "probe", "name": "texts", "data": {"kind": "rows", "records": [{"text": "a", "label": "up"}]}}
PYTHON, LONG = {"kind": "python"}, {"data__decoder_length": 24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__probe": None}, "'texts' asks the model's probe, and the model has none"),
        ({"model__probe": None, "eval__tasks": []}, "the data has labels, and the model no probe; set model.pr"),
        ({"data__sources__0__text": PYTHON}, "objective Probe on PythonText; labelled texts .* are for probe"),
        ({"data__sources__0__objective": {"kind": "prefix_lm"}}, "objective PrefixLM on LabelledText; labelled texts"),
        (LONG | {"data__sources__0__objective": {"kind": "probe_decoder"}}, "model is encoder-decoder, so its object"),
        (LONG | {"data__sources": [{"text": PYTHON, "objective": {"kind": "ul2"}}]}, "and the data has no la"),
        ({"model__probe": {"classes": ["down", "up"]}}, r"classes \['up', 'down'\], and model.probe \['down', 'up'\]"),
        ({"model__probe": {"classes": ["up"]}}, r"probe.classes = \['up'\]; give at least two different names"),
        ({"model__probe": {"classes": ["up", "up"]}}, "give at least two different names, or none for regression"),
        ({"model__probe": {"state": "middle"}}, "unknown value 'middle' of config.model.probe.state"),
        ({"model__encoder__probe": {}}, "the whole model has one probe: set model.probe"),
        ({"eval__tasks": [TASK | {"metrics": ["pearson"]}]}, "the probe predicts classes, and pearson takes none; giv"),
        ({"eval__tasks": [TASK | {"metrics": [{"kind": "f1", "positive": "upp"}]}]}, "unknown class 'upp' of f1 in"),
        ({"distill": {"teacher": "x"}}, "distill and model.probe are both set; labels have no teacher"),
    ],
)  # fmt: skip
def test_combinations_that_are_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        experiments.build(changed(folder, **changes))


def test_a_number_has_no_f1_and_three_classes_no_area():
    with pytest.raises(UserError, match="predicts numbers, and f1_macro takes none; give pearson or spearman"):
        ProbeScores(data=RECORDS, name="p", metrics=("f1",)).check(ProbeConfig())
    with pytest.raises(UserError, match="auc is of two classes, and the probe has 3; give accuracy or f1"):
        ProbeScores(data=RECORDS, name="p", metrics=("auc",)).check(ProbeConfig(CLASSES))
    named = ProbeScores(data=RECORDS, name="p", metrics=(RocAuc(positive="yes"),))
    # the second class by its name is that of number 1, and no other class is ranked
    assert named.check(ProbeConfig(("no", "yes"))) == (RocAuc(),)
    with pytest.raises(UserError, match="auc ranks the probability of the second class, 'no', and 'yes' is positive"):
        named.check(ProbeConfig(("yes", "no")))
    with pytest.raises(UserError, match=r"probe\.state = 'first' of a decoder-only model, whose first state"):
        probed("gemma", state="first")
    heldout = HeldoutLoss(labelled(), Probe())
    with pytest.raises(
        UserError, match="of the loss of tokens, and its objective predicts labels; take the kind probe"
    ):
        heldout.prepare(EvalContext(data_of(probed("t5gemma2"))))


@pytest.mark.parametrize(
    ("record", "classes", "message"),
    [
        ({"text": "a", "kind": "none"}, CLASSES, "record 1: the label 'none' is no class; classes are low, mid, high"),
        ({"text": "a", "kind": 3}, CLASSES, "record 1: the label '3' is no class; .* from 0 to 2; mend it"),
        (
            {"text": "a", "kind": True},
            CLASSES,
            "label 'True' is no class; .*; a boolean of JSON is the class true or yes",
        ),
        ({"text": "a", "number": "many"}, (), "record 1: the label 'many' is no number; name the classes"),
        ({"text": "a", "number": "nan"}, (), "record 1: the label 'nan' is no number"),
        ({"text": "", "kind": "mid"}, CLASSES, "record 1: the text of the template '{text}' is empty"),
        ({"kind": "mid"}, CLASSES, "record 1: the record has no field 'text'"),
    ],
)
def test_records_without_a_text_or_a_label(record, classes, message):
    text = labelled(classes, [{"text": "good", "kind": "2", "number": 1}, record])
    with pytest.raises(UserError, match=message):
        text.open()
    kept = text.open(on_bad_record="skip")
    assert (len(kept), kept.skipped) == (1, 1)
    tokens = kept.tokens(0, TOKENIZER)
    assert tokens[1:5].tolist() == TOKENIZER.encode("good").tolist()
    assert tokens[5:].view(np.float32).tolist() == [2.0 if classes else 1.0]
    # of an evaluation task, before the model runs
    context = EvalContext(data_of(probed("t5gemma2", classes)), compute=FLOAT32)
    task = ProbeScores(data=[record], name="p", label="{kind}" if classes else "{number}")
    if record.get("text"):
        with pytest.raises(UserError, match="evaluation task 'p', record 1: the label"):
            Evaluator([task], context).run(weights.model(probed("t5gemma2", classes)))


def test_a_text_longer_than_a_chunk_is_refused():
    text = labelled(CLASSES, [{"text": "x" * 40, "kind": "mid"}])
    with pytest.raises(UserError, match=r"pair of inputs and targets has 42 tokens .*, and chunk_tokens is 16; raise"):
        list(finite_batches(data_of(probed("t5gemma2"), text), seed=0))


def test_a_probe_alone_is_what_is_not_frozen():
    def alone(name, *rules):
        optim = OptimConfig(Constant(0.1), freeze=tuple(rules))
        return optim.trains_probe_alone(probed(name) if name in MODELS else tiny.GEMMA3)

    head = Freeze("probe.*", end=0), Freeze("*")
    assert alone("gemma", *head)
    assert alone("t5gemma2", *head)
    assert not alone("gemma", Freeze("*"))
    assert not alone("gemma")
    assert not alone("gemma", Freeze("probe.*", end=0), Freeze("layers.*"))
    assert not alone("no probe", Freeze("*"))


@pytest.mark.parametrize("classes", [("no", "yes"), ("false", "true"), ("False", "True")])
def test_booleans_of_json_are_classes_by_name(classes):
    """BoolQ as it is published has "answer": true."""
    records = [{"text": "a", "kind": answer} for answer in (False, True)]
    text = labelled(classes, records)
    assert [text.example(record)[1] for record in records] == [0.0, 1.0]
    reverse = labelled(classes[::-1], records)
    assert [reverse.example(record)[1] for record in records] == [1.0, 0.0]
