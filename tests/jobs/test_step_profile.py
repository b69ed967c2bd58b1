"""Times of operations from a trace of a small program, and the tables made of them."""

import jax
import jax.numpy as jnp

from t5g2.core.device import Roofline
from t5g2.core.scopes import scope
from t5g2.jobs.program_operations import ProgramOperation, operations
from t5g2.jobs.step_profile import Cost, StepProfile, operation_times, report

TURNS, STEPS = 3, 2


def test_a_trace_has_the_times_of_every_product(tmp_path):
    def stack(x_TD, w_LDD):
        def layer(x_TD, w_DD):
            with scope("mlp"):
                return jnp.tanh(x_TD @ w_DD), None

        with scope("encoder"):
            x_TD = jax.lax.scan(layer, x_TD, w_LDD)[0]
        with scope("head"):
            return x_TD @ w_LDD[0]

    arguments = jnp.ones((64, 128)), jnp.ones((TURNS, 128, 128))
    # on one device and simulated others, which are idle
    compiled = jax.jit(stack).lower(*arguments).compile()
    program = operations(compiled.as_text() or "")
    jax.block_until_ready(compiled(*arguments))
    with jax.profiler.trace(tmp_path):
        for _ in range(STEPS):
            jax.block_until_ready(compiled(*arguments))
    times = operation_times(next(tmp_path.rglob("*.xplane.pb")), program)
    products = {program[name].scope: measured for name, measured in times.items() if program[name].flops}
    assert {name: calls for name, (_, calls) in products.items()} == {"encoder.mlp": TURNS * STEPS, "head": STEPS}
    assert all(seconds > 0 for seconds, _ in times.values())


def test_the_tables_have_the_dearest_first_with_their_share_of_the_roofline():
    def operation(name, scope):
        return ProgramOperation(name, "fusion", scope, 0, 0)

    program = {o.name: o for o in (operation("a.1", "head"), operation("b.2", "encoder.mlp"), operation("c.3", "head"))}
    program |= {f"d.{i}": operation(f"d.{i}", "optimizer") for i in range(12)}
    gib = 2**30
    costs = [
        Cost("a.1", seconds=0.3, flops=1e9, moved_bytes=gib, calls=1),
        Cost("b.2", seconds=0.4, flops=4e9, moved_bytes=gib // 8, calls=6),
        Cost("c.3", seconds=0.2, flops=0, moved_bytes=gib // 4, calls=1),
        *(Cost(f"d.{i}", seconds=0.1 / 12, flops=0, moved_bytes=0, calls=1) for i in range(12)),
    ]
    lines = report(StepProfile(1.0, 0, costs, program), Roofline(20e9, 10 * gib, "named")).splitlines()
    assert lines[:2] == ["roofline: 20G FLOP/s, 10.0 GiB/s (named)", "operations: 1.000 s a step"]
    scopes = [line.split() for line in lines[4:7]]
    # of head, 0.1 s by bytes and 0.025 s by bytes; of the MLP, 0.2 s by FLOPs
    assert scopes == [
        ["head", "500.0", "50.0%", "1.00", "1.250", "2", "25%"],
        ["encoder.mlp", "400.0", "40.0%", "4.00", "0.125", "6", "50%"],
        ["optimizer", "100.0", "10.0%", "0.00", "0.000", "12", "0%"],
    ]
    singles = [line.split()[:2] for line in lines[9:]]
    assert singles[:4] == [["b.2", "encoder.mlp"], ["a.1", "head"], ["c.3", "head"], ["d.0", "optimizer"]]
    assert len(singles) == 10
