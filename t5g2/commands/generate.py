"""`t5g2 generate`: completes one prompt, or a file of prompts."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2.commands.flags import MODEL, Flag, Parsed
from t5g2.core import files
from t5g2.core.bounds import LONGEST
from t5g2.core.errors import UserError
from t5g2.core.terminal import escaped

FLAGS = {
    "model": MODEL,
    "prompt": Flag(None, "text to complete", literal=True),
    "crops": Flag(0, "largest number of crops after each long image (pan-and-scan)", least=0),
    "image": Flag(
        "",
        "image files, separated by commas, in the places of <start_of_image> in --prompt, or in front if it has none",
    ),
    "input": Flag(None, "jsonl file of prompts, instead of --prompt"),
    "out": Flag(None, "jsonl file to write, with --input; it must not exist"),
    "max_new_tokens": Flag(64, "largest number of tokens to generate", least=1, most=LONGEST),
    "temperature": Flag(0.0, "0 = always the likeliest token; above 0 = sampling", least=0, most=1000),
    "top_k": Flag(
        None, "sample from so many tokens; 0 = from all; default: what the model's folder recommends", kind=int, least=0
    ),
    "top_p": Flag(
        None, "sample from this share of probability; default: what the model's folder recommends", kind=float, most=1
    ),
    "seed": Flag(0, "seed of the sampling", least=0, most=2**63 - 1),
    "skip_special_tokens": Flag(True, "leave out what the tokenizer calls special; false = show all tokens"),
}


def run(flags: Parsed) -> None:
    """Completes a prompt, or every line of a jsonl file ({"prompt": …}), with a model.

    Example: t5g2 generate --model=models/t5gemma2-4b --prompt="What is this?" --image=photo.jpg --max_new_tokens=40
    """
    prompts = _prompts(flags.prompt, flags.input, flags.out)
    images = flags.paths("image")
    if images and flags.prompt is None:
        raise UserError("--image belongs to the prompt of --prompt; give both, or neither")
    import t5g2

    if flags.temperature == 0 and (flags.top_k is not None or flags.top_p is not None):
        raise UserError("--top_k and --top_p restrict sampling; give --temperature above 0 too, such as 1")
    model = t5g2.load(flags.model)
    sampler = t5g2.Greedy()
    if flags.temperature > 0:
        sampler = model.sampler(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
    outputs = model.generate(
        prompts,
        [list(images)] if images else None,
        max_new_tokens=flags.max_new_tokens,
        sampler=sampler,
        seed=flags.seed,
        skip_special_tokens=flags.skip_special_tokens,
        crops=flags.crops,
    )
    if flags.out is None:
        # as it is into a file or a pipe
        print(escaped(outputs[0]) if sys.stdout.isatty() else outputs[0])
    else:
        write_outputs(flags.out, prompts, outputs)
        print(f"wrote {flags.out}")


def _prompts(text: str | None, path: str | None, out: str | None) -> list[str]:
    """Returns [text], or the prompts of the file at `path`, whose outputs go to the file `out`.

    Raises:
      UserError: text and path are both None or both set; `path` without `out`; `out` exists; as `read_prompts`.
    """
    if (text is None) == (path is None) or (path is None) != (out is None):
        raise UserError("give either --prompt, or --input together with --out")
    if out is not None:
        files.refuse_existing(out)  # before the model is loaded
    return read_prompts(path) if text is None and path is not None else [str(text)]


def read_prompts(path: str) -> list[str]:
    """Returns the prompts of a jsonl file, one {"prompt": …} per line; blank lines do not count.

    Raises:
      UserError: the file does not exist, is not UTF-8 or holds no prompt; a line is not a prompt (the message has it),
        or has images, which are given with a single prompt only.
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
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number}: {line[:80]!r} is not {{"prompt": "a text"}}')
        images = [name for name in ("image", "images") if record.get(name)]
        if images:
            raise UserError(
                f"{path}, line {number} has {images[0]!r}, and a file of prompts is read without images; give each "
                f"prompt with --prompt and --image, or use t5g2.load(DIR).generate(prompts, images)"
            )
        prompts.append(prompt)
    if not prompts:
        raise UserError(f'{path} holds no prompt; give a jsonl file with {{"prompt": …}} on every line')
    return prompts


def write_outputs(path: str, prompts: Sequence[str], outputs: Sequence[str]) -> None:
    """Writes a line {"prompt": …, "output": …} for each prompt.

    Raises:
      UserError: the file exists.
    """
    files.refuse_existing(path)
    rows = [{"prompt": prompt, "output": output} for prompt, output in zip(prompts, outputs, strict=True)]
    files.write_json_lines(Path(path), rows)
