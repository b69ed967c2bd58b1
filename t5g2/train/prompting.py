"""Completions of prompts by a model folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from t5g2.checkpoint import folder as folders
from t5g2.checkpoint.folder import refuse_existing
from t5g2.core.errors import UserError
from t5g2.data import tokenizer as tokenizers
from t5g2.eval.evaluate import write_predictions
from t5g2.eval.generate import GREEDY, Temperature, generate_text


def generate(
    model: str, prompts: Sequence[str], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """What the model of a folder makes of each prompt.

    Raises:
      UserError: no such folder, or it has no tokenizer.
    """
    folder = folders.open_model(model)
    if folder.tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read text; save it with one")
    sampler = Temperature(temperature) if temperature > 0 else GREEDY
    return generate_text(
        folders.load_model(folder),
        tokenizers.from_dict(folder.tokenizer),
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
    )


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
