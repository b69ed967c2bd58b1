"""Optimizers and schedules as frozen dataclasses, and which weights are decayed or frozen, by pattern.

Patterns are those of core/tree.py (`encoder.layers.*`), matched against logical paths; of rules, the first that fits
counts. The gradients of frozen weights are zero before anything is made of them, the clipping norm included.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from t5g2.core import tree
from t5g2.core.errors import UserError


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every step, after a linear warm-up."""

    peak: float
    warmup_steps: int = 0

    def make(self, steps: int) -> optax.Schedule:
        """step (updates completed) -> learning rate."""
        del steps
        return _warmed_up(optax.constant_schedule(self.peak), self.peak, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak down to `final_fraction` of it at the last step, after a linear warm-up.

    T5Gemma 2 (arXiv 2512.14856, section 3.1): cosine with 100 warm-up steps; peak and floor are not published.
    """

    peak: float
    warmup_steps: int = 100
    final_fraction: float = 0.0

    def make(self, steps: int) -> optax.Schedule:
        """step (updates completed) -> learning rate."""
        length = _after_warmup(self.warmup_steps, steps)
        return _warmed_up(
            optax.cosine_decay_schedule(self.peak, length, self.final_fraction), self.peak, self.warmup_steps
        )


@dataclass(frozen=True)
class Linear:
    """A straight line from the peak down to `final_fraction` of it at the last step, after a linear warm-up."""

    peak: float
    warmup_steps: int = 100
    final_fraction: float = 0.0

    def make(self, steps: int) -> optax.Schedule:
        """step (updates completed) -> learning rate."""
        length = _after_warmup(self.warmup_steps, steps)
        line = optax.linear_schedule(self.peak, self.final_fraction * self.peak, length)
        return _warmed_up(line, self.peak, self.warmup_steps)


def _after_warmup(warmup_steps: int, steps: int) -> int:
    if warmup_steps >= steps:
        raise UserError(
            f"optim.schedule.warmup_steps = {warmup_steps} and train.steps = {steps}: the warm-up must end before the "
            f"run does; lower warmup_steps"
        )
    return steps - warmup_steps


def _warmed_up(schedule: optax.Schedule, peak: float, warmup_steps: int) -> optax.Schedule:
    if not warmup_steps:
        return schedule
    # step 0 already moves: its rate is peak / warmup_steps
    rise = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1 or 1)
    return optax.join_schedules([rise, schedule], [warmup_steps])


Schedule = Constant | Cosine | Linear
SCHEDULES = {"constant": Constant, "cosine": Cosine, "linear": Linear}


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101); `moment_dtype` is that of the first moment."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def scale(self) -> optax.GradientTransformation:
        """Gradients -> directions, without learning rate and decay."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.dtype(self.moment_dtype))


@dataclass(frozen=True)
class Adafactor:
    """Second moments as row and column means where both are large (arXiv 1804.04235); no first moment."""

    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128
    clip_rms: float = 1.0

    def scale(self) -> optax.GradientTransformation:
        """Gradients -> directions, without learning rate and decay."""
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor
        )
        return optax.chain(factored, optax.clip_by_block_rms(self.clip_rms))


Optimizer = AdamW | Adafactor
OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor}


@dataclass(frozen=True)
class Freeze:
    """Weights that do not change at updates `first` to `end` - 1; end None = to the end of the run."""

    pattern: str
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Optim:
    """How weights are updated.

    Attributes:
      clip_norm: global norm that gradients are scaled down to; None = no clipping.
      weight_decay: share of a weight that an update at learning rate 1 would take away.
      no_decay: patterns of weights that are not decayed; by default the scales of norms and the embedding.
      freeze: patterns of weights that do not change, with ranges of steps.
    """

    schedule: Schedule
    optimizer: Optimizer = AdamW()
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ("*.scale", "embedder.*")
    freeze: tuple[Freeze, ...] = ()


def make(optim: Optim, steps: int, abstract_params: Any) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation of a run of `steps` updates; its update takes `step` (updates completed).

    Raises:
      UserError: a pattern fits no weight.
    """
    paths = tree.paths(abstract_params)
    patterns = [*(f.pattern for f in optim.freeze)]
    for pattern in tree.unmatched(patterns, jax.tree.leaves(paths)):
        known = sorted(set(jax.tree.leaves(paths)))
        raise UserError(
            f"optim.freeze has the pattern {pattern!r}, which fits no weight; weights are: {', '.join(known)}"
        )
    decayed = jax.tree.map(lambda path: not any(tree.select(p, path) for p in optim.no_decay), paths)
    parts = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm is not None else []
    parts.append(optim.optimizer.scale())
    if optim.weight_decay:
        # optax calls a mask that is callable, so it gets a function and never a module
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=lambda _: decayed))
    parts.append(optax.scale_by_learning_rate(optim.schedule.make(steps)))
    inner = optax.chain(*parts)

    def moves(step: jax.Array, path: str) -> jax.Array:
        """Whether a weight moves at this update: the first pattern that fits, and covers the step, freezes it."""
        frozen = jnp.zeros((), bool)
        for rule in optim.freeze:
            if tree.select(rule.pattern, path):
                frozen |= (step >= rule.first) & (step < (rule.end if rule.end is not None else 2**31 - 1))
        return ~frozen

    def only_moving(updates: Any, step: jax.Array) -> Any:
        return jax.tree.map(lambda u, path: jnp.where(moves(step, path), u, jnp.zeros_like(u)), updates, paths)

    def update(gradients: Any, state: Any, params: Any = None, *, step: jax.Array):
        if not optim.freeze:
            return inner.update(gradients, state, params)
        updates, state = inner.update(only_moving(gradients, step), state, params)
        return only_moving(updates, step), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
