"""What a run says while it trains: its devices, the metrics of each step (fetched one step late), scores, samples."""

import binascii
import json
import logging
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5g2.core import device as device_module
from t5g2.core import logs, metrics_writer
from t5g2.core.batch import HostBatch, Sequences
from t5g2.core.device import memory_gib
from t5g2.eval import evaluation
from t5g2.eval.tasks import TaskResult
from t5g2.models import flops
from t5g2.train import experiment as experiments
from t5g2.train.experiment import Experiment
from t5g2.train.step import Metrics

log = logging.getLogger("t5g2")


def world(mesh: jax.sharding.Mesh) -> None:
    """Says on what the run computes, and with which libraries."""
    import flax
    import orbax.checkpoint

    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    log.info("%d x %s as %s, %d processes", mesh.size, ", ".join(kinds), axes, jax.process_count())
    log.info("jax %s, flax %s, orbax %s", jax.__version__, flax.__version__, orbax.checkpoint.__version__)


class Teller:
    """Records what happens at each step.

    The metrics of a step are fetched when the next one has been started, so that devices never wait for the host.

    Args:
      workdir: metrics.jsonl, events and samples go there.
      step: the step that the run starts from.
      write: False = say everything and record nothing.
    """

    def __init__(self, experiment: Experiment, workdir: Path, *, step: int, write: bool = True):
        self._experiment, self._workdir, self._write = experiment, workdir, write
        self._frozen = experiment.optim.freezes_tower(experiment.model)
        self._pending: tuple[int, Metrics, HostBatch] | None = None
        self._peak = device_module.peak()
        log.info("peak, which MFU is a share of: %s FLOP/s (%s)", logs.short(self._peak.flops_per_s), self._peak.source)
        settings = experiment.log
        self._writer = (
            metrics_writer.MetricsWriter(
                workdir,
                step=step,
                tensorboard=settings.tensorboard,
                wandb_project=settings.wandb,
                config=experiments.dump(experiment),
            )
            if write
            else None
        )
        self._rates = logs.Throughput()
        self._progress = logs.Progress(experiment.train.steps, step=step)

    def __enter__(self) -> "Teller":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def pause(self) -> AbstractContextManager:
        """The time of the block is not training time."""
        return self._rates.paused()

    def step(self, step: int, metrics: Metrics, batch: HostBatch) -> None:
        """Takes note of a step that has been started, and tells of the one before."""
        before, self._pending = self._pending, (step, metrics, batch)
        if before is not None:
            self._tell(*before)

    def flush(self) -> None:
        """Tells of the last step, and waits for it.

        Raises:
          FloatingPointError: its loss or its gradient is not finite.
        """
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._tell(*before)

    def outcome(self, step: int, outcome: TaskResult) -> None:
        """Records scores, as eval/<task>/<what>, and predictions, as samples/<step>.jsonl."""
        if outcome.scores:
            losses = {name: value for name, value in outcome.scores.items() if name.endswith("/loss")}
            log.info("step %d: %s", step, " · ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in outcome.scores.items()})
            if outcome.predictions:
                evaluation.write_predictions(self._workdir / "samples" / f"{step}.jsonl", outcome.predictions)

    def _tell(self, step: int, metrics: Metrics, batch: HostBatch) -> None:
        told = jax.tree.map(np.asarray, metrics)
        if not told.finite:
            raise FloatingPointError(
                f"step {step} is not finite: loss {float(told.total)}, norm of the gradient "
                f"{float(told.gradient_norm)}, of the updated weights {float(told.parameter_norm)}; its state is not "
                f"saved. --replay=N goes through it again from a checkpoint"
            )
        # every process computes as much
        flop = flops.of_batch(self._experiment.model, batch.batch, frozen_vision=self._frozen) * jax.process_count()
        self._rates.add(tokens=int(told.tokens), steps=1, flop=flop)
        self._progress.advance(step)
        if step % self._experiment.log.every_steps and step != self._experiment.train.steps and self._write:
            return
        rates = self._rates.read()
        loss, mfu = float(told.loss / max(told.weight, 1e-9)), rates["flop"] / self._peak.flops_per_s
        divergence = float(told.divergence / told.taught) if told.taught > 0 else None
        self._progress.report(step, loss=loss, divergence=divergence, tokens_per_s=rates["tokens"], mfu=mfu)
        if self._writer is not None:
            values = self._values(step, told, batch)
            speed = {"tokens_per_s": rates["tokens"], "steps_per_s": rates["steps"], "mfu": mfu}
            self._writer.write(step, values | speed | memory_gib())

    def _values(self, step: int, told: Metrics, batch: HostBatch) -> dict[str, float]:
        weight = max(float(told.weight), 1e-9)
        data = self._experiment.data
        values = {
            "train/loss": float(told.loss) / weight,
            "train/accuracy": float(told.correct) / weight,
            "train/gradient_norm": float(told.gradient_norm),
            "train/parameter_norm": float(told.parameter_norm),
            "train/learning_rate": float(told.learning_rate),
            "train/tokens": int(told.tokens),
            "padding/decoder": padding(batch.batch.decoder),
            "data/batch": binascii.crc32(np.ascontiguousarray(batch.example_ids).tobytes()),
        }
        if told.taught > 0:
            values["train/divergence"] = float(told.divergence / told.taught)
        if self._experiment.distill is not None or self._experiment.train.z_loss > 0:
            values["train/total"] = float(told.total)
        if batch.batch.encoder is not None:
            values["padding/encoder"] = padding(batch.batch.encoder)
        for kind, names in (("denoiser", data.denoisers), ("source", data.names)):
            sums, weights = getattr(told, f"{kind}_loss"), getattr(told, f"{kind}_weight")
            for i, name in enumerate(names):
                if weights[i] > 0 and len(names) > 1:
                    values[f"train/loss/{kind}/{name}"] = float(sums[i] / weights[i])
        return values


def padding(stream: Sequences) -> float:
    """The share of a side's slots that hold no token."""
    return 1.0 - float(np.mean(np.asarray(stream.segments) > 0))


def last_scores(workdir: Path) -> str:
    """The newest scores of a run, in a line."""
    if not (workdir / "metrics.jsonl").exists():
        return "no scores"
    rows: list[dict[str, Any]] = metrics_writer.read_metrics(workdir / "metrics.jsonl")
    scored = [{k: v for k, v in row.items() if k.startswith("eval/") and k.endswith("/loss")} for row in rows]
    scored = [row for row in scored if row]
    return json.dumps(scored[-1]) if scored else "no scores"


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name
