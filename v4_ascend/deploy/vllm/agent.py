"""A process of vLLM on another host: started over ssh, ended when who started it is gone."""

from __future__ import annotations

import os
import sys

import msgspec

from v4_ascend import __version__
from v4_ascend.deploy.agent import hold
from v4_ascend.deploy.vllm.here import filled_in
from v4_ascend.errors import DeployError, V4AscendError


class Order(msgspec.Struct, frozen=True):
    """What a host must know to run one process. It comes by standard input: it may hold a key."""

    version: str
    host: str
    argv: list[str]
    env: dict[str, str]


def main() -> None:
    """Run the process until it ends, or the other end does; exit with its code."""
    try:
        order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
        if order.version != __version__:
            raise DeployError(
                f"{order.host}: v4-ascend {__version__} here, {order.version} deploys"
            )
        raise SystemExit(hold(order.argv, os.environ | filled_in(order.env, order.host)))
    except (V4AscendError, msgspec.DecodeError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
