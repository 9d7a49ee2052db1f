"""What a kernel's launch asks of the GPU; nothing here waits for it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def n_processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; under the interpreter few, so that tests are quick."""
    if device.type != "cuda":
        return 16
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
