"""The tokenizer of a run: that of the weights it starts from, unless the config gives another.

`data.tokenizer` of a config is a tokenizer, or is left out, or is of the kind "of_weights":

    {"kind": "of_weights", "without_weights": {"kind": "bytes", "sentinels": 819}}

Left out, or of this kind, it becomes the tokenizer in the folder of init.params, init.adapt or distill.teacher, the
first that is set; without any of them `without_weights`, by default bytes. A recorded tokenizer whose file is gone, as
from a cache, is looked for there too.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t5g2.checkpoint import import_folder, source_folder
from t5g2.core import settings
from t5g2.core.errors import MachineError, UserError, unknown
from t5g2.core.logs import log
from t5g2.data.tokenizers import registry
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.data.tokenizers.subword import FileTokenizer
from t5g2.models.config import KINDS, LanguageModelConfig
from t5g2.train import adaptation
from t5g2.train.weight_origin import Init

KIND = "of_weights"
FILES = ("tokenizer.json", "tokenizer.model")


class WeightsTokenizer(NamedTuple):
    """The tokenizer beside the weights that a run starts from.

    Attributes:
      setting: the setting that names the folders: "init.params".
      folders: the folders.
      tokenizer: None if there is none in them.
    """

    setting: str
    folders: tuple[str, ...]
    tokenizer: Tokenizer | None

    def __str__(self) -> str:
        return f"{self.setting}, {', '.join(self.folders)}"


def completed(node: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in data.tokenizer where it is left out or of the kind "of_weights", and finds the file of a recorded one.

    Args:
      node: an experiment as plain data.

    Raises:
      UserError: the folder of the weights does not exist or has no tokenizer.
    """
    node, data = dict(node), node.get("data")
    if not isinstance(data, Mapping) or "model" not in node:
        return node
    given = data.get("tokenizer")
    if given is not None and not (isinstance(given, Mapping) and given.get("kind") == KIND):
        node["data"] = {**data, "tokenizer": _found_again(given, node) if isinstance(given, Mapping) else given}
        return node
    fallback = _without_weights(given or {})
    init, teacher = _origins(node)
    model = settings.build(LanguageModelConfig, node["model"], where="config.model", tables=(KINDS,))
    source = of_weights(init, model, teacher)
    if source is None:
        tokenizer: Any = fallback
    elif source.tokenizer is None:
        raise UserError(
            f"{source} has no tokenizer ({' or '.join(FILES)}); put the one that the weights were trained with there, "
            f"or give data.tokenizer"
        )
    else:
        tokenizer = source.tokenizer
    node["data"] = {**data, "tokenizer": tokenizer}
    return node


def of_weights(init: Init, model: LanguageModelConfig, teacher: str | None = None) -> WeightsTokenizer | None:
    """Returns the tokenizer beside the weights that a run starts from, else beside its teacher's; None without either.

    Raises:
      UserError: a folder does not exist or is damaged; two sources have different tokenizers.
    """
    if init.adapt is not None:
        tokenizer = adaptation.source_tokenizer(init.adapt, model)
        return WeightsTokenizer("init.adapt.source", tuple(init.adapt.sources), tokenizer)
    if init.params is not None:
        return WeightsTokenizer("init.params", (init.params,), _read(init.params))
    if teacher is not None:
        return WeightsTokenizer("distill.teacher", (teacher,), _read(teacher))
    return None


def check(tokenizer: Tokenizer, init: Init, model: LanguageModelConfig, *, allow_change: tuple[str, ...] = ()) -> str:
    """Returns a line that says which tokenizer the run has, and whence.

    Raises:
      UserError: the weights have another tokenizer, and `allow_change` does not name data.tokenizer.
    """
    description = describe(tokenizer)
    source = of_weights(init, model)
    if source is None:
        return f"tokenizer: {description}"
    if source.tokenizer is None:
        return (
            f"tokenizer: {description}; the weights of {source} have none beside them, so nothing tells if it is theirs"
        )
    if _same(tokenizer, source):
        return f"tokenizer: {description}, the one of {source}"
    if not {"data", "data.tokenizer"} & set(allow_change):
        raise UserError(
            f"data.tokenizer is {description}, and the weights of {source} belong to {describe(source.tokenizer)}: "
            f"their embeddings would be those of other tokens. Leave data.tokenizer out to take the weights' own, or "
            f"train them on another one on purpose: --allow_change=data.tokenizer"
        )
    return f"tokenizer: {description}, on purpose another one than {describe(source.tokenizer)} of {source}"


def describe(tokenizer: Tokenizer) -> str:
    """Returns kind, file, hash and size of a tokenizer in words."""
    node = tokenizer.to_dict()
    file = f" {node['file']} (sha256 {node['sha256'][:12]}…)" if "file" in node else ""
    return f"{node['kind']}{file} of {tokenizer.vocab_size:,} tokens"


def _same(tokenizer: Tokenizer, source: WeightsTokenizer) -> bool:
    """True if the tokenizer is the one beside the weights, or one of two files of it that lie there."""
    if not (isinstance(tokenizer, FileTokenizer) and isinstance(source.tokenizer, FileTokenizer)):
        return type(tokenizer) is type(source.tokenizer)
    hashes = {source.tokenizer.sha256}
    for path in (source_folder.folder_of(folder) / name for folder in source.folders for name in FILES):
        if path.is_file():
            hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return tokenizer.sha256 in hashes


def _read(folder: str) -> Tokenizer | None:
    folder = str(source_folder.folder_of(folder))
    description = import_folder.read_tokenizer(folder)
    return None if description is None else registry.from_dict(description, folder)


def _origins(node: Mapping[str, Any]) -> tuple[Init, str | None]:
    """Returns an experiment's origin of weights, and its teacher."""
    distill = node.get("distill")
    teacher = distill.get("teacher") if isinstance(distill, Mapping) else None
    return settings.build(Init, node.get("init") or {}, where="config.init"), teacher


def _found_again(recorded: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a recorded tokenizer with its file beside the weights, if its own is gone, as from a cache."""
    file, sha256 = recorded.get("file"), recorded.get("sha256")
    if not isinstance(file, str) or sha256 is None or Path(file).is_file():
        return recorded
    init, teacher = _origins(node)
    sources = init.adapt.sources if init.adapt is not None else [init.params or teacher or ""]
    for source in filter(source_folder.exists, filter(None, sources)):
        try:
            beside = source_folder.folder_of(source) / Path(file).name
        except (UserError, MachineError) as error:
            # what is missing is the tokenizer's file, and the error about that comes
            log.warning("%s is gone, and %s cannot be looked into for the same file: %s", file, source, error)
            continue
        if beside.is_file() and hashlib.sha256(beside.read_bytes()).hexdigest() == sha256:
            return {**recorded, "file": str(beside)}
    return recorded


def _without_weights(node: Mapping[str, Any]) -> Any:
    allowed = ("kind", "without_weights")
    for key in node:
        if key not in allowed:
            raise unknown("key", key, allowed, where=f"of config.data.tokenizer of kind {KIND!r}")
    return node.get("without_weights", {"kind": "bytes"})
