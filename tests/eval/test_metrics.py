"""Metrics by literal cases."""

import math

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
