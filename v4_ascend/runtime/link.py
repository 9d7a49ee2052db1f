"""The socket between the front and rank 0: loopback, one peer, a shared secret."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from v4_ascend.runtime.messages import FromRank, Step

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
    """The front's end."""

    def __init__(self, state: Path) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = Address(f"tcp://127.0.0.1:{port}", secrets.token_hex(16), os.getpid())
        self.address.write(state)
        self._decode = msgspec.msgpack.Decoder(FromRank)

    async def send(self, step: Step) -> None:
        """Send a step to the rank."""
        await self._socket.send(msgspec.msgpack.encode(step))

    async def receive(self) -> FromRank:
        """Wait for the rank's next message."""
        return self._decode.decode(await self._socket.recv())

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class RankLink:
    """Rank 0's end."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(address.url)
        self._decode = msgspec.msgpack.Decoder(Step)

    def send(self, message: FromRank) -> None:
        """Send a message to the front."""
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> Step | None:
        """Wait for the next step; None when the front is gone."""
        while not self._socket.poll(timeout=1000):
            if not is_alive(self._address.front_pid):
                return None
        return self._decode.decode(self._socket.recv())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
