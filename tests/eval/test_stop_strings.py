"""Stop strings: the automaton by its literal table, and by search in all short texts."""

import itertools

import numpy as np
import pytest

from t5g2.core.errors import UserError
from t5g2.eval import stop_strings
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
