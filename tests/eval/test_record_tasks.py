"""Tasks of records: what the model reads, what is compared, and the scores, against scripted and tiny models."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from PIL import Image

from t5g2.api import model_inputs
from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.record_templates import RecordList, Template
from t5g2.data.sources.text_files import Jsonl, Parquet, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import generate_and_compare, likelihood, record_task
from t5g2.eval.choose_by_likelihood import ChooseByLikelihood
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.generate_and_compare import GenerateAndCompare
from t5g2.eval.generation import Output, TopK
from t5g2.eval.image_tasks import ImageClassification, ImageTextRetrieval
from t5g2.eval.metrics.labels import F1, RocAuc
from t5g2.eval.metrics.metric import NamedMeans
from t5g2.eval.metrics.similarity import Bleu, Chrf
from t5g2.eval.reading import ImagePrompt, Reading
from t5g2.eval.task_interface import EvalContext, Task
from t5g2.eval.task_records import open_records
from t5g2.eval.text_loss import TextLoss
from t5g2.eval.text_retrieval import TextRetrieval
from t5g2.eval.tokenizer_coverage import TokenizerCoverage
from t5g2.models.loss_config import LossConfig
from t5g2.objectives import Causal, PrefixLM
from t5g2.train.experiment import TABLES
from tests import tiny, weights
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
T5GEMMA = dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)
CAPITALS = [
    {"country": "France", "capital": "Paris", "also": ["Paris", "Paname"]},
    {"country": "Japan", "capital": "Tokyo", "also": ["Tokyo"]},
    {"country": "Peru", "capital": "Lima", "also": ["Lima"]},
]


@functools.cache
def context_of(*, encoder_length=0, seed=1):
    source = Source(TextFiles("unused"), PrefixLM() if encoder_length else Causal())
    data = DataConfig((source,), TOKENIZER, 4, encoder_length, 64, 24, streams=4)
    return EvalContext(data, seed=seed, loss=LossConfig(tile_tokens=64), compute=FLOAT32)


def run(task, model=None, context=None):
    model = Scripted(model) if isinstance(model, dict) else model
    return Evaluator([task], context or context_of()).run(model)


def generating(**changes):
    task = {"data": CAPITALS, "name": "capitals", "template": "The capital of {country} is", "reference": "{also}"}
    return GenerateAndCompare(**(task | changes))


class Scripted:
    """A model that says what a dict has for a part of the prompt."""

    config = STACK

    def __init__(self, answers):
        self.answers = answers


@pytest.fixture
def answers(monkeypatch):
    """Generates what scripted models say, and keeps the prompts."""
    read = []

    def complete(model, prompts, images=None, *, setup, indices):
        texts = [TOKENIZER.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        read.extend(texts)
        said = [next(answer for part, answer in model.answers.items() if part in text[-40:]) for text in texts]
        return [Output(TOKENIZER.encode(answer)[: setup.options.max_new_tokens]) for answer in said]

    monkeypatch.setattr(generate_and_compare, "complete", complete)
    monkeypatch.setattr(generate_and_compare, "table_of", lambda strings, tokenizer, vocab_size: None)
    return read


def test_outputs_are_compared_with_the_best_reference(answers):
    model = {"France": " paname.\nMore", "Japan": " Kyoto", "Peru": " Lima Lima"}
    result = run(generating(stop=("\n",), metrics=("exact_match", "token_f1", Chrf())), model)
    assert result.scores["capitals/exact_match"] == pytest.approx(1 / 3)
    assert result.scores["capitals/token_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert result.intervals["capitals/token_f1"].examples == 3
    assert result.intervals["capitals/token_f1"].low < 0.4
    assert "version:" in result.signatures["capitals/chrf"]
    first = result.predictions[0]
    assert first.pop("scores").keys() == {"exact_match", "token_f1", "chrf"}
    assert first == {
        "task": "capitals",
        "input": "The capital of France is",
        "output": "paname.",
        "reference": ["Paris", "Paname"],
    }
    # predictions keep the order of the records, whatever that of the batches
    assert [p["reference"] for p in result.predictions] == [["Paris", "Paname"], "Tokyo", "Lima"]
    assert len(answers) == 3


def test_shots_are_the_same_for_all_and_never_the_example_itself(answers):
    run(generating(shots=2), dict.fromkeys(("France", "Japan", "Peru"), ""))
    for text in answers[:3]:
        *shown, own = text.split("\n\n")
        assert len(shown) == 2
        country = own.removeprefix("The capital of ").removesuffix(" is")
        assert not any(country in shot for shot in shown)
    assert sum("The capital of Peru is Lima\n\n" in text for text in answers[:3]) == 2
    answers.clear()
    run(generating(shots=1, shot_data=[{"country": "Chad", "also": "N'Djamena"}]), dict.fromkeys(("is",), ""))
    assert answers[0].startswith("The capital of Chad is N'Djamena\n\nThe capital of ")


def test_examples_are_drawn_by_the_seed_alone(answers):
    def countries(seed, **changes):
        result = run(generating(examples=2, **changes), {"is": ""}, context_of(seed=seed))
        return [prediction["input"] for prediction in result.predictions]

    assert countries(1) == countries(1, max_new_tokens=3)
    assert len({tuple(countries(seed)) for seed in range(1, 6)}) > 1


def test_an_example_that_cannot_be_read_is_counted_and_the_rest_goes_on(answers):
    def read_images(text, images):
        if images == ["torn.png"]:
            raise UserError("torn.png is not an image")
        return ImagePrompt(TOKENIZER.encode(text), np.zeros((1, 2, 2, 3), np.float32))

    records = [{**record, "image": f"{n}.png"} for n, record in enumerate(CAPITALS)]
    records[1]["image"] = "torn.png"
    reading = dataclasses.replace(Reading.trained(TOKENIZER), read_images=read_images)
    context = dataclasses.replace(context_of(), reading=reading)
    result = run(generating(data=records, images="image"), {"France": "Paris", "Peru": "Lima"}, context)
    assert result.scores["capitals/errors"] == 1
    assert result.scores["capitals/exact_match"] == pytest.approx(2 / 3)
    assert [prediction.get("error") for prediction in result.predictions] == [None, "torn.png is not an image", None]
    with pytest.raises(UserError, match="record 1: the record has no field 'picture', which is to hold its images; it"):
        generating(data=records, images="picture").prepare(context)
    with pytest.raises(UserError, match="'capitals' has images, and this model takes text only"):
        run(generating(images="image"))


def test_a_batch_without_any_picture_is_one_of_texts(monkeypatch):
    """Records may have no picture; of one batch, all of them, or all that can be read."""

    def read_images(text, images):
        if images == [None]:
            raise UserError("an image is of type NoneType")
        return ImagePrompt(TOKENIZER.encode(text), np.zeros((len(images), 2, 2, 3), np.float32))

    def complete(model, prompts, images=None, *, setup, indices):
        assert images is None
        return [Output(TOKENIZER.encode("Paris"))] * len(prompts)

    monkeypatch.setattr(generate_and_compare, "complete", complete)
    records = [CAPITALS[0] | {"images": []}, CAPITALS[1] | {"images": None}]
    reading = dataclasses.replace(Reading.trained(TOKENIZER), read_images=read_images)
    context = dataclasses.replace(context_of(), reading=reading)
    result = run(generating(data=records, images="images"), Scripted({}), context)
    assert [prediction["output"] for prediction in result.predictions] == ["Paris", ""]
    assert result.scores["capitals/errors"] == 1


@pytest.mark.parametrize("config", [STACK, T5GEMMA], ids=["decoder-only", "encoder-decoder"])
def test_choices_are_taken_by_log_likelihood(config):
    context = context_of(encoder_length=64 if config is T5GEMMA else 0)
    model = weights.model(config)
    task = ChooseByLikelihood(
        data=CAPITALS,
        name="capitals",
        template="The capital of {country} is",
        choices=("Paris", "Tokyo", "Lima"),
        answer="{capital}",
        metrics=("mcc",),
    )
    result = run(task, model, context)
    pairs = [(f"The capital of {r['country']} is", f" {c['capital']}") for r in CAPITALS for c in CAPITALS]
    scores = likelihood.loglikelihood(model, pairs, scoring=context.scoring())
    alone = [("Answer:", f" {c['capital']}") for c in CAPITALS]
    base = [score.sum for score in likelihood.loglikelihood(model, alone, scoring=context.scoring())]
    sums = np.array([score.sum for score in scores]).reshape(3, 3)
    tokens, text_bytes = np.array([6, 6, 5]), np.array([5, 5, 4])
    for rule, values in {
        "accuracy": sums,
        "accuracy_per_token": sums / tokens,
        "accuracy_per_byte": sums / text_bytes,
        "accuracy_pmi": sums - base,
    }.items():
        assert result.scores[f"capitals/{rule}"] == pytest.approx(np.mean(values.argmax(axis=1) == np.arange(3)))
    np.testing.assert_allclose([p["log_likelihoods"] for p in result.predictions], sums, atol=1e-4)
    assert [p["reference"] for p in result.predictions] == ["Paris", "Tokyo", "Lima"]
    assert set(result.predictions[0]["scores"]) >= {"accuracy", "accuracy_pmi"}
    assert "capitals/mcc" in result.scores


def test_two_choices_have_an_area_under_the_curve():
    data = [{"text": text, "options": ["no", "yes"], "label": n % 2} for n, text in enumerate(["aa", "bb", "cc", "dd"])]
    task = ChooseByLikelihood(
        data=data, name="bool", template="{text}", choices="{options}", answer="{label}", metrics=("auc",)
    )
    result = run(task, weights.model(STACK))
    second = [p["log_likelihoods"][1] - p["log_likelihoods"][0] for p in result.predictions]
    wins = [second[right] > second[wrong] for right in (1, 3) for wrong in (0, 2)]
    assert result.scores["bool/auc"] == pytest.approx(np.mean(wins))


def choosing(**changes):
    task = {"data": [], "name": "sums", "template": "{sum}", "choices": "{options}", "answer": "{label}"}
    return ChooseByLikelihood(**(task | changes))


@pytest.mark.parametrize(
    ("labels", "right"),
    [
        # 0 is a choice of the first record too, but 1 is none of the second
        ((3, 1, 2), ["0", "5", "3"]),
        (("3", "1", "2"), ["0", "5", "3"]),
        (("4", "6", "5"), ["4", "6", "5"]),
        # every label is a choice, so they are texts, although each could be a number
        ((1, 3, 2), ["1", "3", "2"]),
    ],
)
def test_answers_are_numbers_or_texts_in_all_records_alike(labels, right):
    options = [["3", "4", "1", "0"], ["6", "5", "3", "0"], ["2", "5", "3", "0"]]
    data = [{"sum": "?", "options": o, "label": label} for o, label in zip(options, labels, strict=True)]
    result = run(choosing(data=data), weights.model(STACK))
    assert [p["reference"] for p in result.predictions] == right
    shown = choosing(data=data[:1], shots=3, shot_data=data).read(context_of())[0].prompt
    assert sorted(re.findall(r"\? (\d)", shown)) == sorted(right)


def test_a_boolean_of_json_is_the_choice_that_it_means():
    data = [{"sum": "?", "label": answer} for answer in (True, False)]
    result = run(choosing(data=data, choices=("no", "yes")), weights.model(STACK))
    assert [p["reference"] for p in result.predictions] == ["yes", "no"]


def test_metrics_of_choices_take_a_choice_by_its_text():
    data = [{"sum": text, "label": label} for text, label in zip("abcd", ["yes", "no", "yes", "no"], strict=True)]
    metrics = (F1(positive="yes"), RocAuc(positive="yes"), "accuracy")
    with pytest.raises(UserError, match="metrics give accuracy twice"):
        run(choosing(data=data, choices=("no", "yes"), metrics=(*metrics, "accuracy")), weights.model(STACK))
    result = run(choosing(data=data, choices=("no", "yes"), metrics=metrics[:2]), weights.model(STACK))
    outputs, second = (
        [p["output"] for p in result.predictions],
        [p["log_likelihoods"][1] - p["log_likelihoods"][0] for p in result.predictions],
    )
    references = [record["label"] for record in data]
    both = sum(a == b == "yes" for a, b in zip(outputs, references, strict=True))
    assert result.scores["sums/f1"] == pytest.approx(2 * both / (outputs.count("yes") + 2))
    wins = [second[right] > second[wrong] for right in (0, 2) for wrong in (1, 3)]
    assert result.scores["sums/auc"] == pytest.approx(np.mean(wins))


def test_the_loss_of_texts_is_by_token_and_by_byte():
    model, context = weights.model(STACK), context_of()
    result = run(TextLoss(data=[{"text": "the cat"}, {"text": "é"}], name="text"), model)
    scores = likelihood.loglikelihood(model, [("", "the cat"), ("", "é")], scoring=context.scoring())
    nats = -sum(score.sum for score in scores)
    assert result.scores["text/loss"] == pytest.approx(nats / 9)
    assert result.scores["text/bits_per_byte"] == pytest.approx(nats / np.log(2) / 9)
    assert result.predictions[1]["scores"]["loss"] == pytest.approx(-scores[1].sum / 2)
    after = run(TextLoss(data=[{"q": "a", "text": "b"}], name="text", template="{q}:"), model)
    [score] = likelihood.loglikelihood(model, [("a:", " b")], scoring=context.scoring())
    assert after.scores["text/loss"] == pytest.approx(-score.sum / 2)


VECTORS = {"red": [1, 0], "blue": [0, 1], "a red thing": [1, 0.2], "a blue thing": [0, 1], "sky": [0.1, 1]}


class Embeddings:
    """A dual encoder of which images and texts are their vectors."""

    def embed_images(self, images):
        if "torn" in images:
            raise UserError("torn is not an image")
        return np.array(images, np.float32)

    def embed_texts(self, texts):
        return np.array([VECTORS[text] for text in texts], np.float32)


def test_images_are_classified_without_training():
    data = [{"image": [1, 0.1], "label": "red"}, {"image": [0.2, 1], "label": 1}, {"image": "torn", "label": "red"}]
    task = ImageClassification(data=data, name="colours", classes=("red", "blue"), prompts=("{name}", "a {name} thing"))
    result = run(task, Embeddings())
    assert result.scores["colours/accuracy"] == pytest.approx(2 / 3)
    assert result.scores["colours/accuracy_by_class"] == pytest.approx(0.75)
    assert result.scores["colours/errors"] == 1
    assert [p["output"] for p in result.predictions] == ["red", "blue", ""]
    with pytest.raises(UserError, match="takes a dual encoder"):
        run(task, object())


def test_texts_and_images_are_retrieved_in_both_directions():
    data = [{"image": [1, 0], "captions": ["red", "sky"]}, {"image": [0, 1], "captions": ["blue"]}]
    result = run(ImageTextRetrieval(data=data, name="pairs", ks=(1, 2)), Embeddings())
    scores = {name.removeprefix("pairs/"): value for name, value in result.scores.items()}
    # sky is nearer to the image of blue
    expected = {"image_to_text@1": 1, "image_to_text@2": 1, "text_to_image@1": 2 / 3, "text_to_image@2": 1}
    assert scores == pytest.approx(expected)
    assert result.intervals["pairs/text_to_image@1"].examples == 3


def test_records_have_all_of_their_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CAPITALS))
    assert list(open_records(Jsonl(str(tmp_path / "a.jsonl")), TOKENIZER)) == CAPITALS
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(CAPITALS), tmp_path / "a.parquet")
    assert list(open_records(Parquet(str(tmp_path / "a.parquet")), TOKENIZER)) == CAPITALS
    (tmp_path / "a.txt").write_text("a plain text\n")
    assert list(open_records(TextFiles(str(tmp_path / "a.txt")), TOKENIZER)) == [{"text": "a plain text\n"}]
    assert open_records(RecordList(tuple(CAPITALS)), TOKENIZER)[1]["capital"] == "Tokyo"


def test_templates_are_those_of_str_format():
    record = {"a": "x", "n": 3, "list": ["p", "q"], "nested": {"list": ["r"]}, "empty": []}
    assert Template("{a}: {n:03} {{{list[1]}}}").fill(record) == "x: 003 {q}"
    assert Template("{list}").values(record) == ["p", "q"]
    assert Template("{nested[list]}").values(record) == ["r"]
    assert Template("{n}").values(record) == [3]
    assert Template("{list}.").values(record) == ["['p', 'q']."]
    assert Template("{empty}").values(record) == []


def test_bytes_of_parquet_are_pictures(tmp_path, monkeypatch, answers):
    """A column of files' contents, of lists of them, and of Hugging Face's images; text in bytes is text."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setenv("T5G2_CACHE", str(tmp_path / "cache"))
    files = []
    for color in ("red", "blue"):
        Image.new("RGB", (3, 2), color).save(tmp_path / "x.png")
        files.append((tmp_path / "x.png").read_bytes())
    row = {"many": files, "text": b"caf\xc3\xa9", "country": "France", "also": "Paris"}
    rows = [row | {"image": file, "hf": {"bytes": file, "path": "x.png"}} for file in files]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = list(open_records(Parquet(str(tmp_path / "a.parquet")), TOKENIZER))
    assert records == [row | {"hf": row["image"], "text": "café"} for row in rows]

    seen = []

    def read_images(text, images):
        seen.append([model_inputs.pixels(image)[0, 0].tolist() for image in images])
        return ImagePrompt(TOKENIZER.encode(text), np.zeros((1, 2, 2, 3), np.float32))

    reading = dataclasses.replace(Reading.trained(TOKENIZER), read_images=read_images)
    context = dataclasses.replace(context_of(), reading=reading)
    for field in ("image", "many", "hf"):
        task = generating(data=Parquet(str(tmp_path / "a.parquet")), images=field)
        assert run(task, {"France": "Paris"}, context).scores["capitals/exact_match"] == 1
    red, blue = [255, 0, 0], [0, 0, 255]
    assert seen == [[red], [blue], [red, blue], [red, blue], [red], [blue]]
    vectors = {"red": [1.0, 0.0], "blue": [0.0, 1.0]}

    class Colours(Embeddings):
        def embed_images(self, images):
            return np.array([vectors["red" if model_inputs.pixels(i)[0, 0, 0] else "blue"] for i in images], np.float32)

    named = [record | {"label": label} for record, label in zip(records, ("red", "blue"), strict=True)]
    classes = ImageClassification(data=named, name="c", classes=("red", "blue"), prompts=("{name}",))
    assert run(classes, Colours()).scores["c/accuracy"] == 1


