"""Learning from a teacher: which of its distributions meet which targets, computed in the step or before the run."""

import dataclasses
import json
import re
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint import folder as folders
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape, make
from t5g2.data.config import TeacherFeatures
from t5g2.data.packed_rows import host_batch
from t5g2.data.pipeline import Pipeline, finite_batches
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.jobs import run_evaluation, teacher_cache
from t5g2.models.distillation import Distillation
from t5g2.train import experiment as experiments
from t5g2.train import loop, step, teachers
from t5g2.train import plan as plans
from t5g2.train import workdir as workdirs
from tests import programs, tiny, weights

VOCAB = Bytes(sentinels=20).vocab_size
# one kind of layer: local in the student, global in its teachers
SMALL = dataclasses.replace(tiny.GEMMA3, vocab_size=VOCAB, layers=2, pattern=("global",))
GEMMA = dataclasses.replace(SMALL, width=24, final_softcap=5.0)
T5GEMMA2 = dataclasses.replace(tiny.T5GEMMA2, encoder=SMALL, decoder=SMALL, eoi_id=None)
TOKENIZER = {"kind": "bytes", "sentinels": 20}
UL2 = {"kind": "ul2"}
LOSS_SUMS = jax.jit(step.loss_sums, static_argnames="options")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with 4 texts, and two teachers."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = "the cat sat on a mat and saw the dog run".split()
    for i in range(4):
        (folder / "text" / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    for name, config in (("gemma", GEMMA), ("t5gemma2", T5GEMMA2)):
        folders.save_model(folder / name, model(config), tokenizer=Bytes(sentinels=20).to_dict())
    return folder


def experiment(corpus, objective=None, *, decoder_only=False, **changes):
    """A run of a tiny student."""
    stack = {"vocab_size": VOCAB, "width": 32, "layers": 2, "mlp_width": 48, "heads": 4, "kv_heads": 2, "head_size": 8}
    stack |= {"window": 8, "pattern": ["local"]}
    model = {"kind": "gemma", **stack} if decoder_only else {"kind": "t5gemma", "encoder": stack, "decoder": stack}
    source = {"text": {"kind": "text", "path": str(corpus / "text")}, "objective": objective or UL2, "name": "text"}
    node = {
        "model": model,
        "data": {
            "sources": [source],
            "tokenizer": TOKENIZER,
            "chunk_tokens": 40,
            "rows": 8,
            "encoder_length": 0 if decoder_only else 64,
            "decoder_length": 64,
            "streams": 4,
            "packing_rows": 2,
        },
        "optim": {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 1e-3}},
        "train": {"steps": 3, "seed": 7, "tile_tokens": 64},
        "compute": {"dtype": "float32"},
        "log": {"every_steps": 1, "tensorboard": False},
        "save": {"model": False},
    }
    return experiments.build(node | changes)


def model(config):
    """Random weights, with logits that are far apart: a teacher that has an opinion."""
    made = weights.model(config)
    made.embedder.table[...] = 4.0 * made.embedder.table[...]
    return made


def mesh():
    return make(MeshShape(), jax.devices()[:1])


def test_the_drawn_alignment():
    """Two texts in a row: [11 … 15] with [13 14] taken away, and [21 … 24] with [24] taken away."""
    columns = {
        "decoder": [2, 90, 13, 14, 2, 90, 24, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 2, 0],
        "targets": [90, 13, 14, 1, 90, 24, 1, 0],
        "origins": [-1, 2, 3, -1, -1, 3, -1, -1],
        "text": [2, 11, 12, 13, 14, 2, 21, 22, 23, 0],
        "text_segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 2, 0],
        "text_positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0],
    }
    rows = {name: np.array([values], np.int32) for name, values in columns.items()}
    rows |= {"weights": np.ones((1, 8), np.float32), "ids": np.array([[[0, 0], [1, 0]]])}
    config: Any = types.SimpleNamespace(sources=(None,), encoder_length=0)
    teaching: Any = host_batch(rows, np.zeros(1, np.int32), np.zeros((1, 3), np.int64), config).batch.teacher
    assert teaching.origins.dtype == np.int32
    assert teaching.origins.tolist() == [[-1, 2, 3, -1, -1, 8, -1, -1]]
    # the token that follows a place of the teacher's row is the target
    following = np.append(rows["text"][0][1:], 0)
    known = teaching.origins[0] >= 0
    assert following[teaching.origins[0][known]].tolist()[:2] == [13, 14]
    assert rows["text"][0][teaching.origins[0][5]] == 23  # 24 is the last token, which no teacher has to read


