"""The drawings in the docstrings of t5g2.models.masks are what the reference backend computes."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from t5g2.core.batch import Sequences
from t5g2.models import masks
from t5g2.models.backends.reference import visible
from t5g2.models.config import EncoderWindow
from t5g2.models.masks import ALL, bidirectional, causal, each_side
from tests.tiny import GEMMA3, GEMMA3_IMAGES, T5GEMMA, T5GEMMA2


def drawn(text: str, title: str) -> list[str]:
    """The rows drawn under a title, from its column on, without spaces."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if title in line)
    column = lines[at].index(title)
    rows = []
    for line in lines[at + 1 :]:
        cell = line[column:].split("   ")[0].replace(" ", "")
        if not cell or set(cell) - set("01|.23456789"):
            break
        rows.append(cell)
    assert rows, title
    return rows


def matrix(mask_BTS, row: int = 0) -> list[str]:
    return ["".join("01"[int(see)] for see in line) for line in np.asarray(mask_BTS)[row]]


def tokens(segments, positions=None, blocks=None) -> Sequences:
    segments = np.atleast_2d(np.array(segments, np.int32))
    positions = np.arange(segments.shape[1]) if positions is None else positions
    positions = np.broadcast_to(np.array(positions, np.int32), segments.shape)
    blocks = None if blocks is None else np.atleast_2d(np.array(blocks, np.int32))
    return Sequences(np.zeros_like(segments), segments, positions, blocks)


@pytest.mark.parametrize(
    ("function", "title", "mask"),
    [
        (causal, "causal()", causal()),
        (causal, "causal(window=3)", causal(window=3)),
        (bidirectional, "bidirectional(window=3)", bidirectional(window=3)),
        (bidirectional, "bidirectional(window=4)", bidirectional(window=4)),
        (each_side, "each_side(1)", each_side(1)),
    ],
)
def test_one_example(function, title, mask):
    five = tokens([1] * 5)
    assert matrix(visible(five, five, mask)) == drawn(function.__doc__, title)


@pytest.mark.parametrize(("title", "mask"), [("causal()", causal()), ("causal(window=2)", causal(window=2))])
def test_blocks_lift_causality_but_not_the_window(title, mask):
    five = tokens([1] * 5, blocks=[0, 1, 1, 1, 0])
    text = causal.__doc__[causal.__doc__.index("Block ids") : causal.__doc__.index("`ahead` bounds")]
    assert matrix(visible(five, five, mask)) == drawn(text, title)


@pytest.mark.parametrize("ahead", [None, 1])
def test_a_window_may_bound_a_block_ahead_too(ahead):
    five = tokens([1] * 5, blocks=[0, 1, 1, 1, 0])
    assert matrix(visible(five, five, causal(2, ahead=ahead))) == drawn(causal.__doc__, f"ahead={ahead}")


def test_blocks_of_two_examples_are_two():
    two = tokens([1, 1, 2, 2], positions=[0, 1, 0, 1], blocks=[1, 1, 1, 1])
    assert matrix(visible(two, two, causal())) == ["1100", "1100", "0011", "0011"]


def test_packed_examples_do_not_see_each_other_or_padding():
    packed = tokens([1, 1, 1, 2, 2, 0], positions=[0, 1, 2, 0, 1, 0])
    assert matrix(visible(packed, packed, causal())) == drawn(masks.__doc__, "packed: causal()")


def test_merged_attention_sees_its_window_and_all_of_its_own_encoder():
    decoder = tokens([1, 1, 1, 2, 2, 0], positions=[0, 1, 2, 0, 1, 0])
    encoder = tokens([1, 1, 2, 2, 2, 0], positions=[0, 1, 0, 1, 2, 0])
    own, of_encoder = matrix(visible(decoder, decoder, causal(window=2))), matrix(visible(decoder, encoder, ALL))
    both = [f"{a}|{b}" for a, b in zip(own, of_encoder, strict=True)]
    assert both == drawn(masks.__doc__, "merged: causal(window=2) | ALL")


@pytest.mark.parametrize("side", ["padded left", "padded right"])
def test_decoding_rows_of_unequal_lengths(side):
    slots = drawn(masks.__doc__, f"{side}: positions")
    positions = [[0 if slot == "." else int(slot) for slot in row] for row in slots]
    cache = tokens([[int(slot != ".") for slot in row] for row in slots], positions)
    new = tokens([[1], [1]], [[6], [4]])
    see = visible(new, cache, causal(window=3))
    assert matrix(see, 0) + matrix(see, 1) == drawn(masks.__doc__, f"{side}: causal(3)")


def test_the_masks_of_each_kind_of_layer():
    assert masks.decoder(GEMMA3, "local") == causal(window=4)
    assert masks.decoder(GEMMA3, "global") == causal()
    assert masks.decoder(GEMMA3_IMAGES, "local") == causal(window=4, ahead=3)
    assert masks.encoder(T5GEMMA2, "local") == bidirectional(window=4)
    assert masks.encoder(T5GEMMA2, "global") == masks.encoder(T5GEMMA, "global") == ALL
    assert masks.encoder(T5GEMMA, "local") == each_side(2)  # window 3
    assert masks.encoder(replace(T5GEMMA, encoder_window="each_side_inclusive"), "local") == each_side(3)
    for config in (T5GEMMA, T5GEMMA2):
        alone = replace(config, encoder_attention="causal")
        assert masks.encoder(alone, "local") == causal(window=config.encoder.window)
        assert masks.encoder(alone, "global") == causal()


@pytest.mark.parametrize("encoder_window", get_args(EncoderWindow))
def test_a_causal_encoder_of_packed_rows(encoder_window):
    """Window 3, two examples and padding; what the window means both ways does not matter."""
    config = replace(T5GEMMA, encoder_window=encoder_window, encoder_attention="causal")
    packed = tokens([1, 1, 1, 1, 2, 2, 0], positions=[0, 1, 2, 3, 0, 1, 0])
    assert matrix(visible(packed, packed, masks.encoder(config, "local"))) == [
        "1000000",
        "1100000",
        "1110000",
        "0111000",
        "0000100",
        "0000110",
        "0000000",
    ]
    assert matrix(visible(packed, packed, masks.encoder(config, "global"))) == [
        "1000000",
        "1100000",
        "1110000",
        "1111000",
        "0000100",
        "0000110",
        "0000000",
    ]


@pytest.mark.parametrize(
    ("window", "back", "ahead"), [(512, 255, 256), (1024, 511, 512), (5, 2, 2), (4, 1, 2), (1, 0, 0)]
)
def test_an_even_window_of_the_encoder_reaches_one_further_forward(window, back, ahead):
    mask = bidirectional(window)
    assert (mask.left, mask.right) == (back, ahead)
    assert back + 1 + ahead == window
