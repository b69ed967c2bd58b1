"""Zero-shot classification and retrieval by literal cases, and against every score at once."""

import math

import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.eval import zero_shot
from t5g2.eval.zero_shot import class_embeddings, classify, retrieve

SCALE, BIAS = math.log(2), -1.0


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def with_cosines(cosines_NM):
    """Images and texts of length 1 with these cosines: texts are axes, and every image has one more of its own."""
    cosines_NM = np.asarray(cosines_NM, np.float64)
    rest_N = np.sqrt(1 - np.sum(cosines_NM**2, axis=1))
    texts = np.eye(cosines_NM.shape[1], sum(cosines_NM.shape))
    return np.concatenate([cosines_NM, np.diag(rest_N)], axis=1), texts


COSINES = [[0.1, 0.7, 0.3, 0.2], [0.6, 0.2, 0.6, 0.1], [0.5, 0.4, 0.1, 0.6]]


def test_the_example_of_classify():
    result = classify(np.array([[1, 0], [0, 1], [1, 1]]), np.eye(2), logit_scale=SCALE, logit_bias=BIAS)
    middle = sigmoid(math.sqrt(2) - 1)
    expected = [[sigmoid(1), sigmoid(-1)], [sigmoid(-1), sigmoid(1)], [middle, middle]]
    np.testing.assert_allclose(result.scores_NC, expected, rtol=1e-6)
    assert result.scores_NC.dtype == np.float32
    assert result.classes_N.tolist() == [0, 1, 0]
    assert result.accuracy([0, 1, 1]) == pytest.approx(2 / 3)


def test_the_example_of_class_embeddings():
    embeddings = class_embeddings(np.array([[2, 0], [0, 3], [0, 1]]), [0, 0, 1])
    np.testing.assert_allclose(embeddings, [[0.5**0.5, 0.5**0.5], [0, 1]], rtol=1e-6)


def test_prompts_count_alike_however_long_their_embeddings_are_and_in_any_order():
    prompts = np.random.RandomState(0).standard_normal((6, 5))
    classes = [2, 0, 1, 0, 2, 2]
    order = [3, 5, 0, 2, 4, 1]
    np.testing.assert_allclose(
        class_embeddings(prompts * np.arange(1, 7)[:, None], classes),
        class_embeddings(prompts[order], np.array(classes)[order]),
        atol=1e-6,
    )


def test_the_example_of_retrieve():
    recall = retrieve(*with_cosines(COSINES), [0, 0, 1, -1], ks=(1, 2, 3))
    assert recall.image_to_text == {1: 1 / 2, 2: 1.0, 3: 1.0}
    assert recall.text_to_image == {1: 2 / 3, 2: 2 / 3, 3: 1.0}


def test_a_model_that_embeds_everything_alike_finds_nothing():
    x = np.random.RandomState(0).standard_normal((1, 33)).repeat(40, axis=0)
    recall = retrieve(x, x, np.arange(40), ks=(1, 39, 40))
    assert recall.image_to_text == recall.text_to_image == {1: 0.0, 39: 0.0, 40: 1.0}


def test_a_model_that_is_right_finds_everything():
    x = np.random.RandomState(0).standard_normal((40, 33))
    assert retrieve(x, 3 * x, np.arange(40), ks=(1,)) == ({1: 1.0}, {1: 1.0})


def test_blocks_change_nothing(monkeypatch):
    """Against the ranks in a sorted list of all scores; no two of these are equal."""
    draw = np.random.RandomState(1)
    images, texts = draw.standard_normal((23, 6)), draw.standard_normal((50, 6))
    owners = draw.randint(-1, 23, 50)
    owners[7] = 22
    monkeypatch.setattr(zero_shot, "BLOCK", 7)
    recall = retrieve(images, texts, owners, ks=(1, 3, 10, 50))
    scores = (images / np.linalg.norm(images, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T
    by_image = [
        min(list(np.argsort(-scores[n])).index(m) for m in np.flatnonzero(owners == n))
        for n in sorted(set(owners) - {-1})
    ]
    by_text = [list(np.argsort(-scores[:, m])).index(owners[m]) for m in range(50) if owners[m] >= 0]
    assert recall.image_to_text == {k: np.mean(np.array(by_image) < k) for k in (1, 3, 10, 50)}
    assert recall.text_to_image == {k: np.mean(np.array(by_text) < k) for k in (1, 3, 10, 50)}
    assert 0 < recall.image_to_text[3] < 1
    result = classify(images, texts, logit_scale=SCALE, logit_bias=BIAS)
    np.testing.assert_allclose(result.scores_NC, 1 / (1 + np.exp(1 - 2 * scores)), rtol=1e-5)
    np.testing.assert_array_equal(result.classes_N, scores.argmax(axis=1))


def test_scores_that_are_all_one_still_have_a_best_class():
    images, classes = with_cosines([[0.5, 0.6, 0.4]])
    result = classify(images, classes, logit_scale=math.log(100), logit_bias=0.0)
    assert result.scores_NC.tolist() == [[1.0, 1.0, 1.0]]
    assert result.classes_N.tolist() == [1]
    low = classify(images, classes, logit_scale=math.log(100), logit_bias=-2000.0)
    assert low.scores_NC.tolist() == [[0.0, 0.0, 0.0]]


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_embeddings(EYE, [0, 1]), r"3 prompts and classes \[2\]; give the class of every prompt"),
        (lambda: class_embeddings(EYE, [0, 0, 2]), r"classes 0 to 2, of which \[1\] have no prompt; count from 0"),
        (lambda: class_embeddings(EYE, [-1, 0, 1]), "classes -1 to 1"),
        (lambda: class_embeddings(np.zeros((0, 3)), []), r"prompts have shape \[0, 3\]; embeddings are"),
        (
            lambda: classify(EYE, np.eye(2), logit_scale=0, logit_bias=0),
            r"images \[3, 3\] and classes \[2, 2\]; .* width",
        ),
        (
            lambda: classify(EYE * np.nan, EYE, logit_scale=0, logit_bias=0),
            "images hold embeddings that are not finite",
        ),
        (lambda: classify(EYE, EYE, logit_scale=0, logit_bias=0).accuracy([1]), r"\(1,\) labels for 3 images"),
        (lambda: retrieve(EYE, EYE, [0, 1]), r"3 texts and images of texts \[2\]; give the image of every text"),
        (
            lambda: retrieve(EYE, EYE, [0, 1, 3]),
            r"images of texts are 0 to 3, and there are 3 images; allowed are 0 to 2",
        ),
        (lambda: retrieve(EYE, EYE, [-1, -1, -1]), "not for all"),
        (lambda: retrieve(EYE, EYE, [0, 1, 2], ks=(0,)), r"ks = \[0\]; .* at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
