"""Who may speak to a front: ranks that know its key and its secret, and nobody else."""

import asyncio
from dataclasses import replace

import msgspec
import pytest
import zmq

from v4_ascend.runtime.link import FILE, FrontLink, RankLink
from v4_ascend.runtime.messages import Failed, Hello


@pytest.fixture
def knocking(tmp_path):
    """Let somebody speak to a new front; return what it heard, None if nothing."""

    async def run(speak):
        front = FrontLink(tmp_path)
        socket = speak(front.address)
        try:
            return await asyncio.wait_for(front.receive(), 0.7)
        except TimeoutError:
            return None
        finally:
            socket.close(linger=0)
            front.close()

    return lambda speak: asyncio.run(run(speak))


def rank(address, **changes):
    return RankLink(replace(address, **changes), 3)._socket


def client(address, message, **options):
    """A socket of nobody's, which says one thing."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"3")
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.connect(address.url)
    socket.send(msgspec.msgpack.encode(message))
    return socket


def test_a_rank_is_heard(knocking):
    number, message = knocking(rank)
    assert (number, type(message)) == (3, Hello)


def test_a_wrong_secret_is_not(knocking):
    assert knocking(lambda a: rank(a, secret="0" * 32)) is None


def test_nor_who_takes_the_front_for_another(knocking):
    assert knocking(lambda a: rank(a, public_key=zmq.curve_keypair()[0].decode())) is None


def test_nor_who_does_not_encrypt_even_with_the_secret(knocking):
    assert knocking(lambda a: client(a, Hello(a.secret, 1))) is None


def test_nor_who_says_no_hello(knocking):
    public, private = zmq.curve_keypair()
    keys = {"CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": private}

    def speak(address, message):
        return client(address, message, **keys, CURVE_SERVERKEY=address.public_key.encode())

    assert knocking(lambda a: speak(a, Hello(a.secret, 1))) is not None
    assert knocking(lambda a: speak(a, Failed("all is lost"))) is None


def test_what_a_rank_must_know_is_the_users_alone(knocking, tmp_path):
    knocking(rank)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
