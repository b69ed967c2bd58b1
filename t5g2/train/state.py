"""The state of a training run; new weights are computed on the devices that hold them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5g2.core import sharding
from t5g2.models import build
from t5g2.models.config import ModelConfig
from t5g2.train.optim import Updater


class TrainState(NamedTuple):
    """The state that an update changes.

    Attributes:
      step: int32[], updates completed.
      params: the model.
      opt: the optimizer's state.
      skipped: int32[], updates that were left out because they were not finite.
    """

    step: jax.Array
    params: Any
    opt: Any
    skipped: Any = np.int32(0)


def abstract(
    config: ModelConfig, optimizer: Updater, *, mesh: Mesh, param_dtype: str, zero1: bool = False
) -> TrainState:
    """Returns the state as shapes, each with its sharding on the mesh.

    Args:
      zero1: the optimizer's state is cut over the mesh's data axis too.
    """
    params = build.abstract(config, jnp.dtype(param_dtype))
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    state = jax.eval_shape(lambda params: TrainState(zero(), params, optimizer.init(params), zero()), params)
    step: Any = sharding.replicated(mesh)
    # moments are sharded like their weights, or more, so that an update moves none of them between devices
    opt = sharding.shardings_like(state.opt, params, mesh, zero1=zero1)
    on_mesh = TrainState(step, sharding.shardings(params, mesh), opt, step)
    return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), state, on_mesh)


def shardings(abstract: Any) -> Any:
    """Returns the sharding of each leaf of an abstract state."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def fresh_params(config: ModelConfig, abstract: TrainState, *, key: jax.Array, param_dtype: str) -> Any:
    """Returns new weights, each computed on the devices that hold it."""
    make = lambda key: build.make(config, key=key, param_dtype=jnp.dtype(param_dtype))  # noqa: E731
    # with out_shardings, no device holds the whole of a sharded leaf
    return jax.jit(make, out_shardings=shardings(abstract.params))(key)


def fresh(params: Any, optimizer: Updater, abstract: TrainState) -> TrainState:
    """Returns the state before the first update; the weights are reused, not copied."""
    opt = jax.jit(optimizer.init, out_shardings=shardings(abstract.opt))(params)
    step, skipped = (jax.device_put(np.int32(0), x.sharding) for x in (abstract.step, abstract.skipped))
    return TrainState(step, params, opt, skipped)
