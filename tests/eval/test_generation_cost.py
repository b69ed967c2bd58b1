"""FLOPs of queries by literal sums, and latencies of as many tokens as were asked for."""

import numpy as np
import pytest

from t5g2.eval.generation import GenerationOptions, GenerationSetup
from t5g2.eval.generation_cost import REPEATS, cost_scores, latencies, query_flops
from t5g2.models.config import TextConfig
from tests import tiny, weights

ONE = TextConfig(
    vocab_size=100, width=8, layers=1, mlp_width=10, heads=2, kv_heads=1, head_size=4, window=3, pattern=("local",)
)
# projections 4 D N H + 4 D K H, gated MLP 6 D F
OF_TOKEN = 4 * 8 * 2 * 4 + 4 * 8 * 1 * 4 + 6 * 8 * 10
HEAD, PAIR = 2 * 8 * 100, 4 * 2 * 4


def test_a_decoder_only_model_by_hand():
    """A window of 3: the tokens of a prompt of 5 see 1 + 2 + 3 + 3 + 3 keys, each token after it 3."""
    spent = query_flops(ONE, np.zeros(5, np.int32), 3)
    assert spent.prefill == 5 * OF_TOKEN + 12 * PAIR + HEAD
    # the third new token is not read
    assert spent.decode == 2 * (OF_TOKEN + 3 * PAIR + HEAD)
    assert query_flops(ONE, np.zeros(5, np.int32), 1).decode == 0


def test_every_beam_is_decoded_and_the_prompt_is_read_once():
    options = GenerationOptions(3, stop_ids=(1,), pad_id=0, compute=tiny.FLOAT32, num_beams=4)
    model, prompt = weights.model(tiny.GEMMA3), np.array([2, 30, 31], np.int32)
    one = query_flops(tiny.GEMMA3, prompt, 3)
    costs = cost_scores(model, [prompt], [3], GenerationSetup(options, bos=2))
    assert costs["prefill_flops"].value == one.prefill
    assert costs["token_flops"].value == 4 * one.decode / 2
    assert costs["query_flops"].value == one.prefill + 4 * one.decode


@pytest.mark.parametrize("config", [tiny.T5GEMMA, tiny.T5GEMMA2])
def test_an_encoder_is_paid_once(config):
    """Whatever its length, a new token costs its own work and a pair more for each key of the encoder."""
    short, long = (query_flops(config, np.zeros(n, np.int32), 9) for n in (6, 26))
    crosses = 4 * config.decoder.heads * config.decoder.head_size * config.decoder.layers
    assert long.decode - short.decode == 8 * 20 * crosses
    assert long.prefill > 3 * short.prefill


def test_latencies_are_of_calls_that_do_not_end_early():
    options = GenerationOptions(5, stop_ids=tuple(range(97)), pad_id=0, compute=tiny.FLOAT32)
    seconds = latencies(weights.model(tiny.GEMMA3), [np.array([2, 30, 31], np.int32)], GenerationSetup(options, bos=2))
    assert {name: values.shape for name, values in seconds.items()} == {"prefill": (REPEATS,), "token": (REPEATS,)}
    assert all((values > 0).all() for values in seconds.values())
