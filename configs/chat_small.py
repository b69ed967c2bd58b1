"""Supervised fine-tuning, small enough for two CPU cores: a T5Gemma 2 style model learns to say what functions do.

    t5g2 train --config=configs/chat_small.py --workdir=runs/chat        # from nothing: what it says is no English yet
    t5g2 train --config=configs/chat_small.py --workdir=runs/chat --config.init.params=runs/quickstart/adapted/model

Dialogues: for every documented function of this Python's standard library, its name and arguments, and the first line
of its docstring; written to the cache when the config is read. 1 byte = 1 token; the tokens that begin and end a turn
are two of the tokenizer's sentinels, because bytes have no others. 200 steps take about 3 minutes.

Compiled for v5e:1x1 (t5g2 check --target): 0.09 GiB of the chip.
"""

import ast
import json
import sysconfig
from pathlib import Path

from ml_collections import ConfigDict

from t5g2.core.files import cache_folder, write_text
from t5g2.data.sources.dialogues import answer_ids
from t5g2.data.tokenizers.byte_level import Bytes

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
LONGEST = 240  # of a dialogue, in bytes
TURNS = {"start_of_turn": Bytes().id("sentinel_98"), "end_of_turn": Bytes().id("sentinel_99")}


def dialogues():
    """The path of the file."""
    target = cache_folder() / "python_functions.jsonl"
    lines = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            if said := (ast.get_docstring(node) or "").partition("\n")[0].strip():
                prompt = f"What does {file.stem}.{node.name}({ast.unparse(node.args)}) do?"
                if len(f"{prompt}{said}".encode()) < LONGEST - 20:
                    lines.append(json.dumps({"prompt": prompt, "answer": said}) + "\n")
    # whole or not at all: another run may read it at this moment
    if not target.exists() or target.read_text(encoding="utf-8") != "".join(lines):
        write_text(target, "".join(lines))
    return str(target)


def get_config():
    config = ConfigDict()
    config.model = {"kind": "t5gemma", "encoder": BLOCKS, "decoder": BLOCKS}
    objective = {"kind": "sft", **answer_ids(Bytes(), **TURNS)}
    text = {"kind": "chat", "path": dialogues(), **TURNS}
    config.data = {
        "sources": [{"text": text, "objective": objective, "name": "functions"}],
        "tokenizer": {"kind": "bytes"},
        "chunk_tokens": LONGEST,
        "rows": 8,
        "encoder_length": 320,
        "decoder_length": 256,
        "streams": 16,
    }
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 1e-3, "warmup_steps": 10, "final_fraction": 0.1},
    }
    config.train = {"steps": 200}
    config.compute = {"dtype": "float32", "remat": "block"}
    return config
