"""Tasks score the same on one process and on several: every example once, the last batch filled up."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from t5g2 import cli
from t5g2.checkpoint.folder import save_model
from t5g2.core import distributed, files
from t5g2.core import sharding as meshes
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval.choose_by_likelihood import ChooseByLikelihood
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.task_interface import EvalContext
from t5g2.eval.tasks import HeldoutLoss
from t5g2.eval.text_loss import TextLoss
from t5g2.eval.text_retrieval import TextRetrieval
from t5g2.models.loss_config import LossConfig
from t5g2.objectives import Causal
from tests import tiny, weights
from tests.processes import start
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
ROWS = 4
# seven examples: the last batch has three of four rows
RECORDS = [
    {"q": text, "a": text[::-1], "n": n % 2} for n, text in enumerate("one two three four five six seven".split())
]


def scores(text: str) -> dict[str, float]:
    """The scores of every kind of task, on a mesh over all devices of all processes."""
    mesh = meshes.make(meshes.MeshShape())
    rows = meshes.own_rows(mesh, ROWS)
    source = Source(TextFiles(text), Causal())
    data = DataConfig((source,), TOKENIZER, ROWS, 0, 32, 24, streams=ROWS)
    context = EvalContext(data, compute=FLOAT32, loss=LossConfig(tile_tokens=64), mesh=mesh, rows=rows)
    shared = {"data": RECORDS, "template": "{q}"}
    tasks = [
        HeldoutLoss(source.text, Causal(), examples=None),
        TextLoss(data=RECORDS, name="text", target="{q} {a}"),
        ChooseByLikelihood(**shared, name="choice", choices=("no", "yes"), answer="{n}", metrics=("auc",)),
        TextRetrieval(**shared, name="reversed", texts="{a}", ks=(1, 3)),
        GenerateAndCompare(**shared, name="words", reference="{a}", metrics=("chrf",), max_new_tokens=4),
    ]
    with jax.set_mesh(mesh):
        model = jax.device_put(weights.model(STACK), meshes.replicated(mesh))
        return Evaluator(tasks, context).run(model).scores


def one_of_several(folder: str) -> None:
    """Runs one of the processes of the test below."""
    distributed.initialize("on")
    start.interleave()
    assert meshes.own_rows(meshes.make(meshes.MeshShape()), ROWS) == ((0, 2), (1, 3))[jax.process_index()]
    result = scores(str(Path(folder) / "text.txt"))
    (Path(folder) / f"scores-{jax.process_index()}.json").write_text(json.dumps(result))


def test_several_processes_score_as_one(tmp_path, one_device):
    """The devices of the processes in turn, so that the first has rows 0 and 2."""
    (tmp_path / "text.txt").write_text("a text of some words, for chunks of tokens " * 4)
    written = start.run(start.calling("tests.processes.test_evaluation:one_of_several", tmp_path), 2, devices=2)
    expected = scores(str(tmp_path / "text.txt"))
    assert {"heldout/loss", "text/bits_per_byte", "choice/auc", "words/chrf"} <= set(expected)
    for i, output in enumerate(written):
        result = json.loads((tmp_path / f"scores-{i}.json").read_text())
        assert result == pytest.approx(expected, rel=1e-5, abs=1e-5), output


TASKS = """
def get_tasks():
    records = [{"q": text, "a": text[::-1]} for text in "one two three four five six seven".split()]
    shared = {"data": {"kind": "rows", "records": records}}
    asked = {**shared, "template": "{q}"}
    return [
        {"kind": "choose", **asked, "name": "choice", "choices": ["eno", "owt"], "answer": "eno"},
        {"kind": "generate", **asked, "name": "words", "reference": "{a}", "metrics": ["chrf"], "max_new_tokens": 4},
        {"kind": "text_loss", **shared, "name": "loss", "target": "{q} {a}"},
    ]
"""


def test_a_model_folder_is_scored_by_several_processes_as_by_one(tmp_path):
    """Process 0 alone writes, and what keeps it from that ends all."""
    stacks = dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)
    save_model(tmp_path / "model", weights.model(stacks), tokenizer=TOKENIZER.to_dict())
    (tmp_path / "tasks.py").write_text(TASKS)
    command = ["evaluate", f"--model={tmp_path / 'model'}", f"--tasks={tmp_path / 'tasks.py'}", "--rows=4"]
    # six devices, of which four rows can be cut over two alone
    start.run([*start.T5G2, *command, f"--out={tmp_path / 'two'}"], 2, devices=3)
    assert cli.main([*command, f"--out={tmp_path / 'one'}"]) == 0
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert two["weights"] == one["weights"]
    for name, score in one["scores"].items():
        assert two["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-5), name
    outputs = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert [json.loads(line).get("output") for line in outputs[0].splitlines()] == [
        json.loads(line).get("output") for line in outputs[1].splitlines()
    ]

    with files.locked(tmp_path / "two"), start.started([*start.T5G2, *command, f"--out={tmp_path / 'two'}"], 2) as both:
        written = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], written
    assert f"another process writes to {tmp_path / 'two'}" in written[0]
    assert "process 0 cannot go on" in written[1]
