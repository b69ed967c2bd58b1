"""Slices of TPUs: those that there are, and the links in them."""

import pytest

from t5g2.core.errors import UserError
from t5g2.core.tpu_chips import CHIPS, target


@pytest.mark.parametrize(
    ("text", "chips"), [("v5p:2x2x1", 4), ("v5p:4x4x8", 128), ("v5e:4x4", 16), ("v6e:1x1", 1), ("tpu7x:2x2x2", 8)]
)
def test_targets(text, chips):
    assert (str(target(text)), target(text).chips) == (text, chips)


@pytest.mark.parametrize(
    ("name", "hbm_gib", "ghz", "link_gb_per_s", "network_gb_per_s", "devices"),
    [
        ("v4", 32, 1.05, 45, 6.25, 1),
        ("v5e", 16, 1.5, 45, 3.125, 1),
        ("v5p", 95, 1.75, 90, 6.25, 1),
        ("v6e", 32, 1.53, 90, 12.5, 1),
        ("tpu7x", 192, 2.2, 90, 12.5, 2),
    ],
)
def test_the_figures_of_a_chip_are_those_that_are_published(
    name, hbm_gib, ghz, link_gb_per_s, network_gb_per_s, devices
):
    """But for the clocks of v6e and tpu7x, which are fitted."""
    chip = CHIPS[name]
    assert (chip.hbm_gib, chip.cycles_per_s, chip.devices) == (hbm_gib, ghz * 1e9, devices)
    assert (chip.link_bytes_per_s, chip.network_bytes_per_s) == (link_gb_per_s * 1e9, network_gb_per_s * 1e9)


def test_several_slices():
    slices = target("v5p:2x2x1")._replace(slices=3)
    assert (str(slices), slices.topology, slices.chips) == ("3 slices of v5p:2x2x1", "v5p:2x2x1", 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:2x2", "unknown chip 'v5' in --target=v5:2x2; did you mean 'v5p' or 'v5e' or 'v4'"),
        (
            "v5p:3x3x3",
            r"v5p has no slice of 27 chips with these sides; the nearest are v5p:2x4x4, v5p:2x2x4, v5p:4x4x4",
        ),
        ("v5e:2x2x1", r"v5e has no slice of 4 chips with these sides; the nearest are v5e:2x2, "),
        (
            "v5p:4x2x2",
            r"v5p has no slice of 16 chips with these sides; the nearest are v5p:2x2x4, .* smaller sides first",
        ),
        ("v5p", r"--target=v5p: v5p has slices that are named by their sides; the nearest are v5p:2x2x1"),
        ("v5p:", r"v5p has slices that are named by their sides"),
        ("v5p:axb", r"v5p has slices that are named by their sides"),
        (f"v5p:{'9' * 330}", r"9: v5p has slices that are named by their sides; the nearest are v5p:2x2x1"),
        (f"v5e:2x{'9' * 5000}", r"9: v5e has slices that are named by their sides"),
        ("v5e:²x2", r"v5e has slices that are named by their sides"),
        ("v5e:999999999x999999999", r"no slice of 999,999,998,000,000,001 chips .*; the nearest are v5e:16x16, "),
        ("v5p:0x0x0", r"v5p has no slice of 0 chips with these sides"),
    ],
)
def test_a_slice_that_does_not_exist_names_the_nearest(text, message):
    with pytest.raises(UserError, match=message):
        target(text)


def test_no_slice_is_larger_than_the_largest():
    for chip in CHIPS.values():
        sizes = [target(f"{chip.name}:{topology}").chips for topology in chip.topologies]
        assert max(sizes) <= chip.most
        assert len(set(chip.topologies)) == len(sizes)


@pytest.mark.parametrize(
    ("name", "span", "sides", "links"),
    [
        ("v5p", (2, 2, 1), (2, 2, 1), 2),  # one neighbour along each of two axes
        ("v5p", (4, 4, 4), (4, 4, 4), 6),  # rings: two along each
        ("v5p", (1, 1, 4), (4, 4, 4), 2),
        ("v5p", (1, 1, 4), (4, 4, 8), 1),  # half of a ring is a line
        ("v5e", (4, 4), (4, 4), 2),  # no ring below 16
        ("v5e", (1, 16), (16, 16), 2),
        ("v5e", (1, 1), (4, 4), 0),
    ],
)
def test_links(name, span, sides, links):
    assert CHIPS[name].links(span, sides) == links