@pytest.mark.parametrize("objective", ["ul2", "prefix_lm"])
def test_a_packed_teacher_says_what_it_says_of_each_text_alone(corpus, objective):
    run = experiment(corpus, {"kind": objective}, distill={"teacher": str(corpus / "gemma")})
    data = plans.make(run, mesh()).data
    assert data.teacher_features == TeacherFeatures("text")
    teacher, bos = model(GEMMA), data.tokenizer.special_tokens.bos
    [host_batch] = [next(finite_batches(data, seed=0))]
    batch = jax.device_put(host_batch.batch)
    outputs = jax.jit(lambda *given: teachers.outputs(*given, tiny.FLOAT32, key=None))(teacher, batch)
    hidden, checked = np.asarray(outputs.hidden_BTD), 0
    for row in range(3):
        text, segments = batch.teacher.text, np.asarray(batch.decoder.segments[row])
        for segment in range(1, segments.max() + 1):
            read = np.asarray(text.tokens[row])[np.asarray(text.segments[row]) == segment]
            assert read[0] == bos
            line = np.zeros((1, text.tokens.shape[1]), np.int32)  # of one length, so that it is compiled once
            line[0, : len(read)] = read
            places = np.arange(line.shape[1], dtype=np.int32)[None]
            alone_text = Sequences(line, (places < len(read)).astype(np.int32), places)
            alone = np.asarray(programs.hidden(teacher, None, alone_text, compute=tiny.FLOAT32))[0]
            targets, known = np.asarray(batch.targets[row]), np.asarray(outputs.has_teacher_BT[row])
            for place in np.flatnonzero((segments == segment) & known):
                # the target follows the place whose state the teacher gives, but for the last, which it does not read
                at = [i for i in range(len(read)) if i + 1 == len(read) or read[i + 1] == targets[place]]
                near = [i for i in at if np.abs(hidden[row, place] - alone[i]).max() < 2e-5]
                assert near, (row, place)
                checked += 1
    assert checked > 60


@pytest.mark.long
@pytest.mark.parametrize("teacher", ["gemma", "t5gemma2"])
def test_a_teacher_is_asked_in_every_step(corpus, tmp_path, teacher):
    """The divergence is recorded and falls, the same however the batch is cut."""
    settings = {"teacher": str(corpus / teacher), "weight": 0.5, "method": "full"}
    divergences = []
    # in two parts; and on the 8 devices of the tests, for the teacher that reads more than the student
    ways = {"parts": {"data": 2, "fsdp": 1, "tensor": 4}} | ({"devices": {}} if teacher == "gemma" else {})
    for name, mesh in ways.items():
        train = {"steps": 12, "seed": 7, "tile_tokens": 64, "microbatches": 2 if name == "parts" else 1}
        loop.train(experiment(corpus, distill=settings, train=train, mesh=mesh), str(tmp_path / name))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        divergences.append([row["train/divergence"] for row in rows if "train/divergence" in row])
    np.testing.assert_allclose(divergences[0], divergences[-1], rtol=1e-3)
    first = divergences[0]
    assert len(first) == 12
    assert first[-1] < first[0]
    assert all(np.isfinite(first))


