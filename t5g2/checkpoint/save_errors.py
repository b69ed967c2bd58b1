"""Errors of the disk while a step is saved, told once and with a remedy."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from t5g2.core.distributed import any_process
from t5g2.core.errors import UserError, free_bytes, os_error_message, storage_problem

# messages of Orbax that say nothing new: at each save without OCDBT that there is nothing to merge; and, from each
# thread, the error that waiting for the save raises
REPETITIONS = (
    "Skipping merge of OCDBT",
    "_SignalingThread.run() raised",
    "Save Finalize thread",
    "Handler Commit operations",
    "exception was never retrieved",
)


class SaveErrors:
    """Turns errors of the disk in a folder of checkpoints into messages.

    Attributes:
      failed: True once a save has failed; Orbax would raise the same error again at every later call.
    """

    def __init__(self, directory: epath.Path):
        self.failed = False
        self._directory = directory
        self._step, self._bytes = -1, 0
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_is_news)

    def check_room(self, step: int, size: int) -> None:
        """Raises UserError if the disk has less room than a step of this many bytes needs; all processes call this.

        Checked before Orbax writes, because on a full disk it prints pages for each leaf. A bucket has no end.
        """
        self._step, self._bytes = step, size
        is_local = os.path.exists(self._directory)
        if any_process([is_local and free_bytes(self._directory) < size])[0]:
            raise self._error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory)))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raises a UserError for an error of the disk: the step, the file, the room and the last good step."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            problem = storage_problem(error)
            if problem is None or self._step < 0:
                raise
            raise self._error(problem) from None

    def _error(self, problem: OSError) -> UserError:
        self.failed = True
        complete = [int(path.name) for path in self._directory.glob("[0-9]*") if path.name.isdigit()]
        last = f"Step {max(complete)} is the last that is saved" if complete else "No step is saved"
        return UserError(
            f"step {self._step} cannot be saved, which needs {self._bytes / 2**20:.1f} MiB: "
            f"{os_error_message(problem)}. {last}; the same command goes on from there"
        )


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in str(record.msg) for words in REPETITIONS)
