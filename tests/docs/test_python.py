"""The Python of README and docs: programs run in a folder of tiny models, fragments of configs are read as one is."""

import json
import runpy

import jax
import matplotlib as mpl
import pytest
from ml_collections import ConfigDict

from t5g2.train import experiment
from tests.docs import tiny_releases
from tests.docs.pages import PAGES, ROOT, blocks

BLOCKS = [block for page in PAGES for block in blocks(page) if block.language == "python" and not block.title]
# the config that a fragment changes; of other pages the quickstart's
BASES = {
    "howto/images.md": ("configs/t5gemma2_images.py", "pictures.tar"),
    "howto/unbalanced.md": ("configs/t5gemma.py", "9b-2b"),
}
# names that a fragment takes from the text around it
AROUND = {"outputs": ["a cat"], "references": [["a cat", "the cat"]]}


@pytest.fixture(scope="module")
def workplace(devices, tmp_path_factory):
    """The folder in which programs run, with the models that the tutorial ends with."""
    where = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices[:1])
        tiny_releases.make_workplace(where, patch)
        (where / "runs/quickstart/adapted").mkdir(parents=True)
        (where / "runs/quickstart/adapted/model").symlink_to(where / "models/t5gemma2-270m")
        yield where


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(workplace, page):
    """Its blocks are one program: a name of the first is there in the second."""
    names = dict(AROUND)
    for block in (block for block in BLOCKS if block.page == page):
        code = compile(block.text, block.name, "exec")
        if "config." in block.text:
            file, argument = BASES.get(str(page.relative_to(ROOT / "docs")), ("configs/quickstart.py", "scratch"))
            config = runpy.run_path(file)["get_config"](argument)
            assert isinstance(config, ConfigDict)
            exec(code, names | {"config": config})
            experiment.build(config.to_dict())
        elif "lm_eval" not in block.text:  # which takes downloads
            exec(code, names)


@pytest.mark.long
def test_the_notebook_runs(workplace, monkeypatch, tmp_path):
    """Each cell, in order and in one namespace, as a kernel does; runs are small."""
    mpl.use("agg")
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "a notebook is committed without outputs"
    tiny_releases.run_small(monkeypatch)
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
