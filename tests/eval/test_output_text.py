"""The text of an output: cut at stop strings, without hidden tokens, and what of it may be shown before its end."""

import numpy as np
import pytest

from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import HuggingFace, SentencePiece
from t5g2.eval.generation import Output
from t5g2.eval.output_text import as_text, text_so_far
from tests.data import tokenizer_files


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        return Bytes()
    if request.param == "sentencepiece":
        return SentencePiece(str(tokenizer_files.sentencepiece(folder)))
    return HuggingFace(str(tokenizer_files.huggingface(folder)))


def test_an_output_is_cut_within_a_token_and_keeps_the_scores_of_what_is_left():
    class Pairs(Bytes):
        """Tokens of two bytes each: id 2 k stands for letters k and k + 1."""

        def decode(self, tokens, *, skip_special_tokens=False):
            return "".join(chr(97 + token) + chr(98 + token) for token in np.asarray(tokens).tolist())

    scores = np.array([-1.0, -2.0, -3.0], np.float32)
    output = as_text(Output(np.array([0, 2, 4]), scores), Pairs(), ["d"], skip_special_tokens=True)
    assert output.text == "abc"
    assert output.tokens.tolist() == [0, 2]
    assert output.log_probs.tolist() == [-1.0, -2.0]
    output = as_text(Output(np.array([0, 2, 4]), scores), Pairs(), ["cd"], skip_special_tokens=True)
    assert (output.text, output.tokens.tolist()) == ("ab", [0])


def test_a_stop_string_may_be_a_special_token():
    """It is found where it is spelled, and what is left is shown without other special tokens."""
    tokenizer = Bytes()
    bos, eos = tokenizer.special_tokens.bos, tokenizer.special_tokens.eos
    tokens = np.concatenate([[bos], tokenizer.encode("hi"), [eos], tokenizer.encode("there")]).astype(np.int32)
    output = as_text(Output(tokens), tokenizer, ["<eos>"], skip_special_tokens=True)
    assert output.text == "hi"
    assert output.tokens.tolist() == tokens[:3].tolist()
    assert as_text(Output(tokens), tokenizer, ["<eos>"], skip_special_tokens=False).text == "<bos>hi"


def test_the_bytes_of_byte_tokens():
    tokenizer = Bytes(sentinels=2)
    token_bytes = tokenizer.token_bytes()
    assert len(token_bytes) == tokenizer.vocab_size
    assert b"".join(token_bytes[token] for token in tokenizer.encode("añ\n")) == "añ\n".encode()
    assert token_bytes[tokenizer.special_tokens.eos] == b"<eos>"


def test_the_stop_token_is_shown_where_all_tokens_are():
    """As transformers' decode of the whole output does; nothing is added where none ended the output."""
    tokenizer = Bytes()
    eos, tokens = tokenizer.special_tokens.eos, tokenizer.encode("hi")
    ended = Output(tokens, stop_token=eos)
    assert as_text(ended, tokenizer, [], skip_special_tokens=False).text == "hi<eos>"
    assert as_text(ended, tokenizer, [], skip_special_tokens=False).tokens.tolist() == tokens.tolist()
    assert as_text(ended, tokenizer, [], skip_special_tokens=True).text == "hi"
    assert as_text(ended, tokenizer, ["i<e"], skip_special_tokens=False).text == "h"
    assert as_text(Output(tokens), tokenizer, [], skip_special_tokens=False).text == "hi"


@pytest.mark.parametrize("hidden", [True, False])
def test_what_was_shown_stays_whatever_follows(tokenizer, hidden):
    """Random pieces, specials, and bytes of characters that are whole, broken and never finished."""
    ids, random = tokenizer.special_tokens, np.random.default_rng(0)
    first = ids.first_byte if ids.first_byte is not None else tokenizer.first_byte
    euro = [first + byte for byte in "€".encode()]
    pieces = tokenizer.encode("a b").tolist()
    parts = [euro, euro[:1], euro[:2], euro[1:], [first + 65], [ids.eos], [ids.pad], pieces]
    for _ in range(200):
        tokens = np.array([x for k in random.integers(0, len(parts), 6) for x in parts[k]], np.int32)
        options = {"stop": ["b€", "a "], "skip_special_tokens": hidden}
        whole = as_text(Output(tokens), tokenizer, **options).text
        shown = [text_so_far(Output(tokens[:n]), tokenizer, **options) for n in range(len(tokens) + 1)]
        assert all(whole.startswith(text) for text in shown), (tokens, whole, shown)


def test_words_are_shown_before_the_output_ends(tokenizer):
    tokens = tokenizer.encode("the string of words")
    shown = text_so_far(Output(tokens[:-1]), tokenizer, [], skip_special_tokens=True)
    assert shown == tokenizer.decode(tokens[:-1])
    assert len(shown) > 10


def test_a_stop_string_within_a_hidden_token_leaves_nothing_of_it(tokenizer):
    eos = tokenizer.special_tokens.eos
    spelled = tokenizer.decode([eos])
    tokens = np.array([*tokenizer.encode("one"), eos, *tokenizer.encode("two")], np.int32)
    stop = [spelled[1:3]]
    assert as_text(Output(tokens), tokenizer, stop, skip_special_tokens=True).text == "one"
    assert as_text(Output(tokens), tokenizer, stop, skip_special_tokens=False).text == "one" + spelled[:1]


def test_a_stop_string_may_lie_around_a_hidden_token(tokenizer):
    tokens = np.array([*tokenizer.encode("one"), tokenizer.special_tokens.eos, *tokenizer.encode("two")], np.int32)
    assert as_text(Output(tokens), tokenizer, ["et"], skip_special_tokens=True).text == "on"
    spelled = tokenizer.decode(tokens)
    assert as_text(Output(tokens), tokenizer, ["et"], skip_special_tokens=False).text == spelled
