"""Call every operator once on a backend's device: the smallest case that a kernel takes.

Prints ``> op`` before each call, so that who kills us knows where it hung. Vendor kernels refuse
tiny widths; Flash's are tried then.
"""

from __future__ import annotations

import sys

import msgspec

from v4_ascend.backends import Backend, find_backend
from v4_ascend.deploy.doctor.facts import Probed
from v4_ascend.ops import OPS
from v4_ascend.runtime.verify import Result, Selection, Shapes, verify


def main(name: str) -> None:
    """Try a backend's operators.

    Raises:
        BackendUnavailableError: it does not run here.
    """
    backend = find_backend(name, "doctor")
    backend.require()
    for op in OPS:
        print(f"> {op}", flush=True)  # noqa: T201
        print(msgspec.json.encode(_try(backend, op)).decode(), flush=True)  # noqa: T201


def _try(backend: Backend, op: str) -> Probed:
    if op in backend.missing:
        return Probed(op, "missing", backend.missing[op])
    refused = "it has no case of these shapes"
    shapes: Shapes
    for shapes in ("tiny", "flash"):
        for case in Selection(op, None, shapes).cases(OPS[op]):
            chosen = Selection(op, case.id, shapes)
            results = list(verify(backend, chosen, lambda done, total: None))
            if failed := next((r for r in results if r.outcome == "failed"), None):
                return Probed(op, "failed", _said(failed))
            if any(r.outcome == "passed" for r in results):
                return Probed(op, "passed")
            refused = _said(results[-1]) if results else "no kernel is registered"
    return Probed(op, "refused", refused)


def _said(result: Result) -> str:
    return f"{result.kernel} on {result.case}: {result.why}"


if __name__ == "__main__":
    main(sys.argv[1])