def test_what_a_step_minimises(corpus):
    """The sum over targets by hand: the teacher's distribution where it has an answer, the target itself elsewhere."""
    run = experiment(corpus, distill={"teacher": str(corpus / "gemma"), "weight": 0.6})
    plan = plans.make(run, mesh())
    student, teacher = weights.model(run.model), model(GEMMA)
    with Pipeline(plan.data, seed=7) as pipeline:
        batch = jax.device_put(pipeline.next().batch)
    total, sums = LOSS_SUMS(student, batch, plan.step_options(), teacher, jax.random.key(0))
    log_s = jax.nn.log_softmax(programs.logits(student, batch.encoder, batch.decoder, compute=tiny.FLOAT32))
    text = batch.teacher.text
    log_p = jax.nn.log_softmax(programs.logits(teacher, None, text, compute=tiny.FLOAT32))
    known = batch.teacher.origins >= 0
    log_p = jnp.take_along_axis(log_p, jnp.maximum(batch.teacher.origins, 0)[..., None], axis=1)
    apart = jnp.sum(jnp.exp(log_p) * (log_p - log_s), axis=-1)
    loss = -jnp.take_along_axis(log_s, batch.targets[..., None], axis=-1)[..., 0]
    want = jnp.sum(batch.weights * jnp.where(known, 0.4 * loss + 0.6 * apart, loss))
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(sums.divergence, jnp.sum(batch.weights * jnp.where(known, apart, 0.0)), rtol=1e-5)
    special_tokens = run.data.tokenizer.special_tokens
    unknown = np.asarray(batch.targets)[np.asarray((~known) & (batch.weights > 0))]
    assert (special_tokens.is_sentinel(unknown) | (unknown == special_tokens.eos)).all()
    assert len(unknown) > 0


def test_a_student_that_begins_as_its_teacher(one_device, corpus, tmp_path):
    """Before the first update a copy has nothing to learn from the original."""
    student = experiment(corpus, {"kind": "causal"}, decoder_only=True)
    folders.save_model(tmp_path / "itself", weights.model(student.model), tokenizer=Bytes(sentinels=20).to_dict())
    distill = {"teacher": str(tmp_path / "itself")}
    run = experiment(
        corpus, {"kind": "causal"}, decoder_only=True, distill=distill, init={"params": str(tmp_path / "itself")}
    )
    loop.train(run, str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    distilled_rows = [row for row in rows if "train/divergence" in row]
    assert abs(distilled_rows[0]["train/divergence"]) < 1e-6
    assert distilled_rows[0]["train/loss"] > 1.0


@pytest.fixture(scope="module")
def cache(corpus):
    """The logits of the decoder-only teacher, 12 a token."""
    out = corpus / "logits"
    how = Distillation(method="top_k", per_token=12)
    teacher_cache.cache_teacher_logits(experiment(corpus), str(corpus / "gemma"), out, how, shards=3)
    return out


@pytest.mark.parametrize(("per_token", "tail"), [(12, "renormalise"), (12, "together"), (5, "together")])
def test_cached_logits_give_the_loss_of_live_ones(corpus, cache, per_token, tail):
    """To what 16 bits keep of probabilities."""
    distill = {"method": "top_k", "per_token": per_token, "tail": tail}
    live_run = experiment(corpus, distill=distill | {"teacher": str(corpus / "gemma")})
    cached_run = experiment(corpus, distill=distill | {"cache": str(cache)})
    student, teacher = weights.model(live_run.model), model(GEMMA)
    divergences = []
    for run, asks in ((live_run, teacher), (cached_run, None)):
        plan = plans.make(run, mesh())
        with Pipeline(plan.data, seed=7) as pipeline:
            batches = [jax.device_put(pipeline.next().batch) for _ in range(3)]
        sums = [LOSS_SUMS(student, batch, plan.step_options(), asks, jax.random.key(0))[1] for batch in batches]
        divergences.append([float(s.divergence / s.teacher_weight) for s in sums])
        assert all(s.teacher_weight > 100 for s in sums)
    np.testing.assert_allclose(*divergences, rtol=2e-3)
    assert min(divergences[0]) > 0.1


def test_the_batches_of_a_cached_teacher_are_the_same_on_any_number_of_hosts(corpus, cache):
    run = experiment(corpus, distill={"cache": str(cache), "method": "top_k", "per_token": 12})
    data = plans.make(run, mesh()).data
    with Pipeline(data, seed=7) as whole, Pipeline(data, seed=7, rows=range(4, 8)) as half:
        for _ in range(3):
            one, other = whole.next().batch.teacher, half.next().batch.teacher
            for of_all, of_half in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                np.testing.assert_array_equal(of_all[4:], of_half)
        seen: Any = whole.next().batch.teacher
        positions = half.positions
        assert seen.ids.shape == (8, 64, 12)
        assert set(positions) <= set(whole.positions)


def test_an_evaluation_takes_no_teacher(one_device, corpus, tmp_path, capsys):
    shutil.copytree(corpus / "gemma", tmp_path / "gemma")
    task = {"kind": "heldout_loss", "text": {"kind": "text", "path": str(corpus / "text")}, "objective": UL2}
    run = experiment(corpus, distill={"teacher": str(tmp_path / "gemma")}, eval={"tasks": [task | {"examples": 4}]})
    loop.train(run, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "gemma")
    run_evaluation.evaluate_run(run, str(tmp_path / "run"))
    assert "heldout/loss" in capsys.readouterr().out


def test_a_mesh_that_leaves_weights_whole_is_warned_of(corpus, tmp_path, capsys):
    """By both commands that load weights for it: two devices do not cut an MLP whose width is odd."""
    run = experiment(corpus, mesh={"data": -1, "tensor": 2})
    folders.save_model(
        tmp_path / "odd", model(dataclasses.replace(GEMMA, mlp_width=45)), tokenizer=Bytes(sentinels=20).to_dict()
    )
    how = Distillation(method="top_k", per_token=12)
    teacher_cache.cache_teacher_logits(run, str(tmp_path / "odd"), tmp_path / "logits", how, shards=3)
    stack = dataclasses.replace(run.model.decoder, mlp_width=55)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=stack))
    (tmp_path / "run").mkdir()
    workdirs.write_experiment(tmp_path / "run", run, None)
    with pytest.raises(UserError, match="run that has saved a checkpoint"):
        run_evaluation.evaluate_run(run, str(tmp_path / "run"))
    assert re.findall(r"mesh\.tensor = 2 divides no axis of (.*?):", capsys.readouterr().err) == [
        "layers.mlp.down [45, 24] and 2 more",
        "decoder.layers.mlp.down [55, 32] and 2 more",
    ]


