"""The time of a run's step by named scope and by operation, measured on the real step and a real batch.

The times are of the profiler of jax, operation by operation. On a CPU several operations may run at once, and one may
wait for another's threads, so the sum of their times may be above that of the step; shares are of the sum.

Roofline: the time that an operation's FLOPs take at the peak of matrix products, or its bytes at the peak of memory,
whichever is more. The share of the roofline is that time by the measured one: 100 % is as fast as the device allows;
more is possible where bytes stay in a cache.
"""

import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from t5g2.core import device, logs, sharding
from t5g2.core.device import GIB, Roofline
from t5g2.core.logs import log
from t5g2.core.seeds import derive_seed
from t5g2.data.pipeline import Pipeline, to_global
from t5g2.jobs.program_operations import ProgramOperation, operations
from t5g2.train import flops_budget
from t5g2.train import plan as plans
from t5g2.train import state as states
from t5g2.train.experiment import Experiment
from t5g2.train.plan import Plan

ROWS = 10  # of a table


@dataclass(frozen=True)
class Cost:
    """Time, FLOPs and bytes of one step, of an operation or of all operations of a scope, on one device."""

    name: str
    seconds: float
    flops: float
    moved_bytes: float
    calls: float

    def least_seconds(self, roofline: Roofline) -> float:
        """Returns the seconds that the device needs at least."""
        return max(self.flops / roofline.flops_per_s, self.moved_bytes / roofline.bytes_per_s)


class StepProfile(NamedTuple):
    """Time, memory and costs of a run's step.

    Attributes:
      seconds: of a step, by the clock.
      memory_bytes: of the compiled step: its arguments, and what exists during a step only.
      costs: of each operation.
      program: the operations by name.
    """

    seconds: float
    memory_bytes: int
    costs: list[Cost]
    program: Mapping[str, ProgramOperation]

    def by_scope(self) -> dict[str, list[Cost]]:
        """Returns the costs of the operations of each named scope."""
        scopes: dict[str, list[Cost]] = {}
        for cost in self.costs:
            scopes.setdefault(self.program[cost.name].scope or "(no scope)", []).append(cost)
        return scopes


def profile(experiment: Experiment, *, steps: int) -> None:
    """Prints the dearest scopes and operations of a step.

    Raises:
      UserError: the mesh does not fit the devices, or the data cannot be read.
    """
    logs.setup(process=jax.process_index())
    measured = measure(experiment, steps=steps)
    log.info("%d steps of %.3f s", steps, measured.seconds)
    print(report(measured, device.roofline()))


def measure(experiment: Experiment, *, steps: int) -> StepProfile:
    """Returns the costs of a step with new weights and a real batch, means of so many.

    Raises:
      UserError: as `profile`.
    """
    # else a program that only differs in the names of its operations could come from the cache, with its former names
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    mesh = sharding.make(experiment.mesh)
    experiment = flops_budget.resolved(experiment)
    rows = plans.local_rows(experiment, mesh)
    with jax.set_mesh(mesh):
        plan = plans.make(experiment, mesh)
        with Pipeline(plan.data, seed=experiment.train.seed, rows=rows) as pipeline:
            batch = to_global(pipeline.next().batch, sharding.batch_sharding(mesh), rows=experiment.data.rows)
        step = plan.compile()
        program = operations(step.as_text())
        with tempfile.TemporaryDirectory() as folder:
            seconds = _run(plan, step, batch, steps, Path(folder))
            times = operation_times(next(Path(folder).rglob("*.xplane.pb")), program)
    costs = [_cost(program[name], *measured, steps) for name, measured in times.items()]
    memory = device.program_memory(step, mesh.devices.flat[0].platform)
    return StepProfile(seconds / steps, memory.total, costs, program)


