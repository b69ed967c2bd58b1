"""A step of 1B-1B and 4B-4B on 4 to 256 chips of TPU v5p, with as many rows a chip: time and bytes of collectives.

From the compiler's schedule: no program runs (`t5g2 check --help`). Rows that are in results/scaling.json are not
compiled again; --only=TEXT takes the rows whose names have it.
"""

import sys
import time
from typing import Any

import measure
import tpu_rows
from tpu_rows import Row
from tpu_steps import sized

TARGETS = {4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8"}
ROWS_A_CHIP = {"1b-1b": 8, "4b-4b": 2}


def row(size: str, chips: int) -> Row:
    return sized(size, TARGETS[chips], ROWS_A_CHIP[size] * chips)


def table(size: str, rows: dict[str, dict[str, Any]]) -> str:
    """Returns the table of a size, by number of chips."""
    head = ("chips", "ms", "to 4 chips", "compute, ms", "waiting, ms", "MFU", "GiB", "bytes sent a chip, MiB")
    lines, first = [], None
    for chips in TARGETS:
        figures = rows.get(row(size, chips).name, {})
        if "seconds" not in figures:
            lines.append((chips, figures.get("error", "not compiled yet"), *[""] * (len(head) - 2)))
            continue
        seconds, waited = figures["seconds"], figures["waited"]
        first = first or seconds
        sent = ", ".join(f"{kind} {part['sent'] / 2**20:,.0f}" for kind, part in figures["collectives"].items())
        times = (
            f"{1e3 * seconds:.1f}",
            f"{seconds / first:.2f}",
            f"{1e3 * (seconds - waited):.1f}",
            f"{1e3 * waited:.1f}",
        )
        lines.append((chips, *times, f"{figures['mfu']:.1%}", f"{figures['used'] / measure.GIB:.2f}", sent))
    return measure.table(head, lines)


def main():
    only = next((flag.removeprefix("--only=") for flag in sys.argv[1:] if flag.startswith("--only=")), "")
    wanted = [row(size, chips) for size in ROWS_A_CHIP for chips in TARGETS]
    tpu_rows.results("scaling", [each for each in wanted if only in each.name])
    rows = tpu_rows.kept("scaling", wanted)
    sections = [
        part
        for size, count in ROWS_A_CHIP.items()
        for part in (f"## {size}, {count} rows of 4096 in and 4096 out a chip, FSDP", table(size, rows))
    ]
    text = "\n\n".join(
        [
            "# Steps on 4 to 256 chips of TPU v5p",
            "Nothing ran: the time is the compiler's estimate, with the bytes that a chip sends at the speed of its "
            "links to the others. Work a chip is the same in every line.",
            *sections,
            f"`python bench/scaling.py`, {time.strftime('%Y-%m-%d')}.",
        ]
    )
    (measure.RESULTS / "scaling.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
