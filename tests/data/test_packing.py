"""The packer: the drawn rows, grain's first fit as the reference, every example in one row, positions that go on."""

import dataclasses
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5g2.core.seeds import derive_seed
from t5g2.data.corpus import open_corpus
from t5g2.data.examples import source_examples
from t5g2.data.packed_rows import NO_EXAMPLE, Feature
from t5g2.data.packing import START, PackedRows, Packer
from tests.data import corpus

LAYOUT = {
    "encoder": Feature(8),
    "decoder": Feature(8),
    "weights": Feature(8, dtype=np.float32, aligned_with="decoder"),
    "ids": Feature(4, (2,), np.int64, NO_EXAMPLE),
}


def example(number: int, encoder: int, decoder: int) -> dict[str, np.ndarray]:
    """Tokens that tell the example and the place."""
    return {
        "encoder": 100 * number + np.arange(encoder, dtype=np.int32),
        "decoder": 100 * number + 50 + np.arange(decoder, dtype=np.int32),
        "weights": np.full(decoder, number, np.float32),
        "ids": np.array([[number, 0]], np.int64),
    }


def examples(lengths) -> list[dict[str, np.ndarray]]:
    return [example(number, *pair) for number, pair in enumerate(lengths, start=1)]


def packed(given, *, rule: Any = "first_fit", rows=3, seed=0, position=START, layout=LAYOUT) -> PackedRows:
    return PackedRows(given, layout, rows=rows, policy=rule, seed=seed, position=position)


DRAWN = [(6, 2), (2, 2), (2, 6)]


@pytest.mark.parametrize(
    ("rule", "first", "second"), [("first_fit", [1, 2], [3]), ("best_fit", [1, 3], [2]), ("none", [1], None)]
)
def test_the_drawn_rows(rule: Any, first, second):
    layout = LAYOUT | {"ids": dataclasses.replace(LAYOUT["ids"], length=1)} if rule == "none" else LAYOUT
    packer = Packer(layout, 1 if rule == "none" else 2, policy=rule)
    fits = [packer.add(e) for e in examples(DRAWN)]
    assert fits == [True, rule != "none", rule != "none"]
    found = [row[row >= 0].tolist() for row in packer.finish()["ids"][..., 0]]
    assert found == [first] + ([second] if second else [])


def test_a_row_is_what_core_batch_draws():
    packer = Packer(LAYOUT, 2, policy="first_fit")
    for made in examples([(3, 4), (2, 2)]):
        assert packer.add(made)
    rows = packer.finish()
    for name, expected in {
        "encoder": [100, 101, 102, 200, 201, 0, 0, 0],
        "encoder_segment_ids": [1, 1, 1, 2, 2, 0, 0, 0],
        "encoder_positions": [0, 1, 2, 0, 1, 0, 0, 0],
        "decoder": [150, 151, 152, 153, 250, 251, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 2, 2, 0, 0],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 0, 0],
        "weights": [1, 1, 1, 1, 2, 2, 0, 0],
        "ids": [[1, 0], [2, 0], [-1, -1], [-1, -1]],
    }.items():
        assert rows[name].tolist() == [expected]
    assert {rows[name].dtype for name in ("encoder", "encoder_segment_ids", "encoder_positions")} == {np.dtype("int32")}
    assert rows["weights"].dtype == np.float32
    assert len(packer.finish()["decoder"]) == 0  # and the set is empty again


pairs = st.tuples(st.integers(0, 8), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(pairs, min_size=1, max_size=40), rows=st.integers(1, 5), shuffled=st.booleans())
def test_first_fit_is_grains(lengths, rows, shuffled):
    """Row by row and bit by bit, in the order that grain shuffles them in too."""
    given = examples(lengths)
    source = grain.MapDataset.source(given).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    reference = grain.experimental.FirstFitPackIterDataset(
        source,
        length_struct={name: feature.length for name, feature in LAYOUT.items()},
        padding_struct={name: feature.padding for name, feature in LAYOUT.items()},
        meta_features=("weights", "ids"),
        num_packing_bins=rows,
        max_sequences_per_bin=4,
        shuffle_bins=shuffled,
        seed=7,
    )
    theirs = iter(reference)
    ours = packed(given, rows=rows, seed=7) if shuffled else unshuffled(given, rows=rows)
    for row in ours:
        expected = next(theirs)
        assert row.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(row[name], array)
            assert row[name].dtype == array.dtype
    with pytest.raises(StopIteration):
        next(theirs)


