"""Programs on PATH that stand for the clients of clusters: each call is noted, and answered by what a test plays."""

import os
import stat
import sys
from pathlib import Path

CLIENT = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
name, arguments = {name!r}, sys.argv[1:]
with open(folder / "calls", "a") as file:
    print(name, *arguments, file=file)
exec((folder / (name + ".py")).read_text())
"""


class PlayedClients:
    """The clients of a test, in a folder that is first in PATH."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def play(self, name: str, code: str) -> None:
        """Adds a client, which runs `code` with `name`, `arguments` and `folder`."""
        program = self.folder / "bin" / name
        program.write_text(CLIENT.format(python=sys.executable, folder=str(self.folder), name=name))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (self.folder / f"{name}.py").write_text(code)

    def take_calls(self) -> list[str]:
        """Returns the calls of all clients in their order, since the last call of this."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines
