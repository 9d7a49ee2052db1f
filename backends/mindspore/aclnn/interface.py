"""What the aclnn functions take: as recorded, and as an installed package's headers declare it.

MindSpore finds an aclnn function by name and calls it through a pointer without a type, so a
package with other arguments under the same name would read garbage. Headers are compared first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

# What a C declaration says of an argument; the first that fits. Outputs are tensors to it.
_C_KINDS = (
    (r"\baclTensor\b", "tensor"),
    (r"\bchar\b", "str"),
    (r"\bbool\b", "bool"),
    (r"\bdouble\b", "float"),
    (r"\bint64_t\b", "int"),
)
CHIPS = ("a2", "a3", "950")
_HANDLES = 2  # workspaceSize and executor end every declaration


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an aclnn function; `kind` is tensor, out, int, float, bool or str."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Function:
    """An aclnn function, the torch operator that calls it, and the chips it is built for."""

    chips: tuple[str, ...]
    operator: str
    name: str
    arguments: tuple[Argument, ...]


@cache
def recorded() -> dict[str, Function]:
    """Return the functions of ``interface.txt`` by their aclnn names."""
    text = resources.files(__package__ or "").joinpath("interface.txt").read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        chips, operator, call = line.split("  ")
        name, _, arguments = call.rstrip(")").partition("(")
        pairs = (a.split(" ") for a in arguments.split(", "))
        given = tuple(Argument(k, n) for k, n in pairs)
        found[name] = Function(tuple(chips.split(",")), operator, name, given)
    return found


def declared(header: str, function: str) -> tuple[Argument, ...] | None:
    """Return the arguments a C header declares for `function`, or None if it does not."""
    found = re.search(rf"\b{function}GetWorkspaceSize\s*\(([^)]*)\)\s*;", header)
    if found is None:
        return None
    arguments = [a.strip() for a in found[1].split(",")][:-_HANDLES]
    return tuple(Argument(_kind(a), re.findall(r"\w+", a)[-1]) for a in arguments)


def why_not_installed(packages: Sequence[Path]) -> str | None:
    """Return None if `packages` are a chip's, with every function as recorded, else a reason."""
    headers = {path: path.read_text(errors="replace") for path in _headers(packages)}
    missing = []
    for function in recorded().values():
        declarations = {p: d for p, t in headers.items() if (d := declared(t, function.name))}
        for path, arguments in declarations.items():
            if why := _difference(function.arguments, arguments):
                return f"{path}: {function.name} {why}; it is another version's or package's"
        if not declarations:
            missing.append(function)
    # Packages are built per chip, and attention differs: one chip's functions are all there.
    lacks = [[f for f in missing if chip in f.chips] for chip in CHIPS]
    if not all(lacks):
        return None
    nearest = min(lacks, key=len)[0]
    where = ", ".join(map(str, packages)) or "no folder"
    return f"no operator package declares {nearest.name} (looked in {where})"


def _headers(packages: Sequence[Path]) -> Iterator[Path]:
    for package in packages:
        yield from sorted((package / "op_api" / "include").rglob("aclnn*.h"))


def _kind(declaration: str) -> str:
    return next((kind for c, kind in _C_KINDS if re.search(c, declaration)), declaration)


def _difference(ours: Sequence[Argument], theirs: Sequence[Argument]) -> str | None:
    if len(ours) != len(theirs):
        return f"takes {len(theirs)} arguments, must be {len(ours)}"
    places = {_plain(a.name): i for i, a in enumerate(ours)}
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        kind = "tensor" if our.kind == "out" else our.kind
        # Headers spell some names in other ways; one that is known must be where it is known.
        if their.kind != kind or places.get(_plain(their.name), i) != i:
            return f"has {their.kind} {their.name} as argument {i + 1}, must be {kind} {our.name}"
    return None


def _plain(name: str) -> str:
    plain = name.replace("_", "").lower()
    return re.sub(r"(?<=.)(optional|out|ref)$", "", plain)
