"""Co-reference at short lengths: what a small model on a CPU can be asked in minutes.

    t5g2 evaluate --model=DIR --tasks=coreference --out=DIR              1024 and 4096 tokens
    t5g2 evaluate --model=DIR --tasks=coreference:2048+8192 --out=DIR    other lengths, at least 1024

Text of the standard library that no training here reads, three depths, two examples of each. Passages have eight words,
so that a conversation fits into 1024 bytes. long_context has the task with passages as long as the benchmark's.
"""

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import Coreference


def get_tasks(lengths: str = "1024+4096"):
    tokens = tuple(int(length) for length in lengths.split("+"))
    shared = {"text": PythonText(split="heldout"), "lengths": tokens, "examples": 2}
    return [Coreference(**shared, depths=(0, 50, 100), passage_words=8, max_new_tokens=128)]
