"""What a completion may look like, as a grammar for llguidance: reasoning, answer, tool calls.

Markers are named by token, so that no text can pass for one. JSON is written as the official
encoder writes it, without any other white space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from v4_ascend.chat.strings import DSML, THINK_END, TOOL_CALLS_BLOCK
from v4_ascend.errors import RequestError

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_UNWRITABLE = re.compile(r'["<>\n]|' + re.escape(DSML))  # in a name between quotes
_ENDS_REASONING = THINK_END.replace("/", "\\/")  # a slash ends a terminal
_TERMINALS = rf"""
REASONING: /(?s:.*)/ & ~/(?s:.*{_ENDS_REASONING}.*)/
TEXT: /(?s:.*)/ & ~/(?s:.*{DSML}.*)/
TEXT_AND_OPENING: /(?s:.*)\n\n</ & ~/(?s:.*{DSML}.*)/
VALUE_AND_CLOSING: /(?s:.*)<\// & ~/(?s:.*{DSML}.*)/
"""
K = TypeVar("K")
Piece = dict[str, Any]  # one of llguidance's grammars: `json_schema` or `lark_grammar`


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Which calls of `tools` (function objects, as in requests) a completion has."""

    tools: Sequence[Mapping[str, Any]]
    are_required: bool
    at_most_one: bool


def json_piece(schema: Any) -> Piece:
    """Return JSON of a schema."""
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping):
        _refuse(f"must be an object or true, not {json.dumps(schema)[:60]}")
    return {"json_schema": {**schema, "x-guidance": _COMPACT}}


def regex_piece(regex: str) -> Piece:
    """Return text that a regular expression matches from end to end."""
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex)
    return {"lark_grammar": f"start: /{escaped}/"}


def choice_piece(choices: Sequence[str]) -> Piece:
    """Return one of several texts."""
    return {"lark_grammar": "start: " + " | ".join(map(_quoted, choices))}


def lark_piece(grammar: str) -> Piece:
    """Return what llguidance's variant of Lark describes."""
    return {"lark_grammar": grammar}


def completion_grammar(
    token_ids: Mapping[str, int], *, thinking: bool, answer: Piece | None, calls: Calls | None
) -> str | None:
    """Return the grammar of a completion, or None where anything goes.

    Raises:
        RequestError: a tool's name or schema cannot be written as DSML.
    """
    if answer is None and calls is None:
        return None
    writer = _Writer(token_ids)
    bodies = []
    if calls is None or not calls.are_required:
        bodies.append("TEXT" if answer is None else writer.piece(answer))
    if calls is not None:
        opening = "TEXT_AND_OPENING" if len(bodies) == 1 and answer is None else '"\\n\\n<"'
        bodies.append(f"{opening} {writer.block(calls)}")
    reasoning = f"REASONING {writer.token(THINK_END)} " if thinking else ""
    writer.rules.insert(0, f"start: {reasoning}({' | '.join(bodies)})")
    main = {"name": "start", "lark_grammar": "\n".join(writer.rules) + _TERMINALS}
    return json.dumps({"grammars": [main, *writer.pieces]})


class _Writer:
    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        self.rules: list[str] = []
        self.pieces: list[Piece] = []

    def token(self, marker: str) -> str:
        return f"<[{self._token_ids[marker]}]>"

    def piece(self, piece: Piece) -> str:
        name = f"piece{len(self.pieces)}"
        self.pieces.append({"name": name, **piece})
        return f"@{name}"

    def block(self, calls: Calls) -> str:
        """Write the block behind its "<"."""
        names = [self._call(i, tool) for i, tool in enumerate(calls.tools)]
        self.rules.append(f"call: {' | '.join(names)}")
        many = "call" if calls.at_most_one else "call+"
        dsml, name = self.token(DSML), TOOL_CALLS_BLOCK
        return f'{dsml} "{name}>\\n" {many} "</" {dsml} "{name}>"'

    def _call(self, index: int, tool: Mapping[str, Any]) -> str:
        dsml, name = self.token(DSML), tool["name"]
        tag = _quoted(f'invoke name="{_writable(name)}">\n')
        opening, closing = f'"<" {dsml} {tag}', f'"</" {dsml} "invoke>\\n"'
        self.rules.append(f"call{index}: {opening} {self._arguments(index, tool)} {closing}")
        return f"call{index}"

    def _arguments(self, index: int, tool: Mapping[str, Any]) -> str:
        """Write parameters in the order of the schema; a call without any has a blank line."""
        where = f"function {tool['name']!r}: parameters"
        schema = _of_kind(tool.get("parameters") or {}, dict, where)
        properties = _of_kind(schema.get("properties") or {}, dict, f"{where}.properties")
        required = _of_kind(schema.get("required") or [], list, f"{where}.required")
        if unknown := [key for key in required if key not in list(properties)]:
            _refuse(f"{where}.required has {unknown[0]!r}, which properties have not")
        names: list[str] = []
        for key, value in properties.items():
            names.append(f"call{index}_{len(names)}")
            self.rules.append(f"{names[-1]}: {self._parameter(key, value, schema)}")
        tails = [n if k in required else f"{n}?" for n, k in zip(names, properties, strict=True)]
        if any(key in required for key in properties):
            return " ".join(tails)
        # Each way to begin with one that is there, for at least one is written.
        starts = [" ".join([n, *tails[i + 1 :]]) for i, n in enumerate(names)]
        return "(" + " | ".join([*starts, '"\\n"']) + ")"

    def _parameter(self, key: str, schema: Any, root: Mapping[str, Any]) -> str:
        dsml = self.token(DSML)
        opening, closing = f'parameter name="{_writable(key)}" string=', f'{dsml} "parameter>\\n"'

        def value(kind: Literal["true", "false"], text: str) -> str:
            return f'"<" {dsml} {_quoted(f"{opening}{json.dumps(kind)}>")} {text} {closing}'

        text, other = _split(schema)
        ways = []
        if text is True:
            ways.append(value("true", "VALUE_AND_CLOSING"))
        elif text:
            ways.append(value("true", f'({" | ".join(map(_quoted, text))}) "</"'))
        if other is not None:
            shared = {k: root[k] for k in ("$defs", "definitions") if k in root}
            named = self.piece(
                json_piece({**shared, **other} if isinstance(other, Mapping) else other)
            )
            ways.append(value("false", f'{named} "</"'))
        return " | ".join(ways)


def _split(schema: Any) -> tuple[Literal[True] | list[str], Any]:
    """Split a parameter's schema: which strings, raw as V4 writes them; and which other JSON.

    A string's `enum` and `const` hold; what else a schema says about strings does not.
    """
    if not isinstance(schema, Mapping):
        return [], schema
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    if given is not None:
        _of_kind(given, list, "enum")
    if given is not None:
        rest = [v for v in given if not isinstance(v, str)]
        return [v for v in given if isinstance(v, str)], {"enum": rest} if rest else None
    if "string" not in kinds:
        return [], schema
    others = [k for k in kinds if k != "string"]
    return True, {**schema, "type": others} if others else None


def _of_kind(value: Any, kind: type[K], where: str) -> K:
    if not isinstance(value, kind):
        name = "a list" if kind is list else "an object"
        _refuse(f"{where} must be {name}, got {json.dumps(value)[:60]}")
    return value


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _writable(name: str) -> str:
    if _UNWRITABLE.search(name):
        _refuse(f"the name {name!r} cannot be written in a tool call; use letters, digits, _ and -")
    return name


def _refuse(problem: str) -> NoReturn:
    raise RequestError(f"tools: {problem}", param="tools")
