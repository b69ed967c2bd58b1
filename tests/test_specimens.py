"""Files of earlier versions still load: configs, workdirs, checkpoints, shards, model folders, sweeps.

specimens/VERSION.tar.xz holds a folder `specimen` that version wrote: config.py and sweep.py with the text they read,
runs/ (workdirs, some with their last checkpoint), tokens/ and logits/ (shards), exported/ (a Hugging Face folder),
sweep/ (a finished sweep), configs/ and experiments/ (that version's own), models/ (a tiny model folder of each kind,
and what it computed with them: outputs.npz) and cache/ (tokens of the text, and the list of the valid images of
images/). A version that changes a format adds a specimen of its own and leaves the others alone.
"""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import PIL
import pytest

import t5g2
from t5g2 import cli
from t5g2.checkpoint.folder import open_model
from t5g2.checkpoint.import_folder import open_any
from t5g2.core import sharding as meshes
from t5g2.core.errors import UserError
from t5g2.core.sharding import MeshShape
from t5g2.data import images
from t5g2.data.shards import token_cache
from t5g2.data.shards.token_shards import Tokens
from t5g2.data.sources.image_text import ImageJsonl
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.sweep import launch, sweep_file
from t5g2.sweep.launchers.local import Local
from t5g2.train import config_file, restore, resume
from t5g2.train import experiment as experiments
from t5g2.train import plan as plans
from t5g2.train import workdir as workdirs
from tests.e2e.conftest import environment

ARMS = ("source", "adapted", "scratch", "distilled", "cached", "tokens", "sft")


SPECIMENS = sorted((Path(__file__).parent / "specimens").glob("*.tar.xz"))


@pytest.fixture(scope="module", params=SPECIMENS, ids=lambda p: p.name)
def extracted(request, tmp_path_factory):
    """The folder of a specimen, which no test changes."""
    folder = tmp_path_factory.mktemp("extracted")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder / "specimen"


@pytest.fixture
def specimen(extracted, tmp_path):
    """A copy that the test may change, without the checkpoints, which are nine of ten files."""
    return shutil.copytree(extracted, tmp_path / "specimen", ignore=shutil.ignore_patterns("checkpoints"))


@pytest.fixture
def checkpoint(arm, extracted, specimen):
    """The checkpoint of a run of the specimen."""
    folder = Path("runs", arm, "checkpoints")
    return shutil.copytree(extracted / folder, specimen / folder)


@pytest.fixture(autouse=True)
def in_specimen(specimen, monkeypatch, one_device):
    monkeypatch.chdir(specimen)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("arm", ARMS)
def test_a_config_and_the_experiment_that_was_saved_of_it_are_one(arm):
    now = experiments.dump(config_file.load(f"config.py:{arm}"))
    saved = Path(f"runs/{arm}/experiment.json")
    if saved.exists():
        assert resume.check_resume(json.loads(saved.read_text()), now) == {}
    for objective in (source["objective"]["kind"] for source in now["data"]["sources"]):
        assert objective == {"source": "causal", "sft": "sft"}.get(arm, "ul2")


def test_keys_and_paths_under_their_former_names():
    """In an override, and in the settings that may differ on resume."""
    shorter = config_file.load("config.py:source", [("data.piece_tokens", "20")])
    assert shorter.data.chunk_tokens == 20
    saved = json.loads(Path("runs/source/experiment.json").read_text())
    changed = resume.check_resume(saved, experiments.dump(shorter), allow=("data.piece_tokens",))
    assert changed == {"data.chunk_tokens": (40, 20)}


@pytest.mark.parametrize("arm", ["adapted", "sft"])
def test_hashes_outlive_new_names(arm, checkpoint):
    """The hash of the experiment that the checkpoint was saved with; keys and a kind have other names now."""
    meta = json.loads((checkpoint / "4/meta/data.json").read_text())["body"]["run"]
    assert experiments.fingerprint(config_file.load(f"config.py:{arm}")) == meta["experiment"]


