"""The tokenizer of a GGUF file as a tokenizer.json, with the ids of the SentencePiece model that it was made of.

A file has the pieces of that model with their scores and types. A tokenizer.json has merges instead of scores: each
pair of pieces that makes a piece, those of the best piece first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5g2.core.errors import UserError

CONTROL, USER_DEFINED, BYTE = 3, 4, 6
SPACE = "▁"
BOS = "<bos>"
# markers of a user's own, which files call control tokens too, and special tokens that they do not call so
MARKERS = ("<unused", "<mask>", "[")
SPECIAL = ("<start_of_image>", "<end_of_image>")


def tokenizer_json(path: Path, field: Callable[[str], Any], *, adds_bos: bool) -> dict[str, Any]:
    """Returns a tokenizer.json.

    Args:
      path: the file, for messages.
      field: the value of a field of its metadata, None if there is none.
      adds_bos: BOS is put in front of a text.

    Raises:
      UserError: the file has no tokenizer, or one of another kind.
    """
    pieces, scores, types = (field(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    kind = field("tokenizer.ggml.model")
    if kind != "llama" or pieces is None or scores is None or types is None:
        raise UserError(f"{path}: its tokenizer is of the kind {kind!r}; Gemma's is 'llama', with pieces and scores")
    # spaces of tokens that are found before any other are spelled as such
    pieces = [x.replace(" ", SPACE) if of == USER_DEFINED else x for x, of in zip(pieces, types, strict=True)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(pieces, types),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": _post_processor(pieces.index(BOS)) if adds_bos and BOS in pieces else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            # runs of spaces and newlines have the best score, 0, in the SentencePiece model
            "merges": merges(pieces, [0.0 if of == USER_DEFINED else x for x, of in zip(scores, types, strict=True)]),
        },
    }


def _added(pieces: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Returns the tokens that are found in a text before any other."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {
            "id": number,
            "content": piece,
            **plain,
            "special": piece in SPECIAL or (of == CONTROL and not piece.startswith(MARKERS)),
        }
        for number, (piece, of) in enumerate(zip(pieces, types, strict=True))
        if of in (CONTROL, USER_DEFINED)
    ]


def merges(pieces: list[str], scores: list[float]) -> list[list[str]]:
    """Returns the pairs of pieces that make a piece: those of the best score first, of one score the longest parts.

    Pieces a, b, c, ab, bc, abc with scores 0, 0, 0, -1, -2, -3: [a b], [b c], [ab c], [a bc].
    """
    known, found = set(pieces), []
    for piece, score in zip(pieces, scores, strict=True):
        halves = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        pairs = [[left, right] for left, right in halves if left in known and right in known]
        found += [((-score, -len(left), -len(right)), [left, right]) for left, right in pairs]
    # a stable sort: pairs of equal rank stay in the order of their pieces
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


def _post_processor(bos: int) -> dict[str, Any]:
    def part(name: str, number: int) -> dict[str, Any]:
        return {name: {"id": BOS if name == "SpecialToken" else "AB"[number], "type_id": number}}

    first, second = ([part("SpecialToken", n), part("Sequence", n)] for n in (0, 1))
    special = {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}
