"""Safetensors files: tensors are read lazily by name, and written one after the other, in shards with an index.

A folder is read by its index, `model.safetensors.index.json`, which maps tensors to files; without an index it holds a
single file, `model.safetensors`. That is the layout of Hugging Face's hub.

A file is 8 bytes (the header's length, little endian), the header (a JSON object: name -> dtype, shape and the range of
its bytes after the header) and the tensors' bytes, without gaps (github.com/huggingface/safetensors, README "Format").
Headers are parsed here, as strictly as in the library, because the library maps the whole file into memory, and the
pages of a tensor that was read count as this process's until the file is closed. Here bytes are read by their offset,
so that only what the caller holds is in memory.
"""

import json
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from t5g2.checkpoint.tensor import Tensor
from t5g2.core import files
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
# the same limit as the library's (safetensors/src/tensor.rs: MAX_HEADER_SIZE); an index gets it too
MAX_JSON_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # NumPy's
METADATA = "__metadata__"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "pytorch_model.bin.index.json")
# names that cannot lead out of the folder, of a file in it or in a folder of it; the file may be a symbolic link, as in
# Hugging Face's cache
SHARD = re.compile(r"([^/\\:.][^/\\:]{0,99}/){0,3}[^/\\:]{1,200}\.safetensors")
BLOCK_BYTES = 64 * 2**20  # an array that is not contiguous is copied in blocks of this size


def read(folder: Path, *, origin: str | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a folder by name, none of them read yet; files are open as long as their tensors live.

    Args:
      origin: what messages on the whole folder name it by, such as its address at the hub; None = its path.

    Raises:
      UserError: there are none, or only pickles; the index or a file is missing, truncated or damaged, or they do not
        agree; a tensor has a dtype that is not in DTYPES.
    """
    file_of_tensor = _weight_map(folder, origin or str(folder))
    tensors: dict[str, Tensor] = {}
    for file in sorted({SINGLE} if file_of_tensor is None else set(file_of_tensor.values())):
        opened = _open_file(folder / file)
        stored = set(opened)
        expected = stored if file_of_tensor is None else {name for name, f in file_of_tensor.items() if f == file}
        # an index of another version of the folder would otherwise mix two models; what is listed and not stored is no
        # harm here, because a model's missing tensors are found when it is opened
        if not stored <= expected:
            raise UserError(
                f"{folder / file} does not hold what {INDEX} lists; missing: {_join_sorted(expected - stored)}; "
                f"surplus: {_join_sorted(stored - expected)}. Write or download the folder again"
            )
        tensors |= opened
    return tensors


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = 5 * 10**9,
    single_file: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the tensors into shards of at most `shard_bytes` (or one tensor), and the index.

    Tensors are read in the order of the mapping, each once, one in memory at a time. The folder exists and no other
    process writes to it; the caller removes it if this fails.

    Args:
      folder: folder of the files.
      tensors: tensors by name; `read` returns an array of the declared shape and dtype.
      shard_bytes: largest size of a file, unless one tensor is larger.
      single_file: name of the file if one is enough, which then has no index; None = always numbered, with an index.
      metadata: entries of each file's header beside the tensors; None = {"format": "np"}. transformers requires
        {"format": "pt"}.

    Raises:
      OSError: an error of the operating system, such as a full disk.
    """
    assert METADATA not in tensors
    shards = list(_split_into_shards(tensors, shard_bytes))
    header = {METADATA: dict(metadata or {"format": "np"})}
    if single_file is not None and len(shards) <= 1:
        _write_file(folder / single_file, tensors, header)
        return
    file_of_tensor = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, header)
        file_of_tensor |= dict.fromkeys(names, file)
    total = sum(tensor.size_bytes for tensor in tensors.values())
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of_tensor})


def _split_into_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
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


