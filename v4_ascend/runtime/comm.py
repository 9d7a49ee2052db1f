"""Process groups by name: the one place that talks to torch.distributed.

The same calls run on HCCL, NCCL and gloo. Every tensor travels as bytes, so that no backend
needs to know FP8; only sums need their dtype.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from v4_ascend.errors import DeployError
from v4_ascend.ops import Group, Solo
from v4_ascend.runtime.flight import Flight
from v4_ascend.runtime.link import STORE
from v4_ascend.runtime.watch import comm_timeout
from v4_ascend.supernode.plan import Plan

Work = dist.Work
BACKEND_OF_DEVICE = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


class CommGroup:
    """Ranks that exchange tensors; the same calls, in the same order, on each of them."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        me: int,
        handle: dist.ProcessGroup,
        flight: Flight,
        hccl_name: str | None = None,
    ) -> None:
        self.name, self.ranks, self.hccl_name = name, tuple(ranks), hccl_name
        self.rank, self.size = self.ranks.index(me), len(ranks)
        self._handle, self._flight = handle, flight

    def all_gather(
        self, x: torch.Tensor, sizes: Sequence[int] | None = None
    ) -> Sequence[torch.Tensor]:
        """Return every rank's tensor in rank order; `sizes` are their dim 0, if known."""
        if sizes is None:
            mine = torch.tensor([x.shape[0]], device=x.device)
            every = [torch.empty_like(mine) for _ in self.ranks]
            to_each = mine.nbytes * (self.size - 1)
            with self._flight.exchange(self.name, "all_gather sizes", mine, to_each):
                dist.all_gather(every, mine, group=self._handle)
            sizes = [int(n) for n in every]
        most = max(sizes)
        if not most:
            return [x] * self.size
        padded = _bytes(x)
        if len(padded) < most:
            padded = torch.cat((padded, padded.new_zeros(most - len(padded), *padded.shape[1:])))
        parts = [torch.empty_like(padded) for _ in self.ranks]
        with self._flight.exchange(self.name, "all_gather", x, padded.nbytes * (self.size - 1)):
            dist.all_gather(parts, padded, group=self._handle)
        return [_typed(p[:n], x) for p, n in zip(parts, sizes, strict=True)]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of equally shaped tensors."""
        total = x.clone()
        if x.numel():
            # Shares of it travel once to be summed, and once as sums: a ring's, and the least.
            n_bytes = 2 * (self.size - 1) * x.nbytes // self.size
            with self._flight.exchange(self.name, "all_reduce", x, n_bytes):
                dist.all_reduce(total, group=self._handle)
        return total

    def all_to_all(
        self, parts: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Send part r to rank r; return what each rank sent, `sizes` rows of it."""
        like = parts[0]
        sent = _bytes(torch.cat(list(parts)))
        got = sent.new_empty(sum(sizes), *sent.shape[1:])
        n_bytes = sent.nbytes - parts[self.rank].nbytes
        with self._flight.exchange(self.name, "all_to_all", sent, n_bytes):
            dist.all_to_all_single(
                got, sent, list(sizes), [len(p) for p in parts], group=self._handle
            )
        return _typed(got, like).split(list(sizes))

    def noted(self, what: str, x: torch.Tensor) -> AbstractContextManager[None]:
        """Note an exchange that a vendor's operator makes by itself: its bytes are not counted."""
        return self._flight.exchange(self.name, what, x, 0)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """View [n, ...] as bytes [n, width]."""
    return x.contiguous().view(len(x), prod(x.shape[1:])).view(torch.uint8)


def _typed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.view(like.dtype).view(x.shape[0], *like.shape[1:])


