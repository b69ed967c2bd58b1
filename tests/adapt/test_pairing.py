"""Pairs of sources and targets: the derived architectures, and the messages for those that do not fit."""

from dataclasses import replace

import pytest

from t5g2.adapt.options import AdaptOptions
from t5g2.adapt.pairing import SourceModels, derive_config, pair
from t5g2.core.errors import UserError
from t5g2.models.config import EncoderDecoderConfig, Rope
from t5g2.models.sizes import size
from tests import tiny
from tests.adapt import recipes
from tests.adapt.recipes import source, tower


def one(config):
    made = source(config)
    return SourceModels(made, made)


class Abstract:
    """A released size as a source without weights: pairing never reads one."""

    @staticmethod
    def of(*names, vision=None):
        from t5g2.adapt.pairing import SourceModel

        made = [SourceModel(size(name), {}, name) for name in names]
        extra = None if vision is None else SourceModel(size(vision).vision, {}, vision)
        return SourceModels(made[0], made[-1], extra)


def test_derived_architectures():
    config = derive_config(one(tiny.GEMMA3), "t5gemma2", AdaptOptions(), end_of_image=7)
    assert config == EncoderDecoderConfig(encoder=tiny.GEMMA3, decoder=tiny.GEMMA3, eoi_id=7)
    assert derive_config(one(tiny.GEMMA3), "t5gemma2", AdaptOptions()).eoi_id is None
    separate = {"cross": "separate", "tied_embedding": False, "encoder_window": "each_side"}
    assert derive_config(one(tiny.GEMMA2), "t5gemma", AdaptOptions()) == EncoderDecoderConfig(
        encoder=tiny.GEMMA2, decoder=tiny.GEMMA2, **separate
    )
    cut = derive_config(one(tiny.GEMMA2), "t5gemma", AdaptOptions(encoder_layers="first:2", decoder_layers=(2,)))
    assert (cut.encoder.layers, cut.decoder.layers) == (2, 1)


@pytest.mark.parametrize(
    ("sources", "target"),
    [
        (("gemma3:4b",), "t5gemma2:4b-4b"),
        (("medgemma:4b",), "t5gemma2:4b-4b"),
        (("gemma2:2b",), "t5gemma:2b-2b"),
        (("gemma2:9b", "gemma2:2b"), "t5gemma:9b-2b"),
        (("gemma2:9b",), "t5gemma:9b-9b"),
    ],
)
def test_released_sizes_pair(sources, target):
    pairing = pair(Abstract.of(*sources), size(target))
    derived = derive_config(Abstract.of(*sources), target.split(":")[0], AdaptOptions(), end_of_image=256_000)
    if target == "t5gemma2:4b-4b":
        assert derived == replace(size(target), eoi_id=256_000)
        assert pairing.settings == (
            "encoder.vocab_size: 262208 in the source, 262144 in the target",
            "decoder.vocab_size: 262208 in the source, 262144 in the target",
            "encoder.images.token: 262144 in the source, 256001 in the target",
        )
    else:
        assert derived == size(target)
        assert pairing.settings == ()
    assert pairing.copies_cross_attention == (target != "t5gemma:9b-2b")


def test_the_rope_factor_is_a_setting():
    """Released T5Gemma 2 have 8 where Gemma 3 270M and 1B have 1."""
    target = replace(size("t5gemma2:1b-1b"), encoder=replace(size("t5gemma2:1b-1b").encoder, images=None))
    assert pair(Abstract.of("gemma3:1b"), target).settings == (
        "encoder.rope_global.factor: 1.0 in the source, 8.0 in the target",
        "decoder.rope_global.factor: 1.0 in the source, 8.0 in the target",
    )
    derived = derive_config(Abstract.of("gemma3:1b"), "t5gemma2", AdaptOptions(), end_of_image=256_000)
    assert derived.decoder.rope_global == Rope(1e6, 1.0)


def test_the_towers_of_medsiglip():
    """448 pixels, 1024 patches: into the tower of 896 of the 1B, resampled, or as it is."""
    sources = Abstract.of("gemma3:1b", vision="medsiglip:448")
    assert (
        "encoder.images.vision.image_size: 448 in the source, 896 in the target"
        in pair(sources, size("t5gemma2:1b-1b")).settings
    )
    derived = derive_config(sources, "t5gemma2", AdaptOptions(), end_of_image=256_000)
    assert derived.encoder.images == replace(
        size("t5gemma2:1b-1b").encoder.images, vision=replace(size("medsiglip:448").vision, pool=False)
    )
    with pytest.raises(UserError, match=r"neither gemma3:1b nor its tokenizer has a token that ends an image"):
        derive_config(sources, "t5gemma2", AdaptOptions())


@pytest.mark.parametrize(
    ("sources", "target", "message"),
    [
        (
            one(tiny.T5GEMMA2),
            tiny.T5GEMMA2,
            r"is an encoder-decoder model already; give a decoder-only source: Gemma 2",
        ),
        (one(tiny.SIGLIP), tiny.T5GEMMA2, r"is an image model .SigLIP., which has no language model to adapt"),
        (one(tiny.GEMMA3), tiny.GEMMA3, "the target is decoder-only; give an encoder-decoder one, such as t5gemma2"),
        (one(tiny.GEMMA3), tiny.SIGLIP, "the target is an image model"),
        (one(tiny.GEMMA3), tiny.T5GEMMA, r"the blocks of Gemma 3 .norms on queries .*t5gemma2 with cross=separate"),
        (
            one(tiny.GEMMA2),
            tiny.T5GEMMA2,
            r"the blocks of Gemma 2 .no norms on .*Gemma 2 becomes T5Gemma, .*cross=merged",
        ),
        (
            one(tiny.GEMMA3),
            tiny.T5GEMMA2_IMAGES,
            r"the target reads images, and the source has no image tower; give the folder of one as vision",
        ),
    ],
)
def test_what_cannot_be_paired(sources, target, message):
    with pytest.raises(UserError, match=message):
        pair(sources, target)


