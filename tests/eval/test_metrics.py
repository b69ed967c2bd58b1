"""Metrics against their public implementations, published examples, and literal cases."""

import math
import re
import sys

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
from rouge_score import rouge_scorer

from t5g2.core.errors import UserError
from t5g2.eval.metrics import catalogue, choices, intervals, labels, losses, vqa
from t5g2.eval.metrics.losses import TokenSums
from t5g2.eval.metrics.metric import NamedMeans


def test_sums_are_added_and_divided_once():
    total = TokenSums(loss=6.0, correct=1.0, weight=2.0) + TokenSums(loss=0.0, correct=2.0, weight=2.0)
    assert total == TokenSums(6.0, 3.0, 4.0)
    assert total.mean_loss == 1.5  # and not the mean of 3 and 0 by batch, were the batches unequal
    assert total.accuracy == 0.75
    assert math.isnan(TokenSums().mean_loss)
    assert math.isnan(TokenSums().accuracy)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(50), 50.0), (1e4, math.inf)])
def test_perplexity(loss, expected):
    assert losses.perplexity(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("means", "shares", "expected"),
    [
        ({"a": 2.0, "b": 4.0}, {"a": 1, "b": 3}, 3.5),
        ({"a": 2.0, "b": 4.0}, {"b": 0.75, "a": 0.25}, 3.5),
        ({"a": 2.0}, {"a": 5}, 2.0),
    ],
)
def test_a_mixture_weighs_means_by_its_shares(means, shares, expected):
    assert losses.mixture_mean(means, shares) == expected


def test_a_mixture_of_other_names_is_refused():
    with pytest.raises(UserError, match=r"means of \['a'\] cannot be mixed by shares of \['a', 'b'\]"):
        losses.mixture_mean({"a": 1.0}, {"a": 1, "b": 1})


def test_bits_per_byte_do_not_depend_on_the_tokens():
    # 8 ln 2 nats on two bytes; the same text in one token and in two
    for sums in (TokenSums(8 * math.log(2), 0, 1, 2), TokenSums(8 * math.log(2), 0, 2, 2)):
        assert losses.bits_per_byte(sums.loss, sums.text_bytes) == pytest.approx(4)
        assert losses.bits_per_byte(sums.mean_loss, sums.mean_bytes) == pytest.approx(4)
    assert math.isnan(losses.bits_per_byte(1.0, 0.0))


def score(metric, outputs, references):
    [metric] = catalogue.find([metric])
    values = metric.scores(metric.rows(outputs, references), np.ones(len(outputs), int))
    return dict(zip(metric.names, values.tolist(), strict=True))


ANSWERS = (
    ("The  Cat.", ["a cat"]),
    ("the cat sat", ["a black cat", "dog"]),
    ("", ["the"]),
    ("Pease porridge-hot", ["pease porridgehot", "nine days old"]),
    ("x", ["y x", "x z x"]),
)


def test_exact_match_and_token_f1_of_literal_answers():
    outputs, references = zip(*ANSWERS, strict=True)
    metric = catalogue.BY_NAME["exact_match"]
    assert metric.rows(outputs, references).ravel().tolist() == [1, 0, 1, 1, 0]
    f1 = catalogue.BY_NAME["token_f1"].rows(outputs, references).ravel()
    np.testing.assert_allclose(f1, [1, 0.5, 1, 1, 2 / 3])
    assert score("exact_match", outputs, references) == {"exact_match": 0.6}


def test_rouge_is_the_mean_of_the_best_reference():
    # of 8 and 9 words six agree (the twice, quick, brown, jumps, dog), and of 7 and 8 pairs two
    output, reference = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    values = score("rouge", [output, "cat"], [[reference], ["dog", "the cat"]])
    first = {"rouge1": 2 * (6 / 8) * (6 / 9) / (6 / 8 + 6 / 9), "rouge2": 2 * (2 / 7) * (2 / 8) / (2 / 7 + 2 / 8)}
    assert values["rouge1"] == pytest.approx((first["rouge1"] + 2 / 3) / 2)
    assert values["rouge2"] == pytest.approx(first["rouge2"] / 2)
    scorer = rouge_scorer.RougeScorer(["rougeL", "rougeLsum"])
    lines = ["the gunman was shot\npolice killed the gunman", "police kill the gunman\nthe gunman was shot dead"]
    values, expected = score("rouge", lines[:1], [lines[1:]]), scorer.score(lines[1], lines[0])
    assert {name: values[name] for name in expected} == {n: pytest.approx(s.fmeasure) for n, s in expected.items()}
    assert expected["rougeL"].fmeasure != expected["rougeLsum"].fmeasure


