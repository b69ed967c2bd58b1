"""Long-context tasks: lengths, places and answers of every generator, published scores, and the scores by cell."""

import dataclasses
import hashlib
import re
from collections import Counter
from difflib import SequenceMatcher

import numpy as np
import pytest

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import generate_and_compare
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.generation import Output
from t5g2.eval.haystack import NOISE, Hidden, hide_in_lines, hide_in_words, largest_size, running_words, vocabulary
from t5g2.eval.long_context import BOS
from t5g2.eval.metrics import catalogue
from t5g2.eval.metrics.string_match import PrefixedSimilarity
from t5g2.eval.task_interface import EvalContext, Task
from t5g2.eval.tasks import CommonWords, Coreference, FrequentWords, Needle, VariableTracking
from t5g2.objectives import Causal
from t5g2.train.experiment import TABLES
from tests import tiny

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
# sentences of three words, none of which is in another; 40 different words
WORDS = [
    f"{a}{b}" for a in ("ber", "cal", "dom", "fir", "gul") for b in ("ax", "en", "il", "om", "up", "yt", "ad", "eb")
]
SENTENCES = [f"{WORDS[n % 40]} {WORDS[(3 * n + 1) % 40]} {WORDS[(7 * n + n // 40) % 40]}." for n in range(200)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        (folder / f"{number}.txt").write_text("\n".join(SENTENCES[50 * number : 50 * number + 50]))
    return TextFiles(f"{folder}/*.txt")


def examples(task, *, tokenizer=TOKENIZER):
    """Returns (cell, example) of a task."""
    return list(zip(task.cells(), task._examples(task.cells(), tokenizer), strict=True))


def tasks(text):
    shared = {"text": text, "lengths": (2500, 3000), "depths": (0, 50, 100), "examples": 2}
    return {
        "needle": (Needle(**shared), 9),
        "uuids": (Needle(**shared, key_kind="uuids", value_kind="uuids"), 9),
        "noise": (Needle(**shared, haystack="noise"), len(NOISE) + 1),
        "needles": (Needle(**shared, haystack="needles"), 90),
        "multi_key": (Needle(**shared, keys=4), 9),
        "multi_value": (Needle(**shared, values=4), 9),
        "multi_query": (Needle(**shared, queries=4), 9),
        "variables": (VariableTracking(**shared), len(NOISE) + 1),
        "variables_in_text": (VariableTracking(**shared, haystack="text", chains=2, hops=2), 9),
        "common": (CommonWords(**shared), 22),
        "frequent": (FrequentWords(**shared), 7 * 5),
        "coreference": (Coreference(**shared, passage_words=10), 60),
    }


# the same with every NumPy and on every machine
DIGESTS = {
    "needle": "633ba2844043bc13",
    "uuids": "1511548fc5ed62bf",
    "noise": "44271fa87c78fe07",
    "needles": "ed97de3bdf517a39",
    "multi_key": "f794bd659b34b75e",
    "multi_value": "3fb7eb615231f6f1",
    "multi_query": "531d31d3ff1881dc",
    "variables": "5a62aef0895ba642",
    "variables_in_text": "15fef23187cfc2b0",
    "common": "530a161a3d879279",
    "frequent": "6dd08ff273dc98a1",
    "coreference": "2d78136566fbc242",
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_examples_are_the_same_everywhere(text, kind):
    prompts = "".join(example.prompt for _, example in examples(tasks(text)[kind][0]))
    assert hashlib.sha256(prompts.encode()).hexdigest()[:16] == DIGESTS[kind]


@pytest.mark.parametrize("kind", DIGESTS)
def test_examples_are_just_as_long_as_asked_and_depend_on_the_seed_alone(text, kind):
    task, unit = tasks(text)[kind]
    own = examples(task)
    for cell, example in own:
        tokens = TOKENIZER.count(example.prompt) + BOS + task.max_new_tokens
        assert cell.length - unit < tokens <= cell.length
    prompts = [example.prompt for _, example in own]
    assert prompts == [example.prompt for _, example in examples(dataclasses.replace(task, name="other"))]
    assert len(set(prompts)) == len(prompts)  # of all cells, and of both examples of each
    other = [example.prompt for _, example in examples(dataclasses.replace(task, seed=1))]
    assert not set(prompts) & set(other)
    # an example does not depend on which others there are
    alone = dataclasses.replace(task, lengths=(3000,))
    assert [example.prompt for _, example in examples(alone)] == prompts[len(prompts) // 2 :]


@pytest.mark.parametrize("kind", ["needle", "uuids", "noise", "needles", "multi_key", "multi_value", "multi_query"])
def test_what_is_asked_for_is_there_once_and_at_its_depth(text, kind):
    task, _ = tasks(text)[kind]
    for cell, example in examples(task):
        number = task.queries * task.values
        assert len(example.answers) == len(example.depths) == number
        assert example.depths[0] == task.depths[cell.depth]
        _, context, question = re.fullmatch(r"(.*?afterwards\.)\n(.*)\n(What.*)", example.prompt, re.DOTALL).groups()
        needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
        for answer, depth in zip(example.answers, example.depths, strict=True):
            assert example.prompt.count(answer) == 1
            [key] = [key for key, value in needles if value == answer]
            assert question.count(key) == 2
            assert sum(key == other for other, _ in needles) == task.values
            start = context.index(f"One of the special magic {task.value_kind} for {key} is: {answer}.")
            # of about 2200 characters, a sentence or a line aside, and the other needles
            assert start / len(context) * 100 == pytest.approx(depth, abs=8 if number == len(needles) == 1 else 16)
            assert depth == 100 or not start or context[:start].rstrip().endswith(".")
        if kind != "needles":
            assert len(needles) == max(task.keys, task.queries) * task.values
    # every depth has as many answers as any other
    depths = Counter(depth for _, example in examples(task) for depth in example.depths)
    assert len(depths) == len(task.depths)
    assert len(set(depths.values())) == 1


def test_prompts_are_those_of_ruler(text):
    shared = {"text": text, "lengths": (900,), "depths": (0,), "examples": 1, "max_new_tokens": 40}
    [(_, one)] = examples(Needle(**shared))
    key = re.search(r"for (\S+) is: ", one.prompt)[1]
    assert one.prompt.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\nOne of the special magic numbers for {key} is: {one.answers[0]}. "
    )
    assert one.prompt.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    [(_, two)] = examples(Needle(**shared, queries=2))
    first, second = re.search(
        r"What are all the special magic numbers for (\S+), and (\S+) mentioned", two.prompt
    ).groups()
    assert two.prompt.startswith("Some special magic numbers are hidden within")
    assert two.prompt.endswith(f"numbers for {first}, and {second} mentioned in the provided text are")
    assert f"for {second} is: {two.answers[1]}." in two.prompt


def test_chains_of_assignments_give_the_answer_and_nothing_else(text):
    for kind, hops in (("variables", 4), ("variables_in_text", 2)):
        for _, example in examples(tasks(text)[kind][0]):
            solved, problem = example.prompt.split("\n\nMemorize")
            for part, answers in ((solved, solved.split("they are: ")[1].split()), (problem, example.answers)):
                [value] = re.findall(r"assigned the value (\d+) in the text", part)
                statements = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part)
                holds = {}
                for name, source in statements:  # in their order: what is assigned has a value
                    holds[name] = source if source.isdigit() else holds[source]
                assert tuple(n for n, v in holds.items() if v == value) == tuple(answers)
                assert len(answers) == hops + 1
                assert f"{hops + 1} variables are assigned the value {value}, they are:" in part
            assert len(statements) == len(holds) == (5 if kind == "variables" else 6)
            assert all(re.fullmatch("[A-Z]{5}", name) for name in example.answers)


@pytest.mark.parametrize(("length", "repeats"), [(3000, (6, 1)), (9000, (30, 3))])
def test_common_words_are_there_as_often_as_ruler_has_them(text, length, repeats):
    task = CommonWords(text=text, lengths=(length,), examples=2)
    for _, example in examples(task):
        solved, own = example.prompt.split("\nBelow is a numbered list")
        shown = re.findall(r"\d+\. (\S+)", solved.split("are: ", 1)[1])
        assert len(shown) == len(example.answers) == 10
        for part, common, counts in ((solved, shown, (3, 1)), (own, example.answers, repeats)):
            items = re.findall(r"(\d+)\. (\S+)", part.split("appear most often.\n")[1].split("\nQuestion")[0])
            assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
            often, seldom = counts if length < 4096 or part is own else (10, 3)
            assert Counter(word for _, word in items) == {
                word: often if word in common else seldom for _, word in items
            }
            assert set(common) <= {word for _, word in items}


def test_frequent_words_are_the_second_to_fourth_of_zipfs(text):
    for cell, example in examples(FrequentWords(lengths=(1200, 4000), examples=2)):
        context = example.prompt.split("coded words. ")[1].split("\nQuestion")[0]
        ranked = Counter(context.split()).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == example.answers
        counts = [count for _, count in ranked]
        assert counts[1] > counts[2] > counts[3] > counts[4]
        assert counts[0] / counts[1] == pytest.approx(4, rel=0.1)  # 2 ** alpha
        assert len(ranked) <= (cell.length - 50) // 50


def test_coreference_asks_for_one_of_several_equal_requests(text):
    task = Coreference(text=text, lengths=(2500,), depths=(0, 40, 100), examples=3, needles=3, passage_words=8)
    for cell, example in examples(task):
        *turns, last = example.prompt.split("\n\n")
        pairs = [re.fullmatch(r"User: Write an? (.+)\nAssistant: (.+)", turn).groups() for turn in turns]
        prefix, ordinal, request = re.fullmatch(
            r"User: Prepend (\w{10}) to the (1st|2nd|3rd) \(1 indexed\) (.+)\. Do not include any other text in your "
            r"response\.\nAssistant:",
            last,
        ).groups()
        equal = [(place, passage) for place, (asked, passage) in enumerate(pairs) if asked == request]
        assert len(equal) == 3
        place, passage = equal[int(ordinal[0]) - 1]
        assert example.answers == (prefix + passage,)
        assert place == round((len(pairs) - 1) * task.depths[cell.depth] / 100)
        assert len({passage for _, passage in pairs}) == len(pairs)
        assert len(passage.split()) == 8


def test_needles_go_between_sentences():
    words = "a b. c d. e f. g h.".split()
    assert hide_in_words(words, [Hidden("X.", 50), Hidden("Y.", 100), Hidden("Z.", 0)]) == (
        "Z. a b. c d. X. e f. g h. Y."
    )
    assert hide_in_words(words, [Hidden("X.", 35), Hidden("Y.", 30)]) == "a b. X. Y. c d. e f. g h."
    assert hide_in_words(["a"] * 200, [Hidden("X.", 50)]).split().index("X.") == 100  # no sentence near
    assert hide_in_lines(["a", "b", "c", "d"], [Hidden("X", 50), Hidden("Y", 50)]) == "a\nb\nX\nY\nc\nd"
    assert hide_in_words([], [Hidden("X", 50)]) == hide_in_lines([], [Hidden("X", 50)]) == "X"


@pytest.mark.parametrize("slope", [1, 7, 93])
def test_the_largest_size_is_found_with_few_counts(slope):
    calls = []

    def tokens(size):
        calls.append(size)
        return 300 + slope * size + size // 7 % 3

    for budget in (300, 301, 1000, 131072):
        calls.clear()
        size = largest_size(tokens, budget, least=0, most=131072)
        assert tokens(size) <= budget < tokens(size + 1)
        assert len(calls) < 24
    assert largest_size(tokens, 299, least=0, most=10) is None
    assert largest_size(tokens, 10**9, least=0, most=10) == 10


def test_a_short_text_is_repeated_and_words_are_paired(text, tmp_path):
    (tmp_path / "a.txt").write_text("Red river,\n\nred and blue   42 sky. It")
    documents = TextFiles(str(tmp_path / "a.txt")).open()
    words = running_words(documents, 12, seed=3)
    assert words == ["Red", "river,", "red", "and", "blue", "42", "sky.", "It", "Red", "river,", "red", "and"]
    draw = np.random.default_rng(0)
    assert set(vocabulary(words, 3, draw=draw)) == {"red", "and", "blue"}
    nine = vocabulary(words, 9, draw=draw)
    assert len(set(nine)) == 9
    assert all(set(word.split("-")) <= {"red", "and", "blue"} for word in nine)
    with pytest.raises(UserError, match="has 3 different words of three letters or more, and 10 are needed"):
        vocabulary(words, 10, draw=draw)
    documents = text.open()
    starts = {running_words(documents, 3, seed=seed)[0] for seed in range(20)}
    assert len(starts) == 4  # documents


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        ("the numbers are 1234567 and 7654321.", ["1234567", "7654321"], 1),
        ("1234567", ["1234567", "7654321", "1111111", "2222222"], 0.25),
        ("Calm-River", ["calm-river"], 1),
        ("", ["x"], 0),
        ("ABCDE, FGHIJ", ["abcde", "FGHIJ", "KLMNO"], 2 / 3),
    ],
)
def test_rulers_score_is_the_share_of_expected_strings(output, answers, expected):
    [metric] = catalogue.find(["string_match"])
    assert metric.rows([output], [answers]).tolist() == [[pytest.approx(expected)]]