@dataclass(frozen=True)
class Groups:
    """The groups one rank is in, and its place among the stages."""

    rank: int
    dp_rank: int
    tp: Group
    cp: Group
    ep: Group
    flight: Flight
    previous: int | None = None  # the rank with our part of the stage before
    following: int | None = None

    @property
    def is_first_of_stage(self) -> bool:
        """Whether no rank of this stage has a lower number."""
        return self.dp_rank == self.cp.rank == self.tp.rank == 0

    @classmethod
    def solo(cls, flight: Flight | None = None) -> Groups:
        """Return the groups of a world of one."""
        return cls(0, 0, Solo(), Solo(), Solo(), flight or Flight())

    @classmethod
    def join(
        cls, plan: Plan, rank: int, device: torch.device, flight: Flight, attempt: int
    ) -> Groups:
        """Meet the other ranks of this attempt and build the plan's groups.

        Raises:
            DeployError: the ranks have different plans.
        """
        p = plan.parallel
        timeout = timedelta(seconds=comm_timeout())
        store = _store(rank, p.world_size, timeout, attempt)
        dist.init_process_group(
            BACKEND_OF_DEVICE[device.type],
            store=store,
            rank=rank,
            world_size=p.world_size,
            timeout=timeout,
        )
        _agree(plan, rank, store)
        stage, within = divmod(rank, p.stage_size)
        dp_rank = within // (p.cp_size * p.tp_size)
        mine: dict[str, Group] = {}
        for name, ranks in group_ranks(plan):
            if len(ranks) == 1:
                if rank in ranks:
                    mine[name] = Solo()
                continue
            handle = dist.new_group(list(ranks))
            # The vendor's dispatch and combine allow no other operator on their communicator.
            has_mc2 = name == "ep" and device.type == "npu"
            mc2 = dist.new_group(list(ranks)) if has_mc2 else None
            if rank in ranks and handle is not None:
                hccl_name = _hccl_name(mc2, device) if mc2 is not None else None
                mine[name] = CommGroup(name, ranks, rank, handle, flight, hccl_name)
        return cls(
            rank,
            dp_rank,
            mine["tp"],
            mine["cp"],
            mine["ep"],
            flight,
            rank - p.stage_size if stage else None,
            rank + p.stage_size if stage < p.pp_size - 1 else None,
        )

    def receive(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Wait for the streams of the stage before."""
        if self.previous is None:
            raise ValueError("the first stage receives nothing")
        x = torch.empty(*shape, dtype=dtype, device=device)
        if len(x):
            with self.flight.exchange("pp", f"receive from rank {self.previous}", x, 0):
                dist.recv(_bytes(x), src=self.previous)
        return x

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if dist.is_initialized():
            dist.barrier()

    def send(self, x: torch.Tensor) -> dist.Work | None:
        """Begin to send streams to the next stage; keep `x` until the work is done.

        None where there is nothing to send: no token is here.
        """
        if self.following is None:
            raise ValueError("the last stage sends nothing")
        if not len(x):
            return None
        self.flight.count("pp", x.nbytes)
        return dist.isend(_bytes(x), dst=self.following)


def group_ranks(plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every group of a plan by name, in the one order in which all ranks make them."""
    p = plan.parallel
    for stage in range(p.pp_size):
        base = stage * p.stage_size
        for first in range(base, base + p.stage_size, p.tp_size):
            yield "tp", tuple(range(first, first + p.tp_size))
        for dp in range(p.dp_size):
            for tp in range(p.tp_size):
                first = base + dp * p.cp_size * p.tp_size + tp
                yield "cp", tuple(range(first, first + p.cp_size * p.tp_size, p.tp_size))
        for first in range(base, base + p.stage_size, p.ep_size):
            yield "ep", tuple(range(first, first + p.ep_size))


def _hccl_name(handle: dist.ProcessGroup, device: torch.device) -> str:
    backend: Any = handle._get_backend(device)
    return str(backend.get_hccl_comm_name(dist.get_rank(handle)))


def _store(rank: int, world_size: int, timeout: timedelta, attempt: int) -> Any:
    """Meet in a file, or on several hosts at rank 0. Addresses of ranks are an attempt's own."""
    kind, _, where = os.environ[STORE].partition("://")
    store: Any
    if kind == "file":
        store = dist.FileStore(where, -1)  # type: ignore[attr-defined]
        store.set_timeout(timeout)
    else:
        host, _, port = where.rpartition(":")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            int(port),
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=_listening(host, int(port)) if rank == 0 else None,
        )
    return dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]


def _listening(host: str, port: int) -> int:
    """Return a socket that listens at one address; torch's own would at all of the machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((host, port))
        s.listen(socket.SOMAXCONN)
        return s.detach()


def _agree(plan: Plan, rank: int, store: Any) -> None:
    """Compare plans as text: torch's exchange of objects would unpickle what comes."""
    store.set(f"plan-{rank}", plan.digest)
    digests = [store.get(f"plan-{r}").decode() for r in range(plan.parallel.world_size)]
    for other, digest in enumerate(digests):
        if digest != digests[0]:
            raise DeployError(
                f"rank {rank}: rank 0 has plan {digests[0][:16]}, rank {other} has {digest[:16]}"
            )


@contextmanager
def joined(
    plan: Plan, rank: int, device: torch.device, flight: Flight, attempt: int = 0
) -> Iterator[Groups]:
    """Join, and leave whatever happens."""
    if plan.parallel.world_size == 1:
        yield Groups.solo(flight)  # its steps are counted too
        return
    try:
        yield Groups.join(plan, rank, device, flight, attempt)
        dist.barrier()  # whoever leaves first takes its unread streams along
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
