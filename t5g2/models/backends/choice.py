"""The choice of an attention backend for one kind of layer: by device, shapes and mask, with the reason for it.

The facts about devices are in the files of the backends. Each says what it refuses; `choose` only orders them.
"""

import functools
from typing import NamedTuple

from t5g2.core.device import platform
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.models.backends import cudnn, splash
from t5g2.models.backends.site import Site

# scores on one device up to which the reference is as fast and compiles sooner (bench/attention.py)
SMALL = 2**20
WHERE = {"splash": ("tpu", "TPUs"), "cudnn": ("gpu", "NVIDIA GPUs")}


class BackendChoice(NamedTuple):
    """The backend of one kind of layer, and the reason for it."""

    name: str
    reason: str


def choose(backend: str, site: Site) -> BackendChoice:
    """Returns the backend for `site`; `backend` is a name or "auto". One that cannot compute it gives way to blockwise.

    Raises:
      UserError: the named backend does not exist on this kind of device.
    """
    device = platform()
    needed, words = WHERE.get(backend, (device, ""))
    if device != needed:
        raise UserError(
            f"compute.backend={backend!r} runs on {words}, and the devices of this run are {device!r}; "
            "set compute.backend='auto', which takes the best backend of the device"
        )
    # decoding: a block of queries has one, and a kernel knows no cache
    if site.queries == 1:
        return BackendChoice("reference", "one query has no more scores than keys")
    if backend == "auto":
        return _automatic(site, device)
    if backend in WHERE:
        refusal = _refusal(backend, site)
        if refusal is not None:
            _warn(backend, refusal)
            return BackendChoice("blockwise", f"{backend} cannot: {refusal}")
    return BackendChoice(backend, "set by compute.backend")


def _automatic(site: Site, device: str) -> BackendChoice:
    if site.scores <= SMALL:
        return BackendChoice("reference", f"all {site.scores} scores are few enough to be held")
    kernel = next((name for name, (needed, _) in WHERE.items() if needed == device), None)
    if kernel is None:
        return BackendChoice("blockwise", f"{site.scores} scores are too many to be held")
    refusal = _refusal(kernel, site)
    if refusal is None:
        return BackendChoice(kernel, f"the kernel for {WHERE[kernel][1]}")
    return BackendChoice("blockwise", f"{kernel} cannot: {refusal}")


def _refusal(kernel: str, site: Site) -> str | None:
    """Returns why a kernel cannot compute this site exactly; None if it can."""
    return {"splash": splash.refusal, "cudnn": cudnn.refusal}[kernel](site)


@functools.cache
def _warn(backend: str, refusal: str) -> None:
    # once for each reason: a model calls attention in every layer
    log.warning("attention: %s was asked for and cannot run (%s); blockwise runs instead", backend, refusal)
