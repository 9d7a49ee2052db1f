"""What MindSpore's compiler is told of each operator, so that a graph can hold it.

The definitions are made from the wrappers' own signatures: names, kinds and defaults are those of
the eager operators. Shapes and dtypes are inferred in ``v4_graph.cc``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from v4_ascend.backends.mindspore.aclnn.interface import recorded
from v4_ascend.backends.mindspore.aclnn.operators import AclnnOperators

WRITES = {"compressor": "state_cache"}  # what an operator writes of its inputs
SUFFIX = "_op.yaml"


def definition(operator: str) -> str:
    """Return an operator's definition, as CustomOpBuilder's `op_def` wants it."""
    (function,) = (f for f in recorded().values() if f.operator == operator)
    parameters = list(inspect.signature(getattr(AclnnOperators, operator)).parameters.values())[1:]
    lines = [f"{operator}:", "  args:"]
    may_be_left_out = False
    for parameter in parameters:
        default = parameter.default
        if default is parameter.empty:
            default = _default_of(parameter, may_be_left_out)
        lines += [f"    {parameter.name}:", f"      dtype: {_kind(parameter)}"]
        if default is not parameter.empty:
            may_be_left_out = True
            lines.append(f"      default: {_literal(default)}")
    if operator in WRITES:
        written = WRITES[operator]
        lines += ["  args_signature:", f"    rw_write: {written}"]
        lines += ["  labels:", "    side_effect_mem: True"]
    lines.append("  returns:")
    for output in (a.name for a in function.arguments if a.kind == "out"):
        # A name of its own: one operator has an output called as its C++ type is.
        lines += [f"    {output}:", "      dtype: tensor"]
    return "\n".join((*lines, ""))


def write_definitions(folder: Path) -> list[str]:
    """Write every operator's definition into `folder`; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for function in recorded().values():
        file = folder / f"{function.operator}{SUFFIX}"
        file.write_text(definition(function.operator), encoding="utf-8")
        files.append(str(file))
    return files


def _default_of(parameter: inspect.Parameter, behind_one: bool) -> Any:
    """Return the default a graph needs where the eager operator has none.

    A tensor may be None in a graph only if None is its default, and then what follows needs one
    too: 0, which the operators refuse.
    """
    if "None" in str(parameter.annotation):
        return None
    return 0 if behind_one and _kind(parameter) != "tensor" else parameter.empty


def _kind(parameter: inspect.Parameter) -> str:
    # Annotations are text here: "Tensor", "Tensor | None", "int", ...
    return str(parameter.annotation).partition(" |")[0].lower()


def _literal(default: Any) -> str:
    if isinstance(default, str):
        return f"\"'{default}'\""
    text = str(default)
    # YAML takes 1e-20 for a word.
    return text.replace("e", ".0e") if isinstance(default, float) and "." not in text else text
