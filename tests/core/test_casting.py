"""Weights that are not finite, or do not fit, are named wherever they are read to be written or trained."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.export_folder import export_model
from t5g2.checkpoint.import_folder import import_model
from t5g2.core import tree
from t5g2.core.casting import cast_weights
from t5g2.core.errors import UserError
from t5g2.train import adaptation
from t5g2.train.weight_origin import Adapt
from tests import tiny, weights

NAME = "layers.mlp.up.1"


def test_a_cast_rounds_and_keeps_what_fits():
    values = np.array([1.0, -3.0, 1e-9, 65504.0], np.float32)
    np.testing.assert_array_equal(cast_weights(values, "float16", name="x"), values.astype(np.float16))
    np.testing.assert_array_equal(cast_weights(values, "bfloat16", name="x"), values.astype(jnp.bfloat16))
    assert cast_weights(values, None, name="x") is values


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.array([1, np.nan, np.inf], np.float32), None, "x has 2 of 3 numbers that are NaN or infinite"),
        (np.array([-np.inf], jnp.bfloat16), "float32", "x has 1 of 1 numbers that are NaN or infinite"),
        (np.array([1, -7e4], np.float32), "float16", "x has numbers up to 70000, and the largest of float16 is 65504"),
        (
            np.array([3.4e38], np.float32),
            "bfloat16",
            r"x has numbers up to 3.4e\+38, and the largest of bfloat16 .*; take float32",
        ),
        (
            np.array([1e300]),
            "float32",
            r"the largest of float32 is 3.4.*; no dtype of weights holds them, so scale these",
        ),
        (np.array([7e4]), "float16", "the largest of float16 is 65504; take float32 or bfloat16"),
        (np.array([0, 1e-9, -1e-30, 1], np.float32), "float16", r"x has 2 of 3 numbers that become zero, because the"),
        (
            np.array([1e-60, 1e-70]),
            "float32",
            r"x has 2 of 2 numbers that become zero, because the smallest of float32 .*; no dtype of weights",
        ),
        (np.array([1, 2], np.int8), "float32", "x holds int8, not floating-point numbers; it may be quantised"),
    ],
)
def test_a_number_that_would_be_lost(values, dtype, message):
    with pytest.raises(UserError, match=message):
        cast_weights(values, dtype, name="x")


def folder_with(tmp_path, value):
    """A model folder in which one number of one weight has this value."""
    leaves = tree.leaves(weights.model(tiny.GEMMA3))
    key = next(key for key in leaves if tree.name(key) == NAME)
    array = np.array(leaves[key].read())
    array[0, 0] = value
    leaves[key] = dataclasses.replace(leaves[key], read=lambda: array)
    folders.save_leaves(tmp_path / "model", tiny.GEMMA3, leaves)
    return tmp_path / "model"


def test_every_reader_names_the_weight(tmp_path):
    broken = folder_with(tmp_path, np.nan)
    with pytest.raises(UserError, match=rf"model: {NAME} has 1 of 1,536 numbers that are NaN"):
        folders.load_model(broken)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 of 1,536 numbers that are NaN"):
        export_model(broken, tmp_path / "export")
    with pytest.raises(UserError, match=rf"the source's {NAME} has 1 of 1,536 numbers that are NaN"):
        adaptation.adapt_folder(Adapt(str(broken)), "t5gemma2", tmp_path / "adapted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_import_refuses_what_does_not_fit(tmp_path):
    export_model(folder_with(tmp_path, 7e4), tmp_path / "source")
    with pytest.raises(
        UserError, match=rf"source: {NAME} has numbers up to 70000, and the largest of float16 is 65504"
    ):
        import_model(tmp_path / "source", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    import_model(tmp_path / "source", tmp_path / "brain", dtype="bfloat16")
    with pytest.raises(UserError, match="the largest of float16"):
        folders.load_model(tmp_path / "brain", param_dtype="float16")
