"""What a kernel's launch asks of the GPU; nothing here waits for it."""

from __future__ import annotations

from functools import cache

import torch

INTERPRETED = 16  # few, so that tests are quick


def n_processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; under the interpreter `INTERPRETED`."""
    return _of_gpu(device) if device.type == "cuda" else INTERPRETED


@cache
def _of_gpu(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
