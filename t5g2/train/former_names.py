"""Names that were others before: keys and kinds of configs, flags and saved experiments; modules of config files."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from t5g2.core.errors import UserError

# former name -> today's; each is unique among all keys
FORMER_KEYS = {"piece_tokens": "chunk_tokens", "teaching": "teacher_features"}
# likewise for the values of "kind"; the tables of kinds accept both
FORMER_KINDS = {"answers": "sft", "answers_decoder": "sft_decoder"}
# settings that came later, and the defaults with which a run is the same as without them; no place of a list is given
LATER_SETTINGS: Mapping[str, Any] = {
    "train.max_nonfinite_updates": 0,
    "train.profile_steps": None,
    "train.loss_strategy": "auto",
    "train.hang_timeout_secs": 600.0,
    "train.encoder_offset": None,
    "init.adapt.choices.encoder_scale": 1.0,
    "train.flops": None,
    "optim.ema": None,
    "eval.ema": False,
    "eval.tasks.encoder": "visible",
    "model.probe": None,
    "model.encoder.probe": None,
    "model.decoder.probe": None,
    "compute.offload": False,
    "mesh.context": 1,
    "mesh.slices": 1,
    "mesh.strategy": "axes",
}
# former module -> {name in it: (module, name) of today}; what config files of earlier versions import
FORMER_MODULES = {
    "t5g2.data.chat": {"answer_ids": ("t5g2.data.sources.dialogues", "answer_ids")},
    "t5g2.data.copies": {"cache": ("t5g2.core.files", "cache_folder")},
    "t5g2.data.tokenizer": {"Bytes": ("t5g2.data.tokenizers.byte_level", "Bytes")},
}


def current_path(path: str) -> str:
    """Returns a dotted path under today's names: data.piece_tokens is data.chunk_tokens."""
    return ".".join(FORMER_KEYS.get(key, key) for key in path.split("."))


def current_keys(node: Any) -> Any:
    """Returns nested dicts and lists with today's keys.

    Raises:
      UserError: a key is given under both names.
    """
    if isinstance(node, Mapping):
        for former, current in FORMER_KEYS.items():
            if former in node and current in node:
                raise UserError(f"{former} is the former name of {current}, and both are given; keep {current}")
        return {FORMER_KEYS.get(key, key): current_keys(value) for key, value in node.items()}
    return [current_keys(item) for item in node] if isinstance(node, list | tuple) else node


def former_names(node: Any, path: str = "") -> Any:
    """Returns the inverse of current_keys, kinds included, without later settings that have their defaults.

    Hashes are computed from it, so that neither a new name nor a new setting changes one.
    """
    keys, kinds = ({now: before for before, now in names.items()} for names in (FORMER_KEYS, FORMER_KINDS))
    if isinstance(node, Mapping):
        places = {key: f"{path}.{key}".lstrip(".") for key in node}
        node = {
            keys.get(key, key): former_names(value, places[key])
            for key, value in node.items()
            if places[key] not in LATER_SETTINGS or value != LATER_SETTINGS[places[key]]
        }
        return node | {"kind": kinds.get(node["kind"], node["kind"])} if "kind" in node else node
    return [former_names(item, path) for item in node] if isinstance(node, list | tuple) else node


class _FormerModule(ModuleType):
    """A module that no longer exists; its names are imported from today's modules on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in FORMER_MODULES[self.__name__]:
            raise AttributeError(f"{self.__name__} exists no longer, and {name} is not among the names it still has")
        module, current = FORMER_MODULES[self.__name__][name]
        return getattr(importlib.import_module(module), current)


@contextlib.contextmanager
def former_modules() -> Iterator[None]:
    """Makes modules under their former names importable within the block, for the code of config files alone."""
    added = {name: _FormerModule(name) for name in FORMER_MODULES if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        # those of a config that is being read, whose code has read this one, stay
        for name in added:
            del sys.modules[name]
