"""Names of operations of compiled programs, and the scopes in them."""

import jax
import jax.numpy as jnp
import pytest

from t5g2.core.scopes import dotted, in_loop, scope


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(train_step)/jvp(encoder)/while/body/closed_call/local/attention/dot_general", "encoder.local.attention"),
        (
            "jit(f)/transpose(jvp(decoder))/while/body/checkpoint/rematted_computation/global/mlp/mul",
            "decoder.global.mlp",
        ),
        # the backward pass of a part within a part that repeats the names of the forward pass
        ("jit(f)/transpose(jvp(decoder))/jvp(decoder)/local/merged/add", "decoder.local.merged"),
        # a function, a primitive and a text that are called like a part are none
        ("jit(head)/jit(embed)/vision_tower/add", ""),
        ("jit(train_step)/optimizer/jit(_where)/select_n", "optimizer"),
        # two operations that XLA has combined
        ("jit(f)/(jvp(decoder)/embed/gather:jvp(encoder)/embed/gather)", "decoder.embed"),
        ("", ""),
    ],
)
def test_scopes_of_an_operation(op_name, expected):
    assert dotted(op_name) == expected


def test_what_is_moved_out_of_a_loop_keeps_the_scopes_around_it():
    """A mask that is the same in every turn: differentiation computes it once, before the loop."""

    def total(x_T, limit):
        def turn(x_T, _):
            with scope("mlp"):
                return jnp.where(jnp.arange(8.0) * limit > 3.0, jnp.sin(x_T), 0.0), None

        with scope("encoder"), scope("local"):
            return jnp.sum(jax.lax.scan(in_loop(turn), x_T, length=3)[0])

    program = jax.make_jaxpr(jax.grad(total))(jnp.ones(8), 2.0)
    moved = [e for e in program.eqns if e.primitive.name == "gt"]
    assert [dotted(f"jit(f)/{e.source_info.name_stack}/gt") for e in moved] == ["encoder.local.mlp"]
