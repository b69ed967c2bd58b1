"""launch/tpu_vm with a played gcloud, whose hosts are folders: what is asked for, and runs that fail or are stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.played_clients import PlayedClients

LAUNCH = Path(__file__).parents[2] / "launch"
# Commands for a host are run by bash in its folder, which is its home; two hosts.
GCLOUD = """
import os, shutil, subprocess
noun, verb, rest = arguments[2], arguments[3], arguments[4:]
hosts = [folder / "host0", folder / "host1"]
flags = dict(word.lstrip("-").partition("=")[::2] for word in rest if word.startswith("--"))
chosen = hosts if flags.get("worker") == "all" else hosts[int(flags.get("worker", 0)):][:1]
if verb == "describe":
    states = (folder / "states").read_text().split()
    (folder / "states").write_text(" ".join(states[1:] or states))
    print(states[0])
elif verb == "ssh":
    for host in chosen:
        host.mkdir(exist_ok=True)
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=host, env=os.environ | {"HOME": str(host)})
        if done.returncode:
            sys.exit(done.returncode)
elif verb == "scp" and ":" in rest[2]:
    for host in chosen:
        host.mkdir(exist_ok=True)
        shutil.copy(rest[1], host / rest[2].partition(":")[2])
elif verb == "scp":
    source = rest[1].partition(":")[2]
    shutil.copytree(chosen[0] / source, pathlib.Path(rest[2]) / pathlib.Path(source).name)
"""
# Stands for `t5g2` on a host: ends with the next of its statuses, or waits for SIGTERM.
T5G2 = f"""#!{sys.executable}
import pathlib, signal, sys
home = pathlib.Path.home()
with open(home / "starts", "a") as file:
    print(*sys.argv[1:], sep="|", file=file)