def _write_file(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    begins: dict[str, int] = {}
    end, header = 0, dict(header)
    # wide elements first, as the library does, so that every tensor is aligned, which some readers need
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        tensor = tensors[name]
        begins[name], end = end, end + tensor.size_bytes
        offsets = [begins[name], end]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_JSON_BYTES, len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # in the order of the mapping, not of offsets: several processes may compute the tensors together, in this order
        for name, tensor in tensors.items():
            file.seek(8 + len(text) + begins[name])
            _write_tensor(file, name, tensor)


def _write_tensor(file: IO[bytes], name: str, tensor: Tensor) -> None:
    # a function of its own, so that the array is freed before the next one is read
    array = np.asarray(tensor.read())
    actual, declared = (array.dtype, array.shape), (tensor.dtype, tensor.shape)
    assert actual == declared, f"{name} was declared as {declared} and is {actual}"
    for block in _blocks(array):
        file.write(block)


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    """Yields the bytes of an array in C order; an array that is not contiguous is copied block by block."""
    if not array.size:
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = len(rows)
    if not rows.flags.c_contiguous:
        step = max(1, BLOCK_BYTES * len(rows) // rows.nbytes)
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        yield part.reshape(-1).view(np.uint8).data


def _weight_map(folder: Path, origin: str) -> dict[str, str] | None:
    """Returns the file of each tensor; None if there is no index but a single file."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file() and not single.is_file():
        raise no_weights(folder, origin)
    file_of_tensor = _read_index(index) if index.is_file() else None
    if file_of_tensor is not None and single.is_file() and SINGLE not in file_of_tensor.values():
        raise UserError(
            f"{folder} holds {SINGLE} and also {INDEX}, which lists other files; remove the one that does "
            f"not belong to the model"
        )
    return file_of_tensor


def no_weights(folder: Path, origin: str) -> UserError:
    """Returns the error for a folder without safetensors; the message names the weights that the folder has instead.

    Args:
      origin: as in read.
    """
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if pickles:
        shown = ", ".join(pickles[:4]) + (f" and {len(pickles) - 4} more" if len(pickles) > 4 else "")
        return UserError(
            f"{origin} holds its weights only as pickles ({shown}), which can run code when they are opened, so they "
            f"are not opened; load the model with transformers where you trust its source, and write it with "
            f"save_pretrained(DIR, safe_serialization=True)"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    note = f" ({', '.join(other[:4])} {'is' if len(other) == 1 else 'are'} there, without an index)" if other else ""
    return UserError(
        f"{origin} holds no weights: neither {INDEX} nor {SINGLE} is in it{note}; give a folder of safetensors"
    )


def _read_index(path: Path) -> dict[str, str]:
    fix = "write or download the folder again"
    try:
        # the size is checked first: an untrusted index could fill the memory
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has over {MAX_JSON_BYTES} bytes")
        data = files.parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path} is damaged (it is not an object with a weight_map, tensor name -> file name); {fix}")
    for name, file in weight_map.items():
        if not SHARD.fullmatch(file) or not file.isprintable() or len(file.encode()) > 255:
            raise UserError(
                f"{path} lists {_quoted(name)} in {_quoted(file)}; that must be the name of a .safetensors file beside "
                f"it or in a folder there; {fix}"
            )
    return weight_map


class _File:
    """A file that is open for reading until the last reference to it is gone."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> np.ndarray:
        """Returns uint8[size], the bytes from `offset` on."""
        data = np.empty(size, np.uint8)
        done = 0
        try:
            while done < size:  # one call reads at most 2 GiB
                count = os.preadv(self._descriptor, [data.data[done:]], offset + done)
                if not count:
                    raise UserError(f"{self.path} was cut short while it was in use; write or download it again")
                done += count
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return data


class _HeaderEntry(NamedTuple):
    """Entry of one tensor in the header; the range of its bytes counts from the header's end."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; write or download the folder again")
    try:
        files.refuse_lfs_pointer(path)
        file = _File(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    start, header = _read_header(file)
    entries = [_parse_entry(path, name, node) for name, node in header.items() if name != METADATA]
    _check_metadata(path, header.get(METADATA, {}))
    _check_extent(path, entries, file.size - start)
    return {entry.name: _lazy_tensor(file, entry, start + entry.begin) for entry in entries}


def _read_header(file: _File) -> tuple[int, dict[str, Any]]:
    """Returns (the offset of the tensors' bytes, the header)."""
    if file.size < 8:
        raise _damaged(file.path, f"it has {file.size} bytes")
    # the length is untrusted: it is compared with the file before memory is allocated
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > MAX_JSON_BYTES:
        raise _damaged(file.path, f"its header has {length} bytes; at most {MAX_JSON_BYTES} are allowed")
    if 8 + length > file.size:
        raise _damaged(file.path, f"its header has {length} bytes, the file {file.size}")
    text = file.read(8, length).tobytes()
    try:
        header = files.parse_json(text) if text.startswith(b"{") else None
    except ValueError as error:
        raise _damaged(file.path, f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(file.path, "its header is not a JSON object")
    return 8 + length, header


def _parse_entry(path: Path, name: str, node: Any) -> _HeaderEntry:
    if not isinstance(node, dict) or set(node) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{_quoted(name)} is not described by dtype, shape and data_offsets")
    code, shape, offsets = node["dtype"], node["shape"], node["data_offsets"]
    if not isinstance(code, str):
        raise _damaged(path, f"the dtype of {_quoted(name)} is not a name")
    if code not in DTYPES:
        raise UserError(
            f"{_quoted(name)} in {path} has dtype {_quoted(code)}; supported: {', '.join(DTYPES)}. Convert it first"
        )
    dtype = np.dtype(DTYPES[code])
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(
            path, f"the shape of {_quoted(name)} is not a list of at most {MAX_DIMENSIONS} whole numbers >= 0"
        )
    # NumPy multiplies the sizes other than 0, in 63 bits, even where one of them is 0
    if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise _damaged(path, f"{_quoted(name)} has the shape {shape}, more than 2^63 bytes")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"the data_offsets of {_quoted(name)} are not a range")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            path, f"{_quoted(name)}, {code} {shape}, takes {needed} bytes and its range has {offsets[1] - offsets[0]}"
        )
    return _HeaderEntry(name, dtype, tuple(shape), *offsets)


def _check_extent(path: Path, entries: Iterable[_HeaderEntry], size: int) -> None:
    """Raises UserError unless the tensors, in the order of their bytes, fill the file from end to end.

    Bytes that belong to no tensor, or to two, could hide data from other readers, so the library refuses them too.
    """
    end, before = 0, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            fault = "overlaps" if entry.begin < end else "leaves a gap after"
            raise _damaged(path, f"{_quoted(entry.name)} {fault} {before}: it begins at {entry.begin}, not {end}")
        end, before = entry.end, _quoted(entry.name)
    if end != size:
        raise _damaged(path, f"its tensors end with {before} at {end} bytes, but {size} follow the header")


def _check_metadata(path: Path, metadata: Any) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise _damaged(path, f"{METADATA} is not an object of texts")


def _lazy_tensor(file: _File, entry: _HeaderEntry, offset: int) -> Tensor:
    def read() -> np.ndarray:
        return file.read(offset, entry.end - entry.begin).view(entry.dtype).reshape(entry.shape)

    return Tensor(entry.shape, entry.dtype, read)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _quoted(text: str) -> str:
    return ascii(text) if len(text) <= 120 else f"{text[:100]!a} (of {len(text)} characters)"


def _join_sorted(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path} is truncated or damaged ({detail}); write or download it again")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk")
