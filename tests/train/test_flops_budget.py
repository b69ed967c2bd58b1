"""A budget of FLOPs in place of steps: the number of updates by hand, what is recorded, and budgets that cannot be."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from t5g2 import cli
from t5g2.core.errors import UserError
from t5g2.train import config_file, flops_budget

# FLOPs of a token, forward: projections 4 D N H + 4 D K H, MLP 6 D F, head 2 D V; D = F = H = 8, N = K = 1, V = 384
TOKEN = 4 * 8 * 8 + 4 * 8 * 8 + 6 * 8 * 8 + 2 * 8 * 384
# a row is BOS and 16 bytes, of which each sees itself and those before: 4 N H for each of 17 * 18 / 2 pairs
ROW = 17 * TOKEN + 4 * 8 * 153
UPDATE = 3 * 2 * ROW  # forward and backward, two rows

CONFIG = """
def get_config():
    model = dict(kind="gemma", vocab_size=384, width=8, layers=1, mlp_width=8)
    model |= dict(heads=1, kv_heads=1, head_size=8, window=64, pattern=["local"])
    source = {"text": {"kind": "jsonl", "path": "texts.jsonl"}, "objective": {"kind": "causal"}}
    data = dict(sources=[source], tokenizer={"kind": "bytes"}, rows=2, streams=2)
    data |= dict(encoder_length=0, decoder_length=17, chunk_tokens=16)
    optim = {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 0.01}}
    return {"model": model, "data": data, "optim": optim, "train": {"steps": 3}, "compute": {"dtype": "float32"}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"sentence {number:07}"}) for number in range(40)]  # of 16 bytes
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    return "config.py"


def experiment(config, **train):
    return config_file.load(config, [(f"train.{name}", repr(value)) for name, value in train.items()])


@pytest.mark.parametrize("seed", [0, 7])
def test_steps_are_those_that_the_budget_pays_for(config, seed):
    assert flops_budget.update_flops(experiment(config)) == UPDATE
    for budget, steps in ((10 * UPDATE, 10), (10.9 * UPDATE, 10), (UPDATE, 1)):
        given = experiment(config, steps=0, flops=budget, seed=seed)
        assert given.train.steps == 0
        resolved = flops_budget.resolved(given)
        assert resolved.train == dataclasses.replace(given.train, steps=steps)
        assert dataclasses.replace(resolved, train=given.train) == given


def test_a_run_of_steps_has_its_steps(config):
    assert flops_budget.resolved(experiment(config)) == experiment(config)


def test_a_schedule_ends_with_the_budget(config):
    """Rules about the length of a run are checked when it is known."""
    rise = [("optim.schedule.warmup_steps", "4"), ("train.steps", "0"), ("train.flops", f"{4 * UPDATE}")]
    given = config_file.load(config, rise)
    with pytest.raises(UserError, match=r"warmup_steps = 4 and train\.steps = 4: the warm-up must end"):
        flops_budget.resolved(given)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"flops": 1e9}, r"train\.steps = 3 and train\.flops = 1e\+09 are both set, .* set train\.steps=0"),
        ({"steps": 0, "flops": UPDATE / 2}, re.escape(f"is 0 updates of {UPDATE:.4g} FLOPs; give at least")),
        ({"steps": 0, "flops": 1e29}, "and at most 2,147,483,647 updates"),
        ({"steps": 0}, "steps = 0 and flops = None, so the run has no length; give steps, at least 1, or flops"),
        ({"steps": 0, "flops": 0.0}, r"flops = 0\.0; it must be above 0 and at most 1e\+30"),
        ({"steps": 0, "flops": float("inf")}, "flops"),
    ],
)
def test_budgets_that_cannot_be(config, train, message):
    with pytest.raises(UserError, match=message):
        flops_budget.resolved(experiment(config, **train))


def test_the_length_is_recorded_and_the_run_can_be_resumed(config, capfd, one_device):
    budget = ["--config=config.py", "--config.train.steps=0", f"--config.train.flops={3.5 * UPDATE}"]
    assert cli.main(["train", *budget, "--workdir=run"]) == 0
    recorded = json.loads((Path("run") / "experiment.json").read_text())["train"]
    assert (recorded["steps"], recorded["flops"]) == (3, 3.5 * UPDATE)
    assert "train.flops: 3 updates of" in capfd.readouterr().err
    # the same again is done, and a larger budget goes on
    assert cli.main(["train", *budget, "--workdir=run"]) == 0
    assert "done: 3 steps" in capfd.readouterr().err
    assert cli.main(["train", *budget[:2], f"--config.train.flops={5 * UPDATE}", "--workdir=run"]) == 0
    assert json.loads((Path("run") / "done.json").read_text())["step"] == 5
