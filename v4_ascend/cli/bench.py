"""`bench`: how fast, measured here and now."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.cli.bench_context import context_command
from v4_ascend.cli.bench_layer import layer_command
from v4_ascend.cli.bench_ops import ops_command
from v4_ascend.cli.bench_plan import plan_command
from v4_ascend.cli.bench_serve import serve_command
from v4_ascend.cli.convert import Format
from v4_ascend.cli.group import Group

bench = typer.Typer(cls=Group, no_args_is_help=True, help="Measure speed on this machine.")


class Against(StrEnum):
    """Another implementation, run in the same process."""

    transformers = "transformers"


def register(app: typer.Typer) -> None:
    """Add the command group to the app."""
    bench.command("context")(context_command)
    bench.command("layer")(layer_command)
    bench.command("ops")(ops_command)
    bench.command("plan")(plan_command)
    bench.command("serve")(serve_command)
    app.add_typer(bench, name="bench")


@bench.callback()
def group() -> None:
    """Measure speed on this machine."""


CheckpointOption = Annotated[Path, typer.Option(help="checkpoint folder")]
Prompt = Annotated[int, typer.Option(min=1, help="tokens that are prefilled")]
Chunk = Annotated[
    int | None, typer.Option(min=1, help="tokens of a prefill step; default: all of the prompt")
]
Rounds = Annotated[int, typer.Option(min=1, help="the best one counts")]
BackendOption = Annotated[str, typer.Option(help="whose kernels run")]
AgainstOption = Annotated[Against | None, typer.Option(help="run it too, in turns")]
Json = Annotated[bool, typer.Option("--json", help="for scripts")]


@bench.command("prefill")
def prefill_command(
    checkpoint: CheckpointOption,
    prompt: Prompt = 512,
    chunk: Chunk = None,
    rounds: Rounds = 5,
    backend: BackendOption = "cpu",
    against: AgainstOption = None,
    as_json: Json = False,
) -> None:
    """Time one prompt, tokens per second; transformers takes it in one step."""
    work = (1, prompt, chunk or prompt, 1, rounds)
    _run("prefill", checkpoint, *work, backend, against, as_json)


@bench.command("decode")
def decode_command(
    checkpoint: CheckpointOption,
    prompt: Prompt = 512,
    chunk: Chunk = None,
    tokens: Annotated[int, typer.Option(min=1, help="decoded behind it, one at a time")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="sequences, each behind its own prompt")] = 1,
    rounds: Rounds = 5,
    backend: BackendOption = "cpu",
    against: AgainstOption = None,
    as_json: Json = False,
) -> None:
    """Time sequences that grow token by token, tokens per second of all together."""
    work = (batch, prompt, chunk or prompt, tokens, rounds)
    _run("decode", checkpoint, *work, backend, against, as_json)


@bench.command("generate")
def generate_command(
    checkpoint: CheckpointOption,
    prompts: Annotated[int, typer.Option(min=1, help="answered at once")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of the longest")] = 64,
    shortest: Annotated[
        int | None, typer.Option(min=1, help="tokens of the shortest; default: a quarter of it")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="drawn behind each, greedily")] = 64,
    rounds: Rounds = 3,
    against: AgainstOption = None,
    as_json: Json = False,
) -> None:
    """Time the serving engine on many prompts, tokens per second of all together."""
    import torch

    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.bench_generate import Generation, bench_generate

    with reporter("timing rounds") as progress:
        speeds = bench_generate(
            Checkpoint(checkpoint),
            Generation(
                n_prompts=prompts,
                shortest=shortest or -(-prompt // 4),
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
            ),
            against_transformers=against is not None,
            progress=progress,
        )
    if as_json:
        sides = {s.who: {"tokens_per_s": s.tokens_per_s, "same": s.same} for s in speeds}
        data = {"what": "generate", "threads": torch.get_num_threads(), "sides": sides}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    lengths = f"{shortest or -(-prompt // 4)} to {prompt}"
    what = f"{prompts} prompts of {lengths} tokens, {tokens} drawn behind each"
    what += f", {torch.get_num_threads()} threads"
    typer.echo(f"| {what} | tokens/s | ours is | same answers |\n|---|---|---|---|")
    for s in speeds:
        ratio = speeds[0].tokens_per_s / s.tokens_per_s
        typer.echo(f"| {s.who} | {s.tokens_per_s:,.1f} | {ratio:.2f} x | {s.same} of {prompts} |")


@bench.command("shard")
def shard_command(
    checkpoint: CheckpointOption,
    plan: Annotated[Path, typer.Option(help="plan.json")],
    scratch: Annotated[Path, typer.Option(help="folder on the disk to time, for two copies")],
    rounds: Rounds = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="as shard --workers")] = None,
    as_json: Json = False,
) -> None:
    """Time shard against cp of the bytes it wrote, on one disk, bytes per second."""
    from v4_ascend.checkpoint.copy_speed import copy_speed
    from v4_ascend.checkpoint.folder import CheckpointFolder
    from v4_ascend.cli.progress import reporter
    from v4_ascend.supernode.plan import Plan

    n_workers = workers or min(8, os.cpu_count() or 1)
    with reporter("timing rounds") as progress:
        best = copy_speed(
            CheckpointFolder(checkpoint),
            Plan.read(plan),
            scratch,
            rounds=rounds,
            workers=n_workers,
            progress=progress,
        )
    ways = {"shard": best.shard, "cp": best.cp, "cp and fsync": best.cp_synced}
    rates = {way: best.nbytes / seconds for way, seconds in ways.items()}
    if as_json:
        data = {"what": "shard", "bytes": best.nbytes, "workers": n_workers, "bytes_per_s": rates}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    typer.echo(
        f"| {best.nbytes:,} bytes, {n_workers} workers | GB/s | shard's ratio |\n|---|---|---|"
    )
    for way, rate in rates.items():
        typer.echo(f"| {way} | {rate / 1e9:.2f} | {rates['shard'] / rate:.2f} |")


@bench.command("convert")
def convert_command(
    checkpoint: CheckpointOption,
    scratch: Annotated[Path, typer.Option(help="folder on the disk to time, for one copy")],
    to: Annotated[
        list[Format] | None, typer.Option("--to", help="formats; default: all but mxfp4")
    ] = None,
    rounds: Rounds = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="as convert --workers")] = None,
    as_json: Json = False,
) -> None:
    """Time convert from disk to disk, bytes of the checkpoint per second."""
    from v4_ascend.checkpoint.convert_speed import convert_speed
    from v4_ascend.checkpoint.folder import CheckpointFolder
    from v4_ascend.cli.progress import reporter

    n_workers = workers or min(8, os.cpu_count() or 1)
    formats = to or [f for f in Format if f is not Format.mxfp4]
    folder = CheckpointFolder(checkpoint)
    with reporter("timing rounds") as progress:
        rates = convert_speed(
            folder,
            [f.value for f in formats],
            scratch,
            rounds=rounds,
            workers=n_workers,
            progress=progress,
        )
    nbytes = sum(h.nbytes for h in folder.headers.values())
    if as_json:
        data = {"what": "convert", "bytes": nbytes, "workers": n_workers, "bytes_per_s": rates}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    plain = rates.get("plain")
    typer.echo(f"| {nbytes:,} bytes, {n_workers} workers | MB/s | ratio |\n|---|---|---|")
    for way, rate in rates.items():
        name = "FP4 to FP8 as the official script does it, in memory" if way == "plain" else way
        typer.echo(f"| {name} | {rate / 1e6:,.0f} | {f'{rate / plain:.1f}' if plain else ''} |")


@bench.command("load")
def load_command(
    checkpoint: CheckpointOption,
    rounds: Rounds = 3,
    warm: Annotated[
        bool, typer.Option("--warm", help="leave the files in the page cache between reads")
    ] = False,
    every_way: Annotated[
        bool, typer.Option("--every-way", help="other ways to read tensors too")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time reading every tensor against the fastest raw read of the files, bytes per second."""
    from v4_ascend.checkpoint.load_speed import RAW, load_speed
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.cli.progress import reporter

    with reporter("timing rounds") as progress:
        best = load_speed(
            Checkpoint(checkpoint),
            rounds=rounds,
            is_cold=not warm,
            every_way=every_way,
            progress=progress,
        )
    rates = {way: best.nbytes / seconds for way, seconds in best.seconds.items()}
    if as_json:
        data = {"what": "load", "bytes": best.nbytes, "warm": warm, "bytes_per_s": rates}
        data["raw"] = best.raw
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    state = "warm" if warm else "cold"
    typer.echo(f"| {best.nbytes:,} bytes, {state} | GB/s | ratio to raw |\n|---|---|---|")
    for way, rate in rates.items():
        typer.echo(f"| {way} | {rate / 1e9:.2f} | {rate / rates[RAW]:.2f} |")


