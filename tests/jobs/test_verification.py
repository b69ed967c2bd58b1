"""Verification agrees with transformers where the models agree, and says so where they do not."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest

from t5g2.checkpoint import export_folder, gguf_file, safetensors_io, source_folder
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.checkpoint.import_folder import open_any
from t5g2.checkpoint.tensor import Tensor
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.jobs import reference_model, verification, verification_cases
from t5g2.jobs.verification import OutputDifference
from t5g2.jobs.verification_cases import ModelOutput
from t5g2.jobs.verification_text import TEXT
from tests import tiny, weights
from tests.checkpoint import gguf_files

MUST_RUN = os.environ.get("CI") and sys.version_info[:2] == (3, 11)


def needs(*packages):
    """Skips a test where a package is not installed, unless the test must run there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing and not MUST_RUN), reason=f"{', '.join(missing)} not installed")


live = needs(*reference_model.PACKAGES)
live_gguf = needs(*reference_model.PACKAGES, *reference_model.GGUF_PACKAGES)
SAME = OutputDifference("no padding", 32, 1.7e-6, 0.6, 5e-14, 1.0, 16, 16)


def whole_pattern(config):
    """The config with two layers a stack, one of each kind: a third of them less to compile."""
    if hasattr(config, "pattern"):
        return dataclasses.replace(config, layers=2)
    if hasattr(config, "decoder"):
        return dataclasses.replace(config, encoder=whole_pattern(config.encoder), decoder=whole_pattern(config.decoder))
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of tiny models, made when they are asked for."""
    root = tmp_path_factory.mktemp("verify")

    def made(name):
        if not (root / name).exists():
            save_model(root / f"{name}-ours", weights.model(whole_pattern(getattr(tiny, name))))
            export_folder.export_model(root / f"{name}-ours", root / name)
        return root / name

    return made


@live
@pytest.mark.long
def test_an_image_longer_than_the_window_is_compared_both_ways(tmp_path, capsys):
    save_model(tmp_path / "ours", weights.model(dataclasses.replace(tiny.GEMMA3_IMAGES, layers=2, window=2)))
    export_folder.export_model(tmp_path / "ours", tmp_path / "theirs")
    verification.import_model(tmp_path / "theirs", tmp_path / "model", verify=True)
    assert "images, not bounded" in capsys.readouterr().out


@live
@pytest.mark.long
@pytest.mark.parametrize("name", ["GEMMA2", "GEMMA3_IMAGES", "T5GEMMA", "T5GEMMA2_IMAGES", "SIGLIP"])
def test_what_is_imported_is_what_transformers_has(folders, name, tmp_path, capsys):
    verification.import_model(folders(name), tmp_path / "model", verify=True)
    assert (tmp_path / "model" / "model.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    output = capsys.readouterr().out
    kinds = ["texts and images"]
    if name != "SIGLIP":
        kinds = ["no padding", "padded on the right", "padded on the left", "24 past the window of"]
        kinds += ["images"] if name.endswith("IMAGES") else []
    assert [line for kind in kinds for line in output.splitlines() if line.startswith(kind) and line.endswith("ok")]
    assert output.count("  ok\n") == len(kinds)
    assert "GiB of weights in float32 at a time" in output
    if name == "T5GEMMA":
        assert "each_side_inclusive" in output  # transformers 5.8 to 5.23


@live
@pytest.mark.long
def test_weights_that_an_import_rounds_are_compared_as_they_are_rounded(folders, tmp_path):
    verification.import_model(folders("GEMMA3"), tmp_path / "model", verify=True, dtype="bfloat16")
    assert (tmp_path / "model" / "model.json").is_file()


@live_gguf
@pytest.mark.long
@pytest.mark.parametrize(("architecture", "name"), [("gemma2", "model.gguf"), ("gemma3", "sha256-0a1b")])
def test_a_gguf_file_is_compared_with_what_transformers_reads_of_it(architecture, name, tmp_path, monkeypatch, capsys):
    """So that a tensor which our reader reads wrongly is found: an export of the import would have it too."""
    file = tmp_path / name
    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    gguf_files.write(file, "Q8_0", architecture=architecture)
    verification.import_model(file, tmp_path / "model", verify=True, dtype="bfloat16")
    output = capsys.readouterr().out
    assert f"the reference is {file}, as transformers' own reader of GGUF files reads its weights" in output
    # what it leaves out, of which the files of the tests have one that is not its default
    assert re.findall(r"changed  (.*)", output) == ["query_scalar: 256.0 -> None"]
    assert output.count("  ok\n") == 5

    wrong = "model.layers.1.post_feedforward_layernorm.weight"
    read = gguf_file.read_tensors

    def read_wrongly(*arguments):
        tensors = read(*arguments)
        norm = tensors[wrong]
        return tensors | {wrong: Tensor(norm.shape, norm.dtype, lambda: norm.read() + norm.dtype.type(1))}

    monkeypatch.setattr(gguf_file, "read_tensors", read_wrongly)
    with pytest.raises(SystemExit):
        verification.import_model(file, tmp_path / "wrong", verify=True, dtype="bfloat16")
    assert capsys.readouterr().out.count("  DIFFERS\n") == 5


def test_what_the_reference_is(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "require_packages", lambda **_: None)
    folder, file = folders("GEMMA3"), tmp_path / "only" / "model.gguf"
    opened = open_any(folder)
    assert verification._reference_of(str(folder), None) == folder
    assert verification._description(opened, folder) == [f"the reference is {folder}, as transformers reads it"]
    file.parent.mkdir()
    file.touch()
    assert verification._reference_of(str(file), None) == verification._reference_of(str(file.parent), None) == file
    # other images than the source's, a folder that transformers does not read
    assert verification._reference_of(folder, 448) is verification._reference_of(tmp_path, None) is None
    [line] = verification._description(opened, None)
    assert "an export of this import" in line
    assert "only the computation is compared, and not what was read" in line


@live
@pytest.mark.long
def test_every_difference_is_found(tmp_path):
    """A row of a matrix in every kind of input; a window that is off by one only in inputs that are longer than it, of
    which the text that the folder's tokenizer reads is one.
    """
    ours = tmp_path / "ours"
    model = weights.model(dataclasses.replace(tiny.GEMMA3, window=20, vocab_size=384))
    save_model(ours, model, tokenizer=Bytes().to_dict())
    export_folder.export_model(ours, tmp_path / "theirs")

    def differing(change):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(tmp_path / "theirs", tmp_path / "other")
        change(tmp_path / "other")
        return [row.name for row in verification.compare(ours, tmp_path / "other") if not row.passed]

    def configured(**changes):
        def change(folder):
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    def nudged(folder):
        arrays = {name: tensor.read() for name, tensor in safetensors_io.read(folder).items()}
        arrays["model.layers.1.mlp.up_proj.weight"][0] *= 1.2  # a factor of all would be normed away
        (folder / safetensors_io.SINGLE).unlink()
        tensors = {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
        safetensors_io.write(folder, tensors, single_file=safetensors_io.SINGLE, metadata={"format": "pt"})

    assert differing(lambda folder: None) == []
    assert differing(configured(sliding_window=21)) == ["24 past the window of 20", "512 tokens of text"]
    assert len(differing(nudged)) == 5


def test_a_row_passes_within_all_limits():
    assert SAME.passed
    for worse in ({"error": 0.7e-3}, {"kl": 2e-6}, {"top_5": 0.9}, {"same_tokens": 15}, {"error": float("nan")}):
        assert not OutputDifference(**(vars(SAME) | worse)).passed, worse


def test_outputs_are_compared_by_hand():
    theirs = ModelOutput(np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)), [4, 5, 6])
    ours = ModelOutput(np.log(np.array([[0.25, 0.5, 0.125, 0.125]], np.float32)), [4, 7, 6])
    row = verification._compare_outputs("case", theirs, ours)
    assert row.error == pytest.approx(np.log(2))
    assert row.kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert (row.positions, row.top_5, row.same_tokens, row.tokens) == (1, 1.0, 2, 3)
    assert row.spread == pytest.approx(theirs.logits.std())
    five = verification._compare_outputs(
        "five", ModelOutput(np.arange(7.0)[None], []), ModelOutput(np.array([[2.5, 1, 2, 3, 4, 5, 6]]), [])
    )
    assert five.top_5 == 0  # 2 3 4 5 6, and 0 3 4 5 6


def test_a_long_output_is_compared_in_parts(monkeypatch):
    draw = np.random.default_rng(0)
    outputs = [ModelOutput(draw.normal(3, 2, (7, 11)).astype(np.float32), []) for _ in range(2)]
    whole = verification._compare_outputs("whole", *outputs)
    monkeypatch.setattr(verification, "POSITIONS_AT_A_TIME", 3)
    parts = verification._compare_outputs("parts", *outputs)
    assert dataclasses.astuple(parts)[1:] == pytest.approx(dataclasses.astuple(whole)[1:], rel=1e-12)
    assert whole.spread == pytest.approx(outputs[0].logits.std(), rel=1e-6)


def test_the_table():
    differs = OutputDifference("images", 32, 0.5, 0.5, 0.1, 0.5, 3, 16)
    assert verification.table([SAME, differs]).splitlines() == [
        "inputs      positions  max |d|  in sd    KL       top 5  greedy",
        "no padding  32         1.7e-06  2.8e-06  5.0e-14  100%   16/16   ok",
        "images      32         5.0e-01  1.0e+00  1.0e-01  50%    3/16    DIFFERS",
        "limits: 0.001 sd, KL 1e-06, top 5 95%, every greedy token",
    ]


def test_what_differs_is_set_aside(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verification, "require_packages", lambda: None)
    monkeypatch.setattr(
        verification, "compare", lambda *_, **__: [SAME, OutputDifference("images", 32, 0.5, 0.5, 0.1, 0.5, 3, 16)]
    )
    with pytest.raises(SystemExit) as stop:
        verification.import_model(folders("GEMMA3"), tmp_path / "model", verify=True)
    assert "the model differs from transformers'; it is left as" in str(stop.value.code)  # a text: status 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.unverified"]
    assert "DIFFERS" in capsys.readouterr().out


def test_stopped_while_it_is_verified_nothing_is_left(folders, tmp_path, monkeypatch):
    def stopped(model, reference, *, dtype):
        assert [path.name for path in tmp_path.iterdir()] == ["model.unverified"]
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "require_packages", lambda: None)
    monkeypatch.setattr(verification, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        verification.import_model(folders("GEMMA3"), tmp_path / "model", verify=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["model", "model.unverified"])
def test_nothing_is_downloaded_for_a_folder_that_exists(tmp_path, monkeypatch, there):
    """Of either name, as an import that did not pass has left it."""
    monkeypatch.setattr(verification, "require_packages", lambda: None)
    monkeypatch.setattr(source_folder, "local", lambda source: pytest.fail(f"{source} is downloaded"))
    (tmp_path / there).mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path / there} exists already"):
        verification.import_model("hf://owner/tiny", tmp_path / "model", verify=True)


def test_without_the_reference_nothing_is_begun(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_model, "PACKAGES", ("no_such_torch", "json"))
    message = r"no_such_torch is not installed; run `pip install 't5g2\[hf\]'`, or import without --verify"
    with pytest.raises(UserError, match=message):
        verification.import_model(folders("GEMMA3"), tmp_path / "model", verify=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no_such_torch is not installed"):
        verification.compare(folders("GEMMA3"))


def test_a_text_is_read_once_and_predicted_at_every_position():
    """An encoder reads the first half; the ids that are predicted are those of the text."""
    text = np.arange(100, 700, dtype=np.int64)
    alone, paired = (
        {case.name: case for case in verification_cases.draw_cases(config, text)}["512 tokens of text"]
        for config in (tiny.GEMMA3, tiny.T5GEMMA2_IMAGES)
    )
    (tokens, valid), keep = alone.decoder, alone.keep
    assert (tokens.tolist(), valid.all(), keep) == ([[2, *range(100, 611)]], True, 512)
    assert paired.encoder[0].tolist() == [list(range(100, 356))]
    assert (paired.decoder[0].tolist(), paired.keep) == ([[2, *range(356, 611)]], 256)
    assert not [case.name for case in verification_cases.draw_cases(tiny.GEMMA3) if "text" in case.name]
    *_, last = verification_cases.draw_cases(tiny.T5GEMMA2_IMAGES, text)
    assert last.images is not None


def test_the_text_fills_what_is_compared_and_needs_its_rows(tmp_path):
    """Of Gemma's tokenizer too it has over 512 ids; a tokenizer with more ids than the embedding has none."""
    assert len(TEXT) > 3 * verification_cases.TEXT_TOKENS
    for rows, has_text in ((384, True), (97, False)):
        folder = tmp_path / str(rows)
        save_model(
            folder,
            weights.model(dataclasses.replace(tiny.GEMMA3, vocab_size=rows)),
            tokenizer=Bytes().to_dict(),
        )
        assert (verification._text(open_model(folder)) is not None) == has_text


def test_past_the_window_is_past_every_window():
    """Of both sides, for each of the positions that are compared."""
    for config in (tiny.GEMMA3, tiny.T5GEMMA2):
        [case] = [case for case in verification_cases.draw_cases(config) if "past" in case.name]
        for side in filter(None, (case.decoder, case.encoder)):
            assert side[0].shape[1] - case.keep >= 4
