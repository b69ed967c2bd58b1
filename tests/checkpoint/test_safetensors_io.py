"""Safetensors: what is written is what the library reads, one tensor is in memory, and what is wrong is an error."""

import gc
import json
import os
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from t5g2.checkpoint import safetensors_io
from t5g2.checkpoint.safetensors_io import INDEX, SINGLE, read, write
from t5g2.checkpoint.tensor import Tensor
from t5g2.core.errors import UserError

MIB = 2**20


def tensor(x):
    return Tensor(x.shape, x.dtype, lambda: x)


def arrays():
    """Every dtype, odd sizes, no elements, no axes, and arrays that are not contiguous."""
    rng = np.random.default_rng(0)
    found = {f"of.{code}": rng.integers(0, 2, (3, 5)).astype(dt) for code, dt in safetensors_io.DTYPES.items()}
    found |= {"scalar": np.asarray(2.5, np.float32), "none": np.zeros((3, 0, 2), np.float16), "ü €": np.ones(1)}
    found |= {"transposed": rng.normal(size=(7, 5, 3)).transpose(2, 0, 1), "reversed": np.arange(9)[::-2]}
    return found


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    for name, x in expected.items():
        found = tensors[name].read()
        assert (tensors[name].shape, tensors[name].dtype) == (found.shape, found.dtype) == (x.shape, x.dtype), name
        np.testing.assert_array_equal(found, x, err_msg=name)


def by_library(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_there_and_back_and_as_the_library_reads_it(tmp_path, shard_bytes):
    expected = arrays()
    write(tmp_path, {name: tensor(x) for name, x in expected.items()}, shard_bytes=shard_bytes)
    assert_same(read(tmp_path), expected)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in expected.values())}
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    assert (len(files) == 1) == (shard_bytes == 10**9)
    for file in files:
        held, metadata = by_library(tmp_path / file)
        assert metadata == {"format": "np"}
        assert_same({name: tensor(x) for name, x in held.items()}, {name: expected[name] for name in held})
        assert set(held) == {name for name, at in index["weight_map"].items() if at == file}


def test_what_the_library_writes(tmp_path):
    expected = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in arrays().items()}
    safetensors.numpy.save_file(expected, tmp_path / SINGLE)
    assert_same(read(tmp_path), expected)


def test_one_file_without_an_index(tmp_path):
    expected = arrays()
    tensors = {name: tensor(x) for name, x in expected.items()}
    write(tmp_path, tensors, single_file=SINGLE, metadata={"format": "pt"})
    assert os.listdir(tmp_path) == [SINGLE]
    assert by_library(tmp_path / SINGLE)[1] == {"format": "pt"}
    assert_same(read(tmp_path), expected)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two", tensors, single_file=SINGLE, shard_bytes=sum(x.nbytes for x in expected.values()) - 1)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    assert sorted(os.listdir(tmp_path / "two")) == files


def test_no_tensors(tmp_path):
    write(tmp_path, {}, single_file=SINGLE)
    assert read(tmp_path) == {}
    assert by_library(tmp_path / SINGLE)[0] == {}


def test_every_tensor_is_aligned(tmp_path):
    """Some readers look at the bytes where they lie, as elements."""
    expected = {"a": np.ones(3, np.int8), "b": np.ones(1, ml_dtypes.bfloat16), "c": np.ones(2), "d": np.ones(1, "f4")}
    write(tmp_path, {name: tensor(x) for name, x in expected.items()}, single_file=SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert all((start + header[name]["data_offsets"][0]) % x.itemsize == 0 for name, x in expected.items())
    assert_same(read(tmp_path), expected)


def test_tensors_are_read_once_and_in_the_order_given(tmp_path):
    """Whatever the order in the file: several processes may have to compute them together."""
    order = []

    def noted(name, x):
        return Tensor(x.shape, x.dtype, lambda: order.append(name) or x)

    expected = arrays()
    write(tmp_path, {name: noted(name, x) for name, x in expected.items()}, shard_bytes=150)
    assert order == list(expected)


def test_an_array_of_jax_is_written(tmp_path):
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    write(tmp_path, {"x": Tensor(x.shape, np.dtype(x.dtype), lambda: x)}, single_file=SINGLE)
    np.testing.assert_array_equal(read(tmp_path)["x"].read(), np.asarray(x))


@pytest.mark.parametrize("wrong", [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)])
def test_what_is_read_is_what_was_declared(tmp_path, wrong):
    with pytest.raises(AssertionError, match=r"x was declared as .*float32.* and is "):
        write(tmp_path, {"x": Tensor((2, 3), np.dtype(np.float32), lambda: wrong)})


