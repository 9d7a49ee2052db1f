"""A front without a model: the real server and its orders over an application that says who it is.

Its plan's checkpoint tells how it goes: ``broken`` fails its canary, everything else is ready.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import uvicorn

from v4_ascend.runtime.draining import DrainingServer
from v4_ascend.runtime.link import Address
from v4_ascend.runtime.orders import ORDERS
from v4_ascend.supernode.plan import Plan


@dataclass
class Dispatcher:
    health: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(state="ready", canary="stand-in", is_open=False)
    )
    is_draining: bool = False
    n: int = 0

    @property
    def is_idle(self):
        return self.n == 0

    def drain(self):
        self.is_draining, self.health.state = True, "draining"

    def give_way(self):
        self.health.is_open, self.health.state = False, "draining"

    def stop(self, reason):
        os._exit(3)


class Application:
    def __init__(self, state, dispatcher):
        self.state, self.dispatcher = state, dispatcher
        self.read_plan_again()

    def read_plan_again(self):
        self.plan = Plan.read(self.state / "plan.json")
        if self.plan.checkpoint == "broken":
            self.dispatcher.health.state = "failed"
            self.dispatcher.health.reason = "canary: prefill and decode differ"

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            raise RuntimeError("no lifespan")
        said = vars(self.dispatcher.health) | {
            "plan": self.plan.digest,
            "concurrency": self.plan.max_batch_size,
            "keys": self.plan.api_keys,
        }
        status = 503 if self.dispatcher.is_draining else 200
        line = json.dumps(said).encode() + b"\n"
        self.dispatcher.n += 1
        try:
            await send({"type": "http.response.start", "status": status, "headers": []})
            if scope["path"] == "/until":  # a long answer: until the file it names is there
                while not Path(scope["query_string"].decode()).exists():
                    await send({"type": "http.response.body", "body": line, "more_body": True})
                    await asyncio.sleep(0.1)
            await send({"type": "http.response.body", "body": line})
        finally:
            self.dispatcher.n -= 1


def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
    state = Path(sys.argv[1])
    parent = int(sys.argv[2])
    address, inside = (socket.socket(fileno=int(fd)) for fd in sys.argv[3:5])
    dispatcher = Dispatcher()
    app = Application(state, dispatcher)
    Address("tcp://127.0.0.1:1", "key", "secret", os.getpid()).write(state)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_keep_alive=1)
    server = DrainingServer(config, app, dispatcher, state, address, parent)
    asyncio.run(server.serve([inside]))


if __name__ == "__main__":
    main()
