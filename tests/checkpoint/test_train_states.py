"""Train states: what comes back is bit for bit what was saved, or is named, put aside and not used."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P

from t5g2.checkpoint.train_states import Checkpoints
from t5g2.core import tree
from t5g2.core.errors import UserError
from t5g2.core.logs import log


class Block(nnx.Module):
    def __init__(self, key):
        self.up = nnx.Param(jax.random.normal(key, (8, 16)))
        self.scale = nnx.Param(jax.random.normal(key, (8,)).astype(jnp.bfloat16))


class Stack(nnx.Module):
    def __init__(self, key):
        self.slots = nnx.List([jax.vmap(Block)(jax.random.split(jax.random.fold_in(key, p), 2)) for p in range(2)])
        self.tail = nnx.List([Block(key)])


class Model(nnx.Module):
    def __init__(self, key):
        self.layers = Stack(key)
        self.table = nnx.Param(jax.random.normal(key, (24, 8)))


DATA = {"0": [1, 2], "1": [3, 4]}
META = {"seed": 17, "fingerprint": "abc"}
UP = "layers.up.0-2by2"


class State(NamedTuple):
    params: Model
    opt: optax.OptState


@jax.jit
def make(seed=0):
    params = Model(jax.random.key(seed))
    return State(params, optax.adamw(1e-3).init(params))


def on(mesh_shape, x):
    """`x` sharded over the last axis by one mesh axis and the first by the other, where they divide."""
    count = int(np.prod(mesh_shape))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(mesh_shape), ("a", "b"))

    def spec(leaf):
        fits = leaf.ndim > 1 and leaf.shape[-2] % mesh_shape[0] == 0 and leaf.shape[-1] % mesh_shape[1] == 0
        return jax.NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), "a", "b") if fits else P())

    return jax.tree.map(spec, x)


def abstract(x, shardings=None):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, x) if shardings is None else shardings
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), x, shardings)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The text of our warnings, wherever other tests sent the log."""
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name == log.name)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Steps 1 and 2 of two different states, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, *make(step), data=DATA, meta=META)
    return directory


@pytest.fixture
def directory(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def test_comes_back_on_another_mesh(tmp_path, devices):
    saved = jax.device_put(make(), on((4, 2), make()))
    assert len(jax.tree.leaves(saved)[0].sharding.device_set) == 8
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore(abstract(saved.params)) is None
        checkpoints.save(5, *saved, data=DATA, meta=META)
        checkpoints.wait()
        assert checkpoints.steps() == [5]
        for mesh_shape in ((2, 2), (4, 2), (1, 1)):
            shardings = on(mesh_shape, saved)
            restored = checkpoints.restore(*abstract(saved, shardings))
            assert (restored.step, restored.data, restored.meta) == (5, DATA, META)
            assert_equal(State(restored.params, restored.opt), saved)
            assert [x.sharding for x in jax.tree.leaves(restored.params)] == jax.tree.leaves(shardings.params)
        weights = checkpoints.restore(abstract(saved.params), step=5)
        assert weights.opt is None
        assert_equal(weights.params, saved.params)


def test_a_small_array_that_all_devices_hold_is_written_by_one(tmp_path, devices, caplog):
    """To cut it into a part for each would take a program on each device, and as many files."""
    whole = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), ("x",)), P())
    norm = {"scale": jax.device_put(np.ones(64, np.float32), whole)}
    with Checkpoints(tmp_path / "c") as checkpoints, jax.log_compiles(), caplog.at_level("WARNING"):
        checkpoints.save(1, norm, {}, data=DATA, meta=META)
        checkpoints.wait()
    assert not [message for message in caplog.messages if message.startswith("Compiling jit(slice)")]
    [chunk] = [path for path in (tmp_path / "c" / "1" / "params" / "scale" / "c").rglob("*") if path.is_file()]
    assert chunk.stat().st_size >= 4 * 64  # all of it, and what Zarr adds


def test_a_state_without_arrays_is_fine(tmp_path):
    params = make().params
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(0, params, optax.sgd(0.1).init(params), data={}, meta={})
        restored = checkpoints.restore(abstract(params), optax.sgd(0.1).init(params))
    assert_equal(restored.params, params)


def test_state_may_be_donated_at_once(tmp_path):
    saved = make()
    expected = jax.tree.map(np.array, saved)
    destroy = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, *saved, data=DATA, meta=META)
        # XLA takes the buffers unless something still reads them, and then it must not
        destroyed = destroy(saved)
        restored = checkpoints.restore(*abstract(destroyed))
    assert_equal(State(restored.params, restored.opt), expected)


