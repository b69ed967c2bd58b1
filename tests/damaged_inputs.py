"""Readers of files that users bring or runs leave, given damaged ones.

    python -m tests.damaged_inputs --inputs=1000 --seed=0     # prints a table by reader
    python -m tests.damaged_inputs --readers=parquet,tokenizer.json

Whatever the damage is, a reader returns a value or raises a UserError: no other error, no gigabytes, no hang. Readers
whose files have checksums return the value of the undamaged file or nothing. Damages are bits and bytes (flipped,
overwritten, cut off, cut out, repeated, zeros) and, of JSON, values (dropped, exchanged, of another type, huge, NaN,
nested deeply, no UTF-8).
"""

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t5g2.checkpoint import export_folder, folder, generation_ids, import_folder
from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import files, metrics_writer
from t5g2.core.errors import UserError
from t5g2.data import image_processor, images
from t5g2.data.shards import array_record, token_shards
from t5g2.data.shards.token_shards import Tokens
from t5g2.data.sources.array_records import ArrayRecord
from t5g2.data.sources.dialogues import Chat
from t5g2.data.sources.image_text import ImageJsonl, ImageParquet, WebDataset
from t5g2.data.sources.text_files import Jsonl, Parquet, TextFiles
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import HuggingFace, SentencePiece
from t5g2.jobs import prompt_file
from t5g2.report import contents
from t5g2.train import config_file, workdir
from tests import tiny, weights
from tests.checkpoint.test_train_states import DATA, META, abstract, make
from tests.data import tokenizer_files
from tests.e2e.conftest import CONFIG

SECONDS, EXTRA_BYTES, LONGEST_MESSAGE = 20, 3 * 2**30, 100_000
DEEP = "[" * 5000 + "]" * 5000
VALUES = [None, True, False, 0, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "\0", "\ud800", "../..", [], {}]
VALUES += [[[]], [None], {"a": {}}, float("nan"), float("inf")]


@dataclass(frozen=True)
class Reader:
    """A reader of a file in a folder.

    Attributes:
      file: pattern of the file that is damaged, in the folder.
      make: writes the undamaged folder, which must not exist.
      read: returns what the folder holds, as a value that can be compared.
      has_checksum: damage that is not found is a fault.
      until: damages are in the first bytes alone; None = anywhere. A function of the content.
    """

    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    has_checksum: bool = False
    until: Callable[[bytes], int] = len


@dataclass
class Outcomes:
    """Counts of outcomes of a reader, and the faults with the damages that caused them."""

    reader: str
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


# ---- damages ----
def damaged(data: bytes, draw: random.Random, *, is_json: bool) -> bytes:
    """Returns damaged content."""
    if is_json and draw.random() < 0.6:
        return damaged_json(data, draw)
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        damage_bytes(content, draw)
    return bytes(content)


