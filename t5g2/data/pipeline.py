"""Batches of a run, prefetched and resumable; each process makes its rows of the global batch."""

import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import util
from typing import Any

import numpy as np

from t5g2.core.batch import HostBatch
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.core.seeds import derive_seed
from t5g2.data import chunking, packed_rows, row_memory
from t5g2.data.config import DataConfig
from t5g2.data.continuation import StreamPositions
from t5g2.data.corpus import Corpus, open_corpus
from t5g2.data.examples import ConcatenatedExamples, source_examples
from t5g2.data.packing import START
from t5g2.data.streams import StreamAssignment, StreamGroupReader, pack_rows
from t5g2.data.workers import MultiprocessReader

# above this share of padding on a side, the log suggests row lengths that would fit
MUCH_PADDING = 0.2
# below this difference between the sides' padding, the ratio of the row lengths is not the reason
RATIO_DIFFERENCE = 0.05


class Pipeline:
    """The batches of a run, as one process reads them.

    `next` returns this process's rows of the next global batch, which is the same for any number of processes and any
    prefetch. `positions` holds the positions after the last batch that `next` returned, {stream: (int, int, int)}, of
    the streams that this process reads. A run resumes at the positions of all streams, with the `continuations` that
    they began with.

    Args:
      config: data settings.
      seed: seed of everything that is random.
      rows: the rows of the global batch that this process holds, in order; None = all.
      positions: positions of all streams to resume at, as StreamPositions.to_plain gives them; None = the start.
      corpus: the opened sources of the config; None = they are opened here.

    Raises:
      UserError: a source is missing, empty or malformed; the rows do not fit into memory.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
        positions: Mapping[Any, Sequence[Any]] | None = None,
        corpus: Corpus | None = None,
    ):
        rows = range(config.rows) if rows is None else rows
        if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= config.rows:
            raise UserError(f"rows {rows} are not a part of the batch; it has rows 0 to {config.rows - 1}, in order")
        row_memory.check(config, rows)
        self.config = config
        self.corpus = open_corpus(config) if corpus is None else corpus
        for name, chunks in zip(config.names, self.corpus.chunks, strict=True):
            log.info("%s", chunking.describe(f"source {name}", chunks))
        # the process reads every group that fills some of its rows, and drops the rows that other processes hold
        assignment = StreamAssignment(config.rows, config.streams)
        groups = assignment.groups_with(rows)
        streams = [stream for group in groups for stream in assignment.streams_of(group)]
        start = None if positions is None else StreamPositions.from_plain(positions, streams=config.streams)
        self.positions = {stream: START if start is None else start.positions[stream] for stream in streams}
        self.continuations = {} if start is None else start.continuations
        self.statistics = Statistics()
        filled = [row for group in groups for row in assignment.rows_of(group)]
        # where all are its own they are not copied
        self._own_rows = slice(None) if filled == list(rows) else np.searchsorted(filled, rows)
        reader = functools.partial(MultiprocessReader, workers=config.workers) if config.workers else StreamGroupReader
        make_reader = functools.partial(
            reader, self.corpus, groups, seed=seed, positions=self.positions, continuations=self.continuations
        )
        self._prefetcher = _Prefetcher(make_reader, config.prefetch)

    def next(self) -> HostBatch:
        """Returns this process's rows of the next global batch.

        Raises:
          Exception: any error in the thread or the worker that made the rows.
        """
        rows = self._prefetcher.next()
        streams, positions = rows.pop("streams"), rows.pop("positions")
        # Positions advance here and not where rows are read, so that prefetched batches are not lost on a resume. If a
        # stream has several rows in the batch, the last one counts.
        self.positions = self.positions | dict(zip(streams.tolist(), map(tuple, positions.tolist()), strict=True))
        own = {name: array[self._own_rows] for name, array in rows.items()}
        batch = packed_rows.host_batch(own, streams[self._own_rows], positions[self._own_rows], self.config)
        self.statistics.add(batch)
        # by now each stream has returned about one full set of rows, so the padding is about that of the run
        if self.statistics.batches == self.config.packing_rows:
            summary = self.statistics.summary()
            parts = filter(None, [f"{summary['padding']:.1%} padding", describe_ratio(summary, self.config)])
            log.info("the first %d batches: %s", self.config.packing_rows, "; ".join(parts))
        return batch

    def close(self) -> None:
        """Stops the prefetching and the workers; `next` may not be called any more."""
        self._prefetcher.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Statistics:
    """Totals of the batches so far, in tokens of this process's rows."""

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
        """Number of encoder and decoder tokens, padding left out."""
        return self.encoder_tokens + self.decoder_tokens

    def padding(self, *, encoder_flops: float = 1.0, decoder_flops: float = 1.0) -> float:
        """Returns the share of padding on both sides, weighted by the FLOPs of a slot, by default the same for all."""
        slots = encoder_flops * self.encoder_slots + decoder_flops * self.decoder_slots
        return 1 - (encoder_flops * self.encoder_tokens + decoder_flops * self.decoder_tokens) / max(slots, 1)

    def summary(self) -> dict[str, float]:
        """Returns shares of padding (0 to 1), tokens without padding, and examples per row.

        mixture_ratio and row_ratio are decoder tokens per encoder token, in the examples and in the rows; 0 without an
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
    """Returns the ratio of the sides in the examples and in the rows, with better row lengths if there is much padding.

    Packing fills both sides of a row together, so a side that is too long for the mixture stays partly empty:

        1.16 decoder tokens to one encoder token in the examples, 0.52 in the rows; 56.2% of the encoder's slots and
        2.7% of the decoder's are empty: decoder_length = 448 or encoder_length = 176 would fit

    "" without an encoder. A length is suggested only if the longest example fits.
    """
    if not summary["mixture_ratio"]:
        return ""
    mixture, rows = summary["mixture_ratio"], summary["row_ratio"]
    line = f"{mixture:.2f} decoder tokens to one encoder token in the examples, {rows:.2f} in the rows"
    encoder, decoder = summary["encoder_padding"], summary["decoder_padding"]
    if config.packing == "none" or max(encoder, decoder) <= MUCH_PADDING or abs(encoder - decoder) < RATIO_DIFFERENCE:
        return line
    longest = [source.objective.lengths(config.chunk_tokens) for source in config.sources]
    # either length can be kept, and the other one adapted to the mixture
    fitting = {
        "decoder_length": (config.encoder_length * mixture, max(decoder for _, decoder in longest)),
        "encoder_length": (config.decoder_length / mixture, max(encoder for encoder, _ in longest)),
    }
    rounded = {name: (_rounded(length), least) for name, (length, least) in fitting.items()}
    suggestions = [f"{name} = {length}" for name, (length, least) in rounded.items() if length >= least]
    return (
        f"{line}; {encoder:.1%} of the encoder's slots and {decoder:.1%} of the decoder's are empty: "
        f"{' or '.join(suggestions)} would fit"
    )


def _rounded(length: float) -> int:
    """Returns the length rounded up to a multiple that suits the hardware: 64 above 512, else 8."""
    step = 64 if length > 512 else 8
    return -(-int(length) // step) * step


def finite_batches(
    config: DataConfig,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
    denoiser: str | None = None,
    examples: int | None = None,
) -> Iterator[HostBatch]:
    """Returns batches that hold every chunk of every source exactly once, in an order that depends on the seed alone.

    Example k's denoiser and spans are a pure function of k and the seed. The last batch is filled up with rows of
    padding: weights 0, example ids -1. Positions have no meaning here and are 0.

    Args:
      config: data settings; workers and streams are not used.
      seed: seed of the order and of the examples.
      rows: the rows of the global batch that this process holds; None = all.
      denoiser: the denoiser of all examples, which every objective must have; None = those of the config.
      examples: maximum number of examples of each source, taken from the start of its order; None = all.

    Raises:
      UserError: a source is missing, empty or malformed; there is no such denoiser.
    """
    corpus = open_corpus(config)
    seed = derive_seed(seed, "finite")
    parts = [source_examples(corpus, i, seed=seed, epochs=1, denoiser=denoiser) for i in range(len(config.sources))]
    all_rows = pack_rows(ConcatenatedExamples(parts, limit=examples), config, seed=derive_seed(seed, "rows"))
    return _batches(all_rows, corpus, range(config.rows) if rows is None else rows)


def _batches(rows: Iterator[packed_rows.Rows], corpus: Corpus, own_rows: Sequence[int]) -> Iterator[HostBatch]:
    config = corpus.config
    empty = {name: array[0] for name, array in packed_rows.empty_rows(config, 1).items()}
    # every process packs all rows and keeps its own, because packing depends on all earlier examples
    while batch := [row for _, row in zip(range(config.rows), rows, strict=False)]:
        own = [batch[r] if r < len(batch) else empty for r in own_rows]
        stacked = corpus.with_images({name: np.stack([row[name] for row in own]) for name in empty})
        zeros = np.zeros((len(own_rows), 3), np.int64)
        yield packed_rows.host_batch(stacked, zeros[:, 0].astype(np.int32), zeros, config)


def to_global(batch: Any, sharding: Any, *, rows: int) -> Any:
    """Returns the global batch on the devices: jax.Arrays of `rows` rows, of which this process provides its own.

    Args:
      batch: NumPy arrays of this process's rows in order (sharding.own_rows), or of all rows: a Batch, or another tree.
      sharding: a NamedSharding whose first axis is the rows.
      rows: number of rows of the global batch.
    """
    import jax

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))

    return jax.tree.map(put, batch)


class _Prefetcher:
    """Calls a reader's `next` in a thread, up to `prefetch` batches ahead."""

    def __init__(self, make_reader: Callable[[], Any], prefetch: int):
        self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # the reader is made in the thread too, because it may take long, and blocks signals (workers.py)
        arguments = (make_reader, self._queue, self._stop)
        thread = threading.Thread(target=_fill_queue, args=arguments, name="data", daemon=True)
        thread.start()
        # closed at the latest when the interpreter ends, but before grain ends its workers (priority 1)
        self.close = util.Finalize(self, _stop, (self._stop, thread), exitpriority=10)

    def next(self) -> dict[str, np.ndarray]:
        """Returns the next batch's rows; an error of the thread is raised here, and again at every later call."""
        if self._error is None:
            if self._stop.is_set():
                raise RuntimeError("the pipeline is closed")
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error


# functions and not methods, so that the thread holds no reference to the prefetcher, which can then be collected


def _fill_queue(make_reader: Callable[[], Any], items: queue.Queue, stop: threading.Event) -> None:
    reader = None
    try:
        reader = make_reader()
        while not stop.is_set():
            _put(reader.next(), items, stop)
    except BaseException as error:  # raised again by `next`, in the thread that needs the batch
        _put(error, items, stop)
    finally:
        if reader is not None:
            reader.close()


def _put(item: Any, items: queue.Queue, stop: threading.Event) -> None:
    """Puts an item into the queue unless the pipeline is closed while the queue is full."""
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join()
