"""Every reader of files, given damaged ones: a value or a UserError; by hand, many more: tests/damaged_inputs.py."""

import logging

import pytest

from tests import damaged_inputs

READERS = damaged_inputs.readers()


@pytest.fixture(autouse=True)
def quiet():
    """Libraries say much about damaged files."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_value_or_a_user_error(name, devices, tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    # Orbax takes a third of a second for each
    inputs = 4 if name.startswith("checkpoint") else 24
    outcomes = damaged_inputs.check(name, READERS[name], tmp_path, inputs=inputs, seed=1)
    assert outcomes.faults == []
    assert outcomes.counts.total() > inputs // 2


def test_the_damages_are_found_where_a_reader_errs(tmp_path):
    """Of three readers that trust what they read, the faults are counted as such."""
    make = damaged_inputs.one_file("a.json", b'{"number": 1, "list": [1, 2, 3]}')

    def traceback(path):
        return json_of(path)["number"] + 1

    def memory(path):
        return len(bytes(2**40 if (path / "a.json").stat().st_size != 32 else 1))

    def silent(path):
        return (path / "a.json").read_bytes()

    def faults(read, **options):
        reader = damaged_inputs.Reader("a.json", make, read, **options)
        folder = tmp_path / read.__name__
        folder.mkdir()
        return damaged_inputs.check("a", reader, folder, inputs=30, seed=0).faults

    assert any("TypeError" in fault for fault in faults(traceback))
    assert any("MemoryError" in fault for fault in faults(memory))
    assert all("another value in spite of a checksum" in fault for fault in faults(silent, has_checksum=True))


def json_of(path):
    return damaged_inputs.files.read_json(path / "a.json", fix="mend it")
