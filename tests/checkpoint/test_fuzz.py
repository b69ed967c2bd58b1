"""Readers of files that others wrote, under random damage: what comes out is right or a UserError, in little memory."""

import contextlib
import copy
import json
import resource
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5g2.checkpoint import flax_tree, hf_config_reader, hf_config_writer, safetensors_io
from t5g2.checkpoint.safetensors_io import INDEX, SINGLE
from t5g2.checkpoint.tensor import Tensor
from t5g2.core import files
from t5g2.core.errors import UserError
from tests import tiny

MIB = 2**20


def fuzz(examples):
    """The same examples at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=checks)


# what is done to valid data

HUGE = st.sampled_from([2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**30, -(2**63), 10**4500])
NUMBERS = st.integers(-3, 300) | HUGE | st.sampled_from([0.5, 1e308, -0.0, 1e-320, float("inf"), float("nan")])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
JUNK = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=3)


def places(node):
    """(container, key) of everything inside."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield node, key
        yield from places(value)


@st.composite
def changed(draw, valid):
    """JSON data with up to three of its values dropped, negated, retyped, doubled or exchanged."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(data))
        if not there:
            break
        node, key = draw(st.sampled_from(there))
        other, other_key = draw(st.sampled_from(there))
        change = draw(st.sampled_from(["drop", "junk", "negate", "double", "exchange", "unknown", "rename"]))
        if change == "drop":
            del node[key]
        elif change == "junk":
            node[key] = draw(JUNK)
        elif change == "negate" and isinstance(node[key], int | float):
            node[key] = -node[key]
        elif change == "double" and isinstance(node[key], int | float | list):
            node[key] = node[key] * 2
        elif change == "exchange":
            node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(node[key])
        elif isinstance(node, dict):
            node[draw(st.text(max_size=8))] = node[key] if change == "rename" else draw(JUNK)
    return data


@st.composite
def scribbled(draw, valid):
    """Bytes with up to four places overwritten, cut out, inserted or repeated, perhaps cut short."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["over", "out", "in", "again", "short"]))
        chunk = draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"0", b"9", b"-", b'"', b"{", b"[", b"\xff"]))
        if change == "over":
            data[at : at + len(chunk)] = chunk
        elif change == "out":
            del data[at : at + len(chunk)]
        elif change == "in":
            data[at:at] = chunk
        elif change == "again":
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
        elif draw(st.booleans()):
            del data[at:]
    return bytes(data)


def as_json(data):
    """json.dumps, of whole numbers that Python does not print by itself too."""
    return json.dumps(data, default=str).encode()


@contextlib.contextmanager
def little_memory(limit):
    """Asserts that the block takes at most `limit` bytes; an allocation of over 1 GiB fails at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1024 * MIB, before[1]))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


def result_or_user_error(work):
    """Returns the result of the work, None if it raised a UserError that can be printed; other errors are raised."""
    try:
        return work()
    except UserError as error:
        message = str(error)
    assert message.encode()
    assert len(message) < 10_000
    return None


# safetensors

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.asarray(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def written(arrays=ARRAYS, **options):
    """The files of a folder by name."""
    tensors = {name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    with tempfile.TemporaryDirectory() as directory:
        safetensors_io.write(Path(directory), tensors, **options)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


FILE = written(single_file=SINGLE)[SINGLE]
START = 8 + int.from_bytes(FILE[:8], "little")
SHARDS = written(shard_bytes=10)


def read_all(folder):
    """Every tensor, after what the library has to say about them."""
    tensors = safetensors_io.read(folder)
    return tensors, {name: tensor.read() for name, tensor in tensors.items()}


def check_folder(files):
    """Reads a folder; what is accepted is what the library reads. Returns whether it was accepted."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with little_memory(MIB):
            found = result_or_user_error(lambda: read_all(folder))
        if found is None:
            return False
        tensors, arrays = found
        for name, x in arrays.items():
            assert (x.shape, x.dtype) == (tensors[name].shape, tensors[name].dtype)
        theirs = {}
        shards = [folder / SINGLE] if INDEX not in files else set(folder.glob("*.safetensors"))
        for shard in shards:
            with safetensors.safe_open(shard, framework="numpy") as file:
                theirs |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert INDEX in files or theirs.keys() == arrays.keys()
        for name, x in arrays.items():
            assert (theirs[name].shape, theirs[name].tobytes()) == (x.shape, x.tobytes())
        return True


