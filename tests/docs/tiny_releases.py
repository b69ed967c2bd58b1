"""A folder in which the commands of the pages work as they stand: the released models, tiny, and the files they name.

`run_small` makes small what they run there: runs, checks, tasks and sweeps.

Every released size is a tiny one of the same kind (`shrunk`), so `--target=t5gemma:9b-2b` and {"size": …} mean tiny
models too, and `models/gemma-2-9b` is a folder of one.
"""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from t5g2 import cli
from t5g2.checkpoint import export_folder, folder
from t5g2.core.batch import Sequences
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.subword import HuggingFace
from t5g2.eval.long_context import LongContextTask
from t5g2.eval.tasks import HeldoutLoss
from t5g2.jobs import dry_run, task_files
from t5g2.models import flops, sizes
from t5g2.models.config import DualEncoderConfig, EncoderDecoderConfig, Rope, TextConfig, VisionConfig
from t5g2.models.layers import Compute
from t5g2.sweep import launch, sweep_file
from t5g2.sweep.job_files import JobFiles
from t5g2.sweep.launchers import local
from t5g2.sweep.parts import Sweep
from t5g2.sweep.sweep_job import SweepJob
from t5g2.train import config_file, loop
from t5g2.train import plan as plans
from t5g2.train.experiment import Evaluation, Experiment, Log, Save, Train
from t5g2.train.optim import OptimConfig
from t5g2.train.plan import Plan
from t5g2.train.schedules import Constant
from tests import hub_cache, tiny, weights
from tests.checkpoint import gguf_files
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
NARROW, WIDE = 32, 48
IMAGE_SIZE, IMAGE_TOKENS = 16, 4
MOST_STEPS, UPDATES = 10, 40  # of a small run; that a step of it stands for, at least


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
        return dataclasses.replace(
            config, width=16, layers=2, mlp_width=24, heads=2, image_size=IMAGE_SIZE, patch_size=4
        )
    if isinstance(config, DualEncoderConfig):
        return tiny.SIGLIP
    assert isinstance(config, TextConfig)
    images = config.images
    if images is not None:
        ids = {"token": IMAGE, "begin": BEGIN, "end": END} if is_released(config) else {}
        images = dataclasses.replace(images, vision=shrunk(images.vision), tokens=IMAGE_TOKENS, **ids)
    return dataclasses.replace(
        config,
        vocab_size=len(PIECES),
        width=NARROW if config.width < 3000 and config.width != WIDE else WIDE,
        layers=min(config.layers, 4),
        mlp_width=48,
        heads=4,
        kv_heads=4 if config.kv_heads == config.heads else 2,
        head_size=8,
        window=8,
        pattern=("local", "global"),
        query_scalar=None,
        rope_global=Rope(10_000.0),
        images=images,
    )


def is_released(config: TextConfig) -> bool:
    return config.vocab_size > RELEASED