def test_a_key_under_both_of_its_names_is_refused():
    node = config_file.read("config.py:source")
    node["data"]["chunk_tokens"] = 20
    with pytest.raises(UserError, match=r"piece_tokens is the former name of chunk_tokens, and both are given"):
        experiments.build(node)


@pytest.mark.parametrize("arm", ["adapted", "sft"])
def test_a_run_goes_on_from_its_checkpoint(arm, checkpoint, capfd):
    """Two steps more; the metrics of the steps before stay, so the batches after them are the next ones."""
    before = lines(f"runs/{arm}/metrics.jsonl")
    flags = [f"--config=config.py:{arm}", f"--workdir=runs/{arm}", "--config.train.steps=6"]
    assert cli.main(["train", *flags]) == 0
    assert "weights: from step 4 of the workdir" in capfd.readouterr().err
    after = lines(f"runs/{arm}/metrics.jsonl")
    assert after[: len(before)] == before
    assert [row["step"] for row in after if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (Path(f"runs/{arm}/model") / "model.json").exists()


@pytest.mark.parametrize("arm", ["adapted", "sft"])
def test_a_checkpoint_comes_back_on_a_mesh(arm, checkpoint, devices):
    """Bit for bit the state that one device has; that a run goes on from it is tested above."""
    workdir, experiment = Path(f"runs/{arm}"), config_file.load(f"config.py:{arm}")
    states = []
    for shape in (MeshShape(), MeshShape(data=2, fsdp=2, tensor=2)):
        mesh = meshes.make(shape, devices[: 1 if shape == MeshShape() else 8])
        plan = plans.make(experiment, mesh)
        with jax.set_mesh(mesh), workdirs.open_checkpoints(workdir, experiment, read_only=True) as checkpoints:
            start = restore.restore(workdir, plan, checkpoints)
        assert start.step == 4
        for leaf, abstract in zip(*map(jax.tree.leaves, (start.state, plan.abstract)), strict=True):
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
        states.append(jax.device_get(start.state))
    for alone, cut in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(cut, alone)


def test_token_shards_are_the_tokens_of_the_text():
    documents = Tokens("tokens/text").open()
    tokenizer = Bytes()
    texts = [path.read_text() for path in sorted(Path("text").glob("*.txt"))]
    assert [tokenizer.decode(documents.tokens(i, tokenizer)) for i in range(len(documents))] == texts
    assert cli.main(["tokenize", "--config=config.py:source", "--out=tokens", "--shards=2"]) == 0  # nothing to do


def test_teacher_logits_are_those_of_the_teacher():
    """With distill.teacher beside the cache, fingerprints of the teacher and of the chunks are compared."""
    teacher, one_step = "--config.distill.teacher=runs/source/model", "--config.train.steps=3"
    assert cli.main(["train", "--config=config.py:cached", "--workdir=runs/again", teacher, one_step]) == 0
    first, again = (
        {
            row["step"]: row["train/divergence"]
            for row in lines(f"runs/{run}/metrics.jsonl")
            if "train/divergence" in row
        }
        for run in ("cached", "again")
    )
    assert again[1] == pytest.approx(first[1], rel=1e-5)


def test_model_folders():
    model = t5g2.load("runs/adapted/model")
    exported = open_any("exported")
    folder = open_model("runs/adapted/model")
    assert folder.provenance is not None
    assert exported.config.decoder == folder.config.decoder
    for key, leaf in folder.leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf.read()), np.asarray(exported.leaves[key].read()))
    assert len(model.generate(["the cat"], max_new_tokens=4)) == 1


TOKENS = np.array([[2, 9, 10, 11, 12, 13, 14], [2, 15, 16, 17, 18, 19, 20]])
WITH_IMAGE = np.array([[2, 9, 6, 8, 8, 8, 8, 7, 10, 11]])
IMAGE = (np.arange(16 * 16 * 3).reshape(16, 16, 3) * 7 % 256).astype(np.uint8)
SIGLIP_TEXTS = np.array([[3, 4, 5, 1, 1, 1], [6, 7, 8, 9, 1, 1]])
OUTPUTS = {
    "gemma2": lambda model: model.logits(TOKENS),
    "gemma3": lambda model: model.logits(TOKENS),
    "gemma3-images": lambda model: model.logits(WITH_IMAGE, images=[[IMAGE]]),
    "t5gemma": lambda model: model.logits(TOKENS, TOKENS[:, ::-1]),
    "t5gemma2": lambda model: model.logits(TOKENS, TOKENS[:, ::-1]),
    "t5gemma2-images": lambda model: model.logits(TOKENS[:1], WITH_IMAGE, images=[[IMAGE]]),
    "siglip": lambda model: model.similarity([IMAGE, IMAGE[::-1]], SIGLIP_TEXTS),
}


