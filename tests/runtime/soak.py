"""Thousands of requests against one deployment: ``python soak.py [--requests N] [--out FILE]``.

It starts the tiny fp32 model with drafts, and pages too few for all requests that run. Each of a
set of greedy prompts is answered alone first, and must get that answer again whatever else runs.
Among them: sampled answers, clients that leave, malformed bodies, bodies and prompts too large.
At the end the deployment is stopped while it answers. Exit 1 if a request was lost or wrong,
memory grew, or the drain was not clean.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from broken_bodies import broken
from prometheus_client.parser import text_string_to_metric_families
from test_deploy import Box, cmdline

KINDS = {"greedy": 50, "sampled": 15, "leaves": 15, "malformed": 12, "too large": 8}
SETTINGS = {
    "name": "soak",
    "serve.concurrency": 16,
    "serve.cache_tokens": 1280,  # one request of the full length, and no more
    "serve.n_draft_tokens": 1,
    "serve.max_body_bytes": 60_000,
}
NEAR_TIE = 1e-3  # of log probabilities: other sums in another batch may choose the other token
GROWTH = 0.05  # of memory, from when a quarter was answered to the end
JUDGED = 500  # requests from which on memory is judged: before, allocators still fill
PROMPTS = 32
CROWD = 4  # long requests that begin together: their pages are more than there are
DRAINED = 12  # requests that run when the deployment is stopped
CHAT = "/v1/chat/completions"


class WrongError(Exception):
    """An answer that is not what it must be."""


@dataclass(frozen=True)
class Job:
    """One request; its client leaves after so many pieces of the answer, or seconds."""

    kind: str
    path: str
    body: dict | str
    prompt: int = -1
    leave_pieces: int | None = None
    leave_s: float | None = None


@dataclass
class Report:
    """What happened."""

    seconds: dict = field(default_factory=lambda: defaultdict(list))  # by kind
    statuses: dict = field(default_factory=lambda: defaultdict(Counter))  # by kind
    lost: list = field(default_factory=list)
    wrong: list = field(default_factory=list)
    near_ties: int = 0
    memory: list = field(default_factory=list)  # answered so far, and bytes by process

    @property
    def n_done(self):
        return sum(len(s) for s in self.seconds.values())


def words(rng, n):
    return "".join(rng.choice("abcdefghij    ") for _ in range(n))


def prompts(rng, n):
    """Bodies of greedy requests of mixed lengths; some begin alike."""
    shared = [words(rng, 300), words(rng, 150)]
    for i in range(n):
        length = rng.choice([5, 40, 150, 400, 600])
        text = rng.choice([*shared, ""]) + words(rng, length)
        yield chat(text, max_tokens=rng.randint(4, 32), temperature=0) | {
            "logprobs": True, "top_logprobs": 2, "ignore_eos": True, "stream": i % 2 == 0,
        }  # fmt: skip


def chat(text, **options):
    return {"model": "v4-tiny", "messages": [{"role": "user", "content": text}], **options}


def jobs(rng, n, greedy):
    """Yield n requests of all kinds, in random order; the last ones, sent first, are the crowd."""
    malformed = list(broken(n, seed=rng.randrange(1 << 30)))
    for kind in rng.choices(list(KINDS), KINDS.values(), k=n - CROWD):
        text, n_tokens = words(rng, rng.choice([5, 100, 500])), rng.randint(1, 48)
        if kind == "greedy":
            prompt = rng.randrange(len(greedy))
            yield Job(kind, CHAT, greedy[prompt], prompt)
        elif kind == "sampled":
            yield Job(kind, CHAT, chat(text, max_tokens=n_tokens, n=rng.randint(1, 3)))
        elif kind == "leaves":
            body = chat(text, max_tokens=400, ignore_eos=True, stream=rng.random() < 0.7)
            when = rng.uniform(0, 2)
            leave = {"leave_pieces": int(10 * when)} if body["stream"] else {"leave_s": when}
            yield Job(kind, CHAT, body, **leave)
        elif kind == "malformed":
            path, body, _ = rng.choice(malformed)
            yield Job(kind, path, rng.choice([body, body[: len(body) // 2], "\0\xff{"]))
        else:
            yield Job(kind, CHAT, chat("x" * rng.choice([8_000, 100_000])))
    for _ in range(CROWD):
        yield Job("greedy", CHAT, greedy[-1], len(greedy) - 1)


async def answer(client, body):
    """Return each token's text and the gap to the one that came second.

    Raises:
        WrongError: the status is not 200, a stream has no end, or tokens are missing.
    """
    entries = []
    async with client.stream("POST", CHAT, json=body) as response:
        if response.status_code != 200:
            raise WrongError(f"{response.status_code} {(await response.aread()).decode()}")
        if body.get("stream"):
            lines = [line[6:] async for line in response.aiter_lines() if line]
            if lines[-1] != "[DONE]":
                raise WrongError(f"the stream ends with {lines[-1]}")
            choices = [c for line in lines[:-1] for c in json.loads(line)["choices"]]
        else:
            choices = json.loads(await response.aread())["choices"]
    for choice in choices:
        entries += (choice["logprobs"] or {"content": []})["content"]
    if len(entries) != body["max_tokens"]:
        raise WrongError(f"{len(entries)} tokens of {body['max_tokens']}")
    tops = [e["top_logprobs"] for e in entries]
    return [
        (e["bytes"], a["logprob"] - b["logprob"]) for e, (a, b) in zip(entries, tops, strict=True)
    ]


def compare(first, now):
    """Whether a near tie was decided the other way.

    Raises:
        WrongError: the answers differ where there was none.
    """
    for i, ((a, gap), (b, _)) in enumerate(zip(first, now, strict=True)):
        if a != b:
            if gap > NEAR_TIE:
                raise WrongError(f"token {i} is {b}, and was {a} by {gap:.4f}")
            return True
    return False


async def leave(client, job):
    """Close the connection while the request waits or is answered; return what came of it."""
    try:
        async with (
            asyncio.timeout(job.leave_s),
            client.stream("POST", job.path, json=job.body) as response,
        ):
            if response.status_code != 200:
                raise WrongError(f"leaves: {response.status_code}")
            if job.leave_pieces is None:
                await response.aread()
                return 200
            n_pieces = 0
            async for line in response.aiter_lines():
                n_pieces += bool(line)
                if n_pieces > job.leave_pieces:
                    return "left"
    except TimeoutError:
        return "left"
    raise WrongError(f"leaves: the stream ended after {n_pieces} pieces")


async def send(client, job, firsts, report):
    """Send one request and judge what comes back."""
    if job.kind == "greedy":
        report.near_ties += compare(firsts[job.prompt], await answer(client, job.body))
        return 200
    if job.kind == "leaves":
        return await leave(client, job)
    content = job.body if isinstance(job.body, str) else json.dumps(job.body)
    response = await client.post(job.path, content=content.encode())
    status = response.status_code
    good = {"sampled": status == 200, "too large": status in (400, 413)}
    if not good.get(job.kind, status < 500) or (status >= 400 and "error" not in response.json()):
        raise WrongError(f"{job.kind}: {status} {response.text[:200]}")
    return status


async def load(box, waiting, concurrency, firsts, report):
    """Keep `concurrency` requests under way until all are answered."""

    async def work(client):
        while waiting:
            job, began = waiting.pop(), time.monotonic()
            try:
                status = await send(client, job, firsts, report)
            except WrongError as e:
                status = "wrong"
                report.wrong.append(f"{job.kind}: {e}")
            except httpx.HTTPError as e:
                status = "lost"
                report.lost.append(f"{job.kind}: {type(e).__name__}: {e}")
            report.statuses[job.kind][status] += 1
            report.seconds[job.kind].append(time.monotonic() - began)

    async def weigh():
        while True:
            report.memory.append((report.n_done, memory(box)))
            await asyncio.sleep(0.5)

    scale = asyncio.create_task(weigh())
    async with client_of(box, concurrency) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
    scale.cancel()


def client_of(box, concurrency):
    limits = httpx.Limits(max_connections=concurrency)
    return httpx.AsyncClient(base_url=box.url, timeout=600, limits=limits)


def memory(box):
    """Resident bytes of the front and of the rank."""
    found = {}
    for pid in box.processes():
        for name in ("front", "worker"):
            if f"v4_ascend.runtime.{name}".encode() in cmdline(pid).split(b"\0"):
                pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
                found[name] = int(pages) * os.sysconf("SC_PAGE_SIZE")
    return found


def metrics(box):
    """Every sample without further labels, by name."""
    families = text_string_to_metric_families(httpx.get(f"{box.url}/metrics").text)
    return {s.name: s.value for f in families for s in f.samples if len(s.labels) == 1}


async def settled(box):
    """Wait until nothing runs; return the metrics, in which no slot and no page is taken."""
    deadline = time.monotonic() + 60
    while True:
        now = metrics(box)
        taken = [now[f"vllm:{n}"] for n in (
            "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        )]  # fmt: skip
        if not any(taken) or time.monotonic() > deadline:
            return now, taken
        await asyncio.sleep(0.2)


async def drain(box, greedy, firsts):
    """Stop the deployment while it answers; return what went wrong."""
    faults = []
    async with client_of(box, DRAINED) as client:
        which = [i % len(greedy) for i in range(DRAINED)]
        asked = [asyncio.create_task(answer(client, greedy[i])) for i in which]
        while not metrics(box)["vllm:num_requests_running"]:
            await asyncio.sleep(0.01)
        down = await asyncio.to_thread(box.run, "down", SETTINGS["name"])
        results = await asyncio.gather(*asked, return_exceptions=True)
        for i, result in zip(which, results, strict=True):
            try:
                if isinstance(result, BaseException):
                    raise WrongError(f"{type(result).__name__}: {result}")
                compare(firsts[i], result)
            except WrongError as e:
                faults.append(str(e))
    if down.returncode:
        faults.append(f"down: exit {down.returncode}: {down.stderr}")
    if left := box.processes():
        faults.append(f"processes left: {left}")
    return faults


async def soak(box, n, concurrency, seed):
    """Run all of it against a deployment that is up; return the report as JSON."""
    rng, report, began = random.Random(seed), Report(), time.monotonic()
    greedy = list(prompts(rng, max(4, min(PROMPTS, n // 8))))
    greedy.append(greedy[0] | {"messages": [{"role": "user", "content": words(rng, 300)}],
                               "max_tokens": 400})  # fmt: skip
    async with client_of(box, 1) as client:
        firsts = [await answer(client, body) for body in greedy]
    alone_s, began = time.monotonic() - began, time.monotonic()
    await load(box, list(jobs(rng, n, greedy)), concurrency, firsts, report)
    seconds = time.monotonic() - began
    counters, taken = await settled(box)
    weighed = {}
    for name in ("front", "worker"):
        warm = [m[name] for done, m in report.memory if 0.2 * n <= done <= 0.3 * n]
        end = [m[name] for done, m in report.memory if done >= 0.9 * n]
        sizes = [statistics.median(s) / 2**20 if s else None for s in (warm, end)]
        weighed[name] = dict(zip(("warm_mib", "end_mib"), sizes, strict=True))
    return {
        "requests": n, "concurrency": concurrency, "seed": seed,
        "alone_s": alone_s, "seconds": seconds,
        "kinds": {
            kind: {
                "statuses": {str(s): c for s, c in report.statuses[kind].items()},
                "p50_s": statistics.median(times), "max_s": max(times),
            }
            for kind, times in report.seconds.items()
        },
        "lost": report.lost, "wrong": report.wrong, "near_ties": report.near_ties,
        "taken_at_the_end": taken, "memory": weighed,
        "preempted": counters["vllm:num_preemptions_total"],
        "prefix_hits": counters["vllm:prefix_cache_hits_total"]
        / counters["vllm:prefix_cache_queries_total"],
        "drafted": counters["vllm:spec_decode_num_draft_tokens_total"],
        "generated": counters["vllm:generation_tokens_total"],
        "drain_faults": await drain(box, greedy, firsts),
    }  # fmt: skip


def faults_of(result):
    """Everything that must not be."""
    faults = [*result["lost"], *result["wrong"], *(f"drain: {f}" for f in result["drain_faults"])]
    if sum(sum(k["statuses"].values()) for k in result["kinds"].values()) != result["requests"]:
        faults.append("a request has no outcome")
    if any(result["taken_at_the_end"]):
        faults.append(f"running, waiting, pages at the end: {result['taken_at_the_end']}")
    if result["requests"] >= JUDGED:
        faults += [
            f"{name}: {m['warm_mib']:.0f} MiB grew to {m['end_mib']:.0f}"
            for name, m in result["memory"].items()
            if m["end_mib"] > (1 + GROWTH) * m["warm_mib"]
        ]
    return faults


def table(result):
    """Yield lines for people."""
    yield f"{'':12}{'requests':>9}{'p50 s':>8}{'max s':>8}  outcomes"
    for kind, k in sorted(result["kinds"].items()):
        outcomes = ", ".join(f"{c} {s}" for s, c in sorted(k["statuses"].items()))
        n = sum(k["statuses"].values())
        yield f"{kind:12}{n:9}{k['p50_s']:8.2f}{k['max_s']:8.2f}  {outcomes}"
    yield (
        f"{result['requests']} requests, {result['concurrency']} at a time, in "
        f"{result['seconds']:.0f} s; {result['generated']:.0f} tokens drawn, "
        f"{result['preempted']:.0f} pre-emptions, {100 * result['prefix_hits']:.0f} % of prompt "
        f"tokens from caches, {result['drafted']:.0f} drafts"
    )
    for name, m in result["memory"].items():
        sizes = " then ".join("?" if s is None else f"{s:.0f} MiB" for s in m.values())
        yield f"memory of the {name}, after a quarter and at the end: {sizes}"
    yield f"lost {len(result['lost'])}, wrong {len(result['wrong'])}, near ties decided otherwise "\
          f"{result['near_ties']}"  # fmt: skip


def run(folder, n, concurrency, seed):
    """Deploy, soak, drain; return the result."""
    box = Box(folder)
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", folder / "tiny")
    assert done.returncode == 0, done.stderr
    options = [word for k, v in SETTINGS.items() for word in ("--set", f"{k}={v}")]
    done = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert done.returncode == 0, done.stderr
    try:
        return asyncio.run(soak(box, n, concurrency, seed))
    finally:
        box.run("down", SETTINGS["name"])


def main():
    """Run it; print a table and faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), args.requests, args.concurrency, args.seed)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.writelines(f"{line}\n" for line in table(result))
    faults = faults_of(result)
    sys.stdout.writelines(f"FAULT: {fault}\n" for fault in faults)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
