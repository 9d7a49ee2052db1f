"""`make demo`: a synthetic checkpoint, a deployment, one streamed answer, and all of it stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

CHECKPOINT = Path(".demo/tiny")
QUESTION = "What is a supernode?"


def _run(*args: str) -> None:
    print("$ v4-ascend", *args, flush=True)
    done = subprocess.run([sys.executable, "-m", "v4_ascend", *args], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _chat(url: str) -> None:
    """Stream one answer; the model is random, so it is noise, at the speed of the real thing."""
    body = {
        "model": "v4-tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "max_tokens": 48,
        "seed": 7,
        "stream_options": {"include_usage": True},
    }
    start, first = time.perf_counter(), None
    usage: dict[str, int] = {}
    print(f"\n> {QUESTION}\n< ", end="", flush=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                if text and first is None:
                    first = time.perf_counter()
                print(text, end="", flush=True)
    end = time.perf_counter()
    first = first or end
    print(
        f"\n\nprompt {usage['prompt_tokens']} tokens, answer {usage['completion_tokens']}; first "
        f"text after {1000 * (first - start):.0f} ms, "
        f"{usage['completion_tokens'] / (end - start):.0f} tokens/s (random weights, CPU)"
    )


def main() -> None:
    """Run the demo from the checkout."""
    if not CHECKPOINT.exists():
        _run("init", "--preset", "tiny", "--out", str(CHECKPOINT))
    port = _free_port()
    args = ("--topology", "configs/topology/laptop.yaml", "--set", "name=demo")
    _run("deploy", *args, "--port", str(port), "--detach")
    try:
        _chat(f"http://127.0.0.1:{port}")
    finally:
        _run("down", "demo")


if __name__ == "__main__":
    main()
