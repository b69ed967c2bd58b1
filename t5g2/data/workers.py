"""Rows made by worker processes, in the same order as without workers; they end when this process ends.

Every worker has a part of the groups and writes its rows of a batch into memory that it shares with this process. So a
batch is the rows of each worker, put back into the order of the groups. The memory has no name: it is gone with the
last process that uses it.
"""

import functools
import itertools
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from t5g2.core.processes import Worker
from t5g2.data import packed_rows
from t5g2.data.config import DataConfig
from t5g2.data.corpus import Corpus
from t5g2.data.packing import Position
from t5g2.data.streams import Continuation, StreamAssignment, StreamGroupReader

# batches that a worker may have made before they are taken: while one is taken, the next is written
SLOTS = 2
ALIGNMENT = 64


class ArrayLayout(NamedTuple):
    """Place of an array in a slot of the shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class MultiprocessReader:
    """A StreamGroupReader in `workers` processes. Construct it in a thread of its own: it blocks signals there."""

    def __init__(
        self,
        corpus: Corpus,
        groups: Sequence[int],
        *,
        seed: int,
        positions: Mapping[int, Position],
        continuations: Mapping[int, Continuation],
        workers: int,
    ):
        # Ctrl-C and SIGTERM reach the whole process group, and the trainer still needs batches while it saves.
        # So the signals are blocked here, which the workers inherit. Starting the resource tracker unblocks them, so
        # that comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        rows_per_group = StreamAssignment(corpus.config.rows, corpus.config.streams).rows_per_group
        open_groups = functools.partial(
            StreamGroupReader, corpus, seed=seed, positions=positions, continuations=continuations
        )
        count = min(workers, len(groups))
        # Groups are dealt out in turn: worker w has the groups w, w + workers, …
        rows = np.arange(len(groups) * rows_per_group).reshape(len(groups), rows_per_group)
        self._rows = [rows[w::count].ravel() for w in range(count)]
        self._workers = [
            _RowWorker(open_groups, tuple(groups[w::count]), corpus.config, len(self._rows[w])) for w in range(count)
        ]

    def next(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this batch's rows, in the order of the groups."""
        batch: dict[str, np.ndarray] = {}
        total = sum(map(len, self._rows))
        for rows, worker in zip(self._rows, self._workers, strict=True):
            for name, part in worker.take().items():
                batch.setdefault(name, np.empty((total, *part.shape[1:]), part.dtype))[rows] = part
            worker.release()
        return batch

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.close()


class _RowWorker:
    """A worker process and the memory that it writes its rows into, batch by batch into SLOTS slots in turn."""

    def __init__(
        self, open_groups: Callable[..., StreamGroupReader], groups: tuple[int, ...], config: DataConfig, rows: int
    ):
        layout = slot_layout(config, rows)
        last = max(layout.values(), key=lambda array: array.offset)
        slot_bytes = _aligned(last.offset + _size(last))
        # an array without a lock: its file is unlinked as soon as it is open, and passed on as a descriptor
        memory = get_context("spawn").RawArray("B", SLOTS * slot_bytes)
        self._slots = _slots(memory, slot_bytes, layout)
        self._taken = 0
        self._worker = Worker(_write_rows, open_groups, groups, memory, slot_bytes, layout)

    def take(self) -> Mapping[str, np.ndarray]:
        """Returns the next batch's rows, which are valid until `release`; an error of the worker is raised here."""
        self._worker.receive()
        return self._slots[self._taken % SLOTS]

    def release(self) -> None:
        """Gives the slot of the rows that were taken last back to the worker."""
        self._taken += 1
        self._worker.send(None)

    def close(self) -> None:
        self._worker.close()


def slot_layout(config: DataConfig, rows: int) -> dict[str, ArrayLayout]:
    """Returns the places of a StreamGroupReader's arrays of this many rows."""
    arrays = packed_rows.empty_rows(config, 0)
    if config.images is not None:
        arrays["images"] = packed_rows.no_images(config.images, 0)
    arrays |= {"streams": np.empty(0, np.int32), "positions": np.empty((0, 3), np.int64)}
    layout, offset = {}, 0
    for name, array in arrays.items():
        layout[name] = ArrayLayout(offset, (rows, *array.shape[1:]), array.dtype)
        offset += _aligned(_size(layout[name]))
    return layout


def _write_rows(
    connection: Connection,
    open_groups: Callable[..., StreamGroupReader],
    groups: tuple[int, ...],
    memory: Any,
    slot_bytes: int,
    layout: Mapping[str, ArrayLayout],
) -> None:
    """Writes batch after batch into the memory and tells of each; runs in the worker."""
    slots = _slots(memory, slot_bytes, layout)
    reader = open_groups(groups=groups)
    for number in itertools.count():
        rows = reader.next()
        if number >= SLOTS:
            connection.recv()  # the slot is free
        slot = slots[number % SLOTS]
        assert rows.keys() == slot.keys(), (sorted(rows), sorted(slot))
        for name, array in rows.items():
            assert array.shape == slot[name].shape, (name, array.shape, slot[name].shape)
            np.copyto(slot[name], array, casting="no")
        connection.send(None)


def _slots(memory: Any, slot_bytes: int, layout: Mapping[str, ArrayLayout]) -> list[dict[str, np.ndarray]]:
    """Returns for each slot its arrays, in the memory."""
    data = np.frombuffer(memory, np.uint8)
    return [
        {
            name: data[start : start + _size(array)].view(array.dtype).reshape(array.shape)
            for name, array in layout.items()
            for start in [slot * slot_bytes + array.offset]
        }
        for slot in range(SLOTS)
    ]


def _size(array: ArrayLayout) -> int:
    """Returns the bytes of an array."""
    return math.prod(array.shape) * array.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
