"""Operations of small programs whose FLOPs and bytes are known."""

import jax
import jax.numpy as jnp

from t5g2.core.scopes import scope
from t5g2.jobs.program_operations import operations

T, D, F, LAYERS = 96, 128, 160, 3


def text(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    return compiled.as_text() or ""


def test_a_product_in_a_loop_has_the_flops_and_the_bytes_of_one_turn():
    def stack(x_TD, w_LDD):
        def layer(x_TD, w_DD):
            with scope("mlp"):
                return jnp.tanh(x_TD @ w_DD), None

        with scope("encoder"):
            return jax.lax.scan(layer, x_TD, w_LDD)[0]

    program = operations(text(stack, (T, D), (LAYERS, D, D)))
    (product,) = [o for o in program.values() if o.flops]
    assert (product.scope, product.flops) == ("encoder.mlp", 2 * T * D * D)
    assert product.moved_bytes == 4 * (2 * T * D + D * D)
    # of the stack of weights, one turn reads one layer
    assert max(o.moved_bytes for o in program.values()) < 4 * LAYERS * D * D


def test_both_products_of_a_gradient_are_in_the_scope_of_the_forward_pass():
    def loss(x_TD, w_DF):
        with scope("head"):
            return jnp.sum(jnp.square(x_TD @ w_DF))

    program = operations(text(jax.grad(loss, (0, 1)), (T, D), (D, F)))
    assert sum(o.flops for o in program.values() if o.scope == "head") == 3 * 2 * T * D * F
    assert sum(o.flops for o in program.values()) == 3 * 2 * T * D * F


def test_a_product_outside_of_scopes_has_none():
    (product,) = [o for o in operations(text(lambda x, y: x @ y, (T, D), (D, F))).values() if o.flops]
    assert (product.scope, product.flops, product.moved_bytes) == ("", 2 * T * D * F, 4 * (T * D + D * F + T * F))


def test_an_operation_without_a_name_belongs_to_what_it_reads_or_feeds():
    program = operations("""
ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %copy.1 = f32[8,2]{0,1} copy(%b)
  %dot.1 = f32[4,2]{1,0} dot(%a, %copy.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %add.1 = f32[4,2]{1,0} add(%dot.1, %dot.1), metadata={op_name="jit(f)/head/add"}
}
""")
    assert {o.name: (o.scope, o.flops) for o in program.values()} == {
        "copy.1": ("head", 0),
        "dot.1": ("head", 128),
        "add.1": ("head", 0),
    }
