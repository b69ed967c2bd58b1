"""Zero-shot classification and retrieval with the embeddings of a dual encoder. NumPy on the host.

N images, M texts, C classes, D width, Q queries, A candidates, K queries of a block. Embeddings may have any length:
they are compared by cosine.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from t5g2.core.errors import UserError

# queries whose scores are in memory at a time
BLOCK = 1024
# cosines nearer than this count as equal: float32 cannot distinguish them
TIE = 1e-6


class Classification(NamedTuple):
    """Zero-shot classification of images.

    Attributes:
      scores_NC: float32, probability of each class, independent of the others: rows do not sum to 1.
      classes_N: int, the class of the highest score, of equal ones the first.
    """

    scores_NC: Float[np.ndarray, "N C"]
    classes_N: Int[np.ndarray, " N"]

    def accuracy(self, labels: ArrayLike) -> float:
        """Returns the share of the images whose class is their label.

        Raises:
          UserError: the number of labels is not that of the images.
        """
        labels_N = np.asarray(labels)
        if labels_N.shape != self.classes_N.shape:
            raise UserError(f"{labels_N.shape} labels for {len(self.classes_N)} images; give one for each")
        return float(np.mean(self.classes_N == labels_N))


class RetrievalRecall(NamedTuple):
    """Recall at k: the share of the queries with a right candidate among the first k, by k.

    Attributes:
      image_to_text: images are the queries, any of their texts is right.
      text_to_image: texts are the queries, their image is right.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def class_embeddings(prompts_MD: Float[np.ndarray, "M D"], classes: ArrayLike) -> Float[np.ndarray, "C D"]:
    """Returns float32[C, D] of length 1: for each class the mean of its prompts' normalized embeddings.

    As CLIP averages several prompts (arXiv 2103.00020, section 3.1.4). Prompts [[2 0] [0 3] [0 1]] of the classes
    [0 0 1]: [[0.71 0.71] [0 1]].

    Args:
      prompts_MD: embeddings of the prompts of all classes.
      classes: the class of each prompt, from 0; every class has a prompt.

    Raises:
      UserError: the number of classes is not that of the prompts, or a class has no prompt.
    """
    class_M = np.asarray(classes)
    units_MD = _unit_rows("prompts", prompts_MD)
    if class_M.shape != units_MD.shape[:1] or not np.issubdtype(class_M.dtype, np.integer):
        raise UserError(f"{len(units_MD)} prompts and classes {list(class_M.shape)}; give the class of every prompt")
    number = int(class_M.max()) + 1
    missing = sorted(set(range(number)) - set(class_M.tolist()))
    if missing or class_M.min() < 0:
        raise UserError(f"classes {class_M.min()} to {number - 1}, of which {missing} have no prompt; count from 0")
    # the sum has the direction of the mean, and the length is normalized below
    sums_CD = np.zeros((number, units_MD.shape[1]), np.float32)
    np.add.at(sums_CD, class_M, units_MD)
    return _unit_rows("classes", sums_CD)


def classify(
    images_ND: Float[np.ndarray, "N D"],
    classes_CD: Float[np.ndarray, "C D"],
    *,
    logit_scale: float,
    logit_bias: float,
) -> Classification:
    """Returns scores, sigmoid(exp(logit_scale) * cosine + logit_bias), and the best class of every image.

    Images [[1 0] [0 1] [1 1]] and classes [[1 0] [0 1]], with logit_scale = ln 2 and logit_bias = -1:

        scores [[sigmoid(1)    sigmoid(-1)]       classes [0 1 0]
                [sigmoid(-1)   sigmoid(1)]
                [sigmoid(0.41) sigmoid(0.41)]]

    Raises:
      UserError: embeddings that are not finite, none at all, or of two widths.
    """
    images_ND, classes_CD = _unit_pair("images", images_ND, "classes", classes_CD)
    scores_NC = np.empty((len(images_ND), len(classes_CD)), np.float32)
    classes_N = np.empty(len(images_ND), np.int64)
    for block in _blocks(len(images_ND)):
        logits_KC = (images_ND[block] @ classes_CD.T).astype(np.float64) * math.exp(logit_scale) + logit_bias
        scores_NC[block] = np.exp(-np.logaddexp(0.0, -logits_KC))  # the sigmoid, without overflow
        classes_N[block] = np.argmax(logits_KC, axis=1)  # not of scores: the sigmoids of 20 and 30 are the same float
    return Classification(scores_NC, classes_N)


