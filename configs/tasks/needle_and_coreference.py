"""A needle and co-reference at given lengths, short ones too: what long context is, in two tasks.

    t5g2 evaluate --model=DIR --tasks=needle_and_coreference:1024+2048 --out=DIR      lengths in tokens, at least 1024

Of text that no training here reads (PythonText, split "heldout"). Passages of co-reference have eight words, so that a
conversation fits into 1024 bytes; long_context has those of the benchmarks.
"""

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import Coreference, Needle


def get_tasks(lengths: str = "1024+2048+4096+8192"):
    shared = {"text": PythonText(split="heldout"), "lengths": tuple(int(length) for length in lengths.split("+"))}
    return [
        Needle(**shared, depths=(0, 50, 100), examples=2, max_new_tokens=16),
        Coreference(**shared, depths=(0, 50, 100), examples=2, passage_words=8, max_new_tokens=128),
    ]
