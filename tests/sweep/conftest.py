"""Sweeps whose configs do not exist, and the clients of clusters."""

import pytest

from t5g2.sweep import Variant
from tests.played_clients import PlayedClients


@pytest.fixture
def no_real_configs(monkeypatch):
    """Takes what a variant is from its command line; its config need not exist."""
    monkeypatch.setattr(Variant, "resolved", lambda self, folder: self.arguments(folder))


@pytest.fixture
def clients(tmp_path, monkeypatch):
    return PlayedClients(tmp_path / "clients", monkeypatch)