def test_retention_and_no_overwriting(tmp_path):
    params, opt = make()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, params, opt, data=DATA, meta=META)
        checkpoints.wait()
        assert checkpoints.steps() == [6, 7]
        with pytest.raises(FileExistsError, match="step 7 is already saved in"):
            checkpoints.save(7, params, opt, data=DATA, meta=META)
        with pytest.raises(TypeError, match="data would change in JSON"):
            checkpoints.save(8, params, opt, data={0: [1]}, meta=META)


def files_of(directory, step, item, leaf):
    return sorted(p for p in (directory / str(step) / item / leaf).rglob("*") if p.is_file() and p.name != "zarr.json")


def flip(path, *, at=0):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0b100
    path.write_bytes(raw)


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("item", "leaf"), [("params", UP), ("params", "table"), ("opt", f"0.nu.{UP}"), ("opt", "0.count")]
)
def test_damage_is_named_and_the_step_before_is_used(directory, warnings, damage, item, leaf):
    DAMAGES[damage](files_of(directory, 2, item, leaf)[0])
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(*abstract(make()))
        assert restored.step == 1
        assert_equal(State(restored.params, restored.opt), make(1))
        assert checkpoints.steps() == [1]
        assert (directory / "2.damaged").is_dir()
        text = warnings()
        assert text.startswith(f"checkpoint {directory}/2 is damaged:\n  {item}.{leaf}: ")
        assert text.endswith("\nmoved to 2.damaged; the step before is used")
        assert len(re.findall("^  ", text, flags=re.M)) == 1, "only the damaged leaf is named"


def test_a_second_accident_does_not_hide_the_first(directory):
    """Going on from the step before, the damaged one may be saved again."""
    with Checkpoints(directory) as checkpoints:
        for name in ("2.damaged", "2.damaged2"):
            flip(files_of(directory, 2, "params", UP)[0])
            assert checkpoints.restore(*abstract(make())).step == 1
            assert (directory / name).is_dir()
            checkpoints.save(2, *make(2), data=DATA, meta=META)
            checkpoints.wait()
        assert_equal(State(*checkpoints.restore(*abstract(make()))[1:3]), make(2))


def rewrite(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        (f"params/{UP}/zarr.json", rewrite("float32", "int32"), f"params.{UP}"),
        (f"params/{UP}/zarr.json", rewrite('"shape":[2,8,16]', '"shape":[2,8,15]'), f"params.{UP}"),
        (f"params/{UP}/zarr.json", lambda path: path.unlink(), f"params.{UP}"),
        (f"params/{UP}", shutil.rmtree, f"params.{UP}"),
        ("params/_METADATA", lambda path: path.unlink(), "params.table"),
        ("data/data.json", rewrite("[1, 2]", "[1, 3]"), "data"),
        ("data/data.json", lambda path: path.unlink(), "data"),
        ("meta/data.json", rewrite('"seed": 17', '"seed": 18'), "meta"),
        ("meta/data.json", lambda path: path.write_bytes(path.read_bytes()[:50]), "meta"),
        ("meta", shutil.rmtree, "meta"),
    ],
)
def test_damage_beside_the_weights(directory, warnings, file, damage, named):
    before = {path: path.read_bytes() for path in (directory / "2").rglob("*") if path.is_file()}
    damage(directory / "2" / file)
    assert before != {path: path.read_bytes() for path in (directory / "2").rglob("*") if path.is_file()}
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(*abstract(make()))
    assert restored.step == 1
    assert f"\n  {named}: " in warnings()


def test_what_orbax_notes_for_itself_is_not_needed(directory):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (directory / "2" / name).unlink()
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(*abstract(make()))
    assert restored.step == 2
    assert_equal(State(restored.params, restored.opt), make(2))


def test_a_step_under_another_name_is_not_believed(directory, warnings):
    (directory / "2").rename(directory / "3")
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.restore(*abstract(make())).step == 1
    assert "meta: it belongs to step 2" in warnings()


def test_positions_of_another_step_are_not_believed(tmp_path, warnings):
    # whole and sealed, but of another step: with them examples would repeat
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, *make(), data={"0": [step, 0]}, meta=META)
    shutil.copy(tmp_path / "c" / "3" / "data" / "data.json", tmp_path / "c" / "6" / "data" / "data.json")
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(*abstract(make()))
    assert (restored.step, restored.data) == (3, {"0": [3, 0]})
    assert "data: the positions belong to another step" in warnings()


