"""Outputs for a file of prompts, line by line, in an order and with draws that no interruption changes."""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from t5g2.api.dual_encoder import DualEncoder
from t5g2.api.language_model import LanguageModel
from t5g2.api.text_generation import TextOptions
from t5g2.checkpoint import hub
from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import files
from t5g2.core.errors import UserError
from t5g2.core.logs import log
from t5g2.eval.output_text import TextOutput

# prompts that are sorted by length together, in batches
BATCHES_OF_A_WINDOW = 8
EXAMPLE = '{"prompt": "a text"}'


class PromptRecord(NamedTuple):
    """A line of a file of prompts.

    Attributes:
      prompt: the text.
      images: paths of its images, those that are relative from the folder of the file.
      name: the file and the line, for messages.
    """

    prompt: str
    images: list[str]
    name: str


def read_prompts(path: str) -> list[PromptRecord]:
    """Returns the prompts of a jsonl file, {"prompt": …, "images": […]} on each line; blank lines do not count.

    Raises:
      UserError: the file does not exist, is not UTF-8 or holds no prompt; a line is not a prompt (the message has it),
        or has an image that does not exist.
    """
    if not Path(path).is_file():
        raise UserError(f'no file {path}; give a jsonl file with {{"prompt": …}} on every line')
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            record: Any = files.parse_record(line)
            prompt = record["prompt"]
        except (ValueError, KeyError, TypeError):
            record, prompt = {}, None
        if not isinstance(prompt, str):
            raise UserError(f"{path}, line {number}: {line[:80]!r} is not {EXAMPLE}")
        images = record.get("images") or record.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise UserError(f"{path}, line {number}: its images are not a path or a list of paths")
        paths = [str(Path(path).parent / image) for image in images]
        # found now, and not after hours
        missing = [image for image in paths if not Path(image).is_file()]
        if missing:
            raise UserError(f"{path}, line {number}: no image {missing[0]}; put it there, or remove it from the line")
        prompts.append(PromptRecord(prompt, paths, f"{path}, line {number}"))
    if not prompts:
        raise UserError(f'{path} holds no prompt; give a jsonl file with {{"prompt": …}} on every line')
    return prompts


def complete_file(model: LanguageModel | DualEncoder, path: str, out: str, options: TextOptions) -> str:
    """Writes a line for each prompt of a file, and returns a summary: prompts, tokens, tokens per second.

    The summary counts what this call did. A line is {"prompt", "output"}, with "outputs" instead if there are several
    of each prompt, "skipped" if it was too long, and "log_probs" and "score" where they were asked for. Lines are
    written to OUT.partial in the order of the prompts, as they are done; the same command goes on from there after an
    interruption, and gives the same lines. OUT is there once all are done.

    Raises:
      UserError: OUT exists; OUT.partial was begun with other settings, or by a process that still runs; as
        `read_prompts` and `LanguageModel.generate`.
    """
    if isinstance(model, DualEncoder):
        model.generate()
    target = Path(out)
    files.refuse_existing(target)
    records = read_prompts(path)
    settings = {
        "model": _identity(model.folder),
        "prompts": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "options": dataclasses.asdict(options),
    }
    partial, settings_file = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.partial.json")
    # with crops, the number of images follows from their sizes
    known = [record for record in records if not (record.images and options.crops)]
    counts, names = [len(record.images) for record in known], [record.name for record in known]
    model.check_prompts([record.prompt for record in known], counts, options, names=names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(partial, busy=f"another process writes {partial}; wait for it, or give another --out"):
        done, begun = _begin(partial, settings_file, settings), time.monotonic()
        try:
            tokens = _write(partial, model, records, options, done)
        except KeyboardInterrupt:
            log.warning("interrupted; the same command goes on from what is in %s", partial)
            raise
        finally:
            # after a refusal there is nothing to go on from
            if not partial.stat().st_size:
                partial.unlink()
                settings_file.unlink()
        partial.rename(target)
        settings_file.unlink()
    seconds = time.monotonic() - begun
    completed = len(records) - done
    return f"{completed:,} prompt{'s' * (completed != 1)}, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"


def _write(partial: Path, model: LanguageModel, records: list[PromptRecord], options: TextOptions, done: int) -> int:
    """Adds the lines of records from `done` on; returns the number of tokens that were generated."""
    begun, tokens = time.monotonic(), 0
    with (
        partial.open("a", encoding="utf-8") as lines,
        tqdm(total=len(records), initial=done, unit=" prompts", disable=not sys.stderr.isatty()) as bar,
    ):
        for record, outputs in _outputs(model, records, options, done):
            lines.write(files.json_line(_line(record, outputs)))
            lines.flush()
            tokens += sum(len(output.tokens) for output in outputs)
            bar.update()
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begun):,.0f} tokens/s")
        os.fsync(lines.fileno())
    return tokens