def _run(plan: Plan, step: Any, batch: Any, steps: int, folder: Path) -> float:
    """Runs a step that is not measured, and then `steps` with a trace in the folder; returns their seconds."""
    experiment = plan.experiment
    key = jax.random.key(derive_seed(experiment.train.seed, "weights"))
    params = states.fresh_params(experiment.model, plan.abstract, key=key, param_dtype=experiment.train.param_dtype)
    state, teacher = states.fresh(params, plan.optimizer, plan.abstract), plans.load_teacher(plan)
    state, metrics = jax.block_until_ready(step(state, batch, teacher))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would fill the trace
    with jax.profiler.trace(folder, profiler_options=options):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch, teacher)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start


def operation_times(trace: Path, program: Mapping[str, ProgramOperation]) -> dict[str, tuple[float, int]]:
    """Returns {operation: (seconds, executions)} on the first device, from the profiler's file."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    # accelerators have a plane each; the threads of a CPU are lines of the host's
    own = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    chosen = own[:1] or [plane for plane in planes if plane.name == "/host:CPU"]
    times: dict[str, tuple[float, int]] = {}
    for plane in chosen:
        for line in plane.lines:
            for event in _first_device(line.events):
                # on TPU the name is the operation's whole text
                name = event.name.removeprefix("%").split(" ")[0]
                if name in program:
                    seconds, calls = times.get(name, (0.0, 0))
                    times[name] = seconds + event.duration_ns / 1e9, calls + 1
    return times


def _first_device(events: Iterable[Any]) -> Iterator[Any]:
    """Yields the events of operations; of simulated devices, which share the host's threads, those of the first."""
    with warnings.catch_warnings():
        # of the type of `stats` in the library itself
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in events:
            stats = dict(event.stats)
            if stats.get("device_ordinal", 0) == 0:
                yield event


def _cost(operation: ProgramOperation, seconds: float, calls: int, steps: int) -> Cost:
    """Returns the cost of an operation in one step."""
    each = calls / steps
    return Cost(operation.name, seconds / steps, operation.flops * each, operation.moved_bytes * each, each)


def report(measured: StepProfile, roofline: Roofline) -> str:
    """Returns the tables of the dearest scopes and operations."""
    costs, program, scopes = measured.costs, measured.program, measured.by_scope()
    total = sum(cost.seconds for cost in costs)
    peaks = f"{logs.short(roofline.flops_per_s)} FLOP/s, {roofline.bytes_per_s / GIB:,.1f} GiB/s"
    lines = [f"roofline: {peaks} ({roofline.source})", f"operations: {total:.3f} s a step", "", _header("scope")]
    sums = [
        (name, total_of(name, group), sum(c.least_seconds(roofline) for c in group)) for name, group in scopes.items()
    ]
    lines += [_row(name, cost, ideal, total) for name, cost, ideal in _dearest(sums)]
    lines += ["", _header("operation")]
    single = [(f"{c.name}  {program[c.name].scope}", c, c.least_seconds(roofline)) for c in costs]
    lines += [_row(name, cost, ideal, total) for name, cost, ideal in _dearest(single)]
    return "\n".join(lines)


def total_of(name: str, costs: list[Cost]) -> Cost:
    """Returns the cost of several operations together, under a name."""
    sums = (sum(getattr(cost, field) for cost in costs) for field in ("seconds", "flops", "moved_bytes", "calls"))
    return Cost(name, *sums)


def _dearest(rows: list[tuple[str, Cost, float]]) -> list[tuple[str, Cost, float]]:
    return sorted(rows, key=lambda row: -row[1].seconds)[:ROWS]


def _header(first: str) -> str:
    return f"{first:60}{'ms':>10}{'time':>8}{'GFLOP':>10}{'GiB':>9}{'calls':>8}{'roofline':>10}"


def _row(name: str, cost: Cost, ideal: float, total: float) -> str:
    return (
        f"{name:60}{1e3 * cost.seconds:10.1f}{cost.seconds / max(total, 1e-9):8.1%}{cost.flops / 1e9:10.2f}"
        f"{cost.moved_bytes / GIB:9.3f}{cost.calls:8.0f}{ideal / max(cost.seconds, 1e-12):10.0%}"
    )