def retrieve(
    images_ND: Float[np.ndarray, "N D"],
    texts_MD: Float[np.ndarray, "M D"],
    image_of_text: ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalRecall:
    """Returns recall at each k in both directions.

    Several texts may belong to one image: any of them is right for it. An image without a text, and a text without an
    image, are not queries, only wrong candidates for others. Wrong candidates that score like the best right one are
    ranked before it, so that a model that embeds everything alike does not score. Three images and four texts,

        image_of_text [0 0 1 -1]         cosines  text 0  text 1  text 2  text 3
                                         image 0    0.1     0.7     0.3     0.2      its text 1 is first
                                         image 1    0.6     0.2     0.6     0.1      its text 2 ties with 0: second
                                         image 2    0.5     0.4     0.1     0.6      has no text

        image_to_text: 1/2 at k = 1, 2/2 at k = 2
        text_to_image: text 0 has its image third, text 1 and text 2 first: 2/3 at k = 1 and 2, 3/3 at k = 3

    Args:
      images_ND, texts_MD: embeddings.
      image_of_text: the image of each text, from 0; -1 = none of them.
      ks: numbers of first candidates among which a right one counts.

    Raises:
      UserError: embeddings as for `classify`, an image that does not exist, no pair at all, or a k below 1.
    """
    if not len(ks) or min(ks) < 1:
        raise UserError(f"ks = {list(ks)}; give at least one number of candidates, each at least 1")
    by_query = ranks(images_ND, texts_MD, image_of_text)
    return RetrievalRecall(
        *({k: float(np.mean(ranks_Q[ranks_Q > 0] <= k)) for k in ks} for ranks_Q in by_query),
    )


def ranks(
    images_ND: Float[np.ndarray, "N D"], texts_MD: Float[np.ndarray, "M D"], image_of_text: ArrayLike
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """Returns the rank of the best right candidate of every image and of every text, from 1; 0 = it is no query.

    In the example of `retrieve` these are [1 2 0] and [3 1 1 0].

    Raises:
      UserError: as `retrieve`.
    """
    images_ND, texts_MD = _unit_pair("images", images_ND, "texts", texts_MD)
    owner_M = np.asarray(image_of_text)
    if owner_M.shape != texts_MD.shape[:1] or not np.issubdtype(owner_M.dtype, np.integer):
        raise UserError(
            f"{len(texts_MD)} texts and images of texts {list(owner_M.shape)}; give the image of every text"
        )
    if owner_M.min() < -1 or owner_M.max() >= len(images_ND) or owner_M.max() < 0:
        raise UserError(
            f"images of texts are {owner_M.min()} to {owner_M.max()}, and there are {len(images_ND)} images; allowed "
            f"are 0 to {len(images_ND) - 1}, and -1 for a text without one, not for all"
        )
    images_N = np.arange(len(images_ND))
    by_image = _ranks(images_ND, texts_MD, lambda block: images_N[block, None] == owner_M[None, :])
    by_text = _ranks(texts_MD, images_ND, lambda block: owner_M[block, None] == images_N[None, :])
    return by_image, by_text


def found_within(ranks_Q: Int[np.ndarray, " Q"], ks: Sequence[int]) -> Float[np.ndarray, "Q K"]:
    """Returns float64[queries, K]: 1 where a right candidate is among the first k, for each k; rank 0 is no query.

    Ranks [1 2 0] and ks (1, 2): [[1 1] [0 1]].
    """
    return (ranks_Q[ranks_Q > 0, None] <= np.array(ks)).astype(np.float64)


def _ranks(
    queries_QD: Float[np.ndarray, "Q D"],
    candidates_AD: Float[np.ndarray, "A D"],
    is_right: Callable[[slice], Bool[np.ndarray, "K A"]],
) -> Int[np.ndarray, " Q"]:
    """Returns the rank of each query's best right candidate, 0 if it has none.

    `is_right` gives bool[K, A] for a block of K queries: True = a right candidate.
    """
    ranks = []
    for block in _blocks(len(queries_QD)):
        scores_KA, right_KA = queries_QD[block] @ candidates_AD.T, is_right(block)
        best_K1 = np.max(scores_KA, axis=1, keepdims=True, where=right_KA, initial=-np.inf)
        # ties with the best right candidate rank before it, or a model that embeds everything alike would score 1
        before_K = np.sum(~right_KA & (scores_KA > best_K1 - TIE), axis=1)
        ranks.append(np.where(right_KA.any(axis=1), 1 + before_K, 0))
    return np.concatenate(ranks)


def _blocks(number: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, number, BLOCK))


def _unit_pair(name: str, x: np.ndarray, other: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both normalized; raises UserError unless they have one width."""
    x, y = _unit_rows(name, x), _unit_rows(other, y)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"{name} {list(x.shape)} and {other} {list(y.shape)}; embeddings to compare have one width")
    return x, y


def _unit_rows(name: str, x_ND: np.ndarray) -> Float[np.ndarray, "N D"]:
    """Returns the rows scaled to length 1; zeros stay zeros."""
    x_ND = np.asarray(x_ND, np.float32)
    if x_ND.ndim != 2 or not x_ND.size:
        raise UserError(f"{name} have shape {list(x_ND.shape)}; embeddings are [number, width], and at least one")
    if not np.isfinite(x_ND).all():
        raise UserError(f"{name} hold embeddings that are not finite; they cannot be compared, so check the model")
    lengths_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0).astype(np.float32)
