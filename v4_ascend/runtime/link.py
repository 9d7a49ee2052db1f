"""The sockets between the front and its ranks: loopback, a shared secret."""

from __future__ import annotations

import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from v4_ascend.runtime.messages import FromRank, Hello, Step

FILE = "link.json"


@dataclass(frozen=True)
class Address:
    """Where the front listens, who it is, and what a rank must know."""

    url: str
    secret: str
    front_pid: int

    @classmethod
    def read(cls, state: Path) -> Address:
        """Read what the front wrote to the state folder."""
        return cls(**json.loads((state / FILE).read_text(encoding="utf-8")))

    def write(self, state: Path) -> None:
        """Write it for ranks of the same user alone."""
        half = state / f".{FILE}"
        half.touch(mode=0o600)
        half.write_text(json.dumps(self.__dict__), encoding="utf-8")
        half.replace(state / FILE)


class FrontLink:
    """The front's end: every rank's messages, and steps to all ranks."""

    def __init__(self, state: Path) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted rank is the same rank
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = Address(f"tcp://127.0.0.1:{port}", secrets.token_hex(16), os.getpid())
        self.address.write(state)
        self._decode = msgspec.msgpack.Decoder(FromRank)
        self._known: set[bytes] = set()

    async def send(self, step: Step, n_ranks: int) -> None:
        """Send a step to all ranks."""
        text = msgspec.msgpack.encode(step)
        for rank in range(n_ranks):
            await self._socket.send_multipart([_name(rank), text])

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
    """A rank's end. Its heartbeat has another one, named by `suffix`."""

    def __init__(self, address: Address, rank: int, suffix: str = "") -> None:
        self._address = address
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.IDENTITY, _name(rank) + suffix.encode())
        self._socket.connect(address.url)
        self._decode = msgspec.msgpack.Decoder(Step)
        self.send(Hello(address.secret, os.getpid()))

    def send(self, message: FromRank) -> None:
        """Send a message to the front."""
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> Step | None:
        """Wait for the next step; None when the front is gone."""
        while not self._socket.poll(timeout=1000):
            if not is_alive(self._address.front_pid):
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
