"""What a run starts from and what it leaves: shapes, weights, data positions, checkpoints, the model folder."""

import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import ModelFolder
from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import logs, settings, sharding, tree
from t5g2.core.batch import Batch
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data import packed_rows
from t5g2.data.config import DataConfig, TeacherFeatures
from t5g2.data.pipeline import Pipeline
from t5g2.eval.tasks import EvalContext
from t5g2.models import build
from t5g2.models.config import to_dict
from t5g2.train import adaptation, optim, teachers
from t5g2.train import experiment as experiments
from t5g2.train import state as states
from t5g2.train import step as steps
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import Experiment
from t5g2.train.state import TrainState

log = logging.getLogger("t5g2")


class Begun(NamedTuple):
    """Where a run stands when it starts.

    Attributes:
      state: weights and optimizer, on the devices.
      step: updates that made it.
      positions: of the data streams; None = their start.
      corpus: fingerprint of the text that the positions are in; None = any.
      teacher: fingerprint of the teacher that was asked in every step; None = any.
      provenance: where each weight of an adapted model came from, as plain data; None if it was not adapted here.
    """

    state: Any
    step: int
    positions: Mapping[str, Sequence[int]] | None
    corpus: str | None
    teacher: str | None
    provenance: Any


@dataclass(frozen=True, eq=False)
class Plan:
    """The shapes of a run: everything that is known before there is an array.

    Attributes:
      data: the experiment's, with what rows carry for a teacher.
      abstract: the state, each leaf with the sharding it will have.
      batch: the global batch.
      teacher: the folder of a teacher that is asked in every step, and its shapes, sharded; None if there is none.
    """

    experiment: Experiment
    data: DataConfig
    world: jax.sharding.Mesh
    optimizer: optim.Updates
    abstract: TrainState
    batch: Batch
    teacher: tuple[ModelFolder, Any] | None = None

    def settings(self) -> steps.Settings:
        """What the step computes beside the model."""
        data, train = self.experiment.data, self.experiment.train
        return steps.Settings(
            compute=self.experiment.compute,
            denoisers=len(data.denoisers),
            sources=len(data.names),
            microbatches=train.microbatches,
            tile_tokens=train.tile_tokens,
            z_loss=train.z_loss,
            distillation=self.experiment.distill,
            seed=derive_seed(train.seed, "distill"),
        )

    def compile(self) -> Any:
        """The compiled step; says what it takes."""
        step = steps.make_train_step(self.optimizer, self.settings())
        start = time.perf_counter()
        teacher = None if self.teacher is None else self.teacher[1]
        compiled = steps.compile_step(step, self.abstract, self.batch, teacher, world=self.world)
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        log.info(
            "compiled in %.1f s: %s parameters, %s slots a step, %.2f GiB per device of which %.2f temporary",
            seconds,
            logs.short(parameters),
            logs.short(sum(s.tokens.size for s in (self.batch.encoder, self.batch.decoder) if s is not None)),
            total,
            memory.temp_size_in_bytes / 2**30,
        )
        return compiled

    def eval_context(self, rows: range) -> EvalContext:
        """What evaluation tasks are told."""
        train = self.experiment.train
        return EvalContext(
            data=self.experiment.data,
            seed=train.seed,
            compute=self.experiment.compute,
            tile_tokens=train.tile_tokens,
            mesh=self.world,
            rows=rows,
        )


def plan(experiment: Experiment, world: jax.sharding.Mesh) -> Plan:
    """The shapes of a run on a mesh.

    Raises:
      UserError: a schedule or a pattern does not fit.
    """
    train = experiment.train
    data, teacher = rows(experiment, world)
    params = build.abstract(experiment.model, train.param_dtype)
    optimizer = optim.make(experiment.optim, train.steps, params)
    abstract = states.abstract(experiment.model, optimizer, world=world, param_dtype=train.param_dtype)
    place = sharding.batch_sharding(world)
    row = packed_rows.empty_batch(data, rows=1).batch
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((data.rows, *x.shape[1:]), x.dtype, sharding=place), row)
    return Plan(experiment, data, world, optimizer, abstract, batch, teacher)


def rows(experiment: Experiment, world: jax.sharding.Mesh) -> tuple[DataConfig, tuple[ModelFolder, Any] | None]:
    """The data with what its rows carry for a teacher, and the teacher that is asked in every step: `Plan.teacher`.

    Raises:
      UserError: there is no such teacher, or it speaks of other tokens.
    """
    data, distill = experiment.data, experiment.distill
    if distill is None:
        return data, None
    if distill.cache is not None:
        whose = None
        if distill.teacher is not None:
            whose = teachers.fingerprint(teachers.open_teacher(distill.teacher, data.tokenizer, experiment.vocab_size))
        carried = TeacherFeatures(
            "answers", cache=distill.cache, per_token=distill.per_token, method=distill.method, teacher=whose
        )
        return dataclasses.replace(data, teacher_features=carried), None
    folder = teachers.open_teacher(distill.teacher or "", data.tokenizer, experiment.vocab_size)
    carried = TeacherFeatures("text" if teachers.reads_text(folder) else "rows")
    abstract = teachers.abstract(folder, world, folders.common_dtype(folder))
    return dataclasses.replace(data, teacher_features=carried), (folder, abstract)


