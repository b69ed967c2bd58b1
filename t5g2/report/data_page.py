"""The data of an experiment as a page: packed rows in colours, what counts and what does not, and who sees whom."""

import base64
import io
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path

import numpy as np

from t5g2.commands.data import Look
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.data.preview import decode_with_images
from t5g2.models import masks
from t5g2.models.backends.reference import visible
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.masks import Mask
from t5g2.report.page import STYLE as BASE
from t5g2.report.page import Html, Table, table_of, tag
from t5g2.train.experiment import Experiment

# of the examples of a row, in turn; light enough for text on them
COLORS = ("#cfe3f7", "#fbdcc4", "#cdebd6", "#e4d7ef", "#f3ebbd", "#c9e8ec", "#f6cfdc", "#dfe3e8")
PIXELS = 200  # of a mask's longer side at least; one token is at least one pixel
STYLE = (
    BASE
    + """
.row { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.15rem;
  margin: 2.2rem 0 1rem; }
.row h2 { margin-top: 0; }
.strip { display: flex; height: 0.9rem; border-radius: 4px; overflow: hidden; background: var(--line);
  margin: 0.35rem 0; }
.tokens { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.82rem;
  line-height: 1.75; overflow-wrap: anywhere; white-space: pre-wrap; color: #23272e; }
.tokens span { border-radius: 3px; padding: 0.08rem 0; }
.tokens .special { color: #b3431e; font-weight: 650; }
.tokens .silent { opacity: 0.42; }
.tokens .padding { color: var(--quiet); }
.masks { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; }
.masks img { image-rendering: pixelated; border: 1px solid var(--line); background: #fff; max-width: 100%; }
"""
)


def write(experiment: Experiment, seen: Look, path: str | PathLike, *, rows: int) -> None:
    """Writes the page of the first rows of the first batch.

    Raises:
      UserError: the file cannot be written.
    """
    body = tag("main", *_head(seen), *chain.from_iterable(_row(experiment, seen, row) for row in _first(seen, rows)))
    meta = Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">')
    head = tag("head", meta, tag("title", "Data"), tag("style", Html(STYLE)))
    try:
        Path(path).write_text("<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n")
    except OSError as error:
        raise UserError(f"--page={path} cannot be written ({error}); give a file in a folder that exists") from None
    print(f"page: {Path(path).absolute()}")


def _first(seen: Look, rows: int) -> range:
    return range(min(rows, len(seen.first.batch.targets)))


def _head(seen: Look) -> list[Html]:
    lines = [[source, denoiser, f"{share:.1%}"] for (source, denoiser), share in seen.shares.items()]
    key = [
        tag("span", "an example", style=f"background:{COLORS[0]}"),
        tag("span", "<special>", kind="special"),
        tag("span", "not counted", kind="silent"),
    ]
    return [
        tag("h1", "The data, as the model reads it"),
        tag("p", f"Padding: {seen.padding}. {seen.tokens_per_s:,.0f} tokens/s were made.", kind="quiet"),
        table_of(Table(["source", "denoiser", "share of the decoder's tokens"], lines), kind="words"),
        tag("div", *(child for part in key for child in (part, Html("&emsp;"))), kind="tokens"),
        tag(
            "p", "Colours are the examples of a row. Decoder inputs are BOS and the targets but the last.", kind="quiet"
        ),
    ]


def _row(experiment: Experiment, seen: Look, row: int) -> list[Html]:
    batch, config = seen.first.batch, seen.config
    ids = [str(i) for i in seen.first.example_ids[row] if i >= 0]
    title = f"Row {row}, stream {seen.first.streams[row]}, examples {', '.join(ids) or 'none'}"
    parts = [tag("h2", title)]
    sides = [("encoder", batch.encoder.tokens[row], batch.encoder.segments[row], None)] if batch.encoder else []
    sides.append(("targets", batch.targets[row], batch.decoder.segments[row], batch.weights[row]))
    for name, tokens, segments, weights in sides:
        used = int(np.count_nonzero(segments))
        parts.append(tag("h3", f"{name}: {used} of {len(segments)} tokens"))
        parts.append(_strip(segments))
        silent = np.zeros(len(tokens), bool) if weights is None else weights == 0
        parts.append(tag("div", *_spans(tokens, segments, silent, config), kind="tokens"))
    return [tag("div", *parts, kind="row"), tag("div", *_masks(experiment, seen, row), kind="masks")]


