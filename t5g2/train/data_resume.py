"""The data of a run that goes on: at its saved positions, or, if settings have changed, at each source's own count."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.checkpoint.train_states import SavedStep
from t5g2.core import files, settings
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.data.config import DataConfig
from t5g2.data.continuation import StoppedStreams, StreamPositions, continue_streams
from t5g2.data.corpus import Corpus, open_corpus, open_source
from t5g2.data.mixture import ShuffledMixture, period, source_mixture
from t5g2.data.pipeline import Pipeline
from t5g2.train import workdir as workdirs
from t5g2.train.experiment import TABLES
from t5g2.train.former_names import current_keys
from t5g2.train.plan import Plan

# settings that make other chunks of the same text, so that whoever allows a change of them allows one of the chunks
CHUNKING = ("chunk_tokens", "long_documents", "images")


class SavedData(NamedTuple):
    """The position of the data at a saved step.

    Attributes:
      positions: positions of all streams, as StreamPositions.to_plain gives them.
      corpus: fingerprint of all chunks that the positions refer to, and of cached teacher logits.
      seed: the run's seed.
      settings: the data settings that the positions refer to, as plain data; None if nothing tells them.
      chunks: fingerprint of the chunks of each source; None in steps of earlier versions.
    """

    step: int
    positions: Mapping[str, Sequence[Any]]
    corpus: str
    seed: int
    settings: Mapping[str, Any] | None
    chunks: Sequence[str] | None

    @classmethod
    def of(cls, saved: SavedStep, workdir: Path) -> "SavedData":
        """Returns the data's part of a step of the run in a workdir."""
        meta = saved.meta
        plain = meta.get("settings", {}).get("data")
        experiment = workdir / workdirs.EXPERIMENT
        if plain is None and experiment.is_file():  # the step is of a version that had the settings there only
            plain = files.read_json_object(experiment, fix="put the file back, or give another --workdir").get("data")
        return cls(saved.step, saved.data, meta["corpus"], meta["seed"], plain, meta.get("chunks"))

    @property
    def make_mixture(self) -> Any:
        """The mixture of the version that saved the step; earlier ones shuffled periods of every length."""
        return ShuffledMixture if self.chunks is None else source_mixture


def open_pipeline(
    saved: SavedData | None, plan: Plan, rows: Sequence[int], *, allow_change: tuple[str, ...] = ()
) -> Pipeline:
    """Returns the pipeline of a run: from the start, or from where a saved step left the data.

    Raises:
      UserError: the text has changed, and `allow_change` does not name data.corpus.
    """
    corpus, seed = open_corpus(plan.data), plan.experiment.train.seed
    positions = None if saved is None else resumed_positions(saved, corpus, seed=seed, allow_change=allow_change)
    return Pipeline(plan.data, seed=seed, rows=rows, positions=positions, corpus=corpus)


def resumed_positions(
    saved: SavedData, corpus: Corpus, *, seed: int, allow_change: Sequence[str] = ()
) -> Mapping[str, Sequence[Any]]:
    """Returns the positions at which the streams of a corpus go on, and logs what is repeated or lost.

    Raises:
      UserError: as in open_pipeline; or the settings of the saved positions are of no use any more.
    """
    config = corpus.config
    former = _former_config(saved, config)
    sources = _matched_sources(saved, former, corpus)
    same = _same_chunks(saved, former, corpus, sources)
    _check_corpus(saved, former, corpus, sources, same, allow_change)
    stays = _order(former) == _order(config) and sources == list(range(len(config.sources)))
    # earlier versions shuffled periods that are spread now
    stays &= type(_mixture(former, saved.make_mixture)) is type(_mixture(config, source_mixture))
    if stays and saved.seed == seed and all(same):
        return saved.positions
    streams = StreamPositions.from_plain(saved.positions, streams=former.streams)
    reopened = _former_corpus(saved, former, corpus, sources, same)
    stopped = StoppedStreams(former, reopened, saved.seed, streams, saved.make_mixture)
    if former.names == config.names:
        _log_new_order(stopped, corpus, same, new_seed=saved.seed != seed)
    if stays:
        return saved.positions
    continued = continue_streams(stopped, streams=config.streams, sources=sources, source_count=len(config.sources))
    repeated = "0 are repeated"
    if stopped.repeated_rows:
        repeated = f"those of {stopped.repeated_rows} rows are repeated, because their text is not what it was"
    harmless = not (continued.lost or stopped.repeated_rows)
    log.log(
        logging.INFO if harmless else logging.WARNING,
        "data settings have changed since step %d was saved: each source goes on from its own count (%s); %d examples "
        "are lost, %s; the %d that were in rows which had not been trained on come first",
        saved.step,
        ", ".join(f"{name} at {first}" for name, first in zip(config.names, continued.streams.first(), strict=True)),
        continued.lost,
        repeated,
        continued.waiting,
    )
    return continued.streams.to_plain()


def _former_config(saved: SavedData, config: DataConfig) -> DataConfig:
    """Returns the data settings of the saved positions, with the tokenizer and the teacher's features of now."""
    if saved.settings is None:
        return config
    # the tokenizer may have moved; whether it is the same is seen from the chunks
    plain = {**current_keys(saved.settings), "tokenizer": config.tokenizer, "teacher_features": None}
    try:
        return settings.build(DataConfig, plain, where="data", tables=TABLES)
    except UserError as error:
        raise UserError(
            f"the data settings of step {saved.step} cannot be used any more ({error}), so its positions mean nothing; "
            f"start a new run from its weights: another --workdir, with init.params"
        ) from None