def updates_of_a_step(experiment: Experiment) -> int:
    """Returns how many updates of a run a step of the small one stands for: 1800 of 2000 are 9 of 10 steps."""
    return max(UPDATES, experiment.train.steps // MOST_STEPS)


def small_run(experiment: Experiment) -> Experiment:
    """Returns a run of a few steps of a tiny model on little text: of the command's objectives, tasks and weights.

    What changes neither the kinds of models nor those of data is the same in all runs, so that they share programs.
    """
    data, evaluation, save = experiment.data, experiment.eval, experiment.save
    schedule: Any = experiment.optim.schedule  # every one of t5g2 has a peak
    steps = max(1, experiment.train.steps // updates_of_a_step(experiment))
    sources = tuple(dataclasses.replace(source, text=little(source.text)) for source in data.sources)
    # one is enough, and generation is what `generate` is for
    tasks = [task for task in evaluation.tasks if isinstance(task, HeldoutLoss)][:1]
    changes: dict[str, Any] = {"encoder_length": 64 if data.encoder_length else 0, "decoder_length": 64}
    if data.images is not None:
        changes |= {"images": dataclasses.replace(data.images, size=IMAGE_SIZE, tokens=IMAGE_TOKENS)}
    made = dataclasses.replace(
        experiment,
        model=shrunk(experiment.model),
        data=dataclasses.replace(data, sources=sources, **changes, chunk_tokens=40, rows=4, streams=4, packing_rows=1),
        optim=OptimConfig(Constant(schedule.peak)),
        train=Train(steps, seed=experiment.train.seed),
        compute=Compute("float32"),
        eval=Evaluation(tasks=tuple(dataclasses.replace(task, examples=2, text=little(task.text)) for task in tasks)),
        # the last two checkpoints, where more than one is kept: a mean and a replay take no others
        save=Save(max(1, steps - 1) if save.keep > 1 else 0, save.keep),
        log=Log(every_steps=1, tensorboard=False),
    )
    if experiment.train.flops is None:
        return made
    # a budget stays one, and so what derives the steps from it is run too
    budget = Train(flops=4 * full_rows_flops(made), seed=made.train.seed)
    return dataclasses.replace(made, train=budget)


def full_rows_flops(experiment: Experiment) -> float:
    """Returns the FLOPs of an update, forward and backward, whose rows are one example each."""
    data = experiment.data
    encoder, decoder = (
        Sequences(np.zeros((1, length)), np.ones((1, length), int), np.arange(length)[None])
        for length in (data.encoder_length, data.decoder_length)
    )
    counts = flops.count_rows(experiment.model, encoder if data.encoder_length else None, decoder)
    return float(data.rows * sum(flops.training(experiment.model, counts, frozen_vision=True).values()))


def small_task(task: Any) -> Any:
    """Returns a task of one or two examples."""
    if isinstance(task, LongContextTask):
        changes = {"lengths": (512,), "depths": (50,), "examples": 1, "max_new_tokens": 8}
        return dataclasses.replace(task, **changes, text=little(task.text))
    return dataclasses.replace(task, examples=2)


def small_sweep(sweep: Sweep) -> Sweep:
    """Returns a sweep of a single seed."""
    parts = (dataclasses.replace(part, seeds=None if part.seeds is None else part.seeds[:1]) for part in sweep.parts)
    return dataclasses.replace(sweep, parts=tuple(parts))


def little(text: Any) -> Any:
    # of the hashes of names, so that both splits have a document
    return dataclasses.replace(text, max_bytes=400_000) if isinstance(text, PythonText) else text


def make_workplace(where: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes the folder, makes it the working folder, and makes every released size tiny."""
    for name in ("configs", "experiments", "launch", "constraints"):
        (where / name).symlink_to(ROOT / name)
    for name, config in list(sizes.SIZES.items()):
        patch.setitem(sizes.SIZES, name, shrunk(config))
    patch.setattr(plans.Plan, "lower", lowered_once(plans.Plan.lower))
    patch.chdir(where)
    patch.setenv("T5G2_CACHE", str(where / "cache"))
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
    gguf_files.write(where / "downloads" / "gemma-3-270m-Q8_0.gguf", "Q8_0")
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
    # the file system of all hosts
    (where / "shared").mkdir()
    for name in ("models", "corpus"):
        (where / "shared" / name).symlink_to(where / name)
    (where / "data").mkdir()
    asked = [{"question": f"And after {n}?", "answer": f"{n + 1}", "choices": [f"{n + 1}", "x"]} for n in range(4)]
    (where / "data" / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    (where / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    picture = io.BytesIO()
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(picture, "JPEG")
    for name in ("photo.jpg", "1.jpg", "2.jpg"):
        (where / name).write_bytes(picture.getvalue())
    with tarfile.open(where / "pictures.tar", "w") as archive:
        for name, content in (("0001.jpg", picture.getvalue()), ("0001.txt", b"a picture of nothing")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def lowered_once(lower: Callable[[Plan], Any]) -> Callable[[Plan], Any]:
    """Returns a method that gives the runs of one folder the same train step, wherever it is made of the same."""
    programs: dict[str, Any] = {}

    def once(plan: Plan) -> Any:
        made = plan.experiment
        # the schedule of a small run is constant, so its length is not among what the step is made of
        key = repr((made.model, made.optim, plan.step_options(), plan.abstract, plan.batch, plan.teacher, plan.mesh))
        if key not in programs:
            programs[key] = lower(plan).compile(compiler_options=plan.compiler_options)
        return SimpleNamespace(compile=lambda compiler_options: programs[key])

    return once


class JobHere:
    """A job of a sweep, as launchers/local.py has them, but in this process, where runs are small."""

    handle = "here"

    def __init__(self, command: Sequence[str], job_files: JobFiles, job: SweepJob):
        del command
        with open(job_files.log(job), "a") as log, redirect_stdout(log), redirect_stderr(log):
            self._status = cli.main(list(job.arguments))

    def poll(self) -> int:
        return self._status

    def send_signal(self, number: int) -> None:
        raise AssertionError(f"the job has ended before the signal {number}")


def run_small(patch: pytest.MonkeyPatch, devices: Sequence[Any]) -> None:
    """Lets commands run small: a config and its overrides are read as they stand, and then made small.

    Args:
      devices: those that `t5g2 check --devices` simulates; a run has the first.
    """
    load, train, check, load_tasks = config_file.load, loop.train, dry_run.check, task_files.load
    load_sweep, every = sweep_file.load, devices
    read: list[Experiment] = []

    def load_small(config: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
        read[:] = [load(config, overrides)]
        return small_run(read[0])

    def train_small(experiment: Experiment, folder: str, *, replay: int | None, allow_change: tuple[str, ...]) -> None:
        step = None if replay is None else replay // updates_of_a_step(read[0])
        train(experiment, folder, replay=step, allow_change=allow_change)

    def check_small(experiment: Experiment, *, devices: int, **options: Any) -> None:
        # as many rows as there are, because they are to fit the devices
        data = dataclasses.replace(experiment.data, rows=read[0].data.rows)
        with pytest.MonkeyPatch.context() as whole:
            whole.setattr(jax, "devices", lambda: every[: devices or 1])
            # compiled, the step of a tiny model says nothing
            check(dataclasses.replace(experiment, data=data), devices=devices, compiled=False, **options)

    patch.setattr(config_file, "load", load_small)
    patch.setattr(loop, "train", train_small)
    patch.setattr(dry_run, "check", check_small)
    # the first task of a file is enough
    patch.setattr(task_files, "load", lambda names: [small_task(load_tasks([name])[0]) for name in names])
    patch.setattr(launch, "load", lambda file: small_sweep(load_sweep(file)))
    patch.setattr(local, "LocalProcess", JobHere)
