"""Writes docs/commands.md: every subcommand of `t5g2`, with its flags, their defaults and ranges.

    python docs/write_commands.py        (or: make commands)

All of it is read from what the parser reads, FLAGS and the docstring of run() of each file in t5g2/commands; a test
fails where the page is not up to date.
"""

import inspect
import re
from pathlib import Path

from t5g2 import cli
from t5g2.commands.flags import Flag

FILE = Path(__file__).with_name("commands.md")
INTRODUCTION = """# Commands

Written by `make commands` from the flags that the parser reads; do not edit. `t5g2 COMMAND --help`, or
`t5g2 help COMMAND`, prints the same. `python -m t5g2` is the same command.

Flags are written `--name=VALUE`. A command that takes `--config` takes `--config.a.b=VALUE` too, for every setting of
[settings.md](settings.md), as often as you like; `t5g2 adapt` takes `--target.a.b=VALUE` likewise. A value that begins
with `~/` is a path in your home.

| exit status | means |
|---|---|
| 0 | done |
| 2 | the input is wrong: the message says what was given, what is allowed and what to do. To try again is of no use |
| 1 | anything else; to try again may help |
| 143, 130 | stopped by SIGTERM or by Ctrl-C; of a run the checkpoint is saved |
| 141 | the reader of the output is gone, as `head` when it has read enough |
"""
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def text() -> str:
    """Returns the contents of docs/commands.md."""
    return "\n".join([INTRODUCTION, *(_section(name) for name in cli.COMMANDS)])


def _section(name: str) -> str:
    command = cli.load_command(name)
    paragraphs = (inspect.getdoc(command.run) or "").split("\n\n")
    examples = [line.partition(": ")[2] for part in paragraphs for line in part.splitlines() if _is_example(line)]
    prose = "\n\n".join(part for part in paragraphs if not _is_example(part))
    rows = ["| flag | value | default | meaning |", "|---|---|---|---|"]
    rows += [_row(flag, declared) for flag, declared in command.FLAGS.items()]
    block = "\n".join(["```sh", *examples, "```"])
    return f"## t5g2 {name}\n\n{_literal(prose)}\n\n{block}\n\n" + "\n".join(rows) + "\n"


def _is_example(line: str) -> bool:
    return line.startswith("Example: ")


def _row(name: str, flag: Flag) -> str:
    kind = flag.kind or (str if flag.default is None else type(flag.default))
    bounds = {"at least": flag.least, "at most": flag.most}
    limits = [f"{word} {limit}" for word, limit in bounds.items() if limit is not None]
    default = "required" if flag.required else "" if flag.default in (None, "") else f"`{_default(flag.default)}`"
    cells = (f"`--{name}`", ", ".join([TYPES[kind], *limits]), default, _literal(flag.help))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: object) -> str:
    # as it is typed
    return str(value).lower() if isinstance(value, bool) else str(value)


def _literal(words: str) -> str:
    """Returns a text of --help as Markdown shows it: placeholders and file names as code, no tag of HTML."""
    words = re.sub(r"(?<![`\w])(--[a-z_]+(?:\.\w+)*(?:=[^\s,;)]+)?|<[a-z_]+>(?:/[\w<>./]+)?|<[a-z_]+>)", r"`\1`", words)
    return re.sub(r"\{(\"[^}]*)\}", r"`{\1}`", words)


if __name__ == "__main__":
    FILE.write_text(text())
