"""A fresh export, used as its model card would: transformers' tokenizer and `generate` give our text."""

import dataclasses
import json
import shutil

import pytest

import t5g2
from t5g2 import cli
from t5g2.checkpoint import bos, generation_ids
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.import_folder import import_model
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.models.config import EncoderDecoderConfig
from tests import tiny, weights
from tests.data import tokenizer_files

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

PROMPT = "The string module of Python"
IMPORTED = {"kind": "import", "source": "x", "notes": []}


def with_vocabulary(config):
    """The model with a row for every id of the tests' tokenizers."""
    if isinstance(config, EncoderDecoderConfig):
        encoder, decoder = (dataclasses.replace(side, vocab_size=768) for side in (config.encoder, config.decoder))
        return dataclasses.replace(config, encoder=encoder, decoder=decoder)
    return dataclasses.replace(config, vocab_size=768)


CONFIGS = {
    "gemma2": tiny.GEMMA2,
    "gemma3": tiny.GEMMA3,
    # as transformers has it; as trained, T5Gemma's window is one narrower (test_live.py)
    "t5gemma": dataclasses.replace(tiny.T5GEMMA, encoder_window="each_side_inclusive"),
    "t5gemma2": tiny.T5GEMMA2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    tokenizer_files.huggingface(folder)
    return folder


def model_folder(root, target, name, provenance=None, generation=None):
    config = with_vocabulary(CONFIGS[name])
    tokenizer = HuggingFace(str(root / "tokenizer.json"))
    folders.save_leaves(
        target,
        config,
        tree.leaves(weights.on_host(config)),
        json_files={
            folders.TOKENIZER: tokenizer.to_dict(),
            folders.PROVENANCE: provenance,
            generation_ids.GENERATION_FILE: generation,
        },
        extra_files=tokenizer.files,
    )
    return target


def theirs(folder, *, new_tokens):
    """The ids of the prompt and the generated text, by transformers from the folder alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
    length = 1 if config.is_encoder_decoder else inputs.input_ids.shape[1]
    return inputs.input_ids[0].tolist(), tokenizer.decode(output[length:], skip_special_tokens=True)


@pytest.mark.parametrize("imported", [True, False], ids=["imported", "trained"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_generates_our_text(root, tmp_path, name, imported):
    model_folder(root, tmp_path / "model", name, IMPORTED if imported else None)
    export_model(tmp_path / "model", tmp_path / "export")
    ids, text = theirs(tmp_path / "export", new_tokens=12)
    model = t5g2.load(tmp_path / "model")
    # only what the encoder of a model trained here reads has no BOS
    assert (ids[0] == 2) == (imported or not model.config.is_encoder_decoder)
    assert model.generate([PROMPT], max_new_tokens=12) == [text]
    assert text
    # and read back, it still does; an imported T5Gemma gets the window that it was trained with, not transformers'
    if name != "t5gemma":
        assert t5g2.load(tmp_path / "export").generate([PROMPT], max_new_tokens=12) == [text]


def test_an_export_without_a_tokenizer_config_gets_one(root, tmp_path):
    """By which transformers' tokenizers pad a batch, and give a model no input that it does not take."""
    model_folder(root, tmp_path / "model", "gemma3")
    export_model(tmp_path / "model", tmp_path / "export")
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path / "export")
        inputs = tokenizer(["a longer text", "a"], padding=True, return_tensors="pt")
        assert sorted(inputs) == ["attention_mask", "input_ids"]
        assert inputs.input_ids.min() == tokenizer.pad_token_id == 0
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<bos>", "<eos>", "<unk>")


def config_only(folder, **ids):
    """Leaves config.json as the only file that says the ids."""
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for stack in (config, *(config[key] for key in ("decoder", "encoder", "text_config") if key in config)):
        stack.update(ids)
    (folder / "config.json").write_text(json.dumps(config))


def test_ids_of_config_json_alone_are_kept(root, tmp_path):
    """A source with <bos> 1 and <eos> 2, and several ids that end a text."""
    model_folder(root, tmp_path / "model", "gemma3")
    export_model(tmp_path / "model", tmp_path / "source")
    config_only(tmp_path / "source", bos_token_id=1, eos_token_id=[2, 9], pad_token_id=3)
    expected = generation_ids.GenerationIds(bos=1, eos=(2, 9), pad=3)
    assert generation_ids.read(tmp_path / "source") == expected
    import_model(tmp_path / "source", tmp_path / "imported")
    assert generation_ids.read(tmp_path / "imported") == expected
    assert t5g2.load(tmp_path / "imported").stop_ids == t5g2.load(tmp_path / "source").stop_ids == (2, 9)
    for folder in ("source", "imported"):
        export_model(tmp_path / folder, tmp_path / f"{folder}_out")
        written = json.loads((tmp_path / f"{folder}_out" / "generation_config.json").read_text())
        assert written == {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 3}
        config = json.loads((tmp_path / f"{folder}_out" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 9], 3)


