"""From rows to batches: what one process reads of the global batch, made ahead of time, resumed where it stood."""

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import util
from typing import Any

import numpy as np

from t5g2.core.batch import Batch, HostBatch
from t5g2.core.errors import UserError
from t5g2.core.seeds import derive_seed
from t5g2.data import chunking, packed_rows
from t5g2.data.config import DataConfig, Source
from t5g2.data.packing import START, Position
from t5g2.data.streams import (
    ConcatenatedExamples,
    Corpus,
    StreamAssignment,
    StreamGroupReader,
    open_corpus,
    pack_rows,
    source_examples,
)
from t5g2.data.workers import MultiprocessReader

__all__ = ["DataConfig", "Pipeline", "Source", "Statistics", "describe_ratio", "finite_batches", "to_global"]

log = logging.getLogger(__name__)

# of a side; above it a run is told which row lengths would fit
MUCH_PADDING = 0.2
# what the sides' padding differs by, if the lengths' ratio and no chance is the reason
OF_RATIO = 0.05


class Pipeline:
    """The batches of a run, as one process sees them.

    `next` gives the rows `rows` of the global batch; whichever processes share them out, and however far anything is
    made ahead, batch n is the same. `positions` says where the streams stand after the last batch that `next` gave:
    {stream: (int, int, int)}, for the streams that this process reads. A run goes on from the positions of all streams.

    Args:
      config: what to read.
      seed: of everything that is drawn.
      rows: the rows of the global batch that this process holds; None = all.
      positions: where to go on, keys and values as in `positions` (JSON's string keys will do); None = the start.

    Raises:
      UserError: a source is missing, empty or malformed; the positions lack a stream.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rows: range | None = None,
        positions: Mapping[Any, Sequence[int]] | None = None,
    ):
        rows = range(config.rows) if rows is None else rows
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= config.rows:
            raise UserError(f"rows {rows} are not a part of the batch; it has rows 0 to {config.rows - 1}")
        self.config = config
        self.corpus = open_corpus(config)
        for name, chunks in zip(config.names, self.corpus.chunks, strict=True):
            log.info("%s", chunking.describe(f"source {name}", chunks))
        layout = StreamAssignment(config.rows, config.streams)
        units = layout.groups_with(rows)
        streams = [stream for unit in units for stream in layout.streams_of(unit)]
        start = self.positions = _positions(positions, streams, of=config.streams)
        self.statistics = Statistics()
        first = layout.rows_of(units.start).start
        self._mine = slice(rows.start - first, rows.stop - first)
        reader = functools.partial(MultiprocessReader, workers=config.workers) if config.workers else StreamGroupReader
        read = functools.partial(reader, self.corpus, units, seed=seed, positions=start)
        self._made = _Ahead(read, config.prefetch)

    def next(self) -> HostBatch:
        """This process's rows of the next global batch.

        Raises:
          Exception: whatever went wrong while it was made.
        """
        rows = self._made.next()
        streams, positions = rows.pop("streams"), rows.pop("positions")
        # of a stream with several rows the last one counts
        self.positions = self.positions | dict(zip(streams.tolist(), map(tuple, positions.tolist()), strict=True))
        mine = {name: array[self._mine] for name, array in rows.items()}
        batch = packed_rows.host_batch(mine, streams[self._mine], positions[self._mine], self.config)
        self.statistics.add(batch)
        if self.statistics.batches == self.config.packing_rows:  # as many rows of each stream as it fills at a time
            summary = self.statistics.summary()
            told = filter(None, [f"{summary['padding']:.1%} padding", describe_ratio(summary, self.config)])
            log.info("the first %d batches: %s", self.config.packing_rows, "; ".join(told))
        return batch

    def close(self) -> None:
        """Stops what works ahead; `next` may not be called any more."""
        self._made.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Statistics:
    """What the batches held so far, in tokens of this process's rows."""

    def __init__(self):
        self.batches = self.rows = self.examples = 0
        self.encoder_tokens = self.encoder_slots = 0
        self.decoder_tokens = self.decoder_slots = 0

    def add(self, host_batch: HostBatch) -> None:
        """Counts a batch."""
        batch = host_batch.batch
        self.batches += 1
        self.rows += len(batch.targets)
        self.examples += int(np.sum(host_batch.example_ids != packed_rows.NO_EXAMPLE))
        self.decoder_tokens += int(np.count_nonzero(batch.decoder.segments))
        self.decoder_slots += batch.decoder.segments.size
        if batch.encoder is not None:
            self.encoder_tokens += int(np.count_nonzero(batch.encoder.segments))
            self.encoder_slots += batch.encoder.segments.size

    @property
    def tokens(self) -> int:
        """Encoder and decoder tokens that are no padding."""
        return self.encoder_tokens + self.decoder_tokens

    def padding(self, *, encoder_flops: float = 1.0, decoder_flops: float = 1.0) -> float:
        """The share of padding of both sides together, where a slot costs so many FLOPs; by default all cost alike."""
        slots = encoder_flops * self.encoder_slots + decoder_flops * self.decoder_slots
        return 1 - (encoder_flops * self.encoder_tokens + decoder_flops * self.decoder_tokens) / max(slots, 1)

    def summary(self) -> dict[str, float]:
        """Shares of padding (0 to 1), tokens that are no padding, and examples a row.

        mixture_ratio, row_ratio: decoder tokens to one encoder token, of the examples and of the rows; 0 without an
        encoder.
        """
        return {
            "padding": self.padding(),
            "encoder_padding": 1 - self.encoder_tokens / max(self.encoder_slots, 1) if self.encoder_slots else 0.0,
            "decoder_padding": 1 - self.decoder_tokens / max(self.decoder_slots, 1),
            "encoder_tokens": self.encoder_tokens,
            "decoder_tokens": self.decoder_tokens,
            "examples_per_row": self.examples / max(self.rows, 1),
            "mixture_ratio": self.decoder_tokens / self.encoder_tokens if self.encoder_tokens else 0.0,
            "row_ratio": self.decoder_slots / self.encoder_slots if self.encoder_slots else 0.0,
        }


