"""Every file in configs/ and experiments/ loads and passes `t5g2 check`, every released size among them."""

from pathlib import Path

import pytest

from t5g2 import cli
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.jobs import dry_run
from t5g2.models import build
from t5g2.models.config import DualEncoderConfig
from t5g2.models.sizes import SIZES
from t5g2.sweep import parts, sweep_file
from t5g2.train import config_file
from tests.data import tokenizer_files

ROOT = Path(__file__).parent.parent.parent


def sizes(family):
    return tuple(name.removeprefix(family) for name in SIZES if name.startswith(family))


# what each config file is called with
ARGUMENTS = {
    "quickstart": ("source", "adapted", "scratch"),
    "gemma": tuple(name for name in SIZES if name.startswith(("gemma", "medgemma:"))),
    "t5gemma": sizes("t5gemma:"),
    "t5gemma_small": tuple(f"{arm}-{width}" for arm in ("source", "adapted", "scratch") for width in (64, 96)),
    "t5gemma2": sizes("t5gemma2:"),
    "chat_small": ("",),
    "probe_small": ("head", "full", "decoder", "number"),
    "gemma3_270m": ("source", "adapted", "scratch", "prefix_lm", "separate", "causal", "offset"),
    "installed_text": (),  # the text of gemma3_270m
    "t5gemma2_images": (),  # takes pictures: tests/train/test_image_training.py makes some
}
CONFIGS = [f"{f}:{arg}".rstrip(":") for f in sorted((ROOT / "configs").glob("*.py")) for arg in ARGUMENTS[f.stem]]
# compiled too: of what runs on a laptop, one with each kind of model, and the smallest size of each family
LAPTOP = ("quickstart.py:source", "t5gemma_small.py:adapted-64")
SMALL = [c for c in CONFIGS if c.endswith((*LAPTOP, "gemma3:270m", ":s-s", ":270m-270m"))]
SWEEPS = sorted((ROOT / "experiments").glob("*.py"))


def short(config):
    return Path(config).name


def test_every_language_model_has_a_config():
    named = {*ARGUMENTS["gemma"], *(f"{f}:{arg}" for f in ("t5gemma", "t5gemma2") for arg in ARGUMENTS[f])}
    assert named == {name for name, size in SIZES.items() if not isinstance(size, DualEncoderConfig)}


@pytest.mark.parametrize("config", [*CONFIGS, str(ROOT / "configs/t5gemma2_images.py")], ids=short)
def test_a_config_decays_matrices_and_nothing_else(config):
    # decay is a prior of small weights: on the scale of a norm, on a bias or on an embedding it is a fault
    experiment = config_file.load(config)
    rules = experiment.optim.decay
    decayed = set()
    for (path, _), leaf in tree.leaves(build.abstract(experiment.model)).items():
        rate = next((rule.rate for rule in rules if tree.matches(rule.pattern, path)), 0.0)
        if rate and not experiment.optim.is_frozen(path):
            assert len(leaf.shape) >= 2, f"{path} is a vector"
            decayed.add(path.split(".")[-1])
    assert decayed <= {"q", "k", "v", "o", "gate", "up", "down", "kernel"}
    assert {"q", "up"} <= decayed or not rules


@pytest.mark.long
@pytest.mark.parametrize("config", SMALL, ids=short)
def test_a_config_passes_check(config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", f"--config={config}", "--config.data.rows=8"]) == 0  # one for each device
    said = capsys.readouterr().out
    assert "compiled in" in said
    assert "check passed: the experiment can run" in said


@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in SMALL], ids=short)
def test_another_config_passes_check_without_compiling(config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    # a batch of the same shape from less text; with a row for each device, where a config has one row
    less = [("data.streams", "8"), ("data.packing_rows", "1")]
    less += [("data.rows", "8")] if config_file.load(config).data.rows == 1 else []
    dry_run.check(config_file.load(config, less), compiled=False)
    said = capsys.readouterr().out
    assert "the step was not compiled" in said
    assert said.endswith("check passed: the experiment can run\n")


@pytest.mark.parametrize("family", ["gemma", "t5gemma", "t5gemma2"])
@pytest.mark.parametrize("argument", ["", ":3b-3b"])
def test_a_size_that_is_not_released_names_those_that_are(family, argument, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as raised:
        config_file.load(f"configs/{family}.py{argument}")
    name = "Gemma" if family == "gemma" else "T5Gemma"
    assert str(raised.value).startswith(f"unknown size {argument[1:]!r} of {name}")
    assert f"Allowed: {', '.join(sorted(ARGUMENTS[family]))}" in str(raised.value)


def test_what_the_reports_say_is_in_the_configs(monkeypatch):
    """T5Gemma 2: 2T tokens in batches of 4.2M, 16K on either side. T5Gemma 9B-2B: cross-attention alone at first."""
    monkeypatch.chdir(ROOT)
    made = config_file.load("configs/t5gemma2.py:4b-4b")
    batch = made.data.rows * (made.data.encoder_length + made.data.decoder_length)
    assert (batch, made.train.steps * batch) == (2**22, pytest.approx(2e12, rel=1e-5))
    assert (made.data.encoder_length, made.optim.clip_norm, made.optim.schedule.warmup_steps) == (16_384, 1.0, 100)
    assert {rule.pattern: (rule.first, rule.end) for rule in made.optim.freeze}["vision.*"] == (0, None)
    unbalanced = config_file.load("configs/t5gemma.py:9b-2b")
    assert [(rule.pattern, rule.end) for rule in unbalanced.optim.freeze] == [
        ("decoder.layers.*cross*", 0),
        ("*", 1000),
    ]
    assert config_file.load("configs/t5gemma.py:2b-2b").optim.freeze == ()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_a_sweep_loads_and_its_runs_are_checked_configs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    # where a sweep starts from released weights, their tokenizer is read
    monkeypatch.setenv("REAL", str(tmp_path))
    # with a sentinel for each span of a chunk of 256 tokens
    monkeypatch.setattr(tokenizer_files, "OTHERS", [f"<unused{k}>" for k in range(13)])
    (tmp_path / "gemma-3-270m").mkdir()
    tokenizer_files.huggingface(tmp_path / "gemma-3-270m")
    loaded = sweep_file.load(path)
    for part in loaded.ordered():
        if isinstance(part, parts.Variant):
            made = config_file.load(part.config, part.changes(tmp_path))
            assert str(ROOT / part.config) in CONFIGS
            assert part.seed is None or made.train.seed == part.seed


def test_memory_that_a_device_does_not_have_is_an_error(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", "--config=configs/quickstart.py:source", "--hbm_gib=0.001"]) == 2
    assert "a device has --hbm_gib=0.001; use more devices" in capsys.readouterr().err
