"""Options of an adaptation that the architectures of source and target leave open."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from t5g2.core.bounds import Bounds, checked
from t5g2.core.errors import UserError

LayerChoice = str | tuple[Annotated[int, Bounds(least=0, below=1000)], ...]
_ALLOWED_LAYERS = "all, first:N, last:N, every:K, or the source's layers one by one, such as 0,2,5"


@dataclass(frozen=True)
@checked
class AdaptOptions:
    """Options of an adaptation.

    Attributes:
      encoder_layers, decoder_layers: the source's layers that become this side's layers, in order: "all"; "first:N" and
        "last:N"; "every:K" = 0, K, 2K, …; or their numbers.
      cross_attention: weights of separate cross-attention: "self" = copied from the decoder's self-attention; "fresh" =
        newly initialised; "auto" = copied if encoder and decoder have the same width, else initialised (T5Gemma, arXiv
        2504.06225, section 3.2: balanced copied, unbalanced random).
      cross_norms: norms before and after cross-attention, which the papers do not describe: "self" = those of
        self-attention; "fresh" = a factor of 1; "none" = those of self-attention before it and a factor of 0 after it,
        so that at first it adds nothing, and the decoder computes the same as the source.
      vocabulary: "same" = the number of rows is that of the source's embedding, where rows from the image token on do
        not count; "resize" = the first rows are taken, and new ones are the mean of all (as in transformers'
        resize_token_embeddings, without its noise).
      encoder_scale: the factors of the encoder's final norm are multiplied by it. With merged attention its states
        enter as values that the decoder's projections never saw, and much larger than its own; smaller ones disturb it
        less at first. The architecture stays the same.
    """

    encoder_layers: LayerChoice = "all"
    decoder_layers: LayerChoice = "all"
    cross_attention: Literal["auto", "self", "fresh"] = "auto"
    cross_norms: Literal["self", "fresh", "none"] = "self"
    vocabulary: Literal["same", "resize"] = "same"
    encoder_scale: Annotated[float, Bounds(above=0, most=1)] = 1.0

    def __post_init__(self):
        # a wrong choice is an error before any folder is opened
        for name in ("encoder_layers", "decoder_layers"):
            _parse(getattr(self, name), name)

    def layers(self, side: Literal["encoder", "decoder"], count: int) -> tuple[int, ...]:
        """Returns the layers of a source with `count` layers that become the layers of this side, in order.

        AdaptOptions(encoder_layers="every:2").layers("encoder", 5) is (0, 2, 4).

        Raises:
          UserError: the source does not have these layers.
        """
        name = f"{side}_layers"
        rule, number, listed = _parse(getattr(self, name), name)
        if rule in ("first", "last") and number > count:
            raise UserError(f"{name} = {getattr(self, name)}, and the source has {count} layers; take at most {count}")
        # listed layers may repeat and come in any order
        wrong = [layer for layer in listed if layer >= count]
        if wrong:
            raise UserError(f"{name} names layer {wrong[0]}, and the source has {count}: 0 to {count - 1}")
        layers = range(count)
        chosen = {
            "all": layers,
            "first": layers[:number],
            "last": layers[count - number :],
            "every": layers[:: max(number, 1)],
            "listed": listed,
        }
        return tuple(chosen[rule])


def _parse(choice: LayerChoice, name: str) -> tuple[str, int, tuple[int, ...]]:
    """Returns (the rule, its number, the layers listed) of a choice of layers."""
    text = choice if isinstance(choice, str) else ",".join(map(str, choice))
    if text == "all":
        return "all", 0, ()
    if match := re.fullmatch(r"(first|last|every):([1-9][0-9]*)", text):
        return match[1], int(match[2]), ()
    if re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        return "listed", 0, tuple(map(int, text.split(",")))
    raise UserError(f"{name} = {text!r}; give {_ALLOWED_LAYERS}")
