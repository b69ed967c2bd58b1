"""Names and layouts: every row is exact both ways, every leaf has one tensor, every spelling has one name."""

import re
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint import flax_names, hf_names, names
from t5g2.checkpoint.names import AxisPattern, TensorFormat
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.tree import Leaf
from t5g2.models import build
from tests import tiny

FORMATS = {
    f"{prefix}_{name}": tensor_format
    for prefix, module in (("HF", hf_names), ("FLAX", flax_names))
    for name, tensor_format in vars(module).items()
    if isinstance(tensor_format, TensorFormat)
}
ARRANGED = {title: arrange for title, arrange in vars(names).items() if isinstance(arrange, AxisPattern)}
SIZES = {"D": 6, "N": 3, "K": 2, "H": 4, "I": 5, "O": 7, "F": 8, "h": 2, "w": 3, "c": 3, "P": 9}


def leaf(path, shape, layer=None):
    return Leaf(path, layer, shape, np.dtype("float32"), (None,) * len(shape), lambda: np.zeros(shape, np.float32))


def keyed(*leaves):
    return {match.key: match for match in leaves}


def numbered(shape, start=0):
    return np.arange(start, start + prod(shape), dtype=np.float32).reshape(shape)


# what each arrangement does, computed once more with NumPy alone
BY_HAND = {
    "LINEAR": lambda x: x.T,
    "TO_HEADS": lambda x: x.reshape(6, 12).T,
    "FROM_HEADS": lambda x: x.reshape(12, 6).T,
    "HEADS_BIAS": lambda x: x.reshape(12),
    "CONV": lambda x: x.transpose(3, 2, 0, 1),
    "PACKED": lambda *x: np.concatenate([y.reshape(6, 12).T for y in x]),
    "PACKED_BIAS": lambda *x: np.concatenate([y.reshape(12) for y in x]),
    "PROBE": lambda x: x[None, None],
    "SCALAR": lambda x: x[None],
    "EINSUM": lambda x: x.transpose(1, 0, 2),
    "EINSUMS": lambda *x: np.stack([y.transpose(1, 0, 2) for y in x]),
    "GATES": lambda *x: np.stack(x),
    "GATES_TRANSPOSED": lambda *x: np.stack([y.T for y in x]),
    "BATCHED": lambda x: x[None],
    "SAME": lambda x: x,
    "PADDED": lambda x: x,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("title", ARRANGED)
def test_an_arrangement_both_ways(title, dtype):
    arrange, by_hand = ARRANGED[title], BY_HAND[title]
    shape = tuple(SIZES[axis] for axis in arrange.pattern.split("->")[0].split()) if arrange.pattern else (5, 4)
    count = 3 if "*" in arrange.pattern else 1
    leaves = [numbered(shape, start=100 * i).astype(dtype) for i in range(count)]
    tensor = arrange.to_tensor(leaves)
    assert tensor.shape == arrange.shape([shape] * count)
    np.testing.assert_array_equal(tensor, by_hand(*leaves))
    for i, expected in enumerate(leaves):
        back = arrange.to_leaf(tensor, [shape] * count, i)
        assert (back.dtype, back.shape) == (expected.dtype, shape)
        assert count == 1 or back.base is None
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, expected)


def test_surplus_rows_are_cut():
    shapes = [(256_000, 2)]
    assert names.PADDED.shape(shapes) == (256_128, 2)
    table = numbered((256_128, 2))
    np.testing.assert_array_equal(names.PADDED.to_leaf(table, shapes, 0), table[:256_000])
    assert names.PADDED.shape([(262_144, 2)]) == (262_144, 2)


@pytest.mark.parametrize("title", FORMATS)
def test_a_table_names_no_tensor_twice(title):
    """One name may stand in several rows only for leaves that no model has together."""
    seen = {}
    for theirs, ours, _ in FORMATS[title].rows:
        seen.setdefault(theirs, []).append(ours)
    twice = {theirs for theirs, ours in seen.items() if len(ours) > 1}
    tables = r"(.*/)?embedder/input_embedding"
    tied_or_not = r"model\.encoder\.embed_tokens\.(weight|eoi_embedding)"
    assert {n for n in twice if not re.fullmatch(rf"{tables}|{tied_or_not}|.*/mlp/gating_einsum", n)} == set()


HOLDS = {
    "HF_GEMMA": [tiny.GEMMA2, tiny.GEMMA3],
    "HF_GEMMA3_IMAGES": [tiny.GEMMA3_IMAGES],
    "HF_T5GEMMA": [tiny.T5GEMMA],
    "HF_T5GEMMA2": [tiny.T5GEMMA2, tiny.T5GEMMA2_IMAGES],
    "HF_SIGLIP": [tiny.SIGLIP],
    "FLAX_GEMMA": [tiny.GEMMA2, tiny.GEMMA3, tiny.GEMMA3_IMAGES],
    "FLAX_T5GEMMA": [tiny.T5GEMMA],
}


@pytest.mark.parametrize("title", HOLDS)
def test_every_leaf_has_one_tensor(title):
    for config in HOLDS[title]:
        leaves = tree.leaves(build.abstract(config))
        matches = names.match_tensors(FORMATS[title], leaves)
        keys = [key for match in matches for key in match.keys]
        assert sorted(keys, key=str) == sorted(leaves, key=str)
        assert len({match.name for match in matches}) == len(matches)
        assert sum(prod(match.shape) for match in matches) == sum(prod(leaf.shape) for leaf in leaves.values())