def test_mrcrs_score_is_the_similarity_after_the_prefix():
    metric = PrefixedSimilarity()
    answer = "aYooSG8CQgtapirs at dawn"
    outputs = [answer, "aYooSG8CQgtapirs at dusk", "tapirs at dawn", "aYooSG8CQg", " aYooSG8CQgtapirs at dawn"]
    ratio = SequenceMatcher(None, "tapirs at dusk", "tapirs at dawn").ratio()
    assert metric.rows(outputs, [[answer]] * 5)[:, 0].tolist() == [1, ratio, 0, 0, 0]
    assert ratio == 2 * 11 / 28
    assert PrefixedSimilarity(prefix=2).of_answers("xyabcd", ["xyabce"]) == [0.75]


def context():
    source = Source(TextFiles("unused"), Causal())
    return EvalContext(DataConfig((source,), TOKENIZER, 4, 0, 64, 24, streams=4), seed=1)


def run(monkeypatch, task, answer):
    """Returns the result of a task whose outputs are `answer(prompt)`."""

    class Model:
        config = STACK

    def complete(model, prompts, images=None, *, setup, indices):
        texts = (TOKENIZER.decode(prompt, skip_special_tokens=True) for prompt in prompts)
        return [Output(TOKENIZER.encode(answer(text))) for text in texts]

    monkeypatch.setattr(generate_and_compare, "complete", complete)
    return Evaluator([task], context()).run(Model())


