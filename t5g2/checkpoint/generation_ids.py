"""Ids of the tokens that begin, end and fill up generated text, resolved once for a folder.

    generation_config.json, else config.json, else the tokenizer's <bos>, <eos> and <pad>; each id by itself

The same ids are used by generation and by export. A model folder does not keep the config.json that it was imported
from, so its generation_config.json is completed with the ids of that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.core import files
from t5g2.core.errors import UserError

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "pad_token_id",
    "decoder_start": "decoder_start_token_id",
}
FIX = "download it again, or remove it"


class GenerationIds(NamedTuple):
    """Ids of a folder; None where no file gives one.

    Attributes:
      eos: every id that ends generation.
      decoder_start: first token of an encoder-decoder's decoder; None = bos.
    """

    bos: int | None = None
    eos: tuple[int, ...] | None = None
    pad: int | None = None
    decoder_start: int | None = None


def read(folder: Path) -> GenerationIds:
    """Returns the ids that the configs in a folder give; the tokenizer is not asked.

    Raises:
      UserError: a file is damaged, or an id is not a whole number, or, for eos, a list of them.
    """
    whole = _fields(folder / CONFIG_FILE)
    # in a config.json of several stacks, the ids may be in that of the stack that generates
    stacks = [whole[name] for name in ("decoder", "text_config") if isinstance(whole.get(name), Mapping)]
    sources = [_fields(folder / GENERATION_FILE), whole, *stacks]
    values = {name: next((s[key] for s in sources if s.get(key) is not None), None) for name, key in KEYS.items()}
    for name, value in values.items():
        ids = value if name == "eos" and isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if value is not None and any(type(token) is not int or token < 0 for token in ids):
            raise UserError(f"{folder}: {KEYS[name]} is {value!r}; it must be the id of a token; {FIX}")
        values[name] = tuple(ids) if name == "eos" and value is not None else value
    return GenerationIds(**values)


def read_with_tokenizer(folder: Path) -> GenerationIds:
    """Returns the ids of a folder, those that no config gives by the spellings <bos>, <eos> and <pad>."""
    ids = read(folder)
    spelled = _spelled(folder)
    spelled["eos"] = None if spelled["eos"] is None else (spelled["eos"],)
    return ids._replace(**{name: token for name, token in spelled.items() if getattr(ids, name) is None})


def to_json(ids: GenerationIds) -> dict[str, Any]:
    """Returns the ids as fields of a generation_config.json; a single id of eos is a number, as in the releases."""
    eos = ids.eos if ids.eos is None else ids.eos[0] if len(ids.eos) == 1 else list(ids.eos)
    values = ids._asdict() | {"eos": eos}
    return {KEYS[name]: value for name, value in values.items() if value is not None}


def completed(folder: Path) -> dict[str, Any] | None:
    """Returns a folder's generation_config.json, completed with the ids of its config.json; None if it has neither."""
    return _fields(folder / GENERATION_FILE) | to_json(read(folder)) or None


def _fields(path: Path) -> dict[str, Any]:
    return files.read_json_object(path, fix=FIX) if path.is_file() else {}


def _spelled(folder: Path) -> dict[str, Any]:
    """Returns the ids of <bos>, <eos> and <pad> in the folder's tokenizer; None where it has no such token."""
    pieces, model = (folder / name for name in TOKENIZER_FILES)
    if pieces.is_file():
        added = _fields(pieces).get("added_tokens") or []
        by_spelling = {token["content"]: token["id"] for token in added}
        return {name: by_spelling.get(f"<{name}>") for name in ("bos", "eos", "pad")}
    if not model.is_file():
        return dict.fromkeys(("bos", "eos", "pad"))
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model))
    tokens = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    return {name: token if token >= 0 else None for name, token in tokens.items()}
