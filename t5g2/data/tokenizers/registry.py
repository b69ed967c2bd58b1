"""Every kind of tokenizer, by its name in configs."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from t5g2.core import own_classes
from t5g2.core.errors import UserError, unknown
from t5g2.data.tokenizers.base import Tokenizer
from t5g2.data.tokenizers.byte_level import Bytes
from t5g2.data.tokenizers.subword import KINDS, FileTokenizer

BY_NAME: dict[str, type[Tokenizer]] = {"bytes": Bytes} | {name: cls for cls, name in KINDS.items()}


def from_dict(node: Mapping[str, Any], folder: str | PathLike | None = None) -> Tokenizer:
    """Returns the tokenizer of which `node` is the `to_dict`.

    Args:
      folder: the folder of the tokenizer's file, if it has one; None = the working directory.

    Raises:
      UserError: the kind is unknown, the description damaged, or the file missing or changed.
    """
    fields = dict(node)
    kind = str(fields.pop("kind", None))
    if kind not in BY_NAME and not own_classes.is_dotted(kind):
        raise unknown("tokenizer", kind, BY_NAME)
    cls = BY_NAME.get(kind) or own_classes.resolve(kind, (Tokenizer,), where="tokenizer")
    if issubclass(cls, FileTokenizer) and "file" in fields:
        # a description names the file without its folder, so that a model folder can be moved
        fields["file"] = str(Path(folder or "") / str(fields["file"]))
        fields["ids"] = tuple((name, token) for name, token in fields.get("ids", ()))
    try:
        return cls(**fields)
    except TypeError:
        raise UserError(
            f"a {kind} tokenizer is not described by {sorted(fields)}; write the folder again with this version"
        ) from None
