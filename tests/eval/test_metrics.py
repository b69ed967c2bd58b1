"""Metrics by literal cases."""

import math

import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.eval import metrics
from t5g2.eval.metrics import TokenSums


def test_sums_are_added_and_divided_once():
    total = TokenSums(loss=6.0, correct=1.0, weight=2.0) + TokenSums(loss=0.0, correct=2.0, weight=2.0)
    assert total == TokenSums(6.0, 3.0, 4.0)
    assert total.mean_loss == 1.5  # and not the mean of 3 and 0 by batch, were the batches unequal
    assert total.accuracy == 0.75
    assert math.isnan(TokenSums().mean_loss)
    assert math.isnan(TokenSums().accuracy)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(50), 50.0), (1e4, math.inf)])
def test_perplexity(loss, expected):
    assert metrics.perplexity(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("means", "shares", "expected"),
    [
        ({"a": 2.0, "b": 4.0}, {"a": 1, "b": 3}, 3.5),
        ({"a": 2.0, "b": 4.0}, {"b": 0.75, "a": 0.25}, 3.5),
        ({"a": 2.0}, {"a": 5}, 2.0),
    ],
)
def test_a_mixture_weighs_means_by_its_shares(means, shares, expected):
    assert metrics.mixture_mean(means, shares) == expected


def test_a_mixture_of_other_names_is_refused():
    with pytest.raises(UserError, match=r"means of \['a'\] cannot be mixed by shares of \['a', 'b'\]"):
        metrics.mixture_mean({"a": 1.0}, {"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("outputs", "references", "expected"),
    [
        (["a b", "c"], ["a b", "d"], 0.5),
        ([" a  b\n"], ["a b"], 1.0),
        (["A"], ["a"], 0.0),
        ([""], ["a"], 0.0),
    ],
)
def test_exact_match(outputs, references, expected):
    assert metrics.exact_match(outputs, references) == expected


@pytest.mark.parametrize(
    ("outputs", "references", "expected"),
    [
        ([[1, 2, 3]], [[1, 9, 3]], 2 / 3),
        ([[1]], [[1, 2, 3, 4]], 0.25),
        ([[1, 2, 3, 4]], [[1, 2]], 1.0),
        ([[], [5]], [[7], [5]], 0.5),
    ],
)
def test_token_accuracy(outputs, references, expected):
    outputs, references = ([np.array(x, np.int32) for x in xs] for xs in (outputs, references))
    assert metrics.token_accuracy(outputs, references) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.exact_match, metrics.token_accuracy])
def test_unpaired_texts_are_refused(metric):
    with pytest.raises(UserError, match="2 outputs and 1 references"):
        metric(["a", "b"], ["a"])
