"""Layout rules as data, and the checks they name.

The rules are in configs/rules.yaml, each with its source and date; a check gets a layout and
says with which numbers it breaks the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.load import Section, load_yaml
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.topology import ParallelConfig
from v4_ascend.supernode.memory import Serving
from v4_ascend.supernode.system import System


class Rule(Section):
    """One rule. `families`, `engines` and `roles` it applies to; empty means all."""

    id: str
    code: str
    kind: Literal["reject", "avoid", "derived", "note"]
    families: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    versions: str = "any"
    check: str | None = None
    allowed: tuple[int, ...] = ()
    limits: dict[str, int] = Field(default_factory=dict)
    text: str
    source: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


class Rules(Section):
    """The file configs/rules.yaml."""

    rules: tuple[Rule, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout to judge, and what it is for."""

    config: ModelConfig
    system: System
    serving: Serving
    parallel: ParallelConfig


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule and the numbers that break it."""

    rule: Rule
    numbers: str


@lru_cache(maxsize=1)
def all_rules() -> tuple[Rule, ...]:
    """Read the bundled rules."""
    path = Path(str(files("v4_ascend.configs") / "rules.yaml"))
    return load_yaml(Rules, path).value.rules


def applicable(system: System, serving: Serving) -> tuple[Rule, ...]:
    """Return the rules that speak about this device, engine and role."""
    return tuple(
        r
        for r in all_rules()
        if (not r.families or system.profile.family in r.families)
        and (not r.engines or serving.engine in r.engines)
        and (not r.roles or system.role in r.roles)
    )


def first_broken(
    candidate: Candidate, rules: tuple[Rule, ...], *, is_asked: bool = False
) -> Broken | None:
    """Return the first rule that refuses a layout; `avoid` refuses none that is asked for."""
    kinds = ("reject",) if is_asked else ("reject", "avoid")
    for rule in rules:
        if rule.kind in kinds and rule.check is not None:
            numbers = CHECKS[rule.check](candidate, rule)
            if numbers is not None:
                return Broken(rule, numbers)
    return None


def notes(candidate: Candidate, rules: tuple[Rule, ...]) -> list[Broken]:
    """Return the notes a chosen layout deserves."""
    found = []
    for rule in rules:
        if rule.kind in ("note", "avoid"):
            numbers = CHECKS[rule.check](candidate, rule) if rule.check else ""
            if numbers is not None:
                found.append(Broken(rule, numbers))
    return found


Check = Callable[[Candidate, Rule], str | None]
CHECKS: dict[str, Check] = {}


def _check(f: Check) -> Check:
    CHECKS[f.__name__.removeprefix("_")] = f
    return f


@_check
def _local_heads(c: Candidate, r: Rule) -> str | None:
    n, tp = c.config.n_heads, c.parallel.tp_size
    if c.parallel.dsa_cp or (n % tp == 0 and n // tp in r.allowed):
        return None
    legal = [n // heads for heads in r.allowed if n % heads == 0]
    return (
        f"{n} heads / tp {tp} = {n / tp:g} local heads, not in {list(r.allowed)}; "
        f"tp of {sorted(legal)} would do"
    )


@_check
def _tp_needs_dsa_cp(c: Candidate, r: Rule) -> str | None:
    p = c.parallel
    return f"tp {p.tp_size} without dsa_cp" if p.tp_size > 1 and not p.dsa_cp else None


@_check
def _dsa_cp_needs_tp(c: Candidate, r: Rule) -> str | None:
    return "dsa_cp with tp 1" if c.parallel.dsa_cp and c.parallel.tp_size == 1 else None


@_check
def _no_dsa_cp(c: Candidate, r: Rule) -> str | None:
    return f"dsa_cp with engine {c.serving.engine}" if c.parallel.dsa_cp else None


@_check
def _chunk_multiple_of_tp(c: Candidate, r: Rule) -> str | None:
    p, chunk = c.parallel, c.serving.max_chunk
    if p.dsa_cp and chunk % p.tp_size:
        return f"max_chunk {chunk} is no multiple of tp {p.tp_size}"
    return None


@_check
def _experts_divide(c: Candidate, r: Rule) -> str | None:
    n, more, ep = c.config.n_routed_experts, c.parallel.n_redundant_experts, c.parallel.ep_size
    if (n + more) % ep == 0 and ep <= n:
        return None
    return f"{n} experts + {more} copies over ep {ep} = {(n + more) / ep:g} a rank"


@_check
def _no_copies_of_int4(c: Candidate, r: Rule) -> str | None:
    n = c.parallel.n_redundant_experts
    return f"{n} redundant experts in w4a8" if n and c.serving.weight_format == "w4a8" else None


@_check
def _no_pp_with_dp_between_hosts(c: Candidate, r: Rule) -> str | None:
    p = c.parallel
    reach = c.system.levels[-1][1].n_devices if c.system.levels else 1
    if p.pp_size > 1 and p.dp_size > 1 and p.ep_size > reach:
        return f"pp {p.pp_size} with dp {p.dp_size}, ep {p.ep_size} beyond the fabric of {reach}"
    return None


@_check
def _no_pp(c: Candidate, r: Rule) -> str | None:
    return f"pp {c.parallel.pp_size}" if c.parallel.pp_size > 1 else None


@_check
def _no_cp(c: Candidate, r: Rule) -> str | None:
    return f"cp {c.parallel.cp_size}, role {c.system.role}" if c.parallel.cp_size > 1 else None


@_check
def _at_least(c: Candidate, r: Rule) -> str | None:
    kind = "pro" if c.config.n_routed_experts > r.limits["flash_experts"] else "flash"
    n, least = c.parallel.world_size, r.limits[kind]
    return f"{n} devices, stated are {least}" if n < least else None


@_check
def _context_at_least(c: Candidate, r: Rule) -> str | None:
    n, least = c.serving.max_model_len, r.limits["tokens"]
    return f"max_model_len {n:,} is below {least:,}" if n < least else None


@_check
def _has_drafter(c: Candidate, r: Rule) -> str | None:
    wanted = c.serving.n_draft_tokens
    if wanted and not c.config.n_draft_layers:
        return f"{wanted} draft tokens, the checkpoint has no MTP layer and no DSpark blocks"
    return None


@_check
def _tp_in_host(c: Candidate, r: Rule) -> str | None:
    tp, n = c.parallel.tp_size, c.system.devices_per_host
    return f"tp {tp} over hosts of {n} devices" if n % tp else None


@_check
def _tp_divides_groups(c: Candidate, r: Rule) -> str | None:
    tp, heads, groups = c.parallel.tp_size, c.config.n_heads, c.config.o_groups
    if heads % tp == 0 and (groups % tp == 0 or (c.serving.engine == "vllm" and c.parallel.dsa_cp)):
        return None
    return f"tp {tp} with {heads} heads and {groups} output groups"


@_check
def _ep_in_supernode(c: Candidate, r: Rule) -> str | None:
    ep, sizes = c.parallel.ep_size, c.system.supernode_sizes
    if len(sizes) > 1 and (ep > min(sizes) or any(size % ep for size in sizes)):
        return f"ep {ep} over supernodes of {sorted(set(sizes))} devices"
    return None


@_check
def _ep_whole_tp(c: Candidate, r: Rule) -> str | None:
    ep, inner = c.parallel.ep_size, c.parallel.tp_size * c.parallel.cp_size
    if ep % inner and inner % ep:
        return f"ep {ep} and tp * cp = {inner}"
    return None


@_check
def _experts_in_dispatch(c: Candidate, r: Rule) -> str | None:
    p = c.parallel
    n = -(-(c.config.n_routed_experts + p.n_redundant_experts) // p.ep_size) * p.ep_size
    return f"{n} experts in one dispatch" if n > r.limits["experts"] else None


@_check
def _format_supported(c: Candidate, r: Rule) -> str | None:
    fmt, known = c.serving.weight_format, c.system.profile.weight_formats
    return (
        f"{fmt} on {c.system.profile.name}, which takes {list(known)}" if fmt not in known else None
    )


@_check
def _mc2_on_a2(c: Candidate, r: Rule) -> str | None:
    p = c.parallel
    local = -(-c.config.n_routed_experts // p.ep_size)
    if p.ep_size > 1 and (p.ep_size < r.limits["ep"] or local > r.limits["experts"]):
        return f"ep {p.ep_size}, {local} experts a device"
    return None


@_check
def _ep_at_most(c: Candidate, r: Rule) -> str | None:
    ep, most = c.parallel.ep_size, r.limits[c.system.profile.family]
    return f"ep {ep} above {most}" if ep > most else None


@_check
def _ep_is_stage(c: Candidate, r: Rule) -> str | None:
    ep, n = c.parallel.ep_size, c.parallel.stage_size
    return f"ep {ep} inside {n} devices of a stage; 1 or {n} would do" if ep not in (1, n) else None


@_check
def _enough_for_dspark(c: Candidate, r: Rule) -> str | None:
    n, least = c.serving.n_draft_tokens, r.limits["tokens"]
    if c.config.dspark is not None and 0 < n < least:
        return f"{n} draft tokens, at least {least}"
    return None
