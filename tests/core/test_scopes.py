"""Names of operations of compiled programs, and the scopes in them."""

import pytest

from t5g2.core.scopes import dotted


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
        ("", ""),
    ],
)
def test_scopes_of_an_operation(op_name, expected):
    assert dotted(op_name) == expected