def _matched_sources(saved: SavedData, former: DataConfig, corpus: Corpus) -> list[int | None]:
    """Returns for each former source its number now: by name, else by its chunks; None if it is left out."""
    names = corpus.config.names
    sources = [names.index(name) if name in names else None for name in former.names]
    for i, fingerprint in enumerate(saved.chunks or ()):
        free = [j for j in range(len(names)) if j not in sources and corpus.chunks_fingerprint(j) == fingerprint]
        if sources[i] is None and free:
            sources[i] = free[0]
    return sources


def _same_chunks(saved: SavedData, former: DataConfig, corpus: Corpus, sources: Sequence[int | None]) -> list[bool]:
    """Returns for each former source whether it has the chunks that the positions refer to."""
    if saved.chunks is not None:
        return [
            source is not None and corpus.chunks_fingerprint(source) == fingerprint
            for source, fingerprint in zip(sources, saved.chunks, strict=True)
        ]
    # one fingerprint of all sources: they are the same together, or none of them is known to be
    if saved.corpus == corpus.fingerprint:
        return [True] * len(sources)
    known = [source for source in sources if source is not None]
    together = dataclasses.replace(
        corpus, config=former, chunks=tuple(corpus.chunks[j] for j in known), teacher_logits=(None,) * len(known)
    )
    return [len(known) == len(sources) and together.fingerprint == saved.corpus] * len(sources)


def _check_corpus(
    saved: SavedData,
    former: DataConfig,
    corpus: Corpus,
    sources: Sequence[int | None],
    same: Sequence[bool],
    allow_change: Sequence[str],
) -> None:
    config = corpus.config
    changed = [
        config.names[source] for source, equal in zip(sources, same, strict=True) if source is not None and not equal
    ]
    # all chunks are the same, and the fingerprint of all is not: then it is the cached teacher logits
    logits = not changed and len(sources) == len(config.sources) and saved.corpus != corpus.fingerprint
    logits &= any(cached is not None for cached in corpus.teacher_logits)
    allowed = "data.corpus" in allow_change or any(getattr(former, n) != getattr(config, n) for n in CHUNKING)
    allowed |= logits and any(path.partition(".")[0] == "distill" for path in allow_change)
    if not (changed or logits):
        return
    what = f"of source {', '.join(changed)} " if len(config.sources) > 1 and changed else ""
    if not allowed:
        raise UserError(
            f"the text or its tokens {what}have changed since step {saved.step} was saved (fingerprint {saved.corpus} "
            f"-> {corpus.fingerprint}), so the saved positions would skip and repeat examples; restore the text, use a "
            f"new --workdir, or go on with it on purpose: --allow_change=data.corpus"
        )
    log.warning(
        "the text %shas changed since step %d was saved: %s -> %s", what, saved.step, saved.corpus, corpus.fingerprint
    )


def _former_corpus(
    saved: SavedData, former: DataConfig, corpus: Corpus, sources: Sequence[int | None], same: Sequence[bool]
) -> Corpus | None:
    """Returns the sources that the positions refer to; None if one is not what it was."""
    chunks = []
    for i, (source, equal) in enumerate(zip(sources, same, strict=True)):
        try:
            chunks.append(
                corpus.chunks[source] if equal and source is not None else open_source(former.sources[i], former)
            )
        except UserError:  # the files are gone
            return None
    reopened = Corpus(former, tuple(chunks), (None,) * len(chunks))
    if saved.chunks is None:
        intact = all(same) or reopened.fingerprint == saved.corpus
    else:
        intact = [reopened.chunks_fingerprint(i) for i in range(len(chunks))] == list(saved.chunks)
    return reopened if intact else None


def _order(config: DataConfig) -> tuple:
    """Returns the settings that decide which examples a position stands for."""
    return (
        config.streams,
        config.packing,
        1 if config.packing == "none" else config.packing_rows,
        config.encoder_length,
        config.decoder_length,
        None if config.images is None else config.images.per_row,
        period([source.weight for source in config.sources]),
        [source.objective for source in config.sources],
    )


def _mixture(config: DataConfig, make_mixture: Any) -> Any:
    return make_mixture([source.weight for source in config.sources], seed=0, stream=0)


def _log_new_order(stopped: StoppedStreams, corpus: Corpus, same: Sequence[bool], *, new_seed: bool) -> None:
    """Logs the examples that another seed or other chunks repeat and leave out: they order an epoch that has begun."""
    for name, chunks, count, equal in zip(corpus.config.names, corpus.chunks, _trained(stopped), same, strict=True):
        epoch, trained = divmod(count, len(chunks))
        if not equal:
            log.warning(
                "the chunks of source %s have changed: the text of up to %d examples that were trained on comes again "
                "in epoch %d, and up to %d of its %d chunks do not come",
                *(name, trained, epoch, trained, len(chunks)),
            )
        elif new_seed:
            log.warning(
                "train.seed has changed: about %d of the %d chunks of source %s come twice in epoch %d, as many not "
                "at all",
                *(round(trained * (len(chunks) - trained) / len(chunks)), len(chunks), name, epoch),
            )


def _trained(stopped: StoppedStreams) -> list[int]:
    """Returns for each source the number of examples that were trained on."""
    counts = [0] * len(stopped.config.sources)
    streams = stopped.config.streams
    for stream in range(streams):
        waiting, following = stopped.continuation(stream)
        for source, number in enumerate(following):
            counts[source] += (number - stream) // streams
        for source, _ in waiting:
            counts[source] -= 1
    return counts
