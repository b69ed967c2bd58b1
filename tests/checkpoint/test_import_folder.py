"""Import and export: the same bits there and back, whatever the spelling, and nothing half done or unsaid."""

import dataclasses
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from t5g2.checkpoint import flax_names, flax_tree, folder, names, safetensors_io
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.checkpoint.import_folder import import_model, open_any, open_foreign
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.models import build
from t5g2.models.config import EncoderDecoderConfig, TextConfig
from t5g2.models.siglip import resample_positions
from t5g2.models.sizes import SIZES
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
    save_model(directory, jax.tree.map(lambda x: x.astype(dtype), weights.model(config)))
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


@pytest.fixture
def hugging_face(tmp_path):
    """A function: a Hugging Face folder of a tiny model, which the test may damage."""

    def make(config, dtype=jnp.float32):
        export_model(save(tmp_path / "ours", config, dtype), tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_there_and_back_and_there(tmp_path, family, dtype):
    config = FAMILIES[family]
    ours = open_model(save(tmp_path / "ours", config, dtype))
    export_model(ours.path, tmp_path / "theirs", shard_bytes=20_000)
    back = import_model(tmp_path / "theirs", tmp_path / "back")
    assert back.config == config
    assert bits(back) == bits(ours)
    export_model(tmp_path / "back", tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "theirs").keys()
    for name, array in stored(tmp_path / "theirs").items():
        assert array.tobytes() == stored(tmp_path / "again")[name].tobytes(), name


def test_files_are_as_transformers_writes_them(tmp_path):
    save(tmp_path / "ours", tiny.GEMMA3, jnp.bfloat16)
    export_model(tmp_path / "ours", tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "generation_config.json", "model.safetensors"]
    export_model(tmp_path / "ours", tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 1
    for file in [tmp_path / "one" / "model.safetensors", *(tmp_path / "many" / file for file in files)]:
        header = file.read_bytes()
        assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["Gemma3ForCausalLM"], "bfloat16")
    generation = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert generation == {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def test_files_are_carried_along(tmp_path, hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    generation = {"eos_token_id": [1, 106], "top_k": 64}
    contents = {"tokenizer.json": "{}", "tokenizer.model": "x", "chat_template.jinja": "y"}
    contents |= {"generation_config.json": json.dumps(generation), "preprocessor_config.json": "z"}
    for name, text in contents.items():
        (theirs / name).write_text(text)
    (theirs / "README.md").write_text("not of the model")
    back = import_model(theirs, tmp_path / "back")
    hashed = hashlib.sha256(b"{}").hexdigest()
    assert back.tokenizer == {"kind": "huggingface", "file": "tokenizer.json", "sha256": hashed}
    assert {file.name: file.read_text() for file in back.extra_files} == contents
    assert not (tmp_path / "back" / "README.md").exists()
    export_model(tmp_path / "back", tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_text() for name in contents} == contents
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([1, 106], 2)
    (theirs / "tokenizer.json").unlink()
    assert open_foreign(theirs).tokenizer == {
        "kind": "sentencepiece",
        "file": "tokenizer.model",
        "sha256": hashlib.sha256(b"x").hexdigest(),
    }


def test_what_was_imported_is_told(tmp_path, hugging_face):
    back = import_model(hugging_face(tiny.GEMMA3), tmp_path / "back")
    assert back.provenance == {
        "kind": "import",
        "source": str(tmp_path / "theirs"),
        "layout": "Hugging Face Gemma",
        "tensors": 41,
        "parameters": sum(array.size for array in weights.weights(tiny.GEMMA3).values()),
        "notes": [],
    }


def test_any_folder_opens(tmp_path, hugging_face):
    theirs = hugging_face(tiny.T5GEMMA2)
    assert bits(open_any(theirs)) == bits(open_any(tmp_path / "ours")) == bits(open_model(tmp_path / "ours"))
    model = folder.load_model(open_any(theirs))
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(weights.model(tiny.T5GEMMA2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_dtype_that_is_asked_for(tmp_path, hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    cast = import_model(theirs, tmp_path / "half", dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in cast.leaves.values()} == {"bfloat16"}
    for key, array in weights.weights(tiny.GEMMA3).items():
        np.testing.assert_array_equal(cast.leaves[key].read(), array.astype(jnp.bfloat16))
    export_model(tmp_path / "ours", tmp_path / "out", dtype="bfloat16")
    assert bits(open_foreign(tmp_path / "out")) == bits(cast)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtypes_that_differ_stay(tmp_path, hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    tensors = stored(theirs)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    rewrite(theirs, tensors)
    back = import_model(theirs, tmp_path / "back")
    assert str(back.leaves["final_norm.scale", None].dtype) == "bfloat16"
    assert str(back.leaves["embedder.table", None].dtype) == "float32"
    export_model(tmp_path / "back", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"
    assert stored(tmp_path / "again")["model.norm.weight"].dtype == jnp.bfloat16


RESPELLED = {
    "gemma3 with images": [
        lambda n: n.replace("vision_model.", ""),
        lambda n: n.replace("language_model.model.", "model.language_model."),
        lambda n: f"model.{n}" if n.startswith(("vision_tower", "multi_modal")) else n,
    ],
    "t5gemma2 with images": [
        lambda n: n.replace("vision_model.", ""),
        lambda n: n.replace("encoder.layers", "encoder.text_model.layers") if "vision" not in n else n,
        lambda n: n.replace("encoder.embed", "encoder.text_model.embed"),
        lambda n: n.removeprefix("model."),
    ],
    "t5gemma": [lambda n: n.removeprefix("model.")],
}


@pytest.mark.parametrize("family", RESPELLED)
def test_names_that_are_in_use_are_all_read(tmp_path, hugging_face, family):
    theirs = hugging_face(FAMILIES[family])
    plain, tensors = bits(open_foreign(theirs)), stored(theirs)
    for respell in RESPELLED[family]:
        renamed = {respell(name): array for name, array in tensors.items()}
        changed = len(renamed.keys() - tensors.keys())
        assert changed
        rewrite(theirs, renamed)
        opened = open_foreign(theirs)
        assert bits(opened) == plain
        assert opened.provenance["notes"] == [f"{changed} tensors are stored under other names in use for them"]


def test_two_names_of_one_tensor(hugging_face):
    theirs = hugging_face(tiny.T5GEMMA2)
    tensors = stored(theirs)
    rewrite(theirs, tensors | {"decoder.norm.weight": tensors["model.decoder.norm.weight"]})
    with pytest.raises(
        UserError, match=r"norm.weight and .*norm.weight, which are two names of one tensor; remove one"
    ):
        open_foreign(theirs)


COPIES = {
    "gemma3": {"lm_head.weight": "model.embed_tokens.weight"},
    "gemma3 with images": {"lm_head.weight": "language_model.model.embed_tokens.weight"},
    "t5gemma": {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"},
    "t5gemma2": {
        "lm_head.out_proj.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.eoi_embedding": "model.encoder.embed_tokens.eoi_embedding",
    },
}


@pytest.mark.parametrize("family", COPIES)
def test_copies_of_tied_weights(hugging_face, family):
    theirs = hugging_face(FAMILIES[family])
    tensors, plain = stored(theirs), bits(open_foreign(theirs))
    assert not tensors.keys() & COPIES[family].keys()
    copies = {copy: tensors[original] for copy, original in COPIES[family].items()}
    rewrite(theirs, tensors | copies)
    opened = open_foreign(theirs)
    assert bits(opened) == plain
    assert [f"{copy} repeats {original}" for copy, original in COPIES[family].items()] == [
        note for note in opened.provenance["notes"] if "repeats" in note
    ]
    for copy, original in COPIES[family].items():
        other = copies[copy].copy()
        other.reshape(-1)[-1] *= -1
        rewrite(theirs, tensors | {copy: other})
        with pytest.raises(UserError, match=rf"{copy} and {original} in .* differ, but they are one tied weight; if"):
            open_foreign(theirs)
        rewrite(theirs, tensors | {copy: other[..., :-1]})
        with pytest.raises(UserError, match="differ, but they are one tied weight"):
            open_foreign(theirs)


def test_every_difference_of_tensors_is_said(hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    tensors = stored(theirs)
    tensors["score.weight"] = tensors.pop("model.norm.weight")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
    rewrite(theirs, tensors)
    with pytest.raises(UserError) as caught:
        open_foreign(theirs)
    first, *lines = str(caught.value).splitlines()
    where = f"{theirs}, according to config.json"
    assert first == f"the tensors in {where}, are not those of Hugging Face Gemma (needed -> stored):"
    assert lines == [
        "missing  model.layers.1.mlp.up_proj.weight: [48, 32]",
        "missing  model.norm.weight: [32]",
        "surplus  score.weight: [32]",
        "changed  model.layers.0.mlp.up_proj.weight: [48, 32] -> [32, 48]",
    ]


def test_a_config_that_contradicts_the_tensors(hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    reconfigure(theirs, hidden_size=40)
    with pytest.raises(
        UserError, match=r"size = 97 and hidden_size = 40 contradict model.embed_tokens.weight, \[97, 32"
    ):
        open_foreign(theirs)
    reconfigure(theirs, hidden_size=32, vocab_size=96)
    with pytest.raises(UserError, match=r"vocab_size = 96 and hidden_size = 32 contradict model.embed_tokens.weight"):
        open_foreign(theirs)
    reconfigure(theirs, vocab_size=97, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"tie_word_embeddings = false needs lm_head.weight; if the weights are tied"):
        open_foreign(theirs)
    reconfigure(theirs, tie_word_embeddings=True, attention_bias=True)
    with pytest.raises(UserError, match=rf"{theirs}: config.json: attention_bias = True; supported: False"):
        open_foreign(theirs)


def test_placeholders_are_only_what_they_are(hugging_face):
    """A text-only T5Gemma 2 has an empty tower in transformers; a real one is not passed over."""
    theirs = hugging_face(tiny.T5GEMMA2)
    tensors = stored(theirs)
    assert "model.encoder.vision_tower.vision_model.post_layernorm.weight" in tensors
    assert len(open_foreign(theirs).provenance["notes"]) == 7
    rewrite(theirs, {name: array for name, array in tensors.items() if "vision" not in name})
    open_foreign(theirs)
    tensors["model.encoder.vision_tower.vision_model.post_layernorm.weight"] = np.zeros(16, np.float32)
    rewrite(theirs, tensors)
    with pytest.raises(
        UserError, match=r"surplus  model.encoder.vision_tower.vision_model.post_layernorm.weight: \[16"
    ):
        open_foreign(theirs)


def test_a_config_is_given(tmp_path, hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    (theirs / "config.json").unlink()
    with pytest.raises(UserError, match=r"has safetensors but no config.json, so its architecture is unknown; put the"):
        open_foreign(theirs)
    assert bits(open_foreign(theirs, tiny.GEMMA3)) == bits(open_foreign(theirs, tmp_path / "ours" / "model.json"))
    with pytest.raises(UserError, match=r"according to the given config, are not those of Hugging Face Gemma"):
        open_foreign(theirs, "gemma3:270m")
    with pytest.raises(UserError, match=r"unknown size 'gemma3:270'; did you mean 'gemma3:270m'"):
        open_foreign(theirs, "gemma3:270")
    with pytest.raises(
        UserError, match=r"nowhere.json does not exist; give a size's name, such as gemma3:1b, or a file"
    ):
        open_foreign(theirs, tmp_path / "nowhere.json")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a Hugging Face folder, an official Flax one or"):
        open_any(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no known model: neither config.json and safetensors"):
        open_any(tmp_path)
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(UserError, match=rf"is the workdir of a run: .* Its model folder is {tmp_path / 'model'}"):
        open_any(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_none(hugging_face, text):
    theirs = hugging_face(tiny.GEMMA3)
    (theirs / "config.json").write_text(text, "latin1")
    with pytest.raises(UserError, match=r"config.json (is not JSON|holds list, not an object).*download it again"):
        open_foreign(theirs)


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, hugging_face, monkeypatch):
    theirs = hugging_face(tiny.GEMMA3)
    for write in (import_model, export_model):
        with pytest.raises(UserError, match="exists already and is not overwritten"):
            write(theirs if write is import_model else tmp_path / "ours", theirs)
    with pytest.raises(UserError, match=r"ours is a model folder already: it has a model.json. Use it as it is"):
        import_model(tmp_path / "ours", tmp_path / "out")
    before = sorted(os.listdir(tmp_path))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "_blocks", interrupted)  # with a file half written
    for write, source in [(import_model, theirs), (export_model, tmp_path / "ours")]:
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == before


def test_one_tensor_is_read_once_and_held_one_at_a_time(tmp_path, hugging_face, monkeypatch):
    """Also where one holds several leaves, as the packed queries, keys and values of SigLIP's pooling do."""
    theirs = hugging_face(tiny.SIGLIP)
    reads = []
    lazy = safetensors_io.read(theirs)
    counted = {
        name: dataclasses.replace(tensor, read=lambda n=name, t=tensor: (reads.append(n), t.read())[1])
        for name, tensor in lazy.items()
    }
    monkeypatch.setattr(safetensors_io, "read", lambda _: counted)
    opened = open_foreign(theirs)
    assert reads == []
    for leaf in opened.leaves.values():
        leaf.read()
    assert sorted(reads) == sorted(lazy)


# ---- official Flax ----
def nested(config):
    """The official tree of a model with the weights of the tests, by NESTED names, from the table."""
    layout = flax_names.T5GEMMA if isinstance(config, EncoderDecoderConfig) else flax_names.GEMMA
    made = weights.weights(config)
    leaves = tree.leaves(build.abstract(config))
    return {
        one.name: one.axes.to_tensor([made[key] for key in one.keys]) for one in names.match_tensors(layout, leaves)
    }


def save_flax(directory, tensors):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory, traverse_util.unflatten_dict(tensors, sep="/"))
    return directory


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3 with images", "t5gemma"])
def test_official_trees(tmp_path, family):
    config = FAMILIES[family]
    (tmp_path / "kaggle").mkdir()
    save_flax(tmp_path / "kaggle" / "tiny", nested(config))
    (tmp_path / "kaggle" / "tokenizer.model").write_bytes(b"pieces")
    back = import_model(tmp_path / "kaggle", tmp_path / "back", config=config)
    assert bits(back) == bits(open_model(save(tmp_path / "ours", config)))
    assert back.tokenizer["kind"] == "sentencepiece"
    assert back.provenance["layout"].startswith("official Flax")


def test_queries_keys_and_values_in_one_tensor(tmp_path):
    """So they are where there are as many key/value heads as query heads, but for cross-attention."""
    side = dataclasses.replace(tiny.GEMMA2, kv_heads=4)
    config = dataclasses.replace(tiny.T5GEMMA, encoder=dataclasses.replace(side, width=24), decoder=side)
    tensors = nested(config)
    for name in [name for name in tensors if name.endswith("/attn/q_einsum/w")]:
        stem = name.removesuffix("q_einsum/w")
        together = [tensors.pop(name)[None], tensors.pop(f"{stem}kv_einsum/w")]
        tensors[f"{stem}qkv_einsum/w"] = np.concatenate(together)
    back = open_foreign(save_flax(tmp_path / "tree", tensors), config)
    assert bits(back) == bits(open_model(save(tmp_path / "ours", config)))


def test_rows_for_the_hardware_are_cut(tmp_path):
    """256128 rows of 256000 that count."""
    config = dataclasses.replace(tiny.GEMMA2, vocab_size=256_000, width=8, heads=2, layers=1, mlp_width=4)
    tensors = nested(config)
    table = tensors["embedder/input_embedding"]
    tensors["embedder/input_embedding"] = np.concatenate([table, np.full((128, 8), 7, np.float32)])
    opened = open_foreign(save_flax(tmp_path / "tree", tensors), config)
    np.testing.assert_array_equal(opened.leaves["embedder.table", None].read(), table)
    assert opened.provenance["notes"] == [
        "embedder/input_embedding has 256128 rows, of which the first 256000 are the vocabulary; the others were cut"
    ]
    tensors["embedder/input_embedding"] = table  # as others have cut it before
    assert open_foreign(save_flax(tmp_path / "cut", tensors), config).provenance["notes"] == []


def test_an_official_tree_of_no_released_size(tmp_path):
    path = save_flax(tmp_path / "tree", nested(tiny.GEMMA3))
    message = (
        r"official Flax Gemma: embedder/input_embedding \[97, 32\]; 3 layers\) is none of the released sizes; "
        r"name its architecture: config = a size's name, such as gemma3:1b, or a file like model.json"
    )
    with pytest.raises(UserError, match=message):
        open_foreign(path)
    with pytest.raises(UserError, match=r"according to the given config, are not those of official Flax Gemma"):
        open_foreign(path, tiny.GEMMA2)


def shapes_of(config):
    """The official tree of a released size, as shapes."""
    layout = flax_names.T5GEMMA if isinstance(config, EncoderDecoderConfig) else flax_names.GEMMA
    found = {}
    for one in names.match_tensors(layout, tree.leaves(build.abstract(config))):
        found[one.name] = one.shape
        if one.name.endswith("gating_einsum") and one.shape[1] < 4096:  # the large ones are transposed
            found[one.name] = (2, one.shape[2], one.shape[1])
    return found


OFFICIAL = [name for name in SIZES if not name.startswith(("t5gemma2", "medsiglip"))]


@pytest.mark.parametrize("name", OFFICIAL)
def test_released_sizes_are_known_by_their_shapes(tmp_path, monkeypatch, name):
    """With 262144 rows, where transformers has 64 more for the image token, which has no row then."""
    config = SIZES[name]
    if isinstance(config, TextConfig):
        config = dataclasses.replace(config, vocab_size=min(config.vocab_size, 262_144))
    found = {
        name: Tensor(shape, np.dtype("float32"), lambda: pytest.fail("read"))
        for name, shape in shapes_of(config).items()
    }
    monkeypatch.setattr(flax_tree, "is_flax", lambda _: True)
    monkeypatch.setattr(flax_tree, "read", lambda _: found)
    assert open_foreign(tmp_path).config == config


def test_a_file_that_was_cut_short(tmp_path, hugging_face):
    theirs = hugging_face(tiny.GEMMA3)
    opened = open_foreign(theirs)
    os.truncate(theirs / "model.safetensors", (theirs / "model.safetensors").stat().st_size - 8)
    with pytest.raises(UserError, match="was cut short while it was in use"):
        [leaf.read() for leaf in opened.leaves.values()]


def test_an_architecture_of_another_kind_is_said(tmp_path):
    """Of an official tree, which does not say its own."""
    save_flax(tmp_path / "flax", nested(tiny.GEMMA3_IMAGES))
    others = [tiny.T5GEMMA2, tiny.SIGLIP, dataclasses.replace(tiny.GEMMA3_IMAGES, tied_head=False)]
    for config in others:
        with pytest.raises(UserError, match=r"official Flax Gemma has no tensor for \d+ weights of this architecture"):
            open_foreign(tmp_path / "flax", config)


def test_a_given_config_that_overrules_the_folders_own_is_told(hugging_face):
    given = dataclasses.replace(tiny.GEMMA3, window=100)
    told = open_foreign(hugging_face(tiny.GEMMA3), given).provenance["notes"]
    assert told == ["the given config overrules config.json: changed  window: 4 -> 100"]


def test_pickles_alone_and_files_are_said(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"?")
    with pytest.raises(UserError, match=r"only as pickles \(pytorch_model.bin\), which can run code"):
        open_any(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model.bin is a file; give the folder that it is in"):
        open_any(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("config", [tiny.GEMMA3_IMAGES, tiny.T5GEMMA2_IMAGES, tiny.SIGLIP])
def test_images_of_another_size(tmp_path, hugging_face, config):
    """Only the position embeddings change, and they are those of the function."""
    source = hugging_face(config)
    opened = open_foreign(source)
    made = import_model(source, tmp_path / "larger", image_size=32)
    for key, leaf in made.leaves.items():
        if key == ("vision.positions", None):
            expected = resample_positions(opened.leaves[key].read(), 8)
            np.testing.assert_array_equal(leaf.read(), expected)
        else:
            np.testing.assert_array_equal(leaf.read(), opened.leaves[key].read())
    with pytest.raises(UserError, match="image_size = 30 and patch_size = 4"):
        import_model(source, tmp_path / "odd", image_size=30)
    assert not (tmp_path / "odd").exists()


def test_images_of_another_size_need_a_tower(tmp_path, hugging_face):
    with pytest.raises(UserError, match=r"image_size = 32, and .* has no image tower"):
        import_model(hugging_face(tiny.GEMMA3), tmp_path / "out", image_size=32)


def test_what_transformers_computes_otherwise_is_told(tmp_path):
    assert export_model(save(tmp_path / "a", tiny.GEMMA3), tmp_path / "b") == []
    [told] = export_model(save(tmp_path / "c", tiny.T5GEMMA), tmp_path / "d")
    assert told.startswith("inputs longer than 3 tokens: the encoder's window was trained with 2 tokens on each side")
    narrow = dataclasses.replace(tiny.GEMMA3_IMAGES, window=2)
    [told] = export_model(save(tmp_path / "e", narrow), tmp_path / "f")
    assert told.startswith("an image of 4 tokens, which is bounded by the window of 2 here")


@pytest.mark.parametrize("field", ["tie_word_embeddings"])
def test_true_and_false_are_no_texts(hugging_face, field):
    folder = hugging_face(tiny.GEMMA3)
    reconfigure(folder, **{field: "false"})
    with pytest.raises(UserError, match=rf"{field} = 'false'; .*true or false"):
        open_foreign(folder)


def test_an_unknown_dtype_is_said(tmp_path, hugging_face):
    source = hugging_face(tiny.GEMMA3)
    for use in (import_model, export_model):
        with pytest.raises(UserError, match="unknown dtype of weights 'bfloat'; did you mean 'bfloat16'"):
            use(source, tmp_path / "out", dtype="bfloat")