def test_steps_may_be_listed_while_others_are_removed(tmp_path):
    state, listed = make(), []
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(0, *state, data=DATA, meta=META)
        checkpoints.wait()
        # another process, which sees steps come and go
        with Checkpoints(tmp_path / "c", read_only=True) as reader:
            polling = threading.Event()

            def poll():
                while not polling.wait(0.001):  # without a pause it takes the time of those who save
                    listed.append(reader.steps())

            with ThreadPoolExecutor() as pool:
                polled = pool.submit(poll)
                for step in range(1, 15):
                    checkpoints.save(step, *state, data=DATA, meta=META)
                    # asked before the save has been waited for
                    assert checkpoints.steps() == [step]
                polling.set()
                polled.result()
    assert all(listed)


def test_a_step_that_vanishes_while_it_is_listed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, *make(), data=DATA, meta=META)
        checkpoints.wait()
        reload, failures = checkpoints._orbax.reload, [FileNotFoundError("c/0"), FileNotFoundError("c/0")]

        def listing():
            if failures:
                raise failures.pop()
            reload()

        monkeypatch.setattr(checkpoints._orbax, "reload", listing)
        assert checkpoints.steps() == [1]
        monkeypatch.setattr(checkpoints._orbax, "reload", lambda: shutil.rmtree(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match="nowhere"):
            checkpoints.steps()


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    state = make()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, *state, data=DATA, meta=META)
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
        with pytest.raises(
            UserError,
            match=r"step 2 cannot be saved, which needs 0\.0 MiB: .*c: No space left on device \(0\.0 MiB free\); make "
            r"room, .*\. Step 1 is the last that is saved; the same command goes on from there",
        ):
            checkpoints.save(2, *state, data=DATA, meta=META)
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # as TensorStore says it
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing local file "/disk/c/2/zarr.json": Failed writing: Failed to write '
                "432 bytes to file 28: Disk quota exceeded [os_error_code='122']"
            ),
            r"/disk/c/2/zarr\.json: Disk quota exceeded .*make room",
        ),
        (OSError(5, "Input/output error", "/disk/c/2"), r"/disk/c/2: Input/output error; the disk or the network"),
        (
            FileNotFoundError(2, "No such file or directory", "/disk/c"),
            "No such file .*check that the path still exists",
        ),
    ],
)
def test_a_disk_that_fails_during_a_save(tmp_path, monkeypatch, error, message):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, *make(), data=DATA, meta=META)
    checkpoints.wait()

    def fail():
        # inside the errors of the library, as Orbax does it
        raise RuntimeError("save failed") from error

    monkeypatch.setattr(checkpoints._orbax, "wait", fail)
    with pytest.raises(UserError, match=f"step 1 cannot be saved, .*: {message}.* Step 1 is the last that is saved"):
        checkpoints.wait()
    checkpoints.close()  # does not raise it again
    monkeypatch.undo()
    checkpoints._orbax.close()


def test_nothing_intact_is_an_error_now_and_later(directory):
    for step in (1, 2):
        flip(files_of(directory, step, "params", UP)[0])
    for _ in range(2):
        with (
            Checkpoints(directory) as checkpoints,
            pytest.raises(
                UserError, match=r"no checkpoint in .* is intact; damaged: 1.damaged, 2.damaged. To start over"
            ),
        ):
            checkpoints.restore(*abstract(make()))


def test_an_asked_for_step_is_that_step_or_an_error(directory):
    flip(files_of(directory, 2, "params", UP)[0])
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(UserError, match=rf"(?s)2 is damaged:\n  params.{UP}: .*\nUse another step; there are: 1$"):
            checkpoints.restore(abstract(make().params), step=2)
        with pytest.raises(UserError, match=r"step 7 is not in .*; there are: 1, 2"):
            checkpoints.restore(abstract(make().params), step=7)
        assert checkpoints.steps() == [1, 2]


def test_reading_only_moves_nothing(directory, tmp_path, warnings):
    flip(files_of(directory, 2, "params", UP)[0])
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make().params)).step == 1
    assert sorted(os.listdir(directory)) == ["1", "2", "3.orbax-checkpoint-tmp"]
    assert "left where it is; the step before is used" in warnings()
    with pytest.raises(UserError, match="does not exist; give the workdir of a run"):
        Checkpoints(tmp_path / "nowhere", read_only=True)


