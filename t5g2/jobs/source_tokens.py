"""Tokens of a config's sources, as shards that a run opens without reading the text."""

import json
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from t5g2.core import logs, settings
from t5g2.core.errors import UserError, unknown
from t5g2.data import chunking
from t5g2.data.config import DataConfig
from t5g2.data.shards import token_shards
from t5g2.data.sources import text_source
from t5g2.data.sources.image_text import ImageText


def tokenize_sources(
    config: DataConfig,
    out: str | PathLike,
    *,
    names: Sequence[str] = (),
    shards: int = 16,
    workers: int = 1,
    runner: Callable | None = None,
) -> None:
    """Writes the tokens of sources, a folder each, and prints the override with which a run reads them.

    Args:
      config: the sources and the tokenizer.
      out: parent of the sources' folders.
      names: names of sources; none = all that are text.
      shards: number of files per source.
      workers: number of processes.
      runner: runs the job elsewhere, instead of processes here; see data/shards/token_shards.py.

    Raises:
      UserError: a source does not exist, or has images; a text is missing or malformed; a folder holds other tokens.
    """
    logs.setup()
    for name in names:
        if name not in config.names:
            raise unknown("source", name, config.names)
    for number, (name, source) in enumerate(zip(config.names, config.sources, strict=True)):
        if (names and name not in names) or isinstance(source.text, token_shards.Tokens):
            continue
        if isinstance(source.text, ImageText):
            # by name it is a mistake; among all sources it is left as it is
            if names:
                raise UserError(f"source {name!r} has images and cannot be kept as tokens; a run reads it as it is")
            continue
        documents = source.text.open(on_bad_record=config.on_bad_record)
        # before hours of work: too many bad records are an error now
        chunking.check_skipped(source.text, documents, config.max_skipped)
        description = settings.dump(source.text, tables=(text_source.BY_NAME,))
        job = token_shards.Job(documents, config.tokenizer, description, min(shards, len(documents)))
        start = time.perf_counter()
        manifest = token_shards.write(job, Path(out) / name, workers=workers, run=runner)
        seconds = time.perf_counter() - start
        override = json.dumps({"kind": "tokens", "path": str(Path(out) / name)})
        skipped = f"{documents.skipped:,} bad records left out, " if documents.skipped else ""
        print(
            f"{name}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
            f"{len(manifest['shards'])} shards, {skipped}{seconds:.0f} s\n"
            f"  --config.data.sources.{number}.text='{override}'"
        )