def _runs(*values: np.ndarray) -> list[slice]:
    """Where all of the arrays stay the same."""
    stacked = np.stack(values)
    cuts = np.flatnonzero(np.any(stacked[:, 1:] != stacked[:, :-1], axis=0)) + 1
    edges = [0, *cuts.tolist(), stacked.shape[1]]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _strip(segments: np.ndarray) -> Html:
    """The row as a bar: how much of it each example takes."""
    bars = []
    for run in _runs(segments):
        color = _color(int(segments[run.start]))
        bars.append(tag("div", style=f"flex:{run.stop - run.start};background:{color}"))
    return tag("div", *bars, kind="strip")


def _color(segment: int) -> str:
    return "transparent" if segment == 0 else COLORS[(segment - 1) % len(COLORS)]


def _spans(tokens: np.ndarray, segments: np.ndarray, silent: np.ndarray, config: DataConfig) -> list[Html]:
    """The text in runs of one example, special tokens apart from the others."""
    tokenizer = config.tokenizer
    special = np.isin(tokens, list(tokenizer.named().values())) | tokenizer.special_tokens.is_sentinel(tokens)
    made = []
    for run in _runs(segments, silent, special):
        if segments[run.start] == 0:
            made.append(tag("span", f" +{run.stop - run.start} padding", kind="padding"))
            continue
        kinds = [name for name, of in (("special", special), ("silent", silent)) if of[run.start]]
        text = decode_with_images(tokens[run], tokenizer, config.images).replace("\n", "⏎")
        made.append(tag("span", text, kind=" ".join(kinds), style=f"background:{_color(int(segments[run.start]))}"))
    return made


def _masks(experiment: Experiment, seen: Look, row: int) -> list[Html]:
    """Who sees whom in this row, by side and kind of layer."""
    model, batch = experiment.model, seen.first.batch
    decoder = _of_row(batch.decoder, row)
    stack = model.decoder if isinstance(model, EncoderDecoderConfig) else model
    wanted: list[tuple[str, Sequences, Sequences, Mask]] = []
    for kind in dict.fromkeys(stack.pattern):
        if isinstance(model, EncoderDecoderConfig) and batch.encoder is not None:
            encoder = _of_row(batch.encoder, row)
            wanted.append((f"encoder, {kind} layers", encoder, encoder, masks.encoder(model, kind)))
        wanted.append((f"decoder, {kind} layers", decoder, decoder, masks.decoder(stack, kind)))
    if batch.encoder is not None:
        layers = model.cross_layers if isinstance(model, EncoderDecoderConfig) else "all"
        wanted.append((f"decoder to encoder, {layers} layers", decoder, _of_row(batch.encoder, row), masks.ALL))
    return [
        tag(
            "figure",
            _picture(np.asarray(visible(q, k, mask))[0], q.segments[0]),
            tag("figcaption", f"{title}: a row for each query"),
        )
        for title, q, k, mask in sorted(wanted, key=lambda of: of[0], reverse=True)
    ]


def _of_row(stream: Sequences, row: int) -> Sequences:
    return Sequences(*(None if part is None else part[row : row + 1] for part in stream))


def _picture(see_TS: np.ndarray, segments_T: np.ndarray) -> Html:
    """A mask as an image: a visible pair has its example's colour, made darker."""
    from PIL import Image

    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLORS], np.uint8)
    colors_T3 = (palette[(np.maximum(segments_T, 1) - 1) % len(COLORS)] * 0.72).astype(np.uint8)
    pixels = np.where(see_TS[:, :, None], colors_T3[:, None, :], np.uint8(250)).astype(np.uint8)
    scale = max(1, PIXELS // max(see_TS.shape))
    file = io.BytesIO()
    Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST).save(
        file, format="PNG", optimize=True
    )
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt="mask", width=str(pixels.shape[1] * scale))