def checkpoints(experiment: Experiment, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of a run."""
    return Checkpoints(workdir / workdirs.CHECKPOINTS, keep=experiment.save.keep, read_only=read_only)


def begin(experiment: Experiment, workdir: Path, plan: Plan, saved: Checkpoints, *, replay: int | None = None) -> Begun:
    """The state that a run starts from, and which it is: the workdir's own, or what `init` says, or new weights.

    Raises:
      UserError: there is no such checkpoint, or what `init` names does not exist or does not fit.
    """
    restored = saved.restore(plan.abstract.params, plan.abstract.opt, step=replay)
    where, init = f"the workdir, {workdir}", experiment.init
    if restored is None and init.resume is not None:
        with Checkpoints(Path(init.resume) / workdirs.CHECKPOINTS, read_only=True) as other:
            restored = other.restore(plan.abstract.params, plan.abstract.opt)
        where = f"init.resume, {init.resume}"
        if restored is None:
            raise UserError(f"{where} has no checkpoint; give the workdir of a run that has saved one")
    if restored is not None:
        if restored.step > experiment.train.steps:
            raise UserError(
                f"{where} holds step {restored.step} and train.steps is {experiment.train.steps}; raise it to at least "
                f"that, or give another --workdir"
            )
        log.info("weights: from step %d of %s", restored.step, where)
        step = jax.device_put(np.int32(restored.step), plan.abstract.step.sharding)
        state = TrainState(step, restored.params, restored.opt)
        provenance = (
            workdirs.read_json(workdir / workdirs.PROVENANCE) if (workdir / workdirs.PROVENANCE).exists() else None
        )
        return Begun(
            state, restored.step, restored.data, restored.meta["corpus"], restored.meta.get("teacher"), provenance
        )
    params, provenance = first_params(experiment, plan)
    return Begun(states.fresh(params, plan.optimizer, plan.abstract), 0, None, None, None, provenance)


def first_params(experiment: Experiment, plan: Plan) -> tuple[Any, Any]:
    """(weights, their provenance or None) of a run that begins."""
    init, dtype = experiment.init, experiment.train.param_dtype
    seed = derive_seed(experiment.train.seed, "weights")
    if init.adapt is not None:
        log.info("weights: adapted from init.adapt.source, %s", init.adapt.source)
        params, provenance = adaptation.adapt_into(
            init.adapt, experiment.model, mesh=plan.world, param_dtype=dtype, seed=seed
        )
        log.info("\n%s", provenance.table())
        return params, provenance.to_dict()
    if init.params is not None:
        log.info("weights: from init.params, %s", init.params)
        folder = folders.open_model(init.params)
        if folder.config != experiment.model:
            there, here = (settings.flatten(to_dict(c)) for c in (folder.config, experiment.model))
            raise UserError(
                f"init.params, {init.params}, holds another architecture than the config's (folder -> config):\n"
                f"{tree.difference(there, here)}\nChange the config's model, or adapt the weights with init.adapt"
            )
        return folders.load_model(folder, mesh=plan.world, param_dtype=dtype), folder.provenance
    log.info("weights: new, from seed %d", experiment.train.seed)
    return states.fresh_params(experiment.model, plan.abstract, key=jax.random.key(seed), param_dtype=dtype), None


def teacher(plan: Plan) -> Any:
    """The weights of a teacher that is asked in every step; None if there is none."""
    if plan.teacher is None:
        return None
    folder, abstract = plan.teacher
    log.info("teacher: %s, %s parameters", folder.path, logs.short(sum(x.size for x in jax.tree.leaves(abstract))))
    return folders.load_model(folder, mesh=plan.world)


def check_teacher(begun: Begun, plan: Plan, *, allow_change: tuple[str, ...] = ()) -> str | None:
    """The fingerprint of the teacher that is asked in every step, whose weights are read for it; None without one.

    Raises:
      UserError: it is not that of the steps before, and `allow_change` does not name distill.teacher.
    """
    if plan.teacher is None:
        return None
    folder, _ = plan.teacher
    found = teachers.fingerprint(folder)
    if begun.teacher not in (None, found):
        if not {"distill", "distill.teacher"} & set(allow_change):
            raise UserError(
                f"distill.teacher, {folder.path}, is another model than when step {begun.step} was saved (fingerprint "
                f"{begun.teacher} -> {found}); restore it, use a new --workdir, or go on with it on purpose: "
                f"--allow_change=distill.teacher"
            )
        log.warning("the teacher has changed since step %d was saved: %s -> %s", begun.step, begun.teacher, found)
    return found


def check_corpus(begun: Begun, pipeline: Pipeline, *, allow_change: tuple[str, ...] = ()) -> None:
    """Compares the text with the one that the saved positions are in.

    Raises:
      UserError: it has changed, and `allow_change` does not name data.corpus.
    """
    found = pipeline.corpus.fingerprint
    if begun.corpus in (None, found):
        return
    if "data.corpus" not in allow_change:
        raise UserError(
            f"the text or its tokens have changed since step {begun.step} was saved (fingerprint {begun.corpus} -> "
            f"{found}), so the saved positions would skip and repeat examples; restore the text, use a new --workdir, "
            f"or go on with it on purpose: --allow_change=data.corpus"
        )
    log.warning("the text has changed since step %d was saved: %s -> %s", begun.step, begun.corpus, found)


def save(
    saved: Checkpoints, experiment: Experiment, step: int, state: TrainState, *, pipeline: Pipeline, teacher: str | None
) -> None:
    """Starts to save a state with the positions of all streams, unless this step is what the run was resumed at."""
    everywhere = gather_positions(pipeline.positions, experiment.data.streams)
    if step in saved.steps():
        return
    meta = {
        "experiment": experiments.fingerprint(experiment),
        "seed": experiment.train.seed,
        "corpus": pipeline.corpus.fingerprint,
        "teacher": teacher,
    }
    saved.save(step, state.params, state.opt, data=everywhere, meta=meta)


def finish(experiment: Experiment, workdir: Path, step: int, params: Any, provenance: Any) -> None:
    """Writes the model folder and, last of all, the mark that the run is done."""
    if experiment.save.model:
        target = workdir / workdirs.MODEL
        if target.exists() and jax.process_index() == 0:  # of the same run, before it was told to go on
            shutil.rmtree(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the old model folder is gone")
        tokenizer = experiment.data.tokenizer
        folders.save_model(
            target, params, tokenizer=tokenizer.to_dict(), provenance=provenance, extra_files=tokenizer.files
        )
    if jax.process_index() == 0:
        workdirs.write_json(workdir / workdirs.DONE, {"step": step})


def task_names(experiment: Experiment, last: bool) -> list[str]:
    """The tasks of this evaluation: those in eval.final at the end only."""
    return [task.name for task in experiment.eval.tasks if last or task.name not in experiment.eval.final]


def local_rows(experiment: Experiment, world: jax.sharding.Mesh) -> range:
    """The rows of the global batch that this process holds.

    Raises:
      UserError: the rows cannot be dealt out evenly.
    """
    rows, parts = experiment.data.rows, world.shape["data"] * world.shape["fsdp"]
    each = parts * experiment.train.microbatches
    if rows % each:
        raise UserError(
            f"data.rows = {rows} cannot be dealt out to {parts} groups of devices (data x fsdp) in microbatches = "
            f"{experiment.train.microbatches}; rows must be a multiple of {each}, or the mesh have fewer groups"
        )
    held = sharding.batch_sharding(world).addressable_devices_indices_map((rows,)).values()
    spans = [index[0].indices(rows) for index in held if index is not None]
    return range(min(first for first, _, _ in spans), max(end for _, end, _ in spans))


def due(step: int, every: int, *, first: bool = False, last: bool = False) -> bool:
    """Whether something that happens every so many steps (0 = never between) happens at this one."""
    return last or (step == 0 and first) or (every > 0 and step > 0 and step % every == 0)


def gather_positions(local: Mapping[int, Sequence[int]], streams: int) -> dict[str, list[int]]:
    """The positions of all streams, each from a process that reads it, with keys as JSON has them.

    With 2 streams, of which this process reads stream 1: {1: (8, 6, 14)} and stream 0's from another process give
    {"0": [4, 0, 9], "1": [8, 6, 14]}.
    """
    width = len(next(iter(local.values())))
    table = np.full((streams, width), -1, np.int64)
    for stream, position in local.items():
        table[stream] = position
    if jax.process_count() > 1:
        # two 32-bit halves: jax has no 64-bit integers unless told to
        halves = np.asarray(multihost_utils.process_allgather(table.view(np.int32)))
        table = halves.astype(np.int32).view(np.int64).max(axis=0)
    assert (table >= 0).all(), "a stream is read by no process"
    return {str(stream): position.tolist() for stream, position in enumerate(table)}
