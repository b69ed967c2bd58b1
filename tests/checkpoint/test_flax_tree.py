"""Official Flax trees: whatever way Orbax stored them, the same leaves by the same names, one at a time."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from t5g2.checkpoint import flax_tree
from t5g2.core.errors import UserError

STORES = {
    "ocdbt": {"use_ocdbt": True},
    "folders": {"use_ocdbt": False},
    "ocdbt-zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "folders-zarr3": {"use_ocdbt": False, "use_zarr3": True},
}
LAYERS, TYPES = 5, 2


def leaves(images=False, dtype=jnp.bfloat16):
    """A tiny Gemma 3 by its NESTED names: width 8, 2 heads of 4, 1 kv head, MLP 12."""
    shapes = {"embedder/input_embedding": (16, 8), "final_norm/scale": (8,)}
    for i in range(LAYERS):
        norms = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
        shapes |= {f"layer_{i}/{norm}/scale": (8,) for norm in norms}
        shapes |= {f"layer_{i}/attn/{norm}/scale": (4,) for norm in ("_query_norm", "_key_norm")}
        shapes |= {f"layer_{i}/attn/q_einsum/w": (2, 8, 4), f"layer_{i}/attn/kv_einsum/w": (2, 1, 8, 4)}
        shapes |= {f"layer_{i}/attn/attn_vec_einsum/w": (2, 4, 8)}
        shapes |= {f"layer_{i}/mlp/gating_einsum": (2, 12, 8), f"layer_{i}/mlp/linear": (12, 8)}
    if images:
        shapes |= {"embedder/mm_input_projection/w": (6, 8), "embedder/mm_soft_embedding_norm/scale": (6,)}
        siglip = "vision_encoder/siglip_encoder"
        shapes |= {f"{siglip}/embedding/kernel": (2, 2, 3, 6), f"{siglip}/embedding/bias": (6,)}
        shapes |= {f"{siglip}/pos_embedding": (1, 4, 6)}
        shapes |= {f"{siglip}/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": (6, 10)}
        shapes |= {f"{siglip}/Transformer/encoder_norm/scale": (6,)}
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def nested(leaves):
    return traverse_util.unflatten_dict(leaves, sep="/")


def flat(leaves):
    """One level of keys, each a dict of leaves; the MLP's matrices are called w there."""
    tree = {}
    for name, x in leaves.items():
        if name.endswith(("mlp/gating_einsum", "mlp/linear")):
            name += "/w"
        name = f"transformer/{name}" if not name.startswith("vision_encoder/") else name
        name = name.replace("vision_encoder/", "SigLiPFromPatches_0/")
        key, leaf = name.rsplit("/", 1)
        tree.setdefault(key, {})[leaf] = x
    return tree


def stacked(leaves):
    """Layer i is slice i // TYPES of attention type i % TYPES: types of 3 and of 2 layers."""
    tree = {}
    for key, held in flat(leaves).items():
        found = re.fullmatch(r"(.*/)layer_(\d+)/(.*)", key)
        if found is None:
            tree[key] = held
            continue
        before, layer, rest = found.groups()
        slice_, kind = divmod(int(layer), TYPES)
        for leaf, x in held.items():
            at = tree.setdefault(f"{before}stacked_layers/attention_type_{kind}/{rest}", {})
            at.setdefault(leaf, []).append(x)
            assert len(at[leaf]) == slice_ + 1
    return jax.tree.map(lambda x: jnp.stack(x) if isinstance(x, list) else x, tree, is_leaf=lambda x: type(x) is list)


def trainer(leaves):
    moments = jax.tree.map(jnp.zeros_like, nested(leaves))
    return {
        "params": nested(leaves),
        "opt_state": [{"mu": moments, "count": np.asarray(3)}, None],
        "step": np.asarray(3),
        "collections": {},
    }


VARIANTS = {"nested": nested, "flat": flat, "stacked": stacked, "trainer": trainer}


def save(path, tree, store="ocdbt"):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**STORES[store])) as checkpointer:
        checkpointer.save(path, tree)
    return path


