"""The kinds of attention in a model and their shapes, known before anything is traced.

`attention_sites` says of a batch what `Site.of` says of a call; a test holds them to each other.
"""

from dataclasses import replace
from typing import Any

from t5g2.core.batch import Batch
from t5g2.core.sharding import parts
from t5g2.models import masks
from t5g2.models.backends.cut_columns import local_columns
from t5g2.models.backends.site import Site
from t5g2.models.config import EncoderDecoderConfig, LayerKind, TextConfig
from t5g2.models.layers import Compute
from t5g2.models.masks import ALL, Mask
from t5g2.models.stack import ENCODER


def attention_sites(
    model: TextConfig | EncoderDecoderConfig,
    batch: Batch,
    compute: Compute,
    *,
    microbatches: int = 1,
    encoder_offset: bool = False,
) -> dict[str, Site]:
    """Returns the site of each kind of attention by name, such as "encoder.local", on one device of the current mesh.

    Args:
      batch: arrays or their shapes; in a step it is cut into `microbatches`.
      encoder_offset: merged attention adds an offset to the scores of the encoder's keys.
    """
    rows = batch.decoder.tokens.shape[0] // microbatches
    decoder, blocks = (batch.decoder.tokens.shape[1], "length"), batch.decoder.blocks is not None
    sites = {}
    if isinstance(model, EncoderDecoderConfig):
        assert batch.encoder is not None
        encoder = batch.encoder.tokens.shape[1], ENCODER
        # images are blocks in a causal encoder only: in the others their tokens see each other anyway
        encoder_blocks = batch.encoder.blocks is not None
        if model.encoder_attention == "causal" and model.encoder.images is not None:
            encoder_blocks = True
        for kind in _kinds(model.encoder):
            own = masks.encoder(model, kind)
            sites[f"encoder.{kind}"] = _site(model.encoder, compute, rows, encoder, own, blocks=encoder_blocks)
        for kind in _kinds(model.decoder):
            attends = model.cross_layers == "all" or kind == "global"
            merged = encoder if attends and model.cross == "merged" else None
            own = masks.decoder(model.decoder, kind)
            site = _site(model.decoder, compute, rows, decoder, own, memory=merged, blocks=blocks)
            sites[f"decoder.{kind}"] = replace(site, score_offset=encoder_offset and merged is not None)
        if model.cross == "separate":
            sites["decoder.cross"] = _site(model.decoder, compute, rows, decoder, None, memory=encoder, blocks=blocks)
    else:
        for kind in _kinds(model):
            own = masks.decoder(model, kind)
            sites[f"decoder.{kind}"] = _site(model, compute, rows, decoder, own, blocks=blocks)
    tower = model.image_stack.images
    if batch.images is not None and tower is not None:
        vision, number = tower.vision, rows * batch.images.shape[1]
        shape = (number // parts("rows", number), vision.patches, (vision.patches,), (ALL,), 0)
        heads = vision.heads // parts("heads_act", vision.heads)
        sites["vision"] = Site(*shape, heads, vision.width // vision.heads, False, False, compute.vision_dtype)
    return sites


def layers_of(model: TextConfig | EncoderDecoderConfig, name: str) -> int:
    """Returns the number of layers with the attention that `attention_sites` gives this name."""
    side, _, kind = name.partition(".")
    if side == "vision":
        assert model.image_stack.images is not None
        return model.image_stack.images.vision.layers
    config: Any = model.encoder_stack if side == "encoder" else model.decoder_stack
    kinds = [config.kind(layer) for layer in range(config.layers)]
    if kind == "cross":
        assert isinstance(model, EncoderDecoderConfig)
        return len(kinds) if model.cross_layers == "all" else kinds.count("global")
    return kinds.count(kind)


def _kinds(config: TextConfig) -> list[LayerKind]:
    return list(dict.fromkeys(config.kind(layer) for layer in range(config.layers)))


def _site(
    config: TextConfig,
    compute: Compute,
    rows: int,
    tokens: tuple[int, str],
    own: Mask | None,
    *,
    memory: tuple[int, str] | None = None,
    blocks: bool,
) -> Site:
    """Returns the site of a stack's attention to an encoder, if it has a `memory`, and to itself, if `own`.

    Args:
      tokens: number and logical axis of the stack's tokens.
      memory: those of the encoder's.
    """
    sources = [] if memory is None else [(memory, ALL)]
    if own is not None:
        sources.append((tokens, own))
    shown = tuple(mask for _, mask in sources)
    number = None if own is None else len(sources) - 1
    here = local_columns(tokens[0], [keys for keys, _ in sources], shown, own=number, blocks=blocks)
    return Site(
        rows=rows // parts("rows", rows),
        queries=here.queries,
        keys=here.keys,
        masks=shown,
        own=here.own,
        heads=config.heads // parts("heads_act", config.heads),
        head_size=config.head_size,
        softcap=config.attention_softcap is not None,
        blocks=blocks,
        dtype=compute.dtype,
        combined=here.combined,
    )
