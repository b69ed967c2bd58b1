"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "t5g2").rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]

# what each folder may import besides itself and core; a file at the top is a room of its own
MODELS, DATA = {"models"}, {"data"}
MIDDLE = {"eval", "checkpoint", "adapt", "models", "objectives", "data"}
MAY_IMPORT = {
    "core": set(),
    "models": set(),
    "objectives": set(),
    "data": set(),
    "checkpoint": MODELS,
    "adapt": MODELS,
    "eval": MODELS | DATA,
    "train": MIDDLE,
    "api": {"eval", "checkpoint"} | MODELS | DATA,
    "report": MIDDLE | {"train"},
    "sweep": {"report", "train"},
    "commands": MIDDLE | {"train", "report", "sweep", "api", "__init__"},
    "cli": {"commands", "__init__"},
    "__init__": {"api", "eval"},
    "__main__": {"cli"},
}
# two public classes may not have one name, but these mean the same thing in two formats
SAME_NAME: set[str] = set()
INTERROGATIVES = ("What", "How", "Whether", "Where", "Who", "Whom", "Whose", "Which", "Why", "When")
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


def room(module: str) -> str:
    """The room of a module of ours: its folder, or the file itself at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "t5g2").with_suffix("").parts
    names = imported(parse(path)) & {module_name(f) for f in FILES}
    # `from t5g2 import objectives` is an import of the folder; `import t5g2` one of what the package gives
    rooms = {room(name) for name in names - ({"t5g2"} if len(names) > 1 else set())} - {parts[0], "core"}
    assert rooms <= MAY_IMPORT[parts[0]], f"{parts[0]} imports {sorted(rooms - MAY_IMPORT[parts[0]])}"


def test_no_circle_of_imports():
    """Whatever file is imported first."""
    modules = {module_name(f): f for f in FILES}
    edges = {name: imported(parse(f)) & modules.keys() - {name, "t5g2"} for name, f in modules.items()}
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert not edges, f"imports go round among {sorted(edges)}"


def test_every_name_is_used_once():
    """For files, but for config.py, which are what an import names; and for public classes, which messages name."""
    files = [f.name for f in FILES if f.name not in ("__init__.py", "__main__.py", "config.py")]
    assert not {name for name in files if files.count(name) > 1}
    classes = [n.name for f in FILES for n in parse(f).body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    assert {name for name in classes if classes.count(name) > 1} <= SAME_NAME


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_docstrings_say_what_a_thing_is_or_does(path):
    """Not "What …", "Whether …": a verb or a noun."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            first = text.split()[0]
            assert first not in INTERROGATIVES, f"{path.name}, {getattr(node, 'name', 'module')}: {text[:60]}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_can_be_read(path):
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text().splitlines())
    assert name in TABLES or lines <= 450, f"{name} has {lines} lines; split it by what its parts are about"
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


@pytest.mark.parametrize("code", ["import t5g2", "from t5g2.cli import main; main(['--help'])"])
def test_the_package_and_its_help_load_nothing_heavy(code):
    code = f"import sys; {code}; print([m for m in ('jax', 'flax', 'numpy', 'grain', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
