"""Decoder-only pre-training at a released size of Gemma 2, Gemma 3 or MedGemma: what encoder-decoder models come from.

    t5g2 check --config=configs/gemma.py:gemma3:1b --devices=64    # on a laptop: shardings, memory, FLOPs, one batch
    t5g2 train --config=configs/gemma.py:gemma3:1b --workdir=runs/gemma3-1b --config.init.params=models/gemma3-1b \\
        --config.data.sources.0.text='{"kind": "jsonl", "path": "corpus/*.jsonl"}'

models/gemma3-1b is the released model, imported; its tokenizer is taken with it. Without these two settings the weights
are new and the text is the library of the Python that runs it as bytes, so that check needs no file.

The baseline of the encoder-decoder papers, a decoder-only model whose prefix sees both ways, asked for the same targets
as an encoder-decoder with prefix_lm: --config.data.sources.0.objective='{"kind": "prefix_lm_decoder"}'.

From the reports (Gemma 2, arXiv 2408.00118; Gemma 3, arXiv 2503.19786, and its model card): tokens for each size,
lengths of 8192 and 32768. Ours, because they do not say: batch (4.2M tokens), learning rate, AdamW and its betas,
warm-up, schedule, weight decay, packing; and 100G tokens for MedGemma (arXiv 2507.05201), which goes on from Gemma 3.
Known deviations: no distillation, no extension to 128K tokens; text only, so image tower and projector are frozen.

Hardware: Gemma 2 took 512 TPU v5e (2B), 4096 v4 (9B) and 6144 v5p (27B). Rows are cut over all devices along fsdp.
Compiled for v5p:2x2x2 (t5g2 check --target): gemma3:270m takes 33.7 GiB a chip and 10.2 s a step by the compiler's
estimates, MFU 23%.
"""

from ml_collections import ConfigDict

from t5g2.core.errors import unknown
from t5g2.models.sizes import SIZES

# tokens in 1e12, and the peak learning rate
RUNS = {
    "gemma2:2b": (2.0, 5e-4),
    "gemma2:9b": (8.0, 3e-4),
    "gemma2:27b": (13.0, 2e-4),
    "gemma3:270m": (6.0, 1e-3),
    "gemma3:1b": (2.0, 5e-4),
    "gemma3:4b": (4.0, 3e-4),
    "gemma3:12b": (12.0, 2e-4),
    "gemma3:27b": (14.0, 2e-4),
    "medgemma:4b": (0.1, 3e-5),
    "medgemma:27b": (0.1, 2e-5),
    "medgemma:27b-text": (0.1, 2e-5),
}
BATCH_TOKENS = 2**22


def get_config(size=""):
    if size not in RUNS:
        raise unknown("size", size, RUNS, where="of Gemma")
    tokens, peak = RUNS[size]
    length = 8192 if size.startswith("gemma2:") else 32_768
    causal = {"kind": "causal"}
    config = ConfigDict()
    config.model = {"size": size}
    config.data = {
        "sources": [{"text": {"kind": "python"}, "objective": causal, "name": "text"}],
        "tokenizer": {"kind": "of_weights"},  # bytes where there are no weights
        "chunk_tokens": length - 1,  # and EOS
        "rows": BATCH_TOKENS // length,
        "encoder_length": 0,
        "decoder_length": length,
        "streams": 128,
        "packing": "best_fit",
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": peak, "warmup_steps": 1000},
        "clip_norm": 1.0,
        "decay": [
            {"pattern": "*.scale", "rate": 0.0},
            {"pattern": "embedder.*", "rate": 0.0},
            {"pattern": "*", "rate": 0.1},
        ],
        "freeze": [{"pattern": "vision.*"}, {"pattern": "projector.*"}] if SIZES[size].images else [],
    }
    config.train = {"steps": round(tokens * 1e12) // BATCH_TOKENS, "tile_tokens": 4096}
    config.compute = {"remat": "block"}
    config.mesh = {"data": 1, "fsdp": -1}
    heldout = {"kind": "python", "split": "heldout"}
    config.eval = {
        "every_steps": 10_000,
        "tasks": [{"kind": "heldout_loss", "text": heldout, "objective": causal}],
    }
    config.save = {"every_steps": 10_000}
    return config
