"""Retrieval among texts, scores by group, coverage of a tokenizer, and a linear probe of images, on literal cases."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig, Source
from t5g2.data.sources.text_files import TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import SentencePiece
from t5g2.eval import text_retrieval, tokenizer_coverage, zero_shot
from t5g2.eval.evaluation import Evaluator
from t5g2.eval.image_probe import ImageLinearProbe
from t5g2.eval.task_interface import EvalContext
from t5g2.eval.tasks import TextLoss, TextRetrieval, TokenizerCoverage
from t5g2.objectives import Causal, PrefixLM
from tests import tiny, weights
from tests.data import tokenizer_files
from tests.tiny import FLOAT32

TOKENIZER = Bytes(sentinels=4)
STACK = dataclasses.replace(tiny.GEMMA3, vocab_size=TOKENIZER.vocab_size)
T5GEMMA = dataclasses.replace(tiny.T5GEMMA2, encoder=STACK, decoder=STACK)
PAIRS = [
    {"q": "the sum", "texts": ["1 + 2", "x + y"], "part": "add"},
    {"q": "the product", "texts": ["a * b"], "part": "multiply"},
    {"q": "nothing", "texts": [], "part": "none"},
]


def context_of(tokenizer=TOKENIZER, *, encoder_length=0):
    source = Source(TextFiles("unused"), PrefixLM() if encoder_length else Causal())
    data = DataConfig((source,), tokenizer, 2, encoder_length, 64, 24, streams=2)
    return EvalContext(data, seed=1, compute=FLOAT32)


def retrieval(**changes):
    return TextRetrieval(**{"data": PAIRS, "name": "r", "template": "{q}", "texts": "{texts}", "ks": (1, 2)} | changes)


def test_recall_in_both_directions(monkeypatch):
    """The drawing of zero_shot.retrieve: three queries and four texts, of which one belongs to none."""
    vectors = {"the sum": [1, 0], "the product": [0, 1], "nothing": [1, 1], "1 + 2": [1, 0.1], "x + y": [-1, 0.2]}
    vectors |= {"a * b": [0.9, 0.1]}

    def embed(model, token_rows, *, pooling, **settings):
        assert pooling == "last"
        return np.array([vectors[TOKENIZER.decode(row, skip_special_tokens=True)] for row in token_rows], np.float32)

    monkeypatch.setattr(text_retrieval.text_embeddings, "embed", embed)
    result = Evaluator([retrieval(pooling="last", group="{part}")], context_of()).run(weights.model(STACK))
    by_query, by_text = zero_shot.ranks(
        np.array([vectors[pair["q"]] for pair in PAIRS], np.float32),
        np.array([vectors[text] for pair in PAIRS for text in pair["texts"]], np.float32),
        [0, 0, 1],
    )
    assert by_query.tolist() == [1, 2, 0]
    assert by_text.tolist() == [1, 3, 3]
    assert result.scores == {
        "r/query_to_text@1": 0.5,
        "r/query_to_text@2": 1,
        "r/text_to_query@1": pytest.approx(1 / 3),
        "r/text_to_query@2": pytest.approx(1 / 3),
        "r/query_to_text@1/add": 1,
        "r/query_to_text@2/add": 1,
        "r/query_to_text@1/multiply": 0,
        "r/query_to_text@2/multiply": 1,
    }
    assert [p["rank"] for p in result.predictions] == [1, 2, 0]
    assert result.predictions[0]["scores"] == {"query_to_text@1": 1, "query_to_text@2": 1}


@pytest.mark.parametrize("config", [STACK, T5GEMMA], ids=["decoder-only", "encoder-decoder"])
def test_a_text_finds_itself_and_ties_do_not_score(config):
    context = context_of(encoder_length=64 if config is T5GEMMA else 0)
    own = [{"q": text, "texts": [text]} for text in ("one", "another text", "x = 1")]
    result = Evaluator([retrieval(data=own)], context).run(weights.model(config))
    assert set(result.scores.values()) == {1.0}
    alike = [{"q": "one", "texts": ["same"]}, {"q": "one", "texts": ["same"]}]
    tied = Evaluator([retrieval(data=alike)], context).run(weights.model(config))
    assert (tied.scores["r/query_to_text@1"], tied.scores["r/query_to_text@2"]) == (0, 1)
    with pytest.raises(UserError, match=r"task 'r': no reference: no record has a text at '\{texts\}'"):
        Evaluator([retrieval(data=PAIRS[2:])], context)


def test_scores_by_group_are_those_of_the_group_alone():
    data = [{"text": "the cat", "of": "a"}, {"text": "é", "of": "b"}, {"text": "xyz", "of": "a"}]
    model, context = weights.model(STACK), context_of()
    whole = Evaluator([TextLoss(data=data, name="t", group="{of}")], context).run(model)
    for group in "ab":
        part = Evaluator([TextLoss(data=[r for r in data if r["of"] == group], name="t")], context).run(model)
        for name, value in part.scores.items():
            assert whole.scores[f"{name}/{group}"] == pytest.approx(value, rel=1e-5)
            assert whole.intervals[f"{name}/{group}"].examples == part.intervals[name].examples
    with pytest.raises(UserError, match="task 't', record 1: the group 'a/b' has a /"):
        Evaluator([TextLoss(data=[{"text": "x", "of": "a/b"}], name="t", group="{of}")], context)


def test_coverage_counts_bytes_tokens_and_what_is_unknown(tmp_path):
    tokenizer = SentencePiece(str(tokenizer_files.sentencepiece(tmp_path)))
    unknown = tokenizer.special_tokens.unk
    texts = ["the cat sat on the mat", "ཀཁ"]
    data = [{"text": text, "of": f"{n}"} for n, text in enumerate(texts)]
    for own in (TOKENIZER, tokenizer):
        rows = np.array([tokenizer_coverage.counts(text, own) for text in texts])
        tokens = [own.encode_plain(text) for text in texts]
        assert rows[:, 0].tolist() == [22, 6]
        assert rows[:, 1].tolist() == [len(several) for several in tokens]
        result = Evaluator([TokenizerCoverage(data=data, name="c", group="{of}")], context_of(own)).run(None)
        assert result.scores["c/bytes_per_token"] == pytest.approx(28 / rows[:, 1].sum())
        for n in range(2):
            assert result.scores[f"c/bytes_per_token/{n}"] == pytest.approx(rows[n, 0] / rows[n, 1])
            assert result.scores[f"c/unknown/{n}"] == pytest.approx(np.mean(tokens[n] == unknown))
    # of bytes, every token is one
    assert tokenizer_coverage.counts("é", TOKENIZER) == (2, 2, 0, 2)


class Vectors:
    """A dual encoder whose images are their vectors."""

    def embed_images(self, images):
        if "torn" in images:
            raise UserError("torn is not an image")
        return np.array(images, np.float32)

    def embed_texts(self, texts):
        raise AssertionError("a linear probe reads no text")


def test_a_linear_probe_of_images_is_scikit_learn_s():
    draw = np.random.default_rng(0)
    centres = np.eye(3)
    train, test = ([{"image": (centres[n % 3] + draw.normal(0, 0.4, 3)).tolist(), "label": n % 3} for n in range(size)]
                   for size in (60, 30))  # fmt: skip
    shared = {"name": "p", "classes": ("a", "b", "c"), "train": train}
    result = Evaluator([ImageLinearProbe(**shared, data=[*test, {"image": "torn", "label": "b"}])], context_of()).run(
        Vectors()
    )

    def units(records):
        x = np.array([record["image"] for record in records], np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    labels = [record["label"] for record in test]
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(units(train), [record["label"] for record in train])
    right = regression.predict(units(test)) == labels
    assert 0.5 < np.mean(right) < 1
    assert result.scores == {"p/accuracy": pytest.approx(np.sum(right) / 31), "p/errors": 1}
    assert result.predictions[-1] == {"task": "p", "output": "", "reference": "b", "scores": {"accuracy": 0},
                                      "error": "torn is not an image"}  # fmt: skip
    torn = ImageLinearProbe(**shared | {"train": [train[0], {"image": "torn", "label": 1}]}, data=test)
    with pytest.raises(UserError, match="'p', record 2 of train: torn is not an image"):
        Evaluator([torn], context_of()).run(Vectors())
    with pytest.raises(UserError, match="task 'p': the records of train are of one class; give at least two"):
        Evaluator([ImageLinearProbe(**shared | {"train": train[:1]}, data=test)], context_of())
