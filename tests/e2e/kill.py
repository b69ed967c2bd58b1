"""Commands that are killed, stopped or robbed of a worker at random instants, and run again.

    python -m tests.e2e.kill --instants=200 --seed=0     # prints a table by command and signal; some 10 s an instant
    python -m tests.e2e.kill --commands=train,tokenize --signals=worker

A trial runs one command in a folder of its own, sends it a signal at a random instant, up to CHAIN times in a row, and
runs it to the end. The signals:

    group   SIGKILL to the whole process group, as a scheduler or the machine's end does it
    worker  SIGKILL to one worker process, as the kernel does it where memory is short
    term    SIGTERM to the whole process group, as before a preemption
    stop    SIGSTOP to the whole process group, and SIGCONT some time later

After each, what is there under its final name is what an undisturbed run writes (nothing is half-written), no process
is left, the exit status is right, and it is said that a worker has died. At the end of a trial everything is there, bit
for bit, and no temporary file is left.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import CONFIG, command, environment, write_corpus
from tests.e2e.run_results import checksums, metrics, saved_steps

CHAIN, PROMPTS, TEXTS = 3, 24, 300
SAVE_STEPS = 4  # of tests/e2e/config.py
# share of the instants at which the command has not yet written anything
EARLY = 0.2
# for ends and rests of processes, which are there or are not: no measurement
PATIENCE_SECS = 300
# a worker's death is told by a message, unless the worker had nothing left to do
WORKER_DIED = "a worker process ended with exit code -9"
TASKS = """
from t5g2.eval.tasks import ChooseByLikelihood, GenerateAndCompare, TextLoss

DATA = [{"q": f"{n} cats", "a": str(n % 2)} for n in range(12)]


def get_tasks():
    shared = {"data": DATA, "template": "{q}"}
    return [
        TextLoss(data=DATA, name="loss", target="{q}"),
        ChooseByLikelihood(**shared, name="choice", choices=("0", "1"), answer="{a}"),
        GenerateAndCompare(**shared, name="words", reference="{a}", max_new_tokens=4),
    ]
"""
STATUS = {"group": (-9,), "worker": (0, 1), "term": (0, 143, -15), "stop": (0,)}


@dataclass(frozen=True)
class Job:
    """A command that trials disturb.

    Attributes:
      arguments: the command line in the folder of a trial.
      results: {name: value} of what the folder holds under final names, complete or not.
      inputs: folders that are copied into that of a trial.
      has_workers: some of its work is done by processes of its own.
      overwrites: False if it refuses what it has written: killed after that, it is done.
    """

    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], Mapping[Any, Any]]
    inputs: Sequence[Path] = ()
    has_workers: bool = False
    overwrites: bool = True

    @property
    def signals(self) -> list[str]:
        """Names of the signals that it can be sent."""
        return [name for name in STATUS if self.has_workers or name != "worker"]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed: its results, how long it took, and when it first wrote something, in seconds."""

    results: Mapping[Any, Any]
    seconds: float
    first_write: float


@dataclass
class Instant:
    """A signal that a command was sent, and what was wrong after it."""

    job: str
    signal: str
    status: int
    faults: list[str] = field(default_factory=list)
    is_identical: bool = False


