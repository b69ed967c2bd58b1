"""Compiles attention and a train step for TPUs, without a TPU: prints one line for each program, and a dry run.

    PYTHONPATH=.venv/tpu-compiler python -m tests.tpu.programs

A process of its own, as libtpu can be loaded once, and reads its environment at that time.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t5g2.core import sharding
from t5g2.core.batch import Sequences
from t5g2.core.sharding import MeshShape
from t5g2.core.tpu_chips import target
from t5g2.jobs import dry_run, target_check, tpu_compiler
from t5g2.models import masks
from t5g2.models.attention import attend
from t5g2.models.backends.choice import choose
from t5g2.models.backends.site import Site
from t5g2.models.layers import Compute
from t5g2.models.masks import ALL, Keys, Mask
from t5g2.models.stack import ENCODER
from t5g2.train import experiment as experiments

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
    mesh = sharding.make(shape, tpu_compiler.devices(target(topology)))
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


def one_layer(length: int, **mesh: int) -> experiments.Experiment:
    """Returns a run of T5Gemma 2 270M-270M with one layer a side, rows of `length` tokens on both, and FSDP over 4."""
    one = {"layers": 1}
    return experiments.build(
        {
            "model": {"size": "t5gemma2:270m-270m", "encoder": {**one, "images": None}, "decoder": one},
            "data": {
                "sources": [{"text": {"kind": "python", "max_bytes": 800_000}, "objective": {"kind": "prefix_lm"}}],
                "tokenizer": {"kind": "bytes"},
                "chunk_tokens": 2 * length - 1,
                "rows": 8,
                "encoder_length": length,
                "decoder_length": length,
                "streams": 8,
            },
            "optim": {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "constant", "peak": 1e-3}},
            "train": {"steps": 10, "tile_tokens": 4096},
            "compute": {"remat": "attention"},
            "mesh": {"data": 1, "fsdp": 4, **mesh},
        }
    )


def check_step(topology: str, length: int = 4096) -> None:
    """Checks a run with rows of 4,096 tokens on both sides."""
    experiment = one_layer(length)
    steps = []

    def compile_for(*arguments):
        steps.append(compiles(*arguments))
        return steps[-1]

    compiles, target_check.compile_for = target_check.compile_for, compile_for
    dry_run.check(experiment, target=topology)
    (text,) = (step.text for step in steps)
    stack = experiment.model.decoder_stack
    table = f"{stack.vocab_size},{stack.width}"
    # the compiler's own reduce-scatter is a fusion of an all-reduce and a slice
    cut = len(re.findall(rf"^%all-reduce-scatter\S* \(\S+ f32\[{table}\]\)", text, re.MULTILINE))
    whole = len(re.findall(rf" = .*\[{table}\].* all-reduce\(", text)) - cut
    kernels = text.count('custom_call_target="tpu_custom_call"')
    pairs = any(f"{length},{keys}]" in text for keys in (length, 2 * length))
    print(f"{topology} step kernels={kernels} pairs={pairs} table reduce-scatters={cut} all-reduces={whole}")


def two_slices(topology: str) -> None:
    """Prints the slices of each part of the data axis of a mesh over two slices, and checks a run on it."""
    devices = tpu_compiler.devices(target(topology)._replace(slices=2))
    mesh = sharding.make(MeshShape(strategy="fsdp", slices=2), devices)
    print(f"{topology} twice: {[sorted({device.slice_index for device in part.flat}) for part in mesh.devices]}")
    dry_run.check(one_layer(2048, data=2, slices=2), target=topology)


if __name__ == "__main__":
    check_step("v5p:2x2x1")
    two_slices("v5e:2x2")
    for topology, (kv_heads, softcap) in TOPOLOGIES.items():
        compile_all(topology, MeshShape(data=2, tensor=2), kv_heads, softcap)
    compile_all("v5p:2x2x1", MeshShape(data=1, context=4), 2, 50.0)
