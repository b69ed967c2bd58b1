"""A probe, small enough for two CPU cores: does an adapted encoder tell code from prose, and how long a line is?

    t5g2 train --config=configs/probe_small.py:head    --workdir=runs/probe/head       # the head alone, frozen body
    t5g2 train --config=configs/probe_small.py:full    --workdir=runs/probe/full       # everything
    t5g2 train --config=configs/probe_small.py:decoder --workdir=runs/probe/decoder    # all of a decoder-only model
    t5g2 train --config=configs/probe_small.py:number  --workdir=runs/probe/number     # regression: a line's length
    t5g2 train --config=configs/probe_small.py:head    --workdir=runs/probe/random --config.init.params=None

Weights: runs/quickstart/adapted/model (of decoder: source/model), which configs/quickstart.py trains; the last line is
the baseline, a random encoder. experiments/probe_small.py compares encoder and decoder over seeds. Texts: lines of 40
to 100 characters of the standard library's modules (code) and of the language reference (prose), in equal numbers;
written to the cache when the config is read. Tested on held-out documents. 300 steps of the head take about a minute.

From T5Gemma's SuperGLUE protocol (arXiv 2504.06225, section 4): a head on the encoder's last state; full is its full
fine-tuning. Known deviations: no dropout, and no grid over learning rates and batches.

Compiled for v5e:1x1 (t5g2 check --target): head takes 0.02 GiB of the chip.
"""

import json

from ml_collections import ConfigDict

from t5g2.core.errors import unknown
from t5g2.core.files import cache_folder, write_text
from t5g2.data.sources.python_text import PythonText

ARMS = ("head", "full", "decoder", "number")
CLASSES = ("prose", "code")
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
LONGEST = 100  # of a line, in bytes


def lines(split, most):
    """The path of a file of lines with their classes and lengths, as many of each class, at most `most`."""
    documents = PythonText(split=split).open()
    by_class = {name: [] for name in CLASSES}
    for number in range(len(documents)):
        text = documents[number]
        name = "code" if any(line.startswith(("import ", "def ", "class ")) for line in text.splitlines()) else "prose"
        usable = [line.strip() for line in text.splitlines() if line.isascii() and 40 <= len(line.strip()) <= LONGEST]
        by_class[name] += usable[:: max(1, len(usable) // 40)]
    records, number = [], min(most, *map(len, by_class.values()))
    for name, found in by_class.items():
        kept = found[:: max(1, len(found) // number)][:number]
        records += [{"text": line, "kind": name, "length": len(line) / LONGEST} for line in kept]
    target = cache_folder() / f"python_lines_{split}.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    # whole or not at all: another run may read it at this moment
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)
    return str(target)


def get_config(arm="head"):
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS, where="of the probe")
    number, decoder = arm == "number", arm == "decoder"
    classes = [] if number else list(CLASSES)
    shared = {"label": "{length}" if number else "{kind}"}
    config = ConfigDict()
    config.model = {"kind": "gemma", **BLOCKS} if decoder else {"kind": "t5gemma", "encoder": BLOCKS, "decoder": BLOCKS}
    config.model["probe"] = {"classes": classes, "state": "mean" if number else "last"}
    train, heldout = ({"kind": "jsonl", "path": lines(split, 1000)} for split in ("train", "heldout"))
    text = {"kind": "labelled", "records": train, "classes": classes, **shared}
    config.data = {
        "sources": [{"text": text, "objective": {"kind": "probe_decoder" if decoder else "probe"}, "name": "lines"}],
        "tokenizer": {"kind": "bytes"},
        "chunk_tokens": LONGEST + 2,
        "rows": 8,
        "encoder_length": 0 if decoder else 256,
        "decoder_length": 256 if decoder else 32,  # 32: up to four texts in a row
        "streams": 16,
    }
    head_alone = arm in ("head", "number")
    config.optim = {
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "peak": 1e-2 if head_alone else 1e-3, "warmup_steps": 10},
        "freeze": [{"pattern": "probe.*", "end": 0}, {"pattern": "*"}] if head_alone else [],
    }
    config.train = {"steps": 300}
    # bfloat16 is slower than float32 on a CPU
    config.compute = {"dtype": "float32"}
    metrics = ["pearson", "spearman"] if number else ["accuracy", "f1", "mcc", "auc"]
    task = {"kind": "probe", "name": "heldout_lines", "data": heldout, "metrics": metrics, "examples": 400, **shared}
    config.eval = {"every_steps": 100, "tasks": [task]}
    config.save = {"every_steps": 100, "keep": 1}
    config.init = {"params": f"runs/quickstart/{'source' if decoder else 'adapted'}/model"}
    return config