def jobs(folder: Path) -> dict[str, Job]:
    """Returns the jobs by name, and makes the texts that they read in the folder; see `prepare` for the rest."""
    corpus, texts = write_corpus(folder / "corpus"), folder / "texts"
    texts.mkdir()
    for i in range(TEXTS):
        (texts / f"{i:03}.txt").write_text(f"{i} cats and dogs " * 400)
    heldout = {"kind": "text", "path": f"{corpus}/heldout"}
    tasks = [
        {"kind": "heldout_loss", "text": heldout, "objective": {"kind": "ul2"}, "examples": 8},
        {"kind": "samples", "text": heldout, "examples": 1, "prompt_tokens": 24, "span_tokens": 4, "max_new_tokens": 8},
    ]
    run = [f"--config={CONFIG}:scratch@{corpus}", f"--config.eval.tasks={tasks!r}"]
    train = [*run, "--config.eval.every_steps=8", "--config.data.workers=2", "--config.log.tensorboard=False"]
    finished, source = folder / "train-alone" / "run", f"--config={CONFIG}:source@{corpus}"
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i} cats"}}\n' for i in range(PROMPTS)))
    task_file = folder / "tasks.py"
    task_file.write_text(TASKS)
    model, text = f"{folder}/source/model", "--config.data.sources.0.text"
    written = {"kind": "text", "path": str(texts)}
    return {
        "train": Job(
            lambda trial: ["train", *train, f"--workdir={trial}/run"], lambda trial: trained(trial / "run"), (), True
        ),
        "evaluate": Job(
            lambda trial: ["evaluate", *run, f"--workdir={trial}/run"],
            lambda trial: hashes(trial / "run" / "evaluations"),
            (finished,),
        ),
        "evaluate-folder": Job(
            lambda trial: ["evaluate", f"--model={model}", f"--tasks={task_file}", f"--out={trial}/scores"], hashes
        ),
        "average": Job(
            lambda trial: ["average", f"--workdir={finished}", "--last=2", f"--out={trial}/averaged"],
            hashes,
            overwrites=False,
        ),
        "cache-logits": Job(
            lambda trial: ["cache-logits", source, f"--teacher={model}", f"--out={trial}/logits", "--per_token=8"],
            lambda trial: hashes(trial, without="plan.json"),
        ),
        "tokenize": Job(
            lambda trial: ["tokenize", source, f"--out={trial}/tokens", f"{text}={written!r}", "--workers=2"],
            lambda trial: hashes(trial, without="plan.json"),
            (),
            True,
        ),
        "generate": Job(
            lambda trial: [
                "generate",
                *(f"--model={model}", f"--input={prompts}", f"--out={trial}/out.jsonl", "--max_new_tokens=8"),
            ],
            hashes,
            overwrites=False,
        ),
    }


def prepare(chosen: Mapping[str, Job], folder: Path) -> dict[str, Undisturbed]:
    """Makes the run and the model that jobs read; returns the undisturbed runs of the chosen jobs by name."""
    if {"cache-logits", "evaluate-folder", "generate"} & chosen.keys():
        small = ["--config.train.steps=5", "--config.save.every_steps=0", "--config.log.tensorboard=False"]
        source = f"--config={CONFIG}:source@{folder}/corpus"
        finish(["train", source, *small, f"--workdir={folder}/source"])
    # train comes first: the others read its run
    return {name: undisturbed(job, folder / f"{name}-alone") for name, job in chosen.items()}


def trained(workdir: Path) -> dict[Any, Any]:
    """Returns the metrics, samples, model and leaves of a run; steps that are saved at a signal are left out."""
    steps = [step for step in saved_steps(workdir) if step and step % SAVE_STEPS == 0 and has_record(workdir, step)]
    leaves = {("leaf", step, name): value for step in steps for name, value in checksums(workdir, step).items()}
    recorded = metrics(workdir) if (workdir / "metrics.jsonl").exists() else {}
    return leaves | recorded | hashes(workdir / "samples") | hashes(workdir / "model")


def has_record(workdir: Path, step: int) -> bool:
    """False for a step whose removal was killed halfway; the next start ends it."""
    return any((workdir / "checkpoints" / str(step) / "meta").glob("*.json"))


