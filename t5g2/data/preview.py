"""Examples and packed rows as readable text."""

import numpy as np

from t5g2.core.batch import Batch, Example, HostBatch
from t5g2.core.terminal import escaped
from t5g2.data.config import DataConfig
from t5g2.data.image_tokens import ImageRows
from t5g2.data.tokenizers.base import Tokenizer


def format_example(example: Example, tokenizer: Tokenizer, images: ImageRows | None = None) -> str:
    """Returns the encoder's input and the decoder's targets, a line each; targets of weight 0 are in ⟦ ⟧.

        encoder  The <sentinel_0> sat on <sentinel_1>
        targets  ⟦<sentinel_0>⟧cat⟦<sentinel_1>⟧the mat<eos>

    All tokens of an image are one [image 896x896]. Decoder inputs are not shown: they are BOS and all targets but the
    last. For a decoder-only model, the first line is the bidirectional prefix, or is missing if there is none.
    The example of a probe is its text and its label: a number, or that of its class.
    """
    if example.label is not None:
        text = example.encoder_tokens if len(example.encoder_tokens) else example.decoder_tokens[1:]
        return f"text     {_line(decode_with_images(text, tokenizer, images))}\nlabel    {example.label:g}"
    targets = _marked(example, tokenizer, images)
    if example.blocks is not None and np.any(example.blocks):
        prefix = example.decoder_tokens[example.blocks > 0]
        return f"prefix   {_line(decode_with_images(prefix, tokenizer, images))}\ntargets  {targets}"
    if not len(example.encoder_tokens):
        return f"targets  {targets}"
    return f"encoder  {_line(decode_with_images(example.encoder_tokens, tokenizer, images))}\ntargets  {targets}"


def format_row(batch: HostBatch, row: int, config: DataConfig) -> str:
    """Returns the examples of one row, each with its id, source and denoiser, and the number of its tokens.

    row 0 of stream 3: 2 examples, encoder 37 of 96 tokens, decoder 58 of 96
    [1] example 12, source many, denoiser mu3_r15
    encoder  …
    targets  …
    """
    data, ids = batch.batch, batch.example_ids[row]
    decoder_full = f"decoder {_count(data.decoder.segments[row])}"
    full = f"encoder {_count(data.encoder.segments[row])}, {decoder_full}" if data.encoder else decoder_full
    count = int(np.sum(ids >= 0))
    lines = [f"row {row} of stream {batch.streams[row]}: {count} example{'s' * (count != 1)}, {full}"]
    for segment, example_id in enumerate(ids[:count].tolist(), start=1):
        # source and denoiser are the same for all tokens of an example
        is_token = data.decoder.segments[row] == segment
        source, denoiser = data.sources[row][is_token][0], data.denoisers[row][is_token][0]
        example = _unpack(data, row, segment)
        name = f"example {example_id}, source {config.names[source]}, denoiser {config.denoisers[denoiser]}"
        lines += [f"[{segment}] {escaped(name)}", format_example(example, config.tokenizer, config.images)]
    return "\n".join(lines)


def _unpack(data: Batch, row: int, segment: int) -> Example:
    """Returns an example of a packed row."""
    is_token = data.decoder.segments[row] == segment
    encoder = np.empty(0, np.int32)
    if data.encoder is not None:
        encoder = data.encoder.tokens[row][data.encoder.segments[row] == segment]
    blocks = None if data.decoder.blocks is None else data.decoder.blocks[row][is_token]
    parts = (part[row][is_token] for part in (data.decoder.tokens, data.targets, data.weights))
    label = None if data.labels is None else float(data.labels[row][is_token][0])
    return Example(encoder, *parts, blocks=blocks, label=label)


def decode_with_images(tokens: np.ndarray, tokenizer: Tokenizer, images: ImageRows | None) -> str:
    """Returns the text of tokens, with [image 896x896] for the tokens of each image of that size."""
    if images is None:
        return tokenizer.show(tokens)
    is_image = tokens == images.token
    # runs of image tokens and of text: images that follow each other are one run
    cuts = np.flatnonzero(is_image[1:] != is_image[:-1]) + 1
    return "".join(
        f"[image {images.size}x{images.size}]" * -(-len(run) // images.tokens) if kind[0] else tokenizer.show(run)
        for run, kind in zip(np.split(tokens, cuts), np.split(is_image, cuts), strict=True)
        if len(run)
    )


def _marked(example: Example, tokenizer: Tokenizer, images: ImageRows | None) -> str:
    """Returns the text of the targets, with ⟦ ⟧ around runs of weight 0."""
    is_ignored = example.weights == 0.0
    starts = np.flatnonzero(is_ignored[1:] != is_ignored[:-1]) + 1
    text = ""
    for run, ignored in zip(np.split(example.targets, starts), np.split(is_ignored, starts), strict=True):
        run_text = _line(decode_with_images(run, tokenizer, images))
        text += f"⟦{run_text}⟧" if ignored[0] else run_text
    return text


def _line(text: str) -> str:
    """Returns a text on one line: ends of lines as ⏎, other control characters as escapes."""
    return escaped(text.replace("\r", "␍").replace("\n", "⏎"))


def _count(segments: np.ndarray) -> str:
    return f"{np.count_nonzero(segments)} of {len(segments)} tokens"
