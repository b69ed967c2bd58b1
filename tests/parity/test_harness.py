"""lm-evaluation-harness on our models: the numbers of its transformers backend, and of transformers itself."""

import dataclasses
import functools
import json
import os
import sys

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

from t5g2 import cli
from t5g2.api import loading
from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.export_folder import export_model
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.subword import HuggingFace
from tests import tiny, weights
from tests.data import tokenizer_files

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from t5g2.jobs import harness_evaluation  # noqa: E402

STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=768)
MODELS = {"gemma": STACK, "t5gemma2": dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)}
LENGTH, NEW_TOKENS = 40, 12
QUESTIONS = [
    {"question": "def capwords(s, sep=None):", "choices": ["return", "None", "the string module"], "answer": 0},
    {"question": "import", "choices": ["io", "os.path"], "answer": 1},
    {"question": "A file object, text or binary, that is open and has been read up to " * 3, "choices": ["x", "EOF"],
     "answer": 1},
    {"question": "<bos>class", "choices": ["Template", "Formatter"], "answer": 1},
]  # fmt: skip
TEXTS = ["The io module provides the Python interfaces to stream handling. " * 3, "é", "short text"]
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}} ",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_words": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": NEW_TOKENS, "do_sample": False, "temperature": 0.0, "top_p": 1},
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_loss": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A model folder and an export of each kind, three task files, and a stop string that comes in an output."""
    root = tmp_path_factory.mktemp("harness")
    tokenizer_files.huggingface(root)
    tokenizer = HuggingFace(str(root / "tokenizer.json"))
    for name, config in MODELS.items():
        folders.save_leaves(
            root / name,
            config,
            tree.leaves(weights.on_host(config)),
            json_files={
                folders.TOKENIZER: tokenizer.to_dict(),
                folders.PROVENANCE: {"kind": "import", "source": "x", "notes": []},
            },
            extra_files=tokenizer.files,
        )
        export_model(root / name, root / f"{name}_export")
    (root / "tasks").mkdir()
    for name, records in (("questions", QUESTIONS), ("texts", [{"text": text} for text in TEXTS])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = loading.load(root / "gemma").generate([QUESTIONS[1]["question"]], max_new_tokens=NEW_TOKENS)[0]
    stop = text[len(text) // 2 :][:2]
    assert stop.isascii()
    for name, task in TASKS.items():
        data = root / ("texts.jsonl" if name == "own_loss" else "questions.jsonl")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(root / "cache")}
        task = {"task": name, "dataset_path": "json", "test_split": "test", "dataset_kwargs": kwargs, **task}
        if name == "own_words":
            task["generation_kwargs"] = {**task["generation_kwargs"], "until": [stop, "\n\n"]}
        # YAML reads JSON
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps(task))
    return root


def evaluate(root, model, **arguments):
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **arguments)


def ours(root, name):
    return evaluate(
        root, "t5g2", model_args={"path": str(root / name), "max_length": LENGTH}, batch_size="2", device="cuda:0"
    )


@pytest.fixture(scope="session")
def gemma(root):
    return ours(root, "gemma")


@pytest.fixture(scope="session")
def t5gemma2(root):
    return ours(root, "t5gemma2")


def responses(results, task):
    return [sample["filtered_resps"] for sample in results["samples"][task]]


def close(ours, theirs):
    np.testing.assert_allclose(np.ravel(ours), np.ravel(theirs), atol=1e-4, rtol=0)


def test_a_decoder_only_model_has_the_numbers_of_the_transformers_backend(root, gemma):
    # rows of one: in a batch whose first text spells <bos> it gives the others none
    theirs = evaluate(
        root, HFLM(str(root / "gemma_export"), device="cpu", dtype="float32", batch_size=1, max_length=LENGTH)
    )
    for mine, other in zip(responses(gemma, "own_choice"), responses(theirs, "own_choice"), strict=True):
        close([total for total, _ in mine], [total for total, _ in other])
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    close(responses(gemma, "own_loss"), responses(theirs, "own_loss"))
    assert responses(gemma, "own_words") == responses(theirs, "own_words")
    # one is cut by the stop string, another is not
    words = [output for [output] in responses(gemma, "own_words")]
    stopped, whole = words[1], loading.load(root / "gemma").generate([QUESTIONS[1]["question"]], max_new_tokens=12)[0]
    assert whole.startswith(stopped)
    assert 0 < len(stopped) < len(whole)
    for task, metrics in theirs["results"].items():
        for key in metrics.keys() - {"name", "alias", "sample_len"}:
            assert gemma["results"][task][key] == pytest.approx(metrics[key], abs=1e-4, nan_ok=True), (task, key)


