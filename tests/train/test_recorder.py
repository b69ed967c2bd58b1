"""Records of a process that has a part of the batch."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5g2.core.batch import HostBatch
from t5g2.train import recorder


def test_processes_with_unequal_rows_record_the_examples_of_all_in_the_order_of_the_batch(monkeypatch):
    """Rows 0, 1, 2 of streams 0, 0, 1, of which one process has 0 and 2, and the other all three."""
    streams, positions = np.array([0, 0, 1], np.int32), np.array([[0, 1, 1], [0, 2, 2], [4, 1, 9]], np.int64)
    ids = np.array([[5, -1], [7, 2**40], [3, 1]], np.int64)
    parts, together, own = {}, threading.Barrier(2, timeout=10), threading.local()

    def gather(array, tiled=False):
        parts[own.process] = np.asarray(array)
        together.wait()
        gathered = (np.concatenate if tiled else np.stack)([parts[0], parts[1]])
        together.wait()
        return gathered

    def process(number, rows):
        own.process = number
        return recorder.example_ids(HostBatch(None, ids[rows], streams[rows], positions[rows]))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with ThreadPoolExecutor(2) as both:
        for recorded in both.map(process, (0, 1), ([0, 2], [0, 1, 2])):
            np.testing.assert_array_equal(recorded, ids)
