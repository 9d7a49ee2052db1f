"""Which files a plan's ranks get: names, tensors in reading order, and where each one lies."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from v4_ascend.checkpoint.folder import CheckpointFolder
from v4_ascend.checkpoint.header import TensorHeader
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import ShardError
from v4_ascend.supernode.holdings import Held, holdings
from v4_ascend.supernode.plan import Plan

ALIGNMENT = 4096  # of the data: a page, and what direct I/O asks for
# A rank's files are this long at most, unless one tensor is longer: workers share a large rank, and
# what is lost by a kill is little.
MAX_FILE_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True)
class RankFile:
    """One file of a rank. With `link`, it is that file of the checkpoint as it is."""

    name: str
    rank: int
    held: tuple[Held, ...]
    link: Path | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(h.nbytes for h in self.held)

    def header(self) -> bytes:
        """Return the file up to its data.

        safetensors wants the tensors without holes, so it is the header that is padded.
        """
        at, entries = 0, {}
        for h in self.held:
            shape = h.part.shape(h.spec.shape) if h.part else h.spec.shape
            offsets = [at, at + h.nbytes]
            entries[h.spec.name] = {
                "dtype": h.spec.dtype,
                "shape": shape,
                "data_offsets": offsets,
            }
            at += h.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


def require_fit(config: ModelConfig, plan: Plan) -> None:
    """Refuse a plan that is not of this model.

    Raises:
        ShardError: a rank holds what is not there, a layer or an expert is on no rank, or TP cuts
            through a block of scales.
    """
    n_experts, seen = config.n_routed_experts, set[tuple[int, int]]()
    if plan.expert_placement is not None and len(plan.expert_placement) != config.n_layers:
        raise ShardError(
            f"plan {plan.name}: places experts of {len(plan.expert_placement)} layers, the "
            f"checkpoint has {config.n_layers}"
        )
    for rank in plan.ranks:
        first, end = rank.layers
        if not 0 <= first < end <= config.n_layers:
            raise ShardError(
                f"plan {plan.name}: rank {rank.rank} holds layers {first}..{end - 1}, the "
                f"checkpoint has 0..{config.n_layers - 1}"
            )
        if not 0 <= rank.experts[0] <= rank.experts[1] <= n_experts:
            raise ShardError(
                f"plan {plan.name}: rank {rank.rank} holds experts {rank.experts[0]}.."
                f"{rank.experts[1] - 1}, the checkpoint has 0..{n_experts - 1}"
            )
        seen.add(rank.layers)
    if missing := set(range(config.n_layers)) - {n for s in seen for n in range(*s)}:
        raise ShardError(f"plan {plan.name}: layer {min(missing)} of the checkpoint is on no rank")
    _require_experts(config, plan)


def _require_experts(config: ModelConfig, plan: Plan) -> None:
    """Every expert of a layer must be on some rank of its stage."""
    if plan.expert_placement is None:
        placed = {layers: set[int]() for layers in {r.layers for r in plan.ranks}}
        for rank in plan.ranks:
            placed[rank.layers].update(range(*rank.experts))
        held = [(layers[0], experts) for layers, experts in placed.items()]
    else:
        held = [(n, {e for r in at for e in r}) for n, at in enumerate(plan.expert_placement)]
    every = set(range(config.n_routed_experts))
    for layer, experts in held:
        if experts != every:
            expert = min(experts ^ every)
            where = "is on no rank" if expert in every else "is not in the checkpoint"
            raise ShardError(f"plan {plan.name}: expert {expert} of layer {layer} {where}")


def rank_files(
    config: ModelConfig, plan: Plan, *, links_to: CheckpointFolder | None = None
) -> list[RankFile]:
    """Lay all files out; with `links_to`, files of that checkpoint that can stay as they are do.

    Raises:
        ShardError: the plan is not of this model.
    """
    require_fit(config, plan)
    try:
        stays = _linkable(links_to, plan) if links_to else {}
        # One rank at a time: the holdings of thousands would not fit the memory promised.
        return [
            f
            for n, rank in enumerate(plan.ranks)
            for f in _files_of(n, holdings(config, plan, rank), stays)
        ]
    except ValueError as e:
        raise ShardError(f"plan {plan.name}: {e}") from e


def _linkable(folder: CheckpointFolder, plan: Plan) -> dict[str, TensorHeader]:
    """Return the tensors of the files that go to one rank, whole, and to no other."""
    ranks: dict[Path, set[int]] = {}
    n_whole: dict[Path, int] = {}
    for rank in plan.ranks:
        for name, h in holdings(folder.config, plan, rank).items():
            file = folder.headers[name].file
            ranks.setdefault(file, set()).add(rank.rank)
            n_whole[file] = n_whole.get(file, 0) + (h.part is None)
    n_tensors: dict[Path, int] = {}
    for header in folder.headers.values():
        n_tensors[header.file] = n_tensors.get(header.file, 0) + 1
    whole = {f for f, of in ranks.items() if len(of) == 1 and n_whole[f] == n_tensors[f]}
    return {name: h for name, h in folder.headers.items() if h.file in whole}


def _files_of(
    rank: int, held: Mapping[str, Held], linked: Mapping[str, TensorHeader]
) -> Iterator[RankFile]:
    stays: dict[Path, list[TensorHeader]] = {}
    groups: list[list[Held]] = [[]]
    size = 0
    for name, h in held.items():
        if name in linked:
            stays.setdefault(linked[name].file, []).append(linked[name])
            continue
        if groups[-1] and size + h.nbytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(h)
        size += h.nbytes
    for file, headers in stays.items():
        in_file = sorted(headers, key=lambda h: (h.begin, h.end))
        name = f"rank-{rank:05d}-{file.name}"
        yield RankFile(name, rank, tuple(held[h.name] for h in in_file), file)
    for n, group in enumerate(groups, 1):
        number = f"-{n:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        if group:
            yield RankFile(f"rank-{rank:05d}{number}.safetensors", rank, tuple(group))