def damage_bytes(content: bytearray, draw: random.Random) -> None:
    """Changes bytes in place."""
    at = draw.randrange(len(content) + 1)
    size = draw.choice((1, 2, 8, 40, len(content)))
    change = draw.randrange(8)
    if change == 0 and at < len(content):
        content[at] ^= 1 << draw.randrange(8)
    elif change == 1:
        del content[at:]
    elif change == 2:
        content[at : at + size] = draw.randbytes(min(size, 64))
    elif change == 3:
        del content[at : at + size]
    elif change == 4:
        content[at:at] = draw.choice((b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"{", b"[", b'"', b"9" * 40, b"-", b"\n"))
    elif change == 5:
        content[at:at] = content[at : at + size]
    elif change == 6:
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif draw.random() < 0.1:
        content[:] = draw.choice((b"", b"\n", b"{}", b"[]", b"null", b"NaN", DEEP.encode(), bytes(64)))


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """Returns JSON, or lines of it, with some values changed."""
    lines = data.split(b"\n")
    whole = not all(_is_json(line) for line in lines if line)
    number = draw.choice([i for i, line in enumerate(lines) if line] or [0])
    value = json.loads(data if whole else lines[number])
    for _ in range(draw.choice((1, 1, 2))):
        value = changed(value, draw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5).replace('"DEEP"', DEEP)
    encoded = text.encode("utf-8", "surrogatepass")
    return encoded if whole else b"\n".join([*lines[:number], encoded, *lines[number + 1 :]])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def changed(value: Any, draw: random.Random) -> Any:
    """Returns a copy with one of its values changed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or draw.random() < 0.03:
        return draw.choice([*VALUES, "DEEP"])
    node, key = draw.choice(places)
    change, (other, other_key) = draw.randrange(6), draw.choice(places)
    if change == 0:
        del node[key]
    elif change == 1:
        node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(node[key])
    elif change == 2 and isinstance(node[key], int | float):
        node[key] = draw.choice((-node[key], node[key] * 2, node[key] + 1, str(node[key]), [node[key]]))
    elif change == 3 and isinstance(node, dict):
        node[draw.choice(("", "x", "é", "kind", "\0"))] = node[key]
    else:
        node[key] = draw.choice([*VALUES, "DEEP"])
    return value


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    ):
        yield node, key
        yield from _places(value)


# ---- folders ----
def hugging_face(path: Path) -> None:
    """A Gemma 3 with images, in shards, with everything that a folder has."""
    own = path.with_name(path.name + "-own")
    model_folder(own)
    export_folder.export_model(own, path, shard_bytes=40_000)
    shutil.rmtree(own)


def model_folder(path: Path) -> None:
    folder.save_model(path, weights.model(tiny.GEMMA3_IMAGES))


def dual_encoder(path: Path) -> None:
    own = path.with_name(path.name + "-own")
    folder.save_model(own, weights.model(tiny.SIGLIP))
    export_folder.export_model(own, path)
    shutil.rmtree(own)


def one_file(name: str, content: bytes) -> Callable[[Path], None]:
    """Makes a folder of one file."""

    def make_folder(path: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(content)

    return make_folder


def tokenizer_folder(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make_folder(path: Path) -> None:
        path.mkdir()
        write(path)

    return make_folder


def token_folder(path: Path) -> None:
    texts = path.with_name("texts-of-tokens")
    shutil.rmtree(texts, ignore_errors=True)
    one_file("a.txt", b"")(texts)
    for i in range(6):
        (texts / f"{i}.txt").write_text(f"{i} cats sat on {i} mats. " * (i + 1))
    documents = TextFiles(str(texts)).open()
    token_shards.write(token_shards.Job(documents, Bytes(), {"kind": "text"}, 2), path)


def records(path: Path) -> None:
    path.mkdir()
    array_record.write_records(path / "a.array_record", [b'{"text": "a cat"}', b'{"text": "two dogs"}'] * 4)


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    pq.write_table(pa.table({"text": [f"{i} cats" for i in range(20)]}), path / "a.parquet")


def image_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    rows = [{"bytes": image_file("PNG"), "path": None}] * 3
    pq.write_table(pa.table({"text": ["a <start_of_image> cat"] * 3, "images": rows}), path / "a.parquet")


def archive(path: Path) -> None:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as tar:
        for i in range(3):
            for name, content in ((f"{i}.txt", b"a cat"), (f"{i}.png", image_file("PNG"))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def image_lines(path: Path) -> None:
    one_file("a.png", image_file("PNG"))(path)
    line = json.dumps({"text": "a <start_of_image> cat", "images": ["a.png"]})
    (path / "a.jsonl").write_text(f"{line}\n{line}\n")


def image_file(name: str) -> bytes:
    """An image of some detail."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name)
    return out.getvalue()


