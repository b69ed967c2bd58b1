"""T5Gemma adaptation at a released size: s-s, b-b, l-l, ml-ml, xl-xl, 2b-2b, 9b-2b or 9b-9b (arXiv 2504.06225).

    t5g2 check --config=configs/t5gemma.py:2b-2b --devices=64      # on a laptop: shardings, memory, FLOPs, one batch
    t5g2 train --config=configs/t5gemma.py:2b-2b --workdir=runs/t5gemma-2b \\
        --config.init.adapt.source=models/gemma-2-2b \\
        --config.data.sources.0.text='{"kind": "jsonl", "path": "corpus/*.jsonl"}'

models/gemma-2-2b is the released Gemma 2, in any of its formats; 9b-2b takes two, models/gemma-2-9b and, after a comma,
models/gemma-2-2b. Its tokenizer is taken with it. To go on from a T5Gemma instead, set init.params. Without these two
settings the weights are new and the text is the library of the Python that runs it as bytes, so that check needs no
file.

From the paper (sections 3.2 to 4): 2T tokens; PrefixLM, a text cut into two halves of up to 4096 tokens; for 9b-2b
cross-attention, which has no weights to start from, is trained alone for 1000 steps.
Ours, because it does not say: learning rate, batch (4.2M tokens), AdamW and its betas, warm-up, schedule, weight decay,
clipping, packing, and that cross-attention's norms warm up with it. Known deviations: no distillation, which the
paper's PrefixLM has; for its UL2 set data.sources.0.objective={"kind": "ul2"}, whose mixture is T5Gemma 2's, with
lengths of 8192.

Hardware: the model card names TPU v4, v5p and v5e and no counts. Rows are cut over all devices along fsdp. Compiled for
v5p:4x4x4 (t5g2 check --target) with 128 rows: 9b-9b takes 20.3 GiB a chip and 6.5 s a step by the compiler's
estimates, MFU 38%.
"""

from ml_collections import ConfigDict

from t5g2.core.errors import unknown
from t5g2.models.sizes import SIZES

FAMILY = "t5gemma:"
PEAKS = {
    "s-s": 1e-3,
    "b-b": 1e-3,
    "l-l": 5e-4,
    "ml-ml": 5e-4,
    "xl-xl": 3e-4,
    "2b-2b": 3e-4,
    "9b-2b": 2e-4,
    "9b-9b": 2e-4,
}
LENGTH, ROWS = 4096, 512
TOKENS = 2_000_000_000_000
WARM_UP = [{"pattern": "decoder.layers.*cross*", "end": 0}, {"pattern": "*", "end": 1000}]  # end 0 = never frozen


def get_config(size=""):
    if FAMILY + size not in SIZES:
        raise unknown("size", size, PEAKS, where="of T5Gemma")
    encoder, decoder = size.split("-")
    objective = {"kind": "prefix_lm"}
    config = ConfigDict()
    config.model = {"size": FAMILY + size}
    config.data = {
        "sources": [{"text": {"kind": "python"}, "objective": objective, "name": "text"}],
        "tokenizer": {"kind": "of_weights"},  # bytes where there are no weights
        "chunk_tokens": 2 * LENGTH - 1,  # and EOS
        "rows": ROWS,
        "encoder_length": LENGTH,
        "decoder_length": LENGTH,
        "streams": 128,
        "packing": "best_fit",
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": PEAKS[size], "warmup_steps": 1000},
        "clip_norm": 1.0,
        "decay": [
            {"pattern": "*.scale", "rate": 0.0},
            {"pattern": "*embedder.*", "rate": 0.0},
            {"pattern": "*", "rate": 0.1},
        ],
        "freeze": WARM_UP if encoder != decoder else [],
    }
    config.train = {"steps": TOKENS // (2 * LENGTH * ROWS), "tile_tokens": 4096}
    config.compute = {"remat": "block"}
    config.mesh = {"data": 1, "fsdp": -1}
    heldout = {"kind": "python", "split": "heldout"}
    config.eval = {
        "every_steps": 10_000,
        "tasks": [{"kind": "heldout_loss", "text": heldout, "objective": objective}],
    }
    config.save = {"every_steps": 10_000}
    return config