def _begin(partial: Path, settings_file: Path, settings: dict[str, Any]) -> int:
    """Returns the number of lines that are there, after the removal of one that is not whole."""
    content = partial.read_bytes()
    if not content:
        files.write_json(settings_file, settings)
        return 0
    before = files.read_json_object(settings_file, fix=f"remove it and {partial}")
    settings = files.parse_json(files.json_line(settings).encode())
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        options = [name for name, value in settings["options"].items() if before["options"].get(name) != value]
        named = ", ".join(options) if changed == ["options"] else ", ".join(changed)
        raise UserError(
            f"{partial} was begun with other settings ({named}); give the same, or another --out, or remove it"
        )
    whole = content.rfind(b"\n") + 1
    os.truncate(partial, whole)
    return content.count(b"\n")


def _outputs(
    model: LanguageModel, records: list[PromptRecord], options: TextOptions, done: int
) -> Iterator[tuple[PromptRecord, list[TextOutput]]]:
    """Yields records and their outputs, from record `done` on, in order.

    Windows begin at the same records, and so batches are the same, whatever was done before.
    """
    window = BATCHES_OF_A_WINDOW * (options.rows or 1)
    arguments = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for first in range(done - done % window, len(records), window):
        part = records[first : first + window]
        images = [record.images for record in part] if any(record.images for record in part) else None
        indices, ready, expected = range(first, first + len(part)), {}, first
        for row, outputs in model.outputs_as_done([r.prompt for r in part], images, indices=indices, **arguments):
            ready[first + row] = outputs
            while expected in ready:
                if expected >= done:
                    yield records[expected], ready[expected]
                del ready[expected]
                expected += 1


def _line(record: PromptRecord, outputs: list[TextOutput]) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": record.prompt}
    if record.images:
        line["images"] = record.images
    if outputs[0].skipped is not None:
        return line | {"output": None, "skipped": outputs[0].skipped}
    values: dict[str, list[Any]] = {"output": [output.text for output in outputs]}
    if outputs[0].log_probs is not None:
        values["log_probs"] = [[round(float(x), 6) for x in output.log_probs] for output in outputs]  # pyright: ignore[reportOptionalIterable]
    if outputs[0].score is not None:
        values["score"] = [output.score for output in outputs]
    if len(outputs) == 1:
        return line | {name: value for name, (value,) in values.items()}
    return line | {name if name == "log_probs" else f"{name}s": value for name, value in values.items()}


def _identity(folder: ModelFolder) -> str:
    """Returns a text that changes with the files of a model."""
    if hub.is_address(folder.origin):
        return folder.origin
    # a GGUF file, and not its folder in the cache, which is made anew where it is lost
    origin = Path(folder.origin)
    paths = [origin] if origin.is_file() else [path for path in origin.iterdir() if path.is_file()]
    contents = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths)
    return f"{origin.resolve()} {hashlib.sha256(repr(contents).encode()).hexdigest()[:16]}"
