"""Supervised fine-tuning: the arrays of the docstrings, prompt and answer tokens, and the text rebuilt."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2.core import settings
from t5g2.core.errors import UserError
from t5g2.core.objective import Objective
from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import finite_batches
from t5g2.data.sources.text_files import Jsonl
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import BY_NAME, SupervisedFineTuning, SupervisedFineTuningDecoder
from tests.objectives.arrays import RNG, SPECIALS, assert_example, repeatable

DIALOGUE = np.array([50, 52, 11, 60, 50, 51, 12, 13, 60, 50, 52, 14, 60, 50, 51, 15, 60], np.int32)
MODEL, USER, END = (50, 51), (50, 52), (60,)


def test_the_drawn_last_answer():
    assert_example(
        SupervisedFineTuning(MODEL, END)(DIALOGUE, RNG, special_tokens=SPECIALS),
        encoder_tokens=[50, 52, 11, 60, 50, 51, 12, 13, 60, 50, 52, 14, 60, 50, 51],
        decoder_tokens=[2, 15, 60],
        targets=[15, 60, 1],
        weights=[1, 1, 1],
    )


def test_the_drawn_answers():
    assert_example(
        SupervisedFineTuning(MODEL, END, turns="all")(DIALOGUE, RNG, special_tokens=SPECIALS),
        encoder_tokens=[50, 52, 11, 60, 50, 51],
        decoder_tokens=[2, 12, 13, 60, 50, 52, 14, 60, 50, 51, 15, 60],
        targets=[12, 13, 60, 50, 52, 14, 60, 50, 51, 15, 60, 1],
        weights=[1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    )


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_drawn_answer_of_a_decoder_only_model(both_ways):
    objective = SupervisedFineTuningDecoder(MODEL, END, both_ways=both_ways)
    example = objective(DIALOGUE[:9], RNG, special_tokens=SPECIALS)
    assert_example(
        example,
        encoder_tokens=[],
        decoder_tokens=[2, 50, 52, 11, 60, 50, 51, 12, 13, 60],
        targets=[50, 52, 11, 60, 50, 51, 12, 13, 60, 1],
        weights=[0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
    )
    assert objective.uses_blocks == both_ways
    if both_ways:
        assert example.blocks is not None
        assert example.blocks.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    else:
        assert example.blocks is None


def test_a_template_in_bytes():
    """With a real tokenizer: the answer is asked for up to the token that ends it, what follows is left out."""
    tokenizer = Bytes()
    text = "<start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
    starts, ends = ("<start_of_turn>model\n", "<end_of_turn>")
    objective = SupervisedFineTuning(
        tuple(tokenizer.encode(starts).tolist()), tuple(tokenizer.encode(ends).tolist()), eos=False
    )
    example = objective(tokenizer.encode(text), RNG, special_tokens=tokenizer.special_tokens)
    assert tokenizer.show(example.encoder_tokens) == text[: text.index("4")]
    assert tokenizer.show(example.targets) == "4<end_of_turn>"


def test_an_answer_that_does_not_end_is_the_rest():
    example = SupervisedFineTuning(MODEL, END)(np.array([50, 51, 12, 13], np.int32), RNG, special_tokens=SPECIALS)
    assert (example.encoder_tokens.tolist(), example.targets.tolist()) == ([50, 51], [12, 13, 1])


def test_an_answer_may_say_what_begins_one():
    tokens = np.array([50, 51, 12, 50, 51, 13, 60], np.int32)
    example = SupervisedFineTuning(MODEL, END)(tokens, RNG, special_tokens=SPECIALS)
    assert (example.encoder_tokens.tolist(), example.targets.tolist()) == ([50, 51], [12, 50, 51, 13, 60, 1])


def test_an_answer_cut_off_before_its_first_token_is_none():
    example = SupervisedFineTuning(MODEL, END, turns="all")(DIALOGUE[:15], RNG, special_tokens=SPECIALS)
    assert example.targets.tolist() == [12, 13, 60, 1]


turn = st.lists(st.integers(5, 40), max_size=6)


@repeatable
@given(
    questions=st.lists(st.tuples(turn, turn), min_size=1, max_size=5),
    after=turn,
    turns=st.sampled_from(["last", "all"]),
    eos=st.booleans(),
)
def test_prompt_and_answers_rebuild_the_dialogue_and_fit_the_lengths(questions, after, turns, eos):
    dialogue = [[*USER, *asked, *END, *MODEL, *answer, *END] for asked, answer in questions]
    tokens = np.array([*chain(*dialogue), *after], np.int32)
    wanted = [[*answer, *END] for _, answer in questions]
    wanted = [*chain(*(wanted[-1:] if turns == "last" else wanted)), *[SPECIALS.eos] * eos]
    for objective in (
        SupervisedFineTuning(MODEL, END, turns, eos),
        SupervisedFineTuningDecoder(MODEL, END, turns, eos),
    ):
        example = objective(tokens, RNG, special_tokens=SPECIALS)
        read = np.concatenate([example.encoder_tokens, example.targets[: len(example.targets) - eos]])
        np.testing.assert_array_equal(read, tokens[: len(tokens) - len(after)])
        assert example.targets[example.weights > 0].tolist() == wanted
        assert set(example.weights.tolist()) <= {0.0, 1.0}
        encoder, decoder = objective.lengths(len(tokens))
        assert len(example.encoder_tokens) <= encoder
        assert len(example.targets) <= decoder


def test_a_chunk_without_an_answer():
    with pytest.raises(UserError, match=r"a chunk of 4 tokens has no answer: none begins after \[50, 51\]; give"):
        SupervisedFineTuning(MODEL, END)(DIALOGUE[:4], RNG, special_tokens=SPECIALS)
    with pytest.raises(UserError, match="a chunk of 1 tokens has no answer"):
        SupervisedFineTuning(MODEL, END)(DIALOGUE[:1], RNG, special_tokens=SPECIALS)


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="starts is empty; give the ids that an answer starts with"):
        SupervisedFineTuning((), END)
    with pytest.raises(UserError, match="ends is empty; give the ids that an answer ends with"):
        SupervisedFineTuning(MODEL, ())
    with pytest.raises(UserError, match=r"ends = \(60,\); the tokenizer's ids are 0 to 59"):
        SupervisedFineTuning(MODEL, END).check_tokenizer(SPECIALS, 60)
    with pytest.raises(UserError, match=r"unknown denoiser 'ul2'\. Allowed: answers"):
        SupervisedFineTuning(MODEL, END).only("ul2")
    assert SupervisedFineTuning(MODEL, END).only("answers").sentinels_needed(9) == 0


@pytest.mark.parametrize(("former", "kind"), [("answers", "sft"), ("answers_decoder", "sft_decoder")])
def test_the_former_names_of_the_kinds_are_read_and_the_new_ones_written(former, kind):
    options = {"starts": list(MODEL), "ends": list(END)}
    objective = settings.build(Objective, {"kind": former, **options}, tables=(BY_NAME,))
    assert objective == settings.build(Objective, {"kind": kind, **options}, tables=(BY_NAME,))
    plain = settings.dump(objective, tables=(BY_NAME,))
    assert plain["kind"] == kind
    assert settings.build(Objective, plain, tables=(BY_NAME,)) == objective
    assert objective.denoisers == ("answers",)  # the name in metrics files


def test_records_of_a_file_reach_the_step_whole(tmp_path):
    """From a JSON Lines file through packing: what counts, decoded, are the answers."""
    tokenizer = Bytes()
    turns = [(f"What is {n} + {n}?", f"{2 * n}, I think.") for n in range(1, 12)]
    start, end = "<start_of_turn>", "<end_of_turn>"
    texts = [f"{start}user\n{asked}{end}\n{start}model\n{answer}{end}\n" for asked, answer in turns]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    starts, ends = (tuple(tokenizer.encode(s).tolist()) for s in (f"{start}model\n", end))
    for objective, encoder_length in (
        (SupervisedFineTuning(starts, ends), 512),
        (SupervisedFineTuningDecoder(starts, ends), 0),
    ):
        config = DataConfig(
            sources=(Source(Jsonl(str(path)), objective),),
            tokenizer=tokenizer,
            rows=2,
            encoder_length=encoder_length,
            decoder_length=256,
            chunk_tokens=128,
            streams=2,
        )
        counted = []
        for batch, *_ in finite_batches(config, seed=0):
            for targets, weights in zip(batch.targets, batch.weights, strict=True):
                counted += tokenizer.show(targets[weights > 0]).split("<eos>")[:-1]
        assert sorted(counted) == sorted(answer + end for _, answer in turns)
