"""Blocks of attention that a mask does not hide as a whole."""

from dataclasses import replace

import numpy as np
import pytest

from t5g2.jobs.kernel_blocks import site_of, visible_pairs
from t5g2.models import masks
from t5g2.models.backends.site import Site
from t5g2.models.masks import ALL

OWN = Site(2, 16, (16,), (ALL,), 0, heads=4, head_size=8, softcap=False, blocks=False, dtype="bfloat16")


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        (ALL, 16),
        (masks.causal(), 10),  # 1 + 2 + 3 + 4 of 4 x 4
        (masks.causal(5), 7),  # its own, and the one before: 4 keys back
        (masks.causal(6), 7 + 2),  # 5 keys back reach into the one before that
        (masks.bidirectional(8), 10),  # neighbours on both sides
    ],
)
def test_blocks_of_a_mask(mask, blocks):
    assert visible_pairs(replace(OWN, masks=(mask,)), 4, 4) == blocks * 16


def test_keys_of_another_source_come_first_and_are_all_visible():
    """Two blocks of the encoder's, for each of four blocks of queries."""
    merged = replace(OWN, keys=(8, 16), masks=(ALL, masks.causal()), own=1)
    assert visible_pairs(merged, 4, 4) == (4 * 2 + 10) * 16
    cross = replace(OWN, keys=(8,), masks=(ALL,), own=None)
    assert visible_pairs(cross, 4, 4) == 4 * 2 * 16


@pytest.mark.parametrize("mask", [ALL, masks.causal(), masks.causal(7), masks.bidirectional(9), masks.causal(1)])
@pytest.mark.parametrize(("q_block", "k_block"), [(4, 4), (2, 8), (8, 2)])
def test_blocks_are_those_with_a_visible_pair(mask, q_block, k_block):
    q_T1, k_1S = np.arange(16)[:, None], np.arange(16)[None, :]
    visible = np.ones((16, 16), bool)
    if mask.causal:
        visible &= k_1S <= q_T1
    if mask.left is not None:
        visible &= k_1S >= q_T1 - mask.left
    if mask.right is not None:
        visible &= k_1S <= q_T1 + mask.right
    tiles = visible.reshape(16 // q_block, q_block, 16 // k_block, k_block).any(axis=(1, 3))
    assert visible_pairs(replace(OWN, masks=(mask,)), q_block, k_block) == tiles.sum() * q_block * k_block


def test_the_site_of_a_scope():
    sites = {"encoder.local": OWN, "decoder.global": replace(OWN, heads=1), "decoder.cross": replace(OWN, heads=2)}
    assert site_of("encoder.local.attention", sites) == OWN
    assert site_of("decoder.global.merged", sites) == sites["decoder.global"]
    assert site_of("decoder.local.cross", sites) == sites["decoder.cross"]
    assert site_of("decoder.local.attention", sites) is None
    assert site_of("", sites) is None
