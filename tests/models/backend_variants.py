"""Every backend in the forms that run on a CPU: small blocks, a kernel's interpreter, cuDNN's call by XLA."""

import dataclasses
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

from t5g2.models.backends import blockwise, cudnn, reference, splash
from t5g2.models.backends.site import Site


def _small_blocks(*arguments, **options):
    # several blocks even in short rows, and a last one that is not full
    with patch.object(blockwise, "CPU", blockwise.CPU._replace(most=4, least=2)):
        return blockwise.attend(*arguments, **options)


VARIANTS: dict[str, Callable] = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "small blocks": _small_blocks,
    "splash": partial(splash.attend, interpret=True),
    "cudnn": partial(cudnn.attend, implementation="xla"),
}

GENERAL = ("reference", "blockwise", "small blocks")  # backends that refuse nothing


def refusal(name: str, site: Site) -> str | None:
    """Returns why a backend refuses a site; types and lengths that only cuDNN minds pass."""
    if name == "splash":
        return splash.refusal(site)
    if name == "cudnn":
        even = dataclasses.replace(site, dtype="bfloat16", queries=2, keys=(2,) * len(site.keys))
        with patch.object(cudnn, "compute_capability", lambda: cudnn.HOPPER):
            return cudnn.refusal(even)
    return None
