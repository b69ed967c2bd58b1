"""Greedy tokens a second of T5Gemma 2 270M-270M without images, float32, the same weights, beside transformers.

    python bench/generate.py                 encoder lengths 512 and 4096
    python bench/generate.py 512             one of them

Each side generates from one prompt in a process of its own, in turn; the best call counts. The time of a call has the
encoder's pass in it; the difference of calls of more and of fewer tokens is that of the tokens alone. Then 16 prompts
in one batch. There are no stop tokens, so that both sides generate as many.

Must (aim), of transformers: 1x (2x) at 512, 2x (4x) at 4096. What limits the second: the encoder's pass is three
quarters of the time, near the speed of matmul on both sides, and takes 1.16 TFLOP here and 2.06 in transformers, whose
local layers compute all pairs: 1.8x. A token after it reads all weights once, 1.1 GB, on both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import step
from measure import table, write

FEW, MANY, CALLS, ROUNDS = 2, 34, 2, 2
BATCH = 16


def ours(folder: Path, length: int, rows: int) -> dict[int, float]:
    """Returns the seconds of a call by number of tokens."""
    from t5g2.checkpoint.folder import load_model, open_model
    from t5g2.eval.generation import GenerationOptions, GenerationSetup, complete

    model = load_model(open_model(folder / "ours"))
    prompts = [step.ids(length)[0]] * rows

    def generate(new: int) -> None:
        setup = GenerationSetup(GenerationOptions(new, stop_ids=(), pad_id=0), bos=2)
        assert all(len(output.tokens) == new for output in complete(model, prompts, setup=setup))

    return best(generate)


def theirs(folder: Path, length: int, rows: int) -> dict[int, float]:
    """Returns the seconds of a call by number of tokens."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "theirs", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(np.repeat(step.ids(length), rows, axis=0)).long()

    def generate(new: int) -> None:
        with torch.no_grad():
            arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": new, "do_sample": False}
            output = model.generate(input_ids=tokens, **arguments)
        assert output.shape == (rows, new + 1)

    return best(generate)


def best(generate) -> dict[int, float]:
    """Returns the least seconds of calls, after one that warms up (and compiles)."""
    seconds = {new: float("inf") for new in (FEW, MANY)}
    for turn in range(CALLS + 1):
        for new in seconds:
            begun = time.perf_counter()
            generate(new)
            if turn:
                seconds[new] = min(seconds[new], time.perf_counter() - begun)
    return seconds


def alone(side: str, folder: Path, length: int, rows: int) -> dict[int, float]:
    """Measures a side in a process of its own."""
    command = [sys.executable, __file__, side, str(folder), str(length), str(rows)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(new): value for new, value in json.loads(output.splitlines()[-1]).items()}


def main() -> None:
    if sys.argv[1:2] in (["ours"], ["theirs"]):
        side, folder, length, rows = sys.argv[1:]
        print(json.dumps({"ours": ours, "theirs": theirs}[side](Path(folder), int(length), int(rows))))
        return
    lengths = [int(text) for text in sys.argv[1:]] or [512, 4096]
    rows_of_table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step.make_folders(folder)
        for length, rows in [*((length, 1) for length in lengths), (lengths[0], BATCH)]:
            least: dict[str, dict[int, float]] = {}
            for _ in range(ROUNDS if rows == 1 else 1):
                for side in ("ours", "theirs"):
                    seconds = alone(side, folder, length, rows)
                    before = least.get(side, seconds)
                    least[side] = {new: min(before[new], seconds[new]) for new in seconds}
            rates = {side: rows * MANY / seconds[MANY] for side, seconds in least.items()}
            decoded = {side: rows * (MANY - FEW) / (s[MANY] - s[FEW]) for side, s in least.items()}
            rows_of_table.append(
                [
                    length,
                    rows,
                    *(f"{rates[side]:.1f}" for side in least),
                    f"{rates['ours'] / rates['theirs']:.2f}x",
                    *(f"{decoded[side]:.1f}" for side in least),
                    f"{decoded['ours'] / decoded['theirs']:.2f}x",
                ]
            )
    head = ["encoder", "prompts", "tokens/s", "transformers", "ratio", "after the encoder", "transformers", "ratio"]
    title = f"Greedy generation of {MANY} tokens, T5Gemma 2 270M-270M, float32, beside transformers"
    write("generate", title, table(head, rows_of_table))


if __name__ == "__main__":
    main()
