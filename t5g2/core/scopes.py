"""Named scopes: the part of a model or of a step that an operation of a compiled program belongs to.

Scopes are nested, and every operation carries the names around it, with those of jax's own between them:

    jit(train_step)/transpose(jvp(encoder))/while/body/checkpoint/local/attention/dot_general

is of `encoder.local.attention`: the gradient of what stands in `scope("encoder")`, `scope("local")` and
`scope("attention")`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import jax

ScopeName = Literal[
    "encoder", "decoder", "vision", "projector", "text",  # of a model
    "local", "global",  # kinds of layers
    "attention", "merged", "cross", "mlp", "norm",  # in a layer
    "embed", "head", "teacher", "optimizer", "metrics", "gradients",  # of a step
]  # fmt: skip
SCOPES = get_args(ScopeName)
# jax writes the name of a transformation around that of the scope: transpose(jvp(encoder))
_INNERMOST = re.compile(r"(?:\b(?:jvp|transpose|vmap|remat|checkpoint)\()*([\w.-]+)\)*")


@contextmanager
def scope(name: ScopeName) -> Iterator[None]:
    """Makes a context, or a decorator, whose operations are of this part, within the parts around it."""
    with jax.named_scope(name):
        yield


def dotted(op_name: str) -> str:
    """Returns the scopes in the name of an operation of a compiled program, joined by dots; "" if it has none.

    >>> dotted("jit(step)/transpose(jvp(decoder))/while/body/checkpoint/global/mlp/dot_general")
    'decoder.global.mlp'
    """
    names = [match[1] for piece in op_name.split("/") if (match := _INNERMOST.fullmatch(piece))]
    parts = [name for name in names if name in SCOPES]
    # jax may repeat the scopes of the forward pass within those of the backward pass
    return ".".join(dict.fromkeys(parts))
