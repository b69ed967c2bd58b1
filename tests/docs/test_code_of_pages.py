"""Every command and all Python of README and docs, as they stand there, where the released models are tiny.

Run, in the order of the page, and made small after config and flags have been read: those of the two tutorials, which
are every step from a decoder-only model to report, export and evaluation; wherever they stand, adapt, import and
export, which train nothing; and one each of tokenize and cache-logits.

Resolved and not run: all others. Flags are parsed, the config file is read with its overrides and checked as `t5g2
train` does before it touches a device, task files and sweeps are loaded, and what is read exists or is written by a
command of a page. Run, they would train the same again (AGAIN; `profile` too, which tests/jobs runs), take a cluster,
the compiler of TPUs (--target), torch (--verify) or downloads (--harness). `make`, `pip` and `python` have their
targets, extras and files checked. Of a synopsis (with …, or DIR) the names of the flags are.

Python: the blocks of a page are one program, which runs, that of a tutorial after its commands; fragments of a config
are read as a config is. The cells of the notebook run in order, after the tutorial, which has trained the same.
"""

import importlib.util
import json
import re
import runpy
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib as mpl
import pytest
from ml_collections import ConfigDict

from t5g2 import cli
from t5g2.checkpoint import source_folder
from t5g2.commands import flags
from t5g2.core import paths
from t5g2.core.errors import UserError
from t5g2.jobs import task_files
from t5g2.sweep import parts, sweep_file
from t5g2.train import config_file, experiment
from tests import hub_cache
from tests.docs import tiny_releases
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, mentions

RUN_PAGES = ("docs/tutorial/first_model.md", "docs/tutorial/real_checkpoint.md")
RUN_ANYWHERE = ("adapt", "export", "import")
RUN_ONCE = {
    "tokenize": "docs/howto/data.md",
    "cache-logits": "docs/howto/distil.md",
}
# what takes torch, the compiler of TPUs, or a download
OUTSIDE = ("--verify", "--target=v5p:", "--harness")
AGAIN = ("--workdir=runs/prefix",)
READ = ("model", "source", "teacher", "vision", "input", "image", "sweep")
WRITTEN = ("--out=", "--workdir=")


@pytest.fixture(scope="module")
def workplace(devices, tmp_path_factory):
    """The folder in which commands are given."""
    where = tmp_path_factory.mktemp("workplace")
    # a machine without a network
    with pytest.MonkeyPatch.context() as patch, hub_cache.empty(where / "hub", offline=True):
        patch.setattr(jax, "devices", lambda: devices[:1])
        tiny_releases.make_workplace(where, patch)
        yield where


def resolve(command: Command) -> None:
    """Checks a command without running it."""
    words = command.words
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        missing = {word for word in words[1:] if "=" not in word} - targets
        assert not missing, f"make has no {missing}"
    elif words[0].endswith("pip"):
        check_pip(words[1:])
    elif "python" in words[0]:
        check_python(words[1:])
    elif words[0] == "launch/local.sh":
        resolve_t5g2(words[3:])
    elif words[0] == "mpirun":
        # variables of the environment, then the command, in one text for a shell
        assert words[3:5] == ["sh", "-c"], command
        resolve_t5g2([word for word in words[5].split() if not re.match(r"[A-Z_]+=", word)][1:])
    elif words[0] == "sbatch":
        script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[script]).is_file(), command
        resolve_t5g2(words[script + 1 :])
    else:
        resolve_t5g2(words[1:])


def check_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        assert not word.endswith(".txt") or (ROOT / word).is_file()
        for name in (name for names in re.findall(r"\[(.*)\]", word) for name in names.split(",")):
            assert name in extras, f"there is no extra {name}"


def check_python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        known = words[1] in ("pip", "pytest", "venv") or importlib.util.find_spec(words[1]) is not None
        assert known, f"there is no module {words[1]}"
    elif words[0] != "-c":
        assert (ROOT / words[0]).is_file()


def resolve_t5g2(words: Sequence[str]) -> None:
    name, *argv = words
    command = cli.load_command(name)
    parsed = flags.parse(name, command.run, command.FLAGS, argv)
    for flag in {*READ, "workdir"} & parsed.values.keys():
        # a workdir is written, but these read it
        if parsed.values[flag] and (flag != "workdir" or name in ("average", "report") or parsed.values.get("replay")):
            for path in paths.split(parsed.values[flag]):
                assert Path(source_folder.local(path)).exists() or is_written(path), f"nothing writes {path}"
    if parsed.values.get("config") and name != "import":
        config_file.load(parsed.config, parsed.overrides)
    if name == "evaluate" and parsed.model and parsed.tasks:
        task_files.load(parsed.paths("tasks"))
    if name == "sweep":
        for part in sweep_file.load(parsed.sweep).ordered():
            if isinstance(part, parts.Variant):
                config_file.load(part.config, part.changes(Path(parsed.workdir)))