def save(number, frame):
    (home / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
status, *others = (home / "statuses").read_text().split()
(home / "statuses").write_text(" ".join(others))
if status == "waits":
    print("waiting", flush=True)
    signal.pause()
sys.exit(int(status))
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    clients = PlayedClients(tmp_path / "clients", monkeypatch)
    clients.play("gcloud", GCLOUD)
    clients.play("sleep", "")
    monkeypatch.setenv("ZONE", "z")
    return clients


def pod(*arguments, **environ):
    return subprocess.run(
        [LAUNCH / "tpu_vm" / "pod.sh", *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


# of a slice that can be asked for
SIZE = {"TYPE": "v5p-16", "VERSION": "x"}


def installed(cloud, *statuses):
    """Two hosts as `install` leaves them, whose commands end with these statuses."""
    for host in (cloud.folder / "host0", cloud.folder / "host1"):
        for folder in ("t5g2/launch", "venv/bin"):
            (host / folder).mkdir(parents=True)
        (host / "t5g2" / "launch" / "tpu_vm").symlink_to(LAUNCH / "tpu_vm")
        (host / "venv" / "bin" / "t5g2").write_text(T5G2)
        (host / "venv" / "bin" / "t5g2").chmod(0o755)
        (host / "statuses").write_text(" ".join(map(str, statuses)))
    return cloud.folder / "host0", cloud.folder / "host1"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def ended(host):
    """True if the host's last command has ended."""
    try:
        os.kill(int((host / "t5g2.pid").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_a_slice_is_asked_for_until_it_is_there(cloud):
    (cloud.folder / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = pod("create", "mine", TYPE="v5p-16", VERSION="v2-alpha-tpuv5", SPOT="1", PROJECT="lab")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "mine: ACTIVE")
    create, *others = [call for call in cloud.take_calls() if call.startswith("gcloud")]
    assert create == (
        "gcloud compute tpus queued-resources create mine --node-id=mine --accelerator-type=v5p-16 "
        "--runtime-version=v2-alpha-tpuv5 --spot --zone=z --project=lab"
    )
    describe = "gcloud compute tpus queued-resources describe mine --format=value(state.state) --zone=z --project=lab"
    assert others == [describe] * 3
    (cloud.folder / "states").write_text("FAILED")
    assert pod("create", "mine", TYPE="v5p-16", VERSION="x").returncode == 1


def test_this_folder_goes_to_all_hosts(cloud, tmp_path, monkeypatch):
    """The copy is installed; the environments of this machine stay here."""
    source = tmp_path / "source"
    (source / ".venv").mkdir(parents=True)
    (source / ".venv" / "large").touch()
    (source / "constraints").mkdir()
    monkeypatch.chdir(source)
    for file in ("pyproject.toml", "constraints/py312.txt"):
        # else whatever is in the folder would be copied: a home, with its keys
        done = pod("install", "mine")
        assert (done.returncode, f"{source} is not the folder of t5g2's source" in done.stderr) == (2, True)
        (source / file).touch()
    assert cloud.take_calls() == []
    cloud.play("python3", "")
    assert pod("install", "mine", SETUP="touch mounted").returncode == 0
    for host in (cloud.folder / "host0", cloud.folder / "host1"):
        assert (host / "mounted").exists()
        assert sorted(path.name for path in (host / "t5g2").iterdir()) == ["constraints", "pyproject.toml"]
    assert (
        f"python3 -m uv pip install --python {host}/venv/bin/python --constraint constraints/py312.txt .[tpu]"
        in cloud.take_calls()
    )


def test_a_run_on_all_hosts_goes_on_by_itself_and_is_tried_again(cloud):
    hosts = installed(cloud, 1, 0)
    assert pod("run", "mine", "train", "--config=a b", "--config.x='c'").returncode == 0
    for host in hosts:
        wait_for(lambda host=host: ended(host))
        assert (host / "starts").read_text() == "train|--config=a b|--config.x='c'\n" * 2
        assert "exit status 1; the command starts again (1 of 3)" in (host / "t5g2.log").read_text()


def test_a_run_that_is_stopped_saves(cloud):
    hosts = installed(cloud, "waits", 0)
    assert pod("run", "mine", "train").returncode == 0
    for host in hosts:
        wait_for(lambda host=host: (host / "t5g2.log").exists() and "waiting" in (host / "t5g2.log").read_text())
    assert pod("stop", "mine").returncode == 0
    for host in hosts:
        wait_for(lambda host=host: ended(host))
        assert (host / "saved").exists()
        assert (host / "starts").read_text() == "train\n", "it is not started again"


def test_what_a_run_left_is_collected_and_the_slice_deleted(cloud, tmp_path):
    (cloud.folder / "host0" / "runs" / "a").mkdir(parents=True)
    (cloud.folder / "host0" / "runs" / "a" / "metrics.jsonl").write_text("{}")
    assert pod("collect", "mine", "runs/a", str(tmp_path)).returncode == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "{}"
    assert pod("delete", "mine").returncode == 0
    assert cloud.take_calls()[-1] == "gcloud compute tpus queued-resources delete mine --force --quiet --zone=z"


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((), {}, "launch/tpu_vm/pod.sh run my-slice train"),
        (("create",), {}, "export ZONE=us-east5-a"),
        (("start", "mine"), {}, "launch/tpu_vm/pod.sh delete my-slice"),
        (("run", "mine"), {}, "launch/tpu_vm/pod.sh run my-slice train"),
        (("create", "mine"), {}, "give TYPE, such as v5p-16, and VERSION"),
        (("create", "mine"), {"ZONE": ""}, "ZONE is not set; say where the slice is"),
        (("create", "mine"), SIZE | {"SPOT": "0"}, "SPOT=0; give 1 for Spot VMs, or unset it"),
        (("create", "mine"), SIZE | {"SPOT": "false"}, "SPOT=false; give 1 for Spot VMs"),
        (("create", ""), SIZE, "the slice is called ''; give a name of small letters, digits and hyphens"),
        (("create", "my slice"), SIZE, "the slice is called 'my slice'; give a name"),
        (("delete", "--quiet"), {}, "the slice is called '--quiet'; give a name"),
        (("run", "mine", "train"), {"RETRIES": "many"}, "RETRIES=many; give a number from 0"),
    ],
)
def test_what_is_missing_is_said(cloud, arguments, environ, message):
    done = pod(*arguments, **environ)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.take_calls() == []


@pytest.mark.parametrize(
    ("statuses", "retries", "status", "starts"),
    [("0", 3, 0, 1), ("2 0", 3, 2, 1), ("134 137 1", 2, 1, 3), ("1 0", 0, 1, 1)],
)
def test_a_host(tmp_path, statuses, retries, status, starts):
    (tmp_path / "statuses").write_text(statuses)
    (tmp_path / "t5g2").write_text(T5G2)
    environ = os.environ | {"HOME": str(tmp_path), "RETRIES": str(retries)}
    command = [LAUNCH / "tpu_vm" / "host.sh", sys.executable, tmp_path / "t5g2", "train"]
    assert subprocess.run(command, env=environ, capture_output=True, check=False).returncode == status
    assert (tmp_path / "starts").read_text() == "train\n" * starts


@pytest.mark.parametrize(
    ("program", "retries", "message"),
    [
        ("true", "many", "launch/tpu_vm/host.sh: RETRIES=many; give a number from 0"),
        ("no-such-program", "3", "launch/tpu_vm/host.sh: no-such-program is no program here"),
    ],
)
def test_a_host_that_cannot_begin(program, retries, message):
    command, environ = [LAUNCH / "tpu_vm" / "host.sh", program], os.environ | {"RETRIES": retries}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "starts again" not in done.stderr


def test_a_host_without_a_command():
    done = subprocess.run([LAUNCH / "tpu_vm" / "host.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: launch/tpu_vm/host.sh COMMAND" in done.stderr


def test_a_host_that_is_told_to_end(tmp_path):
    (tmp_path / "statuses").write_text("waits 0")
    (tmp_path / "t5g2").write_text(T5G2)
    command = [LAUNCH / "tpu_vm" / "host.sh", sys.executable, tmp_path / "t5g2"]
    child = subprocess.Popen(command, env=os.environ | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 143
    assert (tmp_path / "saved").exists()