@bench.command("checkpoint")
def checkpoint_command(
    checkpoint: CheckpointOption,
    plan: Annotated[Path, typer.Option(help="plan.json")],
    scratch: Annotated[Path, typer.Option(help="folder on the disk to time, for two copies")],
    rounds: Rounds = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="as shard --workers")] = None,
    as_json: Json = False,
) -> None:
    """Time shard, convert and loading, and count the most memory each takes: README's table."""
    import msgspec

    from v4_ascend.checkpoint.costs import measured, table
    from v4_ascend.cli.progress import reporter

    n_workers = workers or min(8, os.cpu_count() or 1)
    with reporter("timing commands") as progress:
        found = measured(
            checkpoint, plan, scratch, rounds=rounds, workers=n_workers, progress=progress
        )
    if as_json:
        data = msgspec.to_builtins(found)
        result = {"version": 1, "status": "ok", "data": data, "diagnostics": []}
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(table(found))


@bench.command("ranks")
def ranks_command(
    checkpoint: CheckpointOption,
    steps: Annotated[int, typer.Option(min=1, help="decoded tokens of each sequence")] = 24,
    as_json: Json = False,
) -> None:
    """Time layouts of 1 to 8 processes against one process, tokens per second.

    Beside it stand the bytes that leave ranks for a token and the idle part of each stage's time,
    as measured in the ranks and as the plan says.
    """
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.bench_ranks import bench_ranks

    with reporter("timing layouts") as progress:
        speeds = bench_ranks(checkpoint, steps, progress)
    if as_json:
        rates = {s.what: s.tokens_per_s for s in speeds}
        layouts = [asdict(s) for s in speeds]
        data = {"what": "ranks", "cores": os.cpu_count(), "tokens_per_s": rates, "layouts": layouts}
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    what = "tokens/s | of one process | bytes a token | planned | stages idle | simulated"
    typer.echo(f"| layout, {os.cpu_count()} cores | {what} |\n|---|---|---|---|---|---|---|")
    for s in speeds:
        ratio = s.tokens_per_s / speeds[0].tokens_per_s
        idle, simulated = (", ".join(f"{x:.0%}" for x in of) for of in (s.idle, s.simulated))
        sent = f"{s.sent:,.0f} | {s.planned:,.0f}"
        typer.echo(
            f"| {s.what} | {s.tokens_per_s:,.1f} | {ratio:.2f} | {sent} | {idle} | {simulated} |"
        )
    by_name = {s.what: s.tokens_per_s for s in speeds}
    gain = by_name["2 stages, two steps on their way"] / by_name["2 stages, one step at a time"]
    typer.echo(f"| gain of two steps on their way | | {gain:.2f} | | | | |")