def test_an_encoder_decoder_has_the_numbers_of_transformers(root, t5gemma2):
    folder = root / "t5gemma2_export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    bos = model.generation_config.bos_token_id

    def log_likelihood(encoder, target):
        with torch.no_grad():
            logits = model(torch.tensor([encoder]), decoder_input_ids=torch.tensor([[bos, *target[:-1]]])).logits[0]
        log_probs = torch.log_softmax(logits, -1)
        chosen = log_probs.gather(1, torch.tensor(target)[:, None])
        return float(chosen.sum()), bool((log_probs.argmax(-1) == torch.tensor(target)).all())

    def encoded(text):
        return tokenizer.encode(text, add_special_tokens=not text.startswith("<bos>"))

    for sample in t5gemma2["samples"]["own_choice"]:
        for (context, continuation), (total, is_greedy) in zip(
            sample["arguments"], sample["filtered_resps"], strict=True
        ):
            kept = context.rstrip()
            assert kept != context
            target = tokenizer.encode(context[len(kept) :] + continuation, add_special_tokens=False)
            expected = log_likelihood(encoded(kept)[-LENGTH:], target)
            assert (pytest.approx(total, abs=1e-4), is_greedy) == expected
    for text, [total] in zip(TEXTS, responses(t5gemma2, "own_loss"), strict=True):
        windows = get_rolling_token_windows(encoded(text), bos, LENGTH, 1)
        assert total == pytest.approx(
            sum(log_likelihood(*make_disjoint_window(window))[0] for window in windows), abs=1e-4
        )
    until = json.loads((root / "tasks" / "own_words.yaml").read_text())["generation_kwargs"]["until"]
    for record, [output] in zip(QUESTIONS, responses(t5gemma2, "own_words"), strict=True):
        prompt = torch.tensor([encoded(record["question"])[-LENGTH:]])
        with torch.no_grad():
            tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        text = tokenizer.decode(tokens[1:], skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0]
        assert output == text


def command(root, out, *flags, tasks="own_choice,own_l*"):
    return cli.main(
        ["evaluate", f"--model={root / 'gemma'}", f"--harness={tasks}", f"--out={out}", "--rows=2",
         f"--include_path={root / 'tasks'}", *flags]
    )  # fmt: skip


def test_the_command_writes_scores_predictions_and_a_page(root, tmp_path, gemma, capsys):
    assert command(root, tmp_path / "a") == 0
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]
    accuracy = scores["own_choice/acc"]
    assert accuracy["value"] == gemma["results"]["own_choice"]["acc,none"]
    assert accuracy["examples"] == len(QUESTIONS)
    # 1 right of 4: in a resample 0 to 3 (binomial, 2.5% and 97.5%)
    assert accuracy["interval"] == [0.0, 0.75]
    assert accuracy["signature"].endswith("0 shots")
    low, high = scores["own_loss/bits_per_byte"]["interval"]
    assert low < scores["own_loss/bits_per_byte"]["value"] < high
    assert set(scores) == {
        *("own_choice/acc", "own_choice/acc_norm", "own_loss/byte_perplexity", "own_loss/bits_per_byte")
    }
    predictions = [json.loads(line) for line in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    assert [prediction["task"] for prediction in predictions] == ["own_choice"] * 4 + ["own_loss"] * 3
    assert predictions[0]["input"] == f"Q: {QUESTIONS[0]['question']} "
    # the short ones, which nothing is cut from
    for number in (0, 1, 3):
        totals = [choice["log_likelihood"] for choice in predictions[number]["choices"]]
        close(totals, [total for total, _ in responses(gemma, "own_choice")[number]])
        assert predictions[number]["output"] == " " + QUESTIONS[number]["choices"][int(np.argmax(totals))]
    assert "own_loss" in (tmp_path / "a" / "index.html").read_text()
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    capsys.readouterr()
    assert command(root, tmp_path / "a") == 0
    assert "task own_loss is finished already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")} == before
    assert command(root, tmp_path / "a", "--seed=1") == 2
    assert "of another model or of other settings" in capsys.readouterr().err


def test_other_data_is_another_task(root, tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "a"}) + "\n")
    task = {**json.loads((root / "tasks" / "own_loss.yaml").read_text())}
    task["dataset_kwargs"]["data_files"]["test"] = str(data)
    (tmp_path / "tasks" / "own_loss.yaml").write_text(json.dumps(task))
    flags = [f"--include_path={tmp_path / 'tasks'}"]
    assert command(root, tmp_path / "a", *flags, tasks="own_loss") == 0
    data.write_text(json.dumps({"text": "b"}) + "\n")
    assert command(root, tmp_path / "a", *flags, tasks="own_loss") == 2
    assert "task.own_loss.data" in capsys.readouterr().err


def requests(*arguments):
    return [Instance("generate_until", {}, one, number, ("own", number, 1)) for number, one in enumerate(arguments)]


