"""The `t5g2` command: finds the subcommand, parses its flags and runs it.

Exit status: 0 done; 2 the input is wrong (do not retry); 1 anything else (may be retried); 143 after SIGTERM and 130
after Ctrl-C, with the checkpoint saved; 141 if the reader of the output is gone (`| head`).
"""

import contextlib
import os
import re
import select
import sys

from t5g2.commands import COMMANDS, load_command
from t5g2.commands.flags import HelpRequested, parse
from t5g2.core.errors import OS_ERRORS, MachineError, UserError, os_error_message, unknown
from t5g2.core.files import cache_folder, cache_hint
from t5g2.core.terminal import escaped

THREADS_OF_A_DEVICE = 8  # of a CPU that is several devices: more than the collectives that wait at a time


def run_command(name: str, argv: list[str]) -> None:
    """Parses the flags of a subcommand and runs it, or prints its help."""
    command = load_command(name)
    try:
        flags = parse(name, command.run, command.FLAGS, argv)
    except HelpRequested as request:
        help_text = str(request)
    else:
        _keep_compiled_programs()
        _give_threads_to_simulated_devices()
        command.run(flags)
        return
    # outside of `except`, so that an error of printing does not seem to come from the flags
    print(help_text)


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    status = 2
    try:
        _dispatch(argv)
        # here and not when the interpreter ends, where an error is a traceback
        sys.stdout.flush()
        return 0
    except UserError as error:
        message = str(error)
    except MachineError as error:
        message, status = str(error), 1
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        _discard_output()
        return 141
    # a full disk or a missing permission is the user's to mend; any other OSError is a bug, with a traceback
    except OSError as error:
        if error.errno not in OS_ERRORS:
            raise
        message = os_error_message(error) + cache_hint(str(error.filename or "/"))
        try:
            sys.stdout.flush()
        except OSError:  # the full disk is that of the output
            _discard_output()
    except KeyboardInterrupt:
        return 130
    print(escaped(f"t5g2 {argv[0] if argv else '--help'}: {message}"), file=sys.stderr)
    # only where it has been loaded: most commands end without jax
    if distributed := sys.modules.get("t5g2.core.distributed"):
        distributed.leave(status)
    return status


def _dispatch(argv: list[str]) -> None:
    # `t5g2 help check` is `t5g2 check --help`
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
    elif argv[0] == "--version":
        from t5g2 import __version__

        print(__version__)
    elif argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    else:
        run_command(argv[0], argv[1:])


def _output_is_closed() -> bool:
    """True if the reader of stdout or stderr is gone, as that of `t5g2 data … | head`; not if another pipe broke."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _discard_output() -> None:
    """Drops what is still to be written to stdout: the interpreter would try again at its end, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _keep_compiled_programs() -> None:
    """Sets where JAX keeps compiled programs, for this process and those it starts, unless the environment says so."""
    # by the environment, because it is read when jax is imported, and many commands end before that
    with contextlib.suppress(UserError):  # without a folder, programs are compiled again each time
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _give_threads_to_simulated_devices() -> None:
    """Sets the number of XLA's threads, where a CPU is asked to be several devices, unless the environment says so.

    A collective holds a thread of each device until all have come to it, and independent ones begin in any order: with
    a thread for each device, which is what XLA takes, devices wait for each other for ever.
    """
    count = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d{1,6})\b", os.environ.get("XLA_FLAGS", ""))
    # of several flags the last counts
    devices = int(next((text for text in (count, *reversed(flags)) if re.fullmatch(r"\d{1,6}", text)), 1))
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_OF_A_DEVICE * devices)))


def _overview() -> str:
    lines = [f"  t5g2 {name:12} {(load_command(name).run.__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return "\n".join(
        (
            "t5g2: decoder-only in, encoder-decoder out",
            "",
            *lines,
            "",
            "t5g2 COMMAND --help shows the flags of a command and an example; t5g2 --version the version.",
        )
    )