def unshuffled(given, *, rows):
    """The rows in the order that they were filled in."""
    packer, left = Packer(LAYOUT, rows, policy="first_fit"), list(given)
    while left:
        while left and packer.add(left[0]):
            left.pop(0)
        made = packer.finish()
        yield from ({name: array[i] for name, array in made.items()} for i in range(len(made["decoder"])))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(pairs, min_size=1, max_size=40),
    rows=st.integers(1, 5),
    rule=st.sampled_from(["first_fit", "best_fit", "none"]),
    seed=st.integers(0, 3),
)
def test_every_example_is_in_one_row_and_whole(lengths, rows, rule, seed):
    given = examples(lengths)
    layout = LAYOUT | {"ids": dataclasses.replace(LAYOUT["ids"], length=1)} if rule == "none" else LAYOUT
    seen = []
    for row in packed(given, rule=rule, rows=rows, seed=seed, layout=layout):
        numbers = row["ids"][row["ids"][:, 0] >= 0, 0].tolist()
        seen += numbers
        for segment, number in enumerate(numbers, start=1):
            for side in ("encoder", "decoder"):
                here = row[f"{side}_segment_ids"] == segment
                np.testing.assert_array_equal(row[side][here], given[number - 1][side])
                np.testing.assert_array_equal(row[f"{side}_positions"][here], np.arange(here.sum()))
            np.testing.assert_array_equal(row["weights"][row["decoder_segment_ids"] == segment], number)
        assert max(row["decoder_segment_ids"]) == len(numbers) >= 1
        assert not np.any(row["weights"][row["decoder_segment_ids"] == 0])
    assert sorted(seen) == list(range(1, len(lengths) + 1))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(pairs, min_size=1, max_size=30),
    rows=st.integers(1, 4),
    rule=st.sampled_from(["first_fit", "best_fit"]),
)
def test_from_any_position_the_rest_follows(lengths, rows, rule):
    given = examples(lengths)
    reader, positions, whole = packed(given, rule=rule, rows=rows), [START], []
    for row in reader:
        whole.append(row)
        positions.append(reader.position)
    for at, position in enumerate(positions):
        rest = list(packed(given, rule=rule, rows=rows, position=position))
        assert len(rest) == len(whole) - at
        for a, b in zip(rest, whole[at:], strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


class Counted(list):
    """Examples that say which of them were asked for."""

    def __init__(self, given):
        super().__init__(given)
        self.asked: list[int] = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def test_a_start_reads_one_set_of_rows_and_no_more():
    given = Counted(examples([(3, 3)] * 200))  # two a row, six a set of three rows
    reader = packed(given)
    for _ in range(40):
        next(reader)
    assert given.asked == list(range(len(given.asked)))  # each once, in order
    drawn, given_out, count = reader.position
    assert (drawn, given_out, count) == (78, 1, 40)
    given.asked.clear()
    next(packed(given, position=reader.position))
    assert given.asked == list(range(78, 78 + 6 + 2))  # a set, and a row's share of the next


def test_sets_are_drawn_row_by_row():
    """No row waits for a whole set: the next one is drawn in equal parts."""
    given = Counted(examples([(3, 3)] * 200))
    reader = packed(given)
    next(reader)
    asked = []
    for _ in range(30):
        before = len(given.asked)
        next(reader)
        asked.append(len(given.asked) - before)
    assert set(asked[3:]) == {2}


def test_best_fit_with_one_side_leaves_the_least_room():
    layout = LAYOUT | {"encoder": Feature(0)}
    packer = Packer(layout, 2, policy="best_fit")
    for made in examples([(0, 5), (0, 6), (0, 2)]):
        assert packer.add(made)
    assert packer.finish()["ids"][:, :2, 0].tolist() == [[1, -1], [2, 3]]


def test_what_is_no_example_is_told():
    packer = Packer(LAYOUT, 1, policy="first_fit")
    with pytest.raises(ValueError, match="an example has 9 of 'encoder', and a row holds 8"):
        packer.add(example(1, 9, 1))
    assert packer.add(example(1, 1, 2) | {"weights": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="different numbers of 'weights' and of 'decoder'"):
        packer.finish()


def test_the_order_of_examples_is_that_of_grains_shuffle(tmp_path):
    config = corpus.mixed(tmp_path, rows=2, streams=4)
    opened = open_corpus(config)
    for source, chunks in enumerate(opened.chunks):
        shuffled = grain.MapDataset.source(range(len(chunks))).shuffle(seed=derive_seed(5, "shuffle", source)).repeat(3)
        examples: Any = source_examples(opened, source, seed=5, epochs=3)
        assert len(examples) == len(shuffled) == 3 * len(chunks)
        examples._build = lambda k, chunk: chunk.index
        assert [examples[k] for k in range(len(examples))] == list(shuffled)
