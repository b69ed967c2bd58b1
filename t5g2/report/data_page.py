"""The data of an experiment as a page: packed rows in colours, weights of targets, attention masks."""

import base64
import io
from itertools import chain, pairwise
from os import PathLike
from pathlib import Path

import numpy as np

from t5g2.core import files
from t5g2.core.batch import Sequences
from t5g2.core.errors import UserError
from t5g2.data.config import DataConfig
from t5g2.data.preview import decode_with_images
from t5g2.models import masks
from t5g2.models.backends.reference import visible
from t5g2.models.config import EncoderDecoderConfig
from t5g2.models.masks import Mask
from t5g2.report.data_preview import DataPreview
from t5g2.report.markup import Html, document, html_table, tag
from t5g2.report.text_table import TextTable
from t5g2.train.experiment import Experiment

# colours of the examples of a row, in turn; light enough for text on them
COLORS = ("#cfe3f7", "#fbdcc4", "#cdebd6", "#e4d7ef", "#f3ebbd", "#c9e8ec", "#f6cfdc", "#dfe3e8")
PIXELS = 200  # smallest length of a mask's longer side; a token has at least one pixel


def write(experiment: Experiment, preview: DataPreview, path: str | PathLike, *, rows: int) -> None:
    """Writes the page of the first rows of the first batch.

    Raises:
      UserError: the file cannot be written.
    """
    body = tag(
        "main", *_head(preview), *chain.from_iterable(_row(experiment, preview, row) for row in _first(preview, rows))
    )
    try:
        Path(path).parent.resolve(strict=True)  # folders are not created: a misspelt path would become a new one
        files.write_text(Path(path), document("Data", body, styles=("page.css", "data_page.css")))
    except OSError as error:
        raise UserError(f"--page={path} cannot be written ({error}); give a file in a folder that exists") from None
    print(f"page: {Path(path).absolute()}")


def _first(preview: DataPreview, rows: int) -> range:
    return range(min(rows, len(preview.first.batch.targets)))


def _head(preview: DataPreview) -> list[Html]:
    lines = [[source, denoiser, f"{share:.1%}"] for (source, denoiser), share in preview.shares.items()]
    key = [
        tag("span", "an example", style=f"background:{COLORS[0]}"),
        tag("span", "<special>", kind="special"),
        tag("span", "not counted", kind="silent"),
    ]
    return [
        tag("h1", "The data, as the model reads it"),
        tag("p", f"Padding: {preview.padding_text}. {preview.tokens_per_s:,.0f} tokens/s.", kind="quiet"),
        *(tag("p", line, kind="quiet") for line in preview.spelling_lines),
        html_table(TextTable(["source", "denoiser", "share of the decoder's tokens"], lines), kind="words"),
        tag("div", *(child for part in key for child in (part, Html("&emsp;"))), kind="tokens"),
        tag("p", "Each colour is an example. The decoder reads BOS and all targets but the last.", kind="quiet"),
    ]


def _row(experiment: Experiment, preview: DataPreview, row: int) -> list[Html]:
    batch, config = preview.first.batch, preview.config
    ids = [str(i) for i in preview.first.example_ids[row] if i >= 0]
    title = f"Row {row}, stream {preview.first.streams[row]}, examples {', '.join(ids) or 'none'}"
    parts = [tag("h2", title)]
    sides = [("encoder", batch.encoder.tokens[row], batch.encoder.segments[row], None)] if batch.encoder else []
    sides.append(("targets", batch.targets[row], batch.decoder.segments[row], batch.weights[row]))
    for name, tokens, segments, weights in sides:
        used = int(np.count_nonzero(segments))
        parts.append(tag("h3", f"{name}: {used} of {len(segments)} tokens"))
        parts.append(_strip(segments))
        silent = np.zeros(len(tokens), bool) if weights is None else weights == 0
        parts.append(tag("div", *_spans(tokens, segments, silent, config), kind="tokens"))
    return [tag("div", *parts, kind="row"), tag("div", *_masks(experiment, preview, row), kind="masks")]


