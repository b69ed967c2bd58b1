"""The kinds of TPU by the names that Google Cloud has for them."""

from typing import NamedTuple

from t5g2.core import tpu_chips
from t5g2.core.errors import UserError
from t5g2.core.tpu_chips import Target


class CloudNames(NamedTuple):
    """Names of a kind of TPU.

    Attributes:
      gke: label cloud.google.com/gke-tpu-accelerator of its nodes (GKE documentation, "Plan TPUs in GKE").
      accelerator: beginning of gcloud's --accelerator-type; None = gcloud makes no VMs of it.
      cores: what the number in --accelerator-type counts of a chip: TensorCores, or the chip itself.
      runtime: gcloud's --version for JAX (Cloud TPU documentation, "TPU software versions").
    """

    gke: str
    accelerator: str | None
    cores: int
    runtime: str


CLOUD_NAMES = {
    "v4": CloudNames("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": CloudNames("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": CloudNames("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": CloudNames("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": CloudNames("tpu7x", None, 2, ""),
}
# chips of a host of a slice of several hosts, and of the largest slice of one host of flat chips
CHIPS_PER_HOST, CHIPS_OF_ONE_HOST = 4, 8


def tpu_slice(text: str) -> Target:
    """Returns the slice of a text such as "v5p:2x2x2".

    Raises:
      UserError: there is no such chip or slice; the message has the nearest.
    """
    try:
        return tpu_chips.target(text)
    except UserError as error:
        raise UserError(str(error).replace("--target=", "tpu = ")) from None


def hosts(target: Target) -> int:
    """Returns the number of hosts of a slice."""
    alone = CHIPS_OF_ONE_HOST if target.chip.flat else CHIPS_PER_HOST
    return 1 if target.chips <= alone else target.chips // CHIPS_PER_HOST


def accelerator_type(target: Target) -> str:
    """Returns gcloud's --accelerator-type: v5p-16 for v5p:2x2x2.

    Raises:
      UserError: gcloud makes no VMs of this kind.
    """
    names = CLOUD_NAMES[target.chip.name]
    if names.accelerator is None:
        raise UserError(f"tpu = {target}: there are no TPU VMs of {target.chip.name}; use --launcher=gke")
    return f"{names.accelerator}-{names.cores * target.chips}"
