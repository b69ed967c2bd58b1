"""The choice of an attention backend for one kind of layer: by device, shapes and mask, with the reason for it.

The facts about devices are in the files of the backends. Each says what it refuses; `choose` only orders them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from t5g2.core.device import platform
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.models.backends import cudnn, splash
from t5g2.models.backends.site import Site

# scores on one device up to which the reference is as fast and compiles sooner (bench/attention.py)
SMALL = 2**20


class Kernel(NamedTuple):
    """A backend that runs on one kind of device: jax's name of it, that in words, and what it cannot compute."""

    device: str
    devices: str
    refusal: Callable[[Site], str | None]


KERNELS = {
    "splash": Kernel("tpu", "TPUs", splash.refusal),
    "cudnn": Kernel("gpu", "NVIDIA GPUs", cudnn.refusal),
}


class BackendChoice(NamedTuple):
    """The backend of one kind of layer, and the reason for it."""

    name: str
    reason: str


def choose(backend: str, site: Site, *, device: str | None = None) -> BackendChoice:
    """Returns the backend for `site`; `backend` is a name or "auto". One that cannot compute it gives way to blockwise.

    Args:
      device: "cpu", "gpu" or "tpu"; None = that of the current mesh.

    Raises:
      UserError: the named backend does not exist on this kind of device.
    """
    device = device or platform()
    kernel = KERNELS.get(backend)
    if kernel is not None and device != kernel.device:
        raise UserError(
            f"compute.backend={backend!r} runs on {kernel.devices}, and the devices of this run are {device!r}; "
            "set compute.backend='auto', which takes the best backend of the device"
        )
    # decoding: a block of queries has one, and a kernel knows no cache
    if site.queries == 1:
        return BackendChoice("reference", "one query has no more scores than keys")
    if backend == "auto":
        return _automatic(site, device)
    if kernel is not None and (refusal := kernel.refusal(site)) is not None:
        _warn(backend, refusal)
        return BackendChoice("blockwise", f"{backend} cannot: {refusal}")
    return BackendChoice(backend, "set by compute.backend")


def _automatic(site: Site, device: str) -> BackendChoice:
    if site.scores <= SMALL:
        return BackendChoice("reference", f"all {site.scores} scores are few enough to be held")
    name = next((name for name, kernel in KERNELS.items() if kernel.device == device), None)
    if name is None:
        return BackendChoice("blockwise", f"{site.scores} scores are too many to be held")
    if (refusal := KERNELS[name].refusal(site)) is not None:
        return BackendChoice("blockwise", f"{name} cannot: {refusal}")
    return BackendChoice(name, f"the kernel for {KERNELS[name].devices}")


@functools.cache
def _warn(backend: str, refusal: str) -> None:
    # once for each reason: a model calls attention in every layer
    log.warning("attention: %s was asked for and cannot run (%s); blockwise runs instead", backend, refusal)
