"""Time to compile the train step by number of layers, as ratios to 6+6: processor seconds, the best of two rounds.

The 270M-270M text model in float32, 512 + 128 tokens. At 6+6 the loop over patterns of layers runs once, and XLA makes
no loop of it.

Must (aim): 18+18 takes at most 1.4 (1.15) times as long as 6+6.
"""

import dataclasses
import time

import jax
import measure
import numpy as np

from t5g2.core import sharding
from t5g2.core.batch import Batch, Sequences
from t5g2.core.sharding import MeshShape
from t5g2.models import build
from t5g2.models.config import EncoderDecoderConfig, text_only
from t5g2.models.layers import Compute
from t5g2.models.sizes import size
from t5g2.train import optim, schedules, state, step

LAYERS = (6, 12, 18)
ENCODER, DECODER = 512, 128


def lower(layers: int):
    """Returns the lowered step of a model of this many layers on either side."""
    config = text_only(size("t5gemma2:270m-270m"))
    assert isinstance(config, EncoderDecoderConfig)
    sides = {name: dataclasses.replace(getattr(config, name), layers=layers) for name in ("encoder", "decoder")}
    config = dataclasses.replace(config, **sides)
    mesh = sharding.make(MeshShape(), jax.devices()[:1])
    optimizer = optim.make(optim.OptimConfig(schedules.Constant(1e-3)), 10, build.abstract(config))
    abstract = state.abstract(config, optimizer, mesh=mesh, param_dtype="float32")
    place = sharding.batch_sharding(mesh)

    def array(length: int):
        return jax.ShapeDtypeStruct((1, length), np.int32, sharding=place)

    encoder, decoder = (Sequences(*(array(length) for _ in range(3))) for length in (ENCODER, DECODER))
    weights = jax.ShapeDtypeStruct((1, DECODER), np.float32, sharding=place)
    batch = Batch(encoder, decoder, array(DECODER), weights, array(DECODER), array(DECODER))
    options = step.StepOptions(Compute(dtype="float32"))
    return step.lower_step(step.make_train_step(optimizer, options), abstract, batch, mesh=mesh)


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    best = {layers: (float("inf"), float("inf")) for layers in LAYERS}
    sizes = {}
    for _ in range(2):
        for layers in LAYERS:
            start = time.process_time()
            lowered = lower(layers)
            traced = time.process_time()
            compiled = lowered.compile()
            seconds = traced - start, time.process_time() - traced
            best[layers] = min(best[layers][0], seconds[0]), min(best[layers][1], seconds[1])
            sizes[layers] = len((compiled.as_text() or "").splitlines())
            jax.clear_caches()
    base = sum(best[LAYERS[0]])
    head = ("layers", "trace and compile", "seconds: trace", "compile", "lines of HLO")
    rows = [
        (f"{layers}+{layers}", f"{(trace + compile_) / base:.2f}", f"{trace:.1f}", f"{compile_:.1f}", sizes[layers])
        for layers, (trace, compile_) in best.items()
    ]
    measure.write("compile", "Time to compile the train step, by layers", measure.table(head, rows))


if __name__ == "__main__":
    main()
