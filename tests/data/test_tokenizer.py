import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5g2.core.errors import UserError
from t5g2.data.tokenizer import BY_NAME, Bytes, from_dict


def test_ids_stand_in_gemmas_order():
    tokenizer = Bytes(sentinels=2)
    names = ("pad", "eos", "bos", "unk", "mask", "start_of_image", "end_of_image", "image", "sentinel_0", "sentinel_1")
    assert [tokenizer.id(name) for name in names] == list(range(10))
    assert tokenizer.vocab_size == 10 + 256
    specials = tokenizer.specials
    assert (specials.pad, specials.eos, specials.bos, specials.unk, specials.mask) == (0, 1, 2, 3, 4)
    assert specials.sentinel_ids(2).tolist() == [8, 9]
    assert specials.is_sentinel(np.array([7, 8, 9, 10])).tolist() == [False, True, True, False]
    with pytest.raises(UserError, match="unknown special token 'eod'; did you mean 'eos'"):
        tokenizer.id("eod")


def test_the_drawn_text():
    tokens = Bytes(sentinels=2).encode("Hi")
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [10 + 72, 10 + 105]


@settings(derandomize=True, deadline=None)
@given(st.text(), st.integers(0, 200))
def test_decode_undoes_encode(text, sentinels):
    tokenizer = Bytes(sentinels)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.count(text) == len(tokenizer.encode(text))


def test_what_is_no_text_can_be_read():
    tokenizer = Bytes(sentinels=4)
    tokens = [2, *tokenizer.encode("é")[:1], 11, *tokenizer.encode("ok"), 1, 9999]
    assert tokenizer.decode(tokens) == "<bos>\ufffd<sentinel_3>ok<eos><unused_9999>"
    assert tokenizer.decode(tokens, show_specials=False) == "\ufffdok"
    assert tokenizer.decode([]) == ""


def test_it_is_described_by_plain_data():
    tokenizer = Bytes(sentinels=7)
    assert from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert BY_NAME[tokenizer.to_dict()["kind"]] is Bytes
    assert tokenizer.fingerprint() == Bytes(7).fingerprint() != Bytes(8).fingerprint()
    with pytest.raises(UserError, match="unknown tokenizer 'byte'; did you mean 'bytes'"):
        from_dict({"kind": "byte"})
    with pytest.raises(UserError, match="a bytes tokenizer is not described by"):
        from_dict({"kind": "bytes", "sentinel": 3})
    with pytest.raises(UserError, match="sentinels = -1; it must be at least 0"):
        Bytes(-1)
