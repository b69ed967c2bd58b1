"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "t5g2").rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]
# read, not only run
OTHERS = [
    f for folder in ("tests", "configs", "experiments", "bench", "docs") for f in sorted((ROOT / folder).rglob("*.py"))
]
DRAWING = runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))

INTERROGATIVES = {"What", "How", "Whether", "Where", "Who", "Whom", "Whose", "Which", "Why", "When"}
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
            # a relative one would not be seen by the rules below
            assert not node.level, f"line {node.lineno}: a relative import; write the module in full"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """The room of a module of ours: its folder, or the file itself at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rooms_imported(path: Path) -> set[str]:
    names = imported(parse(path)) & {module_name(f) for f in FILES}
    # `from t5g2 import objectives` is an import of the folder; `import t5g2` one of what the package gives
    return {room(name) for name in names - ({"t5g2"} if len(names) > 1 else set())}


def test_imports_are_those_of_the_table():
    """docs/imports.toml, all of them and no other; rows() of the drawing fails if they do not go one way."""
    table = DRAWING["read"]()
    actual = {name: set() for name in table}
    for path in FILES:
        here = path.relative_to(ROOT / "t5g2").with_suffix("").parts[0]
        actual[here] |= rooms_imported(path) - {here}
    assert actual == table
    assert DRAWING["rows"](table)[0] == ["core"]


def test_relative_imports_are_refused():
    with pytest.raises(AssertionError, match="line 2: a relative import; write the module in full"):
        imported(ast.parse("import ast\nfrom ..train import loop"))


def test_the_picture_and_the_map_are_those_of_the_table():
    table = DRAWING["read"]()
    assert (ROOT / "docs" / "imports.svg").read_text() == DRAWING["draw"](table), "run `make imports`"
    rows = [set(row) - {"__init__", "__main__"} for row in reversed(DRAWING["rows"](table))]
    map_lines = (ast.get_docstring(parse(ROOT / "t5g2" / "__init__.py")) or "").split("\n\n")[2].splitlines()
    assert [set(line.strip().split(", ")) for line in map_lines] == [row for row in rows if row]


def test_a_circle_of_folders_and_an_arrow_behind_a_box_are_not_drawn():
    table = DRAWING["read"]()
    with pytest.raises(ValueError, match=r"imports go in a circle among .*'core', "):
        DRAWING["draw"](table | {"core": {"models"}})
    with pytest.raises(ValueError, match=r"the arrow from report to adapt runs behind \['train'\]"):
        DRAWING["draw"]({"adapt": set(), "core": set(), "train": {"core"}, "report": {"adapt", "train"}})


def test_no_circle_of_imports():
    """Whatever file is imported first."""
    modules = {module_name(f): f for f in FILES}
    edges = {name: imported(parse(f)) & modules.keys() - {name, "t5g2"} for name, f in modules.items()}
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert not edges, f"imports go round among {sorted(edges)}"


def test_the_reading_order_of_train_has_all_of_its_files():
    order = ast.get_docstring(parse(ROOT / "t5g2" / "train" / "__init__.py")) or ""
    assert {f.stem for f in FILES if f.parent.name == "train"} - {"__init__"} <= set(re.findall(r"\w+", order))


def defined(tree: ast.Module) -> set[str]:
    """Classes and type aliases at the top of a file, without the underscore of private ones."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in (n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names |= {t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"_?[A-Z][a-z]\w*", t.id)}
    return {name.lstrip("_") for name in names}


def test_every_name_is_used_once():
    """For files, but for config.py, which are what an import names; and for classes, which messages name, and types."""
    files = [f.name for f in FILES if f.name not in ("__init__.py", "__main__.py", "config.py")]
    assert not {name for name in files if files.count(name) > 1}
    names = [name for f in FILES for name in defined(parse(f))]
    assert not {name for name in names if names.count(name) > 1}


def test_names_that_count():
    code = "class _A1: ...\nBb = int | str\nCc: type = int\nDD = 1\nE = 2\n_f = 3"
    assert defined(ast.parse(code)) == {"A1", "Bb", "Cc"}


def opens_with_a_question(docstring: str) -> bool:
    first = re.search(r"\w+", docstring)
    return first is not None and first[0].capitalize() in INTERROGATIVES


@pytest.mark.parametrize("path", [*FILES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_what_a_thing_is_or_does(path):
    """Not "What …", "Whether …": a verb or a noun."""
    for node in ast.walk(parse(path)):
        documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
        if documented and (text := ast.get_docstring(node)):
            assert not opens_with_a_question(text), f"{path.name}, {getattr(node, 'name', 'module')}: {text[:60]}"


def test_questions_in_any_spelling():
    for docstring in ("What it is", "what it is", "What's in it", "“How” it is", "Where, and when"):
        assert opens_with_a_question(docstring)
    for docstring in ("Whatever is left", "", "Returns what is left", "The whole"):
        assert not opens_with_a_question(docstring)


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