def describe_ratio(summary: Mapping[str, float], config: DataConfig) -> str:
    """How the sides of the examples relate, and how those of the rows do; lengths that would fit if they waste much.

    Packing fills the sides of a row together, so the side that is too long for the mixture stays empty in part:

        1.16 decoder tokens to one encoder token in the examples, 0.52 in the rows; 56.2% of the encoder's slots and
        2.7% of the decoder's are empty: decoder_length = 448 or encoder_length = 176 would fit

    "" without an encoder. A length is only named if the longest example fits.
    """
    if not summary["mixture_ratio"]:
        return ""
    mixture, rows = summary["mixture_ratio"], summary["row_ratio"]
    line = f"{mixture:.2f} decoder tokens to one encoder token in the examples, {rows:.2f} in the rows"
    encoder, decoder = summary["encoder_padding"], summary["decoder_padding"]
    if config.packing == "none" or max(encoder, decoder) <= MUCH_PADDING or abs(encoder - decoder) < OF_RATIO:
        return line
    needs = [source.objective.lengths(config.chunk_tokens) for source in config.sources]
    fitting = {
        "decoder_length": (config.encoder_length * mixture, max(need for _, need in needs)),
        "encoder_length": (config.decoder_length / mixture, max(need for need, _ in needs)),
    }
    named = [f"{name} = {_rounded(length)}" for name, (length, need) in fitting.items() if _rounded(length) >= need]
    return (
        f"{line}; {encoder:.1%} of the encoder's slots and {decoder:.1%} of the decoder's are empty: "
        f"{' or '.join(named)} would fit"
    )