def test_samples_depend_on_the_seed_and_not_on_the_order_of_batches(root):
    def draw(seed, contexts=("import", "class")):
        model = harness_evaluation.FolderHarnessModel(str(root / "gemma"), 2, seed=seed)
        settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_gen_toks": 8, "until": []}
        return model.generate_until(requests(*((context, settings) for context in contexts)))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, ("import",)) == draw(0)[:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", {"until": [], "top_z": 1}), r"unknown generation option 'top_z' of harness task 'own'; did you mean"),
        (("x", {"until": [], "max_gen_toks": 40}), r"max_gen_toks = 40 leaves no room .* context is 40; lower it"),
        (("x", {"until": []}, {"visual": []}), r"harness task 'own' has images or sounds, and this model class reads"),
    ],
)
def test_requests_that_are_refused(root, arguments, message):
    model = harness_evaluation.FolderHarnessModel(str(root / "gemma"), max_length=LENGTH)
    with pytest.raises(UserError, match=message):
        model.generate_until(requests(arguments))


def test_what_the_model_cannot_do_is_refused(root):
    model = harness_evaluation.FolderHarnessModel(str(root / "gemma"), max_length=LENGTH)
    with pytest.raises(UserError, match=r"a continuation has 4\d tokens, and the model's context is 40; leave"):
        model.loglikelihood(requests(("a", "<eos>" * 41)))
    with pytest.raises(UserError, match="chat templates are not applied"):
        model.chat_template(True)
    with pytest.raises(UserError, match="batch_size=auto; give a number of rows"):
        harness_evaluation.FolderHarnessModel(str(root / "gemma"), "auto")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--include_path=NONE"], "--include_path=NONE is not a folder; give the folder of your harness tasks"),
        (["--include_path=EMPTY"], "EMPTY has no task file (*.yaml); give the folder"),
        (["--tasks=x.py"], "--harness and --tasks are both given"),
        (["--cost"], "--cost measures queries of --tasks, and --harness is given"),
        (["--harness="], "--harness is missing: the names of the tasks, of which --include_path has the files"),
    ],
)
def test_wrong_flags(root, tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert command(root, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_has_the_nearest_name(root):
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    with pytest.raises(UserError, match=r"unknown harness task 'own_choices'; did you mean 'own_choice' or"):
        harness_evaluation.TaskFolder(("own_loss", "own_choices")).chosen(manager)
    assert harness_evaluation.TaskFolder(("own_l*", "own_*")).chosen(manager) == ["own_loss", "own_choice", "own_words"]


def test_tasks_that_cannot_be_loaded_or_run(root, tmp_path, capsys):
    task = json.loads((root / "tasks" / "own_loss.yaml").read_text())
    (tmp_path / "own_code.yaml").write_text(json.dumps({**task, "task": "own_code", "unsafe_code": True}))
    images = {**task, "task": "own_images", "output_type": "generate_until", "doc_to_image": "text"}
    (tmp_path / "own_images.yaml").write_text(json.dumps(images))
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "own_gone.yaml").write_text(json.dumps({**task, "task": "own_gone"}))
    for name, message in (
        ("own_code", "harness task 'own_code' runs the code that the model writes; leave it out, or run it with"),
        ("own_images", "harness task 'own_images' has images or sounds, and this model class reads text only; leave"),
        ("own_gone", "harness task 'own_gone' cannot be loaded: FileNotFoundError"),
    ):
        assert command(root, tmp_path / "out", f"--include_path={tmp_path}", tasks=name) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_of_lm_eval_has_our_model(root, tmp_path, gemma, capsys, monkeypatch):
    # those that come with it take a quarter of a minute to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # for good, of the whole process

    def run(*model_arguments):
        flags = ["--model=t5g2", "--tasks=own_loss", f"--include_path={root / 'tasks'}", "--batch_size=2"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *flags, "--model_args", *model_arguments])
        return harness_evaluation.main()

    assert run(f"path={root / 'gemma'}", f"max_length={LENGTH}") == 0
    assert f" {gemma['results']['own_loss']['bits_per_byte,none']:.4f}|" in capsys.readouterr().out
    assert run(f"path={tmp_path / 'none'}") == 2
    assert f"lm_eval: {tmp_path / 'none'}" in capsys.readouterr().err


def test_predictions_are_what_the_model_was_asked_after_a_context_and_said():
    """Choices after no context, for acc_mutual_info, are no choices; several texts of a filter are no likelihoods."""
    after, alone = [("Q", " a"), ("Q", " b")], [("", " a"), ("", " b")]
    shared = {"target": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}
    samples = {
        "choice": [{"arguments": [*after, *alone], "filtered_resps": [(x, False) for x in (-3.0, -4.0, -2.0, -1.0)],
                    **shared}],
        "bare": [{"arguments": alone, "filtered_resps": [(-3.0, False), (-2.0, True)], **shared}],
        "texts": [{"arguments": [("Q", {"until": []})], "filtered_resps": [["a", "b"]], **shared}],
    }  # fmt: skip
    predictions = harness_evaluation.as_task_result({"results": {}, "samples": samples}, {}, "0").predictions
    assert [prediction["output"] for prediction in predictions] == [" a", " b", ["a", "b"]]
    assert predictions[0]["choices"] == [{"text": " a", "log_likelihood": -3.0}, {"text": " b", "log_likelihood": -4.0}]
    assert "choices" not in predictions[2]
