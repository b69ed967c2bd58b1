"""Rows made by worker processes, in the same order as without workers; they end when this process ends.

Every worker has a part of the groups and sends its rows of a batch as one element. So a batch is one element of each
worker, with its rows put back into the order of the groups.
"""

import functools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from t5g2.core.processes import EndWithParent
from t5g2.data.corpus import Corpus
from t5g2.data.packing import Position
from t5g2.data.streams import Continuation, StreamAssignment, StreamGroupReader


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
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads its flags, and fails if absl has parsed none
            flags.FLAGS.mark_as_parsed()
        # Ctrl-C and SIGTERM reach the whole process group, and the trainer still needs batches while it saves.
        # So the signals are blocked here, which the workers inherit. Starting the resource tracker unblocks them, so
        # that comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        self._workers = min(workers, len(groups))
        open_groups = functools.partial(
            StreamGroupReader, corpus, seed=seed, positions=positions, continuations=continuations
        )
        dataset = _dataset(open_groups, tuple(groups))
        self._elements = iter(
            dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1),
                worker_init_fn=EndWithParent(os.getpid()),
            )
        )
        rows_per_group = StreamAssignment(corpus.config.rows, corpus.config.streams).rows_per_group
        # grain deals the groups out in turn: worker w has the groups w, w + workers, …
        order = np.concatenate([np.arange(len(groups))[w :: self._workers] for w in range(self._workers)])
        self._order = (np.argsort(order)[:, None] * rows_per_group + np.arange(rows_per_group)).ravel()

    def next(self) -> dict[str, np.ndarray]:
        """Returns the arrays of this batch's rows, in the order of the groups."""
        parts = [next(self._elements) for _ in range(self._workers)]
        # np.concatenate copies the parts, which are in shared memory that is freed when they are dropped.
        return {name: np.concatenate([part[name] for part in parts])[self._order] for name in parts[0]}

    def close(self) -> None:
        """Ends the workers."""
        self._elements.close()


def _dataset(open_groups: Callable[..., StreamGroupReader], groups: tuple[int, ...]) -> Any:
    """Returns a grain.IterDataset of StreamGroupReader's batches that grain can split by groups.

    Defined in a function because importing grain imports jax; grain sends it to the workers by value.
    """
    import grain

    class Batches(grain.IterDataset):
        def __init__(self):
            super().__init__()
            self._groups = groups

        def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
            self._groups = self._groups[sl]

        def __iter__(self):
            return BatchesIterator(open_groups(groups=self._groups))

    class BatchesIterator(grain.DatasetIterator):
        def __init__(self, reader: StreamGroupReader):
            super().__init__()
            self._reader = reader

        def __next__(self):
            return self._reader.next()

        # The rows carry their positions, so grain's own state is empty.
        def get_state(self):
            return {}

        def set_state(self, state):
            del state

    return Batches()