def _rounded(length: float) -> int:
    """Up, to a length that hardware likes."""
    step = 64 if length > 512 else 8
    return -(-int(length) // step) * step


def finite_batches(
    config: DataConfig,
    *,
    seed: int,
    rows: range | None = None,
    denoiser: str | None = None,
    examples: int | None = None,
) -> Iterator[HostBatch]:
    """Batches that hold every chunk of every source exactly once, in an order that depends on the seed alone.

    Example k's denoiser and spans are a pure function of k and the seed. The last batch is filled up with rows of
    padding: weights 0, example ids -1. Positions mean nothing here and are 0.

    Args:
      config: what to read; its workers and streams are not used.
      seed: of the order and of what is drawn.
      rows: the rows of the global batch that this process holds; None = all.
      denoiser: make every example with this one denoiser, which every objective must have.
      examples: stop after so many of each source, the first of its order; None = all.

    Raises:
      UserError: a source is missing, empty or malformed; no such denoiser.
    """
    corpus = open_corpus(config)
    seed = derive_seed(seed, "finite")
    parts = [source_examples(corpus, i, seed=seed, epochs=1, denoiser=denoiser) for i in range(len(config.sources))]
    rows_of_all = pack_rows(ConcatenatedExamples(parts, limit=examples), config, seed=derive_seed(seed, "rows"))
    return _batches(rows_of_all, corpus, range(config.rows) if rows is None else rows)


def _batches(rows: Iterator[packed_rows.Rows], corpus: Corpus, mine: range) -> Iterator[HostBatch]:
    config = corpus.config
    empty = packed_rows.empty_rows(config, 1)
    while taken := [row for _, row in zip(range(config.rows), rows, strict=False)]:
        chosen = [taken[r] if r < len(taken) else {name: a[0] for name, a in empty.items()} for r in mine]
        stacked = corpus.with_images({name: np.stack([row[name] for row in chosen]) for name in empty})
        zeros = np.zeros((len(mine), 3), np.int64)
        yield packed_rows.host_batch(stacked, zeros[:, 0].astype(np.int32), zeros, config)


def to_global(batch: Batch, sharding: Any, *, rows: int) -> Batch:
    """The global batch on the devices: jax.Arrays of `rows` rows, of which this process gives its own.

    Args:
      batch: NumPy arrays of this process's rows.
      sharding: a NamedSharding whose first axis is the rows.
      rows: of the global batch.
    """
    import jax

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

    return jax.tree.map(put, batch)


def _positions(given: Mapping[Any, Sequence[int]] | None, streams: Sequence[int], *, of: int) -> dict[int, Position]:
    """The positions of `streams`, of so many in all."""
    if given is None:
        return dict.fromkeys(streams, START)
    known = {int(stream): (int(a), int(b), int(c)) for stream, (a, b, c) in given.items()}
    if any(stream not in known for stream in streams) or any(stream >= of for stream in known):
        raise UserError(
            f"the saved positions are of {len(known)} streams and data.streams is {of}; a run keeps the number of "
            f"streams that it began with, because examples would be lost and repeated, so set it to what it was"
        )
    return {stream: known[stream] for stream in streams}


class _Ahead:
    """What a reader's `next` gives, made in a thread, up to `prefetch` batches ahead."""

    def __init__(self, make_reader: Callable[[], Any], prefetch: int):
        self._made: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        thread = threading.Thread(target=_work, args=(make_reader, self._made, self._stop), name="data", daemon=True)
        thread.start()
        # at the latest when the interpreter ends, and before grain looks after its workers (priority 1)
        self.close = util.Finalize(self, _stop, (self._stop, thread), exitpriority=10)

    def next(self) -> dict[str, np.ndarray]:
        """The next batch's rows; what went wrong while they were made is raised here, once more at every call."""
        if self._failed is None:
            if self._stop.is_set():
                raise RuntimeError("the pipeline is closed")
            item = self._made.get()
            if not isinstance(item, BaseException):
                return item
            self._failed = item
        raise self._failed


def _work(make_reader: Callable[[], Any], made: queue.Queue, stop: threading.Event) -> None:
    reader = None
    try:
        reader = make_reader()
        while not stop.is_set():
            _put(reader.next(), made, stop)
    except BaseException as error:  # handed to whoever asks for the next batch
        _put(error, made, stop)
    finally:
        if reader is not None:
            reader.close()


def _put(item: Any, made: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            made.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()