def test_a_run_with_cached_logits_is_resumed_and_refuses_others(one_device, corpus, cache, tmp_path):
    distill = {"cache": str(cache), "method": "top_k", "per_token": 12}
    loop.train(experiment(corpus, distill=distill), str(tmp_path / "run"))
    longer = {"steps": 4, "seed": 7, "tile_tokens": 64}
    # other logits in the place of those the run began with
    other = tmp_path / "other"
    teacher_cache.cache_teacher_logits(
        experiment(corpus), str(corpus / "gemma"), other, Distillation(method="sampled", per_token=12)
    )
    with pytest.raises(UserError, match=r"distill\.cache"):
        loop.train(
            experiment(corpus, distill=distill | {"cache": str(other), "method": "sampled"}, train=longer),
            str(tmp_path / "run"),
        )
    loop.train(experiment(corpus, distill=distill, train=longer), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sampled"}, r"selected by method = 'top_k'.*set it to that of the folder"),
        ({"per_token": 13}, r"has 12 entries per token and per_token = 13"),
        ({"method": "full"}, r"a cache holds only parts of distributions"),
        ({"teacher": "t5gemma2"}, r"logits of another teacher"),
    ],
)
def test_a_cache_that_does_not_fit(corpus, cache, changes, message):
    changes = {key: str(corpus / value) if key == "teacher" else value for key, value in changes.items()}
    distill = {"cache": str(cache), "method": "top_k", "per_token": 12} | changes
    with pytest.raises(UserError, match=message):
        Pipeline(plans.make(experiment(corpus, distill=distill), mesh()).data, seed=0)


