"""Stop strings: the automaton by its literal table, and by search in all short texts; cuts of texts."""

import itertools

import numpy as np
import pytest

from t5g2.api.text_generation import as_text
from t5g2.core.errors import UserError
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.eval import stop_strings
from t5g2.eval.generation import Output
from t5g2.eval.stop_strings import first_stop, stop_table, without_begun_stop


def test_the_table_of_the_docstring():
    table = stop_table(["\n\n", "END"], [b"a", b"\n", b"x\n", b"ND"])
    expected = [[0, 1, 1, 0], [0, 4, 1, 0], [0, 1, 1, 4], [0, 1, 1, 0], [4, 4, 4, 4]]
    assert np.asarray(table.next_SV)[:, :].tolist() == [*expected]


@pytest.mark.parametrize(
    "strings", [["aa"], ["ab", "xaby", "ba"], ["aab", "ab"], ["é"], ["abab", "b"], ["ab", "abxab"], ["ab"] * 2]
)
def test_a_string_is_found_where_search_finds_it(strings):
    """In every text of five tokens, some of which hold several bytes, or a part of a character."""
    tokens = [b"a", b"b", b"ab", b"xa", b"\xc3", b"\xa9y", b""]
    table = stop_table(strings, tokens)
    for text in itertools.product(range(len(tokens)), repeat=5):
        state = np.zeros(1, np.int32)
        for token in text:
            state = table.after(state, np.array([token]))
        joined = b"".join(tokens[token] for token in text)
        assert bool(table.found(state)[0]) == any(string.encode() in joined for string in strings), (text, strings)


def test_an_empty_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty, and every text has it; leave it out"):
        stop_table(["a", ""], [b"a"])


def test_where_a_text_is_cut():
    assert first_stop("abcb", ["c", "b"]) == 1
    assert first_stop("abcb", ["x"]) is None
    assert without_begun_stop("so far\nQ", ["\nQ:", "END"]) == "so far"
    assert without_begun_stop("so far E", ["\nQ:", "END"]) == "so far "
    assert without_begun_stop("so far", ["\nQ:"]) == "so far"


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


def test_a_long_string_is_found_and_one_beyond_the_range_is_refused(monkeypatch):
    string = "ab" * 2000 + "c"
    table = stop_table(["b" * 50, string], [b"a", b"b", b"c", b"bc"])
    state = np.zeros(1, np.int32)
    for token in [0, *[0, 1] * 2001]:
        state = table.after(state, np.array([token]))
    assert not table.found(state)[0]
    assert table.found(table.after(state, np.array([2])))[0]
    monkeypatch.setattr(stop_strings, "LARGEST_TABLE", 40)
    assert stop_table(["x" * 4, "é" * 3], [b"a"] * 4).next_SV.shape == (10, 4)
    message = "stop has 11 bytes of text; with the 4 ids of this model it may have at most 10; give shorter strings"
    with pytest.raises(UserError, match=message):
        stop_table(["x" * 5, "é" * 3], [b"a"] * 4)
