"""Loss and gradients of a text-only T5Gemma 2 270M-270M, float32, the same weights, beside transformers on this CPU.

    python bench/step.py                    512/128 tokens
    python bench/step.py 4096/512 8192/512  longer rows, minutes each

A process of its own for each side and each length, in turn: ours, transformers', ours, transformers'; the best call
counts. Peak memory is that of the process over what it held before the first call (weights included) and over the bytes
of the gradients. transformers runs with sdpa, which is its fastest attention on a CPU, and in training mode.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

CALLS, ROUNDS = 2, 2  # after one that warms up; of longer rows, where a call takes a minute, half as many
LONG = 2048
REMAT = 8192  # tokens of the encoder above which layers are recomputed: with less memory, and a quarter slower


class Measured(NamedTuple):
    """Seconds by the clock and of the CPU, bytes of memory, and the loss."""

    wall: float
    cpu: float
    memory: int
    loss: float


def model_config():
    from t5g2.models.config import text_only
    from t5g2.models.sizes import size

    return text_only(size("t5gemma2:270m-270m"))


def ids(length: int) -> np.ndarray:
    return np.random.RandomState(length).randint(10, 200_000, (1, length)).astype(np.int32)


def ours(folder: Path, encoder_length: int, decoder_length: int, remat: str) -> Measured:
    import jax
    import jax.numpy as jnp

    from t5g2.checkpoint.folder import load_model
    from t5g2.core.batch import Sequences
    from t5g2.models.layers import Compute
    from t5g2.models.loss import cross_entropy
    from t5g2.models.loss_config import LossConfig

    def tokens(length: int) -> Sequences:
        ones = np.ones((1, length), np.int32)
        return Sequences(ids(length), ones, np.arange(length, dtype=np.int32)[None])

    compute = Compute(dtype="float32", remat=remat)

    def loss(model, encoder, decoder, targets):
        hidden_BTD = model.hidden(encoder, decoder, compute=compute)
        weights_BT = jnp.full(targets.shape, 1 / targets.size, jnp.float32)
        return cross_entropy(hidden_BTD, model.head(), targets, weights_BT, LossConfig()).total

    model = load_model(folder)
    batch = tokens(encoder_length), tokens(decoder_length), ids(decoder_length)
    step = jax.jit(jax.value_and_grad(loss)).lower(model, *batch).compile()
    gradient_bytes = sum(x.nbytes for x in jax.tree.leaves(model))
    return _time(lambda: jax.block_until_ready(step(model, *batch))[0], gradient_bytes, encoder_length)


def theirs(folder: Path, encoder_length: int, decoder_length: int) -> Measured:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    encoder, decoder, targets = (
        torch.tensor(ids(length)).long() for length in (encoder_length, decoder_length, decoder_length)
    )

    def call() -> float:
        # the gradients of the call before are freed, as ours are
        model.zero_grad(set_to_none=True)
        result = model(input_ids=encoder, decoder_input_ids=decoder, labels=targets, use_cache=False)
        result.loss.backward()
        return result.loss.detach()

    gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return _time(call, gradient_bytes, encoder_length)


def _time(call, gradient_bytes: int, length: int) -> Measured:
    before, best = _resident(), (float("inf"), float("inf"))
    for _ in range((CALLS if length <= LONG else CALLS // 2) + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(call())
        best = min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)
    return Measured(*best, _resident(peak=True) - before - gradient_bytes, loss)


def _resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory: now, or the most so far."""
    name = "VmHWM" if peak else "VmRSS"
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def main(lengths: list[str]):
    import jax
    from measure import table, write

    from t5g2.checkpoint.export_folder import export_model
    from t5g2.checkpoint.folder import save_model
    from t5g2.models import build

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = build.make(model_config(), key=jax.random.key(0))
        save_model(Path(folder, "ours"), made)
        export_model(Path(folder, "ours"), Path(folder, "theirs"))
        del made
        for pair in lengths:
            best: dict[str, Measured] = {}
            is_long = int(pair.split("/")[0]) > LONG
            remat = "block" if int(pair.split("/")[0]) > REMAT else "none"
            for side in ["ours", "theirs"] * (ROUNDS // 2 if is_long else ROUNDS):
                command = [sys.executable, __file__, "--side", side, str(Path(folder, side)), *pair.split("/"), remat]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                got = Measured(*json.loads(output.splitlines()[-1]))
                best[side] = Measured(*map(min, got, best.get(side, got)))
            us, them = best["ours"], best["theirs"]
            assert abs(us.loss - them.loss) < 1e-3 * them.loss, best
            rows.append(
                (
                    pair,
                    remat,
                    f"{us.wall:.1f} / {us.cpu:.1f} / {us.memory / 2**30:.2f}",
                    f"{them.wall:.1f} / {them.cpu:.1f} / {them.memory / 2**30:.2f}",
                    f"{them.wall / us.wall:.2f}x",
                    f"{them.cpu / us.cpu:.2f}x",
                    f"{us.memory / them.memory:.2f}x",
                )
            )
    write(
        "step",
        "Loss and gradients of T5Gemma 2 270M-270M, beside transformers",
        "Seconds by the clock / CPU seconds / GiB over weights and gradients.",
        table(("tokens", "remat", "t5g2", "transformers", "faster", "faster, CPU", "memory"), rows),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        _, _, side, folder, encoder_length, decoder_length, remat = sys.argv
        lengths = int(encoder_length), int(decoder_length)
        result = ours(Path(folder), *lengths, remat) if side == "ours" else theirs(Path(folder), *lengths)
        print(json.dumps(result))
    else:
        main(sys.argv[1:] or ["512/128"])