def test_ids_come_from_the_tokenizer_where_no_config_gives_them(root, tmp_path):
    shutil.copy(root / "tokenizer.json", tmp_path)
    assert generation_ids.read(tmp_path) == generation_ids.GenerationIds()
    assert generation_ids.read_with_tokenizer(tmp_path) == generation_ids.GenerationIds(bos=2, eos=(1,), pad=0)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer_files.sentencepiece(tmp_path)
    assert generation_ids.read_with_tokenizer(tmp_path) == generation_ids.GenerationIds(bos=2, eos=(1,), pad=0)


@pytest.mark.parametrize("value", ["1", [1, "2"], -1, True, [[1]], 1.5])
def test_an_id_that_is_none(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id is .*; it must be the id of a token"):
        generation_ids.read(tmp_path)


def test_the_first_token_of_the_decoder_is_the_one_that_the_config_names(root, tmp_path):
    generation = {"decoder_start_token_id": 5, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    model_folder(root, tmp_path / "model", "t5gemma", generation=generation)
    export_model(tmp_path / "model", tmp_path / "export")
    _, text = theirs(tmp_path / "export", new_tokens=12)
    assert t5g2.load(tmp_path / "model").generate([PROMPT], max_new_tokens=12) == [text]


def test_a_post_processor_gets_or_loses_bos_and_keeps_the_rest(root):
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    without = bos.with_bos(tokenizer, added=False)
    assert bos.is_added(tokenizer)
    assert not bos.is_added(without)
    assert without["post_processor"] is None
    assert bos.is_added(bos.with_bos(without, added=True))
    other = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    sequence = {"type": "Sequence", "processors": [other, tokenizer["post_processor"]]}
    assert bos.with_bos(tokenizer | {"post_processor": sequence}, added=False)["post_processor"] == other


def test_prompts_with_bos_or_with_tokens_without_a_row(root, tmp_path, caplog, monkeypatch):
    from t5g2.core.logs import log

    monkeypatch.setattr(log, "propagate", True)
    model = t5g2.load(model_folder(root, tmp_path / "model", "gemma3"))
    twice = model.generate([f"<bos>{PROMPT}"], max_new_tokens=4)
    assert "a prompt begins with <bos> already; BOS is read once" in caplog.text
    assert twice == model.generate([PROMPT], max_new_tokens=4)
    small = dataclasses.replace(with_vocabulary(tiny.GEMMA3), vocab_size=10)
    model.folder = dataclasses.replace(model.folder, config=small)
    with pytest.raises(UserError, match=r"prompts\[1\] has '.*', token \d+, and the embedding has 10 rows"):
        model.generate(["", PROMPT])


def test_what_is_no_prompt_is_named(root, tmp_path):
    model = t5g2.load(model_folder(root, tmp_path / "model", "gemma3"))
    for prompts, message in [
        (["a", None], r"prompts\[1\] is None of type NoneType; it must be a text"),
        ([3], r"prompts\[0\] is 3 of type int; it must be a text"),
        (["ok", "b\ud800"], r"prompts\[1\] has half of a character, U\+D800, at place 1"),
    ]:
        with pytest.raises(UserError, match=message):
            model.generate(prompts)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=r"seed = .*; it must be at least 0 and below 9223372036854775808"):
            model.generate([PROMPT], seed=seed)


def test_the_recommended_sampling_of_a_folder(root, tmp_path):
    recommended = {"top_k": 64, "top_p": 0.95, "eos_token_id": [1, 12]}
    model = t5g2.load(model_folder(root, tmp_path / "gemma", "gemma3", generation=recommended))
    assert model.sampler() == t5g2.Sampling(1.0, 64, 0.95)
    assert model.sampler(temperature=0.5, top_k=0, top_p=1.0) == t5g2.Sampling(0.5)
    plain = t5g2.load(model_folder(root, tmp_path / "plain", "gemma3"))
    assert plain.sampler(top_k=3) == t5g2.Sampling(1.0, 3)
    with pytest.raises(UserError, match=r"p = 0; it must be above 0 and at most 1"):
        plain.sampler(top_p=0)


def test_flags_of_sampling(root, tmp_path, capsys):
    folder = model_folder(root, tmp_path / "model", "gemma3", generation={"top_k": 2, "eos_token_id": 1})
    call = ["generate", f"--model={folder}", f"--prompt={PROMPT}", "--max_new_tokens=4"]
    for flags, message in [
        (["--top_k=3"], "top_k: only sampling uses it; give a temperature above 0 too, such as 1"),
        (["--temperature=1", "--top_p=1.5"], "--top_p=1.5; it must be at most 1"),
        (["--seed=-1"], "--seed=-1; it must be at least 0"),
        (["--log_probs"], "--log_probs belongs to --input: they are written to --out; give both, or leave it out"),
        ([f"--seed={2**63}"], "it must be at most 9223372036854775807"),
        (["--max_new_tokens=99999999999"], "--max_new_tokens=99999999999; it must be at most 16777216"),
    ]:
        assert cli.main([*call, *flags]) == 2
        assert message in capsys.readouterr().err
    model = t5g2.load(folder)
    assert cli.main([*call, "--temperature=1", "--seed=7", "--skip_special_tokens=false"]) == 0
    expected = model.generate(
        [PROMPT], max_new_tokens=4, sampler=t5g2.Sampling(1.0, 2), seed=7, skip_special_tokens=False
    )
    assert capsys.readouterr().out == f"{expected[0]}\n"
