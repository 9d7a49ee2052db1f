"""Registers CPU stand-ins behind the vendor's operators.

    @stand_in("npu::npu_rms_norm")
    def npu_rms_norm(input, gamma, epsilon=1e-6): ...

The function gets CPU tensors over the device's memory, checks them as the vendor's kernel
would, and computes in fp32 with one rounding at the end. An operator that a chip does not
have is refused with its name (stock) or not there at all (`_C_ascend`, built per chip).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from v4_ascend.emulation import call_log
from v4_ascend.emulation.chips import Chip
from v4_ascend.emulation.device import Kernels, cpu_view, on_cpu
from v4_ascend.emulation.meta import META, by_name

ALL = ("a2", "a3", "950")
CUSTOM = "_C_ascend"
CAST = "npu::npu_format_cast"
ND = 2  # torch_npu's number of the plain order
# Products whose pages take weights in FRACTAL_NZ, which is read as it was cast: not transposed.
TAKES_TILES = frozenset(
    (
        "npu::npu_quant_matmul", "npu::npu_grouped_matmul",
        "npu::npu_transpose_quant_batchmatmul", "npu::npu_grouped_matmul_swiglu_quant_v2",
        "_C_ascend::grouped_matmul_swiglu_quant", "_C_ascend::grouped_matmul_swiglu_quant_v2",
        "_C_ascend::dispatch_ffn_combine",
    )
)  # fmt: skip
# Stock operators of V3.2, which take V4's tensors and would give wrong rows.
OF_V32 = (
    "npu_lightning_indexer",
    "npu_quant_lightning_indexer",
    "npu_sparse_flash_attention",
    "npu_kv_quant_sparse_flash_attention",
)


@dataclass(frozen=True, slots=True)
class StandIn:
    """One operator's stand-in, and the chips that have the operator."""

    name: str
    generations: tuple[str, ...]
    function: Callable[..., Any]


STAND_INS: dict[str, StandIn] = {}
_running_on: list[Chip] = []


def stand_in(name: str, generations: tuple[str, ...] = ALL) -> Callable[..., Any]:
    """Declare the decorated function as what `name`, "namespace::operator", does here."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in STAND_INS:
            raise ValueError(f"{name} has a stand-in already")
        STAND_INS[name] = StandIn(name, generations, function)
        return function

    return declare


def running_on() -> Chip:
    """Return the chip that is emulated in this process."""
    return _running_on[0]


def schemas() -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the recorded `_C_ascend` schemas: name to (generations, schema)."""
    text = resources.files(__package__ or "").joinpath("c_ascend.txt").read_text(encoding="utf-8")
    found: dict[str, tuple[tuple[str, ...], str]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        generations, schema = line.split("  ", 1)
        found[schema.split("(")[0]] = (tuple(generations.split(",")), schema.strip())
    return found


def install(chip: Chip) -> tuple[torch.library.Library, Kernels]:
    """Define `_C_ascend` for the chip and register every stand-in; keep the result alive."""
    _running_on[:] = [chip]
    custom = torch.library.Library(CUSTOM, "DEF")
    for name, (generations, schema) in schemas().items():
        if chip.generation in generations:
            custom.define(schema)
            known = STAND_INS.get(f"{CUSTOM}::{name}")
            kernel = known.function if known else _not_emulated(f"{CUSTOM}::{name}")
            custom.impl(name, _of_formats(kernel, f"{CUSTOM}::{name}"), "PrivateUse1")
            if name in META:
                parsed = torch._C.parse_schema(f"{CUSTOM}::{schema}")
                custom.impl(name, by_name(name, parsed), "Meta")
            if "_metadata" in name and name.startswith("npu_"):
                # Without an optional tensor nothing says which device: the argument does.
                custom.impl(
                    name, _by_argument(kernel, f"{CUSTOM}::{name}"), "CompositeExplicitAutograd"
                )
    stock = Kernels("npu")
    for known in STAND_INS.values():
        namespace, _, name = known.name.partition("::")
        if namespace == "npu":
            kernel = _of_formats(known.function, known.name)
            if chip.generation not in known.generations:
                kernel = _refused(known, chip)
            stock.register(name, kernel)
    for name in OF_V32:
        stock.register(name, _wrong_for_v4(name))
    return custom, stock


def _of_formats(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap a stand-in, whose CPU tensors have no format, into one that minds those of the device.

    torch_npu's own memory remembers a tensor's format; the bytes are in plain order all the same.
    """
    from torch_npu import Format, empty_with_format, get_npu_format

    kernel = on_cpu(function, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        for t in tree_leaves((args, kwargs)):
            if not isinstance(t, torch.Tensor) or t.device.type != "npu":
                continue
            if name != CAST and get_npu_format(t) == Format.FRACTAL_NZ:
                _check_tiles(name, t)
        return kernel(*args, **kwargs)

    def cast(*args: Any, **kwargs: Any) -> torch.Tensor:
        plain: torch.Tensor = call(*args, **kwargs)
        acl_format = args[1] if len(args) > 1 else kwargs["acl_format"]
        if acl_format == ND:
            return plain
        to = {"dtype": plain.dtype, "device": plain.device, "acl_format": acl_format}
        made: torch.Tensor = empty_with_format(plain.size(), **to)
        cpu_view(made).copy_(cpu_view(plain))
        return made

    return cast if name == CAST else call


def _check_tiles(name: str, t: torch.Tensor) -> None:
    if name not in TAKES_TILES:
        raise RuntimeError(f"{name}: an argument is in FRACTAL_NZ, it takes ND (error 161002)")
    if not t.is_contiguous():
        raise RuntimeError(
            f"{name}: an argument in FRACTAL_NZ has strides {t.stride()}; it must lie as it was "
            "cast (error 161002)"
        )


def _by_argument(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        call_log.record(name)
        return kernel(*args, **kwargs).to(kwargs.get("device", "npu"))

    return call


def _not_emulated(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is known by its schema only: it has no CPU stand-in")

    return call


def _wrong_for_v4(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name} is V3.2's: its causal limit does not know that a key stands for several "
            "tokens, so it is wrong for V4's compressed rows; use those of _C_ascend"
        )

    return call


def _refused(known: StandIn, chip: Chip) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{known.name} is not supported on {chip.soc_name} (error 161002): "
            f"{', '.join(known.generations)} only; operator map of the vendor's documents"
        )

    return call
