"""Speed of objectives, on one core: tokens of the text per second of processor time.

    python bench/objectives.py

Each example has a generator of its own, as in the pipeline; making it is part of the time. A row is the best of five
rounds; `bench/data.py` has the whole pipeline. The goal is 3 million tokens/s, so that one core feeds an accelerator
that trains on as many; chunks of 512 tokens and more have to reach it.
"""

import time

import numpy as np

from t5g2.core.objective import Objective
from t5g2.core.special_tokens import SpecialTokens
from t5g2.objectives import UL2, Causal, PrefixLM, PrefixLMDecoder, SpanCorruption, SupervisedFineTuning, UL2Original

GOAL = 3e6
LENGTHS = (128, 512, 2048, 16384)
ROUNDS, ROUND_TOKENS = 5, 400_000
SPECIALS = SpecialTokens(pad=0, eos=1, bos=2, unk=3, mask=4, first_sentinel=10, sentinels=3000, first_byte=3010)
MODES = (("NLU", 5), ("S2S", 6), ("NLG", 7))

OBJECTIVES: dict[str, Objective] = {
    "causal": Causal(),
    "prefix_lm": PrefixLM(),
    "prefix_lm, uniform, characters": PrefixLM("uniform", split_at="character"),
    "prefix_lm_decoder": PrefixLMDecoder(),
    "span_corruption": SpanCorruption(),
    "span_corruption, one mask": SpanCorruption(sentinels="mask"),
    "ul2": UL2(),
    **{f"ul2, {name} alone": UL2().only(name) for name in UL2().denoisers},
    "ul2, cyclic, shares of tokens": UL2(sentinels="cyclic", mixing="tokens", loss_on_sentinels=False),
    "ul2_original, modes": UL2Original(mode_tokens=MODES, encoder_eos=True),
    "sft": SupervisedFineTuning(starts=(8, 3010), ends=(9,)),
}


def text(length: int) -> np.ndarray:
    """int32[length]: bytes, and one answer in the middle."""
    tokens = np.random.default_rng(0).integers(3010, 3010 + 128, length).astype(np.int32)
    tokens[length // 2 : length // 2 + 2] = 8, 3010
    return tokens


def tokens_per_second(objective: Objective, length: int) -> float:
    tokens, count = text(length), max(ROUND_TOKENS // length, 20)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for k in range(count):
            objective(tokens, np.random.default_rng([0, 0, k]), special_tokens=SPECIALS)
        best = min(best, time.process_time() - start)
    return count * length / best


if __name__ == "__main__":
    print(f"{'Mtokens/s, chunks of':34}" + "".join(f"{length:>10}" for length in LENGTHS))
    slowest = float("inf")
    for name, objective in OBJECTIVES.items():
        speeds = [tokens_per_second(objective, length) for length in LENGTHS]
        slowest = min([slowest, *speeds[1:]])
        print(f"{name:34}" + "".join(f"{speed / 1e6:10.2f}" for speed in speeds))
    print(f"\nslowest, chunks of 512 tokens and more: {slowest / 1e6:.1f} Mtokens/s, {slowest / GOAL:.1f} x the goal")
