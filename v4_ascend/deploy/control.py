"""What a `deploy` asks of the one that serves: its address, other settings, to give way.

A socket in the deployment's folder, which is its user's alone. One question, one answer; the
listening socket itself is passed along, so that whoever connects while it changes hands waits in
the same queue for whoever takes him.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from v4_ascend.deploy.state import Supervisor
from v4_ascend.errors import DeployError, V4AscendError

FILE = "control"
PATIENCE_SECONDS = 5.0  # with who asks, and does not go on
ANSWER_SECONDS = 30.0
CHUNK_BYTES = 1 << 16


class Address(msgspec.Struct, frozen=True, tag=True):
    """Pass the listening socket; go on listening at it."""


class Settings(msgspec.Struct, frozen=True, tag=True):
    """Serve by another plan, which differs in settings of the front alone."""

    plan: str


class GiveWay(msgspec.Struct, frozen=True, tag=True):
    """Listen no more, finish what has come in at most so many seconds, and end."""

    drain_s: float


Question = Address | Settings | GiveWay


class Answer(msgspec.Struct, frozen=True):
    """What was wrong with it, if it was refused."""

    problem: str | None = None


Reply = Callable[[Question], socket.socket | None]


class Control:
    """The end of who serves."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._file.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(self._file) as name:
            self._socket.bind(name)
        self._file.chmod(0o600)
        self._socket.listen()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._file.unlink(missing_ok=True)

    def answer(self, seconds: float, reply: Reply) -> None:
        """Wait a while for a question; `reply` returns what is passed, or raises what is wrong."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(PATIENCE_SECONDS)
            try:
                question = msgspec.json.decode(_line(connection), type=Question)
            except (OSError, msgspec.DecodeError):
                return  # nobody who wanted something
            passed, problem = None, None
            try:
                passed = reply(question)
            except V4AscendError as e:  # whoever serves goes on
                problem = str(e)
            line = msgspec.json.encode(Answer(problem)) + b"\n"
            fds = [] if passed is None else [passed.fileno()]
            try:
                socket.send_fds(connection, [line], fds)
            except OSError:
                return  # it is gone, and what it asked for is done


def ask(whom: Supervisor, question: Question) -> socket.socket | None:
    """Ask who serves; return the socket that comes with the answer, if one does.

    Raises:
        DeployError: it is gone, does not answer, or refuses.
    """
    where = f"{whom.name}: pid {whom.pid}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(ANSWER_SECONDS)
        try:
            with _short(Path(whom.folder) / FILE) as name:
                s.connect(name)
            s.sendall(msgspec.json.encode(question) + b"\n")
            text, fds, _, _ = socket.recv_fds(s, CHUNK_BYTES, 1)
            text = text if text.endswith(b"\n") else text + _line(s)
            answer = msgspec.json.decode(text, type=Answer)
        except FileNotFoundError as e:
            raise DeployError(
                f"{where} takes no questions: it ends, or was started by v4-ascend "
                f"{whom.version or 'of an earlier version'}; v4-ascend down {whom.name} first"
            ) from e
        except (OSError, msgspec.DecodeError) as e:
            raise DeployError(f"{where} does not answer: {type(e).__name__}: {e}") from e
    passed = socket.socket(fileno=fds[0]) if fds else None
    if answer.problem is not None:
        raise DeployError(answer.problem)
    return passed


@contextmanager
def _short(file: Path) -> Iterator[str]:
    """Give a name for a socket's file that is short enough, however deep its folder lies."""
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{file.name}"
    finally:
        os.close(folder)


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(CHUNK_BYTES)
        if not part:
            raise OSError("the other end is gone")
        data += part
    return data