@fuzz(600)
@given(scribbled(FILE))
def test_bytes_of_a_file(content):
    check_folder({SINGLE: content})


@fuzz(300)
@given(scribbled(FILE[8:START]))
def test_bytes_of_a_header(header):
    check_folder({SINGLE: len(header).to_bytes(8, "little") + header + FILE[START:]})


@fuzz(600)
@given(changed(json.loads(FILE[8:START])), st.booleans())
def test_values_of_a_header(header, padded):
    try:
        text = as_json(header)
    except ValueError:  # a number that Python refuses to print
        return
    text += b" " * (-len(text) % 8) if padded else b""
    check_folder({SINGLE: len(text).to_bytes(8, "little") + text + FILE[START:]})


@fuzz(200)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda x: len(x).to_bytes(8, "little") + x))
def test_random_bytes(content):
    check_folder({SINGLE: content})


@fuzz(300)
@given(scribbled(SHARDS[INDEX]))
def test_bytes_of_an_index(content):
    check_folder(SHARDS | {INDEX: content})


@fuzz(300)
@given(changed(json.loads(SHARDS[INDEX])))
def test_values_of_an_index(data):
    try:
        text = as_json(data)
    except ValueError:
        return
    check_folder(SHARDS | {INDEX: text})


def test_the_fuzzing_has_something_to_damage():
    """Undamaged, they are accepted, with every tensor."""
    assert check_folder({SINGLE: FILE})
    assert check_folder(SHARDS)
    assert len(SHARDS) > 3


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [10**15, 0], [1] * 65])
def test_a_header_that_claims_much_allocates_nothing(shape):
    size = 4 * int(np.prod(shape, dtype=object))
    header = as_json({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
    assert check_folder({SINGLE: len(header).to_bytes(8, "little") + header}) == (shape == [10**15, 0])


# config.json

CONFIGS = {
    name: hf_config_writer.write(getattr(tiny, name), dtype="float32")[1]
    for name in ("GEMMA2", "GEMMA3", "GEMMA3_IMAGES", "T5GEMMA", "T5GEMMA2", "T5GEMMA2_IMAGES", "SIGLIP")
}
# as released files spell it
OLD = {key: value for key, value in CONFIGS["GEMMA3"].items() if key not in ("layer_types", "rope_parameters")}
CONFIGS["GEMMA3_OLD"] = OLD | {
    "sliding_window_pattern": 2,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_a_config(name):
    """Through bytes, as `import` reads it, and as plain data."""
    assert hf_config_reader.read(CONFIGS[name])[1] is not None

    @fuzz(200)
    @given(changed(CONFIGS[name]))
    def check(data):
        try:
            plain = files.parse_json(as_json(data))
        except ValueError:  # not JSON to begin with: refused before it is a config
            return
        with little_memory(8 * MIB):
            if isinstance(plain, dict):
                result_or_user_error(lambda: hf_config_reader.read(plain))

    check()


# a Flax tree


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("flax") / "model"
    tree = {"transformer/layer_0/mlp/linear": {"w": np.ones((2, 3), np.float32)}}
    tree |= {"transformer/stacked_layers/attention_type_0/x": {"scale": np.ones((2, 3), np.float32)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, tree)
    return path


def test_values_of_the_metadata_of_a_flax_tree(checkpoint):
    valid = json.loads((checkpoint / "_METADATA").read_text())
    folder = shutil.copytree(checkpoint, checkpoint.with_name("copy"))

    @fuzz(150)
    @given(changed(valid))
    def check(data):
        try:
            (folder / "_METADATA").write_bytes(as_json(data))
        except ValueError:
            return
        tensors = result_or_user_error(lambda: flax_tree.read(folder)) or {}
        for tensor in tensors.values():
            x = result_or_user_error(tensor.read)
            assert x is None or (x.shape, x.dtype) == (tensor.shape, tensor.dtype)

    check()