def test_both_values_and_what_bridges_them():
    stack = replace(tiny.GEMMA3, width=64, vocab_size=128, layers=5, kv_heads=1, heads=8)
    target = EncoderDecoderConfig(encoder=stack, decoder=replace(tiny.GEMMA3, width=64, vocab_size=128))
    with pytest.raises(UserError) as caught:
        pair(one(tiny.GEMMA3), target)
    family = "choose a target of the source's size; a family, such as t5gemma2, derives it from the source"
    assert str(caught.value).splitlines() == [
        "the source's weights do not fit the target:",
        "  encoder.layers: 3 in the source, of which 3 are taken, and 5 in the target",
        "  encoder.vocab_size: 97 in the source, 128 in the target",
        "  encoder.width: 32 in the source, 64 in the target",
        "  encoder.heads: 4 in the source, 8 in the target",
        "  encoder.kv_heads: 2 in the source, 1 in the target",
        "  decoder.vocab_size: 97 in the source, 128 in the target",
        "  decoder.width: 32 in the source, 64 in the target",
        "encoder_layers chooses the layers to take",
        "vocab_size: vocabulary=resize takes the first rows, or adds some",
        f"width: {family}",
        f"heads: {family}",
        "kv_heads: key/value heads are repeated, so give a multiple of 2",
    ]


def test_choices_that_contradict_the_target():
    merged = derive_config(one(tiny.GEMMA3), "t5gemma2", AdaptOptions())
    with pytest.raises(UserError, match="cross_norms = none, and the target's attention is merged"):
        pair(one(tiny.GEMMA3), merged, AdaptOptions(cross_norms="none"))
    two = SourceModels(source(tiny.GEMMA2), source(recipes.SMALL))
    with pytest.raises(UserError, match="cross_attention = self, and the encoder's width is 32, the decoder's 24"):
        pair(two, derive_config(two, "t5gemma", AdaptOptions()), AdaptOptions(cross_attention="self"))
    with pytest.raises(UserError, match=r"decoder\.layers: 3 in the source, of which 2 are taken, and 3 in the target"):
        pair(one(tiny.GEMMA3), merged, AdaptOptions(decoder_layers="first:2"))
    untied = replace(tiny.GEMMA3, tied_head=False)
    with pytest.raises(
        UserError,
        match=r"(?s)decoder\.tied_head: False in the source, True in the target.*tied_head: the source has a head",
    ):
        pair(one(untied), merged)
    towered = replace(one(tiny.GEMMA3), vision=tower(tiny.SIGLIP))
    with pytest.raises(
        UserError, match=r"the tower's folder gives an image tower, and the target has no encoder\.images"
    ):
        pair(towered, merged)
    narrow = replace(
        tiny.T5GEMMA2_IMAGES,
        encoder=replace(tiny.GEMMA3_IMAGES, images=replace(tiny.IMAGES, vision=replace(tiny.VISION, width=20))),
    )
    with pytest.raises(UserError, match=r"encoder.images.vision.width: 16 in the source, 20 in the target; choose a"):
        pair(replace(towered), narrow)


def test_widths_that_merged_attention_cannot_take():
    two = SourceModels(source(replace(tiny.GEMMA3, width=24)), source(tiny.GEMMA3))
    with pytest.raises(UserError, match="encoder width 24 and decoder width 32 differ: merged attention"):
        derive_config(two, "t5gemma2", AdaptOptions())


def test_families():
    with pytest.raises(UserError, match="t5gemma3"):
        derive_config(one(tiny.GEMMA3), "t5gemma3", AdaptOptions())
    with pytest.raises(UserError, match="has the blocks of Gemma 2"):
        derive_config(one(tiny.GEMMA2), "t5gemma2", AdaptOptions())


@pytest.mark.parametrize(
    ("choice", "count", "layers"),
    [
        ("all", 3, (0, 1, 2)),
        ("first:2", 5, (0, 1)),
        ("last:2", 5, (3, 4)),
        ("last:5", 5, (0, 1, 2, 3, 4)),
        ("every:2", 5, (0, 2, 4)),
        ("every:7", 5, (0,)),
        ("4,0,0", 5, (4, 0, 0)),
        ((1, 3), 5, (1, 3)),
    ],
)
def test_layers(choice, count, layers):
    assert AdaptOptions(encoder_layers=choice).layers("encoder", count) == layers


@pytest.mark.parametrize("choice", ["", "every", "every:0", "first:-1", "some", "0,,1", (), "1.5"])
def test_wrong_layers(choice):
    with pytest.raises(UserError, match=r"encoder_layers = .*; give all, first:N, last:N, every:K, or the source's"):
        AdaptOptions(encoder_layers=choice)


def test_layers_that_there_are_not():
    with pytest.raises(UserError, match="decoder_layers = last:6, and the source has 5 layers; take at most 5"):
        AdaptOptions(decoder_layers="last:6").layers("decoder", 5)
    with pytest.raises(UserError, match="encoder_layers names layer 5, and the source has 5: 0 to 4"):
        AdaptOptions(encoder_layers="0,5").layers("encoder", 5)