def run(path: Path) -> None:
    """Writes the files of a finished run, without checkpoints."""
    path.mkdir()
    experiment = config_file.load(f"{CONFIG}:source@{path}")
    workdir.write_experiment(path, experiment, {"leaves": [{"leaf": "a", "how": "copied", "from": "b"}]})
    rows = [{"step": i, "wall": 1.5e9 + i, "train/loss": 3 - i / 10, "eval/heldout/loss": 2.5} for i in range(1, 7)]
    files.write_json_lines(path / "metrics.jsonl", rows)
    one_file("a", b"weights")(path / "model")
    marks = {"model/a": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    files.write_json(path / "done.json", {"step": 48, "files": marks})
    sample = {"task": "samples", "kind": "completion", "prompt": "a", "output": "b", "reference": "c"}
    files.write_json_lines(path / "samples" / "6.jsonl", [sample])


def checkpoints(path: Path) -> None:
    with Checkpoints(path) as saved:
        saved.save(1, *make(1), data=DATA, meta=META)


# ---- what readers return ----
def leaves(path: Path) -> Any:
    opened = import_folder.open_any(path)
    values = {str(key): (str(leaf.dtype), leaf.read().tobytes()) for key, leaf in opened.leaves.items()}
    return opened.config, values


def texts(source: Any) -> list[str]:
    documents = source.open()
    return [documents[i] for i in range(len(documents))]


def image_texts(source: Any) -> list[Any]:
    documents = source.open()
    numbers = range(len(documents))
    return [
        (documents[i], [images.read(documents.image_bytes(i, j)) for j in range(documents.count(i))]) for i in numbers
    ]


def tokens(path: Path) -> list[list[int]]:
    documents = Tokens(str(path)).open()
    documents.token_lengths(Bytes())
    return [documents.tokens(i, Bytes()).tolist() for i in range(len(documents))]


def tokenizer(kind: Any, name: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        opened = kind(file=str(path / name))
        ids = opened.encode("3 cats <bos> é\n\n")
        plain = opened.encode_plain("3 cats <bos> é\n\n")
        return opened.special_tokens, ids.tolist(), plain.tolist(), opened.decode(ids, skip_special_tokens=True)

    return read


def restored(path: Path) -> Any:
    with Checkpoints(path) as saved:
        state = saved.restore(*abstract(make(1)))
    if state is None:
        raise UserError("nothing is left of the step")
    return state.data, state.meta, [np.asarray(x).tobytes() for x in state.params.layers.slots[0].up[...]]


def reported(path: Path) -> Any:
    report = contents.read(path)
    return report.problems, [(run.step, run.metrics) for run in report.runs]


def done(path: Path) -> bool:
    experiment = config_file.load(f"{CONFIG}:source@{path}")
    return workdir.is_done(path, experiment, 48)


def readers() -> dict[str, Reader]:
    """Returns the readers by name."""
    lines = b"".join(json.dumps({"text": f"{i} cats"}).encode() + b"\n" for i in range(5))
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]
    chat = b"".join(json.dumps({"messages": turns}).encode() + b"\n" for _ in range(3))
    prompts = b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n'
    processor = {"image_processor_type": "Gemma3ImageProcessor", "do_rescale": True, "rescale_factor": 0.0039215}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}, "resample": 2}
    ids = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "top_k": 64, "top_p": 0.95}

    def config(make_folder: Callable[[Path], None]) -> Reader:
        return Reader("config.json", make_folder, lambda path: import_folder.open_any(path).config)

    def header(content: bytes) -> int:
        return 8 + int.from_bytes(content[:8], "little")

    def checkpoint(file: str) -> Reader:
        return Reader(f"1/{file}", checkpoints, restored, has_checksum=True)

    shard = "model-00001-*.safetensors"
    table = {
        "config.json (Gemma 3)": config(hugging_face),
        "config.json (SigLIP)": config(dual_encoder),
        "model.json": Reader("model.json", model_folder, lambda path: import_folder.open_any(path).config),
        "safetensors header": Reader(shard, hugging_face, leaves, until=header),
        "safetensors index": Reader("model.safetensors.index.json", hugging_face, leaves),
        "generation_config.json": Reader(
            "generation_config.json",
            one_file("generation_config.json", json.dumps(ids).encode()),
            lambda path: (generation_ids.read_with_tokenizer(path), generation_ids.completed(path)),
        ),
        "preprocessor_config.json": Reader(
            "preprocessor_config.json",
            one_file("preprocessor_config.json", json.dumps(processor).encode()),
            lambda path: image_processor.read(path, default="bilinear"),
        ),
        "tokenizer.json": Reader(
            "tokenizer.json", tokenizer_folder(tokenizer_files.huggingface), tokenizer(HuggingFace, "tokenizer.json")
        ),
        "tokenizer.model": Reader(
            "tokenizer.model",
            tokenizer_folder(tokenizer_files.sentencepiece),
            tokenizer(SentencePiece, "tokenizer.model"),
        ),
        "tokens.json": Reader("tokens.json", token_folder, tokens),
        "token shard": Reader("tokens-00000-of-00002.array_record", token_folder, tokens, has_checksum=True),
        "token lengths": Reader("lengths-00000-of-00002.npy", token_folder, tokens),
        "text": Reader(
            "a.txt", one_file("a.txt", "3 cäts\nsat\n".encode() * 9), lambda path: texts(TextFiles(str(path)))
        ),
        "text.gz": Reader("a.txt.gz", one_file("a.txt.gz", gzip.compress(lines)), lambda p: texts(TextFiles(str(p)))),
        "jsonl": Reader("a.jsonl", one_file("a.jsonl", lines), lambda path: texts(Jsonl(str(path)))),
        "chat jsonl": Reader("a.jsonl", one_file("a.jsonl", chat), lambda path: texts(Chat(str(path)))),
        "prompts jsonl": Reader(
            "a.jsonl", one_file("a.jsonl", prompts), lambda path: prompt_file.read_prompts(str(path / "a.jsonl"))
        ),
        "image jsonl": Reader("a.jsonl", image_lines, lambda path: image_texts(ImageJsonl(str(path)))),
        "parquet": Reader("a.parquet", parquet, lambda path: texts(Parquet(str(path)))),
        "image parquet": Reader("a.parquet", image_parquet, lambda path: image_texts(ImageParquet(str(path)))),
        "tar": Reader("a.tar", archive, lambda path: image_texts(WebDataset(str(path)))),
        "array_record": Reader(
            "a.array_record", records, lambda path: texts(ArrayRecord(str(path), field="text")), has_checksum=True
        ),
        "metrics.jsonl": Reader("metrics.jsonl", run, lambda path: metrics_writer.read_metrics(path / "metrics.jsonl")),
        "experiment.json": Reader("experiment.json", run, workdir.read_experiment),
        "done.json": Reader("done.json", run, done),
        **{
            f"report: {name}": Reader(name, run, reported)
            for name in ("metrics.jsonl", "experiment.json", "provenance.json", "done.json", "samples/6.jsonl")
        },
        "checkpoint: meta": checkpoint("meta/data.json"),
        "checkpoint: data": checkpoint("data/data.json"),
        "checkpoint: metadata": checkpoint("_CHECKPOINT_METADATA"),
        "checkpoint: params": checkpoint("params/_METADATA"),
        **{
            f"image {name}": Reader(
                "a", one_file("a", image_file(name)), lambda path: images.read(path / "a").tobytes()
            )
            for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
        },
    }
    return table


