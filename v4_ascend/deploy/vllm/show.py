"""The commands of a deployment as text for shells, and as plain data."""

from __future__ import annotations

import shlex
from typing import Any

from v4_ascend.deploy.vllm.launches import Launch
from v4_ascend.deploy.vllm.recipes import recipes

# What only the host knows; a shell stops with this message where it is not set.
ASKED = {
    "{address}": "${V4_ASCEND_ADDRESS:?this host's address for the others}",
    "{interface}": "${V4_ASCEND_NIC:?the interface that has it, such as eth0}",
}


def script(launches: tuple[Launch, ...]) -> str:
    """Return what to type on each host, in the order it is to be typed."""
    lines = [f"# for vLLM {recipes().vllm} and vllm-ascend {recipes().vllm_ascend}"]
    for launch in launches:
        ready = f"ready once {launch.url} answers" if launch.url else "headless: no API"
        lines.append(f"\n# {launch.order}: on {launch.host}, {launch.role}; {ready}")
        lines += [f"export {k}={_spelled(v)}" for k, v in launch.env.items()]
        lines.append(_command(launch.argv))
    return "\n".join(lines)


def as_data(launches: tuple[Launch, ...]) -> dict[str, Any]:
    """Return the same for --json."""
    return {
        "vllm": recipes().vllm,
        "vllm_ascend": recipes().vllm_ascend,
        "launches": [
            {
                "host": x.host,
                "role": x.role,
                "order": x.order,
                "url": x.url,
                "env": x.env,
                "argv": list(x.argv),
            }
            for x in launches
        ],
    }


def _spelled(value: str) -> str:
    return f'"{ASKED[value]}"' if value in ASKED else shlex.quote(value)


def _command(argv: tuple[str, ...]) -> str:
    """Break a command before each flag."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)
