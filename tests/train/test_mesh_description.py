"""The mesh in words: true of the weights that there are, also where a size divides none of their axes."""

import math
from dataclasses import replace

import pytest

from t5g2.core import tree
from t5g2.core.sharding import AXES, MeshShape
from t5g2.core.whole_weights import WholeWeights
from t5g2.models import build, sizes
from t5g2.train.mesh_description import describe
from tests import tiny


def test_a_strategy_says_what_it_expands_to():
    assert describe(MeshShape(strategy="zero1", tensor=2), 8) == (
        "mesh.strategy=zero1: data=4 x fsdp=1 x context=1 x tensor=2; rows over data (4 parts); encoder tokens whole; "
        "heads, MLP, vocabulary over tensor (2 parts); weights over tensor (2 parts); "
        "optimizer state over tensor x data (8 parts)"
    )
    assert describe(MeshShape(strategy="fsdp", context=4, slices=2), 16) == (
        "mesh.strategy=fsdp: data=2 x fsdp=2 x context=4 x tensor=1, data in 2 slices; "
        "rows over data x fsdp (4 parts); encoder tokens over context (4 parts); "
        "heads, MLP, vocabulary whole; weights over fsdp x context (8 parts); "
        "optimizer state over fsdp x context (8 parts)"
    )
    whole = "; rows whole; encoder tokens whole; heads, MLP, vocabulary whole; weights whole; optimizer state whole"
    assert describe(MeshShape(), 1).endswith(whole)


def words(model, shape: MeshShape, devices: int) -> tuple[str, list[str]]:
    axes = dict(zip(AXES, shape.sizes(devices), strict=True))
    whole = WholeWeights(build.abstract(model), axes, zero1=shape.zero1)
    return describe(shape, devices, whole.shares), whole.warnings()


@pytest.mark.parametrize("devices", [128, 256])
@pytest.mark.parametrize("name", ["gemma3:270m", "gemma3:1b"])
def test_the_released_sizes_are_cut_over_a_pod(name, devices):
    """Widths of 640 and 1152, which 128 divides and 256 does not."""
    line, warnings = words(sizes.size(name), MeshShape(data=1, fsdp=-1), devices)
    assert f"; weights over fsdp ({devices} parts); " in line
    assert not warnings


def test_a_tower_that_a_pod_cannot_cut_is_named():
    """SigLIP has a width of 1152 and an MLP of 4304: 256 divides neither; the sides of text are cut."""
    model = sizes.size("t5gemma2:270m-270m")
    axes = {"data": 1, "fsdp": 256, "context": 1, "tensor": 1}
    whole = WholeWeights(build.abstract(model), axes, zero1=False)
    (warning,) = whole.warnings()
    assert warning.startswith("mesh.fsdp = 256 divides no axis of vision.layers.mlp.")
    assert warning.endswith("; set mesh.fsdp to 128 and mesh.data to 2")
    leaves = [leaf for leaf in tree.leaves(build.abstract(model)).values() if "embed" in leaf.axes]
    tower, other = (
        sum(math.prod(leaf.shape) for leaf in leaves if leaf.path.startswith(("vision.", "projector.")) == wanted)
        for wanted in (True, False)
    )
    assert whole.shares == {"fsdp": tower / (tower + other)}


def test_weights_that_stay_whole_are_named_with_a_size_that_cuts_them():
    """The layers of 1B on 512 devices: 512 divides the rows of its table, and no axis of another weight."""
    line, (warning,) = words(sizes.size("gemma3:1b"), MeshShape(data=1, fsdp=-1), 512)
    layers = 26 * (2 * 1152 * 256 + 2 * 1152 * 4 * 256 + 3 * 1152 * 6912)
    share = layers / (layers + 262144 * 1152)
    assert f"weights over fsdp (512 parts), {share:.1%} of them whole along fsdp; " in line
    assert warning == (
        "mesh.fsdp = 512 divides no axis of layers.mlp.down [6912, 1152] and 6 more: "
        f"{share:.1%} of the weights that it should cut are whole on every device along it; "
        "set mesh.fsdp to 256 and mesh.data to 2"
    )


def test_an_axis_that_cuts_nothing_is_not_said_to_cut():
    """Three devices, and the sizes of a power of 2; tensor, and a vocabulary and an MLP that are odd."""
    model = replace(tiny.GEMMA3, vocab_size=64, mlp_width=64)
    line, (warning,) = words(model, MeshShape(strategy="fsdp"), 3)
    assert line.endswith("; weights whole; optimizer state whole")
    assert warning.endswith(
        "100.0% of the weights that it should cut are whole on every device along it; set mesh.fsdp to 1 and mesh.data "
        "to 3, or use another number of devices"
    )
    line, (warning,) = words(replace(tiny.GEMMA3, vocab_size=385, mlp_width=255), MeshShape(data=1, tensor=2), 2)
    odd, heads = 385 * 32 + 3 * 3 * 32 * 255, 3 * 2 * 32 * 32
    share = f"{odd / (odd + heads):.1%}"
    assert f"heads, MLP, vocabulary over tensor (2 parts), {share} of them whole along tensor; " in line
    assert warning.startswith(f"mesh.tensor = 2 divides no axis of embedder.table [385, 32] and 3 more: {share} of the")
    assert "set mesh.tensor to 1 and mesh.data to 2" in warning


def test_the_state_that_zero1_cannot_cut_is_named():
    model = replace(tiny.GEMMA3, vocab_size=64, mlp_width=64)
    line, (warning,) = words(model, MeshShape(strategy="zero1"), 3)
    assert line.endswith("; weights whole; optimizer state whole")
    assert warning.startswith("mesh.data = 3 divides no axis of ")
    assert "100.0% of the optimizer's state of the weights that it should cut" in warning
    assert not words(model, MeshShape(strategy="zero1"), 4)[1]


def test_fewer_key_value_heads_than_devices_are_no_fault():
    assert not words(replace(tiny.GEMMA3, vocab_size=64), MeshShape(data=1, tensor=4), 4)[1]