# ---- trials ----
class Hang(BaseException):
    """A reader took over SECONDS."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends what takes longer than SECONDS, and fails what allocates more than EXTRA_BYTES."""

    def stop(*_: object) -> None:
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def same(a: Any, b: Any) -> bool:
    """True if two values of a reader are equal."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and not hasattr(a, "_fields"):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check(name: str, reader: Reader, folder: Path, *, inputs: int, seed: int) -> Outcomes:
    """Gives a reader damaged files, and returns what came of it.

    The reader must return the same value of the undamaged file twice.
    """
    outcomes, draw, valid = Outcomes(name), random.Random(f"{seed}{name}"), folder / "valid"
    reader.make(valid)
    [path] = valid.glob(reader.file)
    content, file = path.read_bytes(), str(path.relative_to(valid))
    end = reader.until(content)
    is_json = Path(reader.file).suffix in (".json", ".jsonl") or reader.file.endswith("METADATA")
    work = folder / "valid copy"
    expected = read_copy(reader, file, valid, work, content)
    assert same(read_copy(reader, file, valid, work, content), expected), name
    for _ in range(inputs):
        other = damaged(content[:end], draw, is_json=is_json) + content[end:]
        if other == content:
            continue
        try:
            with limits():
                value = read_copy(reader, file, valid, work, other)
        except UserError as error:
            outcomes.counts["refused"] += 1
            # a folder's tensors are named one by one
            if not 0 < len(str(error).encode()) < LONGEST_MESSAGE:
                fault(outcomes, f"message of {len(str(error))} characters", other)
        except Hang:
            fault(outcomes, f"over {SECONDS} s", other)
        except Exception as error:  # any other is what is looked for
            place = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in place if "/t5g2/" in frame.filename] or place
            fault(outcomes, f"{type(error).__name__} at {own[-1].filename}:{own[-1].lineno}", other, str(error)[:300])
        else:
            is_same = same(value, expected)
            outcomes.counts["same" if is_same else "other"] += 1
            if reader.has_checksum and not is_same:
                fault(outcomes, "another value in spite of a checksum", other)
    return outcomes


def fault(outcomes: Outcomes, what: str, content: bytes, detail: str = "") -> None:
    outcomes.counts["fault"] += 1
    outcomes.faults.append(f"{what}\n  of {content[:200]!r}\n  {detail}")


def read_copy(reader: Reader, file: str, valid: Path, work: Path, content: bytes) -> Any:
    """Reads a copy of the undamaged folder with other content in a file."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(valid, work)
    (work / file).write_bytes(content)
    return reader.read(work)


