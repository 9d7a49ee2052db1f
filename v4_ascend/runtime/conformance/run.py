"""Runs the cases, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import httpx

from v4_ascend.errors import ConfigError, V4AscendError
from v4_ascend.runtime.conformance.cases import CASES
from v4_ascend.runtime.conformance.endpoint import CaseFailedError, CaseSkippedError, Endpoint

TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """How a case went; `detail` is what it found, or why it says nothing."""

    case: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    detail: str


def run_cases(
    url: str, model: str | None, api_key: str | None, report: Callable[[int, int], None]
) -> list[Outcome]:
    """Run all cases against an endpoint; `report` sees how many are done, of how many.

    Raises:
        ConfigError: there is no such endpoint, or it has several models and none is named.
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT_S) as client:
        endpoint = Endpoint(client, model or _only_model(client))
        outcomes = []
        for n, (name, case) in enumerate(CASES.items()):
            report(n, len(CASES))
            start = time.monotonic()
            status: Literal["passed", "failed", "skipped"] = "passed"
            detail = ""
            try:
                case(endpoint)
            except CaseSkippedError as e:
                status, detail = "skipped", str(e)
            except CaseFailedError as e:
                status, detail = "failed", str(e)
            except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as e:
                # Not of the form a client relies on: as wrong as a wrong value.
                status, detail = "failed", f"{type(e).__name__}: {e}"
            outcomes.append(Outcome(name, status, time.monotonic() - start, detail))
        report(len(CASES), len(CASES))
        return outcomes


def _only_model(client: httpx.Client) -> str:
    where = f"{client.base_url}models"
    try:
        answer = client.get("/models")
        names = [str(m["id"]) for m in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(where, f"is no model list: {e}") from e
    if len(names) != 1:
        raise ConfigError("--model", f"say which one: {', '.join(names)}")
    return names[0]


def require_all_passed(outcomes: list[Outcome]) -> None:
    """Raise unless no case failed."""
    failed = [o.case for o in outcomes if o.status == "failed"]
    if failed:
        raise V4AscendError(f"{len(failed)} of {len(outcomes)} cases failed: {'; '.join(failed)}")