def _runs(*values: np.ndarray) -> list[slice]:
    """Returns the slices in which all of the arrays are constant."""
    stacked = np.stack(values)
    cuts = np.flatnonzero(np.any(stacked[:, 1:] != stacked[:, :-1], axis=0)) + 1
    edges = [0, *cuts.tolist(), stacked.shape[1]]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _strip(segments: np.ndarray) -> Html:
    """Returns the row as a bar, in which each example has its share."""
    bars = []
    for run in _runs(segments):
        color = _color(int(segments[run.start]))
        bars.append(tag("div", style=f"flex:{run.stop - run.start};background:{color}"))
    return tag("div", *bars, kind="strip")


def _color(segment: int) -> str:
    return "transparent" if segment == 0 else COLORS[(segment - 1) % len(COLORS)]


def _spans(tokens: np.ndarray, segments: np.ndarray, silent: np.ndarray, config: DataConfig) -> list[Html]:
    """Returns the text in spans of one example each, special tokens in spans of their own."""
    tokenizer = config.tokenizer
    special = np.isin(tokens, list(tokenizer.named().values())) | tokenizer.special_tokens.is_sentinel(tokens)
    spans = []
    for run in _runs(segments, silent, special):
        if segments[run.start] == 0:
            spans.append(tag("span", f" +{run.stop - run.start} padding", kind="padding"))
            continue
        kinds = [name for name, flags in (("special", special), ("silent", silent)) if flags[run.start]]
        text = decode_with_images(tokens[run], tokenizer, config.images).replace("\n", "⏎")
        spans.append(tag("span", text, kind=" ".join(kinds), style=f"background:{_color(int(segments[run.start]))}"))
    return spans


def _masks(experiment: Experiment, preview: DataPreview, row: int) -> list[Html]:
    """Returns pictures of the attention masks of this row, by side and kind of layer."""
    model, batch = experiment.model, preview.first.batch
    decoder = _of_row(batch.decoder, row)
    stack = model.decoder_stack
    masked: list[tuple[str, Sequences, Sequences, Mask]] = []
    # layers of one kind have one mask
    for kind in dict.fromkeys(stack.pattern):
        if isinstance(model, EncoderDecoderConfig) and batch.encoder is not None:
            encoder = _of_row(batch.encoder, row)
            masked.append((f"encoder, {kind} layers", encoder, encoder, masks.encoder(model, kind)))
        masked.append((f"decoder, {kind} layers", decoder, decoder, masks.decoder(stack, kind)))
    if batch.encoder is not None:
        layers = model.cross_layers if isinstance(model, EncoderDecoderConfig) else "all"
        masked.append((f"decoder to encoder, {layers} layers", decoder, _of_row(batch.encoder, row), masks.ALL))
    return [
        tag(
            "figure",
            _picture(np.asarray(visible(q, k, mask))[0], q.segments[0]),
            tag("figcaption", f"{title}: a row for each query"),
        )
        for title, q, k, mask in sorted(masked, key=lambda item: item[0], reverse=True)
    ]


def _of_row(stream: Sequences, row: int) -> Sequences:
    return Sequences(*(None if part is None else part[row : row + 1] for part in stream))


def _picture(see_TS: np.ndarray, segments_T: np.ndarray) -> Html:
    """Returns a mask as an image: a visible pair has its example's colour, darkened."""
    from PIL import Image

    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLORS], np.uint8)
    colors_T3 = (palette[(np.maximum(segments_T, 1) - 1) % len(COLORS)] * 0.72).astype(np.uint8)
    pixels = np.where(see_TS[:, :, None], colors_T3[:, None, :], np.uint8(250)).astype(np.uint8)
    # enlarged without interpolation, so that a pair stays a square of one colour
    scale = max(1, PIXELS // max(see_TS.shape))
    file = io.BytesIO()
    Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST).save(
        file, format="PNG", optimize=True
    )
    data = base64.b64encode(file.getvalue()).decode()
    return tag("img", src=f"data:image/png;base64,{data}", alt="mask", width=str(pixels.shape[1] * scale))