def assert_read(path, expected):
    tensors = flax_tree.read(path)
    assert sorted(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        x = tensor.read()
        assert isinstance(x, np.ndarray)
        assert (tensor.shape, tensor.dtype) == (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype), name
        np.testing.assert_array_equal(x, np.asarray(expected[name]), err_msg=name)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reads_as_nested(tmp_path, variant, store):
    expected = leaves(images=True)
    path = save(tmp_path / "gemma 3 100%", VARIANTS[variant](expected), store)
    assert flax_tree.is_flax(path)
    assert_read(path, expected)


def test_an_encoder_decoder(tmp_path):
    """Each stack is numbered by itself, stacked too."""
    one = leaves(dtype=jnp.float32)
    expected = {f"{side}/{name}": x for side in ("encoder", "decoder") for name, x in one.items()}
    expected["decoder/layer_0/cross_attn/q_einsum/w"] = jnp.ones((2, 8, 4))
    assert_read(save(tmp_path / "nested", nested(expected)), expected)
    assert_read(save(tmp_path / "flat", flat(expected)), expected)
    tree = {"encoder/stacked_layers/attention_type_0/mlp/linear": {"w": jnp.arange(6.0).reshape(3, 2)}}
    tree |= {"decoder/stacked_layers/attention_type_0/mlp/linear": {"w": jnp.arange(2.0).reshape(1, 2)}}
    tree |= {"decoder/stacked_layers/attention_type_1/mlp/linear": {"w": jnp.arange(2.0).reshape(1, 2) + 9}}
    expected = {f"encoder/layer_{i}/mlp/linear": jnp.arange(2.0) + 2 * i for i in range(3)}
    expected |= {f"decoder/layer_{i}/mlp/linear": jnp.arange(2.0) + 9 * i for i in range(2)}
    assert_read(save(tmp_path / "stacked", {f"transformer/{key}": x for key, x in tree.items()}), expected)


def test_wherever_the_checkpoint_lies(tmp_path):
    """Below the folder of a download, as a step of a manager, as one of its items; standard checkpointers too."""
    expected = leaves()
    standard = ocp.StandardCheckpointer()
    standard.save(tmp_path / "kaggle" / "gemma3-tiny", nested(expected))
    standard.wait_until_finished()
    (tmp_path / "kaggle" / "tokenizer.model").write_bytes(b"")
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(3, args=ocp.args.StandardSave(nested(expected)))
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        items = {"params": nested(expected), "opt": {"count": np.asarray(3)}}
        manager.save(3, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()}))
    with ocp.CheckpointManager(tmp_path / "state") as manager:
        items = {"state": trainer(expected), "other": {"count": np.asarray(3)}}
        manager.save(3, args=ocp.args.Composite(**{k: ocp.args.PyTreeSave(v) for k, v in items.items()}))
    for name in ("kaggle", "kaggle/gemma3-tiny", "steps", "steps/3", "steps/3/default", "items", "items/3", "state"):
        assert flax_tree.is_flax(tmp_path / name), name
        assert_read(tmp_path / name, expected)


def test_several_checkpoints(tmp_path):
    for step in (3, 5):
        save(tmp_path / str(step) / "default", {"w": np.zeros(3)})
    with pytest.raises(UserError, match=r"holds several checkpoints: 3/default, 5/default; give the folder of one"):
        flax_tree.read(tmp_path)
    assert sorted(flax_tree.read(tmp_path / "5")) == ["w"]


def test_zeros_that_were_left_out(tmp_path):
    """Orbax once wrote no bytes for chunks of zeros, and said so; where it says otherwise, missing bytes are damage."""
    path = save(tmp_path / "model", {"w": np.zeros(3, np.float32), "one": np.ones(2)}, "folders")
    (path / "w" / "0").unlink()
    with pytest.raises(UserError, match=r"is damaged \(w cannot be read: .*missing.*\); download or unpack it again"):
        flax_tree.read(path)["w"].read()
    metadata = json.loads((path / "_METADATA").read_text())
    for extra in ({"store_array_data_equal_to_fill_value": False}, {}):
        kept = {k: v for k, v in metadata.items() if not k.startswith(("store_", "use_ocdbt"))}
        (path / "_METADATA").write_text(json.dumps(kept | extra))
        np.testing.assert_array_equal(flax_tree.read(path)["w"].read(), np.zeros(3, np.float32))


def test_one_leaf_is_read_without_the_others(tmp_path):
    expected = leaves()
    path = save(tmp_path / "model", nested(expected), "folders")
    for folder in path.iterdir():
        if folder.is_dir() and folder.name not in ("layer_1.mlp.linear", "array_metadatas"):
            [chunk.unlink() for chunk in folder.iterdir() if not chunk.name.startswith(".")]
    tensors = flax_tree.read(path)
    name = "layer_1/mlp/linear"
    np.testing.assert_array_equal(tensors[name].read(), np.asarray(expected[name]))
    with pytest.raises(UserError, match=r"layer_2/mlp/linear cannot be read: .*missing"):
        tensors["layer_2/mlp/linear"].read()


