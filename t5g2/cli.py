"""The `t5g2` command: finds the subcommand, parses its flags and runs it.

Exit status: 0 done; 2 the input is wrong (do not retry); 1 anything else (may be retried); 143 after SIGTERM and 130
after Ctrl-C, with the checkpoint saved.
"""

import importlib
import sys

from t5g2.commands.flags import HelpRequested, parse
from t5g2.core.errors import OS_ERRORS, UserError, os_error_message, unknown

# in the order of a run's life; each is t5g2/commands/<name>.py with FLAGS and run()
COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "import",
    "export",
    "adapt",
    "average",
    "check",
    "data",
    "tokenize",
    "cache-logits",
    "sweep",
    "report",
)


def run_command(name: str, argv: list[str]) -> None:
    """Parses the flags of a subcommand and runs it."""
    command = _load(name)
    command.run(parse(name, command.run, command.FLAGS, argv))


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from t5g2 import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        run_command(argv[0], argv[1:])
    except HelpRequested as help_text:
        print(help_text)
    except UserError as error:
        print(f"t5g2 {argv[0]}: {error}", file=sys.stderr)
        return 2
    # a full disk or a missing permission is the user's to mend; any other OSError is a bug, with a traceback
    except OSError as error:
        if error.errno not in OS_ERRORS:
            raise
        print(f"t5g2 {argv[0]}: {os_error_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _load(name: str):
    """Returns the module of a subcommand; `import` is a keyword of Python, so its file is import_.py."""
    module = name.replace("-", "_")
    return importlib.import_module(f"t5g2.commands.{'import_' if module == 'import' else module}")


def _overview() -> str:
    lines = [f"  t5g2 {name:12} {(_load(name).run.__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return "\n".join(
        (
            "t5g2: decoder-only in, encoder-decoder out",
            "",
            *lines,
            "",
            "t5g2 COMMAND --help shows its flags and an example.",
        )
    )
