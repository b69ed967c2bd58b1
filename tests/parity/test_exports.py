"""Folders that we write, as transformers loads them, and folders that it writes, as we load them.

Runs wherever torch and transformers are installed. In CI on Python 3.11, where they are pinned, their absence fails.
"""

import json
import os
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from t5g2.checkpoint import hf_config_fields, hf_config_reader, hf_config_writer
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.checkpoint.import_folder import import_model, open_foreign
from t5g2.core.batch import Sequences, image_blocks
from t5g2.eval.generation import GenerationOptions, Prompts, generate
from t5g2.models.config import EncoderDecoderConfig
from tests import tiny, weights
from tests.checkpoint import test_flax_tree as trees
from tests.checkpoint import test_hf_config_reader as files
from tests.parity import cases

if not (os.environ.get("CI") and sys.version_info[:2] == (3, 11)):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
AUTO = {
    "gemma2": transformers.AutoModelForCausalLM,
    "gemma3_text": transformers.AutoModelForCausalLM,
    "gemma3": transformers.AutoModelForImageTextToText,
    "t5gemma": transformers.AutoModelForSeq2SeqLM,
    "t5gemma2": transformers.AutoModelForSeq2SeqLM,
    "siglip": transformers.AutoModel,
}
CONFIGS = {name: case.config for name, case in cases.ALL.items()} | {
    "t5gemma 2: without an end-of-image token": replace(tiny.T5GEMMA2, eoi_id=None),
    "siglip: tiny": tiny.SIGLIP,
    "siglip: odd": replace(
        tiny.SIGLIP,
        vision=replace(tiny.SIGLIP.vision, layers=1, heads=4, image_size=18, patch_size=3),
        text=replace(tiny.SIGLIP.text, layers=3, heads=5, length=5),
    ),
}
# as transformers has it; as trained, T5Gemma's window is one narrower (test_live.py)
FAMILIES = {
    "gemma 2": tiny.GEMMA2,
    "gemma 3": tiny.GEMMA3,
    "gemma 3 with images": tiny.GEMMA3_IMAGES,
    "t5gemma": replace(tiny.T5GEMMA, encoder_window="each_side_inclusive"),
    "t5gemma 2": tiny.T5GEMMA2,
    "t5gemma 2 with images": tiny.T5GEMMA2_IMAGES,
}


def export(folder, config):
    """A Hugging Face folder in small files, and the model folder that it was made from."""
    save_model(folder / "ours", weights.on_host(config))
    export_model(folder / "ours", folder / "hf", shard_bytes=20_000)
    return folder / "hf"


