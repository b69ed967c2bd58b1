import json
import math
from collections import Counter
from typing import NamedTuple

import jax
import pytest

from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build, config
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig
from t5g2.models.sizes import SIZES, size

TOWER = 416_866_032  # SigLIP so400m/14 at 896 pixels, without a pooling head


class Parameters(NamedTuple):
    """By component; `embedding` is all tables together, `decoder` of a decoder-only model all its layers."""

    embedding: int
    decoder: int
    encoder: int = 0
    eoi: int = 0
    vision: int = 0
    projector: int = 0
    text: int = 0
    scalars: int = 0


GEMMA3_27B = 25_599_716_096
EXPECTED = {
    "gemma2:2b": Parameters(589_824_000, 2_024_517_888),
    "gemma2:9b": Parameters(917_504_000, 8_324_201_984),
    "gemma2:27b": Parameters(1_179_648_000, 26_047_480_320),
    "gemma3:270m": Parameters(167_772_160, 100_326_016),
    "gemma3:1b": Parameters(301_989_888, 697_896_064),
    "gemma3:4b": Parameters(671_252_480, 3_209_010_688, vision=TOWER, projector=2_950_272),
    "gemma3:12b": Parameters(1_006_878_720, 10_759_155_456, vision=TOWER, projector=4_424_832),
    "gemma3:27b": Parameters(1_409_630_208, GEMMA3_27B, vision=TOWER, projector=6_194_304),
    "medgemma:4b": Parameters(671_252_480, 3_209_010_688, vision=TOWER, projector=2_950_272),
    "medgemma:27b": Parameters(1_409_630_208, GEMMA3_27B, vision=TOWER, projector=6_194_304),
    "medgemma:27b-text": Parameters(1_409_286_144, GEMMA3_27B),
    "t5gemma:s-s": Parameters(2 * 131_072_000, 29_385_216, encoder=20_988_416),
    "t5gemma:b-b": Parameters(2 * 196_608_000, 113_302_272, encoder=84_972_288),
    "t5gemma:l-l": Parameters(2 * 262_144_000, 409_093_120, encoder=308_380_672),
    "t5gemma:ml-ml": Parameters(2 * 294_912_000, 866_632_320, encoder=743_889_024),
    "t5gemma:xl-xl": Parameters(2 * 524_288_000, 1_560_578_048, encoder=1_157_826_560),
    "t5gemma:2b-2b": Parameters(2 * 589_824_000, 2_392_687_872, encoder=2_024_517_888),
    "t5gemma:9b-2b": Parameters(917_504_000 + 589_824_000, 2_460_845_312, encoder=8_324_201_984),
    "t5gemma:9b-9b": Parameters(2 * 917_504_000, 10_174_191_104, encoder=8_324_201_984),
    "t5gemma2:270m-270m": Parameters(167_772_160, 100_326_016, 100_326_016, 640, TOWER, 738_432),
    "t5gemma2:1b-1b": Parameters(301_989_888, 697_896_064, 697_896_064, 1152, TOWER, 1_328_256),
    "t5gemma2:4b-4b": Parameters(671_088_640, 3_209_010_688, 3_209_010_688, 2560, TOWER, 2_950_272),
    "medsiglip:448": Parameters(0, 0, vision=428_565_440, text=449_734_896, scalars=2),
}
# Of the released safetensors files (Hugging Face metadata); keras-hub's presets for medgemma; the model instantiated by
# transformers 5.23.0 for gemma3:12b and medsiglip:448
PUBLISHED_TOTALS = {
    "gemma2:2b": 2_614_341_888,
    "gemma2:9b": 9_241_705_984,
    "gemma2:27b": 27_227_128_320,
    "gemma3:270m": 268_098_176,
    "gemma3:1b": 999_885_952,
    "gemma3:4b": 4_300_079_472,
    "gemma3:12b": 12_187_325_040,
    "gemma3:27b": 27_432_406_640,
    "medgemma:4b": 4_300_079_472,
    "medgemma:27b": 27_432_406_640,
    "medgemma:27b-text": 27_009_002_240,
    "t5gemma:s-s": 312_517_632,
    "t5gemma:b-b": 591_490_560,
    "t5gemma:l-l": 1_241_761_792,
    "t5gemma:ml-ml": 2_200_345_344,
    "t5gemma:xl-xl": 3_766_980_608,
    "t5gemma:2b-2b": 5_596_853_760,
    "t5gemma:9b-2b": 12_292_375_296,
    "t5gemma:9b-9b": 20_333_401_088,
    "t5gemma2:270m-270m": 786_029_296,
    "t5gemma2:1b-1b": 2_115_977_456,
    "t5gemma2:4b-4b": 7_508_928_880,
    "medsiglip:448": 878_300_338,
}


