"""The sockets between the front and its ranks: encrypted, and a shared secret inside.

The front's public key travels with the secret in a file of the user's alone, so that a rank
knows the front as well as the front knows its ranks.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from v4_ascend.config.private import write_private
from v4_ascend.runtime.messages import End, FromRank, Hello, Start, Step, ToRank

FILE = "link.json"
STORE = "V4_ASCEND_STORE"  # environment: where ranks meet, file://PATH or tcp://HOST:PORT
BEAT = b"-beat"


@dataclass(frozen=True)
class Address:
    """Where the front listens, who it is, and what a rank must know."""

    url: str
    public_key: str
    secret: str
    front_pid: int | None  # None on other hosts, where the launcher's agent follows it

    @classmethod
    def read(cls, state: Path) -> Address:
        """Read what the front wrote to the state folder."""
        return cls(**json.loads((state / FILE).read_text(encoding="utf-8")))

    def write(self, state: Path) -> None:
        """Write it for ranks of the same user alone."""
        write_private(state / FILE, json.dumps(self.__dict__))


class FrontLink:
    """The front's end: every rank's messages, and steps to all ranks."""

    def __init__(self, state: Path, host: str = "127.0.0.1") -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted rank is the same rank
        public, private = zmq.curve_keypair()
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, private)
        at = f"tcp://{socket.gethostbyname(host)}"
        port = self._socket.bind_to_random_port(at)
        key, secret = public.decode(), secrets.token_hex(16)
        self.address = Address(f"{at}:{port}", key, secret, os.getpid())
        self.address.write(state)
        self._decode = msgspec.msgpack.Decoder(FromRank)
        self._known: set[bytes] = set()

    async def send(self, message: Step | Start, n_ranks: int) -> None:
        """Send a message to all ranks."""
        text = msgspec.msgpack.encode(message)
        for rank in range(n_ranks):
            await self._socket.send_multipart([_name(rank), text])

    async def end(self, reason: str, ranks: Iterable[int]) -> None:
        """Tell ranks to leave, whatever they wait for: their heartbeats listen."""
        text = msgspec.msgpack.encode(End(reason))
        for rank in ranks:
            await self._socket.send_multipart([_name(rank) + BEAT, text])

    async def receive(self) -> tuple[int, FromRank]:
        """Wait for the next message of a rank; who does not know the secret is not heard."""
        while True:
            name, text = await self._socket.recv_multipart()
            try:
                message = self._decode.decode(text)
                rank = int(name.decode().partition("-")[0])
            except (msgspec.DecodeError, ValueError):
                continue  # no rank of ours
            if isinstance(message, Hello):
                if not hmac.compare_digest(message.secret, self.address.secret):
                    continue
                self._known.add(name)
            if name in self._known:
                return rank, message

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class RankLink:
    """A rank's end; its heartbeat's thread has another one."""

    def __init__(self, address: Address, rank: int, *, is_heartbeat: bool = False) -> None:
        self._address = address
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.IDENTITY, _name(rank) + (BEAT if is_heartbeat else b""))
        public, private = zmq.curve_keypair()
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, private)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, address.public_key.encode())
        self._socket.connect(address.url)
        self._decode = msgspec.msgpack.Decoder(ToRank)
        self.send(Hello(address.secret, os.getpid()))

    def send(self, message: FromRank) -> None:
        """Send a message to the front."""
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> ToRank | None:
        """Wait for the next message; None when the front is gone."""
        pid = self._address.front_pid
        while not self._socket.poll(timeout=1000):
            if pid is not None and not is_alive(pid):
                return None
        return self._decode.decode(self._socket.recv())

    def poll(self, seconds: float) -> ToRank | None:
        """Wait a while for a message."""
        if not self._socket.poll(timeout=int(seconds * 1000)):
            return None
        return self._decode.decode(self._socket.recv())


def _name(rank: int) -> bytes:
    return str(rank).encode()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