def hashes(folder: Path, *, without: str = "") -> dict[str, str]:
    """Returns the hash of each file by its path; files with temporary names, and one other, are left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (without, ".stderr") and not is_temporary(path.relative_to(folder))
    }


def is_temporary(path: Path) -> bool:
    """True for the temporary names of core/files.py and of Orbax, and for what is inside of such folders."""
    return any(part.endswith((".part", ".tmp")) or ".orbax-checkpoint-tmp" in part for part in path.parts)


def finish(arguments: list[str]) -> None:
    """Runs a command to its end."""
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    """Runs a job alone; of a run, all steps are kept, so that each that a disturbed one saves can be compared."""
    begin_trial(job, folder)
    keep = ["--config.save.keep=1000"] if job.arguments(folder)[0] == "train" else []
    before, start, first = existing(folder), time.monotonic(), None
    process = launch([*job.arguments(folder), *keep], folder)
    while process.poll() is None:
        if first is None and existing(folder) != before:
            first = time.monotonic() - start
        time.sleep(0.01)
    seconds = time.monotonic() - start
    assert process.returncode == 0, stderr(folder)
    left = leftovers(folder)
    assert not left, left
    return Undisturbed(dict(job.results(folder)), seconds, first or seconds)


def begin_trial(job: Job, folder: Path) -> None:
    """Makes the folder of a trial."""
    folder.mkdir()
    for source in job.inputs:
        # links: a command only reads its inputs, and files are replaced, never written into
        subprocess.run(["cp", "-rl", source, folder / source.name], check=True)


def existing(folder: Path) -> set[Path]:
    """The paths of a folder, but for what its process prints."""
    return {path for path in folder.rglob("*") if path.name != ".stderr"}


def leftovers(folder: Path) -> list[str]:
    """Returns the temporary files and folders in a folder, and what a removal has left of a step."""
    workdir = folder / "run"
    half = [workdir / "checkpoints" / str(step) for step in saved_steps(workdir) if not has_record(workdir, step)]
    parts = [path for path in folder.rglob("*") if is_temporary(Path(path.name))]
    return sorted(str(path.relative_to(folder)) for path in (*half, *parts))


def launch(arguments: list[str], folder: Path) -> subprocess.Popen:
    """Starts a command as the leader of a session, whose stderr goes to a file."""
    with open(folder / ".stderr", "w") as file:
        return subprocess.Popen(
            command(*arguments), stdout=subprocess.DEVNULL, stderr=file, env=environment(), start_new_session=True
        )


def stderr(folder: Path) -> str:
    """Returns what the last command has printed to stderr."""
    return (folder / ".stderr").read_text(errors="replace")


def members(session: int) -> list[int]:
    """Returns the processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def workers(session: int) -> list[int]:
    """Returns the worker processes of a session, ascending."""
    found = []
    for pid in members(session):
        try:
            if b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return sorted(found)


