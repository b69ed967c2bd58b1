"""The record of a run while it trains: devices, metrics of each step (fetched one step late), scores, samples."""

import binascii
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5g2.core import device, logs, metrics_writer
from t5g2.core.batch import HostBatch
from t5g2.core.logs import log
from t5g2.core.startup import START_UP
from t5g2.eval import evaluation
from t5g2.eval.tasks import TaskResult
from t5g2.models import flops
from t5g2.train import experiment as experiments
from t5g2.train import nonfinite
from t5g2.train.experiment import Experiment
from t5g2.train.step import Metrics


def log_devices(mesh: jax.sharding.Mesh) -> None:
    """Logs the devices, the mesh, the number of processes and versions of libraries."""
    import flax
    import orbax.checkpoint

    kinds = sorted({d.device_kind for d in mesh.devices.flat})
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    log.info("%d x %s as %s, %d processes", mesh.size, ", ".join(kinds), axes, jax.process_count())
    log.info("jax %s, flax %s, orbax %s", jax.__version__, flax.__version__, orbax.checkpoint.__version__)
    START_UP.ended("devices")


class Recorder:
    """Logs and writes the metrics of a run.

    The metrics of a step are fetched when the next one has been started, so that devices never wait for the host.

    Args:
      workdir: metrics.jsonl, events and samples go there.
      step: the step that the run starts from.
      write: False = log everything and write nothing.
    """

    def __init__(self, experiment: Experiment, workdir: Path, *, step: int, write: bool = True):
        self._experiment, self._workdir, self._write = experiment, workdir, write
        model, frozen = experiment.model, experiment.optim
        self._frozen = {
            "frozen_vision": frozen.freezes_tower(model),
            "frozen_body": frozen.trains_probe_alone(model),
        }
        probe = experiment.model.probe
        self._is_regression = probe is not None and not probe.classes
        self._pending: tuple[int, Metrics, HostBatch] | None = None
        self._peak = device.peak()
        log.info("peak that MFU is a share of: %s FLOP/s (%s)", logs.short(self._peak.flops_per_s), self._peak.source)
        self._writer: metrics_writer.MetricsWriter | None = None
        if write:
            self._writer = metrics_writer.MetricsWriter(
                workdir,
                step=step,
                tensorboard=experiment.log.tensorboard,
                wandb_project=experiment.log.wandb,
                config=experiments.dump(experiment),
            )
        self._throughput = logs.Throughput()
        self._progress = logs.Progress(experiment.train.steps, step=step)
        START_UP.ended("records")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def pause(self) -> AbstractContextManager:
        """Waits for the last step and records it; returns a context whose time does not count as training time.

        Raises:
          UserError: as `flush`.
        """
        self.flush()
        return self._throughput.paused()

    def step(self, step: int, metrics: Metrics, batch: HostBatch) -> None:
        """Takes the metrics of a step that has been started, and records the step before.

        Raises:
          UserError: a loss or a gradient of the step before is not finite.
        """
        START_UP.first_step(metrics)
        # the devices work on this step while the host fetches the one before
        previous, self._pending = self._pending, (step, metrics, batch)
        if previous is not None:
            self._record(*previous)

    def flush(self) -> None:
        """Waits for the last step and records it.

        Raises:
          UserError: its loss or its gradient is not finite.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(*pending)

    def evaluation(self, step: int, result: TaskResult) -> None:
        """Records scores, as eval/<task>/<metric>, and predictions, as samples/<step>.jsonl."""
        if result.scores:
            losses = {name: value for name, value in result.scores.items() if name.endswith("/loss")}
            log.info("step %d: %s", step, " · ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in result.scores.items()})
            if result.predictions:
                evaluation.write_predictions(self._workdir / "samples" / f"{step}.jsonl", result.predictions)
        START_UP.ended("evaluation")

    def _record(self, step: int, metrics: Metrics, batch: HostBatch) -> None:
        # the one place where the host waits for the devices
        fetched = jax.device_get(metrics)
        if not fetched.finite:
            self._check_nonfinite(step, fetched, batch)
        # of this process's rows, which others may have too; all rows are about alike
        own_flops = flops.of_batch(self._experiment.model, batch.batch, **self._frozen)
        flop = own_flops * self._experiment.data.rows / len(batch.batch.targets)
        self._throughput.add(tokens=int(fetched.tokens), steps=1, flop=flop)
        self._progress.advance(step)
        if step % self._experiment.log.every_steps and step != self._experiment.train.steps and self._write:
            return
        rates = self._throughput.read()
        loss, mfu = float(fetched.loss / max(fetched.weight, 1e-9)), rates["flop"] / self._peak.flops_per_s
        # a batch may hold no token that the teacher has a distribution for
        divergence = float(fetched.divergence / fetched.teacher_weight) if fetched.teacher_weight > 0 else None
        self._progress.report(step, loss=loss, divergence=divergence, tokens_per_s=rates["tokens"], mfu=mfu)
        ids = example_ids(batch)
        if self._writer is not None:
            # flops_per_s / steps_per_s are the FLOPs of a step, which the report adds up
            speed = {"tokens_per_s": rates["tokens"], "steps_per_s": rates["steps"], "flops_per_s": rates["flop"]}
            speed["mfu"] = mfu
            # a hash of the examples: two runs that see the same batches write the same word
            digest = f"{binascii.crc32(np.ascontiguousarray(ids).tobytes()):08x}"
            self._writer.write(step, self._values(fetched) | speed | device.memory_gib(), {"data/batch": digest})

    def _check_nonfinite(self, step: int, metrics: Metrics, batch: HostBatch) -> None:
        """Logs an update that was left out because it was not finite; raises UserError if it may not be."""
        allowed = self._experiment.train.max_nonfinite_updates
        if allowed and metrics.skipped <= allowed:
            log.warning(
                "step %d is left out, number %d of at most %d, because it is not finite: %s",
                step,
                metrics.skipped,
                allowed,
                nonfinite.describe(metrics, self._experiment.model),
            )
            return
        place = "a replay writes no batch"
        if self._write:
            place = f"its batch is in {nonfinite.save_batch(self._workdir, step, batch)}"
        raise nonfinite.error(step, metrics, self._experiment.model, place, allowed=allowed)

    def _values(self, metrics: Metrics) -> dict[str, float]:
        """Returns the metrics of a step by the names under which they are written."""
        weight = max(float(metrics.weight), 1e-9)
        data = self._experiment.data
        values = {
            "train/loss": float(metrics.loss) / weight,
            **({} if self._is_regression else {"train/accuracy": float(metrics.correct) / weight}),
            "train/gradient_norm": float(metrics.gradient_norm),
            "train/parameter_norm": float(metrics.parameter_norm),
            "train/learning_rate": float(metrics.learning_rate),
            "train/tokens": int(metrics.tokens),
            **({"train/skipped_updates": int(metrics.skipped)} if metrics.skipped else {}),
            "padding/decoder": padding_share(
                int(metrics.tokens - metrics.encoder_tokens), data.rows * data.decoder_length
            ),
        }
        if metrics.teacher_weight > 0:
            values["train/divergence"] = float(metrics.divergence / metrics.teacher_weight)
        if self._experiment.distill is not None or self._experiment.train.z_loss > 0:
            values["train/total"] = float(metrics.total)
        if data.encoder_length:
            values["padding/encoder"] = padding_share(int(metrics.encoder_tokens), data.rows * data.encoder_length)
        for kind, names in (("denoiser", data.denoisers), ("source", data.names)):
            sums, weights = getattr(metrics, f"{kind}_loss"), getattr(metrics, f"{kind}_weight")
            for i, name in enumerate(names):
                # a batch may lack a denoiser; with a single one the value would repeat train/loss
                if weights[i] > 0 and len(names) > 1:
                    values[f"train/loss/{kind}/{name}"] = float(sums[i] / weights[i])
        return values


def padding_share(tokens: int, slots: int) -> float:
    """Returns the share of slots that hold no token."""
    return 1.0 - tokens / slots


def example_ids(batch: HostBatch) -> np.ndarray:
    """Returns int64[B, E], the examples of the rows of all processes, which call this together."""
    if jax.process_count() == 1:
        return batch.example_ids
    rows = np.concatenate([batch.streams[:, None], batch.positions, batch.example_ids], axis=1).astype(np.int64)
    # repeated up to the most rows that a process has
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(rows)))))
    rows = np.pad(rows, ((0, most - len(rows)), (0, 0)), mode="edge")
    # two 32-bit halves: jax has no 64-bit integers by default
    gathered = np.asarray(multihost_utils.process_allgather(np.ascontiguousarray(rows).view(np.int32), tiled=True))
    # each once, in the order of the batch: by stream and position
    rows = np.unique(gathered.astype(np.int32).view(np.int64), axis=0)
    return rows[:, 1 + batch.positions.shape[1] :]


def last_scores(workdir: Path) -> str:
    """Returns the newest held-out losses of a run as one line of JSON."""
    if not (workdir / "metrics.jsonl").exists():
        return "no scores"
    rows: list[dict[str, Any]] = metrics_writer.read_metrics(workdir / "metrics.jsonl")
    losses = [{k: v for k, v in row.items() if k.startswith("eval/") and k.endswith("/loss")} for row in rows]
    newest = next((row for row in reversed(losses) if row), None)
    return "no scores" if newest is None else json.dumps(newest)
