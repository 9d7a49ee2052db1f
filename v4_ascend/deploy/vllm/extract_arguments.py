"""Read from the wheels of vLLM and vllm-ascend what `vllm serve` accepts, without importing them.

Run once for each version, and for a version of your own::

    pip download --no-deps vllm==0.23.0 vllm-ascend==0.23.0
    python -m v4_ascend.deploy.vllm.extract_arguments vllm-*.whl vllm_ascend-*.whl > arguments.json

Flags are added in vllm/engine/arg_utils.py and vllm/entrypoints/openai/cli_args.py; most take type,
choices and default from a field of a configuration class. What cannot be read from the text of the
source (a choice made at run time) is left open, never guessed.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

ENGINE, SERVE = "vllm/engine/arg_utils.py", "vllm/entrypoints/openai/cli_args.py"
ENVIRONMENTS = ("vllm/envs.py", "vllm_ascend/envs.py")
CONNECTORS = (
    "vllm/distributed/kv_transfer/kv_connector/factory.py",
    "vllm_ascend/distributed/kv_transfer/__init__.py",
)
PARSERS = {
    "tool-call-parser": "vllm/tool_parsers/__init__.py",
    "reasoning-parser": "vllm/reasoning/__init__.py",
}


class Sources:
    """The Python files of some wheels."""

    def __init__(self, wheels: list[Path]) -> None:
        self.names: list[str] = []
        self._files: dict[str, str] = {}
        for wheel in wheels:
            self.names.append(wheel.name)
            with ZipFile(wheel) as z:
                for name in z.namelist():
                    if name.endswith(".py") and name.startswith(("vllm/", "vllm_ascend/")):
                        self._files[name] = z.read(name).decode("utf-8")

    def tree(self, name: str) -> ast.Module:
        """Parse one file; KeyError if no wheel has it."""
        return ast.parse(self._files[name])

    def configs(self) -> Iterator[ast.Module]:
        """Parse the files of configuration classes."""
        for name in sorted(self._files):
            if name.startswith("vllm/config/"):
                yield self.tree(name)

    def ascend(self) -> Iterator[ast.Module]:
        """Parse the files of vllm-ascend."""
        for name in sorted(self._files):
            if name.startswith("vllm_ascend/"):
                yield self.tree(name)


class Types:
    """Classes and aliases of literals, by name."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.classes: dict[str, ast.ClassDef] = {}
        self.aliases: dict[str, ast.expr] = {}
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    self.classes[node.name] = node
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.aliases[node.targets[0].id] = node.value

    def field(self, cls: str, name: str) -> dict[str, Any]:
        """Describe a flag whose type is that of a class's field."""
        for node in self.classes[cls].body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return self._described(node.annotation, node.value)
        for base in self.classes[cls].bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                return self.field(base.id, name)
        raise KeyError(f"{cls}.{name}")

    def literals(self, annotation: ast.expr) -> list[Any]:
        """Return the values of a Literal, through names and nested ones."""
        if isinstance(annotation, ast.Name) and annotation.id in self.aliases:
            return self.literals(self.aliases[annotation.id])
        if isinstance(annotation, ast.Subscript) and _name(annotation.value) == "Literal":
            inner = annotation.slice
            found: list[Any] = []
            for item in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                known = isinstance(item, ast.Constant)
                found += [item.value] if known else self.literals(item)  # type: ignore[attr-defined]
            return found
        return []

    def _described(self, annotation: ast.expr, value: ast.expr | None) -> dict[str, Any]:
        text = ast.unparse(annotation)
        words = set(_names(annotation))
        choices = [v for part in _union(annotation) for v in self.literals(part)]
        found: dict[str, Any] = {"type": "str"}
        if "bool" in words and "str" not in words:
            found = {"type": "bool"}
        elif choices:
            # A second member, such as a plain string or a callable, leaves the choice open.
            members = [p for p in _union(annotation) if not _is_none(p)]
            found["type"] = "int" if all(isinstance(c, int) for c in choices) else "str"
            if len(members) == 1:
                found["choices"] = choices
        elif text.startswith(("list[", "tuple[", "set[")) or "list" in words:
            found = {"type": "str", "nargs": "+"}
        elif "dict" in words or any(w in self.classes for w in words):
            found["type"] = "json"
        elif "int" in words:
            found["type"] = "int"
        elif "float" in words:
            found["type"] = "float"
        default = _default(value)
        return found if default is None else found | {"default": default}