def test_a_cache_about_other_text(corpus, cache):
    distill = {"cache": str(cache), "method": "top_k", "per_token": 12}
    run = experiment(corpus, distill=distill)
    shorter = dataclasses.replace(plans.make(run, mesh()).data, chunk_tokens=32)
    with pytest.raises(UserError, match=r"of other text.*cache-logits"):
        Pipeline(shorter, seed=0)


def test_a_teacher_of_its_own_speaks_for_itself(corpus, cache):
    """The fingerprint is of weights, not of where they lie or in which format."""
    distill = {"cache": str(cache), "method": "top_k", "per_token": 12, "teacher": str(corpus / "gemma")}
    Pipeline(plans.make(experiment(corpus, distill=distill), mesh()).data, seed=0).close()


def test_an_interrupted_cache_goes_on_and_parts_make_the_same_files(corpus, cache, tmp_path):
    how, teacher = Distillation(method="top_k", per_token=12), str(corpus / "gemma")
    run, out = experiment(corpus), tmp_path / "logits"
    for which in (1, 0):
        assert not (out / "text" / "answers.json").exists()
        teacher_cache.cache_teacher_logits(run, teacher, out, how, shards=3, part=teacher_cache.WorkShare(which, 2))
    names = sorted(file.name for file in (cache / "text").iterdir())
    assert sorted(file.name for file in (out / "text").iterdir()) == names
    for name in names:
        if name.endswith("array_record"):
            assert (out / "text" / name).read_bytes() == (cache / "text" / name).read_bytes()
    # a shard that is lost is made again, the others are left alone
    before = {name: (out / "text" / name).stat().st_mtime_ns for name in names}
    lost = out / "text" / names[1]
    lost.unlink()
    teacher_cache.cache_teacher_logits(run, teacher, out, how, shards=3)
    after = {name: (out / "text" / name).stat().st_mtime_ns for name in names}
    assert {name for name in names if before[name] != after[name]} == {"answers.json", names[1]}
    assert lost.read_bytes() == (cache / "text" / names[1]).read_bytes()