def table(all_outcomes: Sequence[Outcomes]) -> str:
    """Returns a row for each reader."""
    lines = ["| reader | inputs | refused | read as undamaged | read otherwise | faults |", "|---|---|---|---|---|---|"]
    for outcomes in all_outcomes:
        counts = [outcomes.counts[key] for key in ("refused", "same", "other", "fault")]
        lines.append("| " + " | ".join(map(str, (outcomes.reader, sum(counts), *counts))) + " |")
    return "\n".join(lines)


def main() -> int:
    """Checks the readers of the command line, prints the table and the faults, and returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="names, separated by commas; default: all")
    flags = parser.parse_args()
    logging.disable(logging.CRITICAL)
    chosen = [name for name in flags.readers.split(",") if name]
    all_outcomes = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["T5G2_CACHE"] = f"{directory}/cache"
        for number, (name, reader) in enumerate(readers().items()):
            if chosen and name not in chosen:
                continue
            work = Path(directory) / str(number)
            work.mkdir()
            outcomes = check(name, reader, work, inputs=flags.inputs, seed=flags.seed)
            all_outcomes.append(outcomes)
            print(name, dict(outcomes.counts), flush=True)
            for what, count in Counter(text.split("\n  of ")[0] for text in outcomes.faults).items():
                example = next(text for text in outcomes.faults if text.startswith(what))
                print(f"{count} times: {example}", flush=True)
            shutil.rmtree(work)
            shutil.rmtree(f"{directory}/cache", ignore_errors=True)
    print(table(all_outcomes))
    return int(any(outcomes.faults for outcomes in all_outcomes))


if __name__ == "__main__":
    sys.exit(main())
