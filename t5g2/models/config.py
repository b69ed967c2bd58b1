"""Architectures as frozen dataclasses; every invariant is checked on construction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from t5g2.core import settings
from t5g2.core.errors import UserError

LayerKind = Literal["local", "global"]
GEMMA3_PATTERN: tuple[LayerKind, ...] = ("local",) * 5 + ("global",)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer: angle of pair k at position p is p * base^(-2k/H) / factor."""

    base: float
    factor: float = 1.0

    def __post_init__(self):
        if self.base <= 0 or self.factor <= 0:
            raise UserError(f"rope base = {self.base} and factor = {self.factor}; both must be above 0")


@dataclass(frozen=True)
class TextConfig:
    """One stack of Gemma blocks: a decoder-only model, or the encoder or decoder of an encoder-decoder one.

    Attributes:
      vocab_size: V, rows of the embedding table.
      width: D, size of a hidden state.
      layers: L.
      mlp_width: F, width of one of the two gated matrices.
      heads: N query heads.
      kv_heads: K key/value heads; query head n uses key/value head n // (N / K).
      head_size: H, not necessarily D / N.
      window: W, keys a local layer sees, the query's own included.
      pattern: kinds of layers, repeated up to `layers` (26 layers of a pattern of 6 end in 2 local ones).
      rope_local, rope_global: rotary embedding by kind of layer.
      query_scalar: scores are multiplied by query_scalar ** -0.5; None = head_size.
      qk_norm: RMSNorm on queries and keys (Gemma 3).
      attention_softcap, final_softcap: c in c * tanh(x / c), None = none (Gemma 2: 50 and 30).
      norm_eps: of every RMSNorm.
    """

    vocab_size: int
    width: int
    layers: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_size: int
    window: int
    pattern: tuple[LayerKind, ...] = GEMMA3_PATTERN
    rope_local: Rope = Rope(10_000.0)
    rope_global: Rope = Rope(1_000_000.0)
    query_scalar: float | None = None
    qk_norm: bool = True
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "mlp_width", "heads", "kv_heads", "head_size", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; it must be at least 1")
        for name in ("query_scalar", "attention_softcap", "final_softcap", "norm_eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                optional = "" if name == "norm_eps" else ", or None for none"
                raise UserError(f"{name} = {value}; it must be above 0{optional}")
        if self.heads % self.kv_heads:
            raise UserError(
                f"heads = {self.heads} and kv_heads = {self.kv_heads}: every key/value head serves equally many query "
                f"heads, so kv_heads must divide heads"
            )
        if self.head_size % 2:
            raise UserError(f"head_size = {self.head_size}; rotary embedding rotates pairs, so it must be even")
        if not self.pattern or set(self.pattern) - {"local", "global"}:
            raise UserError(f"pattern = {self.pattern}; it must be a non-empty tuple of 'local' and 'global'")

    def kind(self, layer: int) -> LayerKind:
        """The kind of layer number `layer`, counted from 0."""
        return self.pattern[layer % len(self.pattern)]

    def rope(self, kind: LayerKind) -> Rope:
        """The rotary embedding of a kind of layer."""
        return self.rope_local if kind == "local" else self.rope_global

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.query_scalar or self.head_size) ** -0.5


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder and a decoder of Gemma blocks (T5Gemma 2: merged attention, one embedding for everything).

    Attributes:
      encoder, decoder: the two stacks.
      cross: "merged" = decoder and encoder keys under one softmax with one set of weights (T5Gemma 2).
      tied_embedding: encoder input, decoder input and output head are one table.
      eoi_id: this token's input embedding is a vector of its own, not scaled (T5Gemma 2: 256000); None = no such token.
    """

    encoder: TextConfig
    decoder: TextConfig
    cross: Literal["merged"] = "merged"
    tied_embedding: bool = True
    eoi_id: int | None = None

    def __post_init__(self):
        if self.encoder.width != self.decoder.width:
            raise UserError(
                f"encoder width {self.encoder.width} and decoder width {self.decoder.width} differ: merged attention "
                f"projects encoder states with the decoder's weights, so the widths must be equal"
            )
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise UserError(
                f"encoder vocab_size {self.encoder.vocab_size} and decoder vocab_size {self.decoder.vocab_size} differ:"
                f" one tied embedding serves both, so they must be equal"
            )
        if self.eoi_id is not None and not 0 <= self.eoi_id < self.decoder.vocab_size:
            raise UserError(f"eoi_id = {self.eoi_id} is outside the vocabulary of {self.decoder.vocab_size}")


ModelConfig = TextConfig | EncoderDecoderConfig
KINDS: dict[str, type] = {"gemma3": TextConfig, "t5gemma2": EncoderDecoderConfig}


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config as plain data, every field of it, that `from_dict` turns back into an equal one."""
    return settings.dump(config, tables=(KINDS,))


def from_dict(data: Mapping[str, Any], *, where: str = "model") -> ModelConfig:
    """The config that plain data describes; its "kind" says which.

    Raises:
      UserError: an unknown kind or key (with the nearest), a wrong type, a broken invariant; `where` it was found.
    """
    return settings.build(ModelConfig, data, where=where, tables=(KINDS,))
