"""Hugging Face folders and official Flax trees of tiny models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util

from t5g2.checkpoint import flax_names, names, safetensors_io
from t5g2.checkpoint.folder import save_model
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.models import build
from t5g2.models.config import EncoderDecoderConfig
from tests import tiny, weights

UNTIED = dataclasses.replace(tiny.GEMMA3, tied_head=False)


FAMILIES = {
    "gemma2": tiny.GEMMA2,
    "gemma3": tiny.GEMMA3,
    "gemma3 untied": UNTIED,
    "gemma3 with images": tiny.GEMMA3_IMAGES,
    "t5gemma": tiny.T5GEMMA,
    "t5gemma untied": dataclasses.replace(tiny.T5GEMMA, decoder=dataclasses.replace(tiny.GEMMA2, tied_head=False)),
    "t5gemma2": tiny.T5GEMMA2,
    "t5gemma2 untied": dataclasses.replace(tiny.T5GEMMA2, tied_embedding=False, decoder=UNTIED),
    "t5gemma2 without eoi": dataclasses.replace(tiny.T5GEMMA2, eoi_id=None),
    "t5gemma2 with images": tiny.T5GEMMA2_IMAGES,
    "siglip": tiny.SIGLIP,
}


def save(directory, config, dtype=jnp.float32):
    save_model(directory, jax.tree.map(lambda x: x.astype(dtype), weights.on_host(config)))
    return directory


def bits(opened):
    """Every leaf of an open folder, with its dtype, as bytes."""
    return {key: (str(leaf.dtype), leaf.shape, leaf.read().tobytes()) for key, leaf in opened.leaves.items()}


def stored(directory):
    """The tensors of a Hugging Face folder, read."""
    return {name: tensor.read() for name, tensor in safetensors_io.read(directory).items()}


def rewrite(directory, tensors):
    """Replaces the tensors of a Hugging Face folder."""
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    lazy = {n: Tensor(x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()}
    safetensors_io.write(directory, lazy, single_file=safetensors_io.SINGLE, metadata={"format": "pt"})


def reconfigure(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- official Flax ----
def nested(config):
    """The official tree of a model with the weights of the tests, by NESTED names, from the table."""
    tensor_format = flax_names.T5GEMMA if isinstance(config, EncoderDecoderConfig) else flax_names.GEMMA
    arrays = weights.weights(config)
    leaves = tree.leaves(build.abstract(config))
    return {
        match.name: match.axes.to_tensor([arrays[key] for key in match.keys])
        for match in names.match_tensors(tensor_format, leaves)
    }


def save_flax(directory, tensors):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, traverse_util.unflatten_dict(tensors, sep="/"))
    return directory


def shapes_of(config):
    """The official tree of a released size, as shapes."""
    tensor_format = flax_names.T5GEMMA if isinstance(config, EncoderDecoderConfig) else flax_names.GEMMA
    shapes = {}
    for match in names.match_tensors(tensor_format, tree.leaves(build.abstract(config))):
        shapes[match.name] = match.shape
        if match.name.endswith("gating_einsum") and match.shape[1] < 4096:  # the large ones are transposed
            shapes[match.name] = (2, match.shape[2], match.shape[1])
    return shapes
