"""The architecture of an official Flax tree is the released size with its shapes."""

import dataclasses

import numpy as np
import pytest

from t5g2.checkpoint import flax_tree
from t5g2.checkpoint.import_folder import open_foreign
from t5g2.checkpoint.tensor import Tensor
from t5g2.core.errors import UserError
from t5g2.models.config import TextConfig
from t5g2.models.sizes import SIZES
from tests import hub_cache, tiny
from tests.checkpoint.foreign_folders import (
    nested,
    save_flax,
    shapes_of,
)


def test_an_official_tree_of_no_released_size(tmp_path):
    path = save_flax(tmp_path / "tree", nested(tiny.GEMMA3))
    message = (
        r"official Flax Gemma: embedder/input_embedding \[97, 32\]; 3 layers\) is none of the released sizes; "
        r"name its architecture: config = a size's name, such as gemma3:1b, or a file like model.json"
    )
    with pytest.raises(UserError, match=message):
        open_foreign(path)
    with pytest.raises(UserError, match=r"according to the chosen config, are not those of official Flax Gemma"):
        open_foreign(path, tiny.GEMMA2)
    with pytest.raises(UserError, match=rf"^hf://owner/tree@{hub_cache.COMMIT} \(official Flax Gemma: "):
        open_foreign(hub_cache.add(tmp_path / "hub", "owner/tree", path))


OFFICIAL = [name for name in SIZES if not name.startswith(("t5gemma2", "medsiglip"))]


@pytest.mark.parametrize("name", OFFICIAL)
def test_released_sizes_are_known_by_their_shapes(tmp_path, monkeypatch, name):
    """With 262144 rows, where transformers has 64 more for the image token, which has no row then."""
    config = SIZES[name]
    if isinstance(config, TextConfig):
        config = dataclasses.replace(config, vocab_size=min(config.vocab_size, 262_144))
    tensors = {
        name: Tensor(shape, np.dtype("float32"), lambda: pytest.fail("read"))
        for name, shape in shapes_of(config).items()
    }
    monkeypatch.setattr(flax_tree, "is_flax", lambda _: True)
    monkeypatch.setattr(flax_tree, "read", lambda _: tensors)
    assert open_foreign(tmp_path).config == config
