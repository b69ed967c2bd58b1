"""The runs of the end-to-end tests: tiny models on a folder of text files that the test makes.

get_config("ARM@FOLDER"): ARM is source, adapted or scratch; FOLDER holds train/ and heldout/.
"""

from ml_collections import ConfigDict

BLOCKS = {
    "vocab_size": 384,
    "width": 32,
    "layers": 3,
    "mlp_width": 48,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 8,
    "window": 8,
    "pattern": ["local", "global"],
}


def get_config(argument):
    arm, folder = argument.split("@")
    objective = {"kind": "causal"} if arm == "source" else {"kind": "ul2"}
    config = ConfigDict()
    config.model = {"kind": "gemma", **BLOCKS}
    if arm != "source":
        config.model = {"kind": "t5gemma", "encoder": BLOCKS, "decoder": BLOCKS}

    def data(split, objective):
        return {
            "sources": [{"text": {"kind": "text", "path": f"{folder}/{split}"}, "objective": objective}],
            "tokenizer": {"kind": "bytes"},
            "chunk_tokens": 40,
            "rows": 8,
            "encoder_length": 0 if arm == "source" else 64,
            "decoder_length": 64,
            "streams": 4,
            "packing_rows": 2,
        }

    config.data = data("train", objective)
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 3e-3, "warmup_steps": 4},
    }
    config.train = {"steps": 48, "seed": 7}
    config.save = {"every_steps": 4, "keep": 2}
    config.log = {"every_steps": 2}
    config.compute = {"dtype": "float32"}
    if arm == "adapted":
        config.init = {"adapt": {"source": f"{folder}/source/model"}}
    return config
