"""`t5g2 generate`: completes one prompt, or a file of prompts."""

import json
import sys
from typing import Any

from t5g2.commands.flags import MESH, MODEL, Flag, Parsed
from t5g2.core import files
from t5g2.core.bounds import LONGEST
from t5g2.core.errors import UserError
from t5g2.core.terminal import escaped

FLAGS = {
    "model": MODEL,
    "mesh": MESH,
    "prompt": Flag(None, "text to complete", literal=True),
    "crops": Flag(0, "largest number of crops after each long image (pan-and-scan)", least=0),
    "image": Flag(
        "",
        "image files, separated by commas, in the places of <start_of_image> in --prompt, or in front if it has none",
    ),
    "input": Flag(None, 'jsonl file of prompts, {"prompt": …, "images": [path, …]} a line, instead of --prompt'),
    "out": Flag(None, "jsonl file to write, with --input; after an interruption the same command goes on"),
    "rows": Flag(32, "prompts of a batch, with --input", least=1, most=LONGEST),
    "stream": Flag(None, "show the text as it is made; default: of one output on a terminal", kind=bool),
    "max_new_tokens": Flag(64, "largest number of tokens to generate", least=1, most=LONGEST),
    "min_new_tokens": Flag(0, "smallest number of tokens before EOS", least=0, most=LONGEST),
    "do_sample": Flag(None, "draw tokens, with the temperature that the model's folder recommends, or 1", kind=bool),
    "temperature": Flag(
        None, "0 = always the likeliest token; above 0 = sampling", kind=float, least=0, most=1_000_000
    ),
    "top_k": Flag(
        None, "sample from so many tokens; 0 = from all; default: what the model's folder recommends", kind=int, least=0
    ),
    "top_p": Flag(
        None, "sample from this share of probability; default: what the model's folder recommends", kind=float, most=1
    ),
    "seed": Flag(0, "seed of the sampling", least=0, most=2**63 - 1),
    "num_return_sequences": Flag(1, "outputs of each prompt: samples, or the best beams", least=1, most=1024),
    "num_beams": Flag(1, "sequences that beam search follows; 1 = no beam search", least=1, most=1024),
    "length_penalty": Flag(1.0, "beams are ranked by log-probability / length ** this", least=-5, most=5),
    "early_stopping": Flag("false", "end of beam search: true = with num_beams outputs, false = by a rule, or never"),
    "repetition_penalty": Flag(1.0, "divides the positive logits of tokens that are there already; 1 = none", least=0),
    "stop": Flag(None, "string before which an output ends, or a JSON list of such", literal=True),
    "on_long": Flag("error", "a prompt longer than the context: error, truncate_left, truncate_right or skip"),
    "log_probs": Flag(False, "with --input, write the log-probability of each token too"),
    "skip_special_tokens": Flag(True, "leave out what the tokenizer calls special; false = show all tokens, EOS too"),
}
# flags that are options of generation, by the same names
OPTIONS = (
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed", "num_return_sequences"),
    *("num_beams", "length_penalty", "repetition_penalty", "on_long", "log_probs", "skip_special_tokens", "crops"),
)


def run(flags: Parsed) -> None:
    """Completes a prompt, or every line of a jsonl file ({"prompt": …}), with a model.

    Example: t5g2 generate --model=models/t5gemma2-4b --prompt="What is this?" --image=photo.jpg --max_new_tokens=40
    """
    if (flags.prompt is None) == (flags.input is None) or (flags.input is None) != (flags.out is None):
        raise UserError("give either --prompt, or --input together with --out")
    if flags.log_probs and flags.input is None:
        raise UserError("--log_probs belongs to --input: they are written to --out; give both, or leave it out")
    if flags.stream and flags.input is not None:
        raise UserError("--stream shows the text of --prompt; lines of --input go to --out; leave it out")
    images = flags.paths("image")
    if images and flags.prompt is None:
        raise UserError('--image belongs to the prompt of --prompt; a file of prompts has "images" on its lines')
    if flags.out is not None:
        files.refuse_existing(flags.out)  # before the model is loaded
    options: dict[str, Any] = {name: getattr(flags, name) for name in OPTIONS}
    options |= {"early_stopping": _early_stopping(flags.early_stopping), "stop": _stop(flags.stop)}
    from t5g2.api import loading
    from t5g2.api.text_generation import TextOptions

    if flags.input is not None and flags.out is not None:
        from t5g2.jobs import prompt_file

        prompt_file.read_prompts(flags.input)
        settings = TextOptions.of(options | {"rows": flags.rows})
        model = loading.load(flags.model, mesh=loading.mesh_of(flags.mesh))
        print(f"{prompt_file.complete_file(model, flags.input, flags.out, settings)}; wrote {flags.out}")
        return
    settings = TextOptions.of(options)
    model = loading.load(flags.model, mesh=loading.mesh_of(flags.mesh))
    by_prompt = [list(images)] if images else None
    is_one = settings.num_return_sequences == settings.num_beams == 1
    if flags.stream or (flags.stream is None and is_one and sys.stdout.isatty()):
        for text in model.stream(flags.prompt, by_prompt and by_prompt[0], **options):
            _show(text, end="")
        print()
        return
    for text in model.generate([flags.prompt], by_prompt, **options):
        _show(text)


def _show(text: str, end: str = "\n") -> None:
    # as it is into a file or a pipe
    print(escaped(text) if sys.stdout.isatty() else text, end=end, flush=True)


def _early_stopping(value: str) -> bool | str:
    return {"true": True, "false": False}.get(value.lower(), value)


def _stop(value: str | None) -> list[str]:
    """Returns the strings of --stop."""
    if value is None:
        return []
    if not value.startswith("["):
        return [value]
    try:
        strings = json.loads(value)
    except ValueError as error:
        raise UserError(f'--stop={value}: {error}; give a string, or a JSON list: ["\\n\\n", "END"]') from None
    if not all(isinstance(string, str) for string in strings):
        raise UserError(f'--stop={value}: not all are strings; give a JSON list: ["\\n\\n", "END"]')
    return strings
