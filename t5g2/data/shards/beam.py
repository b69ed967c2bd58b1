"""Shards of tokens made by an Apache Beam pipeline, on one machine or many: those that are made without one,
byte for byte, because each follows from the text, the tokenizer and its number alone.

Every worker needs t5g2 with the same files at the same paths: the text, the tokenizer, and the folder that is written.
What is there already is left alone, so an interrupted pipeline is started again by the same command.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from t5g2.core.errors import UserError
from t5g2.core.optional import require
from t5g2.data.shards.token_shards import ShardRunner


def pipeline(options: str) -> ShardRunner:
    """How t5g2.data.shards.token_shards.write makes shards by a pipeline with these options, as a command line has them.

    Raises:
      UserError: apache-beam is not installed, or does not know an option or a runner.
    """
    beam, arguments = require("apache_beam", "beam"), shlex.split(options)
    parsed = beam.options.pipeline_options.PipelineOptions(arguments)
    # asked for once, so that what is wrong is said before a text is opened
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

    def run(make: Callable[[int], None], shards: Sequence[int]) -> None:
        with beam.Pipeline(runner, options=parsed) as one:
            # Reshuffle, because otherwise one worker gets them all
            _ = one | beam.Create(list(shards)) | beam.Reshuffle() | beam.Map(make)

    return run


def _is_known(options: Any, argument: str) -> bool:
    """Whether an option is one that some part of Beam reads."""
    name = argument.removeprefix("--").partition("=")[0]
    return name in options.get_all_options() or name.removeprefix("no_") in options.get_all_options()
