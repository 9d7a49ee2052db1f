"""A stand-in for the command `vllm`: it proves how we start and watch one, nothing about vLLM.

It refuses what vLLM 0.23.0 would refuse of its command line, and answers as little of its API as
readiness and the canary need. A worker that ignores SIGTERM runs beside it, as vLLM's may.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from safetensors import safe_open

from v4_ascend.deploy.vllm.arguments import arguments, parse

IGNORING = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FAULT = os.environ.get("STAND_IN_FAULT", "")


def main():
    values = parse(["vllm", *sys.argv[1:]], arguments("0.23.0"))
    sys.stdout.write(f"started {json.dumps(values)}\n")
    sys.stdout.flush()
    subprocess.Popen([sys.executable, "-c", IGNORING, os.environ["STAND_IN_MARK"]])
    if FAULT == "dies" or (FAULT == "dies of more" and values["max-num-seqs"] > 4):
        raise SystemExit("no NPU here")
    if values.get("headless"):
        signal.pause()
    Handler.model = "another" if FAULT == "other model" else values["served-model-name"]
    ThreadingHTTPServer((values["host"], values["port"]), Handler).serve_forever()


class Handler(BaseHTTPRequestHandler):
    started = time.monotonic()

    def do_GET(self):
        if self.path == "/health":
            self.say(200 if time.monotonic() - self.started > 0.5 else 503, {})
        elif key := os.environ.get("VLLM_API_KEY"):
            is_right = self.headers.get("Authorization") == f"Bearer {key}"
            self.say(200 if is_right else 401, {"data": [{"id": self.model}]})
        else:
            self.say(200, {"data": [{"id": self.model}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or "prompt_logprobs" not in body:
            self.say(404, {"error": {"message": "the stand-in has no such answer", "type": "x"}})
            return
        with safe_open(os.environ["STAND_IN_LOGITS"], framework="numpy") as file:
            logits = file.get_tensor("logits")[0].astype(np.float64)
        if FAULT == "wrong weights":
            logits = np.roll(logits, 7, axis=-1)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        shown = [None]
        for row in logprobs[: len(body["prompt"]) - 1]:
            top = np.argsort(row)[::-1][: body["prompt_logprobs"]]
            shown.append({str(i): {"logprob": row[i], "rank": r} for r, i in enumerate(top, 1)})
        self.say(200, {"choices": [{"text": "", "prompt_logprobs": shown}]})

    def say(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


main()