def test_a_tower_alone():
    vision = {
        key: leaf for key, leaf in tree.leaves(build.abstract(tiny.SIGLIP)).items() if key[0].startswith("vision.")
    }
    matches = names.match_tensors(hf_names.SIGLIP_VISION, vision)
    assert {key for match in matches for key in match.keys} == set(vision)
    assert "vision_model.head.attention.in_proj_weight" in {match.name for match in matches}


def test_literal_names():
    leaves = tree.leaves(build.abstract(tiny.GEMMA3))
    matches = {match.name: match for match in names.match_tensors(hf_names.GEMMA, leaves)}
    match = matches["model.layers.2.self_attn.k_proj.weight"]
    assert (match.keys, match.shape) == ((("layers.attention.k", 2),), (16, 32))
    matches = {match.name: match for match in names.match_tensors(flax_names.GEMMA, leaves)}
    match = matches["layer_2/attn/kv_einsum/w"]
    assert (match.keys, match.shape) == ((("layers.attention.k", 2), ("layers.attention.v", 2)), (2, 2, 32, 8))
    assert list(matches)[:3] == ["embedder/input_embedding", "final_norm/scale", "layer_0/pre_attention_norm/scale"]


def test_queries_keys_and_values_in_one_tensor_where_that_is_found():
    leaves = keyed(*(leaf(f"layers.attention.{x}", (6, 3, 4), 0) for x in "qkvo"))
    tensor_format = TensorFormat(
        "Flax", names.with_prefix("layer_{i}/attn/", "layers.attention.", flax_names.ATTENTION)
    )
    apart = ["layer_0/attn/q_einsum/w", "layer_0/attn/kv_einsum/w", "layer_0/attn/attn_vec_einsum/w"]
    assert [match.name for match in names.match_tensors(tensor_format, leaves)] == apart
    found = {"layer_0/attn/qkv_einsum/w": (3, 3, 6, 4)}
    assert [match.name for match in names.match_tensors(tensor_format, leaves, found)] == [
        "layer_0/attn/qkv_einsum/w",
        apart[2],
    ]


GATES = TensorFormat("Flax", (flax_names.BLOCK[-4], flax_names.BLOCK[-3]))


def test_gates_are_distinguished_by_their_shape():
    leaves = keyed(leaf("mlp.gate", (6, 8)), leaf("mlp.up", (6, 8)))
    for shape, arrange in [((2, 6, 8), names.GATES), ((2, 8, 6), names.GATES_TRANSPOSED)]:
        (match,) = names.match_tensors(GATES, leaves, {"mlp/gating_einsum": shape})
        assert match.axes == arrange
    (match,) = names.match_tensors(GATES, leaves, {"mlp/gating_einsum": (2, 8, 7)})  # neither: the caller says so
    assert match.shape == (2, 6, 8)


def test_gates_that_cannot_be_distinguished():
    leaves = keyed(leaf("mlp.gate", (6, 6)), leaf("mlp.up", (6, 6)))
    message = (
        r"mlp/gating_einsum has shape \[2, 6, 6\], which can be read as 'D F -> \* D F' and as 'D F -> \* F D' "
        r"alike, so its axes are ambiguous; convert it from another format"
    )
    with pytest.raises(UserError, match=message):
        names.match_tensors(GATES, leaves, {"mlp/gating_einsum": (2, 6, 6)})


def test_a_leaf_without_a_tensor_is_of_another_architecture():
    with pytest.raises(UserError, match=r"Hugging Face Gemma has no tensor for 1 weights of .*: embedder.eoi; give"):
        names.match_tensors(hf_names.GEMMA, keyed(leaf("embedder.eoi", (4,))))


ALIASES = {
    "HF_GEMMA3_IMAGES": {
        "language_model.model.layers.0.mlp.up_proj.weight": [
            "model.language_model.layers.0.mlp.up_proj.weight",
        ],
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": [
            "vision_tower.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        ],
        "multi_modal_projector.mm_soft_emb_norm.weight": ["model.multi_modal_projector.mm_soft_emb_norm.weight"],
        "lm_head.weight": ["language_model.lm_head.weight"],
    },
    "HF_T5GEMMA2": {
        "model.encoder.embed_tokens.eoi_embedding": [
            "model.encoder.text_model.embed_tokens.eoi_embedding",
            "encoder.text_model.embed_tokens.eoi_embedding",
            "encoder.embed_tokens.eoi_embedding",
        ],
        "model.encoder.vision_tower.vision_model.post_layernorm.bias": [
            "model.encoder.vision_tower.post_layernorm.bias",
            "encoder.vision_tower.vision_model.post_layernorm.bias",
        ],
        "model.decoder.norm.weight": ["decoder.norm.weight"],
        "lm_head.out_proj.weight": [],
    },
    "HF_T5GEMMA": {"model.encoder.norm.weight": ["encoder.norm.weight"]},
    "HF_SIGLIP_VISION": {"vision_model.head.probe": ["head.probe"]},
}


@pytest.mark.parametrize("title", ALIASES)
def test_aliases(title):
    for known, others in ALIASES[title].items():
        for found in [known, *others]:
            assert FORMATS[title].canonical_name(found) == known


@pytest.mark.parametrize("title", FORMATS)
def test_a_known_name_is_its_own_canonical_name(title):
    tensor_format = FORMATS[title]
    for known in [
        *(theirs for theirs, _, _ in tensor_format.rows),
        *tensor_format.copies,
        *tensor_format.copies.values(),
    ]:
        assert tensor_format.canonical_name(known) == known
