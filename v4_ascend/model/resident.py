"""What a model keeps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch


def resident_bytes(model: object) -> int:
    """Sum the storages behind a model's tensors, each once however many tensors share it."""
    storages = {s.data_ptr(): s.nbytes() for s in _storages(model)}
    return sum(storages.values())


def _storages(part: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(part, torch.Tensor):
        yield part.untyped_storage()
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _storages(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _storages(getattr(part, field.name))
