"""Work beside the rest of a layer: on a second stream of the device, where it has streams.

On a CPU both streams are the one there is, and work runs where it is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


class SideStream:
    """Fork with `begun`, join with `join`: what was computed in between may be used after that.

    Tensors need no further care: memory given back by one stream is taken again by the same
    stream only, and each waits for the other in turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams: Any = torch.get_device_module(device)
        self._side = self._streams.Stream()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Run the block once what is there has been computed, beside what follows it."""
        self._side.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._side):
            yield

    def join(self) -> None:
        """Let what follows wait for the block's results."""
        self._streams.current_stream().wait_stream(self._side)


@cache
def side_stream(device: torch.device) -> SideStream:
    """Return the device's only one: layers follow each other on it as they do on the main one."""
    return SideStream(device)
