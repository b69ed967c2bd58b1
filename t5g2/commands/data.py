"""`t5g2 data`."""

import os
import re
import sys
from typing import TYPE_CHECKING

from t5g2.commands.flags import CONFIG, Flag, Parsed
from t5g2.core.terminal import escaped

if TYPE_CHECKING:
    from t5g2.report.data_preview import DataPreview

FLAGS = {
    "config": CONFIG,
    "n": Flag(3, "rows to show", least=0),
    "page": Flag(None, "HTML file to write: the rows in colours, and the attention masks of each"),
}


def run(flags: Parsed) -> None:
    """Shows the first rows of a config's data as text, the shares of its denoisers, and its padding.

    Example: t5g2 data --config=configs/quickstart.py:adapted --n=3 --page=data.html
    """
    from t5g2.report import data_preview
    from t5g2.train import config_file

    experiment = config_file.load(flags.config, flags.overrides)
    preview = data_preview.measure(experiment)
    show(preview, rows=flags.n)
    if flags.page is not None:
        from t5g2.report import data_page

        data_page.write(experiment, preview, flags.page, rows=flags.n)


def show(preview: "DataPreview", *, rows: int) -> None:
    """Prints the first rows of the first batch, then the shares, padding and tokens/s of a few batches.

    In a terminal special tokens are in colour, unless NO_COLOR is set (https://no-color.org).
    """
    from t5g2.data.pipeline import describe_ratio
    from t5g2.data.preview import format_row

    config = preview.config
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    special_tokens = _special_tokens(preview) if in_colour else None
    for row in range(min(rows, config.rows)):
        text = format_row(preview.first, row, config)
        print(special_tokens.sub("\033[36m\\g<0>\033[0m", text) if special_tokens else text, end="\n\n")
    print("source          denoiser        share of the decoder's tokens")
    for (source, denoiser), share in preview.shares.items():
        print(escaped(f"{source:15} {denoiser:15} {share:.1%}"))
    if len(config.sources) > 1:
        total = sum(source.weight for source in config.sources)
        weights = {name: source.weight for name, source in zip(config.names, config.sources, strict=True)}
        # whole weights in full, such as numbers of examples; 0.1 + 0.2 without its last digits
        number = "{}" if isinstance(total, int) else "{:.6g}"
        shares = [
            f"{name} {share:.1%} (weight {number.format(weights[name])} of {number.format(total)})"
            for name, share in preview.examples.items()
        ]
        print(escaped(f"examples: {', '.join(shares)}"))
    images = ""
    if config.images is not None:
        per_row = preview.images / preview.rows
        images = f"{per_row:.1f} images a row, which has room for {config.images.per_row}: data.images.per_row"
    lines = filter(None, [f"padding: {preview.padding_text}", describe_ratio(preview.summary, config), images])
    print(*lines, *map(escaped, preview.spelling_lines), f"{preview.tokens_per_s:.0f} tokens/s", sep="\n")


def _special_tokens(preview: "DataPreview") -> re.Pattern | None:
    """Returns a pattern that matches the spellings of the special tokens in the first batch; None if it has none."""
    import numpy as np

    batch, tokenizer = preview.first.batch, preview.config.tokenizer
    inputs = batch.decoder if batch.encoder is None else batch.encoder
    # only tokens of this batch, because a vocabulary is large to decode one by one
    tokens = np.unique(np.concatenate([batch.targets.ravel(), inputs.tokens.ravel()]))
    spellings = {tokenizer.show(token[None]) for token in tokens[tokenizer.special_tokens.is_special(tokens)]} - {""}
    # the longest first, because one spelling may begin another
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))) if spellings else None