def is_written(path: str) -> bool:
    """True if a command of a page writes the path, or a folder above it."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in WRITTEN_BY_PAGES)


def outputs(command: Command) -> list[str]:
    """Returns the folders and files that a command writes."""
    return [word.partition("=")[2].rstrip("/") for word in command.words if word.startswith(WRITTEN)]


def page_name(command: Command) -> str:
    return str(command.page.relative_to(ROOT))


def subcommand(command: Command) -> str:
    """Returns the name of a subcommand, "" of another program."""
    return command.words[1] if command.words[0] == "t5g2" else ""


def is_run(command: Command) -> bool:
    name = subcommand(command)
    if command.is_synopsis or not name or any(word.startswith((*OUTSIDE, *AGAIN)) for word in command.words):
        return False
    if name in RUN_ANYWHERE and "=runs/" not in command.text:
        return True
    return page_name(command) in RUN_PAGES or RUN_ONCE.get(name) == page_name(command)


def run(command: Command, capsys) -> None:
    """Runs a command, whose output is not there yet for the reader of the page."""
    for word in command.words:
        if word.startswith("--out=") and (path := Path(word.removeprefix("--out="))).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(command.words[1:]) == 0, f"{command}\n{capsys.readouterr().err}"


BLOCKS = [block for page in PAGES for block in blocks(page) if block.language == "python" and not block.title]
# the config that a fragment changes; of other pages the quickstart's
BASES = {
    "howto/images.md": ("configs/t5gemma2_images.py", "pictures.tar"),
    "howto/unbalanced.md": ("configs/t5gemma.py", "9b-2b"),
}
# names that a fragment takes from the text around it
AROUND = {"outputs": ["a cat"], "references": [["a cat", "the cat"]]}


COMMANDS = [command for page in PAGES for command in commands(page)]
WRITTEN_BY_PAGES = {path for command in COMMANDS for path in outputs(command)}


def test_every_subcommand_is_run():
    assert {subcommand(command) for command in COMMANDS if is_run(command)} == {*cli.COMMANDS} - {"profile"}


@pytest.mark.parametrize("name", RUN_PAGES)
def test_a_tutorial_runs(workplace, name, capsys, monkeypatch):
    tiny_releases.run_small(monkeypatch)
    for command in COMMANDS:
        if page_name(command) == name and is_run(command):
            run(command, capsys)
    run_python(ROOT / name)


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if is_run(c) and page_name(c) not in RUN_PAGES], ids=lambda c: c.text[:60]
)
def test_a_command_of_another_page_runs(workplace, command, capsys, monkeypatch):
    tiny_releases.run_small(monkeypatch)
    run(command, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_resolve(workplace, page):
    for command in commands(page):
        try:
            if command.is_synopsis:
                check_names(command.words)
            else:
                resolve(command)
        except Exception as error:
            raise AssertionError(str(command)) from error
    for text in mentions(page):
        check_names(text.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t5g2 train --config=configs/quickstart.py --workdirs=x", "unknown flag '--workdirs'"),
        ("t5g2 train --config=configs/quickstart.py --workdir=x --config.train.step=3", "unknown key 'step'"),
        ("t5g2 check --config=configs/quickstar.py", "no config file configs/quickstar.py"),
        ("t5g2 generate --model=models/nowhere --prompt=x", "nothing writes models/nowhere"),
        ("t5g2 evaluate --model=models/t5gemma2-270m --tasks=docstring --out=x", "unknown evaluation task"),
        ("launch/local.sh 2 t5g2 trane --config=configs/quickstart.py --workdir=x", "t5g2.commands.trane"),
        ("make doc", "doc"),
        ("pip install 't5g2[jax]'", "jax"),
        ("python -m tests.e2e.kil", "kil"),
    ],
)
def test_a_command_that_does_not_work_is_found(workplace, text, message):
    with pytest.raises((AssertionError, UserError, ModuleNotFoundError), match=re.escape(message)):
        resolve(Command(ROOT / "README.md", 1, text))


def test_commands_are_read_from_every_kind_of_block(tmp_path):
    page = tmp_path / "page.md"
    lines = [
        "```sh",
        "make a",
        "t5g2 b \\",
        "    --c",
        "```",
        "make d",
        "",
        "    t5g2 e \\",
        "        --f",
        "    make g",
    ]
    page.write_text("\n".join(lines))
    found = [(command.line, command.text.split()) for command in commands(page)]
    assert found == [(2, ["make", "a"]), (3, ["t5g2", "b", "--c"]), (8, ["t5g2", "e", "--f"]), (10, ["make", "g"])]


def test_a_program_that_no_test_knows_is_found(tmp_path):
    (tmp_path / "page.md").write_text("```sh\nt5g2 train\ncurl\n```\n")
    with pytest.raises(AssertionError, match="how a command of curl is checked"):
        list(commands(tmp_path / "page.md"))


def check_names(words: Sequence[str]) -> None:
    """Checks subcommand and names of flags of a synopsis."""
    if words[0] != "t5g2" or words[1] == "help":
        return
    declared = {*cli.load_command(words[1]).FLAGS, "help"}
    for name in re.findall(r"--([\w]+)", " ".join(words[2:])):
        assert name in declared, f"--{name} is no flag of t5g2 {words[1]}"


def run_python(page: Path) -> None:
    """Runs the blocks of a page as one program, in which a name of the first is there in the second."""
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


PYTHON_PAGES = sorted({block.page for block in BLOCKS} - {ROOT / name for name in RUN_PAGES})


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(workplace, page):
    run_python(page)


def test_the_notebook_runs(workplace, monkeypatch):
    """Each cell, in order and in one namespace, as a kernel does."""
    mpl.use("agg")
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "a notebook is committed without outputs"
    tiny_releases.run_small(monkeypatch)
    names: dict = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