def _run(
    what: str,
    checkpoint: Path,
    batch: int,
    prompt: int,
    chunk: int,
    tokens: int,
    rounds: int,
    backend: str,
    against: Against | None,
    as_json: bool,
) -> None:
    import torch

    from v4_ascend.backends import find_backend
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.bench import Workload, bench

    found = find_backend(backend)
    found.require()
    found.use_chip(None)
    with reporter("timing rounds") as progress:
        speeds = bench(
            Checkpoint(checkpoint),
            found,
            Workload(batch=batch, prompt=prompt, chunk=chunk, decode=tokens, rounds=rounds),
            against_transformers=against is not None,
            progress=progress,
        )
    rates = {s.who: getattr(s, what) for s in speeds.sides}
    floor = getattr(speeds.floor, what)
    if as_json:
        data = {"what": what, "threads": torch.get_num_threads(), "tokens_per_s": rates,
                "floor": floor, "rates": asdict(speeds.rates)}  # fmt: skip
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    typer.echo(
        f"| {what}, {torch.get_num_threads()} threads | tokens/s | of the floor |\n|---|---|---|"
    )
    for who, rate in rates.items():
        typer.echo(f"| {who} | {rate:,.1f} | {rate / floor:.0%} |")
    if len(rates) > 1:
        ours, theirs = rates.values()
        typer.echo(f"| ratio | {ours / theirs:.2f} | |")
    can = f"{speeds.rates.copy / 1e9:,.1f} GB/s copied and "
    can += f"{speeds.rates.products[speeds.unit] / 1e9:,.0f} GFLOP/s in {speeds.unit}, *measured*"
    typer.echo(f"| floor, *modelled* at {can} | {floor:,.1f} | 100% |")