def test_a_model_of_each_kind_computes_what_it_did():
    assert {path.name for path in Path("models").iterdir() if path.is_dir()} == set(OUTPUTS)
    expected = np.load("models/outputs.npz")
    for name, outputs in OUTPUTS.items():
        actual = outputs(t5g2.load(f"models/{name}"))
        np.testing.assert_allclose(actual, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


CONFIGS = {
    "chat_small": "",
    "gemma": ":gemma3:1b",
    "quickstart": ":adapted",
    "t5gemma": ":2b-2b",
    "t5gemma2": ":4b-4b",
    "t5gemma2_images": ":images/pairs.jsonl",
    "t5gemma_small": ":adapted-64",
}


def test_configs_load_with_the_modules_that_they_import(monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", "cache")
    assert {path.stem for path in Path("configs").glob("*.py")} == set(CONFIGS)
    loaded = {name: config_file.load(f"configs/{name}.py{argument}") for name, argument in CONFIGS.items()}
    chat = experiments.dump(loaded["chat_small"])["data"]["sources"][0]
    assert chat["objective"]["kind"] == "sft"
    assert chat["objective"]["ends"] == [chat["text"]["end_of_turn"]]
    # former modules are there for config files alone
    assert not {"t5g2.data.chat", "t5g2.data.copies", "t5g2.data.tokenizer"} & sys.modules.keys()


def test_a_name_that_a_former_module_never_had(tmp_path):
    (tmp_path / "config.py").write_text("from t5g2.data.chat import nothing\ndef get_config(): ...\n")
    with pytest.raises(UserError, match=r"line 1: ImportError: cannot import name 'nothing' from 't5g2.data.chat'"):
        config_file.load(str(tmp_path / "config.py"))


def test_sweep_files_load():
    assert [len(sweep_file.load(path).parts) for path in sorted(Path("experiments").glob("*.py"))] == [3, 3]


def test_cached_tokens_are_those_of_the_text(monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", "cache")
    text = config_file.load("config.py:source").data.sources[0].text.open()
    monkeypatch.setattr(Bytes, "encode", None)  # nothing is tokenised again
    documents = token_cache.cached_tokens(text, Bytes())
    decoded = [Bytes().decode(documents.tokens(i, Bytes())) for i in range(len(documents))]
    assert decoded == [text[i] for i in range(len(text))]


def test_valid_images_are_not_decoded_again(monkeypatch):
    monkeypatch.setenv("T5G2_CACHE", "cache")
    source = ImageJsonl("images/pairs.jsonl")
    name = hashlib.sha256(f"{Path(source.path).absolute()} {PIL.__version__}".encode()).hexdigest()[:16]
    Path("cache/pairs.images").rename(f"cache/{name}.images")
    monkeypatch.setattr(images, "read", None)
    assert len(source.open()) == 1


@pytest.mark.parametrize("spelling", [Path, Path.absolute])
def test_a_finished_sweep_is_finished(capfd, spelling):
    """Nothing runs again: every part has the hash that it had, whatever way to its workdir is given now."""
    fails = shlex.join([sys.executable, "-c", "raise SystemExit(9)"])
    launch.run(sweep_file.load("sweep.py"), spelling(Path("sweep")), Local(program=fails))
    out = capfd.readouterr().out
    assert out.count("already done") == 7
    assert Path("sweep/report/index.html").exists()


def test_a_run_is_reported_without_jax():
    code = (
        "import sys; from t5g2 import cli; cli.main(['report', '--workdir=runs/source']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.endswith("False\n")
