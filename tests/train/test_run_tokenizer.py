"""The tokenizer of a run: that of its weights, unless another one is meant."""

import dataclasses
import json
import shutil

import pytest

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint import import_folder
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import HuggingFace, SentencePiece
from t5g2.jobs import dry_run
from t5g2.models.config import to_dict
from t5g2.train import experiment as experiments
from t5g2.train import resume, run_tokenizer
from tests import tiny
from tests.data import tokenizer_files
from tests.weights import model as model_of

# room for every id of the tests' tokenizers
DECODER = dataclasses.replace(tiny.GEMMA3, vocab_size=768)
ENCODER_DECODER = dataclasses.replace(tiny.T5GEMMA2, encoder=DECODER, decoder=DECODER)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Model folders by name; the tokenizers are trained once."""
    root = tmp_path_factory.mktemp("weights")
    pieces = HuggingFace(str(tokenizer_files.huggingface(root)))
    model = tokenizer_files.sentencepiece(root)
    for name, config in (("decoder", DECODER), ("encoder_decoder", ENCODER_DECODER)):
        params = model_of(config)
        folders.save_model(root / name, params, tokenizer=pieces.to_dict(), extra_files=(*pieces.files, model))
    folders.save_model(root / "without", model_of(DECODER))
    return root


def node(model=DECODER, **parts):
    decoder_only = model is DECODER
    data = {
        "sources": [{"text": {"kind": "python"}, "objective": {"kind": "causal" if decoder_only else "ul2"}}],
        "rows": 8,
        "encoder_length": 0 if decoder_only else 64,
        "decoder_length": 64,
        "chunk_tokens": 32,
        "streams": 8,
    }
    data |= parts.pop("data", {})
    optim = {"schedule": {"kind": "constant", "peak": 1e-3}}
    return {"model": to_dict(model), "data": data, "optim": optim, "train": {"steps": 2}, **parts}


def tokenizer_of(node):
    return experiments.build(node).data.tokenizer


def test_left_out_it_is_that_of_the_weights(weights):
    pieces = HuggingFace(str(weights / "tokenizer.json"))
    assert tokenizer_of(node(init={"params": str(weights / "decoder")})) == pieces
    adapt = {"adapt": {"source": str(weights / "decoder")}}
    assert tokenizer_of(node(ENCODER_DECODER, init=adapt)) == pieces
    two = {"adapt": {"source": f"{weights / 'decoder'},{weights / 'decoder'}"}}
    assert tokenizer_of(node(ENCODER_DECODER, init=two)) == pieces
    assert tokenizer_of(node(distill={"teacher": str(weights / "decoder")})) == pieces
    of_weights = {"tokenizer": {"kind": "of_weights"}}
    assert tokenizer_of(node(init={"params": str(weights / "decoder")}, data=of_weights)) == pieces


def test_without_weights_it_is_bytes():
    assert tokenizer_of(node()) == Bytes()
    other = {"tokenizer": {"kind": "of_weights", "without_weights": {"kind": "bytes", "sentinels": 5}}}
    assert tokenizer_of(node(data=other)) == Bytes(5)
    with pytest.raises(UserError, match=r"unknown key 'sentinels' of config\.data\.tokenizer of kind 'of_weights'"):
        tokenizer_of(node(data={"tokenizer": {"kind": "of_weights", "sentinels": 5}}))


def test_weights_without_a_tokenizer_need_one(weights):
    init = {"params": str(weights / "without")}
    with pytest.raises(UserError, match=r"init\.params, .*without has no tokenizer .*give data\.tokenizer"):
        tokenizer_of(node(init=init))
    experiment = experiments.build(node(init=init, data={"tokenizer": {"kind": "bytes"}}))
    line = run_tokenizer.check(experiment.data.tokenizer, experiment.init, experiment.model)
    assert "bytes of 364 tokens; the weights of init.params" in line


def test_the_place_of_a_tokenizer_is_no_setting(weights, tmp_path):
    """Its content is: a run goes on with the same file elsewhere, and not with another one."""
    first, second = experiments.build(node(init={"params": str(weights / "decoder")})), tmp_path / "tokenizer.json"
    pieces = json.loads((weights / "tokenizer.json").read_text())
    for content, same in ((json.dumps(pieces | {"version": "1.0"}, indent=7), False), (None, True)):
        if content is None:
            shutil.copy(weights / "tokenizer.json", second)
        else:
            second.write_text(content)
        given = node(init={"params": str(weights / "decoder")}, data={"tokenizer": HuggingFace(str(second))})
        other = experiments.build(given)
        assert (experiments.fingerprint(other) == experiments.fingerprint(first)) is same
        assert experiments.former_fingerprint(other) != experiments.former_fingerprint(first)
        if same:
            assert resume.check_resume(experiments.dump(first), experiments.dump(other)) == {}
        else:
            with pytest.raises(UserError, match=r"(?s)changed  data\.tokenizer\.file: .*data\.tokenizer\.sha256: "):
                resume.check_resume(experiments.dump(first), experiments.dump(other))


def test_no_weight_is_opened_for_a_tokenizer(weights, monkeypatch):
    # a config is built often, and opening a foreign folder reads the copies of tied weights
    def fail(*_, **__):
        raise AssertionError("weights were opened")

    for module, name in ((folders, "open_model"), (import_folder, "open_any")):
        monkeypatch.setattr(module, name, fail)
    adapt = {"adapt": {"source": str(weights / "decoder")}}
    pieces = HuggingFace(str(weights / "tokenizer.json"))
    assert tokenizer_of(node(ENCODER_DECODER, init=adapt)) == pieces
    assert tokenizer_of(node(init={"params": str(weights / "decoder")})) == pieces
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        tokenizer_of(node(init={"params": str(weights / "nowhere")}))


def test_another_one_is_refused_unless_it_is_meant(weights):
    init = {"params": str(weights / "decoder")}
    experiment = experiments.build(node(init=init, data={"tokenizer": {"kind": "bytes"}}))
    check = lambda **kw: run_tokenizer.check(experiment.data.tokenizer, experiment.init, experiment.model, **kw)  # noqa: E731
    with pytest.raises(UserError, match=r"data\.tokenizer is bytes of .*belong to huggingface tokenizer\.json"):
        check()
    assert "on purpose another one than huggingface" in check(allow_change=("data.tokenizer",))
    # `check`, too, before anything is compiled
    with pytest.raises(UserError, match=r"--allow_change=data\.tokenizer"):
        dry_run.check(experiment)


def test_the_other_file_of_the_same_tokenizer_is_the_same(weights, tmp_path):
    init = {"params": str(weights / "decoder")}
    # beside the weights, and a copy of it elsewhere
    copy = shutil.copy(weights / "tokenizer.model", tmp_path / "copy.model")
    for file in (weights / "decoder" / "tokenizer.model", copy):
        experiment = experiments.build(node(init=init, data={"tokenizer": SentencePiece(str(file))}))
        line = run_tokenizer.check(experiment.data.tokenizer, experiment.init, experiment.model)
        assert line.endswith(f"the one of init.params, {weights / 'decoder'}")
    # another vocabulary in a file of the same name
    changed = json.loads((weights / "tokenizer.json").read_text())
    first, second = [piece for piece in changed["model"]["vocab"] if piece.isalpha()][:2]
    vocabulary = changed["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    other = HuggingFace(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="their embeddings would be those of other tokens"):
        run_tokenizer.check(other, experiment.init, experiment.model)
