"""Sources and targets of every recipe, tiny: what the tests of adaptation go through."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp

from t5g2.adapt import pairing as pairings
from t5g2.adapt.apply import adapt
from t5g2.adapt.options import AdaptOptions
from t5g2.adapt.pairing import Pairing, SourceModel, SourceModels
from t5g2.adapt.provenance import Provenance
from t5g2.core import tree
from t5g2.models import build
from t5g2.models.config import ModelConfig, TextConfig, VisionConfig
from tests import tiny, weights

EOI = 7
SMALL = replace(tiny.GEMMA2, width=24, mlp_width=40, heads=2, kv_heads=1, layers=2)


@dataclass(frozen=True)
class Case:
    """One adaptation: sources, a family whose architecture is derived, and what the target has otherwise."""

    source: TextConfig
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    encoder: TextConfig | None = None
    vision: ModelConfig | None = None
    choices: AdaptOptions = AdaptOptions()

    def sources(self) -> SourceModels:
        """With the weights of tests/weights.py."""
        decoder = source(self.source)
        encoder = decoder if self.encoder is None else source(self.encoder)
        return SourceModels(encoder, decoder, None if self.vision is None else tower(self.vision))

    def target(self, sources: SourceModels):
        """The family's architecture, changed."""
        derived = pairings.derive_config(sources, self.family, self.choices, end_of_image=EOI)
        sides = {side: dict(self.changes.get(side, {})) for side in ("encoder", "decoder")}
        whole = {name: value for name, value in self.changes.items() if name not in sides}
        # with both sides, in one go: their sizes may depend on each other
        return replace(derived, **whole, **{side: replace(getattr(derived, side), **of) for side, of in sides.items()})


def source(config: ModelConfig) -> SourceModel:
    """A decoder-only source."""
    return SourceModel(config, tree.leaves(weights.on_host(config)), "the source")


def tower(config: ModelConfig) -> SourceModel:
    """A folder for the sake of its image tower, as train/adaptation.py opens one."""
    vision: VisionConfig = config.vision if not isinstance(config, TextConfig) else config.images.vision
    return SourceModel(vision, tree.leaves(weights.on_host(config)), "the tower's folder")


def run(case: Case, dtype=jnp.float32, seed: int = 0) -> tuple[SourceModels, Any, Provenance]:
    """(the sources, the adapted model, the account)."""
    sources = case.sources()
    return sources, *apply(pairings.pair(sources, case.target(sources), case.choices), dtype, seed)


def apply(pairing: Pairing, dtype=jnp.float32, seed: int = 0, **places: Any) -> tuple[Any, Provenance]:
    """(the adapted model, the account)."""
    abstract = build.abstract(pairing.target, dtype)
    adapted = adapt(pairing, abstract, seed=seed, source="a test")
    return tree.build(abstract, lambda key: adapted.leaves[key].read(), **places), adapted.provenance


IMAGES_GEMMA3 = replace(tiny.GEMMA3_IMAGES, vocab_size=97, images=replace(tiny.IMAGES, token=91, begin=6, end=7))
OTHER_TOWER = replace(tiny.SIGLIP, vision=replace(tiny.SIGLIP.vision, image_size=24))
CASES = {
    "gemma 3": Case(tiny.GEMMA3, "t5gemma2"),
    "gemma 3 with images": Case(IMAGES_GEMMA3, "t5gemma2"),
    "gemma 3 with images, to text": Case(IMAGES_GEMMA3, "t5gemma2", {"encoder": {"images": None}}),
    "gemma 3 and the tower of siglip": Case(
        tiny.GEMMA3, "t5gemma2", {"encoder": {"images": replace(tiny.IMAGES, token=8)}}, vision=tiny.SIGLIP
    ),
    "gemma 3 with images and another tower": Case(
        IMAGES_GEMMA3, "t5gemma2", {"encoder": {"images": replace(tiny.IMAGES, token=8)}}, vision=OTHER_TOWER
    ),
    "gemma 3, separate attention": Case(
        tiny.GEMMA3, "t5gemma2", {"cross": "separate", "tied_embedding": False, "encoder": {"kv_heads": 4}}
    ),
    "gemma 3, a head of its own": Case(replace(tiny.GEMMA3, tied_head=False), "t5gemma2"),
    "gemma 3, untied": Case(tiny.GEMMA3, "t5gemma2", {"decoder": {"tied_head": False}}),
    "gemma 3, a quiet encoder": Case(tiny.GEMMA3, "t5gemma2", choices=AdaptOptions(encoder_scale=0.125)),
    "gemma 2": Case(tiny.GEMMA2, "t5gemma"),
    "gemma 2, merged": Case(tiny.GEMMA2, "t5gemma", {"cross": "merged"}),
    "gemma 2, tied": Case(tiny.GEMMA2, "t5gemma", {"tied_embedding": True}),
    "gemma 2, merged and tied": Case(tiny.GEMMA2, "t5gemma", {"cross": "merged", "tied_embedding": True}),
    "gemma 2, global layers": Case(tiny.GEMMA2, "t5gemma", {"cross_layers": "global"}),
    "gemma 2, fresh": Case(tiny.GEMMA2, "t5gemma", choices=AdaptOptions(cross_attention="fresh", cross_norms="fresh")),
    "gemma 2, adding nothing": Case(tiny.GEMMA2, "t5gemma", choices=AdaptOptions(cross_norms="none")),
    "gemma 2, multi-head": Case(tiny.GEMMA2, "t5gemma", {"encoder": {"kv_heads": 4}, "decoder": {"kv_heads": 4}}),
    "gemma 2, causal encoder": Case(tiny.GEMMA2, "t5gemma", {"encoder_attention": "causal"}),
    "gemma 2, two sources": Case(SMALL, "t5gemma", encoder=tiny.GEMMA2),
    "gemma 2, two sources, one embedding": Case(
        replace(tiny.GEMMA2, layers=2), "t5gemma", {"tied_embedding": True, "cross": "merged"}, encoder=tiny.GEMMA2
    ),
    "gemma 2, cut in depth": Case(
        replace(tiny.GEMMA2, layers=5),
        "t5gemma",
        choices=AdaptOptions(encoder_layers="every:2", decoder_layers="last:2", cross_attention="self"),
    ),
    "gemma 2, chosen layers": Case(
        replace(tiny.GEMMA2, layers=5), "t5gemma", choices=AdaptOptions(encoder_layers=(0, 3), decoder_layers="first:4")
    ),
    "gemma 2, more rows": Case(
        tiny.GEMMA2,
        "t5gemma",
        {"encoder": {"vocab_size": 90}, "decoder": {"vocab_size": 104}},
        choices=AdaptOptions(vocabulary="resize"),
    ),
}
