"""One rank's model: runs steps of ragged batches and samples from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from msgspec.structs import replace

from v4_ascend.backends import find_backend
from v4_ascend.chat import ChatTokenizer
from v4_ascend.checkpoint.sources import whole
from v4_ascend.config.model import ModelConfig
from v4_ascend.errors import CaptureError, ParityError
from v4_ascend.model.batch import Batch
from v4_ascend.model.dspark import Targets
from v4_ascend.model.numerics import Numerics
from v4_ascend.model.shard import gathered, rows_of, span_of
from v4_ascend.model.transformer import Observer, Transformer
from v4_ascend.runtime.comm import Groups, Work
from v4_ascend.runtime.drafter import drafter_of
from v4_ascend.runtime.graphs import DecodeGraphs, Recorder, recorder_of
from v4_ascend.runtime.guide import GuideFactory
from v4_ascend.runtime.kv_cache import Chunk, KVCache
from v4_ascend.runtime.limits import limits_of
from v4_ascend.runtime.load import load_rank, open_for_rank
from v4_ascend.runtime.messages import Sampled, SequenceStep, Step, StepResult
from v4_ascend.runtime.parity import cache_records
from v4_ascend.runtime.sampler import Sampler
from v4_ascend.supernode.capture import few_sizes
from v4_ascend.supernode.plan import Plan

SENDS = 4  # streams on their way to the next stage, which is hardly further behind


class Engine:
    """One rank's part of the model and its caches; one step at a time, all ranks alike.

    Slots are numbered over the deployment: DP group g has those from g * `n_slots` on.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_batch_size: int,
        max_model_len: int,
        max_chunk: int,
        records: tuple[str, str],
        device: str = "cpu",
        min_page_rows: int = 1,
        groups: Groups | None = None,
        guides: GuideFactory | None = None,
        n_pages: int | None = None,
        n_snapshots: int = 0,
        n_drafts: int = 0,
        min_confidence: float = 0.0,
    ) -> None:
        self.model, self.groups = model, groups or Groups.solo()
        self.n_slots = max_batch_size
        self.max_model_len = max_model_len
        self.max_chunk = max_chunk
        self.device = torch.device(device)
        self.sampler = Sampler(
            model.config.vocab_size, model.config.eos_token_id, self.device, guides
        )
        self._sends: deque[tuple[torch.Tensor, Work]] = deque()
        self.cache = KVCache(
            model.config,
            n_slots=max_batch_size,
            max_model_len=max_model_len,
            max_chunk=max_chunk,
            kv_record=records[0],
            index_record=records[1],
            device=device,
            min_page_rows=min_page_rows,
            layers=model.cached_layers,
            n_pages=n_pages,
            n_snapshots=n_snapshots,
            n_drafts=n_drafts,
        )
        first = self.groups.dp_rank * max_batch_size
        dspark = model.config.dspark
        self.graphs: DecodeGraphs | None = None
        self.targets = Targets(dspark, model.shard.layers) if dspark and n_drafts else None
        self.drafter = drafter_of(model, self.cache, self.targets, first, n_drafts, min_confidence)

    @classmethod
    def load(
        cls, plan: Plan, progress: Callable[[int, int], None], groups: Groups | None = None
    ) -> Engine:
        """Load what the plan gives this rank; `progress` sees its bytes read and in all.

        Raises:
            BackendUnavailableError: the plan's backend cannot run here.
            CheckpointError: it is not the checkpoint its config describes.
        """
        groups = groups or Groups.solo()
        backend = find_backend(plan.backend, "plan.backend")
        backend.require()
        backend.use_chip(plan.chip)
        folder = whole(plan.checkpoint)
        checkpoint = open_for_rank(folder, plan, groups.rank)
        config = checkpoint.config
        numerics = Numerics.of(config, plan.dtype, plan.quant_sim)
        device = backend.device()
        model = load_rank(checkpoint, plan, groups, numerics, progress=progress, device=device)
        limits = limits_of(plan, config)
        guides = None
        if model.head is not None and groups.tp.rank == groups.cp.rank == 0:  # it draws tokens
            guides = GuideFactory(ChatTokenizer.load(folder), config.vocab_size)
        return cls(
            model,
            max_batch_size=limits.n_slots,
            max_model_len=plan.max_model_len,
            max_chunk=plan.max_chunk,
            records=cache_records(backend, config, numerics, plan.kernels),
            device=device,
            min_page_rows=backend.min_page_rows,
            groups=groups,
            guides=guides,
            n_pages=limits.n_pages,
            n_snapshots=limits.n_snapshots,
            n_drafts=limits.n_drafts,
            min_confidence=plan.min_draft_confidence,
        )

    @property
    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return self.model.config

    @property
    def answers(self) -> bool:
        """Whether this rank draws tokens: on the last stage, the first of its DP group."""
        return self.model.head is not None and self.groups.tp.rank == self.groups.cp.rank == 0

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded below fp32."""
        numerics = self.model.numerics
        return numerics.dtype == torch.float32 and not numerics.quant_sim

    def expert_counts(self) -> list[list[int]]:
        """Return the rows each slot of each layer here got, canary's included."""
        return [block.ffn.load.tolist() for block in self.model.layers]

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], recorder: Recorder | None = None) -> None:
        """Capture steps that decode so many sequences; `step` replays them from now on.

        No request may have begun: their caches are written to.

        Raises:
            CaptureError: a step reads values on the host.
            ParityError: a replayed step is not the step itself.
        """
        if sizes:
            recorder = recorder or recorder_of(self.device)
            self.graphs = DecodeGraphs(self.model, self.cache, sizes, recorder)

    def capture_few(self) -> str | None:
        """Capture steps of few sequences, or return why they cannot be; as `capture`."""
        try:
            self.capture(few_sizes(self.n_slots))
        except (CaptureError, ParityError) as e:
            return str(e)
        return None

    @torch.inference_mode()
    def step(self, step: Step, *, may_replay: bool = True) -> StepResult:
        """Run the next tokens of this rank's sequences; draw where one asks for it.

        `may_replay` False calls each operator, of captured steps too.

        Ranks that do not draw return no tokens. A draft that is drawn itself lets what is drawn
        behind it count too: the same tokens as without, as a drawn token depends on logits, seed
        and position alone.

        Raises:
            ValueError: drafts are wanted of a model that was read without its drafter.
        """
        self.groups.flight.step = step.number
        first = self.groups.dp_rank * self.n_slots
        mine = [s for s in step.sequences if first <= s.slot < first + self.n_slots]
        for s in mine:
            self.cache.place(s.slot - first, s.first_page, s.pages)
            if s.restore is not None:
                self.cache.restore(s.slot - first, s.start, s.restore)
        if step.drafts and self.drafter is None and self.model.head is not None:
            raise ValueError("the model was read without its drafter")
        chunks = [Chunk(s.slot - first, s.token_ids, s.start) for s in mine]
        replayed = None
        if self.graphs is not None and mine and may_replay and not step.drafts:
            replayed = self.graphs.streams(chunks)
        batch = None
        if replayed is not None:
            streams = self._finite(replayed)
        else:
            batch, streams = self._forward(chunks, targets=self.targets if step.drafts else None)
        drawn = self._draw(mine, streams) if mine else []
        if step.drafts and self.drafter is not None:
            guesses = self.drafter(mine, drawn, batch, streams)
            for tokens, ids in zip([t for t in drawn if t], guesses, strict=self.answers):
                tokens[-1] = replace(tokens[-1], drafts=ids)
        for s in mine:
            if s.save is not None:
                n_tokens = s.start + len(s.token_ids) - s.n_drafts
                self.cache.save(s.slot - first, n_tokens, s.save)
        return StepResult(step.number, [d for of_sequence in drawn for d in of_sequence])

    def _draw(self, mine: Sequence[SequenceStep], streams: torch.Tensor) -> list[list[Sampled]]:
        """Return what each sequence has drawn here: a token, and one more for each right draft."""
        drawn: list[list[Sampled]] = [[] for _ in mine]
        if self.model.head is None:
            return drawn
        if self.answers:
            self.sampler.take(mine)
        wanted, rows, stop = [], [], 0
        for i, s in enumerate(mine):
            stop += len(s.token_ids)
            if s.sampling is None:
                continue
            for n_behind in range(s.n_drafts, -1, -1):
                ids = s.token_ids[: len(s.token_ids) - n_behind]
                wanted.append((i, replace(s, token_ids=ids, n_drafts=s.n_drafts - n_behind)))
                rows.append(stop - 1 - n_behind)
        if not wanted:
            return drawn
        streams = rows_of(streams, rows, stop, self.model.shard.cp)
        if self.groups.cp.rank:
            return drawn
        logits = self.model.logits(streams)
        if not self.answers:
            return drawn
        tokens = self.sampler.draw([s for _, s in wanted], logits)
        for (i, _), token in zip(wanted, tokens, strict=True):
            s, before = mine[i], [d.token_id for d in drawn[i]]
            drafts = s.token_ids[len(s.token_ids) - s.n_drafts :]
            if before == drafts[: len(before)]:
                drawn[i].append(token)
        return drawn

    @torch.inference_mode()
    def logits(
        self, chunks: Sequence[Chunk], observe: Observer | None = None
    ) -> torch.Tensor | None:
        """Return fp32 logits of every token of a step, on the last stage; None on the others."""
        batch, streams = self._forward(chunks, observe)
        if batch is None or self.model.head is None:
            return None
        return gathered(self.model.logits(streams), batch.n_tokens, self.model.shard.cp)

    def _forward(
        self,
        chunks: Sequence[Chunk],
        observe: Observer | None = None,
        targets: Targets | None = None,
    ) -> tuple[Batch | None, torch.Tensor]:
        """Run this stage: from the tokens or the stage before, on to the stage behind.

        `targets` see the streams too, and travel with them.
        """
        groups, model = self.groups, self.model
        batch = self.cache.batch(chunks) if chunks else None
        n_own = 0
        if batch is not None:
            begin, end = span_of(batch.n_tokens, model.shard.cp)
            n_own = end - begin
        streams = None
        if groups.previous is not None:
            c = self.config
            n = c.hc_mult + (len(targets.before) if targets is not None else 0)
            streams = groups.receive((n_own, n, c.dim), model.numerics.dtype, self.device)
            if targets is not None:
                streams = targets.unpacked(streams)
        if targets is not None:
            observe = targets.observe
        x = self._finite(model(batch, self.cache.layers, observe, streams=streams))
        if groups.following is not None:
            self._send(targets.packed(x) if targets is not None else x)
        return batch, x

    def _finite(self, x: torch.Tensor) -> torch.Tensor:
        first, end = self.model.shard.layers
        if not bool(x.isfinite().all()):
            raise ParityError(
                f"rank {self.groups.rank}: step {self.groups.flight.step}: layers {first} to "
                f"{end - 1} made values that are not finite"
            )
        return x

    def _send(self, x: torch.Tensor) -> None:
        """Send streams, and let go of those that have arrived; gloo says it only to who waits."""
        while self._sends and self._sends[0][1].is_completed():
            self._sends.popleft()
        if len(self._sends) == SENDS:
            sent, work = self._sends.popleft()
            with self.groups.flight.wait("pp", f"send to rank {self.groups.following}", sent):
                work.wait()
        x = x.contiguous()
        if (begun := self.groups.send(x)) is not None:
            self._sends.append((x, begun))

    def sequence(
        self,
        ids: list[int],
        *,
        prefill: int,
        chunk: int,
        streams: dict[int, list[torch.Tensor]] | None = None,
    ) -> torch.Tensor | None:
        """Return logits of every position of one sequence, run by every DP group alike.

        Of stages without the head None. `streams` is given what leaves each layer here.
        """

        def observe(layer: int, x: torch.Tensor) -> None:
            if streams is not None:
                streams.setdefault(layer, []).append(x.cpu())

        parts, start = [], 0
        while start < len(ids):
            size = min(chunk, prefill - start) if start < prefill else 1
            parts.append(self.logits([Chunk(0, ids[start : start + size], start)], observe))
            start += size
        seen = [p.cpu() for p in parts if p is not None]
        return torch.cat(seen) if seen else None
