"""The mesh of a run in words: what is cut over which of its axes."""

import math
from collections.abc import Mapping

from t5g2.core.sharding import AXES, RULES, MeshShape


def describe(shape: MeshShape, devices: int, whole: Mapping[str, float] | None = None) -> str:
    """Returns what a mesh expands to on this number of devices: its axes, and what is cut over which of them.

    Args:
      whole: the shares of `WholeWeights`; None = none are known.
    """
    sizes, whole = dict(zip(AXES, shape.sizes(devices), strict=True)), whole or {}

    def over(*axes: str, whole: Mapping[str, float]) -> str:
        cut = [axis for axis in axes if sizes[axis] > 1 and whole.get(axis, 0) < 1]
        parts = math.prod(sizes[axis] for axis in cut)
        but = "".join(f", {whole[axis]:.1%} of them whole along {axis}" for axis in cut if axis in whole)
        return f"over {' x '.join(cut)} ({parts} parts){but}" if cut else "whole"

    weights = (*RULES["vocab"], *RULES["embed"])
    state = (*weights, "data") if shape.zero1 else weights
    lines = {
        "rows": over(*RULES["rows"], whole={}),
        "encoder tokens": over(*RULES["encoder_length"], whole={}),
        "heads, MLP, vocabulary": over(*RULES["heads"], whole=whole),
        "weights": over(*weights, whole=whole),
        "optimizer state": over(*state, whole=whole),
    }
    axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    slices = f", data in {shape.slices} slices" if shape.slices > 1 else ""
    cut = "; ".join(f"{name} {how}" for name, how in lines.items())
    return f"mesh.strategy={shape.strategy}: {axes}{slices}; {cut}"
