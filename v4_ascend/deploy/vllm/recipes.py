"""What vLLM is started with beside the plan's sizes: configs/vllm/recipes.yaml."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from v4_ascend.config.load import Section, load_yaml
from v4_ascend.supernode.plan import Role
from v4_ascend.supernode.planning import MANY_EXPERTS, PoolPlan

Condition = Literal[
    "networked", "several_hosts", "split", "tp", "dsa_cp", "int8", "draft", "many_experts"
]


class Recipe(Section):
    """What holds for one pool; or, of a setting, what it adds."""

    env: dict[str, str] = Field(default_factory=dict)
    flags: dict[str, str] = Field(default_factory=dict)
    additional: dict[str, bool] = Field(default_factory=dict)
    ascend_compilation: dict[str, bool] = Field(default_factory=dict)
    compilation: dict[str, str] = Field(default_factory=dict)
    speculative: dict[str, bool] = Field(default_factory=dict)
    transfer: dict[str, str] = Field(default_factory=dict)


class Setting(Recipe):
    """Variables and flags, and for what they hold."""

    families: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()
    needs: tuple[Condition, ...] = ()
    without: tuple[Condition, ...] = ()
    source: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


class TransferPorts(Section):
    """How caches go from prefill to decode; each device of a host takes a port from one on."""

    families: tuple[str, ...]
    connector: str
    prefill_port: int
    decode_port: int
    first_port: int
    source: str
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")


class Recipes(Section):
    """The file configs/vllm/recipes.yaml."""

    vllm: str
    vllm_ascend: str
    settings: tuple[Setting, ...]
    transfer: tuple[TransferPorts, ...]


@lru_cache(maxsize=1)
def recipes() -> Recipes:
    """Read the bundled recipes."""
    path = Path(str(files("v4_ascend.configs") / "vllm" / "recipes.yaml"))
    return load_yaml(Recipes, path).value


def conditions(pool: PoolPlan) -> set[Condition]:
    """Return which conditions of the recipes a pool meets."""
    if pool.chosen is None:
        return set()
    p, serving = pool.chosen.parallel, pool.search.serving
    split = pool.system.role != "both"
    several = -(-p.world_size // pool.system.devices_per_host) > 1
    met: dict[Condition, bool] = {
        "networked": several or split,
        "several_hosts": several,
        "split": split,
        "tp": p.tp_size > 1,
        "dsa_cp": p.dsa_cp,
        "int8": serving.weight_format in ("w8a8", "w4a8"),
        "draft": serving.n_draft_tokens > 0,
        "many_experts": pool.search.config.n_routed_experts > MANY_EXPERTS,
    }
    return {condition for condition, is_so in met.items() if is_so}


def recipe_for(pool: PoolPlan) -> Recipe:
    """Lay the entries that hold for a pool over one another."""
    met, found = conditions(pool), Recipe()
    for s in recipes().settings:
        if s.families and pool.system.profile.family not in s.families:
            continue
        if s.roles and pool.system.role not in s.roles:
            continue
        if met.issuperset(s.needs) and met.isdisjoint(s.without):
            for name in Recipe.model_fields:
                getattr(found, name).update(getattr(s, name))
    return found
