"""metrics.jsonl after kills and resumes, rates, what the progress shows."""

import contextlib
import importlib
import io
import json
import logging
import re
import signal
import struct
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from t5g2.core import device as device_module
from t5g2.core import logs, metrics_writer
from t5g2.core.errors import UserError


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_wall(found):
    return [{k: v for k, v in row.items() if k != "wall"} for row in found]


def write_steps(writer, steps):
    """Acts as the loop does: evaluate every 2 steps as the step begins, then train and log the step completed."""
    for step in steps:
        if step % 2 == 0:
            writer.write(step, {"eval/loss": 10.0 - step})
        writer.write(step + 1, {"train/loss": 20.0 - step})


def test_a_row_holds_step_wall_and_floats(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path)
    writer.write(np.int64(3), {"train/loss": jax.numpy.float32(2.5), "bad": float("nan"), "worse": float("inf")})
    writer.close()
    writer.write(4, {"train/loss": 1.0})  # after closing: dropped
    [row] = rows(tmp_path)
    assert row.pop("wall") > 1.6e9
    assert row == {"step": 3, "train/loss": 2.5, "bad": None, "worse": None}
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("resumed", [0, 1, 2, 3, 4])
def test_a_resumed_file_is_as_if_never_stopped(tmp_path, resumed):
    alone = metrics_writer.MetricsWriter(tmp_path / "alone")
    write_steps(alone, range(6))
    alone.close()

    stopped = metrics_writer.MetricsWriter(tmp_path / "stopped")
    write_steps(stopped, range(5))  # goes on past the checkpoint, dies before the next one
    stopped.close()
    again = metrics_writer.MetricsWriter(tmp_path / "stopped", step=resumed)
    write_steps(again, range(resumed, 6))
    again.close()
    assert without_wall(rows(tmp_path / "stopped")) == without_wall(rows(tmp_path / "alone"))


def test_an_evaluation_lost_with_the_process_is_written_after_resuming(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path)
    writer.write(2, {"train/loss": 5.0})
    writer.close()
    again = metrics_writer.MetricsWriter(tmp_path, step=2)
    again.write(2, {"eval/loss": 7.0, "train/loss": 5.0})
    again.close()
    assert without_wall(rows(tmp_path)) == [{"step": 2, "train/loss": 5.0}, {"step": 2, "eval/loss": 7.0}]


@pytest.mark.parametrize("partial", [b'{"step": 2, "train/lo', b'{"step": 2, "wall": 1.0}', b"{"])
def test_a_partial_last_line_is_dropped(tmp_path, partial):
    whole = b'{"step": 1, "wall": 1.0, "train/loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + partial)
    assert len(metrics_writer.read_metrics(tmp_path / "metrics.jsonl")) in (1, 2)  # a reader may come at any moment
    metrics_writer.MetricsWriter(tmp_path, step=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_killed_writer_leaves_at_most_one_partial_line(tmp_path):
    code = f"""
import itertools
from t5g2.core.metrics_writer import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r})
for step in itertools.count():
    writer.write(step, {{"train/loss": step / 2, "text" * 50: 1.0}})
    if step == 200: print("far enough", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "far enough\n"
        child.send_signal(signal.SIGKILL)
    data = (tmp_path / "metrics.jsonl").read_bytes()
    lines = data.split(b"\n")[:-1]
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) > 200


def events(file):
    """The events of a TFRecord file: length (8 bytes), its checksum (4), data, its checksum (4)."""
    data = file.read_bytes()
    while data:
        [length] = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_finds_the_scalars_at_once_and_forgets_what_is_run_again(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path, step=5)
    writer.write(6, {"train/loss": 2.5, "bad": float("nan")})
    [file] = tmp_path.glob("events.out.tfevents.*")
    version, start, scalars = events(file)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (6, event_pb2.SessionLog.START)
    assert scalars.step == 6
    found = {value.tag: value.simple_value for value in scalars.summary.value}
    assert found.keys() == {"train/loss", "bad"}
    assert found["train/loss"] == 2.5
    writer.close()


def test_a_library_is_imported_without_a_module_that_it_can_do_without(tmp_path, monkeypatch):
    """Torch, which tensorboardX would import: hidden for that import alone, and not where it is in use already."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (
        ("heavy", ""),
        *((name, "try:\n    import heavy\nexcept ImportError:\n    heavy = None\n") for name in ("before", "after")),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    with metrics_writer.hidden("heavy"):
        before = importlib.import_module("before")
    heavy = importlib.import_module("heavy")
    with metrics_writer.hidden("heavy"):
        after = importlib.import_module("after")
    assert before.heavy is None
    assert after.heavy is heavy is sys.modules["heavy"]


def test_tensorboard_can_be_left_out(tmp_path):
    writer = metrics_writer.MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"train/loss": 2.5})
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = metrics_writer.MetricsWriter(tmp_path / "run")
    writer.write(1, {"train/loss": 2.5})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_rows_and_goes_on_with_its_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        writer = metrics_writer.MetricsWriter(tmp_path, step=step, wandb_project="t5g2", config={"seed": 1})
        writer.write(step + 1, {"train/loss": 2.5})
        writer.close()
    assert logged == [(1, {"train/loss": 2.5}), (2, {"train/loss": 2.5})]
    assert started[0] == started[1]
    assert started[0]["project"] == "t5g2"
    assert started[0]["config"] == {"seed": 1}


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError,
        match=r"wandb is not installed; run `pip install 't5g2\[wandb\]'`, or name no project",
    ):
        metrics_writer.MetricsWriter(tmp_path, wandb_project="mine")


