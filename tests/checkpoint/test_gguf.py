"""GGUF files that the library gguf wrote, of every type that it can write, read as Hugging Face folders."""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest

import t5g2
from t5g2 import cli
from t5g2.checkpoint import gguf_tokenizer
from t5g2.checkpoint.import_folder import import_model, open_any, read_tokenizer
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.train import adaptation
from t5g2.train.weight_origin import Adapt
from tests import hub_cache

# every row is a multiple of 256 numbers, the longest block
WIDTH, MLP, HEADS, KV_HEADS, HEAD, LAYERS = 256, 512, 4, 4, 64, 2
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>", "  ", "\n"]
TYPES = [3, 3, 3, 2, 3, 3, 4, 4]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]
TYPES += [6] * 256
WORDS = ["▁a", "th", "the", "▁the", "at", "cat", "▁cat"]
PIECES += [*"▁abceht", *WORDS]
TYPES += [1] * (7 + len(WORDS))
SCORES = [0.0] * (8 + 256 + 7) + [-float(n) for n in range(len(WORDS))]
WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def arrays():
    """The tensors of a file, float32; norms hold 1 + scale."""
    draw = np.random.RandomState(0)
    shapes = {"token_embd": (len(PIECES), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        of_layer = {
            **dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (WIDTH,)),
            **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD,)),
            "attn_q": (HEADS * HEAD, WIDTH),
            **dict.fromkeys(("attn_k", "attn_v"), (KV_HEADS * HEAD, WIDTH)),
            "attn_output": (WIDTH, HEADS * HEAD),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (MLP, WIDTH)),
            "ffn_down": (WIDTH, MLP),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    # quarters, which every float type holds exactly with 1 added
    return {
        name: 1 + draw.randint(-3, 4, shape).astype(np.float32) / 4
        if "norm" in name
        else draw.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(path, kind="F32", *, architecture="gemma3", change=lambda writer: None, tensors=None):
    """Writes a file, matrices in the type of this name; returns what its tensors hold, dequantised by the library."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(16)
    if architecture == "gemma3":
        writer.add_rope_freq_base(1_000_000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    change(writer)
    stored, type_of = {}, gguf.GGMLQuantizationType[kind]
    for name, value in (arrays() if tensors is None else tensors).items():
        if architecture == "gemma2" and name.endswith(("q_norm", "k_norm")):
            continue
        of = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else type_of
        data = gguf.quants.quantize(value, of)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=of)
        stored[name] = gguf.quants.dequantize(data, of).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_type_that_the_library_can_write(tmp_path, kind):
    stored = write(tmp_path / "model.gguf", kind)
    opened = open_any(tmp_path / "model.gguf")
    leaves = {key: np.asarray(leaf.read(), np.float32) for key, leaf in opened.leaves.items()}
    np.testing.assert_array_equal(leaves["embedder.table", None], stored["token_embd"])
    np.testing.assert_array_equal(leaves["final_norm.scale", None], stored["output_norm"] - 1)
    for layer in range(LAYERS):
        of = {name.split(".")[2]: value for name, value in stored.items() if name.startswith(f"blk.{layer}.")}
        q = of["attn_q"].reshape(HEADS, HEAD, WIDTH).transpose(2, 0, 1)
        np.testing.assert_array_equal(leaves["layers.attention.q", layer], q)
        np.testing.assert_array_equal(leaves["layers.mlp.down", layer], of["ffn_down"].T)
        np.testing.assert_array_equal(leaves["layers.attention.k_norm.scale", layer], of["attn_k_norm"] - 1)
    expected = ml_dtypes.bfloat16 if kind == "BF16" else np.float32
    assert {leaf.dtype for leaf in opened.leaves.values()} == {np.dtype(expected)}
    is_quantised = kind not in ("F32", "F16", "BF16")
    assert any(f"tensors are {kind}" in note for note in opened.provenance["notes"]) == is_quantised


def test_every_type_is_tried():
    """Of the library that is installed: a type that it learns to write is to be added above."""

    def can_write(kind):
        try:
            gguf.quants.quantize(np.zeros((1, 256), np.float32), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name for kind in gguf.GGMLQuantizationType if can_write(kind)} <= set(WRITABLE)


def test_the_architecture_is_that_of_the_metadata(tmp_path):
    write(tmp_path / "model.gguf")
    config = open_any(tmp_path / "model.gguf").config
    assert (config.width, config.mlp_width, config.layers, config.heads, config.kv_heads) == (256, 512, 2, 4, 4)
    assert (config.head_size, config.window, config.vocab_size, config.norm_eps) == (64, 16, len(PIECES), 1e-6)
    assert (config.rope_global.base, config.rope_local.base) == (1e6, 1e4)
    assert config.query_scalar is None
    assert (config.attention_softcap, config.final_softcap, config.qk_norm) == (None, None, True)
    notes = open_any(tmp_path / "model.gguf").provenance["notes"]
    assert "not in the file, and assumed: rope_local_base_freq = 10000.0" in notes

    write(tmp_path / "second.gguf", architecture="gemma2")
    config = open_any(tmp_path / "second.gguf").config
    assert (config.attention_softcap, config.final_softcap, config.qk_norm) == (50.0, 30.0, False)

    def scaled(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    write(tmp_path / "scaled.gguf", change=scaled)
    assert open_any(tmp_path / "scaled.gguf").config.rope_global.factor == 8.0


def test_an_import_and_a_generation(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0")
    imported = import_model(tmp_path / "model.gguf", tmp_path / "ours")
    assert imported.provenance["source"] == str(tmp_path / "model.gguf")
    direct, ours = t5g2.load(tmp_path / "model.gguf"), t5g2.load(tmp_path / "ours")
    assert direct.stop_ids == ours.stop_ids == (1,)
    assert direct.generate(["the cat"], max_new_tokens=4) == ours.generate(["the cat"], max_new_tokens=4)
    # a folder with the file alone is the same
    (tmp_path / "hub").mkdir()
    (tmp_path / "model.gguf").rename(tmp_path / "hub" / "model.gguf")
    assert open_any(tmp_path / "hub").config == imported.config


def test_the_metadata_is_read_once(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf")
    first = open_any(tmp_path / "model.gguf")
    monkeypatch.setattr(gguf, "GGUFReader", None)
    again = open_any(tmp_path / "model.gguf")
    assert again.path == first.path
    np.testing.assert_array_equal(again.leaves["layers.mlp.up", 1].read(), first.leaves["layers.mlp.up", 1].read())


def test_the_tokenizer(tmp_path):
    write(tmp_path / "model.gguf")
    description = read_tokenizer(tmp_path / "model.gguf")
    assert description is not None
    tokenizer = HuggingFace(str(open_any(tmp_path / "model.gguf").path / "tokenizer.json"))
    spelled = [PIECES[token] for token in tokenizer.encode("the cat  é\n")]
    assert spelled == ["the", "▁cat", "▁▁".replace("▁", " "), "<0xC3>", "<0xA9>", "\n"]
    assert tokenizer.decode(tokenizer.encode("the cat  é\n")) == "the cat  é\n"
    # markers of a user's own are no special tokens, although the file calls them control tokens
    ids = tokenizer.special_tokens
    assert tokenizer.decode([ids.eos, 5], skip_special_tokens=True) == "<unused0>"
    assert (ids.bos, ids.eos, ids.pad, ids.first_byte) == (2, 1, 0, 8)


def test_merges_of_the_docstring():
    assert gguf_tokenizer.merges(["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -1, -2, -3]) == [
        ["a", "b"],
        ["b", "c"],
        ["ab", "c"],
        ["a", "bc"],
    ]


def refused(path, message):
    with pytest.raises(UserError, match=message):
        open_any(path)


def test_files_that_cannot_be_read(tmp_path, cache):
    write(tmp_path / "model.gguf", "Q8_0")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:-100])
    refused(tmp_path / "cut.gguf", r"cut\.gguf (ends within the tensor|is no whole GGUF file)")
    for length in (0, 3, 20, 1000):
        (tmp_path / f"head{length}.gguf").write_bytes(content[:length])
        refused(tmp_path / f"head{length}.gguf", "is no whole GGUF file .*; download it again")
    (tmp_path / "text.gguf").write_bytes(b"not a model " * 10)
    refused(tmp_path / "text.gguf", "is no whole GGUF file")
    write(tmp_path / "llama.gguf", architecture="llama")
    refused(tmp_path / "llama.gguf", r"unknown architecture 'llama' of .*\. Allowed: gemma2, gemma3")
    write(tmp_path / "more.gguf", tensors=arrays() | {"rope_freqs": np.ones(64, np.float32)})
    refused(tmp_path / "more.gguf", r"has the tensor rope_freqs\.weight, which Gemma 2 and Gemma 3 do not have")
    few = {name: value for name, value in arrays().items() if name != "blk.1.ffn_up"}
    write(tmp_path / "few.gguf", tensors=few)
    refused(tmp_path / "few.gguf", r"model\.layers\.1\.mlp\.up_proj\.weight")
    write(tmp_path / "part.gguf", change=lambda writer: writer.add_uint16("split.count", 3))
    refused(tmp_path / "part.gguf", "is one of 3 parts; merge them first")
    refused(tmp_path, r"holds \d+ GGUF files .*; give one of them")
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_a_file_that_is_gone(tmp_path):
    write(tmp_path / "model.gguf")
    folder = open_any(tmp_path / "model.gguf").path
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(UserError, match=r"model\.gguf is gone or has changed since"):
        open_any(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3_text"


def test_without_the_library(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(tmp_path / "model.gguf", r"gguf is not installed; run `pip install 't5g2\[gguf\]'`")


def test_an_adaptation_of_a_file(tmp_path):
    """By the command and at the start of a run, with its tokenizer and the tokens that end a text."""
    source = tmp_path / "model.gguf"
    write(source, "BF16")
    assert cli.main(["adapt", f"--source={source}", "--target=t5gemma2", f"--out={tmp_path / 'adapted'}"]) == 0
    adapted = t5g2.load(tmp_path / "adapted")
    np.testing.assert_array_equal(
        adapted.params.embedder.table[...], np.asarray(open_any(source).leaves["embedder.table", None].read())
    )
    tokenizer = adaptation.source_tokenizer(Adapt(source=str(source)), adapted.config)
    assert tokenizer is not None
    assert tokenizer.encode("the cat").tolist() == adapted.tokenizer.encode("the cat").tolist()
    assert isinstance(adapted.tokenizer, HuggingFace)
    assert adapted.stop_ids == (1,)


def test_a_file_of_the_hub_is_recorded_with_its_commit(tmp_path):
    (tmp_path / "repository").mkdir()
    for kind in ("F32", "Q8_0"):
        write(tmp_path / "repository" / f"tiny-{kind}.gguf", kind)
    with hub_cache.empty(tmp_path / "hub", offline=True) as folder:
        hub_cache.add(folder, "owner/tiny", tmp_path / "repository")
        opened = open_any("hf://owner/tiny/tiny-Q8_0.gguf")
    assert opened.provenance is not None
    assert opened.provenance["source"] == f"hf://owner/tiny@{hub_cache.COMMIT}/tiny-Q8_0.gguf"
    assert any("are Q8_0" in note for note in opened.provenance["notes"])
