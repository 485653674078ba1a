"""One writer: a run's folder is locked while a process trains into it, a file of rankings while
one serves it."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from ppo_engine.errors import UserError

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """Of `what` the file at `path` stands for, held until `release`. It is the kernel's (flock), so
    that it ends with its process, however that ends. A UserError where somebody else has it: it
    says who, and to take another `choice`.

    On a file system without locks, as some network ones, nobody is kept out: `held` is False.
    """

    def __init__(self, path: Path, what: str, choice: str) -> None:
        self._path = path
        self.held = True
        self._file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
        while not self._try(what, choice):  # whoever had it has removed the file in between
            self._file.close()
            self._file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
        self._file.truncate(0)
        began = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {began}")
        self._file.flush()

    def release(self) -> None:
        """Does nothing where it is released already."""
        if not self._file.closed:
            with suppress(OSError):  # it may be gone, or on a disk that is
                self._path.unlink()
            self._file.close()

    def _try(self, what: str, choice: str) -> bool:
        """Whether the file that is locked now is the one at the path."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read() or "another process"
            self._file.close()
            raise UserError(
                f"{what} is in use by {owner}: wait for its end, or choose another {choice}."
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            self.held = False
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False
