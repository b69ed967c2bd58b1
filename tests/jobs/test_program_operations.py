"""Operations of small programs whose FLOPs and bytes are known."""

import jax
import jax.numpy as jnp
import pytest

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


@pytest.mark.parametrize(
    ("operands", "result", "labels", "flops"),
    [
        ("f32[32,16] f32[16,24]", "f32[32,24]", "dim_labels=bf_io->bf", 2 * 32 * 16 * 24),
        ("f32[16,32] f32[16,24]", "f32[32,24]", "dim_labels=fb_io->bf", 2 * 32 * 16 * 24),
        # two products [32, 16] x [16, 24], as a batch; over two axes [2, 16]; and an axis of the second operand alone
        ("f32[2,32,16] f32[2,16,24]", "f32[2,32,24]", "window={size=2}, dim_labels=0bf_0io->0bf", 2 * 2 * 32 * 16 * 24),
        ("f32[2,16,32] f32[2,16,24]", "f32[32,24,1]", "window={size=2}, dim_labels=0fb_0io->bf0", 2 * 32 * 2 * 16 * 24),
        ("f32[1,32,16] f32[3,16,24]", "f32[3,32,24]", "window={size=3}, dim_labels=0bf_0io->0bf", 2 * 3 * 32 * 16 * 24),
        ("f32[3,32,16] f32[1,16,24]", "f32[3,32,24]", "window={size=1}, dim_labels=0bf_0io->0bf", 2 * 3 * 32 * 16 * 24),
        # a convolution with a window of 3
        ("f32[5,32,16] f32[3,16,24]", "f32[3,32,24]", "window={size=3}, dim_labels=0bf_0io->0bf", 2 * 9 * 32 * 16 * 24),
    ],
)
def test_the_flops_of_products_that_are_written_as_convolutions(operands, result, labels, flops):
    """As XLA for TPU writes every product, here within a fusion of a fusion."""
    left, right = operands.split()
    program = operations(f"""
%inner (p: {left}, q: {right}) -> {result} {{
  %p = {left} parameter(0)
  %q = {right} parameter(1)
  ROOT %conv = {result} convolution(%p, %q), {labels}, metadata={{op_name="jit(f)/head/dot_general"}}
}}

%outer (r: {left}, s: {right}) -> {result} {{
  %r = {left} parameter(0)
  %s = {right} parameter(1)
  ROOT %part = {result} fusion(%r, %s), kind=kOutput, calls=%inner
}}

ENTRY %main (a: {left}, b: {right}) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %fused = {result} fusion(%a, %b), kind=kOutput, calls=%outer
}}
""")
    assert {name: (o.flops, o.scope) for name, o in program.items()} == {"fused": (flops, "head")}


def test_rows_that_are_looked_up_or_added_are_what_is_moved():
    """Of a table of 1000 rows: 5 rows and their indices."""
    program = operations("""
%looks_up (t: f32[1000,8], i: s32[5]) -> f32[5,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %i = s32[5]{0} parameter(1)
  ROOT %rows = f32[5,8]{1,0} gather(%t, %i), offset_dims={1}
}

ENTRY %main (table: f32[1000,8], ids: s32[5], news: f32[5,8]) -> f32[1000,8] {
  %table = f32[1000,8]{1,0} parameter(0)
  %ids = s32[5]{0} parameter(1)
  %news = f32[5,8]{1,0} parameter(2)
  %fused = f32[5,8]{1,0} fusion(%table, %ids), kind=kLoop, calls=%looks_up
  ROOT %added = f32[1000,8]{1,0} scatter(%table, %ids, %news), to_apply=%sum
}
""")
    assert {name: o.moved_bytes for name, o in program.items()} == {"fused": 2 * 160 + 20, "added": 2 * 160 + 20}