def test_throughput_leaves_pauses_out():
    now = [0.0]
    throughput = logs.Throughput(clock=lambda: now[0])
    throughput.add(tokens=jax.numpy.int32(300), flops=1e6)
    throughput.add(tokens=100)
    now[0] = 3.0
    with throughput.paused():
        now[0] = 10.0
    now[0] = 11.0
    assert throughput.read() == {"tokens": 100.0, "flops": 2.5e5}
    throughput.add(tokens=6)
    now[0] = 13.0
    assert throughput.read() == {"tokens": 3.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    screen = Terminal()
    progress = logs.Progress(100, step=20, stream=screen)
    progress.advance(30)
    progress.report(40, loss=2.5125, tokens_per_s=12345.0, mfu=0.142)
    progress.close()
    assert "40/100" in screen.getvalue()
    assert "loss 2.513 · 12.3k tokens/s · MFU 14.2 %" in screen.getvalue() or "loss 2.512" in screen.getvalue()


def test_progress_is_lines_elsewhere(capsys):
    logs.setup()
    progress = logs.Progress(100, step=0, stream=io.StringIO())
    progress.advance(30)
    progress.report(50, loss=2.5, tokens_per_s=950.0)
    progress.report(60, loss=2.25, tokens_per_s=4.2e6, mfu=0.5)
    progress.close()
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 50/100 · loss 2.500 · 950 tokens/s · 0:00 left", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 60/100 · loss 2.250 · 4.2M tokens/s · MFU 50.0 % · 0:00 left", second)


def test_other_processes_say_warnings_only(capsys):
    logs.setup(process=3)
    logging.getLogger("t5g2.train").info("quiet")
    logging.getLogger("t5g2.train").warning("disk is full")
    assert re.fullmatch(r"warning: \d\d:\d\d:\d\d \[process 3\] disk is full\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (950, "950"), (999.6, "1k"), (12345, "12.3k"), (4.2e6, "4.2M"), (2e18, "2E"), (3e21, "3Z")],
)
def test_short_numbers(number, text):
    assert logs.short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3599.7, "1:00:00"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert logs.duration(seconds) == text


@pytest.mark.parametrize(
    ("kind", "flops"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12)]
)
def test_named_peaks_count_every_device(monkeypatch, kind, flops):
    device = types.SimpleNamespace(device_kind=kind, platform="tpu")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    peak = device_module.peak()
    assert peak.flops_per_s == 4 * flops
    assert peak.source == f"named bf16 peak of 4 x {kind}"


def test_the_peak_of_a_cpu_is_measured_once(monkeypatch):
    monkeypatch.setattr(device_module, "measure_matmul", lambda size: 1e11)
    peak = device_module.peak()
    assert peak.flops_per_s == 1e11  # the eight simulated devices share the cores
    assert peak.source.startswith("measured float32 matmul on 1 x ")


def test_a_matmul_can_be_measured():
    assert device_module.measure_matmul(64, repeats=2) > 0


def test_words_are_in_metrics_jsonl_and_nowhere_else(tmp_path):
    with contextlib.closing(metrics_writer.MetricsWriter(tmp_path)) as writer:
        writer.write(3, {"train/loss": 2.5}, {"data/batch": "0012abcd"})
    [row] = metrics_writer.read_metrics(tmp_path / "metrics.jsonl")
    assert (row["train/loss"], row["data/batch"]) == (2.5, "0012abcd")
    [events] = [path.read_bytes() for path in tmp_path.glob("events*")]
    assert b"train/loss" in events
    assert b"data/batch" not in events


def test_a_missing_wandb_is_found_before_a_run_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics_writer.check_outputs(None)
    with pytest.raises(
        UserError, match=r"wandb is not installed; run `pip install 't5g2\[wandb\]'`, or name no project"
    ):
        metrics_writer.check_outputs("mine")