def test_a_config_names_tasks_by_their_kind():
    node = {
        "kind": "generate",
        "data": {"kind": "rows", "records": CAPITALS},
        "name": "capitals",
        "template": "{country}",
        "reference": "{capital}",
        "metrics": ["bleu", {"kind": "chrf", "word_order": 2}],
    }
    task = settings.build(Task, node, tables=TABLES)
    assert task.metrics == ("bleu", Chrf(word_order=2))
    assert settings.build(Task, settings.dump(task, tables=TABLES), tables=TABLES).metrics == task.metrics


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: generating(template="{county}"),
            "task 'capitals', record 1: the record has no field 'county' for the template '{county}'; it has country",
        ),
        (
            lambda: generating(data=[*CAPITALS, {"country": "Chad"}]),
            "task 'capitals', record 4: the record has no field 'also' for the template '{also}'; it has country",
        ),
        (
            lambda: generating(
                data=[*[{"country": ""}] * 20, *CAPITALS], examples=1, template="", name="n", reference="x{also}"
            ),
            "task 'n', record 16: the record has no field 'also'",
        ),
        (lambda: generating(data=[]), "task 'capitals': there are no records in the list; give a source"),
        (lambda: generating(data=[CAPITALS[0] | {"also": []}]), "record 1: no reference: '{also}' is an empty list"),
        (lambda: generating(metrics=("blue",)), "task 'capitals': unknown metric 'blue'; did you mean 'bleu'"),
        (lambda: generating(metrics=(Bleu(tokenize="13b"),)), "unknown tokenizer '13b' of bleu; did you mean '13a'"),
        (
            lambda: generating(reference="{capital}", metrics=("spearman",)),
            "task 'capitals': the reference of example 1 is 'Paris', and spearman is of numbers; give numbers",
        ),
        (lambda: generating(num_beams=2, sampler=TopK(3)), "task 'capitals': num_beams = 2 and a sampler: beam search"),
        (lambda: generating(metrics=("mcc",)), "task 'capitals': example 1 has 2 references, and this metric compares"),
        (lambda: generating(template="{"), "task 'capitals': template '{': "),
        (lambda: generating(template="{}"), "task 'capitals': template '{}' has a field without a name"),
        (lambda: generating(shots=3), "shots = 3, and there are 3 records to show; lower shots"),
        (lambda: generating(data=Jsonl("x", field="y")), "field = 'y': a task's template names the fields"),
        (
            lambda: ChooseByLikelihood(data=CAPITALS, name="c", template="", choices="{also}", answer="{capital}"),
            "task 'c', record 2: 1 choices; give at least two",
        ),
        (
            lambda: ChooseByLikelihood(data=CAPITALS, name="c", template="", choices=("a", "b"), answer="{capital}"),
            "the answer 'Paris' is none of the choices ('a', 'b'); give its text, or its number from 0 to 1",
        ),
        (
            lambda: generating(data=[CAPITALS[0] | {"also": None}]),
            "record 1: the record has fields that do not fit (also",
        ),
        (lambda: generating(data=[CAPITALS[0] | {"also": ["a", None]}]), "fields that do not fit (also is null)"),
        (lambda: generating(data=[CAPITALS[0] | {"country": None}]), "fields that do not fit (country is null)"),
        (
            lambda: choosing(data=[{"sum": "", "options": ["a", "b"], "label": "²"}]),
            "the answer '²' is none of the choices ('a', 'b')",
        ),
        (
            lambda: choosing(data=[{"sum": "", "options": ["a", "b"], "label": 0}], metrics=("exact_match",)),
            "task 'sums': exact_match is not a metric of choices; give accuracy, f1, mcc or auc",
        ),
        (
            lambda: choosing(data=[{"sum": "", "options": ["a", "b"], "label": 0}], metrics=(F1(positive="c"),)),
            "task 'sums': unknown choice 'c' of f1",
        ),
        (
            lambda: choosing(data=[{"sum": "", "options": ["a", "b", "c"], "label": 0}], metrics=("auc",)),
            "auc ranks the probability of the second of two choices, and there are 3",
        ),
        (lambda: TextLoss(data=[{"text": "a"}] * 3, name="t", shots=1), "task 't': shots = 1, and without a template"),
        (
            lambda: TokenizerCoverage(data=[{"text": "a"}] * 3, name="t", shots=1),
            "task 't': shots = 1, and TokenizerCoverage shows no solved examples; set shots to 0",
        ),
        (
            lambda: TextRetrieval(data=[{"text": "a"}] * 3, name="t", template="{text}", texts="{text}", shots=1),
            "task 't': shots = 1, and TextRetrieval shows no solved examples; set shots to 0",
        ),
        (
            lambda: ImageClassification(data=[{"label": "red", "img": ""}], name="i", classes=("red", "blue")),
            "task 'i', record 1: the record has no field 'image', which is to hold its images; it has label, img",
        ),
        (
            lambda: ImageClassification(data=[{"label": "green", "image": ""}], name="i", classes=("red", "blue")),
            "task 'i', record 1: the label 'green' is no class; classes are red, blue",
        ),
    ],
)
def test_impossible_tasks_are_errors(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make().prepare(context_of())


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"task 'capitals': .*a.jsonl: no text in 1 file"):
        generating(data=Jsonl(str(tmp_path / "a.jsonl"))).prepare(context_of())


def test_scores_of_examples_are_in_their_predictions():
    metric = NamedMeans(("x", "y"))
    part = record_task.Scored(metric, np.array([[1.0, 2.0]]), [1])
    result = record_task.result("t", [part], [{"output": "a"}, {"output": "b"}], errors={0: "torn"}, seed=0)
    assert result.predictions == [
        {"task": "t", "output": "a", "error": "torn"},
        {"task": "t", "output": "b", "scores": {"x": 1.0, "y": 2.0}},
    ]
    assert result.scores == {"t/x": 1, "t/y": 2, "t/errors": 1}
