"""Read a pydantic model from YAML, saying in which line a value is wrong.

Types come from the model's fields, not from YAML's guesses: ``1e-6`` is a float and ``on``
stays a word where the field says so. Unknown, repeated and missing keys are errors.
"""

from __future__ import annotations

import difflib
import io
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from v4_ascend.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
SET = "--set "
_MAP, _STR, _NULL = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "str", "null"))
_BOOLS = {"true": True, "false": False}
_SPELLED = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


class Section(BaseModel):
    """A mapping of a file: frozen, without further keys, its numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """What was read, and where each key was given: ``file:line`` or ``--set key``."""

    value: M
    places: Mapping[str, str]


def load_yaml(model: type[M], path: Path, overrides: Sequence[str] = ()) -> Loaded[M]:
    """Read `path` as a `model`; each override is ``dotted.key=value`` and wins over the file.

    Raises:
        ConfigError: at ``path:line`` or ``--set key``, what is wrong there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(str(path), f"cannot be read: {e}") from e
    root = _compose(text, str(path))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1", "must be a mapping")
    for override in overrides:
        root = _override(root, override)
    reader = _Reader()
    value: M = reader.read(model, root, "")
    return Loaded(value, reader.places)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at what is spelled alike, or at everything known."""
    names = sorted(known)
    if match := difflib.get_close_matches(word, names, n=1):
        return f"; did you mean {match[0]!r}?"
    return f"; known are {', '.join(names)}"


class _Source(io.StringIO):
    """Text with the name that YAML gives to every mark in it."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(_Source(text, name), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        where = _place(e.problem_mark) if e.problem_mark else name
        raise ConfigError(where, f"is not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise ConfigError(name.strip(), f"is not YAML: {str(e).splitlines()[0]}") from e


def _place(mark: yaml.Mark) -> str:
    return mark.name if mark.name.startswith(SET) else f"{mark.name}:{mark.line + 1}"


def _override(root: yaml.MappingNode, text: str) -> yaml.MappingNode:
    """Return a copy of the tree with one value replaced."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(SET + text, "must be key=value")
    new = _compose(value, SET + key)
    if new is None:
        raise ConfigError(SET + key, "must be key=value")
    return _with(root, key.split("."), new)


def _with(node: yaml.Node | None, keys: Sequence[str], new: yaml.Node) -> yaml.MappingNode:
    # Nodes are copied, not changed: an alias in the file may share them.
    if isinstance(node, yaml.SequenceNode):
        raise ConfigError(_place(new.start_mark), f"{keys[0]!r} is in a list; set the whole list")
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    start = node.start_mark if isinstance(node, yaml.MappingNode) else new.start_mark
    child = next((v for k, v in pairs if k.value == keys[0]), None)
    value = _with(child, keys[1:], new) if keys[1:] else new
    kept = [(k, v) for k, v in pairs if k.value != keys[0]]
    key = yaml.ScalarNode(_STR, keys[0], new.start_mark)
    return yaml.MappingNode(_MAP, [*kept, (key, value)], start)


class _Reader:
    def __init__(self) -> None:
        self.places: dict[str, str] = {}

    def read(self, want: Any, node: yaml.Node, name: str) -> Any:
        origin, args = typing.get_origin(want), typing.get_args(want)
        if origin in (Union, UnionType):
            if type(None) in args and node.tag == _NULL:
                return None
            chosen = _alternative(args, node)
            if _is_literal(chosen) and node.value not in typing.get_args(chosen):
                raise _wrong(node, name, _spell(want))
            return self.read(chosen, node, name)
        if isinstance(want, type) and issubclass(want, BaseModel):
            return self._model(want, node, name)
        if origin is dict:
            children = self._children(node, name)
            return {k: self.read(args[1], v, f"{name}.{k}") for k, v in children.items()}
        if origin is tuple:
            if not isinstance(node, yaml.SequenceNode):
                raise _wrong(node, name, "a list")
            return tuple(self.read(args[0], v, f"{name}[{i}]") for i, v in enumerate(node.value))
        return _scalar(want, node, name)

    def _children(self, node: yaml.Node, name: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong(node, name, "a mapping")
        children: dict[str, yaml.Node] = {}
        for key, child in node.value:
            where = _place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(where, "a key must be a word, got a list or mapping")
            path = f"{name}.{key.value}".removeprefix(".")
            if key.value in children:
                raise ConfigError(where, f"{path} is given twice")
            children[key.value] = child
            self.places[path] = where
        return children

    def _model(self, model: type[BaseModel], node: yaml.Node, name: str) -> BaseModel:
        fields, hints = model.model_fields, typing.get_type_hints(model)
        values: dict[str, Any] = {}
        for key, child in self._children(node, name).items():
            path = f"{name}.{key}".removeprefix(".")
            if key not in fields:
                hint = did_you_mean(key, fields)
                raise ConfigError(self.places[path], f"unknown key {path}{hint}")
            values[key] = self.read(hints[key], child, path)
        for key, field in fields.items():
            if field.is_required() and key not in values:
                path = f"{name}.{key}".removeprefix(".")
                raise ConfigError(_place(node.start_mark), f"missing key {path}")
        try:
            return model(**values)
        except ValidationError as e:
            raise self._refusal(node, name, e) from None

    def _refusal(self, node: yaml.Node, name: str, e: ValidationError) -> ConfigError:
        problem = e.errors()[0]
        path = ".".join([name, *map(str, problem["loc"])]).strip(".")
        where = self.places.get(path, _place(node.start_mark))
        if problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            return ConfigError(where, f"{path}: {message}" if path else message)
        # pydantic says "Input should be ...", "String should match ...", "Tuple should have ..."
        rule = problem["msg"].partition(" should ")[2].removesuffix(" after validation, not 0")
        return ConfigError(where, f"{path} must {rule}, got {problem['input']!r}")


def _alternative(args: tuple[Any, ...], node: yaml.Node) -> Any:
    """Choose from a union by the kind of node: a word, or a mapping or list."""
    present = [a for a in args if a is not type(None)]
    is_word = isinstance(node, yaml.ScalarNode)
    return next((a for a in present if _is_word(a) == is_word), present[0])


def _is_word(want: Any) -> bool:
    return want in _SPELLED or _is_literal(want)


def _is_literal(want: Any) -> bool:
    return typing.get_origin(want) is Literal


def _scalar(want: Any, node: yaml.Node, name: str) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        raise _wrong(node, name, _spell(want))
    if _is_literal(want):
        if node.value not in typing.get_args(want):
            raise _wrong(node, name, _spell(want))
        return node.value
    try:
        return _BOOLS[node.value.lower()] if want is bool else want(node.value)
    except (ValueError, KeyError):
        raise _wrong(node, name, _spell(want)) from None


def _spell(want: Any) -> str:
    args = [a for a in typing.get_args(want) if a is not type(None)]
    if _is_literal(want):
        return " or ".join(map(repr, args))
    if typing.get_origin(want) in (Union, UnionType):
        return " or ".join(map(_spell, args))
    return _SPELLED.get(want, "a mapping")


def _wrong(node: yaml.Node, name: str, want: str) -> ConfigError:
    got = "a list or mapping"
    if isinstance(node, yaml.ScalarNode):
        got = "nothing" if node.tag == _NULL else repr(node.value)
    return ConfigError(_place(node.start_mark), f"{name} must be {want}, got {got}")
