"""Commands that are killed at random instants; by hand, more of them, and `train` too: tests/e2e/kill.py."""

import pytest

from tests.e2e import kill


@pytest.mark.long
def test_nothing_is_lost_or_half_written_whenever_a_command_is_killed(tmp_path, monkeypatch):
    """A run ends in the bits of the undisturbed one, without a temporary file, whatever the instants are.

    tests/e2e/test_resume.py does so with `train`, whose starts and saves take longer.
    """
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    chains = kill.trials(tmp_path / "trials", instants=4, seed=4, commands=("cache-logits", "tokenize"))
    instants = [instant for chain in chains for instant in chain]
    assert len(instants) == 4
    assert [fault for instant in instants for fault in instant.faults] == []
    assert all(instant.is_identical for instant in instants)
