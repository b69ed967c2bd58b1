"""Named scopes: the part of a model or of a step that an operation of a compiled program belongs to.

Scopes are nested, and every operation carries the names around it, with those of jax's own between them:

    jit(train_step)/transpose(jvp(encoder))/while/body/checkpoint/local/attention/dot_general

is of `encoder.local.attention`: the gradient of what stands in `scope("encoder")`, `scope("local")` and
`scope("attention")`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

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
_around: ContextVar[tuple[str, ...]] = ContextVar("around", default=())


@contextmanager
def scope(name: ScopeName) -> Iterator[None]:
    """Makes a context, or a decorator, whose operations are of this part, within the parts around it."""
    token = _around.set((*_around.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _around.reset(token)


def in_loop(body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the body of a loop with the scopes that are around the loop now.

    jax moves operations that are the same in every turn out of a loop when it differentiates it, and they carry the
    names of the body alone.
    """
    around = _around.get()

    def named(*arguments: Any) -> Any:
        with ExitStack() as stack:
            for name in around:
                stack.enter_context(jax.named_scope(name))
            return body(*arguments)

    return named


def dotted(op_name: str) -> str:
    """Returns the scopes in the name of an operation of a compiled program, joined by dots; "" if it has none.

    Of operations that XLA has combined, jit(step)/(encoder/embed/gather:decoder/embed/gather), those of the first.

    >>> dotted("jit(step)/transpose(jvp(decoder))/while/body/checkpoint/global/mlp/dot_general")
    'decoder.global.mlp'
    """
    first = re.sub(r"/\(([^:]*):.*", r"/\1", op_name)
    names = [match[1] for piece in first.split("/") if (match := _INNERMOST.fullmatch(piece))]
    parts = [name for name in names if name in SCOPES]
    # repeated by `in_loop`, and by jax, those of the forward pass within those of the backward pass
    return ".".join(dict.fromkeys(parts))
