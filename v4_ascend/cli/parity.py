"""`parity record`, `compare` and `bisect`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from v4_ascend.cli.emulate import emulate_npu
from v4_ascend.cli.group import Group
from v4_ascend.errors import ConfigError, ParityError

parity = typer.Typer(
    cls=Group, no_args_is_help=True, help="Record what a model computes, to compare it."
)


class Dtype(StrEnum):
    """Compute and stream type."""

    fp32 = "fp32"
    bf16 = "bf16"


class QuantSim(StrEnum):
    """FP8/FP4 simulation of caches, indexer and GEMM inputs."""

    auto = "auto"
    on = "on"
    off = "off"


class Kernels(StrEnum):
    """Whose code computes."""

    reference = "reference"
    fast = "fast"


class Fallback(StrEnum):
    """What a call does that no kernel accepts."""

    error = "error"
    reference = "reference"


def register(app: typer.Typer) -> None:
    """Add the command group to the app."""
    app.add_typer(parity, name="parity")


@parity.callback()
def group() -> None:
    """Record what a model computes, to compare it."""


@parity.command("record")
def record_command(
    checkpoint: Annotated[str, typer.Option(help="folder, or hf:org/name@revision")],
    input_ids: Annotated[Path, typer.Option(help="safetensors with input_ids int64 [n, s]")],
    prefill: Annotated[int, typer.Option(help="tokens to prefill; the rest is decoded")],
    out: Annotated[Path, typer.Option(help="safetensors to write: logits fp32 [n, s, vocab]")],
    chunk: Annotated[int | None, typer.Option(help="most tokens of a prefill step")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="default: the checkpoint's")] = None,
    quant_sim: Annotated[QuantSim, typer.Option(help="auto: on iff quantised")] = QuantSim.auto,
    backend: Annotated[str, typer.Option(help="whose kernels run; see v4-ascend ops")] = "cpu",
    soc: Annotated[str | None, typer.Option(help="default: the chip that is here")] = None,
    kernels: Annotated[Kernels | None, typer.Option(help="cpu: reference, else fast")] = None,
    fallback: Annotated[Fallback, typer.Option(help="what a refused call does")] = Fallback.error,
    emulate: Annotated[bool, typer.Option("--emulate", help="an NPU in host memory")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="keep all outputs too")] = False,
) -> None:
    """Run given tokens, teacher-forced, and write the logits of every position."""
    if emulate:
        emulate_npu(backend, soc)
    from v4_ascend.backends import find_backend
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.checkpoint.sources import whole
    from v4_ascend.cli.files import require_writable
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.parity import Recording, read_input_ids, record, write_record

    find_backend(backend).require()
    if out.is_dir():
        raise ConfigError("--out", f"{out} is a folder, must be a file")
    require_writable("--out", out.absolute().parent)
    source = Checkpoint(whole(checkpoint))
    ids = read_input_ids(input_ids, source.config.vocab_size)
    how = Recording(
        prefill=prefill,
        chunk=chunk,
        dtype=None if dtype is None else dtype.value,
        quant_sim=quant_sim.value,
        backend=backend,
        chip=soc,
        kernels=None if kernels is None else kernels.value,
        fallback=fallback.value,
        trace=trace,
    )
    with reporter("recording sequences") as progress:
        tensors, metadata = record(source, ids, how, progress)
    write_record(out, tensors, metadata)
    n, s, vocab = tensors["logits"].shape
    ran = f"{metadata['kernels']} kernels, {metadata['proof']}"
    typer.echo(
        f"{out}: logits [{n}, {s}, {vocab}], {metadata['dtype']}, "
        f"quantisation simulation {metadata['quant_sim']}, {backend} backend ({ran})"
    )


@parity.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="the record that is right")],
    b: Annotated[Path, typer.Argument(help="the record to judge")],
    median: Annotated[float | None, typer.Option(help="most median relative error")] = None,
    worst: Annotated[float | None, typer.Option(help="most relative error of a position")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Say how far two records are apart; exit 5 if further than two honest runs can be."""
    from dataclasses import replace

    from v4_ascend.cli.comparison import print_comparison
    from v4_ascend.runtime.compare import compare, open_pair

    given = {k: v for k, v in {"median": median, "worst": worst}.items() if v is not None}
    for name, most in given.items():
        if not most >= 0:
            raise ConfigError(f"--{name}", f"{most} must be at least 0")
    one, two, bounds = open_pair(a, b)
    found = compare(one, two, replace(bounds, **given))
    if as_json:
        _echo_json(found.facts(), found.problems)
    else:
        print_comparison(a, b, found)
    raise typer.Exit(ParityError.exit_code if found.problems else 0)


@parity.command("bisect")
def bisect_command(
    a: Annotated[Path, typer.Argument(help="the traced record that is right")],
    b: Annotated[Path, typer.Argument(help="the traced record to judge")],
    as_json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
) -> None:
    """Name the first layer and operator in which two traced runs part; exit 5 if they do."""
    from v4_ascend.cli.comparison import divergence_lines
    from v4_ascend.runtime.bisect import bisect
    from v4_ascend.runtime.compare import compare, open_pair

    one, two, bounds = open_pair(a, b)
    found = bisect(one, two, bounds)
    if found is not None:
        problems = divergence_lines(found)
    else:  # a trace is of the first sequence, logits are of all
        problems = [f"logits: {p}" for p in compare(one, two, bounds).problems]
    if as_json:
        _echo_json(None if found is None else found.facts(), problems)
    else:
        if found is None:
            typer.echo(f"no operator of {b} is out of bounds")
        typer.echo("\n".join(problems), nl=bool(problems))
    raise typer.Exit(ParityError.exit_code if problems else 0)


def _echo_json(data: dict[str, Any] | None, problems: list[str]) -> None:
    status = "error" if problems else "ok"
    typer.echo(json.dumps({"version": 1, "status": status, "data": data, "diagnostics": problems}))
