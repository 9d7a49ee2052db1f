"""Which linear layers a quantised checkpoint stores how, as `quant_model_description.json` says it.

ModelSlim writes that file beside the weights, vllm-ascend reads it: one entry for each tensor.
Layers of one kind are stored alike, so what is kept here is a type for each place in a layer.

Sources: vllm-ascend vllm_ascend/quantization/modelslim_config.py and methods/{w8a8_dynamic, w4a8,
w8a8_mxfp8}.py; msmodelslim, description of the saved format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from v4_ascend.errors import ConfigError

DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
QuantType = Literal["W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8_MXFP8"]
QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
Types = tuple[tuple[str, QuantType], ...]
# Endings of the tensors of one linear layer, in the order they are stored.
ENDINGS = ("weight", "scale", "weight_scale", "weight_offset", "scale_bias")
# Nobody reads these but vllm-ascend: offsets are zero, the bias follows from weight and scale.
DERIVED_ENDINGS = (".weight_offset", ".scale_bias")
_EXPERTS = ("ffn.experts", "ffn.shared_experts")


def base_of(name: str) -> str:
    """Name what a tensor belongs to: a linear layer without its tensors' endings."""
    base, _, ending = name.rpartition(".")
    return base if ending in ENDINGS else name


def place_of(base: str) -> str:
    """Name the place in any layer: ``attn.wq_b``, ``ffn.experts``, ``e_proj``."""
    first, _, rest = base.partition(".")
    if first in ("layers", "mtp"):
        rest = rest.partition(".")[2]
    elif first != "layer":
        rest = base
    return next((e for e in _EXPERTS if rest.startswith(f"{e}.")), rest)


def read_types(file: Path) -> Types | None:
    """Read a description; None where there is no such file.

    Raises:
        ConfigError: it is none, has a type we do not know, or layers of one kind differ.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(str(file), f"cannot be read: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(str(file), f"must be a JSON object, got {type(raw).__name__}")
    return _types(raw, str(file))


def _types(raw: Mapping[str, Any], where: str) -> Types:
    found: dict[str, str] = {}
    for name, kind in raw.items():
        if not name.endswith(".weight"):
            continue
        if kind != FLOAT and kind not in QUANT_TYPES:
            known = ", ".join((FLOAT, *QUANT_TYPES))
            raise ConfigError(where, f"{name} is {kind!r}; supported: {known}")
        place = place_of(base_of(name))
        if found.setdefault(place, kind) != kind:
            raise ConfigError(
                where, f"{name} is {kind}, another {place} is {found[place]}; they must be alike"
            )
    return tuple((place, kind) for place, kind in sorted(found.items()) if kind in QUANT_TYPES)


def describe(names: Iterable[str], types: Types) -> dict[str, Any]:
    """Return the description of a checkpoint's tensors."""
    by_place = dict(types)
    kinds = set(by_place.values())
    main = next((t for t in ("W4A8_DYNAMIC", "W8A8_MXFP8", "W8A8_DYNAMIC") if t in kinds), FLOAT)
    tensors = {name: by_place.get(place_of(base_of(name)), FLOAT) for name in names}
    return {"model_quant_type": main, "version": "1.0.0", "group_size": 0, **tensors}