def component(path):
    """The field of Parameters that a leaf counts for."""
    first, *rest = path.split(".")
    if first.endswith("embedder"):
        return "eoi" if rest == ["eoi"] else "embedding"
    if first in ("logit_scale", "logit_bias"):
        return "scalars"
    return "decoder" if first in ("layers", "final_norm") else first


@pytest.mark.parametrize("name", SIZES)
def test_parameters_by_component(name):
    abstract = build.abstract(size(name))
    counted = Counter()
    for path, leaf in zip(jax.tree.leaves(tree.paths(abstract)), jax.tree.leaves(abstract), strict=True):
        counted[component(path)] += math.prod(leaf.shape)
    assert Parameters(**({"embedding": 0, "decoder": 0} | counted)) == EXPECTED[name]
    assert sum(counted.values()) == PUBLISHED_TOTALS[name]


@pytest.mark.parametrize("name", SIZES)
def test_config_survives_json(name):
    data = json.loads(json.dumps(config.to_dict(size(name))))
    assert config.from_dict(data) == size(name)


def stack(name):
    """The stack that the images of a size enter; of a text-only size, any."""
    made = size(name)
    return made.encoder if isinstance(made, EncoderDecoderConfig) else made


def test_which_sizes_read_images():
    reading = {name for name in SIZES if name != "medsiglip:448" and stack(name).images}
    gemma3 = {"gemma3:4b", "gemma3:12b", "gemma3:27b", "medgemma:4b", "medgemma:27b"}
    assert reading == gemma3 | {"t5gemma2:270m-270m", "t5gemma2:1b-1b", "t5gemma2:4b-4b"}


@pytest.mark.parametrize(("name", "token"), [("gemma3:4b", 262_144), ("t5gemma2:4b-4b", 256_001)])
def test_image_tokens(name, token):
    """The released configs' image_token_index, boi_token_index, eoi_token_index and mm_tokens_per_image."""
    images = stack(name).images
    assert (images.token, images.begin, images.end, images.tokens) == (token, 255_999, 256_000, 256)
    assert images.vision.patches == 4096


def test_the_same_size_without_its_tower_is_text_only():
    made = config.text_only(size("t5gemma2:1b-1b"))
    assert made.encoder == made.decoder
    assert config.text_only(size("medgemma:27b-text")) == size("medgemma:27b-text")
    assert config.text_only(size("medgemma:27b")).images is None


def test_a_pair_of_sizes_names_its_encoder_first():
    pair = size("t5gemma:9b-2b")
    assert (pair.encoder.width, pair.decoder.width) == (3584, 2304)


def test_the_dual_encoder_has_a_grid_of_32_by_32_patches():
    made = size("medsiglip:448")
    assert isinstance(made, DualEncoderConfig)
    assert (made.vision.patches, made.text.length, made.text.projection) == (1024, 64, 1152)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown size 't5gemma2:1b'; did you mean 't5gemma2:1b-1b'"):
        size("t5gemma2:1b")


def test_the_layers_of_a_pattern_that_does_not_fit():
    kinds = [size("gemma3:1b").kind(layer) for layer in range(26)]
    assert [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]
