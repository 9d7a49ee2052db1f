"""What changes from one plan to another."""

from __future__ import annotations

from typing import Any

from v4_ascend.supernode.plan import Plan, experts_of


def plan_diff(a: Plan, b: Plan) -> dict[str, Any]:
    """List changed settings, and count the ranks that hold something else."""
    first, second = a.model_dump(mode="json"), b.model_dump(mode="json")
    settings = []
    for key in first:
        if key in ("ranks", "api_keys", "expert_placement"):
            continue
        if isinstance(first[key], dict):
            pairs = [(f"{key}.{k}", first[key][k], second[key][k]) for k in first[key]]
        else:
            pairs = [(key, first[key], second[key])]
        settings += [{"key": k, "from": x, "to": y} for k, x, y in pairs if x != y]
    if a.api_keys != b.api_keys:
        settings.append({"key": "api_keys", "from": "(hidden)", "to": "(hidden)"})
    old = {r.rank: (r, experts_of(a, r)) for r in a.ranks}
    moved = [r.rank for r in b.ranks if old.get(r.rank) != (r, experts_of(b, r))]
    return {
        "settings": settings,
        "ranks": len(b.ranks),
        "ranks_moved": len(moved) + max(0, len(a.ranks) - len(b.ranks)),
        "moved": moved,
    }
