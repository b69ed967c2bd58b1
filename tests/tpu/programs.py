"""Compiles attention and a train step for TPUs, without a TPU: prints one line for each program.

    PYTHONPATH=.venv/tpu-compiler python -m tests.tpu.programs

A process of its own, as libtpu can be loaded once, and reads its environment at that time.
"""

import dataclasses
import os
import re

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from t5g2.core import sharding
from t5g2.core.batch import Batch, Sequences
from t5g2.core.sharding import MeshShape
from t5g2.models import build, masks
from t5g2.models.attention import attend
from t5g2.models.backends.choice import choose
from t5g2.models.backends.site import Site
from t5g2.models.config import EncoderDecoderConfig, text_only
from t5g2.models.layers import Compute
from t5g2.models.loss_config import LossConfig
from t5g2.models.masks import ALL, Keys, Mask
from t5g2.models.sizes import size
from t5g2.models.stack import ENCODER
from t5g2.train import optim, schedules, state, step

ROWS, LENGTH, MEMORY, HEADS, SIZE = 4, 2048, 4096, 4, 256
SOURCES: dict[str, tuple[tuple[int, Mask], ...]] = {
    "encoder.local": ((LENGTH, masks.bidirectional(512)),),
    "encoder.global": ((LENGTH, ALL),),
    "decoder.local": ((MEMORY, ALL), (LENGTH, masks.causal(512))),
    "decoder.global": ((MEMORY, ALL), (LENGTH, masks.causal())),
    "gemma.local": ((LENGTH, masks.causal(512)),),
}


TOPOLOGIES = {"v5e:2x2": (1, None), "v5p:2x2x1": (2, 50.0)}  # with key/value heads, and soft cap


def compile_all(topology: str, shape: MeshShape, kv_heads: int, softcap: float | None) -> None:
    """Compiles every kind of attention for this topology and mesh, packed."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make(shape, devices[:4])
    for name, sources in SOURCES.items():
        if shape.context > 1 and name.startswith("gemma"):
            continue
        with jax.set_mesh(mesh):
            text = _compile(mesh, sources, name, kv_heads, softcap)
        kernels = text.count('custom_call_target="tpu_custom_call"')
        lengths = {*(keys for keys, _ in sources), LENGTH}
        parts = {length // shape.context for length in lengths} | lengths
        pairs = any(f"{queries},{keys}]" in text for queries in parts for keys in lengths)
        print(f"{topology} {shape} {name} kernels={kernels} pairs={pairs}")


def _compile(mesh, sources, name: str, kv_heads: int, softcap: float | None) -> str:
    own = ENCODER if name.startswith("encoder") else "length"
    axes = [*(ENCODER for _ in sources[:-1]), own]

    def shape(axes, size, dtype):
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, sharding.spec(axes, size, mesh.shape)))

    def tokens(length: int) -> Sequences:
        return Sequences(*(shape(("rows", None), (ROWS, length), jnp.int32) for _ in range(3)))

    def array(length: int, heads: int, axis: str):
        return shape(("rows", axis, "kv_heads_act", None), (ROWS, length, heads, SIZE), jnp.bfloat16)

    def total(q_BTNH, keys_values, query, others):
        tokens = [*others, query]
        every = [
            (Keys(pair[0], pair[1], of, axis), mask)
            for pair, of, axis, (_, mask) in zip(keys_values, tokens, axes, sources, strict=True)
        ]
        assert choose("auto", Site.of(q_BTNH, query, every, softcap)).name == "splash"
        o_BTNH = attend(q_BTNH, query, every, scale=SIZE**-0.5, softcap=softcap, compute=Compute())
        return jnp.sum(o_BTNH.astype(jnp.float32))

    keys_values = [(array(length, kv_heads, axis),) * 2 for axis, (length, _) in zip(axes, sources, strict=True)]
    others = [tokens(length) for length, _ in sources[:-1]]
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    return step.lower(array(LENGTH, HEADS, own), keys_values, tokens(LENGTH), others).compile().as_text() or ""


def compile_step(topology: str, length: int = 4096) -> None:
    """Compiles a train step of T5Gemma 2 270M-270M with one layer a side, rows of 4,096 tokens on both, and FSDP."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make(MeshShape(strategy="fsdp"), devices[:4])
    config = text_only(size("t5gemma2:270m-270m"))
    assert isinstance(config, EncoderDecoderConfig)
    one = {side: dataclasses.replace(getattr(config, side), layers=1) for side in ("encoder", "decoder")}
    config = dataclasses.replace(config, **one)
    place = sharding.batch_sharding(mesh)

    def array(dtype=jnp.int32):
        return jax.ShapeDtypeStruct((8, length), dtype, sharding=place)

    side = Sequences(array(), array(), array())
    batch = Batch(side, side, array(), array(jnp.float32), array(), array())
    optimizer = optim.make(optim.OptimConfig(schedules.Constant(1e-3)), 10, build.abstract(config))
    options = step.StepOptions(Compute(remat="attention"), loss=LossConfig(tile_tokens=4096))
    with jax.set_mesh(mesh):
        first = state.abstract(config, optimizer, mesh=mesh, param_dtype="float32")
        lowered = step.lower_step(step.make_train_step(optimizer, options), first, batch, mesh=mesh)
        text = lowered.compile().as_text() or ""
    vocab, width = config.decoder.vocab_size, config.decoder.width
    # the compiler's own reduce-scatter is a fusion of an all-reduce and a slice
    cut = len(re.findall(rf"^%all-reduce-scatter\S* \(\S+ f32\[{vocab},{width}\]\)", text, re.MULTILINE))
    whole = len(re.findall(rf" = .*\[{vocab},{width}\].* all-reduce\(", text)) - cut
    kernels = text.count('custom_call_target="tpu_custom_call"')
    pairs = any(f"{length},{keys}]" in text for keys in (length, 2 * length))
    print(f"{topology} step kernels={kernels} pairs={pairs} table reduce-scatters={cut} all-reduces={whole}")


def two_slices(topology: str) -> None:
    """Prints the slices of each part of the data axis of a mesh over two slices; nothing is compiled."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=2).devices
    mesh = sharding.make(MeshShape(strategy="fsdp", slices=2), devices)
    print(f"{topology} twice: {[sorted({device.slice_index for device in part.flat}) for part in mesh.devices]}")


if __name__ == "__main__":
    two_slices("v5e:2x2")
    compile_step("v5p:2x2x1")
    for topology, (kv_heads, softcap) in TOPOLOGIES.items():
        compile_all(topology, MeshShape(data=2, tensor=2), kv_heads, softcap)
    compile_all("v5p:2x2x1", MeshShape(data=1, context=4), 2, 50.0)
