"""A folder in which the commands of the pages work as they stand: the released models, tiny, and the files they name.

Every released size is a tiny one of the same kind (`shrunk`), so `--target=t5gemma:9b-2b` and {"size": …} mean tiny
models too, and `models/gemma-2-9b` is a folder of one.
"""

import dataclasses
import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t5g2.checkpoint import export_folder, folder
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.eval.tasks import HeldoutLoss
from t5g2.jobs import dry_run, task_files
from t5g2.models import sizes
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, Rope, TextConfig, VisionConfig
from t5g2.models.layers import Compute
from t5g2.train import config_file
from t5g2.train.experiment import Evaluation, Experiment, Log, Save, Train
from t5g2.train.optim import OptimConfig
from t5g2.train.schedules import Constant
from tests import hub_cache, tiny, weights
from tests.data import tokenizer_files
from tests.docs.pages import PAGES, ROOT, blocks

# the folders that pages name, and the released sizes whose tiny form they hold
MODELS = {
    "gemma-2-2b": "gemma2:2b",
    "gemma-2-9b": "gemma2:9b",
    "gemma-3-270m": "gemma3:270m",
    "gemma-3-1b-pt": "gemma3:1b",
    "gemma-3-4b-pt": "gemma3:4b",
    "gemma-3-4b": "gemma3:4b",
    "gemma3-4b": "gemma3:4b",
    "t5gemma2-270m": "t5gemma2:270m-270m",
    "t5gemma2-1b": "t5gemma2:1b-1b",
    "t5gemma2-4b": "t5gemma2:4b-4b",
}
DOWNLOADS = {"gemma-3-270m": "gemma3:270m", "t5gemma-2-270m-270m": "t5gemma2:270m-270m"}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
IMAGES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
# sentinels enough for the chunks of 16,384 tokens of the released configs
PIECES = [*SPECIAL, *BYTES, *IMAGES, *(f"<unused{number}>" for number in range(900))]
BEGIN, END, IMAGE = (PIECES.index(name) for name in IMAGES)
RELEASED = 10_000  # rows of an embedding, from which on an architecture is a released one
STEPS = 4


