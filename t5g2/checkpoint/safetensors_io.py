"""Tensors in safetensors files: read lazily by name, written in shards with an index.

A folder of them is read by its index, `model.safetensors.index.json`, which says which file holds which tensor; without
one it holds a single file, `model.safetensors`. That is the layout of Hugging Face's hub.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from t5g2.core.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a known shape and dtype that is read or computed when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Its size in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, none of them read yet; files stay open as long as one of them lives.

    Raises:
      UserError: there are none, a file is missing, truncated or not what the index says.
    """
    index = folder / INDEX
    if index.is_file():
        where = _index(index)
    elif (folder / SINGLE).is_file():
        where = None
    else:
        raise UserError(
            f"{folder} holds no weights: neither {INDEX} nor {SINGLE} is in it; give a folder of safetensors"
        )
    tensors: dict[str, Tensor] = {}
    for file in sorted({SINGLE} if where is None else set(where.values())):
        held = _open(folder / file)
        expected = set(held) if where is None else {name for name, at in where.items() if at == file}
        if set(held) != expected:
            raise UserError(
                f"{folder / file} is not what {INDEX} says; missing in it: {_listed(expected - set(held))}; surplus: "
                f"{_listed(set(held) - expected)}. Write or download the folder again"
            )
        tensors |= held
    return tensors


def write(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes the tensors, in the order given, into shards of at most `shard_bytes` (or one tensor), and the index.

    One shard at a time is in memory. The folder exists and is nobody else's.
    """
    shards = list(_shards(tensors, shard_bytes))
    where = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {name: np.asarray(tensors[name].read(), order="C") for name in names}
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "np"})
        where |= dict.fromkeys(names, file)
    total = sum(tensor.size_bytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.size_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.size_bytes
    if names:
        yield names


def _open(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; write or download the folder again")
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}); write or download it again") from None
    return {name: _tensor(path, file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _tensor(path: Path, file: Any, name: str) -> Tensor:
    view = file.get_slice(name)
    if view.get_dtype() not in DTYPES:
        raise UserError(f"{name} in {path} is {view.get_dtype()}; supported: {', '.join(DTYPES)}. Convert it first")
    dtype = np.dtype(DTYPES[view.get_dtype()])
    return Tensor(tuple(view.get_shape()), dtype, lambda: file.get_tensor(name))


def _index(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); write or download the folder again") from None
    return where


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
