"""Read a pydantic model from YAML, saying in which line a value is wrong.

Scalars reach the model as the text that stands in the file, so a field's type decides what
``on``, ``1e-6`` or ``007`` mean, not YAML's guesses. Unknown and repeated keys are errors.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from v4_ascend.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Place = tuple[str | int, ...]
_NULL = "tag:yaml.org,2002:null"


def load_yaml(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read `path` as a `model`; each override is ``dotted.key=value`` and wins over the file.

    Raises:
        ConfigError: at ``path:line`` or ``--set key``, what is wrong there.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), f"cannot be read: {e}") from e
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise ConfigError(f"{path}:{line}", e.problem or "is not YAML") from e
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1", "must be a mapping")
    reader = _Reader(path)
    values = reader.read(root, ())
    for text in overrides:
        reader.override(values, text)
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise reader.error(model, e) from None


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.where: dict[Place, str] = {}  # of every key and list entry

    def read(self, node: yaml.Node, place: Place) -> Any:
        self.where.setdefault(place, f"{self.path}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*place, i)) for i, child in enumerate(node.value)]
        return None if node.tag == _NULL else node.value

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, child in node.value:
            here = (*place, str(key.value))
            line = f"{self.path}:{key.start_mark.line + 1}"
            if key.value in values:
                raise ConfigError(line, f"{_dotted(here)} is given twice")
            self.where[here] = line
            values[key.value] = self.read(child, here)
        return values

    def override(self, values: dict[str, Any], text: str) -> None:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text}", "must be key=value")
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as e:
            raise ConfigError(f"--set {key}", f"{value!r} is not YAML: {e.problem}") from e
        *parents, last = key.split(".")
        at = values
        for depth, part in enumerate(parents):
            self.where.setdefault(tuple(parents[: depth + 1]), f"--set {key}")
            child = at.setdefault(part, {})
            if not isinstance(child, dict):
                at[part] = child = {}
            at = child
        at[last] = None if node is None else _Reader(self.path).read(node, ())
        self.where[tuple(key.split("."))] = f"--set {key}"

    def error(self, model: type[BaseModel], e: ValidationError) -> ConfigError:
        problems = e.errors()
        # Of a union's alternatives the last one, a section, says more than "must be 'auto'".
        problem = [p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]][-1]
        # A union names the alternative it tried; the file knows only keys and numbers.
        place = tuple(p for p in problem["loc"] if not _is_alternative(p))
        where = next(w for n in range(len(place), -1, -1) if (w := self.where.get(place[:n])))
        name = _dotted(place)
        if problem["type"] == "extra_forbidden":
            known = _keys_at(model, place[:-1])
            return ConfigError(where, f"unknown key {name}{_closest(str(place[-1]), known)}")
        if problem["type"] == "missing":
            return ConfigError(where, f"missing key {name}")
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        shown = f", got {given!r}" if isinstance(given, str) else ""
        return ConfigError(where, f"{name}: {message}{shown}" if name else message)


def _is_alternative(part: str | int) -> bool:
    return isinstance(part, str) and (part[:1].isupper() or "[" in part)


def _dotted(place: Iterable[str | int]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _keys_at(model: type[BaseModel], place: Place) -> list[str]:
    for part in place:
        if isinstance(part, str):
            nested = _models_in(model.model_fields[part].annotation)
            if not nested:
                return []
            model = nested[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]


def _closest(word: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(sorted(known))}"