@pytest.mark.parametrize(
    "cause", [PermissionError("x"), TimeoutError("x"), ValueError("UNAVAILABLE: x"), MemoryError()], ids=repr
)
def test_a_fault_that_is_not_the_files_moves_nothing(directory, monkeypatch, cause):
    def fail(self, step, items):
        raise KeyError("incompatible handler") from cause

    with Checkpoints(directory) as checkpoints:
        monkeypatch.setattr(Checkpoints, "_load", fail)
        with pytest.raises(KeyError, match="incompatible handler"):
            checkpoints.restore(*abstract(make()))
        assert checkpoints.steps() == [1, 2]


def test_another_model_is_not_damage(directory):
    params, opt = make()
    other = jax.tree.map(lambda x: x.astype(jnp.float16) if x.shape == (24, 8) else x, params)
    with Checkpoints(directory) as checkpoints:
        with pytest.raises(
            UserError, match=r"(?s)holds another model.*changed  params.table: float32\[24, 8\] -> float16"
        ):
            checkpoints.restore(abstract(other), abstract(opt))
        with pytest.raises(UserError, match=r"(?s)missing  opt.0.nu.*surplus  opt.0.trace"):
            checkpoints.restore(abstract(params), abstract(optax.sgd(0.1, momentum=0.9).init(params)))
        assert checkpoints.steps() == [1, 2]


def test_killed_while_saving_leaves_what_was_complete(tmp_path):
    """A process saves until it is killed, anywhere; what is found then is intact, and what is half is cleaned up."""
    code = f"""
    import jax, sys
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    import test_train_states as t
    from t5g2.checkpoint.train_states import Checkpoints
    with Checkpoints({str(tmp_path / "c")!r}, keep=2) as checkpoints:
        s = t.make()
        for step in range(max(checkpoints.steps(), default=0) + 1, 10**9):
            checkpoints.save(step, *s, data=t.DATA, meta={{"step": step}})
            print(step, flush=True)
    """
    for extra in (0.0, 0.011, 0.027):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        printed = [int(child.stdout.readline()) for _ in range(3)]
        time.sleep(extra)
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        started = int(rest[-1]) if rest else printed[-1]
        with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
            restored = checkpoints.restore(*abstract(make()))
            assert started - 1 <= restored.step <= started + 1
            assert restored.meta == {"step": restored.step}
            assert_equal(State(restored.params, restored.opt), make())
        assert sorted(os.listdir(tmp_path / "c")) == sorted(map(str, checkpoints.steps()))


@pytest.mark.parametrize("lost", ["meta", "commit_success.txt", "all but opt"])
def test_what_a_killed_removal_has_left_is_removed(directory, warnings, lost):
    """Of a step that would not be kept; one of the newest is damaged, and is reported where it is read."""
    for path in (directory / "1").iterdir():
        if path.name == lost or (lost == "all but opt" and path.name != "opt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(directory, keep=2) as checkpoints:
        assert checkpoints.steps()[-1] == 2
        assert (directory / "1").exists()
    with Checkpoints(directory, keep=1, read_only=True):
        assert (directory / "1").exists()
    with Checkpoints(directory, keep=1) as checkpoints:
        # a step that can still be restored stays until the next save, should the newest be damaged
        assert checkpoints.steps() == ([1, 2] if lost == "commit_success.txt" else [2])
        assert (directory / "1").exists() == (lost == "commit_success.txt")
        assert checkpoints.restore(*abstract(make())).step == 2
        checkpoints.save(3, *make(3), data=DATA, meta=META)
        assert checkpoints.steps() == [3]
    assert not warnings()


def test_what_is_on_disk_is_one_json_of_positions(pristine):
    assert [p.name for p in (pristine / "2" / "data").glob("*.json")] == ["data.json"]
    assert json.loads((pristine / "2" / "data" / "data.json").read_text())["body"] == DATA
    assert set(tree.named(make().params)) <= {p.name for p in (pristine / "2" / "params").iterdir()}


# nesting without end is not here: newer releases of Orbax take it for no metadata, and read the step
@pytest.mark.parametrize("content", [b'{"custom_metadata": "text"}', b'{"item_handlers": 7}', b"[]"])
def test_damaged_metadata_of_orbax_is_named_and_can_be_removed(directory, content):
    """Orbax's error would name no step; nothing in the file is needed."""
    file = directory / "2" / "_CHECKPOINT_METADATA"
    file.write_bytes(content)
    for read_only in (False, True):
        with pytest.raises(UserError, match=r"/2/_CHECKPOINT_METADATA is damaged; it holds nothing that is needed"):
            Checkpoints(directory, read_only=read_only)
    file.unlink()
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(*abstract(make()))
    assert restored.step == 2
    assert_equal(State(restored.params, restored.opt), make(2))
