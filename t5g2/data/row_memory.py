"""The memory that a pipeline's rows take, compared with that of the machine before any of it is allocated."""

import math
from collections.abc import Sequence

from t5g2.core.errors import UserError
from t5g2.core.machine import machine_memory
from t5g2.data import packed_rows
from t5g2.data.config import DataConfig
from t5g2.data.streams import StreamAssignment


def check(config: DataConfig, rows: Sequence[int]) -> None:
    """Raises UserError if the rows that a process holds at a time do not fit into the machine's memory.

    Args:
      rows: the rows of the global batch that the process reads.
    """
    assignment = StreamAssignment(config.rows, config.streams)
    streams = len(assignment.groups_with(rows)) * (config.streams // assignment.groups)
    set_rows = streams * (1 if config.packing == "none" else config.packing_rows)
    packed, batch = row_bytes(config)
    # the set whose rows are returned; the next one is filled meanwhile
    needed = 2 * set_rows * packed + (config.prefetch + 2) * len(rows) * batch
    available = machine_memory()
    if needed > available:
        raise UserError(
            f"the rows of the data would take about {needed / 2**30:,.0f} GiB, and this machine has "
            f"{available / 2**30:,.0f}: {streams} streams fill {config.packing_rows} rows (packing_rows) of "
            f"{packed / 2**20:,.1f} MiB each at a time, and {config.prefetch} batches (prefetch) of {len(rows)} rows "
            f"of {batch / 2**20:,.1f} MiB are made ahead; lower streams, packing_rows, rows, prefetch or the lengths"
        )


def row_bytes(config: DataConfig) -> tuple[int, int]:
    """Returns the bytes of a row while it is packed, and of one of a batch, which has its images in it."""
    features = packed_rows.row_features(config)
    packed = 0
    for name, feature in features.items():
        size = feature.length * math.prod(feature.shape) * feature.dtype(0).itemsize
        # a segment and a position, int32 each, for every token of a side
        packed += size + (8 * feature.length if name in packed_rows.SIDES else 0)
    images = config.images
    return packed, packed + (0 if images is None else images.per_row * images.size**2 * 3)
