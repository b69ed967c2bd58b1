"""Folders of shards: files that are written one by one, by one call or several, and a manifest that is written last.

plan.json       everything that determines the shards, and their file names; removed when the folder is finished
<manifest>      the plan, and for every shard its "file", its "bytes" and further entries of the format

A shard gets its name only when it is complete, so after an interruption the same call writes the shards that are
missing. A plan that differs from the folder's own is refused: one folder never mixes shards of two plans.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.core import files
from t5g2.core.errors import UserError

PLAN = "plan.json"

# returns the manifest's entry of a shard, from the shard's files alone; None if they are missing or damaged
DescribeShard = Callable[[int], dict[str, Any] | None]


@dataclass(frozen=True)
class ShardFormat:
    """Format of a shard folder.

    Attributes:
      manifest: file name of the manifest.
      keys: entries that a manifest must have, and their types; numbers are not negative.
      options: likewise, entries that it may have; they are not 0 or empty.
      shard: entries of each shard in a manifest.
      content: noun for the content of the shards, in messages.
      command: the command that writes such folders.
      uncompared: entries that may differ between the plan and the folder: totals, and paths that may move.
    """

    manifest: str
    keys: Mapping[str, type]
    options: Mapping[str, type]
    shard: Mapping[str, type]
    content: str
    command: str
    uncompared: frozenset[str]

    def is_finished(self, folder: Path) -> bool:
        """True if the folder has a manifest."""
        return (folder / self.manifest).is_file()

    def read(self, file: Path) -> dict[str, Any]:
        """Returns the content of a manifest, whose "shards" are entries, or of a plan, whose "shards" are file names.

        Raises:
          UserError: the file is damaged.
        """
        try:
            content = files.parse_json(file.read_bytes())
            shards, options = content["shards"], {key: kind for key, kind in self.options.items() if key in content}
            # strings in a plan, entries in a manifest
            complete = _has(content, {**self.keys, **options}) and all(content[key] for key in ("shards", *options))
            complete &= all(isinstance(x, str) if file.name == PLAN else _has(x, self.shard) for x in shards)
            complete &= np.dtype(content["dtype"]).kind in "ui"
        except (ValueError, TypeError, AttributeError, KeyError):
            content, complete = {}, False
        if not complete:
            raise UserError(
                f"{file.absolute()} is damaged: it is not the description of a folder of {self.content}; remove the "
                f"folder, and run the same `{self.command}` again"
            )
        return content

    def check_size(self, file: Path, expected: int) -> None:
        """Raises UserError if a file of a shard is missing, or its size differs from the manifest's."""
        actual = file.stat().st_size if file.is_file() else None
        if actual != expected:
            problem = "is missing" if actual is None else f"has {actual} bytes and was written with {expected}"
            raise UserError(f"{file.absolute()} {problem}; run the same `{self.command}` again")

    def damaged_record(self, file: str, record: int, problem: object) -> UserError:
        """Returns the error for a record that cannot be read."""
        return UserError(
            f"{file} is damaged at record {record} ({str(problem)[:120]}); remove it, and run the same "
            f"`{self.command}` again"
        )


def _has(node: Any, kinds: Mapping[str, type]) -> bool:
    """True if an object has entries of these types; True is no number."""
    return isinstance(node, dict) and all(
        type(node.get(key)) is kind and (kind is not int or node[key] >= 0) for key, kind in kinds.items()
    )


class ShardFolder:
    """A folder whose shards are being written; use it through `claim`.

    Args:
      path: the folder.
      kind: format of the folder.
      plan: everything that determines the shards, as plain data, with their file names under "shards".
      describe: returns the manifest's entry of a shard.
    """

    def __init__(self, path: Path, kind: ShardFormat, plan: Mapping[str, Any], describe: DescribeShard):
        self.path, self._kind, self._describe = path, kind, describe
        self._plan = json.loads(json.dumps(plan))  # as when it is read from the file: tuples become lists
        # entries of the folder's manifest, if it has been finished before
        self._recorded: Sequence[dict[str, Any]] = ()

    @contextlib.contextmanager
    def claim(self, *, exclusive: bool) -> Iterator["ShardFolder"]:
        """Makes the folder and writes its plan, or checks that the folder was made by the same plan.

        Args:
          exclusive: no other call may write into the folder at the same time; False for calls that share the shards.

        Raises:
          UserError: the folder has other content, cannot be made, or another call writes into it.
        """
        files.make_folder(self.path)
        busy = f"another `{self._kind.command}` writes into {self.path.absolute()}; wait for it, or give another folder"
        with files.locked(self.path, busy=busy) if exclusive else contextlib.nullcontext():
            self._claim()
            files.remove_abandoned(self.path, f".*{files.PART}")
            yield self

    def _claim(self) -> None:
        # the manifest comes first, because a call that was killed may have left the plan beside it
        names = (self._kind.manifest, PLAN)
        for name in names:
            if (self.path / name).is_file():
                self._check_same(self._kind.read(self.path / name))
                return
        # a call that was killed may have left partial files, which are no obstacle
        others = sorted(file.name for file in self.path.iterdir() if file.suffix != files.PART)
        if set(names) & set(others):  # another call has written it in this moment
            self._claim()
            return
        if others:
            raise UserError(
                f"{self.path.absolute()} holds {others[0]}; {self._kind.content} are written to a folder of their own"
            )
        files.write_json(self.path / PLAN, self._plan)

    def _check_same(self, existing: dict[str, Any]) -> None:
        shards = existing["shards"]
        self._recorded = [shard for shard in shards if not isinstance(shard, str)]
        existing = existing | {"shards": [shard if isinstance(shard, str) else shard["file"] for shard in shards]}
        keys = sorted((self._plan.keys() | existing.keys()) - self._kind.uncompared)
        differing = [key for key in keys if self._plan.get(key) != existing.get(key)]
        if differing:
            changes = [f"{key}: {existing.get(key)} -> {self._plan.get(key)}" for key in differing if key != "shards"]
            if "shards" in differing:
                changes.append(f"shards: {len(shards)} -> {len(self._plan['shards'])}")
            raise UserError(
                f"{self.path.absolute()} holds other {self._kind.content} (there -> now: {'; '.join(changes)}); give "
                f"another folder, or remove this one"
            )

    def missing(self, shards: Collection[int]) -> list[int]:
        """Returns those of these shards that are missing, damaged, or different from the manifest's entries."""
        return [shard for shard in shards if self._entry(shard) is None]

    def _entry(self, shard: int) -> dict[str, Any] | None:
        entry = self._describe(shard)
        return None if self._recorded and entry != self._recorded[shard] else entry

    def finish(self, written: Collection[int], *, totals: Sequence[str] = ()) -> dict[str, Any] | None:
        """Writes the manifest and returns it; returns None, and leaves the folder unfinished, if shards are missing.

        Args:
          written: the shards that this call has written, which may differ from the entries of an earlier manifest.
          totals: keys of the entries whose sums are added to the manifest.
        """
        shards = range(len(self._plan["shards"]))
        entries = [self._describe(shard) if shard in written else self._entry(shard) for shard in shards]
        complete = [entry for entry in entries if entry is not None]
        if len(complete) < len(entries):
            return None
        sums = {key: sum(entry[key] for entry in complete) for key in totals}
        # the manifest is written before the plan is removed, so the folder always has one of them
        manifest = self._plan | {"shards": complete} | sums
        files.write_json(self.path / self._kind.manifest, manifest)
        (self.path / PLAN).unlink(missing_ok=True)
        return manifest
