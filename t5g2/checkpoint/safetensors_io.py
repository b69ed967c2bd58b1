"""Tensors in safetensors files: read lazily by name, written one after the other, in shards with an index.

A folder of them is read by its index, `model.safetensors.index.json`, which says which file holds which tensor; without
one it holds a single file, `model.safetensors`. That is the layout of Hugging Face's hub.

A file is 8 bytes (the header's length, little endian), the header (a JSON object: name -> dtype, shape and the range of
its bytes in what follows) and the tensors' bytes, without gaps (github.com/huggingface/safetensors, README "Format").
Headers are parsed here, as strictly as the library does and by tensor, because the library maps the whole file into
memory, and the pages of a tensor that was read stay counted as this process's until the file is closed. Bytes are read
by their offset instead: what is in memory is what the caller holds.
"""

import json
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

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
# a plain name: it cannot lead out of its folder. What it names may be a symbolic link, as in Hugging Face's cache.
SHARD = re.compile(r"[^/\\:]{1,200}\.safetensors")
BLOCK_BYTES = 64 * 2**20  # what is copied at a time of an array that is not contiguous


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a known shape and dtype that is read or computed when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, none of them read yet; files stay open as long as one of them lives.

    Raises:
      UserError: there are none, or only pickles; the index or a file is missing, truncated, damaged or not what the
        other says; a tensor has a dtype that is not in DTYPES.
    """
    where = _weight_map(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted({SINGLE} if where is None else set(where.values())):
        held = _open_file(folder / file)
        expected = set(held) if where is None else {name for name, at in where.items() if at == file}
        if set(held) != expected:
            raise UserError(
                f"{folder / file} is not what {INDEX} says; missing in it: {_join_sorted(expected - set(held))}; surplus: "
                f"{_join_sorted(set(held) - expected)}. Write or download the folder again"
            )
        tensors |= held
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

    Tensors are read in the order given, each once, and one at a time is in memory. The folder exists and is nobody
    else's; a caller removes it if this fails.

    Args:
      folder: where the files go.
      tensors: by name; what `read` returns has the shape and dtype that was declared.
      shard_bytes: where the next file begins.
      single: if all fit into one file, its name, and there is no index; None = numbered, with an index, always.
      metadata: what the header of each file says beside the tensors; None = {"format": "np"}. transformers asks for
        {"format": "pt"}.

    Raises:
      OSError: as it came, such as a disk that is full.
    """
    assert METADATA not in tensors
    shards = list(_split_into_shards(tensors, shard_bytes))
    header = {METADATA: dict(metadata or {"format": "np"})}
    if single_file is not None and len(shards) <= 1:
        _write_file(folder / single_file, tensors, header)
        return
    where = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, header)
        where |= dict.fromkeys(names, file)
    total = sum(tensor.size_bytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def parse_json(text: bytes) -> Any:
    """Plain data from untrusted JSON, stricter than `json.loads`: UTF-8, no name twice in an object, finite numbers.

    Raises:
      ValueError: it is not that, or nested too deeply.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refused,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
    # wide elements first: every tensor is aligned then, which some readers need. The library writes them so, too.
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
        for name, tensor in tensors.items():  # not by place: several processes may compute them together, in this order
            file.seek(8 + len(text) + begins[name])
            _write_tensor(file, name, tensor)


def _write_tensor(file: IO[bytes], name: str, tensor: Tensor) -> None:
    # a function of its own: the array is let go of before the next one is read
    array = np.asarray(tensor.read())
    found, declared = (array.dtype, array.shape), (tensor.dtype, tensor.shape)
    assert found == declared, f"{name} was declared as {declared} and is {found}"
    for block in _blocks(array):
        file.write(block)


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order; one that is not contiguous is copied in parts."""
    if not array.size:
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = len(rows)
    if not rows.flags.c_contiguous:
        step = max(1, BLOCK_BYTES * len(rows) // rows.nbytes)
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        yield part.reshape(-1).view(np.uint8).data


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file holds which tensor; None = there is no index, and a single file."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file() and not single.is_file():
        raise no_weights(folder)
    where = _read_index(index) if index.is_file() else None
    if where is not None and single.is_file() and SINGLE not in where.values():
        raise UserError(
            f"{folder} holds {SINGLE} and also {INDEX}, which is about other files; remove what does not belong to it"
        )
    return where


def no_weights(folder: Path) -> UserError:
    """The error for a folder without safetensors, which says what it has instead."""
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if pickles:
        shown = ", ".join(pickles[:4]) + (f" and {len(pickles) - 4} more" if len(pickles) > 4 else "")
        return UserError(
            f"{folder} holds its weights only as pickles ({shown}), which can run code when they are opened, so they "
            f"are not; load the model with transformers where you trust its source, and write it with "
            f"save_pretrained(DIR, safe_serialization=True)"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f" ({', '.join(other[:4])} {'is' if len(other) == 1 else 'are'} there, without an index)" if other else ""
    return UserError(
        f"{folder} holds no weights: neither {INDEX} nor {SINGLE} is in it{there}; give a folder of safetensors"
    )


def _read_index(path: Path) -> dict[str, str]:
    again = "write or download the folder again"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has over {MAX_JSON_BYTES} bytes")
        data = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    where = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path} is damaged (it is no object with a weight_map, tensor name -> file name); {again}")
    for name, file in where.items():
        if not SHARD.fullmatch(file) or not file.isprintable() or len(file.encode()) > 255:
            raise UserError(
                f"{path} says that {_quoted(name)} is in {_quoted(file)}; that must be the plain name of a .safetensors "
                f"file beside it; {again}"
            )
    return where


class _File:
    """A file that is open for reading until nobody refers to it."""

    def __init__(self, path: Path):
        self.path = path
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._number)
        self.size = os.fstat(self._number).st_size

    def read(self, offset: int, size: int) -> np.ndarray:
        """uint8[size]: the bytes from `offset` on."""
        data = np.empty(size, np.uint8)
        done = 0
        try:
            while done < size:  # one call reads at most 2 GiB
                count = os.preadv(self._number, [data.data[done:]], offset + done)
                if not count:
                    raise UserError(f"{self.path} was cut short while it was in use; write or download it again")
                done += count
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return data


class _HeaderEntry(NamedTuple):
    """What the header says of one tensor; the range of its bytes counts from the header's end."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _open_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is missing; write or download the folder again")
    try:
        file = _File(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    start, header = _read_header(file)
    entries = [_parse_entry(path, name, about) for name, about in header.items() if name != METADATA]
    _check_metadata(path, header.get(METADATA, {}))
    _check_extent(path, entries, file.size - start)
    return {entry.name: _lazy_tensor(file, entry, start + entry.begin) for entry in entries}


def _read_header(file: _File) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and the header."""
    if file.size < 8:
        raise _damaged(file.path, f"it has {file.size} bytes")
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > MAX_JSON_BYTES:
        raise _damaged(file.path, f"its header has {length} bytes; at most {MAX_JSON_BYTES} are allowed")
    if 8 + length > file.size:
        raise _damaged(file.path, f"its header has {length} bytes, the file {file.size}")
    text = file.read(8, length).tobytes()
    try:
        header = parse_json(text) if text.startswith(b"{") else None
    except ValueError as error:
        raise _damaged(file.path, f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(file.path, "its header is no JSON object")
    return 8 + length, header


def _parse_entry(path: Path, name: str, about: Any) -> _HeaderEntry:
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{_quoted(name)} is not described by dtype, shape and data_offsets")
    code, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(code, str):
        raise _damaged(path, f"the dtype of {_quoted(name)} is no name")
    if code not in DTYPES:
        raise UserError(
            f"{_quoted(name)} in {path} is {_quoted(code)}; supported: {', '.join(DTYPES)}. Convert it first"
        )
    dtype = np.dtype(DTYPES[code])
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"the shape of {_quoted(name)} is no list of at most {MAX_DIMENSIONS} whole numbers >= 0")
    # NumPy multiplies what is not 0, and counts in 63 bits
    if math.prod(size for size in shape if size) * dtype.itemsize >= 2**63:
        raise _damaged(path, f"{_quoted(name)} has the shape {shape}, more than 2^63 bytes")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"the data_offsets of {_quoted(name)} are no range")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _damaged(
            path, f"{_quoted(name)}, {code} {shape}, takes {needed} bytes and was given {offsets[1] - offsets[0]}"
        )
    return _HeaderEntry(name, dtype, tuple(shape), *offsets)


