"""Runs whose first weights or teacher are at Hugging Face's hub: the commit is recorded, and read from then on."""

import dataclasses
import json
import logging
import re

import pytest

from t5g2 import cli
from t5g2.checkpoint import folder as folders
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.models.config import to_dict
from t5g2.train import adaptation, files_of_weights, image_rows
from t5g2.train import experiment as experiments
from t5g2.train import workdir as workdirs
from t5g2.train.weight_origin import Adapt, Init, pinned
from tests import hub_cache, tiny, weights
from tests.data import tokenizer_files
from tests.hub_cache import COMMIT, OTHER_COMMIT

DECODER = dataclasses.replace(tiny.GEMMA3, vocab_size=768)
ENCODER_DECODER = dataclasses.replace(tiny.T5GEMMA2, encoder=DECODER, decoder=DECODER)
DECODER_ADDRESS, ADDRESS = "hf://owner/decoder", "hf://owner/encoder-decoder"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A machine that does not ask the hub, whose cache has a decoder-only model and an encoder-decoder one."""
    root = tmp_path_factory.mktemp("hub")
    pieces = HuggingFace(str(tokenizer_files.huggingface(root)))
    with hub_cache.empty(root / "cache", offline=True) as folder:
        for name, config in (("decoder", DECODER), ("encoder-decoder", ENCODER_DECODER)):
            folders.save_model(
                root / name,
                weights.model(config),
                tokenizer=pieces.to_dict(),
                generation_config={"eos_token_id": [1, 106]},
                extra_files=pieces.files,
            )
            hub_cache.add(folder, f"owner/{name}", root / name)
        yield folder


def node(model, **parts):
    decoder_only = model is DECODER
    source = {"text": {"kind": "python"}, "objective": {"kind": "causal" if decoder_only else "ul2"}}
    lengths = {"encoder_length": 0 if decoder_only else 64, "decoder_length": 64, "chunk_tokens": 32}
    return {
        "model": to_dict(model),
        "data": {"sources": [source], "rows": 8, "streams": 8, **lengths},
        "optim": {"schedule": {"kind": "constant", "peak": 1e-3}},
        "train": {"steps": 2},
        **parts,
    }


def test_a_run_records_the_commit_of_its_weights(cache):
    """The record is read in a process that knows another commit of the branch, and is the same experiment."""
    experiment = experiments.build(node(ENCODER_DECODER, init={"params": ADDRESS}))
    assert experiment.init.params == f"{ADDRESS}@{COMMIT}"
    assert isinstance(experiment.data.tokenizer, HuggingFace)
    refs = cache / "models--owner--encoder-decoder" / "refs" / "main"
    try:
        refs.write_text(OTHER_COMMIT)
        hub_cache.forget()
        again = experiments.build(json.loads(json.dumps(experiments.dump(experiment))))
    finally:
        refs.write_text(COMMIT)
        hub_cache.forget()
    assert experiments.fingerprint(again) == experiments.fingerprint(experiment)
    opened = adaptation.open_same_architecture(experiment.init.params, ENCODER_DECODER)
    assert opened.path.name == COMMIT


def test_a_run_that_goes_on_keeps_its_commits(cache, tmp_path):
    """A commit to the branch, as of a README, ends no run that was preempted; another address is another setting."""
    config = node(ENCODER_DECODER, init={"params": ADDRESS}, distill={"teacher": DECODER_ADDRESS})
    experiment = experiments.build(config)
    workdirs.write_experiment(tmp_path, experiment, None)
    refs = cache / "models--owner--decoder" / "refs"
    try:
        for name in ("main", "new"):
            (refs / name).write_text(OTHER_COMMIT)
        hub_cache.forget()
        workdirs.recall_commits(tmp_path)
        assert experiments.build(config) == experiment
        assert pinned({"distill": {"teacher": f"{DECODER_ADDRESS}@new"}})["distill"]["teacher"].endswith(OTHER_COMMIT)
    finally:
        (refs / "main").write_text(COMMIT)
        hub_cache.forget()


def test_every_setting_that_names_a_model_is_pinned(cache):
    two = {"adapt": {"source": f"{DECODER_ADDRESS},models/mine", "vision": DECODER_ADDRESS}}
    plain = pinned({"init": two, "distill": {"teacher": f"{DECODER_ADDRESS}@main"}})
    commit = f"{DECODER_ADDRESS}@{COMMIT}"
    assert plain == {
        "init": {"adapt": {"source": f"{commit},models/mine", "vision": commit}},
        "distill": {"teacher": commit},
    }
    assert pinned(plain) == plain
    # what a wrong type is told by is not here
    assert pinned({"init": None, "distill": {"teacher": 3}}) == {"init": None, "distill": {"teacher": 3}}


def test_the_files_beside_the_weights_come_along(cache):
    for init in ({"params": ADDRESS}, {"adapt": {"source": DECODER_ADDRESS}}):
        experiment = experiments.build(node(ENCODER_DECODER, init=init))
        read = files_of_weights.read(experiment.init, experiment)
        assert read.generation_config == {"eos_token_id": [1, 106]}
        assert [file.name for file in read.files] == ["generation_config.json", "tokenizer.json"]
    image_rows.check_processor(None, Init(adapt=Adapt(DECODER_ADDRESS)))


def test_a_model_of_the_hub_is_adapted(cache, tmp_path, capsys):
    out = tmp_path / "adapted"
    flags = [f"--source={DECODER_ADDRESS}", "--target=t5gemma2", f"--out={out}"]
    assert cli.main(["adapt", *flags]) == 0, capsys.readouterr().err
    assert folders.open_model(out).provenance["source"] == f"{DECODER_ADDRESS}@{COMMIT}"


def test_the_architecture_of_a_model_of_the_hub(cache):
    experiment = experiments.build(node(ENCODER_DECODER) | {"model": {"folder": ADDRESS}})
    assert experiment.model == ENCODER_DECODER


def test_a_run_does_not_go_on_from_the_hub(cache):
    message = r"resume = 'hf://owner/decoder' is an address of the hub, .*begin with the weights alone: init.params"
    with pytest.raises(UserError, match=message):
        experiments.build(node(DECODER, init={"resume": DECODER_ADDRESS}))


def test_a_config_of_a_model_that_is_not_there_is_wrong(cache):
    with pytest.raises(UserError, match="hf://owner/other: the hub cannot be reached"):
        experiments.build(node(DECODER, init={"params": "hf://owner/other"}))


def test_a_record_whose_tokenizer_is_gone_with_the_hubs_cache(cache, tmp_path, caplog):
    """The error is about the tokenizer's file, which the hub might have; that it cannot be asked is a warning."""
    record = {"kind": "huggingface", "file": str(tmp_path / "tokenizer.json"), "sha256": "0" * 64}
    given = node(DECODER, init={"params": f"hf://owner/gone@{COMMIT}"})
    given["data"]["tokenizer"] = record
    with caplog.at_level(logging.WARNING, logger="t5g2"), pytest.raises(UserError, match="no tokenizer file"):
        experiments.build(given)
    assert re.search(r"tokenizer\.json is gone, and hf://owner/gone@.* cannot be looked into .* reached", caplog.text)