def test_scores_are_means_by_length_and_by_the_depth_of_each_answer(text, monkeypatch):
    task = Needle(text=text, lengths=(1000, 2000), depths=(0, 50, 100), examples=2, values=2, max_new_tokens=40)

    def first_half(prompt):
        """Answers of prompts of at most 1000 tokens, which are in the first half of the text."""
        values = [match for match in re.finditer(r"is: (\d{7})\.", prompt) if len(prompt) <= 1000]
        return " ".join(match[1] for match in values if match.start() < 0.7 * len(prompt))

    result = run(monkeypatch, task, first_half)
    assert result.scores["needle/1000/0"] == result.scores["needle/1000/50"] == 1
    assert result.scores["needle/1000/100"] == 0
    assert result.scores["needle/1000"] == pytest.approx(2 / 3)
    assert result.scores["needle/2000"] == result.scores["needle/2000/0"] == 0
    assert result.scores["needle/string_match"] == pytest.approx(1 / 3)
    assert len(result.scores) == 1 + 2 + 6
    assert result.intervals["needle/1000/0"].examples == 4
    assert result.intervals["needle/1000"].examples == 6
    assert result.intervals["needle/string_match"].examples == 12
    prediction = result.predictions[2]
    assert (prediction["length"], prediction["depth"]) == (1000, [50, 100])
    assert prediction["tokens"] == len(prediction["input"]) > 940
    assert prediction["scores"] == {"string_match": 0.5}


