"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "t5g2").rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]

# a folder may import from the ones named; files at the top (cli, sweep, report) may import everything
MAY_IMPORT = {
    "core": {"core"},
    "models": {"models", "core"},
    "objectives": {"objectives", "core"},
    "data": {"data", "core"},
    "checkpoint": {"checkpoint", "models", "core"},
    "adapt": {"adapt", "models", "core"},
    "eval": {"eval", "models", "data", "core"},
    "train": {"train", "eval", "checkpoint", "adapt", "models", "objectives", "data", "core"},
    "api": {"api", "eval", "checkpoint", "models", "data", "core"},
}
# what data workers import: it must start fast and without a device
NUMPY_ONLY = ("t5g2.core.batch", "t5g2.core.errors", "t5g2.core.settings", "t5g2.objectives", "t5g2.data")
TABLES = {"t5g2/models/sizes.py"}
LOOP = {"t5g2/train/loop.py"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST) -> set[str]:
    """Every module that the code imports, at any depth; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "t5g2").parts
    ours = {name.split(".")[1] for name in imported(parse(path)) if name.startswith("t5g2.")}
    if len(parts) > 1:
        folders = {name for name in ours if (ROOT / "t5g2" / name).is_dir()}
        assert folders <= MAY_IMPORT[parts[0]], f"{parts[0]} imports {sorted(folders - MAY_IMPORT[parts[0]])}"
        assert not (ours - {parts[0]}) & {"cli", "sweep", "report", "api"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_can_be_read(path):
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text().splitlines())
    assert name in TABLES or lines <= 500, f"{name} has {lines} lines; split it by what its parts are about"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (90 if name in LOOP else 60), f"{name}: {node.name} has {length} lines"
            arguments = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            total = len(arguments) + len(node.args.kwonlyargs)
            assert total <= 7, f"{name}: {node.name} takes {total} arguments; pass a value that holds them"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_public_interfaces(path):
    names = imported(parse(path))
    assert not [n for n in names if n.startswith("jax._src")]
    source = path.read_text()
    for banned in ("nnx.jit", "nnx.scan", "nnx.Optimizer", "config.get(", "except Exception:", "except:"):
        assert banned not in source, banned
    assert not {"utils", "common", "helpers", "misc"} & set(path.with_suffix("").parts)


def test_data_workers_import_neither_jax_nor_flax():
    modules = [m for m in map(module_name, FILES) if m.startswith(NUMPY_ONLY)]
    assert "t5g2.data.pipeline" in modules
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "print([m for m in ('jax', 'flax', 'tensorflow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, t5g2; print([m for m in ('jax', 'flax', 'numpy', 'grain', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
