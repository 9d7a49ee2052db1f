"""From a checkpoint folder to a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from v4_ascend.backends.cpu.memory import give_back_freed_memory
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.checkpoint.read_ahead import ReadAhead
from v4_ascend.checkpoint.reader import Checkpoint, RankCheckpoint
from v4_ascend.checkpoint.sharded import ShardedFolder, is_sharded
from v4_ascend.config.model import ModelConfig
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import Shard
from v4_ascend.model.transformer import Transformer
from v4_ascend.runtime.comm import Groups
from v4_ascend.supernode.experts import by_number
from v4_ascend.supernode.holdings import Held, Part, holdings, reading_order
from v4_ascend.supernode.plan import Plan

Progress = Callable[[int, int], None]


def load_model(
    checkpoint: Checkpoint,
    numerics: Numerics,
    *,
    with_drafter: bool,
    progress: Progress,
    device: torch.device | str = "cpu",
    shard: Shard | None = None,
    held: Mapping[str, Held] | None = None,
    shared: Collection[str] = (),
) -> Transformer:
    """Read the model, or what a rank of it holds, to a device.

    `progress` sees bytes read and bytes in all: of the rank, whose bytes alone are read. `shared`
    are tensors that other ranks read too.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    checkpoint.require_complete()
    config, headers = checkpoint.config, checkpoint.headers
    parts: list[tuple[TensorHeader, Part | None]]
    if held is None:
        parts = [(headers[n], None) for n in reading_order(config, with_drafter=with_drafter)]
    else:
        parts = [(headers[name], h.part) for name, h in held.items()]
    total = sum(h.nbytes // (part.count if part else 1) for h, part in parts)
    with ReadAhead(parts, shared) as ahead:
        source = _counted(ahead, total, progress, device)
        model = Transformer.read(source, config, numerics, with_drafter=with_drafter, shard=shard)
    give_back_freed_memory()
    return model


def load_rank(
    checkpoint: Checkpoint | RankCheckpoint,
    plan: Plan,
    groups: Groups,
    numerics: Numerics,
    *,
    progress: Progress,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Read what the plan gives the rank that is in these groups, and nothing else.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    config, with_drafter = checkpoint.config, plan.n_draft_tokens > 0
    shard = shard_of(plan, groups, config)
    if isinstance(checkpoint, Checkpoint):
        held = holdings(config, plan, plan.ranks[groups.rank])
        # Ranks read the same but for experts; the first one of a host brings it into the cache.
        own = ".ffn.experts." if len(plan.ranks) > 1 else ""
        return load_model(
            checkpoint,
            numerics,
            with_drafter=with_drafter,
            progress=progress,
            device=device,
            shard=shard,
            held=held,
            shared={name for name in held if own not in name},
        )
    headers = checkpoint.headers.values()
    with ReadAhead((h, None) for h in headers) as ahead:
        source = _counted(ahead, sum(h.nbytes for h in headers), progress, device)
        model = Transformer.read(source, config, numerics, with_drafter=with_drafter, shard=shard)
    give_back_freed_memory()
    return model


def open_for_rank(path: Path, plan: Plan, rank: int) -> Checkpoint | RankCheckpoint:
    """Open a checkpoint, or the files that `shard` made for this rank of this plan.

    Raises:
        CheckpointError: it is neither, or was made for another layout.
    """
    if is_sharded(path):
        return RankCheckpoint(ShardedFolder(path), plan, rank)
    return Checkpoint(path)


def _counted(
    ahead: ReadAhead, total: int, progress: Progress, device: torch.device | str
) -> Callable[[str], torch.Tensor]:
    done = 0

    def source(name: str) -> torch.Tensor:
        nonlocal done
        tensor = ahead.tensor(name)
        done += tensor.nbytes
        progress(done, total)
        return tensor.to(device)

    return source


def shard_of(plan: Plan, groups: Groups, config: ModelConfig) -> Shard:
    """Return what the plan gives the rank that is in these groups."""
    p, rank = plan.parallel, plan.ranks[groups.rank]
    first, end = rank.layers
    even = by_number(config.n_routed_experts, p.ep_size)
    placed = (
        plan.expert_placement[first:end]
        if plan.expert_placement is not None
        else (even,) * (end - first)
    )
    placed += (even,) * config.n_draft_layers  # the drafter's, where there is one
    return Shard(
        layers=rank.layers,
        placement=placed,
        tp=groups.tp,
        cp=groups.cp,
        ep=groups.ep,
        dsa_cp=p.dsa_cp,
    )
