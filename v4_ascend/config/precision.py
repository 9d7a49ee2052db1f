"""Formats a checkpoint can be converted to, and the recipes of configs/precision.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from v4_ascend.config.load import Section, load_yaml
from v4_ascend.config.model import ModelConfig
from v4_ascend.config.quant_types import QuantType
from v4_ascend.errors import ConfigError

Format = Literal["mxfp4", "fp8", "mxfp8", "bf16", "w8a8", "w4a8"]
Soc = Literal["a2", "a3", "950"]
FORMATS: tuple[Format, ...] = get_args(Format)
# As DeepSeek publishes them: configuration changes that config.json can say.
_OFFICIAL: dict[str, dict[str, Any]] = {
    "bf16": {"quantization": None, "expert_dtype": None},
    "fp8": {"quantization": "fp8", "expert_dtype": "fp8"},
    "mxfp4": {"quantization": "fp8", "expert_dtype": "fp4"},
}


class Recipe(Section):
    """Which linear layers are stored how, for some chips; the others stay BF16."""

    name: str
    socs: tuple[Soc, ...] = Field(min_length=1)
    format: Format
    source: str
    weights: dict[str, QuantType]


class _File(Section):
    recipes: tuple[Recipe, ...]


@cache
def recipes() -> tuple[Recipe, ...]:
    """Return the published recipes."""
    path = Path(str(files("v4_ascend.configs") / "precision.yaml"))
    return load_yaml(_File, path).value.recipes


def recipe_for(format: Format, soc: Soc | None, name: str | None) -> Recipe | None:
    """Choose a recipe; None for the formats that need none.

    Raises:
        ConfigError: no such recipe for the chip, or the format needs none.
    """
    if format in _OFFICIAL:
        for option, value in (("--soc", soc), ("--recipe", name)):
            if value is not None:
                raise ConfigError(option, f"{value}: {format} is the same for every chip")
        return None
    of_format = [r for r in recipes() if r.format == format]
    for recipe in of_format:
        if soc in (None, *recipe.socs) and name in (None, recipe.name):
            return recipe
    named = f" {name}" if name else ""
    there = ", ".join(f"{r.name} for {' and '.join(r.socs)}" for r in of_format)
    raise ConfigError(
        "--recipe" if name else "--soc",
        f"no recipe{named} to {format} for {soc or 'any chip'}; there is {there}",
    )


def in_weights(config: ModelConfig, format: Format, recipe: Recipe | None) -> ModelConfig:
    """Return the configuration of the same model stored as `format`.

    Raises:
        ConfigError: the model's widths do not fit the format.
    """
    if recipe is None:
        changes = _OFFICIAL[format] | {"quant_types": ()}
    else:
        types = tuple(sorted(recipe.weights.items()))
        changes = {"quantization": "ascend", "expert_dtype": None, "quant_types": types}
    try:
        return ModelConfig(**config.model_dump() | changes | {"dtype": "bf16"})
    except ValidationError as e:
        reason = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError("--to", f"{format}: {reason}") from None
