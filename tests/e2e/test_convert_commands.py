"""import, export and generate with foreign folders, as a user gives them: the results, and every mistake in words."""

import dataclasses
import json
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from PIL import Image

from t5g2 import cli
from t5g2.checkpoint import export_folder, flax_names, names, safetensors_io
from t5g2.checkpoint.folder import open_model, save_model
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import tree
from t5g2.models import build
from t5g2.models.config import to_dict
from tests import tiny, weights
from tests.data import tokenizer_files
from tests.e2e.conftest import run

PIECES = 405


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders as others would give them: T5Gemma 2 with images, text-only Gemma, SigLIP, an official Flax tree."""
    root = tmp_path_factory.mktemp("foreign")
    images = dataclasses.replace(tiny.IMAGES, token=402, begin=400, end=401)
    encoder = dataclasses.replace(tiny.GEMMA3, vocab_size=PIECES, images=images)
    decoder = dataclasses.replace(encoder, images=None)
    configs = {
        "t5gemma2": dataclasses.replace(tiny.T5GEMMA2, encoder=encoder, decoder=decoder, eoi_id=401),
        "gemma": decoder,
        "siglip": tiny.SIGLIP,
    }
    for name, config in configs.items():
        save_model(root / f"{name}-ours", weights.model(config))
        export_folder.export_model(root / f"{name}-ours", root / name)
        tokenizer_files.huggingface(root / name, t5gemma2=True)
    leaves = weights.weights(decoder)
    tied = names.match_tensors(flax_names.GEMMA, tree.leaves(build.abstract(decoder)))
    arrays = {one.name: one.axes.to_tensor([leaves[key] for key in one.keys]) for one in tied}
    (root / "flax").mkdir()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(root / "flax" / "gemma", traverse_util.unflatten_dict(arrays, sep="/"))
    tokenizer_files.sentencepiece(root / "flax")
    (root / "gemma.json").write_text(json.dumps(to_dict(decoder)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "photo.png")
    return root


def t5g2(capsys, *arguments):
    """Returns what a command prints whose exit status is 0."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fails(capsys, *arguments, status=2):
    """Returns the stderr of a command."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_in_and_out_in_processes_of_their_own(made, tmp_path):
    """The same folder comes out that went in, to the byte; and it says the same."""
    imported = run("import", f"--source={made / 't5gemma2'}", f"--out={tmp_path / 'model'}")
    assert "parameters" in imported.stdout
    run("export", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'again'}")
    again = content(tmp_path / "again")
    # the one file that the folder lacked, without which transformers pads with nothing
    assert json.loads(again.pop("tokenizer_config.json"))["pad_token"] == "<pad>"
    assert again == content(made / "t5gemma2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]


def test_any_folder_answers(made, tmp_path, capsys):
    t5g2(capsys, "import", f"--source={made / 't5gemma2'}", f"--out={tmp_path / 'model'}")
    flags = ["--prompt=What is <start_of_image>?", f"--image={made / 'photo.png'}", "--max_new_tokens=5"]
    flags += ["--temperature=2", "--seed=3"]
    said = [t5g2(capsys, "generate", f"--model={model}", *flags) for model in (made / "t5gemma2", tmp_path / "model")]
    assert said[0] == said[1]
    two = t5g2(
        capsys,
        "generate",
        f"--model={tmp_path / 'model'}",
        "--prompt=a",
        f"--image={made / 'photo.png'},{made / 'photo.png'}",
    )
    assert two.endswith("\n")


def test_an_official_tree_whose_size_is_told(made, tmp_path, capsys):
    message = fails(capsys, "import", f"--source={made / 'flax'}", f"--out={tmp_path / 'model'}")
    assert "is none of the released sizes" in message
    told = f"--config={made / 'gemma.json'}"
    t5g2(capsys, "import", f"--source={made / 'flax'}", f"--out={tmp_path / 'model'}", told)
    theirs, ours = open_model(tmp_path / "model"), open_model(made / "gemma-ours")
    for key, leaf in ours.leaves.items():
        np.testing.assert_array_equal(theirs.leaves[key].read(), leaf.read(), err_msg=str(key))
    assert t5g2(capsys, "generate", f"--model={tmp_path / 'model'}", "--prompt=import", "--max_new_tokens=2")


def damage(folder, how):
    """A copy of the text-only Hugging Face folder that lacks something."""
    for file in (folder.parent / "made" / "gemma").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    how(folder)


def without_a_tensor(folder):
    arrays = {n: t.read() for n, t in safetensors_io.read(folder).items() if "layers.1.mlp.up" not in n}
    tensors = {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
    (folder / safetensors_io.SINGLE).unlink()
    safetensors_io.write(folder, tensors, single_file=safetensors_io.SINGLE)


def cut_short(folder):
    data = (folder / safetensors_io.SINGLE).read_bytes()
    (folder / safetensors_io.SINGLE).write_bytes(data[: len(data) // 2])


DAMAGES = {
    "a tensor": (without_a_tensor, ["missing", "model.layers.1.mlp.up_proj.weight"]),
    "half a file": (cut_short, ["model.safetensors", "truncated"]),
    "the config": (lambda folder: (folder / "config.json").unlink(), ["no config.json", "gemma3:1b"]),
    "JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not JSON"]),
    "weights": (lambda folder: (folder / safetensors_io.SINGLE).unlink(), ["holds no weights"]),
    "a known model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), ["llama"]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_folder_that_lacks_something(made, tmp_path, capsys, what):
    how, parts = DAMAGES[what]
    (tmp_path / "made").symlink_to(made)
    (tmp_path / "damaged").mkdir()
    damage(tmp_path / "damaged", how)
    for command, source in (("import", "--source"), ("export", "--model")):
        message = fails(capsys, command, f"{source}={tmp_path / 'damaged'}", f"--out={tmp_path / 'out'}")
        for part in parts:
            assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "made"]


def test_wrong_command_lines(made, tmp_path, capsys):
    out, photo = f"--out={tmp_path / 'out'}", f"--image={made / 'photo.png'}"
    gemma, siglip = made / "gemma", made / "siglip"
    cases = [
        (["import", out], ["--source is missing"]),
        (["import", f"--source={gemma}"], ["--out is missing"]),
        (["import", f"--sorce={gemma}", out], ["unknown flag '--sorce' of t5g2 import", "did you mean '--source'"]),
        (["import", "--source=/nowhere/at/all", out], ["/nowhere/at/all does not exist"]),
        (["import", f"--source={tmp_path}", out], ["holds no known model"]),
        (["import", f"--source={made / 'gemma-ours'}", out], ["is a model folder already"]),
        (["import", f"--source={gemma}", f"--out={made / 'flax'}"], ["flax exists already"]),
        (["import", f"--source={gemma}", out, "--config=gemma3:2b"], ["gemma3:2b", "gemma3:1b"]),
        (["import", f"--source={gemma}", out, "--config=gemma3:1b"], ["embed_tokens", "262144"]),
        (["import", f"--source={gemma}", out, "--config=nowhere.json"], ["nowhere.json does not exist"]),
        (["import", f"--source={gemma}", out, "--config.width=3"], ["--config.width cannot be changed here"]),
        (["import", f"--source={gemma}", out, "--verify=maybe"], ["verify", "maybe"]),
        (["export", "--model=/nowhere/at/all", out], ["/nowhere/at/all"]),
        (["export", f"--model={made / 'gemma-ours'}", f"--out={gemma}"], ["gemma exists already"]),
        (["generate", "--model=/nowhere/at/all", "--prompt=x"], ["/nowhere/at/all does not exist"]),
        (
            ["generate", f"--model={gemma}", "--prompt=x", photo],
            ["images are given, but this model has no image tower"],
        ),
        (["generate", f"--model={siglip}", "--prompt=x"], ["a dual encoder has no logits of tokens and generates no"]),
        (["generate", f"--model={made / 't5gemma2'}", "--prompt=x", "--image=/nowhere.png"], ["/nowhere.png"]),
        (
            ["generate", f"--model={gemma}", "--input=x", "--out=y", photo],
            ["--image belongs to the prompt"],
        ),
        (["generate", f"--model={made / 'gemma-ours'}", "--prompt=x"], ["has no tokenizer"]),
    ]
    for arguments, parts in cases:
        message = fails(capsys, *arguments)
        for part in parts:
            assert part in message, (arguments, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("import", "--source"), ("export", "--model")], ids=lambda pair: pair[0])
def test_stopped_halfway_nothing_is_left(made, tmp_path, capsys, monkeypatch, command):
    """Ctrl-C while a tensor is read: what was written until then is taken away again."""
    reads = []
    original = safetensors_io.read

    def interrupted(folder, **named):
        def read(tensor):
            reads.append(tensor)
            if len(reads) == 8:
                assert len(list(tmp_path.iterdir())) == 1  # it is being written
                raise KeyboardInterrupt
            return tensor.read()

        return {n: dataclasses.replace(t, read=lambda t=t: read(t)) for n, t in original(folder, **named).items()}

    monkeypatch.setattr(safetensors_io, "read", interrupted)
    name, flag = command
    fails(capsys, name, f"{flag}={made / 'gemma'}", f"--out={tmp_path / 'out'}", status=130)
    assert len(reads) == 8
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_command(capsys):
    told = t5g2(capsys, "--help")
    assert re.search(r"t5g2 import +Writes a model folder", told)
    with_flags = t5g2(capsys, "import", "--help")
    assert with_flags.startswith("t5g2 import\n")
    assert "--verify" in with_flags
