"""BOS in front of what a model reads: whether it was trained with one, and whether a tokenizer.json adds one."""

from collections.abc import Mapping
from typing import Any

from t5g2.checkpoint.folder import ModelFolder
from t5g2.core import files
from t5g2.models.config import DualEncoderConfig

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
BOS = "<bos>"


def is_read(folder: ModelFolder) -> bool:
    """True if the prompt of a model begins with BOS.

    A decoder-only model continues BOS. The encoder of an imported model reads what transformers' tokenizer makes: BOS,
    unless the tokenizer.json in its folder says otherwise. (The official sampler of T5Gemma leaves BOS out.) The
    objectives here give an encoder none, so that of a model which was trained here reads none, imported before or not.
    """
    assert not isinstance(folder.config, DualEncoderConfig)
    if not folder.config.is_encoder_decoder:
        return True
    if (folder.provenance or {}).get("kind") != "import":
        return False
    file = folder.path / TOKENIZER_FILE
    return not file.is_file() or is_added(files.read_json_object(file, fix="download it again, or remove it"))


def is_added(tokenizer: Mapping[str, Any]) -> bool:
    """True if the post-processor of a tokenizer.json puts BOS in front of a text."""
    return any(
        part.get("SpecialToken", {}).get("id") == BOS
        for processor in _processors(tokenizer.get("post_processor"))
        for part in processor.get("single") or ()
    )


def with_bos(tokenizer: Mapping[str, Any], *, added: bool) -> dict[str, Any]:
    """Returns a tokenizer.json whose post-processor adds BOS, or does not; other processors of a sequence stay.

    A tokenizer that has no BOS stays as it is.
    """
    ids = [token["id"] for token in tokenizer.get("added_tokens") or () if token["content"] == BOS]
    if not ids:
        return dict(tokenizer)
    processors = [p for p in _processors(tokenizer.get("post_processor")) if p.get("type") != "TemplateProcessing"]
    if added:
        first, second = ([{"SpecialToken": {"id": BOS, "type_id": i}}, _sequence(i)] for i in (0, 1))
        special = {BOS: {"id": BOS, "ids": ids, "tokens": [BOS]}}
        template = {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}
        processors.append(template)
    if len(processors) > 1:
        return {**tokenizer, "post_processor": {"type": "Sequence", "processors": processors}}
    return {**tokenizer, "post_processor": processors[0] if processors else None}


def _sequence(number: int) -> dict[str, Any]:
    return {"Sequence": {"id": "AB"[number], "type_id": number}}


def _processors(processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns the processors of a sequence, or the one that there is."""
    if processor is None:
        return []
    return list(processor["processors"]) if processor.get("type") == "Sequence" else [processor]
