"""The commands one after the other, as a user gives them: source, adapted, and what is done with their results."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from t5g2 import cli
from tests.e2e.conftest import CONFIG


def files(folder):
    """{path: content} of every file in a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_from_the_source_to_every_result(corpus, devices, tmp_path, capsys, monkeypatch):
    """The adapted model is trained, evaluated and resumed on eight devices; its source, and what goes on, on one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus, tmp_path / "corpus")

    def t5g2(name: str, *flags: str) -> str:
        capsys.readouterr()
        assert cli.main([name, *flags]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    def config(arm: str) -> list[str]:
        text = {"kind": "text", "path": "corpus/heldout"}
        objective = {"kind": "causal" if arm == "source" else "ul2"}
        task = {"kind": "heldout_loss", "text": text, "objective": objective, "examples": 8}
        flags = [f"--config={CONFIG}:{arm}@corpus", f"--config.eval.tasks={[task]!r}", "--config.train.steps=12"]
        return [*flags, "--config.log.every_steps=4", "--config.save.every_steps=6"]

    with monkeypatch.context() as alone:
        alone.setattr(jax, "devices", lambda: devices[:1])
        t5g2("train", *config("source"), "--workdir=corpus/source", "--config.save.every_steps=0")
    t5g2("train", *config("adapted"), "--workdir=adapted")
    account = json.loads((tmp_path / "adapted" / "provenance.json").read_text())
    assert {leaf["how"] for leaf in account["leaves"]} == {"copied", "tied"}
    rows = [json.loads(line) for line in (tmp_path / "adapted" / "metrics.jsonl").read_text().splitlines()]
    recorded = [row["eval/heldout/loss"] for row in rows if "eval/heldout/loss" in row]
    assert len(recorded) == 2

    t5g2("evaluate", *config("adapted"), "--workdir=adapted")
    scores = json.loads((tmp_path / "adapted" / "evaluations" / "12" / "scores.json").read_text())
    assert scores["heldout/loss"] == pytest.approx(recorded[-1], rel=1e-6)

    assert t5g2(
        "generate", "--model=adapted/model", "--prompt=the cat", "--max_new_tokens=3", "--temperature=1"
    ).strip()
    (tmp_path / "in.jsonl").write_text('{"prompt": "the cat"}\n\n{"prompt": "a dog"}\n')
    t5g2("generate", "--model=corpus/source/model", "--input=in.jsonl", "--out=out.jsonl", "--max_new_tokens=3")
    outputs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in outputs] == ["the cat", "a dog"]

    assert "source leaves" in t5g2("adapt", "--source=corpus/source/model", "--target=t5gemma2", "--out=by_command")
    t5g2("average", "--workdir=adapted", "--last=2", "--out=averaged")
    # where no checkpoint is, the weights of a folder are what step 0 is measured on
    flags = [*config("scratch"), "--workdir=going_on", "--config.init.params=averaged", "--config.save.model=False"]
    with monkeypatch.context() as alone:
        alone.setattr(jax, "devices", lambda: devices[:1])
        t5g2("train", *flags, "--config.train.steps=5", "--config.save.every_steps=0")

    before = files(tmp_path / "adapted")
    t5g2("train", *config("adapted"), "--workdir=adapted", "--replay=6")
    assert files(tmp_path / "adapted") == before
    assert "held-out loss at end" in t5g2("report", "--workdir=adapted")
    assert (tmp_path / "adapted" / "report" / "index.html").stat().st_size > 10_000
    assert "check passed: the experiment can run" in t5g2("check", *config("adapted"))
    assert "suffix_r75" in t5g2("data", *config("adapted"), "--n=1")


@pytest.mark.long
def test_every_way_to_adapt_in_a_run(corpus, one_device, tmp_path, capsys, monkeypatch):
    """Two sources, cut in depth, with changes; and the decoder-only baseline with a prefix that sees both ways."""
    monkeypatch.chdir(tmp_path)

    def train(arm: str, workdir: str, *flags: str, steps: int = 5) -> list[dict]:
        common = [f"--config={CONFIG}:{arm}@{corpus}", f"--workdir={workdir}", f"--config.train.steps={steps}"]
        assert cli.main(["train", *common, "--config.save.every_steps=0", *flags]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()]

    rows = train("source", "prefix", "--config.data.sources.0.objective={'kind': 'prefix_lm_decoder'}", steps=24)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.3
    train("source", "wide", "--config.model.layers=5")
    train(
        "adapted",
        "adapted",
        "--config.init.adapt.source=wide/model,prefix/model",
        "--config.init.adapt.choices.encoder_layers=every:2",
        "--config.init.adapt.choices.cross_norms=none",
        "--config.model.cross=separate",
        "--config.model.tied_embedding=False",
        "--config.model.encoder_attention=causal",
        "--config.model.encoder.kv_heads=4",
    )
    account = json.loads((tmp_path / "adapted" / "provenance.json").read_text())
    assert {leaf["how"] for leaf in account["leaves"]} == {"copied", "derived", "initialised", "dropped"}
    assert account["source"] == f"encoder {tmp_path / 'wide/model'}, decoder {tmp_path / 'prefix/model'}"
    assert "encoder.layers: 5 in the source, 3 in the target" in account["settings"]
    assert cli.main(["report", "--workdir=adapted"]) == 0
    page = (tmp_path / "adapted" / "report" / "index.html").read_text()
    assert "encoder:layers.attention.k" in page
    assert "cut in depth" in page


@pytest.mark.long
def test_a_run_goes_on_with_tokens_made_ahead(corpus, one_device, tmp_path, capsys, monkeypatch):
    """The same command again makes nothing; a run that began with the text ends in the same bits with its tokens."""
    monkeypatch.chdir(tmp_path)

    def t5g2(name: str, *flags: str) -> str:
        assert cli.main([name, f"--config={CONFIG}:source@{corpus}", *flags]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    said = t5g2("tokenize", "--out=tokens", "--shards=3")
    assert "0: 12 documents, " in said
    before = files(tmp_path / "tokens")
    t5g2("tokenize", "--out=tokens", "--shards=3")
    assert files(tmp_path / "tokens") == before
    setting = said.split("--config.data.sources.0.text=")[1].strip().strip("'")
    tokens = f"--config.data.sources.0.text={setting}"
    t5g2("train", "--workdir=text", "--config.train.steps=8")
    t5g2("train", "--workdir=tokens_only", "--config.train.steps=8", tokens)
    half = ["--workdir=both", "--config.train.steps=8"]
    t5g2("train", "--workdir=both", "--config.train.steps=4", "--config.optim.schedule.warmup_steps=3")
    assert cli.main(["train", f"--config={CONFIG}:source@{corpus}", *half, tokens]) == 2
    assert "--allow_change=" in capsys.readouterr().err
    assert cli.main(["tokenize", f"--config={CONFIG}:source@{corpus}", "--out=t", "--sources=web"]) == 2
    assert "unknown source 'web'" in capsys.readouterr().err
    model = "model-00001-of-00001.safetensors"
    assert files(tmp_path / "text" / "model")[Path(model)] == files(tmp_path / "tokens_only" / "model")[Path(model)]


def test_answers_ahead_of_a_run(corpus, one_device, tmp_path, capsys, monkeypatch):
    """A run takes what cache-logits prints; a wrong flag, another number of shards: status 2."""
    monkeypatch.chdir(tmp_path)
    config = [f"--config={CONFIG}:source@{corpus}", "--config.train.steps=5", "--config.save.every_steps=0"]
    assert cli.main(["train", *config, "--workdir=teacher"]) == 0
    capsys.readouterr()
    make = ["cache-logits", *config, "--teacher=teacher/model", "--out=answers", "--per_token=8"]
    assert cli.main([*make, "--shards=2"]) == 0
    [setting] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--config.distill=")]
    flags = ["--config.distill=" + setting.removeprefix("--config.distill=").strip("'"), "--config.log.every_steps=1"]
    assert cli.main(["train", *config, *flags, "--workdir=student"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("train/divergence", 0) > 0 for row in rows)
    for wrong, message in (
        (["--shards=3"], "holds other teacher logits"),
        (["--shards=2", "--method=full"], 'take "top_k" or "sampled"'),
        (["--shards=2", "--part=2/2"], "INDEX/COUNT"),
        (["--shards=2", "--sources=web"], "unknown source 'web'"),
        (["--shards=2", "--teacher=nowhere"], "nowhere"),
        (["--shards=2", "--config.data.chunk_tokens=32"], "pieces_fingerprint"),
    ):
        capsys.readouterr()
        assert cli.main([*make, *wrong]) == 2
        assert message in capsys.readouterr().err
