"""How the hosts of a deployment find each other where nobody starts them: in pods and containers.

Every host has the plan and a secret. The first one listens at a port that all know; the others
call it once a second and are answered as often: first to wait, then, once all are here, with what
their ranks must know. Whoever hears nothing for a while ends, so that nothing is left on any host.

The sockets are encrypted with keys made of the secret: who does not have it understands nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

import msgspec
import zmq
from zmq.utils import z85

from v4_ascend import __version__
from v4_ascend.deploy.agent import BEAT_SECONDS, GIVE_UP_SECONDS
from v4_ascend.deploy.port import require_free
from v4_ascend.deploy.torchrun import hosts_of
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.plan import Plan

MIN_SECRET_BYTES = 16
OPEN_TO_OTHERS = 0o007  # a mounted Kubernetes secret may be its group's


class Here(msgspec.Struct, frozen=True, tag="here"):
    """A host calls: which one it is, and whether it wants to end or had to."""

    secret: str
    version: str
    digest: str
    host: str
    machine: str  # its own name
    life: str  # another one each time it starts
    leaving: str | None = None
    ended: str | None = None


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    """Not everybody is here yet."""


class Go(msgspec.Struct, frozen=True, tag="go"):
    """What a host's ranks must know."""

    link: dict[str, str]
    meeting: str


class Over(msgspec.Struct, frozen=True, tag="over"):
    """It has ended: why, if it was not stopped."""

    failure: str | None


Answer = Wait | Go | Over


def read_secret(file: Path) -> str:
    """Return a shared secret.

    Raises:
        ConfigError: not there, too short, or readable for everybody.
    """
    try:
        text = file.read_text(encoding="utf-8").strip()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(str(file), f"cannot be read: {e}") from e
    if mode & OPEN_TO_OTHERS:
        raise ConfigError(str(file), f"mode {mode & 0o777:o}: a secret is its owner's; chmod 600")
    if len(text.encode()) < MIN_SECRET_BYTES:
        raise ConfigError(str(file), f"a secret of {len(text)} bytes; {MIN_SECRET_BYTES} at least")
    return text


def _keys(secret: str) -> tuple[bytes, bytes]:
    """Make the first host's key pair of the secret."""
    private = z85.encode(hashlib.sha256(b"v4-ascend roll call " + secret.encode()).digest())
    return zmq.curve_public(private), private


@dataclass
class _Caller:
    life: str
    machine: str
    heard: float


class RollCall:
    """The first host's end. A thread answers, whatever else its process does."""

    def __init__(self, plan: Plan, port: int, secret: str) -> None:
        """Listen.

        Raises:
            PortInUseError: the port is taken.
        """
        require_free("", port)
        self._port = port
        self._first, *self._hosts = hosts_of(plan)
        self._digest, self._secret = plan.digest, secret
        self._here: dict[str, _Caller] = {}
        self._answer: Answer = Wait()
        self._problem: str | None = None
        self._lock, self._closing = Lock(), Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, _keys(secret)[1])
        self._socket.bind(f"tcp://*:{port}")
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def missing(self) -> list[str]:
        """Return the hosts that are not here, or were and are not heard any more."""
        now = time.monotonic()
        with self._lock:
            heard = {h for h, c in self._here.items() if now - c.heard < GIVE_UP_SECONDS}
        return [h for h in self._hosts if h not in heard]

    def machines(self) -> list[str]:
        """Return which machine each host is, as far as they are here."""
        with self._lock:
            return [f"{h} is {c.machine}" for h, c in self._here.items()]

    def go(self, link: dict[str, str], meeting: str) -> None:
        """From now on tell hosts to start their ranks; one that is lost is a problem."""
        with self._lock:
            self._answer = Go(link, meeting)

    def problem(self) -> str | None:
        """Return what is wrong with a host, the first that was."""
        with self._lock:
            if self._problem is None and isinstance(self._answer, Go):
                now = time.monotonic()
                for host, c in self._here.items():
                    if now - c.heard > GIVE_UP_SECONDS:
                        self._problem = (
                            f"{host} ({c.machine}) is lost: no word for {GIVE_UP_SECONDS:g} s"
                        )
                        break
            return self._problem

    def over(self, failure: str | None) -> None:
        """From now on tell hosts that it has ended."""
        with self._lock:
            self._answer = Over(failure)

    def close(self) -> None:
        """Answer for one more beat, so that everybody knows, and stop."""
        self._closing.wait(2 * BEAT_SECONDS if self._here else 0)
        self._closing.set()
        self._thread.join()

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Here)
        while not self._closing.is_set():
            if not self._socket.poll(timeout=200):
                continue
            name, text = self._socket.recv_multipart()
            try:
                here = decoder.decode(text)
            except msgspec.DecodeError:
                continue  # no host of ours
            if hmac.compare_digest(here.secret, self._secret):
                with self._lock:
                    answer = self._hear(here)
                self._socket.send_multipart([name, msgspec.msgpack.encode(answer)])
        self._socket.close()

    def _hear(self, here: Here) -> Answer:
        if (refusal := self._refusal(here)) is not None:
            return Over(refusal)
        known = self._here.get(here.host)
        if known is not None and known.life != here.life and not isinstance(self._answer, Wait):
            self._problem = self._problem or f"{here.host} ({here.machine}) was started again"
            return Over(f"{self._first} is still of an earlier start; it ends")
        self._here[here.host] = _Caller(here.life, here.machine, time.monotonic())
        if (said := here.ended or here.leaving) is not None:
            if isinstance(self._answer, Wait):
                del self._here[here.host]  # it may come again
            else:
                self._problem = self._problem or f"{here.host} ({here.machine}) {said}"
        return self._answer

    def _refusal(self, here: Here) -> str | None:
        """Say why a host that has the secret cannot take part."""
        for what, mine, theirs in (
            ("v4-ascend", __version__, here.version),
            ("plan", self._digest, here.digest),
        ):
            if mine != theirs:
                return f"{what} {theirs[:12]} at {here.host}, {mine[:12]} at {self._first}"
        if here.host not in self._hosts:
            return f"{here.host}: the other hosts of the plan are {', '.join(self._hosts)}"
        return None


class Call:
    """Another host's end."""

    def __init__(self, plan: Plan, host: str, first: str, port: int, secret: str) -> None:
        self._here = Here(
            *(secret, __version__, plan.digest, host, socket.gethostname(), secrets.token_hex(8))
        )
        self._first, self._port = first, port
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        client_public, client_private = zmq.curve_keypair()
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, client_public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, client_private)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, _keys(secret)[0])
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.connect(f"tcp://{first}:{port}")
        self._decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
        self._said = 0.0
        self.heard: float | None = None

    def say(self, *, leaving: str | None = None, ended: str | None = None) -> None:
        """Say that we are here, once a second however often it is called."""
        now = time.monotonic()
        if now - self._said < BEAT_SECONDS and ended is None:
            return
        self._said = now
        here = msgspec.structs.replace(self._here, leaving=leaving, ended=ended)
        self._socket.send(msgspec.msgpack.encode(here))

    def hear(self, seconds: float) -> Answer | None:
        """Wait a while for an answer."""
        if not self._socket.poll(timeout=int(1000 * seconds)):
            return None
        self.heard = time.monotonic()
        return self._decoder.decode(self._socket.recv())

    def why_silent(self) -> str:
        """Say why the first host may not have answered."""
        try:
            with socket.create_connection((self._first, self._port), timeout=5):
                return "it takes connections: its secret is another"
        except OSError as e:
            return f"{e.strerror or e}"

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
