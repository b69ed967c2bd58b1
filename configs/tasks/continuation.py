"""Loss of the same ends of texts after more and more of what stands before them: what a longer input is worth.

    t5g2 evaluate --model=DIR --tasks=continuation --out=DIR              after 512 and 2048 characters
    t5g2 evaluate --model=DIR --tasks=continuation:1024+8192 --out=DIR    other lengths

Text of the standard library that no training here reads, cut into pieces of the longest length and 256 characters more;
`continuation_2048/bits_per_byte` is of these 256 alone, after the 2048 before them, of 24 pieces, the same at all
lengths. The loss of a model that makes use of what it reads falls with the length; that of one which is confused by a
length it has not met rises.
"""

from t5g2.core.errors import UserError
from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import TextLoss

END = 256  # characters that are predicted
EXAMPLES = 24


def get_tasks(lengths: str = "512+2048"):
    if not all(length.isdecimal() and int(length) > 0 for length in lengths.split("+")):
        raise UserError(f"lengths {lengths!r} of continuation; give numbers of characters, as 512+2048")
    characters = sorted({int(length) for length in lengths.split("+")})
    documents, longest = PythonText(split="heldout").open(), characters[-1]
    texts = [
        document[start : start + longest + END]
        for document in map(documents.__getitem__, range(len(documents)))
        for start in range(0, len(document) - longest - END + 1, longest + END)
    ]
    if not texts:
        most = max(map(len, map(documents.__getitem__, range(len(documents))))) - END
        raise UserError(f"no held-out document has {longest} characters and {END} more; give at most {most}")
    return [
        TextLoss(
            data=[{"before": text[longest - length : longest], "end": text[longest:]} for text in texts],
            name=f"continuation_{length}",
            template="{before}",
            target="{end}",
            delimiter="",
            examples=min(EXAMPLES, len(texts)),
        )
        for length in characters
    ]
