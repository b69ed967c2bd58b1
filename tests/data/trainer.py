"""A stand-in for a trainer in the tests that kill one: reads batches with data workers until it is stopped.

`python -m tests.data.trainer FILE` writes the pids of its workers, one a line, into FILE after the first batch.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

from t5g2.data.config import DataConfig, Source
from t5g2.data.pipeline import Pipeline
from t5g2.data.sources.python_text import PythonText
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.objectives import UL2

CONFIG = DataConfig(
    sources=(Source(PythonText(), UL2()),),
    tokenizer=Bytes(),
    rows=4,
    encoder_length=128,
    decoder_length=128,
    chunk_tokens=100,
    streams=4,
    workers=2,
)


def main(path: str) -> None:
    # Ignored, and inherited as ignored, where a shell has started the tests in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), Pipeline(CONFIG, seed=0) as pipeline:
        pipeline.next()
        with open(path + ".part", "w") as file:
            file.writelines(f"{child.pid}\n" for child in multiprocessing.active_children())
        os.replace(path + ".part", path)
        while True:
            pipeline.next()
            time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
