"""`fit`: does it fit, how long a context, how many requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4_ascend.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.supernode.fit import Fit


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("fit")(fit_command)


def fit_command(
    model: Annotated[
        str, typer.Option(help="config.json, checkpoint folder, hf:org/name or bundled name")
    ],
    device: Annotated[str | None, typer.Option(help="a device profile")] = None,
    devices: Annotated[int | None, typer.Option(help="how many", min=1)] = None,
    context: Annotated[int, typer.Option(help="tokens of the longest request", min=1)] = 131072,
    concurrency: Annotated[int, typer.Option(help="running requests", min=1)] = 8,
    draft_tokens: Annotated[int, typer.Option(help="speculation", min=0)] = 0,
    weight_format: Annotated[str, typer.Option(help="native, mx, w8a8, w4a8 or bf16")] = "auto",
    utilisation: Annotated[float, typer.Option(help="part of the memory to use")] = 0.92,
    engine: Annotated[str, typer.Option(help="native or vllm")] = "native",
    compare: Annotated[str | None, typer.Option(help="v3.2: FLOPs and cache against it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say whether a model fits, its longest context and most requests; exit 3 if it does not."""
    from v4_ascend.checkpoint.sources import configuration
    from v4_ascend.config.model import ModelConfig
    from v4_ascend.config.topology import is_remote
    from v4_ascend.supernode.planning import bundled_model, existing_path

    path = configuration(model) if is_remote(model) else existing_path(model)
    short = model.removeprefix("v4-")
    config = bundled_model(short, "--model") if path is None else ModelConfig.read(path)
    if compare is not None:
        _compare(config, model, compare, context, as_json)
        return
    if device is None or devices is None:
        raise ConfigError("fit", "needs --device and --devices, or --compare v3.2")
    if context > config.max_seq_len:
        raise ConfigError(
            "--context", f"{context} exceeds what the model is made for ({config.max_seq_len})"
        )
    if not 0 < utilisation <= 1:
        raise ConfigError("--utilisation", f"must be above 0 and at most 1, got {utilisation}")
    if engine not in ("native", "vllm"):
        raise ConfigError("--engine", f"must be 'native' or 'vllm', got {engine!r}")
    from v4_ascend.config.devices import device_profile
    from v4_ascend.supernode.fit import fit, smallest_fit, whole_system
    from v4_ascend.supernode.memory import Serving
    from v4_ascend.supernode.planning import weight_format as choose_format

    profile = device_profile(device, "--device")
    serving = Serving(
        weight_format=choose_format(config, profile, weight_format),
        engine="vllm" if engine == "vllm" else "native",
        max_model_len=context,
        max_chunk=min(512, context),
        n_draft_tokens=draft_tokens,
        utilisation=utilisation,
    )
    result = fit(config, whole_system(profile, devices), serving, concurrency)
    facts = _facts(result, concurrency, context)
    if result.choice is None:
        sizes = sorted({devices * k for k in (2, 3, 4, 6, 8, 16, 32)})
        facts["would_fit_on"] = smallest_fit(config, profile, serving, sizes)
    if as_json:
        status = "ok" if result.choice else "error"
        typer.echo(json.dumps({"version": 1, "status": status, "data": facts, "diagnostics": []}))
    elif result.choice is not None:
        _print(model, device, devices, serving.weight_format, facts)
    if result.choice is None:
        why = next((r for r in result.found.rejected if r.rule.id == "M1"), None)
        reason = why.examples[0][1] if why else result.found.rejected[0].rule.text
        more = facts["would_fit_on"]
        hint = f"; {more} x {device} would do" if more else ""
        raise PlanError(f"{model} does not fit on {devices} x {device}: {reason}{hint}")


def _facts(result: Fit, concurrency: int, context: int) -> dict[str, Any]:
    from v4_ascend.supernode.planning import layout_name

    c = result.choice
    if c is None:
        return {"fits": False}
    worst = min(c.memory, key=lambda m: m.n_blocks)
    return {
        "fits": True,
        "layout": layout_name(c.parallel),
        "concurrency": concurrency,
        "context": context,
        "longest_context": result.longest,
        "longest_context_of_all": result.longest_all,
        "most_full_requests": result.most_full,
        "most_running": result.most_running,
        "binding_term": result.binding_term,
        "memory": worst.terms,
        "available": worst.available,
        "free": worst.free,
        "bytes_per_block": worst.per_block,
    }


def _print(model: str, device: str, devices: int, fmt: str, f: dict[str, Any]) -> None:
    from v4_ascend.cli.plan_tables import print_memory_terms

    typer.echo(f"{model} fits on {devices} x {device} ({fmt} weights), layout {f['layout']}")
    typer.echo(
        f"longest context with {f['concurrency']} running: {f['longest_context']:,} tokens for "
        f"one of them, {f['longest_context_of_all']:,} if all are so long"
    )
    typer.echo(
        f"most requests at {f['context']:,} tokens: {f['most_full_requests']:,} of full length, "
        f"{f['most_running']:,} running if one is"
    )
    print_memory_terms(f["memory"], f["available"], f["free"])
    typer.echo(
        f"binding term: {f['binding_term']}; {f['bytes_per_block']:,} bytes for 128 tokens of "
        "context on the fullest rank"
    )


def _compare(config: ModelConfig, model: str, against: str, context: int, as_json: bool) -> None:
    from v4_ascend.supernode.versus_v32 import v4_token, v32_token

    if against != "v3.2":
        raise ConfigError("--compare", f"must be v3.2, got {against!r}")
    ours, theirs = v4_token(config, context), v32_token(context)
    data = {
        "context": context,
        "flops_ratio": ours.fp8_flops / theirs.fp8_flops,
        "cache_ratio": ours.bytes_per_token / theirs.bytes_per_token,
        "v4": {"flops": dict(ours.flops), "bytes_per_token": ours.bytes_per_token},
        "v3.2": {"flops": dict(theirs.flops), "bytes_per_token": theirs.bytes_per_token},
    }
    if as_json:
        typer.echo(json.dumps({"version": 1, "status": "ok", "data": data, "diagnostics": []}))
        return
    from v4_ascend.cli.plan_tables import print_comparison

    print_comparison(model, context, ours, theirs)