# the example of sacrebleu's README
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
STREAMS = [
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_are_those_of_sacrebleu():
    references = [list(several) for several in zip(*STREAMS, strict=True)]
    assert score("bleu", SYSTEM, references)["bleu"] == pytest.approx(48.530827, abs=1e-6)
    assert score("chrf", SYSTEM, references)["chrf"] == pytest.approx(59.73, abs=5e-3)
    for name, order in (("chrf", 0), ("chrf++", 2)):
        expected = sacrebleu.CHRF(word_order=order).corpus_score(SYSTEM, STREAMS).score
        assert score(name, SYSTEM, references) == {name: pytest.approx(expected)}
    bleu = sacrebleu.BLEU()
    bleu.corpus_score(SYSTEM, STREAMS)
    assert catalogue.BY_NAME["bleu"].signature(references) == str(bleu.get_signature())


def test_examples_with_fewer_references_count_with_those_that_they_have():
    uneven = [["The dog bit the man.", "The dog had bit the man."], ["It was not unexpected."], STREAMS[0][2:]]
    streams = [[several[0] for several in uneven], [uneven[0][1], None, None]]
    expected = sacrebleu.BLEU().corpus_score(SYSTEM, streams).score
    assert score("bleu", SYSTEM, uneven) == {"bleu": pytest.approx(expected)}


def test_labels_are_compared_as_scikit_learn_does():
    outputs, references = ["a", "b", "b", "c ", "?", "a"], [["a"], ["b"], ["a"], ["c"], ["c"], ["a"]]
    truth, known = [text for [text] in references], [text.strip() for text in outputs]
    assert score("accuracy", outputs, references) == {"accuracy": pytest.approx(4 / 6)}
    # by hand: a has 2 of 2 taken and 2 of 3 found (0.8), b 1 of 2 and 1 of 1 (2/3), c 1 of 1 and 1 of 2 (2/3)
    assert score("f1", outputs, references) == {"f1_macro": pytest.approx((0.8 + 2 / 3 + 2 / 3) / 3)}
    assert score(labels.F1(positive="a"), outputs, references) == {"f1": pytest.approx(0.8)}
    expected = sklearn.metrics.matthews_corrcoef(truth, known)
    assert score("mcc", outputs, references) == {"mcc": pytest.approx(expected)}


def test_correlations_and_the_area_under_the_curve():
    outputs, references = ["1", "2.5", "x", "4"], [["0"], ["3"], ["2"], ["5"]]
    numbers, truth = [1, 2.5, -1, 4], [0, 3, 2, 5]
    assert score("pearson", outputs, references)["pearson"] == pytest.approx(np.corrcoef(numbers, truth)[0, 1])
    # ranks [2 3 1 4] and [1 3 2 4]: 1 - 6 * (1 + 0 + 1 + 0) / (4 * 15)
    assert score("spearman", outputs, references) == {"spearman": pytest.approx(0.8)}
    assert math.isnan(score("pearson", ["1", "1"], [["0"], ["1"]])["pearson"])
    # the example of scikit-learn's roc_auc_score: of four pairs one is in the wrong order
    assert score("auc", [0.1, 0.4, 0.35, 0.8], [["0"], ["0"], ["1"], ["1"]]) == {"auc": pytest.approx(0.75)}


def test_vqa_accuracy_by_the_number_of_people_who_agree():
    for agree, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        people = ["2"] * agree + ["three"] * (10 - agree)
        assert vqa.vqa_accuracy("Two", people) == pytest.approx(expected)
    assert score("vqa_accuracy", ["the dog.", "no"], [["dog"] * 10, ["yes"] * 9 + ["no"]]) == {
        "vqa_accuracy": pytest.approx(0.65)
    }


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two dogs, dont run.", "2 dogs don't run"),
        ("blue/green", "blue green"),
        ("1,000 m", "1000 m"),
        ("3.5", "3.5"),
        ("it's  an\tapple", "it s apple"),
    ],
)
def test_answers_are_normalized_as_for_vqa(answer, expected):
    assert vqa.normalized_answer(answer) == expected


