"""The main job, small enough for two CPU cores: a Gemma 3 style model, adapted to T5Gemma 2, against scratch.

    t5g2 train --config=configs/quickstart.py:source  --workdir=runs/quickstart/source     # decoder-only, causal
    t5g2 train --config=configs/quickstart.py:adapted --workdir=runs/quickstart/adapted    # from it, UL2
    t5g2 train --config=configs/quickstart.py:scratch --workdir=runs/quickstart/scratch    # same batches, from nothing

Text: the language reference and the standard library of the Python that runs it, 1 byte = 1 token.
Compiled for v5e:1x1 (t5g2 check --target): adapted takes 0.07 GiB of the chip, a third of it the program.
"""

from ml_collections import ConfigDict

from t5g2.core.errors import unknown

CHUNK_TOKENS = 120
BLOCKS = {
    "vocab_size": 384,
    "width": 128,
    "layers": 4,
    "mlp_width": 256,
    "heads": 2,
    "kv_heads": 1,
    "head_size": 64,
    "window": 32,
    "pattern": ["local", "global"],
}


def get_config(arm="adapted"):
    if arm not in ("source", "adapted", "scratch"):
        raise unknown("arm", arm, ["source", "adapted", "scratch"], where="of the quickstart")
    config = ConfigDict()
    source = arm == "source"
    objective = {"kind": "causal"} if source else {"kind": "ul2"}
    if source:
        config.model = {"kind": "gemma", **BLOCKS}
    else:
        config.model = {"kind": "t5gemma", "encoder": BLOCKS, "decoder": BLOCKS}
    config.data = {
        "sources": [{"text": {"kind": "python", "split": "train"}, "objective": objective, "name": "python"}],
        "tokenizer": {"kind": "bytes"},
        "chunk_tokens": CHUNK_TOKENS,
        "rows": 8,
        "encoder_length": 0 if source else 192,
        "decoder_length": 256,
        "streams": 16,
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 3e-3, "warmup_steps": 20 if source else 10, "final_fraction": 0.1},
        "decay": [
            {"pattern": "*.scale", "rate": 0.0},
            {"pattern": "embedder.*", "rate": 0.0},
            {"pattern": "*", "rate": 0.1},
        ],
    }
    config.train = {"steps": 400 if source else 100}
    # bfloat16 is slower than float32 on a CPU; remat is faster there too, where memory is slow
    config.compute = {"dtype": "float32", "remat": "block"}
    heldout = {"kind": "python", "split": "heldout"}
    # the same targets for all three: the last 3/4 of a chunk, given the first
    suffix = {"name": "suffix_r75", "rate": 0.75}
    continuation = {"kind": "causal", "context": 0.25} if source else {"kind": "ul2", "tasks": [suffix]}
    config.eval = {
        "every_steps": 100 if source else 25,
        "tasks": [
            {"kind": "heldout_loss", "text": heldout, "objective": objective, "examples": 64},
            {"kind": "heldout_loss", "text": heldout, "objective": continuation, "name": "continuation"},
            {"kind": "samples", "text": heldout, "examples": 3, "sampler": {"kind": "top_p", "p": 0.9}},
        ],
        "final": ["continuation", "samples"],
    }
    config.save = {"every_steps": 100 if source else 25, "keep": 1}
    config.log = {"every_steps": 10}
    if arm == "adapted":
        config.init = {"adapt": {"source": "runs/quickstart/source/model"}}
    return config
