"""Shards of tokens written by an Apache Beam pipeline, on one machine or many.

The files are the same as without Beam, byte for byte, because each shard depends only on the text, the tokenizer and
the shard's number. Every worker needs t5g2, and the same files at the same paths: the text, the tokenizer, and the
output folder. Complete shards are kept, so after an interruption the same command continues.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.data.shards.token_shards import ShardRunner


def pipeline(options: str) -> ShardRunner:
    """Returns the `run` of token_shards.write that writes shards by a pipeline with these command-line options.

    Raises:
      UserError: apache-beam is not installed, or an option or a runner is unknown.
    """
    beam, arguments = require("apache_beam", "beam"), shlex.split(options)
    parsed = beam.options.pipeline_options.PipelineOptions(arguments)
    # options and runner are checked here, so that an error appears before a text is opened
    unknown = [name for name in arguments if name.startswith("--") and not _is_known(parsed, name)]
    if unknown:
        raise UserError(
            f"--beam={options!r}: Apache Beam knows no option {unknown[0]}; give those of its runner, such as "
            f"--runner=DirectRunner --direct_num_workers=4"
        )

    try:
        runner = beam.runners.create_runner(
            parsed.view_as(beam.options.pipeline_options.StandardOptions).runner or "DirectRunner"
        )
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--beam={options!r}: {error}") from None

    def run(write_shard: Callable[[int], None], shards: Sequence[int]) -> None:
        with beam.Pipeline(runner, options=parsed) as root:
            # without a Reshuffle, one worker gets all shards
            _ = root | beam.Create(list(shards)) | beam.Reshuffle() | beam.Map(write_shard)

    return run


def _is_known(options: Any, argument: str) -> bool:
    """True if some part of Beam reads the option."""
    name = argument.removeprefix("--").partition("=")[0]
    return name in options.get_all_options() or name.removeprefix("no_") in options.get_all_options()
