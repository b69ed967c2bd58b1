"""The data of a run that goes on: the same positions, each source's own count, or a refusal."""

import dataclasses
import json
import logging

import pytest

from t5g2.checkpoint.train_states import SavedStep
from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.continuation import StreamPositions
from t5g2.data.corpus import open_corpus
from t5g2.data.pipeline import Pipeline
from t5g2.train.data_resume import SavedData, resumed_positions
from t5g2.train.experiment import TABLES
from tests.data import corpus


@pytest.fixture(autouse=True)
def at_info(caplog):
    caplog.set_level(logging.INFO, "t5g2")


def saved_run(config, *, batches=7, seed=0, former_version=False):
    """The data's part of a checkpoint after some batches, and the examples that were trained on."""
    with Pipeline(config, seed=seed) as pipeline:
        ids = [int(i) for _ in range(batches) for i in pipeline.next().example_ids.ravel() if i >= 0]
        positions = StreamPositions(pipeline.positions, pipeline.continuations).to_plain()
        opened = pipeline.corpus
    plain = json.loads(json.dumps(settings.dump(config, tables=TABLES)))
    chunks = None if former_version else [opened.chunks_fingerprint(i) for i in range(len(config.sources))]
    return SavedData(batches, positions, opened.fingerprint, seed, plain, chunks), set(ids)


def resumed(saved, config, *, seed=0, allow=()):
    return resumed_positions(saved, open_corpus(config), seed=seed, allow_change=allow)


def weighted(config, *weights):
    sources = [dataclasses.replace(s, weight=w) for s, w in zip(config.sources, weights, strict=True)]
    return dataclasses.replace(config, sources=tuple(sources))


@pytest.mark.parametrize("former_version", [False, True])
def test_the_same_settings_have_the_same_positions(tmp_path, former_version):
    config = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, _ = saved_run(config, former_version=former_version)
    for same in (config, dataclasses.replace(config, rows=4, prefetch=5, max_skipped=0.5)):
        assert resumed(saved, same) is saved.positions
    assert resumed(saved._replace(settings=None), config) is saved.positions


@pytest.mark.parametrize("former_version", [False, True])
def test_other_weights_lose_and_repeat_nothing_and_say_so(tmp_path, caplog, former_version):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    after = weighted(before, 1, 3)
    saved, trained = saved_run(before, former_version=former_version)
    positions = resumed(saved, after)
    assert "0 examples are lost, 0 are repeated; the " in caplog.text
    first = StreamPositions.from_plain(positions, streams=4).first()
    assert f"from its own count (many at {first[0]}, few at {first[1]})" in caplog.text
    assert 2 < first[0] / first[1] < 4.5
    with Pipeline(after, seed=0, positions=positions) as pipeline:
        again = {int(i) for _ in range(40) for i in pipeline.next().example_ids.ravel() if i >= 0}
    assert not trained & again
    for source in (0, 1):
        numbers = {i // 2 for i in trained | again if i % 2 == source}
        assert len(set(range(max(numbers))) - numbers) < 100


@pytest.mark.parametrize("former_version", [False, True])
def test_a_source_more_needs_no_leave_for_the_text_of_the_others(tmp_path, caplog, former_version):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    new = dataclasses.replace(before.sources[1], name="new", text=corpus.write_texts(tmp_path, "new", 9))
    after = dataclasses.replace(before, sources=(new, *before.sources))
    saved, _ = saved_run(before, former_version=former_version)
    positions = StreamPositions.from_plain(resumed(saved, after), streams=4)
    assert [following[0] for _, following in positions.continuations.values()] == [0, 1, 2, 3]
    assert "0 examples are lost, 0 are repeated" in caplog.text
    # a source that got another name is known by its text
    if not former_version:
        renamed = dataclasses.replace(before.sources[0], name="all")
        resumed(saved, dataclasses.replace(before, sources=(renamed, before.sources[1])))


def test_another_text_is_refused_or_goes_on_on_purpose(tmp_path, caplog):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, _ = saved_run(before)
    corpus.write_texts(tmp_path, "few", 6, seed=1)
    with pytest.raises(UserError, match=r"tokens of source few have changed since step 7 .*=data\.corpus"):
        resumed(saved, before)
    assert resumed(saved, before, allow=["data.corpus"]) is saved.positions
    # the weights too: the open rows cannot be made again, so their examples come again, and the log has how many rows
    resumed(saved, weighted(before, 1, 3), allow=["data.corpus"])
    rows = sum(position[1] for position in saved.positions.values())
    assert f"those of {rows} rows are repeated, because their text is not what it was" in caplog.text


def test_other_chunks_need_no_leave_besides_that_for_their_length(tmp_path, caplog):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, trained = saved_run(before)
    after = dataclasses.replace(before, chunk_tokens=32)
    assert resumed(saved, after) is saved.positions
    assert "has changed since step 7 was saved" in caplog.text
    count = sum(example % 2 == 1 for example in trained)
    assert f"the chunks of source few have changed: the text of up to {count} examples that were trained" in caplog.text
    after = weighted(after, 1, 1)
    assert resumed(saved, after) != saved.positions
    assert "0 are repeated" in caplog.text  # the former chunks were made once more, to see what was in the open rows


def test_another_seed_says_how_much_of_the_epoch_is_repeated(tmp_path, caplog):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, trained = saved_run(before, batches=3)
    assert resumed(saved, before, seed=1) is saved.positions
    chunks = [len(chunks) for chunks in open_corpus(before).chunks]
    for source, name in enumerate(before.names):
        count = sum(example % 2 == source for example in trained)
        expected = round(count * (1 - count / chunks[source]))
        assert expected
        line = f"train.seed has changed: about {expected} of the {chunks[source]} chunks of source {name} come twice"
        assert line in caplog.text


def test_weights_that_an_earlier_version_shuffled_go_on_spread(tmp_path, monkeypatch):
    """Periods are shuffled up to a length; earlier versions shuffled all of them."""
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, trained = saved_run(before, former_version=True)
    monkeypatch.setattr("t5g2.data.mixture.BLOCK_DRAWS", 3)
    positions = resumed(saved, before)
    with Pipeline(before, seed=0, positions=positions) as pipeline:
        again = {int(i) for _ in range(20) for i in pipeline.next().example_ids.ravel() if i >= 0}
    assert not trained & again


def test_settings_that_cannot_be_read_any_more(tmp_path):
    config = corpus.mixed(tmp_path, rows=2, streams=4)
    saved, _ = saved_run(config)
    damaged = saved._replace(settings={**saved.settings, "packing": "tightest"})
    with pytest.raises(UserError, match=r"data settings of step 7 cannot be used any more .* init\.params"):
        resumed(damaged, config)


def test_the_settings_are_those_of_the_step_and_in_earlier_versions_those_of_the_run(tmp_path):
    """A run may have begun again with other settings and stopped before its first checkpoint."""
    (tmp_path / "experiment.json").write_text('{"data": {"rows": 8}}')
    meta = {"corpus": "c", "seed": 3}
    former = SavedStep(7, None, None, {"0": [0, 0, 0]}, meta)
    assert SavedData.of(former, tmp_path).settings == {"rows": 8}
    assert SavedData.of(former, tmp_path / "nowhere").settings is None
    now = former._replace(meta=meta | {"settings": {"data": {"rows": 4}}, "chunks": ["x"]})
    assert SavedData.of(now, tmp_path) == SavedData(7, {"0": [0, 0, 0]}, "c", 3, {"rows": 4}, ["x"])