def extract(wheels: list[Path]) -> dict[str, Any]:
    """Return flags, environment and JSON keys that the wheels' code reads.

    Raises:
        KeyError: a file or class is not where this version of vLLM should have it.
    """
    sources = Sources(wheels)
    engine, serve = sources.tree(ENGINE), sources.tree(SERVE)
    types = Types([*sources.configs(), engine, serve])
    flags: dict[str, dict[str, Any]] = {}
    for tree, file in ((engine, ENGINE), (serve, SERVE)):
        for spelled, described in _added(tree, types):
            flags[spelled[0]] = described | {"source": file}
            if len(spelled) > 1:
                flags[spelled[0]]["aliases"] = spelled[1:]
    for cls in ("BaseFrontendArgs", "FrontendArgs"):
        for node in types.classes[cls].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id.replace("_", "-")
                flags[name] = types.field(cls, node.target.id) | {"source": SERVE}
    for name, file in PARSERS.items():
        flags[name]["choices"] = sorted(_table_keys(sources.tree(file)))
    return {
        "wheels": sources.names,
        "flags": dict(sorted(flags.items())),
        "speculative_methods": types.literals(ast.Name("SpeculativeMethod")),
        "cudagraph_modes": [
            n.targets[0].id
            for n in types.classes["CUDAGraphMode"].body
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        ],
        "kv_connectors": sorted({c for file in CONNECTORS for c in _registered(sources, file)}),
        "additional_config": sorted({k for tree in sources.ascend() for k in _keys_read(tree)}),
        "environment": sorted({v for f in ENVIRONMENTS for v in _table_keys(sources.tree(f))}),
    }


def _added(tree: ast.Module, types: Types) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield the spellings and the description of every flag that `add_argument` names."""
    tables: dict[str, str] = {}  # such as parallel_kwargs: ParallelConfig
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call = node.value
            if _name(call.func) == "get_kwargs" and isinstance(node.targets[0], ast.Name):
                tables[node.targets[0].id] = _name(call.args[0])
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "add_argument":
            continue
        spelled = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if not spelled or not str(spelled[0]).startswith("--"):
            continue
        names = [str(spelled[0]).removeprefix("--"), *map(str, spelled[1:])]
        yield names, _keywords(node, tables, types)


def _keywords(call: ast.Call, tables: dict[str, str], types: Types) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "str"}
    for keyword in call.keywords:
        value = keyword.value
        if isinstance(value, ast.Dict):  # **{**table["field"], "default": None}
            value = next(v for k, v in zip(value.keys, value.values, strict=True) if k is None)
        if keyword.arg is None and isinstance(value, ast.Subscript):
            cls, key = tables[_name(value.value)], ast.literal_eval(value.slice)
            described = types.field(cls, key)
        elif keyword.arg == "action":
            described["type"] = "switch" if isinstance(value, ast.Constant) else "bool"
        elif keyword.arg == "type":
            described["type"] = _name(value) if _name(value) in ("int", "float") else "str"
        elif keyword.arg == "nargs" and isinstance(value, ast.Constant):
            described["nargs"] = value.value
    return described


def _union(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        return [*_union(annotation.left), *_union(annotation.right)]
    return [annotation]


def _is_none(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.Constant) and annotation.value is None


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _names(node: ast.expr) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id


def _default(value: ast.expr | None) -> Any:
    """Return a default that stands in the text as a number, a string or a bool."""
    if isinstance(value, ast.Call) and _name(value.func) == "Field":
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
    if isinstance(value, ast.Constant):
        return value.value
    return None


def _table_keys(tree: ast.Module) -> Iterator[str]:
    """Yield the string keys of a module's dictionaries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value


def _registered(sources: Sources, file: str) -> Iterator[str]:
    for node in ast.walk(sources.tree(file)):
        if isinstance(node, ast.Call) and _name(node.func) == "register_connector":
            yield str(ast.literal_eval(node.args[0]))


def _keys_read(tree: ast.Module) -> Iterator[str]:
    """Yield the keys that are looked up in `additional_config`."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if _name(node.func.value) == "additional_config" and node.args:
                key = node.args[0]
            elif node.func.attr == "_get_config_value":
                key = node.args[1]
        elif isinstance(node, ast.Subscript) and _name(node.value) == "additional_config":
            key = node.slice
        if isinstance(key, ast.Constant):
            yield str(key.value)


if __name__ == "__main__":
    json.dump(extract([Path(w) for w in sys.argv[1:]]), sys.stdout, indent=1)