def write_tokenizer(path: Path) -> None:
    """Writes a tokenizer.json in Gemma's layout, whose text tokens are bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = {piece: number for number, piece in enumerate(PIECES)}
    made = tokenizers.Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([*SPECIAL[:4], *SPECIAL[5:7], *IMAGES])
    made.save(str(path))


def shrunk(config: Any) -> Any:
    """Returns the tiny architecture of the same kind; those of two different widths differ too."""
    if isinstance(config, EncoderDecoderConfig):
        sides = {"encoder": shrunk(config.encoder), "decoder": shrunk(config.decoder)}
        # all merged models are one architecture, and so share programs
        return dataclasses.replace(config, **sides, eoi_id=END if config.cross == "merged" else config.eoi_id)
    if isinstance(config, VisionConfig):
        return dataclasses.replace(config, width=16, layers=2, mlp_width=24, heads=2, image_size=16, patch_size=4)
    if isinstance(config, DualEncoderConfig):
        return tiny.SIGLIP
    assert isinstance(config, TextConfig)
    images = config.images
    if images is not None:
        ids = {"token": IMAGE, "begin": BEGIN, "end": END} if is_released(config) else {}
        images = dataclasses.replace(images, vision=shrunk(images.vision), tokens=4, **ids)
    return dataclasses.replace(
        config,
        vocab_size=len(PIECES),
        width=32 if config.width < 3000 else 48,
        layers=min(config.layers, 4),
        mlp_width=48,
        heads=4,
        kv_heads=2,
        head_size=8,
        window=8,
        pattern=("local", "global"),
        query_scalar=None,
        rope_global=Rope(10_000.0),
        images=images,
    )


def is_released(config: TextConfig) -> bool:
    return config.vocab_size > RELEASED


def small_run(experiment: Experiment) -> Experiment:
    """Returns a run of a few steps of a tiny model on little text: of the command's objectives, tasks and weights.

    What changes neither the kinds of models nor those of data is the same in all runs, so that they share programs.
    """
    data, evaluation = experiment.data, experiment.eval
    sources = tuple(dataclasses.replace(source, text=little(source.text)) for source in data.sources)
    # one is enough, and generation is what `generate` is for
    tasks = [task for task in evaluation.tasks if isinstance(task, HeldoutLoss)][:1]
    lengths = {"encoder_length": 64 if data.encoder_length else 0, "decoder_length": 64, "chunk_tokens": 40}
    return dataclasses.replace(
        experiment,
        model=shrunk(experiment.model),
        data=dataclasses.replace(data, sources=sources, **lengths, rows=4, streams=4, packing_rows=1),
        optim=OptimConfig(Constant(1e-3)),
        train=Train(STEPS),
        compute=Compute("float32"),
        eval=Evaluation(tasks=tuple(dataclasses.replace(task, examples=2, text=little(task.text)) for task in tasks)),
        save=Save(every_steps=STEPS // 2 if experiment.save.keep > 1 else 0),
        log=Log(every_steps=1, tensorboard=False),
    )


def little(text: Any) -> Any:
    # of the hashes of names, so that both splits have a document
    return dataclasses.replace(text, max_bytes=400_000) if isinstance(text, PythonText) else text


def make_workplace(where: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes the folder, makes it the working folder, and makes every released size tiny."""
    for name in ("configs", "experiments", "launch", "constraints"):
        (where / name).symlink_to(ROOT / name)
    for name, config in list(sizes.SIZES.items()):
        patch.setitem(sizes.SIZES, name, shrunk(config))
    patch.chdir(where)
    write_tokenizer(where / "tokenizer.json")
    tokenizer = HuggingFace(str(where / "tokenizer.json"))
    for name, size in MODELS.items():
        params = weights.model(sizes.SIZES[size])
        folder.save_model(where / "models" / name, params, tokenizer=tokenizer.to_dict(), extra_files=tokenizer.files)
    siglip = tokenizer_files.siglip(where)
    dual = weights.model(tiny.SIGLIP)
    spelled = {"kind": "sentencepiece", "file": str(siglip)}
    folder.save_model(where / "models" / "medsiglip", dual, tokenizer=spelled, extra_files=[siglip])
    for name, size in DOWNLOADS.items():
        ours = next(mine for mine, other in MODELS.items() if other == size)
        export_folder.export_model(where / "models" / ours, where / "downloads" / name)
    # for hf://google/gemma-3-270m
    hub_cache.add(where / "hub", "google/gemma-3-270m", where / "downloads" / "gemma-3-270m")
    write_files(where)
    for page in PAGES:
        for block in blocks(page):
            if block.title:
                (where / block.title).write_text(block.text)


def write_files(where: Path) -> None:
    """Writes the texts, records and images that pages name."""
    texts = [f"{number} is a number, and {number + 1} comes after it. " * 8 for number in range(12)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("corpus/some.jsonl", "corpus/one.jsonl", "heldout/some.jsonl"):
        (where / name).parent.mkdir(exist_ok=True)
        (where / name).write_text(lines)
    (where / "data").mkdir()
    asked = [{"question": f"And after {n}?", "answer": f"{n + 1}", "choices": [f"{n + 1}", "x"]} for n in range(4)]
    (where / "data" / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    (where / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    picture = io.BytesIO()
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(picture, "JPEG")
    for name in ("photo.jpg", "1.jpg", "2.jpg"):
        (where / name).write_bytes(picture.getvalue())
    with tarfile.open(where / "pictures.tar", "w") as archive:
        for name, content in (("0001.jpg", picture.getvalue()), ("0001.txt", b"a picture that nobody has taken")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def run_small(patch: pytest.MonkeyPatch) -> None:
    """Lets commands run small: a config and its overrides are read as they stand, and then made small."""
    load = config_file.load
    patch.setattr(config_file, "load", lambda config, overrides=(): small_run(load(config, overrides)))
    # the first task of a file is enough
    load_tasks = task_files.load
    patch.setattr(task_files, "load", lambda names: load_tasks(names)[:1])
    # compiled, the step of a tiny model says nothing
    patch.setattr(dry_run, "check", functools.partial(dry_run.check, compiled=False))
