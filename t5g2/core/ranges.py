"""Text for runs of consecutive numbers."""

from collections.abc import Iterable


def format_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as ranges, in their order: "0-2, 5" for 0, 1, 2, 5; "" for none."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