def test_choices_by_the_example_of_the_docstring():
    example = choices.ChoiceLikelihoods(
        np.array([-4.0, -6.0]), np.array([-3.0, -7.0]), np.array([2, 4]), np.array([4, 12])
    )
    scores = {rule: scores_C.tolist() for rule, scores_C in choices.rule_scores(example).items()}
    assert scores == {
        "accuracy": [-4, -6],
        "accuracy_per_token": [-2, -1.5],
        "accuracy_per_byte": [-1, -0.5],
        "accuracy_pmi": [-1, 1],
    }
    assert list(choices.taken(example).values()) == [0, 1, 1, 1]
    np.testing.assert_allclose(choices.probabilities(example), [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution():
    outputs, references = ["x"] * 400, [["x"]] * 100 + [["y"]] * 300
    [metric] = catalogue.find(["accuracy"])
    rows = metric.rows(outputs, references)
    interval = intervals.intervals(metric, rows)["accuracy"]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (interval.value, interval.examples) == (0.25, 400)
    assert interval.low == pytest.approx(0.25 - half, abs=0.01)
    assert interval.high == pytest.approx(0.25 + half, abs=0.01)
    assert intervals.intervals(metric, rows)["accuracy"] == interval
    assert intervals.intervals(metric, rows, seed=1)["accuracy"] != interval


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 0.1684), (20, 0.8316, 1.0)])
def test_an_interval_of_examples_that_are_all_wrong_or_all_right_is_not_empty(right, low, high):
    """That of Clopper and Pearson, 0 to 16.84% for 0 of 20: scipy.stats.binomtest(0, 20).proportion_ci()."""
    [metric] = catalogue.find(["accuracy"])
    rows = metric.rows(["x"] * 20, [["x"]] * right + [["y"]] * (20 - right))
    interval = intervals.intervals(metric, rows)["accuracy"]
    assert (interval.value, interval.low, interval.high) == pytest.approx((right / 20, low, high), abs=5e-5)
    # a loss has no such bounds
    loss = intervals.intervals(NamedMeans(("loss",), shares=False), np.full((20, 1), right / 20))["loss"]
    assert (loss.low, loss.high) == (right / 20, right / 20)


@pytest.mark.parametrize("name", ["bleu", "chrf", "mcc", "f1", "spearman", "auc"])
def test_a_corpus_score_is_resampled_from_contributions(name, monkeypatch):
    """The scores of resampled rows are those of a corpus with these examples, made from the texts."""
    if name in ("bleu", "chrf"):
        outputs, references = SYSTEM, [list(several) for several in zip(*STREAMS, strict=True)]
    else:
        outputs, references = ["1", "0", "1", "0.5"], [["1"], ["0"], ["0"], ["1"]]
    [metric] = catalogue.find([name])
    counts = np.array([[2, 0, 1, 0][: len(outputs)], [0, 1, 2, 1][: len(outputs)]])
    resampled = metric.resampled(metric.rows(outputs, references), counts)
    for row, values in zip(counts, resampled, strict=True):
        corpus = [
            pair for pair, count in zip(zip(outputs, references, strict=True), row, strict=True) for _ in range(count)
        ]
        expected = score(name, *map(list, zip(*corpus, strict=True)))
        np.testing.assert_allclose(values, list(expected.values()))
    # blocks of draws change nothing
    rows, whole = metric.rows(outputs, references), []
    for block in (intervals.BLOCK, 8):
        monkeypatch.setattr(intervals, "BLOCK", block)
        whole.append(intervals.intervals(metric, rows, resamples=7))
    assert [[i.value, i.examples] for i in whole[0].values()] == [[i.value, i.examples] for i in whole[1].values()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalogue.find(["rogue"]), "unknown metric 'rogue'; did you mean 'rouge'"),
        (lambda: catalogue.find(["mcc", "accuracy", "mcc"]), "metrics give mcc twice; name each metric once"),
        (lambda: score("bleu", ["a"], [[]]), "example 1 has no reference; give at least one"),
        (
            lambda: score("pearson", ["1"], [["high"]]),
            "reference of example 1 is 'high', and pearson is of numbers",
        ),
        (lambda: score("auc", ["high"], [["1"]]), "the output of example 1 is 'high', and auc ranks numbers"),
        (lambda: score("mcc", ["a"], [["a", "b"]]), "example 1 has 2 references, and this metric compares with one"),
    ],
)
def test_wrong_metrics_and_references_are_errors(call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("name", "module"), [("rouge", "rouge_score"), ("chrf", "sacrebleu"), ("mcc", "sklearn")])
def test_a_metric_without_its_library_names_the_command(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(f"{module} is not installed; run `pip install 't5g2[eval]'`")):
        catalogue.find([name])