def peak(work):
    """The most bytes that Python and NumPy held while this ran."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [np.ones, lambda shape, dtype: np.ones(shape[::-1], dtype).T], ids=["C", "transposed"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, make, monkeypatch):
    monkeypatch.setattr(safetensors_io, "BLOCK_BYTES", MIB)  # of an array that has to be copied
    shape, dtype = (1024, 2048), np.dtype(np.float32)  # 8 MiB
    tensors = {f"x{i}": Tensor(shape, dtype, lambda: make(shape, dtype)) for i in range(8)}
    assert 8 * MIB <= peak(lambda: write(tmp_path, tensors)) < 11 * MIB
    assert peak(lambda: read(tmp_path)) < 0.2 * MIB
    found = read(tmp_path)
    assert 8 * MIB <= peak(lambda: [found[name].read().sum() for name in found]) < 9 * MIB


def test_files_are_closed_with_the_last_tensor(tmp_path):
    write(tmp_path, {"x": tensor(np.ones(3)), "y": tensor(np.ones(3))}, shard_bytes=1)
    before = len(os.listdir("/proc/self/fd"))
    found = read(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    x = found["x"]
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "elsewhere")  # a folder that was moved meanwhile
    np.testing.assert_array_equal(x.read(), np.ones(3))
    os.truncate(tmp_path / "elsewhere", 90)
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors was cut short while it was in use"):
        x.read()


def test_a_full_disk_is_reported_as_it_is(tmp_path):
    """/dev/full takes nothing: every write to it fails as on a disk without space."""
    (tmp_path / "model-00001-of-00001.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, {"x": tensor(np.ones((1024, 1024)))})
    assert not (tmp_path / INDEX).exists()


# wrong folders


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "a.pth", "b.ckpt", "pytorch_model.bin.index.json"])
def test_pickles_are_not_opened(tmp_path, file):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds its weights only as pickles ({file}), which can run code when they are opened, so they are "
        f"not opened; load the model with transformers where you trust its source, and write it with "
        f"save_pretrained(DIR, safe_serialization=True)"
    )


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    write(tmp_path, {"x": tensor(np.ones(3))}, single_file=SINGLE)
    assert list(read(tmp_path)) == ["x"]


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=rf"holds no weights: neither {INDEX} nor {SINGLE} is in it; give a folder of"):
        read(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"\(model-00001-of-00002.safetensors is there, without an index\); give a"):
        read(tmp_path)


def test_an_index_and_a_file_it_does_not_know(tmp_path):
    write(tmp_path, {"x": tensor(np.ones(3))})
    write(tmp_path, {"x": tensor(np.zeros(3))}, single_file=SINGLE)
    with pytest.raises(UserError, match=rf"holds {SINGLE} and also {INDEX}, which lists other files; remove the"):
        read(tmp_path)


def test_shards_that_hold_something_else(tmp_path):
    x = tensor(np.ones(3))
    write(tmp_path, {"b": x, "a": x, "c": x})
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(("e", "a", "d"), file)}))
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / file} does not hold what {INDEX} lists; missing: d, e; surplus: b, c. Write or download "
        f"the folder again"
    )


def test_an_entry_of_the_index_that_no_file_holds(tmp_path):
    """As lm_head.weight, which is listed and was left out because it is tied."""
    write(tmp_path, {"a": tensor(np.ones(3))})
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file, "lm_head.weight": file}}))
    assert list(read(tmp_path)) == ["a"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file, "b": "model-00009.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00009\.safetensors is missing; write or download the folder again"):
        read(tmp_path)


def test_shards_in_a_folder_of_the_folder(tmp_path):
    (tmp_path / "weights" / "fp32").mkdir(parents=True)
    write(tmp_path / "weights" / "fp32", {"a": tensor(np.arange(3.0))})
    index = json.loads((tmp_path / "weights" / "fp32" / INDEX).read_text())
    nested = {name: f"weights/fp32/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": nested}))
    assert read(tmp_path)["a"].read().tolist() == [0, 1, 2]


OUTSIDE = (
    "/etc/x.safetensors",
    "../x.safetensors",
    "a/../x.safetensors",
    ".a/x.safetensors",
    "a//x.safetensors",
    "a\\x.safetensors",
    "..",
    "",
    "C:x.safetensors",
)
INDICES = {
    "not JSON": ("{", r"Expecting property name"),
    "not UTF-8": ("\xff", "can't decode"),
    "a list": ("[]", "it is not an object with a weight_map, tensor name -> file name"),
    "no map": ("{}", "it is not an object with a weight_map"),
    "a list as map": ('{"weight_map": []}', "it is not an object with a weight_map"),
    "a number as file": ('{"weight_map": {"x": 1}}', "it is not an object with a weight_map"),
    "a name twice": ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x' appears twice"),
    "half a surrogate": (r'{"weight_map": {"\ud800": "a.safetensors"}}', r"'\\ud800' is not text"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", INDICES)
def test_damaged_indices(tmp_path, name):
    text, message = INDICES[name]
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{INDEX} is damaged \(.*{message}.*\); write or download the folder again"):
        read(tmp_path)


@pytest.mark.parametrize("file", [*OUTSIDE, "pytorch_model.bin", "x\0.safetensors", "ü" * 150 + ".safetensors"])
def test_an_index_names_files_beside_it(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"layer.x": file}}))
    with pytest.raises(UserError, match=r"lists 'layer.x' in '.*; that must be the name of a .safetensors file"):
        read(tmp_path)


def test_an_index_that_has_no_end(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(10**12)  # takes no space
    with pytest.raises(UserError, match=r"is damaged \(it has over 100000000 bytes\)"):
        read(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"x": tensor(np.ones(3))}, single_file=SINGLE)
    monkeypatch.setattr(os, "open", refuse)  # the rights of a file do not hold root back
    with pytest.raises(UserError, match=rf"{SINGLE} cannot be read \(Permission denied\); check its permissions and"):
        read(tmp_path)


# wrong files


def held(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), data_offsets=(0, 8)):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}}


def two(first, second):
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in {"x": first, "y": second}.items()
    }


FILES = {
    "empty": (b"", "it has 0 bytes"),
    "no header": (b"\0" * 7, "it has 7 bytes"),
    "header of nothing": (b"\0" * 9, "its header is not a JSON object"),
    "header longer than the file": (held(one(), b"", length=90), r"its header has 90 bytes, the file \d+"),
    "header without end": (
        held(one(), length=2**64 - 1),
        "its header has 18446744073709551615 bytes; at most 100000000",
    ),
    "not UTF-8": (held(b'{"\xff": 1}'), "its header is not JSON: .*can't decode"),
    "UTF-16": (held('{"x": 1}'.encode("utf-16")), "its header is not a JSON object"),
    "not JSON": (held(b'{"x": }'), "its header is not JSON: Expecting value"),
    "NaN": (held(b'{"x": NaN}'), "its header is not JSON: NaN is not JSON"),
    "a list": (held([]), "its header is not a JSON object"),
    "space before it": (held(b" {}", b""), "its header is not a JSON object"),
    "deep": (held(b'{"x":' * 100_000), "its header is not JSON: nested too deeply"),
    "a name twice": (held(b'{"x": 1, "x": 2}'), "its header is not JSON: 'x' appears twice"),
    "half a surrogate": (held(rb'{"\ud800": 1}'), r"'\\ud800' is not text"),
    "a tensor that is none": (held({"x": 3}), "'x' is not described by dtype, shape and data_offsets"),
    "a part is missing": (held({"x": {"dtype": "F32"}}), "'x' is not described by dtype, shape and data_offsets"),
    "a dtype that is none": (held(one(dtype=3)), "the dtype of 'x' is not a name"),
    "a negative shape": (held(one(shape=[-2])), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "half a row": (held(one(shape=[2.0])), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "true rows": (held(one(shape=[True, 2])), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "a shape that is none": (held(one(shape=2)), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "many axes": (held(one(shape=[2] + [1] * 64)), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "an enormous axis": (held(one(shape=[2**63])), "the shape of 'x' is not a list of at most 64 whole numbers >= 0"),
    "infinite": (held(b'{"x": 1e999}'), "its header is not JSON: '1e999' is too large a number"),
    "a number of many digits": (held(one(shape=[10**4000])), "its header is not JSON: a number of 4001 digits"),
    "enormous": (held(one(shape=[2**40, 2**40])), r"'x' has the shape \[\d+, \d+\], more than 2\^63 bytes"),
    "enormous and empty": (held(one(shape=[0, 2**62, 2**62])), r"'x' has the shape .*, more than 2\^63 bytes"),
    "one offset": (held(one(data_offsets=[8])), "the data_offsets of 'x' are not a range"),
    "a negative range": (held(one(data_offsets=[8, 0])), "the data_offsets of 'x' are not a range"),
    "a range from below": (held(one(data_offsets=[-8, 0])), "the data_offsets of 'x' are not a range"),
    "too few bytes for its shape": (
        held(one(data_offsets=[0, 4])),
        r"'x', F32 \[2\], takes 8 bytes and its range has 4",
    ),
    "beyond the file": (
        held(one(shape=[4], data_offsets=[0, 16])),
        "its tensors end with 'x' at 16 bytes, but 8 follow",
    ),
    "truncated": (held(one(), b"\0" * 7), "its tensors end with 'x' at 8 bytes, but 7 follow the header"),
    "bytes after the end": (held(one(), b"\0" * 9), "its tensors end with 'x' at 8 bytes, but 9 follow the header"),
    "a gap": (held(two((0, 3), (5, 8))), "'y' leaves a gap after 'x': it begins at 5, not 3"),
    "a gap before all": (held(two((1, 3), (3, 8))), "'x' leaves a gap after the header: it begins at 1, not 0"),
    "overlap": (held(two((0, 5), (3, 8))), "'y' overlaps 'x': it begins at 3, not 5"),
    "the same bytes twice": (held(two((0, 8), (0, 8))), "'y' overlaps 'x': it begins at 0, not 8"),
    "metadata of numbers": (held({"__metadata__": {"a": 1}}, b""), "__metadata__ is not an object of texts"),
    "metadata of nothing": (held({"__metadata__": None}, b""), "__metadata__ is not an object of texts"),
    "metadata of half a surrogate": (
        held(rb'{"__metadata__": {"a": "\ud800"}}', b""),
        r"its header is not JSON: '\\ud800' is not text",
    ),
    "a long name": (held({"x" * 999: 1}), r"'x{100}' \(of 999 characters\) is not described by"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert caught.match(rf"{SINGLE} is truncated or damaged \(.*{message}.*\); write or download it again$")


# what the library lets pass: it takes the last of two, and notices the rest when an array is made, or not at all
LENIENT = {"a name twice", "many axes", "enormous and empty", "metadata of nothing", "space before it"}


@pytest.mark.parametrize("name", sorted(set(FILES) - LENIENT))
def test_the_library_refuses_them_too(tmp_path, name):
    (tmp_path / SINGLE).write_bytes(FILES[name][0])
    with pytest.raises(safetensors.SafetensorError):
        by_library(tmp_path / SINGLE)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F128", ""])
def test_a_dtype_that_is_not_known(tmp_path, dtype):
    (tmp_path / SINGLE).write_bytes(held(one(dtype=dtype)))
    with pytest.raises(
        UserError, match=rf"'x' in .*{SINGLE} has dtype '{dtype}'; supported: F64, .*BOOL\. Convert it first"
    ):
        read(tmp_path)


def test_a_header_at_the_limit_is_read(tmp_path):
    """The library's limit, and its file: a header may be padded."""
    text = b"{}".ljust(safetensors_io.MAX_JSON_BYTES)
    (tmp_path / SINGLE).write_bytes(held(text, b""))
    assert read(tmp_path) == {}
    assert by_library(tmp_path / SINGLE)[0] == {}
