"""Rows made by other processes, in the same order as without them, and processes that never outlive this one.

Every worker has a part of the units and hands over its rows of a batch as one element. So a batch takes one element of
each worker, whatever their number, and a batch's rows only have to be put back into the order of the units.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from t5g2.core.processes import EndWithParent
from t5g2.data.streams import Corpus, Position, StreamGroupReader


class MultiprocessReader:
    """What a UnitsReader gives, made by `workers` processes; in a thread of its own, whose signals it blocks."""

    def __init__(
        self, corpus: Corpus, groups: Sequence[int], *, seed: int, positions: Mapping[int, Position], workers: int
    ):
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads its flags, and fails where nobody parsed any
            flags.FLAGS.mark_as_parsed()
        # Ctrl-C and SIGTERM reach the whole process group, and the trainer still wants batches while it saves: what
        # starts here inherits that they are blocked. Starting the resource tracker unblocks them, so that goes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self._workers = min(workers, len(groups))
        dataset = _dataset(corpus, tuple(groups), seed=seed, positions=positions)
        self._elements = iter(
            dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1),
                worker_init_fn=EndWithParent(os.getpid()),
            )
        )
        each = corpus.config.rows // min(corpus.config.rows, corpus.config.streams)
        order = np.concatenate([np.arange(len(groups))[w :: self._workers] for w in range(self._workers)])
        self._order = (np.argsort(order)[:, None] * each + np.arange(each)).ravel()

    def next(self) -> dict[str, np.ndarray]:
        """The arrays of this batch's rows, in the order of the units."""
        parts = [next(self._elements) for _ in range(self._workers)]
        # copied: the parts lie in shared memory, which is given back when they are dropped
        return {name: np.concatenate([part[name] for part in parts])[self._order] for name in parts[0]}

    def close(self) -> None:
        """Ends the workers."""
        self._elements.close()


def _dataset(corpus: Corpus, units: tuple[int, ...], *, seed: int, positions: Mapping[int, Position]) -> Any:
    """A grain.IterDataset of UnitsReader's batches that can be cut by units.

    Defined in a function because importing grain imports jax; grain sends it to the workers by value.
    """
    import grain

    class Batches(grain.IterDataset):
        def __init__(self):
            super().__init__()
            self._units = units

        def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
            self._units = self._units[sl]

        def __iter__(self):
            return BatchesIterator(StreamGroupReader(corpus, self._units, seed=seed, positions=positions))

    class BatchesIterator(grain.DatasetIterator):
        def __init__(self, reader: StreamGroupReader):
            super().__init__()
            self._reader = reader

        def __next__(self):
            return self._reader.next()

        # where to go on is in the rows, so grain's own state is empty
        def get_state(self):
            return {}

        def set_state(self, state):
            del state

    return Batches()