def test_a_shard_that_is_cut_off(corpus, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "logits")
    shard = sorted((tmp_path / "logits" / "text").glob("*.array_record"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    run = experiment(corpus, distill={"cache": str(tmp_path / "logits"), "method": "top_k", "per_token": 12})
    with pytest.raises(UserError, match=r"was written with .*; run the same `t5g2 cache-logits` again"):
        Pipeline(plans.make(run, mesh()).data, seed=0)
    bytes_ = bytearray(shard.read_bytes() + bytes(100))
    bytes_[len(bytes_) // 2 : len(bytes_) // 2 + 64] = bytes(64)
    shard.write_bytes(bytes(bytes_))
    with Pipeline(plans.make(run, mesh()).data, seed=0) as pipeline, pytest.raises(UserError, match=r"is damaged at"):
        [pipeline.next() for _ in range(50)]


def test_a_shard_that_is_cut_off_is_made_again(corpus, cache, tmp_path):
    how, teacher = Distillation(method="top_k", per_token=12), str(corpus / "gemma")
    shutil.copytree(cache, tmp_path / "logits")
    shard = sorted((tmp_path / "logits" / "text").glob("*.array_record"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    # another part of the work leaves it, and does not declare it whole
    teacher_cache.cache_teacher_logits(
        experiment(corpus), teacher, tmp_path / "logits", how, shards=3, part=teacher_cache.WorkShare(0, 2)
    )
    assert shard.read_bytes() == whole[:-100]
    teacher_cache.cache_teacher_logits(experiment(corpus), teacher, tmp_path / "logits", how, shards=3)
    assert shard.read_bytes() == whole


def test_only_finished_logits_are_trained_with(corpus, tmp_path, capsys):
    """The rest of a killed call is no obstacle."""
    how, teacher, out = Distillation(method="top_k", per_token=12), str(corpus / "gemma"), tmp_path / "logits"
    (out / "text").mkdir(parents=True)
    (out / "text" / ".plan.json.1.part").write_text("{")
    teacher_cache.cache_teacher_logits(
        experiment(corpus), teacher, out, how, shards=3, part=teacher_cache.WorkShare(0, 2)
    )
    assert capsys.readouterr().out == f"not complete yet: text in {out} lacks shards, which the other calls write\n"
    teacher_cache.cache_teacher_logits(
        experiment(corpus), teacher, out, how, shards=3, part=teacher_cache.WorkShare(1, 2)
    )
    printed = capsys.readouterr().out
    assert printed == f"--config.distill='{json.dumps({'cache': str(out), 'method': 'top_k', 'per_token': 12})}'\n"


@pytest.mark.parametrize(
    ("file", "content"), [("answers.json", ""), ("answers.json", "{}"), ("answers.json", "[1]"), ("plan.json", '{"x":')]
)
def test_a_damaged_manifest_of_logits(corpus, tmp_path, file, content):
    folder = tmp_path / "logits" / "text"
    folder.mkdir(parents=True)
    (folder / file).write_text(content)
    how = Distillation(method="top_k", per_token=12)
    with pytest.raises(UserError, match=rf"{file} is damaged.*remove the folder"):
        teacher_cache.cache_teacher_logits(
            experiment(corpus), str(corpus / "gemma"), tmp_path / "logits", how, shards=3
        )
    distill = {"cache": str(tmp_path / "logits"), "method": "top_k", "per_token": 12}
    expected = r"is damaged.*remove the folder" if file == "answers.json" else r"has no answers\.json"
    with pytest.raises(UserError, match=expected):
        Pipeline(plans.make(experiment(corpus, distill=distill), mesh()).data, seed=0)


def test_logits_that_cannot_be_cached(corpus, tmp_path):
    how, teacher = Distillation(method="top_k", per_token=12), str(corpus / "gemma")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is in the way, and is no folder; give another path"):
        teacher_cache.cache_teacher_logits(experiment(corpus), teacher, tmp_path / "file", how)
    with pytest.raises(UserError, match=r"'gs://bucket/logits' is a URL; teacher logits are written to a local folder"):
        teacher_cache.cache_teacher_logits(experiment(corpus), teacher, "gs://bucket/logits", how)
    more = Distillation(method="top_k", per_token=VOCAB + 1)
    with pytest.raises(UserError, match=rf"per_token = {VOCAB + 1} and the vocabulary has {VOCAB} tokens"):
        teacher_cache.cache_teacher_logits(experiment(corpus), teacher, tmp_path / "logits", more)
    with pytest.raises(UserError, match=rf"the vocabulary has {VOCAB} tokens"):
        experiment(corpus, distill={"teacher": teacher, "method": "sampled", "per_token": VOCAB + 1})


def test_a_run_does_not_go_on_with_another_teacher(one_device, corpus, tmp_path):
    shutil.copytree(corpus / "gemma", tmp_path / "teacher")
    settings = {"distill": {"teacher": str(tmp_path / "teacher")}, "train": {"steps": 1, "seed": 7, "tile_tokens": 64}}
    loop.train(experiment(corpus, **settings), str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "teacher")
    other = weights.model(GEMMA)
    folders.save_model(tmp_path / "teacher", other, tokenizer=Bytes(sentinels=20).to_dict())
    settings["train"]["steps"] = 2
    with pytest.raises(UserError, match=r"another model than when step 1 was saved.*allow_change=distill\.teacher"):
        loop.train(experiment(corpus, **settings), str(tmp_path / "run"))
    loop.train(experiment(corpus, **settings), str(tmp_path / "run"), allow_change=("distill.teacher",))


def test_logits_of_an_encoder_decoder_are_cached_where_nothing_is_drawn(corpus, tmp_path):
    how = Distillation(method="top_k", per_token=VOCAB)
    teacher = str(corpus / "t5gemma2")
    with pytest.raises(UserError, match=r"depend on what UL2 draws.*take a decoder-only teacher"):
        teacher_cache.cache_teacher_logits(experiment(corpus), teacher, tmp_path / "ul2", how)
    prefix = {"kind": "prefix_lm"}
    teacher_cache.cache_teacher_logits(experiment(corpus, prefix), teacher, tmp_path / "prefix", how)
    distill = {"method": "top_k", "per_token": VOCAB, "tail": "together"}
    live_run = experiment(corpus, prefix, distill=distill | {"teacher": teacher})
    cached_run = experiment(corpus, prefix, distill=distill | {"cache": str(tmp_path / "prefix")})
    student, divergences = weights.model(live_run.model), []
    for run, asks in ((live_run, model(T5GEMMA2)), (cached_run, None)):
        plan = plans.make(run, mesh())
        with Pipeline(plan.data, seed=7) as pipeline:
            batch = jax.device_put(pipeline.next().batch)
        sums = LOSS_SUMS(student, batch, plan.step_options(), asks, jax.random.key(0))[1]
        divergences.append(float(sums.divergence / sums.teacher_weight))
    np.testing.assert_allclose(*divergences, rtol=2e-3)
    assert divergences[0] > 0.2
    uneven = experiment(corpus, {"kind": "prefix_lm", "prefix": 0.25}, distill=cached_settings(cached_run))
    message = r"logits of an encoder-decoder teacher for the examples of PrefixLM\(prefix=0\.5"
    with pytest.raises(UserError, match=message):
        Pipeline(plans.make(uneven, mesh()).data, seed=0)


def cached_settings(run):
    return experiments.dump(run)["distill"]


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        (
            dataclasses.replace(GEMMA, vocab_size=VOCAB - 1),
            Bytes(sentinels=20),
            r"a vocabulary of \d+ and the model one",
        ),
        (tiny.SIGLIP, None, r"give a language model"),
    ],
)
def test_a_teacher_that_knows_other_tokens(corpus, tmp_path, config, tokenizer, message):
    described = None if tokenizer is None else tokenizer.to_dict()
    folders.save_model(tmp_path / "other", weights.model(config), tokenizer=described)
    with pytest.raises(UserError, match=message):
        plans.make(experiment(corpus, distill={"teacher": str(tmp_path / "other")}), mesh())


def test_other_sentinels_matter_to_a_teacher_that_reads_them(corpus, tmp_path):
    for name, config in (("gemma", GEMMA), ("t5gemma2", T5GEMMA2)):
        folders.save_model(tmp_path / name, weights.model(config), tokenizer=Bytes(sentinels=10).to_dict())
    plans.make(experiment(corpus, distill={"teacher": str(tmp_path / "gemma")}), mesh())
    with pytest.raises(UserError, match=r"has another tokenizer"):
        plans.make(experiment(corpus, distill={"teacher": str(tmp_path / "t5gemma2")}), mesh())


def test_a_teacher_with_another_tokenizer(corpus, tmp_path):
    described = {"kind": "sentencepiece", "file": "t.model", "sha256": "0" * 64}
    folders.save_model(tmp_path / "other", weights.model(GEMMA), tokenizer=described)
    with pytest.raises(UserError, match=r"has another tokenizer"):
        plans.make(experiment(corpus, distill={"teacher": str(tmp_path / "other")}), mesh())


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({}, r"distill has no teacher"),
        ({"teacher": "/nowhere"}, r"/nowhere"),
        ({"teacher": "x", "weight": 2.0}, r"at most 1"),
        ({"cache": "gs://bucket/logits", "method": "top_k"}, r"'gs://bucket/logits' is a URL"),
    ],
)
def test_settings_that_name_no_teacher(corpus, distill, message):
    with pytest.raises(UserError, match=message):
        plans.make(experiment(corpus, distill=distill), mesh())


@pytest.mark.parametrize("text", ["3", "4/4", "a/b", "0/0"])
def test_a_part_of_the_shards(text):
    with pytest.raises(UserError, match="INDEX/COUNT"):
        teacher_cache.WorkShare.parse(text)
