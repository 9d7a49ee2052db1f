"""What differs between the plan that runs and the one that is wanted, and what that restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from v4_ascend import __version__
from v4_ascend.supernode.plan import Plan, Rank

HIDDEN = "(hidden)"


class Scope(Enum):
    """What a change restarts."""

    NOTHING = "nothing: there is no change"
    FRONT = "nothing: the running front takes it"
    ALL = "front and ranks"


# Each field of a plan: the topology's key it comes from, and what a change of it restarts.
FIELDS: dict[str, tuple[str, Scope]] = {
    "schema_version": ("v4-ascend", Scope.ALL),
    "name": ("name", Scope.ALL),
    "role": ("cluster.pools", Scope.ALL),
    "device": ("cluster.device", Scope.ALL),
    "backend": ("runtime.backend", Scope.ALL),
    "chip": ("cluster.device: chip", Scope.ALL),
    "emulated": ("cluster.device: emulated", Scope.ALL),
    "checkpoint": ("model.checkpoint", Scope.ALL),
    "model_name": ("model.name", Scope.ALL),
    "reference": ("model.reference", Scope.ALL),
    "parallel": ("layout", Scope.ALL),
    "ranks": ("ranks", Scope.ALL),
    "expert_placement": ("placement of experts", Scope.ALL),
    "host": ("serve.host", Scope.ALL),
    "port": ("serve.port", Scope.ALL),
    "max_model_len": ("serve.max_model_len", Scope.ALL),
    "max_batch_size": ("serve.concurrency", Scope.ALL),
    "max_chunk": ("runtime.max_chunk", Scope.ALL),
    "capture_sizes": ("runtime.capture_sizes", Scope.ALL),
    "cache_tokens": ("serve.cache_tokens", Scope.ALL),
    "prefix_snapshots": ("serve.prefix_snapshots", Scope.ALL),
    "n_draft_tokens": ("serve.n_draft_tokens", Scope.ALL),
    "min_draft_confidence": ("serve.min_draft_confidence", Scope.ALL),
    "dtype": ("runtime.dtype", Scope.ALL),
    "quant_sim": ("runtime.quant_sim", Scope.ALL),
    "kernels": ("runtime.kernels", Scope.ALL),
    "fallback": ("runtime.fallback", Scope.ALL),
    "api_keys": ("serve.api_keys", Scope.FRONT),
    "requests_per_minute": ("serve.requests_per_minute", Scope.FRONT),
    "max_body_bytes": ("serve.max_body_bytes", Scope.FRONT),
    "cors_origins": ("serve.cors_origins", Scope.FRONT),
}


@dataclass(frozen=True)
class Change:
    """One setting: what it is where it runs, and what is wanted, as people read them."""

    key: str
    running: str
    wanted: str
    restarts: Scope


def changes(running: Plan, wanted: Plan, version: str = __version__) -> list[Change]:
    """List what differs; `version` is the software's that runs.

    On which devices of its hosts a plan lies is no difference: a shadow lies beside what it
    replaces.
    """
    found = []
    if version != __version__:
        found.append(Change("v4-ascend", version or "an earlier one", __version__, Scope.ALL))
    for field, (key, scope) in FIELDS.items():
        for part, old, new in _parts(field, running, wanted):
            if old != new:
                found.append(Change(f"{key}{part}", *_shown(field, old, new), scope))
    return found


def _parts(field: str, a: Plan, b: Plan) -> Iterator[tuple[str, object, object]]:
    """Yield what is compared of a field, by the end of its key."""
    if field == "parallel":
        for size in type(a.parallel).model_fields:
            yield f".{size}", getattr(a.parallel, size), getattr(b.parallel, size)
    elif field == "ranks":
        yield "", _held(a), _held(b)
    else:
        yield "", getattr(a, field), getattr(b, field)


def _held(plan: Plan) -> list[Rank]:
    """Say what each rank holds, and on which host, whatever its device's number there."""
    return [r.model_copy(update={"device": 0}) for r in plan.ranks]


def _shown(field: str, old: object, new: object) -> tuple[str, str]:
    if field == "api_keys":
        return HIDDEN, HIDDEN
    if field == "ranks" and isinstance(old, Sequence) and isinstance(new, Sequence):
        return f"{len(old)} of them", f"{len(new)}, with other layers, experts or hosts"
    if field == "expert_placement":
        return "another", "other copies or places"
    return _text(old), _text(new)


def _text(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def scope_of(found: Sequence[Change]) -> Scope:
    """Return what all changes together restart."""
    scopes = {c.restarts for c in found}
    return next((s for s in (Scope.ALL, Scope.FRONT) if s in scopes), Scope.NOTHING)
