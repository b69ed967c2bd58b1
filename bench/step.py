"""Loss and gradients of a text-only T5Gemma 2 270M-270M, float32, the same weights, beside transformers on this CPU.

    python bench/step.py                    the three lengths of the goals, about half an hour on two cores
    python bench/step.py 512/128            one of them, minutes

A process of its own for each side and each length, in turn: ours, transformers', ours, transformers'; the best call
counts. Peak memory is that of the calls over what the process held before them (weights included) and over the bytes
of the gradients; those of a call are gone before the next. transformers runs with sdpa, which is its fastest attention
on a CPU, and in training mode. A side recomputes layers in the backward pass only where it does not fit this machine
otherwise; or ours at all lengths, with --remat=attention or block.

The share of matmul: exact FLOPs of the step (models/flops.py) a second, over those of a float32 matrix product that is
measured in the same process.

Must (aim), of transformers: 1.0x (1.1x) as fast at 512/128, 1.3x (1.6x) at 4096/512, 1.6x (2.1x) at 8192/512; memory
0.4x (0.2x); of matmul: 50% (70%).
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CALLS, ROUNDS = 2, 2  # after one that warms up; of longer rows, where a call takes a minute, half as many
LONG = 2048
LENGTHS = ["512/128", "4096/512", "8192/512"]
GIB = 2**30


class Measured(NamedTuple):
    """Seconds by the clock and of the CPU, bytes of memory, the loss, FLOP/s of matmul, and what is recomputed."""

    wall: float
    cpu: float
    memory: int
    loss: float
    matmul: float
    remat: str


def model_config():
    from t5g2.models.config import text_only
    from t5g2.models.sizes import size

    return text_only(size("t5gemma2:270m-270m"))


def ids(length: int) -> np.ndarray:
    return np.random.RandomState(length).randint(10, 200_000, (1, length)).astype(np.int32)


def tokens(length: int):
    from t5g2.core.batch import Sequences

    ones = np.ones((1, length), np.int32)
    return Sequences(ids(length), ones, np.arange(length, dtype=np.int32)[None])


def ours(folder: Path, encoder_length: int, decoder_length: int, remat: str | None) -> Measured:
    import jax
    import jax.numpy as jnp

    from t5g2.checkpoint.folder import load_model
    from t5g2.core import device
    from t5g2.models.layers import Compute
    from t5g2.models.loss import cross_entropy
    from t5g2.models.loss_config import LossConfig

    def loss(model, encoder, decoder, targets, compute):
        hidden_BTD = model.hidden(encoder, decoder, compute=compute)
        weights_BT = jnp.full(targets.shape, 1 / targets.size, jnp.float32)
        return cross_entropy(hidden_BTD, model.head(), targets, weights_BT, LossConfig()).total

    model = load_model(folder)
    batch = tokens(encoder_length), tokens(decoder_length), ids(decoder_length)

    def compiled(remat: Any):
        gradient = jax.jit(jax.value_and_grad(loss), static_argnums=4)
        return gradient.lower(model, *batch, Compute(dtype="float32", remat=remat)).compile()

    def fits(step) -> bool:
        plan = step.memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes < _free()

    # what recomputes less is faster
    chosen = remat or next((way for way in ("none", "attention") if fits(compiled(way))), "block")
    step = compiled(chosen)
    gradient_bytes = sum(x.nbytes for x in jax.tree.leaves(model))
    call = lambda: jax.block_until_ready(step(model, *batch))[0]  # noqa: E731
    return Measured(*_time(call, gradient_bytes, encoder_length), device.measure_matmul(2048), chosen)


def theirs(folder: Path, encoder_length: int, decoder_length: int, remat: str | None) -> Measured:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    if remat:
        model.gradient_checkpointing_enable()
    else:
        # more than there is, is an error, and not the end of some process of this machine
        resource.setrlimit(resource.RLIMIT_DATA, (_free(), resource.getrlimit(resource.RLIMIT_DATA)[1]))
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
    return Measured(*_time(call, gradient_bytes, encoder_length), 0.0, "layers" if remat else "none")


def _time(call, gradient_bytes: int, length: int) -> tuple[float, float, int, float]:
    """Seconds by the clock and of the CPU of the best call, bytes of memory of all, and the loss."""
    before, best, loss = _resident(), (float("inf"), float("inf")), float("nan")
    with contextlib.suppress(OSError):  # elsewhere than on Linux: then the peak is that of loading and compiling too
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range((CALLS if length <= LONG else CALLS // 2) + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(call())
        best = min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)
        # jax frees the gradients of a call in the background; the next call must not find them
        time.sleep(2)
    return *best, _resident(peak=True) - before - gradient_bytes, loss


def _resident(*, peak: bool = False) -> int:
    """Bytes of this process in memory: now, or the most since the peak was reset."""
    return _kib(Path("/proc/self/status"), "VmHWM" if peak else "VmRSS") * 1024


def _free() -> int:
    """Bytes of memory that this process may take, less a reserve for the rest of the machine."""
    from t5g2.core.machine import machine_memory

    return min(_kib(Path("/proc/meminfo"), "MemAvailable") * 1024, machine_memory()) - GIB


def _kib(path: Path, name: str) -> int:
    [line] = [line for line in path.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def run_side(side: str, folder: str, pair: str, remat: str | None) -> Measured:
    """Runs a side in a process of its own; transformers a second time, recomputing, where it does not fit."""
    command = [sys.executable, __file__, pair, "--side", side, "--folder", str(Path(folder, side))]
    command += ["--remat", remat] if remat else []
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode and side == "theirs" and not remat and "allocate memory" in done.stderr:
        return run_side(side, folder, pair, "layers")
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def compare(folder: str, pair: str, remat: str | None) -> tuple:
    """Runs both sides in turn; returns the row of a table."""
    from t5g2.models import flops

    encoder_length, decoder_length = map(int, pair.split("/"))
    sides: dict[str, list[Measured]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS // 2 if encoder_length > LONG else ROUNDS):
        for side, measured in sides.items():
            again = measured[0].remat if measured and measured[0].remat != "none" else None
            measured.append(run_side(side, folder, pair, again or (remat if side == "ours" else None)))
    us, them = (Measured(*map(min, zip(*measured, strict=True))) for measured in sides.values())
    assert abs(us.loss - them.loss) < 1e-3 * them.loss, sides
    config = model_config()
    counts = flops.count_rows(config, tokens(encoder_length), tokens(decoder_length))
    exact = sum(flops.training(config, counts, frozen_vision=True).values())
    matmul = max(measured.matmul for measured in sides["ours"])
    return (
        pair,
        f"{us.remat} / {them.remat}",
        *(f"{side.wall:.1f} / {side.cpu:.1f} / {side.memory / GIB:.2f}" for side in (us, them)),
        f"{them.wall / us.wall:.2f}x",
        f"{them.cpu / us.cpu:.2f}x",
        f"{us.memory / them.memory:.2f}x",
        f"{exact / us.wall / 1e9:.0f} of {matmul / 1e9:.0f} GFLOP/s: {exact / us.wall / matmul:.0%}",
    )


def make_folders(folder: Path) -> None:
    """Writes the same weights for both sides."""
    import jax

    from t5g2.checkpoint.export_folder import export_model
    from t5g2.checkpoint.folder import save_model
    from t5g2.models import build

    save_model(folder / "ours", build.make(model_config(), key=jax.random.key(0)))
    export_model(folder / "ours", folder / "theirs")


def main(lengths: list[str], remat: str | None):
    from measure import table, write

    with tempfile.TemporaryDirectory() as folder:
        make_folders(Path(folder))
        rows = [compare(folder, pair, remat) for pair in lengths]
    head = ("tokens", "recomputed", "t5g2", "transformers", "faster", "faster, CPU", "memory", "of matmul")
    write(
        "step",
        "Loss and gradients of T5Gemma 2 270M-270M, beside transformers",
        "Seconds by the clock / CPU seconds / GiB over weights and gradients. Recomputed in the backward pass: by t5g2 "
        "(compute.remat) / by transformers (gradient checkpointing).",
        table(head, rows),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lengths", nargs="*", default=LENGTHS)
    parser.add_argument("--remat", choices=["none", "attention", "block", "layers"])
    parser.add_argument("--side", choices=["ours", "theirs"])
    parser.add_argument("--folder")
    flags = parser.parse_args()
    if flags.side:
        side, (encoder, decoder) = {"ours": ours, "theirs": theirs}[flags.side], map(int, flags.lengths[0].split("/"))
        print(json.dumps(side(Path(flags.folder), encoder, decoder, flags.remat)))
    else:
        main(flags.lengths, flags.remat)
