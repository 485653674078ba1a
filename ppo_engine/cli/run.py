"""A command run: its exit status, and errors without tracebacks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from ppo_engine.cli.parser import make_parser
from ppo_engine.cli.unknown import meant
from ppo_engine.errors import DEBUG_VARIABLE, MachineError, Stopped, UserError
from ppo_engine.memory import keep_freed_memory
from ppo_engine.run.interrupts import name_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (the machine's fault; doctor: broken), 2
    (the user's), 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP)."""
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
    keep_freed_memory()
    try:
        return int(options.run(options, rest) or 0)
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print("\n".join([f"error: {error}", *_notes(error)]), file=sys.stderr)
        return 1 if isinstance(error, MachineError) else 2
    except (KeyboardInterrupt, Stopped) as error:
        number = getattr(error, "number", signal.SIGINT)
        print("\n".join([name_of(number), *_notes(error)]), file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader of our output, such as `head`, closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _notes(error: BaseException) -> list[str]:
    """What was kept of the work, and how to go on, as it was added to the exception."""
    return list(getattr(error, "__notes__", ()))