def test_one_slice_of_a_stack_is_read_without_the_others(tmp_path):
    """Chunks of one slice, as a stack has that was saved from devices it was cut over."""
    key = "transformer/stacked_layers/attention_type_0/mlp/linear"
    path = tmp_path / "model"
    mesh = jax.make_mesh((4,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("layers"))
    x = jax.device_put(jnp.arange(8.0).reshape(4, 2), cut)
    save(path, {key: {"w": x}}, "folders")
    folder = path / f"{key}.w"
    assert sorted(chunk.name for chunk in folder.iterdir()) == [".zarray", "0.0", "1.0", "2.0", "3.0"]
    for chunk in ("0.0", "1.0", "3.0"):
        (folder / chunk).unlink()
    tensors = flax_tree.read(path)
    np.testing.assert_array_equal(tensors["layer_2/mlp/linear"].read(), [4.0, 5.0])
    with pytest.raises(UserError, match=r"attention_type_0/mlp/linear cannot be read: .*missing"):
        tensors["layer_3/mlp/linear"].read()


def test_a_database_with_a_hole_gives_a_leaf_or_an_error(tmp_path):
    """OCDBT: whichever of its files is lost, leaves come back whole or not at all, and some are named."""
    expected = {f"big_{i}": np.arange(i, i + 200_000, dtype=np.float32) for i in range(3)} | {"small": np.ones(3)}
    path = save(tmp_path / "model", expected)
    lost = []
    for file in sorted((path / "ocdbt.process_0" / "d").iterdir()):
        copy = shutil.copytree(path, tmp_path / f"without {file.name}")
        (copy / file.relative_to(path)).unlink()
        try:
            tensors = flax_tree.read(copy)
        except UserError as error:
            lost.append(str(error))
            continue
        for name, tensor in tensors.items():
            try:
                np.testing.assert_array_equal(tensor.read(), expected[name])
            except UserError as error:
                lost.append(str(error))
    assert lost
    assert all("is damaged" in message and "cannot be read: " in message for message in lost)


def damaged_metadata(path, text):
    (path / "_METADATA").write_bytes(text)


def leaf_is_gone(path):
    shutil.rmtree(path / "layer_1.mlp.linear")


DAMAGE = {
    "metadata is missing": (lambda path: (path / "_METADATA").unlink(), "_METADATA is missing"),
    "metadata is cut": (lambda path: damaged_metadata(path, b'{"tree_metadata": {'), "_METADATA cannot be read: "),
    "metadata is no JSON": (lambda path: damaged_metadata(path, b"\xff\x00"), "_METADATA cannot be read: "),
    "metadata is a list": (lambda path: damaged_metadata(path, b"[]"), "_METADATA holds no tree_metadata"),
    "metadata is empty": (lambda path: damaged_metadata(path, b'{"tree_metadata": {}}'), "_METADATA lists no leaves"),
    "metadata is odd": (
        lambda path: damaged_metadata(path, b'{"tree_metadata": {"a": {"key_metadata": 3}}}'),
        "_METADATA describes a leaf in an unknown way",
    ),
    "a leaf is elsewhere": (
        lambda path: damaged_metadata(
            path, b'{"tree_metadata": {"a": {"key_metadata": [{"key": "../a"}], "value_metadata": {}}}}'
        ),
        r"_METADATA has a leaf without a name, or with '..' in it: '../a'",
    ),
    "a leaf is missing": (leaf_is_gone, "layer_1/mlp/linear cannot be read: .*does not exist"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error(tmp_path, name):
    damage, message = DAMAGE[name]
    path = save(tmp_path / "model", nested(leaves()), "folders")
    damage(path)
    assert flax_tree.is_flax(tmp_path)  # so that the error says what is wrong with it
    with pytest.raises(UserError, match=rf"model is damaged \({message}.*\); download or unpack it again") as caught:
        flax_tree.read(tmp_path)
    assert "tensorstore_spec" not in str(caught.value)


def test_bytes_that_are_not_a_chunk(tmp_path):
    path = save(tmp_path / "model", nested(leaves()), "folders")
    chunk = path / "layer_1.mlp.linear" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:7])
    with pytest.raises(UserError, match=r"layer_1/mlp/linear cannot be read: "):
        flax_tree.read(path)["layer_1/mlp/linear"].read()


def test_stacks_that_contradict(tmp_path):
    scalar = {"transformer/stacked_layers/attention_type_0/mlp": {"linear": np.asarray(1.0)}}
    with pytest.raises(UserError, match=r"linear has no axis of layers"):
        flax_tree.read(save(tmp_path / "scalar", scalar))
    twice = {"transformer/stacked_layers/attention_type_0/mlp": {"linear": np.zeros((2, 3))}}
    twice |= {"transformer/layer_1/mlp": {"linear": np.zeros(3)}}
    with pytest.raises(UserError, match=r"two of its leaves are called layer_1/mlp/linear"):
        flax_tree.read(save(tmp_path / "twice", twice))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a folder with a Flax checkpoint"):
        flax_tree.read(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "half.orbax-checkpoint-tmp-12").mkdir()
    (tmp_path / "half.orbax-checkpoint-tmp-12" / "_METADATA").write_text("{}")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "model.safetensors"):
        assert not flax_tree.is_flax(path)
    with pytest.raises(UserError, match=r"is not a Flax checkpoint: neither it nor a folder up to 3 levels down has"):
        flax_tree.read(tmp_path)
