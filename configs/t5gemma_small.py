"""T5Gemma's main question, small enough for two CPU cores: a Gemma 2 style model adapted, against scratch.

    t5g2 train --config=configs/t5gemma_small.py:source-96  --workdir=runs/small/source     # decoder-only, causal
    t5g2 train --config=configs/t5gemma_small.py:adapted-96 --workdir=runs/small/adapted    # from it, PrefixLM
    t5g2 train --config=configs/t5gemma_small.py:scratch-96 --workdir=runs/small/scratch    # from nothing, PrefixLM

ARM-WIDTH: arms source, adapted, scratch; width 64 or 96. experiments/t5gemma_table4.py runs those of width 64.

Text: the language reference and the standard library of the Python that runs it, 1 byte = 1 token.
From the paper (arXiv 2504.06225, sections 3 and 4): Gemma 2 blocks (local and global in turn, soft caps), separate
cross-attention, PrefixLM of two halves for both arms; a quarter of the source's tokens for adaptation (2T of 8T), as
many as the source's for scratch (8T). Ours: everything about size, and the learning rate, which is the same for all.
Known deviations: no distillation; the window is shorter than the text, as it is in the paper at its lengths.

Compiled for v5e:1x1 (t5g2 check --target): adapted-64 takes 0.15 GiB of the chip.
"""

from ml_collections import ConfigDict

from t5g2.core.errors import unknown

ARMS = ("source", "adapted", "scratch")
WIDTHS = (64, 96)
CHUNK_TOKENS = 127  # and EOS
STEPS = {"source": 500, "adapted": 125, "scratch": 500}


def blocks(width):
    """Gemma 2's proportions at a width: twice as many query as key/value heads."""
    return {
        "vocab_size": 384,
        "width": width,
        "layers": 4,
        "mlp_width": 3 * width,
        "heads": 4,
        "kv_heads": 2,
        "head_size": width // 4,
        "window": 32,
        "pattern": ["local", "global"],
        "rope_global": {"base": 10_000.0},
        "qk_norm": False,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
    }


def get_config(name="adapted-96"):
    names = [f"{arm}-{width}" for arm in ARMS for width in WIDTHS]
    if name not in names:
        raise unknown("run", name, names, where="of the small T5Gemma")
    arm, width = name.split("-")
    stack, source = blocks(int(width)), arm == "source"
    objective = {"kind": "causal"} if source else {"kind": "prefix_lm"}
    config = ConfigDict()
    if source:
        config.model = {"kind": "gemma", **stack}
    else:
        config.model = {
            "kind": "t5gemma",
            "encoder": stack,
            "decoder": stack,
            "cross": "separate",
            "tied_embedding": False,
            "encoder_window": "each_side",
        }
    config.data = {
        "sources": [{"text": {"kind": "python", "split": "train"}, "objective": objective, "name": "python"}],
        "tokenizer": {"kind": "bytes"},
        "chunk_tokens": CHUNK_TOKENS,
        "rows": 16,
        "encoder_length": 0 if source else 64,
        "decoder_length": 128 if source else 64,
        "streams": 16,
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 3e-3, "warmup_steps": 20, "final_fraction": 0.1},
        "clip_norm": 1.0,
        "decay": [
            {"pattern": "*.scale", "rate": 0.0},
            {"pattern": "*embedder.*", "rate": 0.0},
            {"pattern": "*", "rate": 0.1},
        ],
    }
    config.train = {"steps": STEPS[arm]}
    # bfloat16 is slower than float32 on a CPU
    config.compute = {"dtype": "float32"}
    # all chunks of four documents, 68,000 characters, so that every seed is asked the same
    heldout = {"kind": "python", "split": "heldout", "max_bytes": 800_000}
    config.eval = {
        "every_steps": 100 if source else 25,
        "tasks": [{"kind": "heldout_loss", "text": heldout, "objective": objective, "examples": None}],
    }
    config.save = {"every_steps": 200, "keep": 1}
    config.log = {"every_steps": 5}
    if arm == "adapted":
        config.init = {"adapt": {"source": f"runs/small/source-{width}/model"}}
    return config
