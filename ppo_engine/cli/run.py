"""A command run: its exit status, and errors without tracebacks."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

from ppo_engine.cli.parser import make_parser
from ppo_engine.cli.unknown import meant
from ppo_engine.errors import DEBUG_VARIABLE, MachineError, Stopped, UserError, write_traceback
from ppo_engine.messages import first_line
from ppo_engine.run.interrupts import name_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (the machine's fault; doctor: broken; an error
    that nobody expected), 2 (the user's), 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a locale that has not every character
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    # `key=value` may stand between options, where argparse's own positionals cannot.
    options, rest = parser.parse_known_args(arguments)
    wrong = [text for text in rest if text.startswith("-") or "=" not in text]
    if wrong:
        near = meant(wrong[0], options.parser) if wrong[0].startswith("--") else ""
        options.parser.error(
            f"unknown argument {wrong[0]!r}.{near} Settings are written key=value, such as "
            "run.seed=1."
        )
    try:
        return int(options.run(options, rest) or 0)
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        _say(f"error: {error}", error)
        return 1 if isinstance(error, MachineError) else 2
    except (KeyboardInterrupt, Stopped) as error:
        number = getattr(error, "number", signal.SIGINT)
        _say(name_of(number), error)
        return 128 + number
    except BrokenPipeError:  # the reader of our output, such as `head`, closed it
        _leave(sys.stdout)
        return 1
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        if str(error).startswith("PPO_KERNELS_ISA is "):  # found where the kernels are imported
            _say(f"error: {error}. Unset it, or name one of these.", error)
            return 2
        long_name = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        _say(_unexpected(error, long_name), error)
        return 2 if long_name else 1


def _unexpected(error: Exception, long_name: bool) -> str:
    """What is said of an error that is not worded for people, whose traceback goes to a file."""
    if long_name:
        name = str(getattr(error, "filename", ""))
        return f"error: A name in the path {name[:60]!r}… is too long for this disk: shorten it."
    said = first_line(error)[:300]
    return (
        f"error: {type(error).__name__}: {said}. This is not foreseen, and may be a bug; the "
        f"traceback is in {write_traceback(error)}."
    )


def _say(text: str, error: BaseException) -> None:
    """With what was kept of the work, and how to go on, as it was added to the exception."""
    try:
        print("\n".join([text, *getattr(error, "__notes__", ())]), file=sys.stderr, flush=True)
    except BrokenPipeError:  # of `2>&1 | tee log`, Ctrl-C ends tee as well
        _leave(sys.stdout)
        _leave(sys.stderr)


def _leave(stream: TextIO) -> None:
    """What is written to it from now on goes nowhere; Python flushes it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
