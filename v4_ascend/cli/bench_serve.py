"""`bench serve`: a server under load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from v4_ascend.errors import ConfigError, V4AscendError

LIMITS = ("ttft", "tpot", "e2el")


def serve_command(
    url: Annotated[str, typer.Option(help="such as http://127.0.0.1:8000")],
    model: Annotated[str, typer.Option(help="its name there")],
    num_prompts: Annotated[int, typer.Option(min=1, help="requests in all")] = 100,
    input_len: Annotated[int, typer.Option(min=1, help="random tokens of each prompt")] = 512,
    output_len: Annotated[int, typer.Option(min=1, help="tokens each must draw")] = 64,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines instead: prompt")] = None,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, help="a second, at random; default: all at once")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="at a time")] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(help="limits in ms, such as ttft:500 and tpot:50")
    ] = None,
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="V4_ASCEND_API_KEY", help="sent as a bearer token")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="folder of plan --out: compare with what it predicted")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for result.json and a page")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Time answers of an OpenAI-compatible server under load; results as `vllm bench serve`'s."""
    import asyncio

    import httpx

    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.bench_prediction import Report, compared
    from v4_ascend.runtime.bench_serve import (
        TIMEOUT_S,
        Load,
        Measured,
        prompts_of_file,
        random_prompts,
        run_load,
    )
    from v4_ascend.runtime.bench_serve_report import PERCENTILES, result_of, write_page

    limits = dict(_limit(text) for text in goodput or [])
    predicted = Report.read(plan) if plan is not None else None
    wanted = (
        random_prompts(num_prompts, input_len, output_len, seed)
        if prompts is None
        else prompts_of_file(prompts, num_prompts, output_len)
    )
    load = Load(rate=request_rate, concurrency=max_concurrency, seed=seed)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1") + "/v1"

    async def run() -> tuple[list[Measured], float]:
        many = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=base, headers=headers, timeout=TIMEOUT_S, limits=many
        ) as client:
            with reporter("answers") as progress:
                return await run_load(client, model, wanted, load, progress)

    measured, seconds = asyncio.run(run())
    result = result_of(measured, seconds, model=model, load=load, goodput=limits)
    if predicted is not None:
        result["prediction"] = compared(predicted, result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        write_page(out / "index.html", result, measured)
    errors = [e for e in result["errors"] if e]
    if as_json:
        envelope = {"version": 1, "status": "error" if errors else "ok", "data": result}
        typer.echo(json.dumps(envelope | {"diagnostics": errors[:3]}))
    else:
        typer.echo(
            f"{result['completed']} of {num_prompts} requests, {seconds:.1f} s: "
            f"{result['output_throughput']:,.1f} tokens/s drawn, "
            f"{result['total_token_throughput']:,.1f} with prompts"
        )
        if limits:
            typer.echo(f"good requests per second: {result['request_goodput']:.2f}")
        typer.echo("| ms | mean | " + " | ".join(f"p{p}" for p in PERCENTILES) + " |")
        typer.echo("|---|---|---|---|---|")
        for name in (*LIMITS[:2], "itl", LIMITS[2]):
            keys = ("mean", *(f"p{p}" for p in PERCENTILES))
            row = " | ".join(f"{result[f'{k}_{name}_ms']:,.1f}" for k in keys)
            typer.echo(f"| {name} | {row} |")
        if predicted is not None:
            _print_prediction(result["prediction"])
    if errors:
        raise V4AscendError(f"{len(errors)} of {num_prompts} requests failed: {errors[0]}")


def _print_prediction(prediction: dict[str, Any]) -> None:
    layout = " and ".join(prediction["layout"])
    typer.echo(
        f"\nplan {prediction['plan']}, {layout}, {prediction['n_devices']:,} devices: "
        f"{prediction['output_throughput_per_device']:,.1f} tokens/s drawn per device"
    )
    typer.echo("| | predicted | between | measured | ratio |")
    typer.echo("|---|---|---|---|---|")
    for f in prediction["figures"]:
        typer.echo(
            f"| {f['name']}, {f['unit']} | {f['predicted']:,.1f} {f['label']} | {f['low']:,.1f} to "
            f"{f['high']:,.1f} | {f['measured']:,.1f} | {f['ratio']:.2f}"
            f"{'' if f['is_inside'] else ', outside'} |"
        )
    for line in prediction["load_differs"]:
        typer.echo(f"not the load that was planned for: {line}")


def _limit(text: str) -> tuple[str, float]:
    found = re.fullmatch(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)", text)
    if found is None:
        names = ", ".join(LIMITS)
        raise ConfigError("--goodput", f"must be one of {names}, a colon and ms, got {text!r}")
    return found[1], float(found[2])
