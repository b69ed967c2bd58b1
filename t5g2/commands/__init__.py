"""The subcommands of `t5g2`, one file each, named as typed: flags and run(); `flags` declares and parses them."""

import importlib
from types import ModuleType

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
    "profile",
    "data",
    "tokenize",
    "cache-logits",
    "sweep",
    "report",
)


def load_command(name: str) -> ModuleType:
    """Returns the module of a subcommand; `import` is a keyword of Python, so its file is import_.py."""
    module = name.replace("-", "_")
    return importlib.import_module(f"t5g2.commands.{'import_' if module == 'import' else module}")
