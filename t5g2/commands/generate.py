"""Files of prompts, and of what a model made of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from t5g2.core.errors import UserError
from t5g2.core.files import refuse_existing
from t5g2.eval.evaluation import write_predictions


def prompts(text: str | None, path: str | None, out: str | None) -> list[str]:
    """The text, or the prompts of the file at `path`, whose completions will go to the file `out`.

    Raises:
      UserError: neither or both are given; `path` without `out`; `out` exists; as `read_prompts`.
    """
    if (text is None) == (path is None) or (path is None) != (out is None):
        raise UserError("give either --prompt, or --input together with --out")
    if out is not None:
        refuse_existing(out)  # before the work
    return read_prompts(path) if text is None and path is not None else [str(text)]


def tell(prompts: Sequence[str], outputs: Sequence[str], out: str | None) -> None:
    """Prints the output of the only prompt, or writes all to the file `out`."""
    if out is None:
        print(outputs[0])
    else:
        write_outputs(out, prompts, outputs)
        print(f"wrote {out}")


def read_prompts(path: str) -> list[str]:
    """The prompts of a jsonl file, {"prompt": …} a line; blank lines do not count.

    Raises:
      UserError: no such file, no text, no prompt, or a line that is none; names the line.
    """
    if not Path(path).is_file():
        raise UserError(f'no file {path}; give a jsonl file with {{"prompt": …}} on every line')
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold U+2028, which splitlines takes for an end
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number}: {line[:80]!r} is not {{"prompt": "a text"}}')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f'{path} holds no prompt; give a jsonl file with {{"prompt": …}} on every line')
    return prompts


def write_outputs(path: str, prompts: Sequence[str], outputs: Sequence[str]) -> None:
    """Writes {"prompt": …, "output": …} a line.

    Raises:
      UserError: the file exists.
    """
    refuse_existing(path)
    rows = [{"prompt": prompt, "output": output} for prompt, output in zip(prompts, outputs, strict=True)]
    write_predictions(path, rows)
