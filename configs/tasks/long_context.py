"""Long context: RULER's needles, variable tracking, common and frequent words, and multi-round co-reference (MRCR).

    t5g2 evaluate --model=DIR --tasks=long_context --out=DIR                    4096 to 32768 tokens
    t5g2 evaluate --model=DIR --tasks=long_context:131072+262144 --out=DIR      other lengths

Examples are made of documentation and modules of the standard library that no training here reads (PythonText, split
"heldout"); put a source of your own in `TEXT`. Lengths are counted with the model's tokenizer, and may be beyond what
the model was trained for. `needle/string_match` is the mean, `needle/4096` the score of a length, `needle/4096/50` that
of a length at half the depth.
"""

from t5g2.data.sources.python_text import PythonText
from t5g2.eval.tasks import CommonWords, Coreference, FrequentWords, Needle, VariableTracking

TEXT = PythonText(split="heldout")


def get_tasks(lengths: str = "4096+8192+16384+32768"):
    tokens = tuple(int(length) for length in lengths.split("+"))
    shared = {"text": TEXT, "lengths": tokens}
    return [
        Needle(**shared),
        Needle(**shared, name="needle_noise", haystack="noise"),
        Needle(**shared, name="needle_uuid", value_kind="uuids"),
        Needle(**shared, name="multi_key", keys=4),
        Needle(**shared, name="multi_key_needles", haystack="needles"),
        Needle(**shared, name="multi_value", values=4),
        Needle(**shared, name="multi_query", queries=4),
        VariableTracking(lengths=tokens, examples=20),
        CommonWords(**shared, examples=20),
        FrequentWords(lengths=tokens, examples=20),
        Coreference(**shared),
        Coreference(**shared, name="coreference_8", needles=8, depths=(10, 30, 50, 70, 90)),
    ]
