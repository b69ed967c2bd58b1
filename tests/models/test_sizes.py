import json
import math
from collections import Counter

import jax
import pytest

from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build, config
from t5g2.models.sizes import SIZES, size

# embedding, eoi vector, encoder, decoder: the released files, and HF-published totals less vision (416 866 032) and
# projector: 786 029 296, 2 115 977 456 and 7 508 928 880 for T5Gemma 2
EXPECTED = {
    "gemma3:270m": (167_772_160, 0, 0, 100_326_016),
    "gemma3:1b": (301_989_888, 0, 0, 697_896_064),
    "gemma3:4b": (671_252_480, 0, 0, 3_209_010_688),
    "gemma3:12b": (1_006_878_720, 0, 0, 10_759_155_456),
    "gemma3:27b": (1_409_630_208, 0, 0, 25_599_716_096),
    "t5gemma2:270m-270m": (167_772_160, 640, 100_326_016, 100_326_016),
    "t5gemma2:1b-1b": (301_989_888, 1152, 697_896_064, 697_896_064),
    "t5gemma2:4b-4b": (671_088_640, 2560, 3_209_010_688, 3_209_010_688),
}
PUBLISHED_TEXT_TOTALS = {
    "gemma3:270m": 268_098_176,
    "gemma3:1b": 999_885_952,
    "gemma3:4b": 4_300_079_472 - 416_866_032 - 2_950_272,
    "gemma3:27b": 27_432_406_640 - 416_866_032 - 6_194_304,
    "t5gemma2:270m-270m": 786_029_296 - 416_866_032 - 738_432,
    "t5gemma2:1b-1b": 2_115_977_456 - 416_866_032 - 1_328_256,
    "t5gemma2:4b-4b": 7_508_928_880 - 416_866_032 - 2_950_272,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_by_component(name):
    abstract = build.abstract(size(name))
    counted = Counter()
    for path, leaf in zip(jax.tree.leaves(tree.paths(abstract)), jax.tree.leaves(abstract), strict=True):
        part = path if path.startswith("embedder") else "encoder" if path.startswith("encoder.") else "decoder"
        counted[part] += math.prod(leaf.shape)
    parts = ("embedder.table", "embedder.eoi", "encoder", "decoder")
    assert tuple(counted[part] for part in parts) == EXPECTED[name]
    if name in PUBLISHED_TEXT_TOTALS:
        assert sum(counted.values()) == PUBLISHED_TEXT_TOTALS[name]


@pytest.mark.parametrize("name", SIZES)
def test_config_survives_json(name):
    data = json.loads(json.dumps(config.to_dict(size(name))))
    assert config.from_dict(data) == size(name)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown size 't5gemma2:1b'; did you mean 't5gemma2:1b-1b'"):
        size("t5gemma2:1b")


def test_the_layers_of_a_pattern_that_does_not_fit():
    kinds = [size("gemma3:1b").kind(layer) for layer in range(26)]
    assert [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]
