"""One needle in a haystack at short lengths: what a small model on a CPU can be asked in minutes.

    t5g2 evaluate --model=DIR --tasks=needle --out=DIR              512 and 2048 tokens
    t5g2 evaluate --model=DIR --tasks=needle:1024+4096 --out=DIR    other lengths

Text of the standard library that no training here reads, five depths, two examples of each: `needle/string_match` is
the mean, `needle/512` the score of a length. long_context has all tasks of its kind, at the lengths they are for.
"""

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import Needle


def get_tasks(lengths: str = "512+2048"):
    tokens = tuple(int(length) for length in lengths.split("+"))
    return [Needle(text=PythonText(split="heldout"), lengths=tokens, examples=2, max_new_tokens=24)]
