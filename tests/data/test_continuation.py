"""Other settings on resume: every example is trained on exactly once, whatever was changed and wherever it stopped."""

import dataclasses
from collections import Counter

import pytest

from t5g2.core.errors import UserError
from t5g2.data.continuation import StoppedStreams, StreamPositions, continue_streams
from t5g2.data.corpus import open_corpus
from t5g2.data.pipeline import Pipeline
from t5g2.objectives import PrefixLM
from tests.data import corpus

SEED = 3


def read(config, positions, *, batches):
    """Example ids as (source, number) of the next batches, and the positions after them, as a checkpoint has them."""
    with Pipeline(config, seed=SEED, positions=positions) as pipeline:
        rows = [pipeline.next().example_ids for _ in range(batches)]
        after = StreamPositions(pipeline.positions, pipeline.continuations).to_plain()
    ids = [int(i) for batch in rows for i in batch.ravel() if i >= 0]
    return [(i % len(config.sources), i // len(config.sources)) for i in ids], after


def changed(before, positions, after, *, sources=(0, 1), corpus_is_known=True):
    stopped = StoppedStreams(
        before,
        open_corpus(before) if corpus_is_known else None,
        SEED,
        StreamPositions.from_plain(positions, streams=before.streams),
    )
    continued = continue_streams(stopped, streams=after.streams, sources=sources, source_count=len(after.sources))
    return continued, stopped


def weighted(config, *weights):
    sources = [dataclasses.replace(s, weight=w) for s, w in zip(config.sources, weights, strict=True)]
    return dataclasses.replace(config, sources=tuple(sources))


def assert_each_once(trained, open_rows):
    """No example twice; of each source, all below the first number that is missing are trained on.

    At most the examples of the rows that are open may be missing below the highest number.
    """
    assert max(Counter(trained).values()) == 1
    for source in {source for source, _ in trained}:
        numbers = {k for s, k in trained if s == source}
        missing = set(range(max(numbers))) - numbers
        assert len(missing) < open_rows, (source, sorted(missing))


CHANGES = {
    "weights": lambda config: weighted(config, 1, 3),
    "large weights": lambda config: weighted(config, 10_000_000, 5_000_001),
    "more rows at a time": lambda config: dataclasses.replace(config, packing_rows=8),
    "fewer rows at a time": lambda config: dataclasses.replace(config, packing_rows=1),
    "one example a row": lambda config: dataclasses.replace(config, packing="none"),
    "another packing": lambda config: dataclasses.replace(config, packing="best_fit"),
    "longer rows": lambda config: dataclasses.replace(config, encoder_length=160, decoder_length=200),
    "more streams": lambda config: dataclasses.replace(config, streams=8),
    "fewer streams": lambda config: dataclasses.replace(config, streams=2),
    "more rows": lambda config: dataclasses.replace(config, rows=4),
    "objective": lambda config: dataclasses.replace(
        config, sources=(dataclasses.replace(config.sources[0], objective=PrefixLM("uniform")), config.sources[1])
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("stop", [0, 7])
def test_no_example_is_lost_or_repeated(tmp_path, name, stop):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    after = CHANGES[name](before)
    trained, positions = read(before, None, batches=stop)
    continued, stopped = changed(before, positions, after)
    assert continued.lost == stopped.repeated_rows == 0
    # stopped and resumed under the new settings too, within and after the examples that had waited
    positions = continued.streams.to_plain()
    for batches in (1, 2, 30):
        more, positions = read(after, positions, batches=batches)
        trained += more
    assert_each_once(trained, open_rows=200)


def test_a_second_change_before_the_first_one_is_worked_off(tmp_path):
    first = corpus.mixed(tmp_path, rows=2, streams=4)
    second, third = weighted(first, 1, 3), dataclasses.replace(weighted(first, 2, 1), packing="none", streams=2)
    trained, positions = read(first, None, batches=7)
    for old, new, batches in ((first, second, 1), (second, third, 50)):
        positions = changed(old, positions, new)[0].streams.to_plain()
        more, positions = read(new, positions, batches=batches)
        trained += more
    assert_each_once(trained, open_rows=200)


def test_each_source_goes_on_from_its_own_count(tmp_path):
    before = corpus.mixed(tmp_path, rows=4, streams=4)
    after = weighted(before, 1, 3)
    trained, positions = read(before, None, batches=20)
    count = Counter(source for source, _ in trained)
    continued, _ = changed(before, positions, after)
    following = [numbers for _, numbers in continued.streams.continuations.values()]
    for source in (0, 1):
        waiting = sum(s == source for waiting, _ in continued.streams.continuations.values() for s, _ in waiting)
        # stream s is at example s + 4 n after n draws of the source
        assert sum((numbers[source] - s) // 4 for s, numbers in enumerate(following)) == count[source] + waiting
    assert 2.5 < count[0] / count[1] < 3.5
    more = Counter(source for source, _ in read(after, continued.streams.to_plain(), batches=30)[0])
    assert 2.5 < more[1] / more[0] < 3.5


def test_a_source_more_and_a_source_less(tmp_path):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    trained, positions = read(before, None, batches=7)
    new = dataclasses.replace(before.sources[1], name="new", text=corpus.write_texts(tmp_path, "new", 9))
    more = dataclasses.replace(before, sources=(new, *before.sources))
    continued, _ = changed(before, positions, more, sources=(1, 2))
    assert continued.lost == 0
    again, positions = read(more, continued.streams.to_plain(), batches=32)
    assert min(k for source, k in again if source == 0) == 0
    assert_each_once(trained + [(source - 1, k) for source, k in again if source], open_rows=200)
    less = dataclasses.replace(more, sources=more.sources[:2])
    continued, _ = changed(more, positions, less, sources=(0, 1, None))
    assert continued.lost > 0
    last, _ = read(less, continued.streams.to_plain(), batches=10)
    assert not set(again) & set(last)


def test_without_the_former_text_only_the_open_rows_are_repeated(tmp_path):
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    trained, positions = read(before, None, batches=7)
    continued, stopped = changed(before, positions, weighted(before, 1, 3), corpus_is_known=False)
    returned = sum(position[1] for position in positions.values())
    assert stopped.repeated_rows == returned > 0
    again, _ = read(weighted(before, 1, 3), continued.streams.to_plain(), batches=40)
    repeated = set(trained) & set(again)
    assert 0 < len(repeated) <= returned * before.examples_per_row


def test_positions_survive_json_and_damage_is_named(tmp_path):
    positions = StreamPositions({0: (8, 6, 14), 1: (4, 0, 9)}, {})
    assert positions.to_plain() == {"0": [8, 6, 14], "1": [4, 0, 9]}
    assert StreamPositions.from_plain(positions.to_plain(), streams=2) == positions
    before = corpus.mixed(tmp_path, rows=2, streams=4)
    continued, _ = changed(before, read(before, None, batches=7)[1], weighted(before, 1, 3))
    assert StreamPositions.from_plain(continued.streams.to_plain(), streams=4) == continued.streams
    with pytest.raises(
        UserError, match=r"of 2 streams and data\.streams is 4; set it to the number that the run began"
    ):
        StreamPositions.from_plain(positions.to_plain(), streams=4)
    for damaged in ({"0": [1, 2]}, {"0": 3}, {"a": [1, 2, 3]}, {"0": [1, 2, 3, [[1]], [2]]}, {"0": [1, 2, None]}):
        with pytest.raises(UserError, match="positions of the data have another form"):
            StreamPositions.from_plain(damaged, streams=1)