def test_answers_of_the_examples_themselves_have_the_full_score(text, monkeypatch):
    for kind, (task, _) in tasks(text).items():
        right = {example.prompt: example.answers for _, example in examples(task)}
        result = run(monkeypatch, task, lambda prompt, right=right: " ".join(right[prompt]))
        assert set(result.scores.values()) == {1}, kind
        assert len(result.scores) == 1 + 2 + (6 if task.has_depths else 0)


def test_a_config_names_the_tasks():
    node = {"kind": "needle", "text": {"kind": "text", "path": "x"}, "lengths": [512], "queries": 4}
    task = settings.build(Task, node, tables=TABLES)
    assert task == Needle(text=TextFiles("x"), lengths=(512,), queries=4)
    assert settings.build(Task, settings.dump(task, tables=TABLES), tables=TABLES) == task


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda text: Needle(text=text, lengths=(300,)),
            r"length 300: the shortest example has \d+ tokens .* at least",
        ),
        (lambda text: Needle(), "evaluation task 'needle': text is missing; give a source of text"),
        (lambda text: CommonWords(text=text, lengths=(4096,)), "length 4096: the shortest example has"),
        (lambda text: FrequentWords(lengths=(500,)), "length 500: the shortest example has"),
        (
            lambda text: Coreference(text=text, lengths=(9000,), max_new_tokens=99),
            r"max_new_tokens = 99, and the answer",
        ),
        (lambda text: Needle(text=text, depths=()), r"depths = \(\); give at least one"),
        (
            lambda text: Needle(text=text, lengths=(8, 8)),
            r"lengths = \(8, 8\); give at least one, and none of them twice",
        ),
        (lambda text: Needle(text=text, depths=(101,)), "depths = 101; it must be at least 0 and at most 100"),
        (lambda text: Needle(text=text, keys=1001), "an example has 1001 keys or values; at most 1000 are told apart"),
        (lambda text: Needle(text=text, keys=9, values=200), "an example has 1800 keys or values"),
        (lambda text: VariableTracking(hops=9000, lengths=(4096,)), "9001 variables are more than names of 3 letters"),
    ],
)
def test_wrong_settings_are_named(text, make, message):
    with pytest.raises(UserError, match=message):
        make(text).prepare(context())