def disturb(process: subprocess.Popen, name: str, draw: random.Random, reference: Undisturbed) -> bool:
    """Sends a signal at a random instant; returns False if the command has ended before."""
    span = (0.0, reference.first_write) if draw.random() < EARLY else (reference.first_write, reference.seconds)
    instant, rest, choice = draw.uniform(*span), draw.uniform(0.1, 0.8), draw.random()
    wait(process, instant)
    if name == "worker":
        end = time.monotonic() + PATIENCE_SECS
        while not workers(process.pid) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        wait(process, draw.uniform(0, reference.seconds - reference.first_write) / 2)
    pids = workers(process.pid) if name == "worker" else []
    if process.poll() is not None or (name == "worker" and not pids):
        process.wait()
        return False
    if name == "worker":
        os.kill(pids[int(choice * len(pids))], signal.SIGKILL)
    else:
        os.killpg(process.pid, {"group": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[name])
    if name == "stop":
        time.sleep(rest)
        os.killpg(process.pid, signal.SIGCONT)
    end_of(process)
    return True


def end_of(process: subprocess.Popen) -> None:
    """Waits for the end of a command; what hangs is killed, and its exit status is then a fault."""
    try:
        process.wait(PATIENCE_SECS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        process.wait()


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Waits a while, or until the command has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def faults_of(instant: Instant, process: subprocess.Popen, folder: Path, job: Job, reference: Undisturbed) -> list[str]:
    """Returns what is wrong after a signal."""
    faults, text = [], stderr(folder)
    if instant.status not in STATUS[instant.signal]:
        faults.append(f"exit status {instant.status}")
    if "Traceback" in text:
        faults.append("traceback")
    if instant.status == 1 and WORKER_DIED not in text:
        faults.append("no message")
    end = time.monotonic() + PATIENCE_SECS / 10
    while (left := members(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        faults.append(f"{len(left)} processes left")
    wrong = [name for name, value in job.results(folder).items() if reference.results.get(name) != value]
    if wrong:
        faults.append(f"half-written or wrong: {wrong[:3]}")
    return faults


def trial(name: str, job: Job, signals: Sequence[str], folder: Path, draw: random.Random, reference: Undisturbed):
    """Returns the instants of a trial: at most as many as signals are given, fewer if the command ends before."""
    begin_trial(job, folder)
    instants = []
    for number in signals:
        process = launch(job.arguments(folder), folder)
        reached = disturb(process, number, draw, reference)
        if reached:
            instants.append(Instant(name, number, process.returncode))
            instants[-1].faults += faults_of(instants[-1], process, folder, job, reference)
        if not reached or process.returncode == 0:
            break
    else:
        process = launch(job.arguments(folder), folder)
        end_of(process)
    last = instants[-1] if instants else Instant(name, "none", 0)
    is_done = not job.overwrites and "exists already" in stderr(folder)
    if process.returncode != 0 and not is_done:
        last.faults.append(f"run again: exit status {process.returncode}: {stderr(folder)[-500:]}")
    if left := leftovers(folder):
        last.faults.append(f"left: {left[:3]}")
    results = job.results(folder)
    # of a run, only the newest steps are kept
    missing = [key for key in reference.results if key not in results and not is_old_leaf(key, results)]
    wrong = [key for key, value in results.items() if reference.results.get(key) != value]
    if missing or wrong:
        last.faults.append(f"not identical: missing {missing[:3]}, wrong {wrong[:3]}")
    for instant in instants:
        instant.is_identical = not (missing or wrong)
    return instants if instants or not last.faults else [last]


def is_old_leaf(key: Any, results: Mapping[Any, Any]) -> bool:
    """True for a leaf of a step before the last that a finished run holds."""
    newest = max((other[1] for other in results if other[0] == "leaf"), default=0)
    return key[0] == "leaf" and key[1] < newest


def trials(
    folder: Path, *, instants: int, seed: int, commands: Sequence[str] = (), signals: Sequence[str] = ()
) -> Iterator[list[Instant]]:
    """Yields the instants of trial after trial, until there are enough; commands and signals take turns."""
    draw = random.Random(seed)
    chosen = {name: job for name, job in jobs(folder).items() if not commands or name in commands}
    references = prepare(chosen, folder)
    count = number = 0
    while count < instants:
        name = list(chosen)[number % len(chosen)]
        allowed = [signal for signal in chosen[name].signals if not signals or signal in signals]
        turn = number // len(chosen)
        chain = [allowed[turn % len(allowed)], *draw.choices(allowed, k=CHAIN - 1)][: instants - count]
        done = trial(name, chosen[name], chain, folder / f"{number:03}-{name}", draw, references[name])
        if not any(instant.faults for instant in done):
            subprocess.run(["rm", "-rf", folder / f"{number:03}-{name}"], check=True)
        count, number = count + len(done), number + 1
        yield done


def table(instants: Sequence[Instant]) -> str:
    """Returns a row for each command and signal."""
    lines = ["| command | signal | instants | identical | exit statuses | faults |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys(sorted((instant.job, instant.signal) for instant in instants)):
        own = [instant for instant in instants if (instant.job, instant.signal) == key]
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(Counter(i.status for i in own).items()))
        faults = Counter(fault for instant in own for fault in instant.faults)
        told = "; ".join(f"{fault} ({n})" for fault, n in faults.items()).replace("\n", " ") or "none"
        identical = sum(instant.is_identical for instant in own)
        lines.append(f"| {key[0]} | {key[1]} | {len(own)} | {identical} | {statuses} | {told} |")
    identical, wrong = sum(i.is_identical for i in instants), sum(bool(i.faults) for i in instants)
    return "\n".join([*lines, f"| all | | {len(instants)} | {identical} | | {wrong} instants |"])


def main() -> int:
    """Runs the trials of the command line, prints the table, and returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="", help="names, separated by commas; default: all")
    parser.add_argument("--signals", default="", help="likewise")
    flags = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started it in the background
    folder, instants = Path(tempfile.mkdtemp(prefix="t5g2-kill-")), []
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["T5G2_CACHE"] = str(folder / "cache")
    commands, signals = (tuple(filter(None, value.split(","))) for value in (flags.commands, flags.signals))
    print(f"folders of trials with faults stay in {folder}", flush=True)
    # after Ctrl-C the table of those so far
    with contextlib.suppress(KeyboardInterrupt):
        for done in trials(folder, instants=flags.instants, seed=flags.seed, commands=commands, signals=signals):
            instants += done
            print(*(f"{len(instants):4} {instant}" for instant in done), sep="\n", flush=True)
    print(table(instants))
    return int(any(instant.faults for instant in instants))


if __name__ == "__main__":
    sys.exit(main())
