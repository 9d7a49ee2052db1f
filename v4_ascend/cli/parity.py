"""`parity record`; comparing records comes with the other backends."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from v4_ascend.errors import ConfigError

parity = typer.Typer(no_args_is_help=True, help="Record what a model computes, to compare it.")


class Dtype(StrEnum):
    """Compute and stream type."""

    fp32 = "fp32"
    bf16 = "bf16"


class QuantSim(StrEnum):
    """FP8/FP4 simulation of caches, indexer and GEMM inputs."""

    auto = "auto"
    on = "on"
    off = "off"


def register(app: typer.Typer) -> None:
    """Add the command group to the app."""
    app.add_typer(parity, name="parity")


@parity.callback()
def group() -> None:
    """Record what a model computes, to compare it."""


@parity.command("record")
def record_command(
    checkpoint: Annotated[Path, typer.Option(help="checkpoint folder")],
    input_ids: Annotated[Path, typer.Option(help="safetensors with input_ids int64 [n, s]")],
    prefill: Annotated[int, typer.Option(help="tokens to prefill; the rest is decoded")],
    out: Annotated[Path, typer.Option(help="safetensors to write: logits fp32 [n, s, vocab]")],
    chunk: Annotated[int | None, typer.Option(help="most tokens of a prefill step")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="default: the checkpoint's")] = None,
    quant_sim: Annotated[QuantSim, typer.Option(help="auto: on iff quantised")] = QuantSim.auto,
    backend: Annotated[str, typer.Option(help="where operators run")] = "cpu",
) -> None:
    """Run given tokens, teacher-forced, and write the logits of every position."""
    from v4_ascend.backends import find_backend
    from v4_ascend.checkpoint.reader import Checkpoint
    from v4_ascend.cli.progress import reporter
    from v4_ascend.runtime.parity import Recording, read_input_ids, record, write_record

    find_backend(backend).require()
    if not out.absolute().parent.is_dir():
        raise ConfigError("--out", f"no folder {out.absolute().parent}")
    source = Checkpoint(checkpoint)
    ids = read_input_ids(input_ids, source.config.vocab_size)
    how = Recording(
        prefill=prefill,
        chunk=chunk,
        dtype=None if dtype is None else dtype.value,
        quant_sim=quant_sim.value,
    )
    with reporter("recording sequences") as progress:
        tensors, metadata = record(source, ids, how, progress)
    write_record(out, tensors, metadata)
    n, s, vocab = tensors["logits"].shape
    typer.echo(
        f"{out}: logits [{n}, {s}, {vocab}], {metadata['dtype']}, "
        f"quantisation simulation {metadata['quant_sim']}, {metadata['backend']} references"
    )
