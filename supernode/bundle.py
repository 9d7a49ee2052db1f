"""Write what a plan produces into a folder: whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4_ascend.config.topology import Topology
from v4_ascend.errors import ConfigError
from v4_ascend.supernode.environment import env_file, environment, host_environment
from v4_ascend.supernode.plan_page import page
from v4_ascend.supernode.planning import PoolPlan, plan_for
from v4_ascend.supernode.ranktable.file import write_table
from v4_ascend.supernode.ranktable.model import RankTable
from v4_ascend.supernode.ranktable.planned import table_for


def write_bundle(
    folder: Path,
    topology: Topology,
    pools: tuple[PoolPlan, ...],
    report: Mapping[str, Any],
    given: RankTable | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[str]:
    """Write plan.json and rank table (one for each pool), env files, report.json and plan.html.

    `extra` are further text files by name, such as the commands of another engine.
    The rank table has the addresses `given`, or placeholders that HCCL refuses to read.

    The files are written beside `folder` and renamed in one step; a folder that is there is
    replaced only if it is such a bundle.

    Raises:
        ConfigError: `folder` is something else, or lies in no folder.
    """
    if folder.exists() and not (folder.is_dir() and (folder / "report.json").is_file()):
        raise ConfigError("--out", f"{folder} is there and is no plan; give another folder")
    if not folder.absolute().parent.is_dir():
        raise ConfigError("--out", f"{folder.absolute().parent} is no folder")
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir()
        names = _write(half, topology, pools, report, given)
        for name, text in (extra or {}).items():
            (half / name).write_text(text, encoding="utf-8")
            names.append(name)
        if folder.exists():
            shutil.rmtree(folder)
        half.replace(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return names


def _write(
    half: Path,
    topology: Topology,
    pools: tuple[PoolPlan, ...],
    report: Mapping[str, Any],
    given: RankTable | None,
) -> list[str]:
    names = ["report.json", "plan.html"]
    (half / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (half / "plan.html").write_text(page(report), encoding="utf-8")
    for pool in pools:
        role = "" if pool.system.role == "both" else f"{pool.system.role}-"
        plan_for(topology, pool).write(half / f"{role}plan.json")
        (half / "env").mkdir(exist_ok=True)
        common = environment(pool)
        for host in pool.system.hosts:
            text = env_file((*common, *host_environment(pool, host)))
            (half / "env" / f"{host}.env").write_text(text, encoding="utf-8")
        names += [f"{role}plan.json", f"env/ ({len(pool.system.hosts)} hosts)"]
        if pool.system.profile.kind == "npu" and not pool.system.profile.emulated:
            table = table_for(pool, topology.cluster.supernodes, given)
            write_table(table, half / f"{role}ranktable.json")
            names.append(f"{role}ranktable.json ({table.status})")
    return names