def load(directory):
    """Returns what the Auto class makes of a folder; transformers accounts for every tensor."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    model, loading_info = AUTO[kind].from_pretrained(directory, output_loading_info=True)
    assert set(loading_info) >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    assert not any(loading_info.values()), loading_info
    return model.eval()


def bits(opened):
    return {key: (str(leaf.dtype), leaf.shape, leaf.read().tobytes()) for key, leaf in opened.leaves.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_auto_classes_load_what_we_write_and_we_load_what_they_write(tmp_path, name):
    directory = export(tmp_path, CONFIGS[name])
    assert len(list(directory.glob("*.safetensors"))) > 1
    model = load(directory)
    assert type(model).__name__ == json.loads((directory / "config.json").read_text())["architectures"][0]
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    back = import_model(tmp_path / "theirs", tmp_path / "back")
    assert bits(back) == bits(open_model(tmp_path / "ours"))
    described = [hf_config_writer.write(config, dtype="float32") for config in (back.config, CONFIGS[name])]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", ["gemma 3 with images", "t5gemma 2 with images", "t5gemma 2", "t5gemma"])
def test_models_made_in_transformers(tmp_path, name):
    """Made there, not loaded from a file, they are saved under other names."""
    directory = export(tmp_path, FAMILIES[name])
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "back")
    export_model(tmp_path / "back", tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    for tensor, expected in model.state_dict().items():
        if FAMILIES[name] is tiny.T5GEMMA2 and ("vision" in tensor or "multi_modal" in tensor):
            continue  # it has no images: the tower that transformers needs is a placeholder
        assert torch.equal(again[tensor], expected), tensor


def test_tied_tensors_are_stored_once(tmp_path):
    model = load(export(tmp_path, tiny.T5GEMMA2))
    tables = [model.lm_head.out_proj.weight, model.model.decoder.embed_tokens.weight]
    table = model.model.encoder.text_model.embed_tokens.weight
    assert all(other.data_ptr() == table.data_ptr() for other in tables)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert [name for name in index["weight_map"] if "embed_tokens.weight" in name or "lm_head" in name] == [
        "model.encoder.embed_tokens.weight"
    ]


LENGTH, NEW, PAD = 19, 32, 0


def prompt(config):
    """Two rows of tokens, with an image in each if the model reads them, and the images, or None."""
    encoder_decoder = isinstance(config, EncoderDecoderConfig)
    side = config.encoder if encoder_decoder else config
    tokens = np.random.RandomState(5).randint(10, 90, (2, LENGTH)).astype(np.int32)
    tokens[:, 0] = 2
    if side.images is None:
        return tokens, None
    tokens[:, 7:13] = [side.images.begin, *[side.images.token] * side.images.tokens, side.images.end]
    size = side.images.vision.image_size
    return tokens, np.random.RandomState(6).uniform(-1, 1, (2, 1, size, size, 3)).astype(np.float32)


def stream(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Sequences(tokens, np.ones_like(tokens), positions)


def ours_greedy(config, tokens, images):
    encoder, start = None, stream(tokens)
    if isinstance(config, EncoderDecoderConfig):
        encoder, start = start, stream(np.full((2, 1), 2, np.int32))
    elif images is not None:
        start = start._replace(blocks=image_blocks(tokens, config.images.token))
    options = GenerationOptions(NEW, stop_ids=(), pad_id=PAD)
    generated = generate(weights.model(config), Prompts(start, encoder, images), options=options)
    return np.asarray(generated.tokens_PnN[:, 0])


def theirs_greedy(model, config, tokens, images):
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.ones(tokens.shape).long()}
    if images is not None:
        inputs["pixel_values"] = torch.tensor(images[:, 0].transpose(0, 3, 1, 2))
        if not isinstance(config, EncoderDecoderConfig):
            inputs["token_type_ids"] = torch.tensor(tokens == config.images.token).long()
    model.generation_config.eos_token_id = None  # to the full length
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, -NEW:].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens(tmp_path, name):
    """With caches on both sides, past every window."""
    config = FAMILIES[name]
    tokens, images = prompt(config)
    expected = theirs_greedy(load(export(tmp_path, config)), config, tokens, images)
    assert expected.shape == (2, NEW)
    assert len(set(expected.ravel().tolist())) > 3
    np.testing.assert_array_equal(ours_greedy(config, tokens, images), expected)


def test_dual_encoder(tmp_path):
    config = CONFIGS["siglip: odd"]
    draw = np.random.RandomState(7)
    size = config.vision.image_size
    images = draw.uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
    texts = draw.randint(0, config.text.vocab_size, (2, config.text.length)).astype(np.int32)
    theirs = load(export(tmp_path, config))
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        expected = theirs(input_ids=torch.tensor(texts).long(), pixel_values=pixels)

    @jax.jit
    def ours(model, images, texts):
        seen, read = (
            of(x, compute=tiny.FLOAT32) for of, x in ((model.embed_images, images), (model.embed_texts, texts))
        )
        return seen, read, model.logits(read, seen)

    seen, read, logits = ours(weights.model(config), images, texts)
    np.testing.assert_allclose(seen, expected.image_embeds.numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(read, expected.text_embeds.numpy(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits, expected.logits_per_text.numpy(), atol=1e-5, rtol=0)


# ---- the official layout, made of transformers' tensors as google-deepmind/gemma's own converter would ----
def official_stack(hf, config, at, *, t5, cross_heads=None):
    """The official NESTED tree of one stack, in transposes and reshapes of its own."""
    norms = {"pre_attention_norm": "pre_self_attn", "post_attention_norm": "post_self_attn"} if t5 else {}
    norms = norms or {"pre_attention_norm": "input", "post_attention_norm": "post_attention"}
    norms |= {"pre_ffw_norm": "pre_feedforward", "post_ffw_norm": "post_feedforward"}
    if cross_heads:
        norms |= {"pre_cross_attention_norm": "pre_cross_attn", "post_cross_attention_norm": "post_cross_attn"}
    tree = {"embedder/input_embedding": hf[f"{at}embed_tokens.weight"], "final_norm/scale": hf[f"{at}norm.weight"]}
    for i in range(config.layers):
        here, there = f"{at}layers.{i}.", f"layer_{i}/"
        for name, theirs in norms.items():
            tree[f"{there}{name}/scale"] = hf[f"{here}{theirs}_layernorm.weight"]
        for attention, name in [("self_attn", "attn"), *([("cross_attn", "cross_attn")] if cross_heads else [])]:
            q, k, v, o = (hf[f"{here}{attention}.{x}_proj.weight"] for x in "qkvo")
            n, h = config.heads, config.head_size
            heads = lambda w: np.stack([head.T for head in w.reshape(-1, config.head_size, w.shape[1])])  # noqa: E731
            tree[f"{there}{name}/q_einsum/w"] = heads(q)
            tree[f"{there}{name}/kv_einsum/w"] = np.stack([heads(k), heads(v)])
            tree[f"{there}{name}/attn_vec_einsum/w"] = o.T.reshape(n, h, -1)
            for norm in ("query", "key") if config.qk_norm else ():
                tree[f"{there}{name}/_{norm}_norm/scale"] = hf[f"{here}{attention}.{norm[0]}_norm.weight"]
        gates = np.stack([hf[f"{here}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        tree[f"{there}mlp/gating_einsum"] = gates if config.qk_norm else gates.transpose(0, 2, 1)
        tree[f"{there}mlp/linear"] = hf[f"{here}mlp.down_proj.weight"].T
    return tree


def official_tower(hf, vision):
    siglip, block = "vision_encoder/siglip_encoder/", "vision_encoder/siglip_encoder/Transformer/encoderblock_"
    at = "vision_tower.vision_model."
    tree = {
        f"{siglip}embedding/kernel": hf[f"{at}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        f"{siglip}embedding/bias": hf[f"{at}embeddings.patch_embedding.bias"],
        f"{siglip}pos_embedding": hf[f"{at}embeddings.position_embedding.weight"][None],
        f"{siglip}Transformer/encoder_norm/scale": hf[f"{at}post_layernorm.weight"],
        f"{siglip}Transformer/encoder_norm/bias": hf[f"{at}post_layernorm.bias"],
        "embedder/mm_input_projection/w": hf["multi_modal_projector.mm_input_projection_weight"],
        "embedder/mm_soft_embedding_norm/scale": hf["multi_modal_projector.mm_soft_emb_norm.weight"],
    }
    n, d = vision.heads, vision.width
    for i in range(vision.layers):
        here, there = f"{at}encoder.layers.{i}.", f"{block}{i}/"
        for number in (0, 1):
            tree[f"{there}LayerNorm_{number}/scale"] = hf[f"{here}layer_norm{number + 1}.weight"]
            tree[f"{there}LayerNorm_{number}/bias"] = hf[f"{here}layer_norm{number + 1}.bias"]
            tree[f"{there}MlpBlock_0/Dense_{number}/kernel"] = hf[f"{here}mlp.fc{number + 1}.weight"].T
            tree[f"{there}MlpBlock_0/Dense_{number}/bias"] = hf[f"{here}mlp.fc{number + 1}.bias"]
        attention = f"{there}MultiHeadDotProductAttention_0/"
        for name in ("query", "key", "value"):
            theirs = f"{here}self_attn.{name[0]}_proj."
            tree[f"{attention}{name}/kernel"] = hf[f"{theirs}weight"].T.reshape(d, n, d // n)
            tree[f"{attention}{name}/bias"] = hf[f"{theirs}bias"].reshape(n, d // n)
        tree[f"{attention}out/kernel"] = hf[f"{here}self_attn.out_proj.weight"].T.reshape(n, d // n, d)
        tree[f"{attention}out/bias"] = hf[f"{here}self_attn.out_proj.bias"]
    return tree


def stored(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    from safetensors.numpy import load_file  # the library's reader, not ours

    return {name: x for file in sorted(set(index.values())) for name, x in load_file(directory / file).items()}


@pytest.mark.parametrize("variant", ["nested", "flat", "stacked"])
@pytest.mark.parametrize("name", ["gemma 2", "gemma 3", "gemma 3 with images"])
def test_official_trees_of_gemma(tmp_path, name, variant):
    config = FAMILIES[name]
    hf = stored(export(tmp_path, config))
    at = "model." if config.images is None else "language_model.model."
    tree = official_stack(hf, config, at, t5=False)
    if config.images is not None:
        tree |= official_tower(hf, config.images.vision)
    trees.save(tmp_path / "flax", trees.VARIANTS[variant](tree))
    assert bits(open_foreign(tmp_path / "flax", config)) == bits(open_foreign(tmp_path / "hf"))


@pytest.mark.parametrize("variant", ["nested", "flat", "stacked"])
def test_official_trees_of_t5gemma(tmp_path, variant):
    config = FAMILIES["t5gemma"]
    hf = stored(export(tmp_path, config))
    tree = {}
    for side, stack, cross in [("encoder", config.encoder, None), ("decoder", config.decoder, 4)]:
        made = official_stack(hf, stack, f"model.{side}.", t5=True, cross_heads=cross)
        tree |= {f"{side}/{name}": x for name, x in made.items()}
    trees.save(tmp_path / "flax", trees.VARIANTS[variant](tree))
    assert bits(open_foreign(tmp_path / "flax", config)) == bits(open_foreign(tmp_path / "hf"))


# ---- config.json, as transformers reads it ----
@pytest.mark.parametrize("name", files.RELEASED)
def test_released_files_mean_the_same_to_transformers(name):
    """A file in the old spelling is to it, written in its new one, as we read the old one."""
    data = files.RELEASED[name]
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)))
    assert hf_config_reader.read(json.loads(theirs.to_json_string(use_diff=False))) == hf_config_reader.read(data)
    assert hf_config_reader.read(json.loads(theirs.to_json_string())) == hf_config_reader.read(data)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (hf_config_fields.GEMMA2_DEFAULTS, transformers.Gemma2Config),
        (hf_config_fields.GEMMA2_DEFAULTS, transformers.T5GemmaModuleConfig),
        (hf_config_fields.GEMMA3_DEFAULTS, transformers.Gemma3TextConfig),
        (hf_config_fields.GEMMA3_DEFAULTS, transformers.T5Gemma2DecoderConfig),
        (hf_config_fields.VISION_DEFAULTS, transformers.SiglipVisionConfig),
        (hf_config_fields.SIGLIP_TEXT_DEFAULTS, transformers.SiglipTextConfig),
        (hf_config_fields.IMAGE_TOKENS, transformers.Gemma3Config),
        (hf_config_fields.IMAGE_TOKENS, transformers.T5Gemma2EncoderConfig),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_absent_fields_are_what_they_are_in_transformers(ours, theirs):
    default = theirs()
    derived = {"rope_theta", "rope_local_base_freq", "projection_size"}  # in other fields, and compared above
    for field in ours.keys() - derived:
        assert getattr(default, field, ours[field]) == ours[field], field
