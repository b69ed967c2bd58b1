"""Every file in configs/ and experiments/ loads and passes `t5g2 check`."""

from pathlib import Path

import pytest

from t5g2 import cli, sweep
from t5g2.train import experiment as experiments

ROOT = Path(__file__).parent.parent.parent
# what each config file is called with
ARGUMENTS = {"quickstart": ("source", "adapted", "scratch")}
CONFIGS = [f"{f}:{arg}" for f in sorted((ROOT / "configs").glob("*.py")) for arg in ARGUMENTS[f.stem]]
SWEEPS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: Path(c).name)
def test_a_config_passes_check(config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", f"--config={config}"]) == 0
    assert "the experiment is sound" in capsys.readouterr().out


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_a_sweep_loads_and_its_runs_are_checked_configs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = sweep.load(path)
    for part in loaded.parts:
        if isinstance(part, sweep.Variant):
            experiments.load(part.config, part.changes(tmp_path))
            assert str(ROOT / part.config) in CONFIGS


def test_memory_that_a_device_does_not_have_is_an_error(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["check", "--config=configs/quickstart.py:source", "--hbm_gib=0.001"]) == 2
    assert "a device has --hbm_gib=0.001; use more devices" in capsys.readouterr().err