def _check_extent(path: Path, entries: Iterable[_HeaderEntry], size: int) -> None:
    """Raises UserError unless the tensors, in the order of their bytes, fill the file from end to end."""
    at, before = 0, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a gap after"
            raise _damaged(path, f"{_quoted(entry.name)} {what} {before}: it begins at {entry.begin}, not {at}")
        at, before = entry.end, _quoted(entry.name)
    if at != size:
        raise _damaged(path, f"its tensors end with {before} at {at} bytes, but {size} follow the header")


def _check_metadata(path: Path, metadata: Any) -> None:
    texts = [*metadata, *metadata.values()] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and _encodable(text) for text in texts):
        raise _damaged(path, f"{METADATA} is no object of texts")


def _lazy_tensor(file: _File, entry: _HeaderEntry, offset: int) -> Tensor:
    def read() -> np.ndarray:
        return file.read(offset, entry.end - entry.begin).view(entry.dtype).reshape(entry.shape)

    return Tensor(entry.shape, entry.dtype, read)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    broken = next((name for name in found if not _encodable(name)), None)
    if broken is not None:
        raise ValueError(f"{_quoted(broken)} is no text")
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{_quoted(twice)} is in it twice")
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _integer(text: str) -> int | float:
    if text == "-0":
        return -0.0  # a float, as in every other language's JSON
    if len(text) > 32:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{_quoted(text)} is too large a number")
    return number


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _encodable(text: str) -> bool:
    """False of half a surrogate pair, which JSON can spell and nothing can print."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(text: str) -> str:
    return ascii(text) if len(text) <= 120 else f"{text[:100]!a} (of {len(text)} characters)"


def _join_sorted(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path} is truncated or damaged ({detail}); write or download it again")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}); see to its permissions and its disk")
