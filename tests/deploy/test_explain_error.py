"""explain-error: excerpts in the vendors' formats, the data itself, and the command."""

import io
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import typer.main
import yaml
from explain_plan import two_hosts

import v4_ascend.errors
from v4_ascend.cli.app import app
from v4_ascend.deploy.explain.entries import all_entries, find
from v4_ascend.deploy.explain.findings import Findings, judge
from v4_ascend.deploy.explain.reading import stamp_of
from v4_ascend.deploy.explain.report import verdict_lines

CASES = yaml.safe_load((Path(__file__).parents[1] / "data" / "error_logs.yaml").read_text())
TIMEOUT = "[rank{}]: EI0006: [PID: 1{}] 2026-04-08-18:07:{}.444.436 Getting socket times out.\n"


def verdict_of(logs, plan=None):
    findings = Findings(plan)
    for name, text in logs.items():
        findings.read(name, io.BytesIO(text if isinstance(text, bytes) else text.encode()))
    return judge(findings.sorted()), findings


def command(*args, stdin=b"", **env):
    done = subprocess.run(
        [sys.executable, "-m", "v4_ascend", "explain-error", *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | env,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_an_excerpt_is_taken_for_what_it_is(case):
    assert case["origin"]
    verdict, _ = verdict_of(case["logs"], two_hosts())
    first, expect = verdict.first, case["expect"]
    if expect["error"] == "none":
        assert first is None
        return
    assert (first.entry.id if first.entry else "unknown") == expect["error"]
    assert first.place.rank == expect.get("rank")
    assert (first.entry.layer if first.entry else None) == expect.get("layer")


def test_there_are_enough_excerpts():
    assert len(CASES) >= 25


def test_the_order_of_the_files_changes_nothing():
    for case in CASES:
        wanted = case["expect"]["error"]
        verdict, _ = verdict_of(dict(reversed(case["logs"].items())), two_hosts())
        found = verdict.first and (verdict.first.entry.id if verdict.first.entry else "unknown")
        assert (found or "none") == wanted, case["name"]


def test_of_many_ranks_the_first_by_time_is_named_with_what_it_holds():
    logs = {f"r{r}": TIMEOUT.format(r, r, 20 + r) for r in (0, 1, 3)}
    logs["r2"] = "[ERROR] 2026-04-08-18:05:01 (PID:7, Device:0, RankID:2) error code is 507054\n"
    verdict, findings = verdict_of(logs, two_hosts())
    lines = list(verdict_lines(verdict, two_hosts(), findings.files_without_time))
    assert lines[0] == (
        "rank 2 (stage 0, layers 0 to 4, experts 0 to 3, host-b device 0): 507054, "
        "multi-bit ECC error of the device's memory, 2026-04-08 18:05:01"
    )
    assert [line.partition(":")[0] for line in lines[1:3]] == ["why", "do"]
    assert "also: EI0006 (a consequence) on rank 0, 1, 3, 2026-04-08 18:07:20.444" in "\n".join(
        lines
    )


def test_with_consequences_alone_the_silent_rank_is_suspected():
    logs = {f"r{r}": TIMEOUT.format(r, r, 20 + r) for r in (0, 1, 3)}
    verdict, findings = verdict_of(logs, two_hosts())
    assert verdict.only_consequences
    text = "\n".join(verdict_lines(verdict, two_hosts(), findings.files_without_time))
    assert "or on a rank without an error: 2" in text


ENDED = "torch.distributed.elastic.multiprocessing.api.SignalException: got signal: 15\n"


def test_ranks_that_were_told_to_end_are_no_fault():
    verdict, findings = verdict_of({"ranks.log": ENDED})
    text = "\n".join(verdict_lines(verdict, None, findings.files_without_time))
    assert text.startswith("no fault in these logs: processes were told to end (signal 15)")
    code, said, _ = command("-", "--json", stdin=ENDED.encode())
    assert (code, json.loads(said)["data"]["result"]) == (0, "told to end")


def test_a_fault_beside_a_process_that_was_told_to_end_is_still_named():
    verdict, _ = verdict_of({"ranks.log": ENDED + "[rank1]: error code is 507035\n"})
    assert not verdict.is_told_to_end
    assert verdict.first.entry.id == "507035"


def test_a_log_without_times_comes_last_and_is_said_to_have_none():
    logs = {
        "a.log": "[rank0]: error code is 507054\n",
        "b.log": "[rank1]:[E603 18:38:55.636744330 x.cpp:454] error code is 507035\n",
    }
    verdict, findings = verdict_of(logs)
    assert verdict.first.place.rank == 1
    assert findings.files_without_time == ["a.log"]
    text = "\n".join(verdict_lines(verdict, None, findings.files_without_time))
    assert "a.log has no times" in text


def test_a_pid_that_a_rank_has_names_it_where_only_the_pid_is_said():
    logs = {
        "plog.log": "[ERROR] HCCL(29,python3):2026-09-05-08:04:10.000.001 [a.cc:1] EI0001\n",
        "run.log": "(Worker_DP6_EP6 pid=29) ERROR 09-05 08:04:13 [m.py:1] RuntimeError: bad\n",
    }
    verdict, _ = verdict_of(logs)
    assert (verdict.first.entry.id, verdict.first.place.rank) == ("EI0001", 6)


@pytest.mark.parametrize(
    ("text", "year", "rest"),
    [
        ("HCCL(1,p):2026-07-23-03:47:57.070.463 [", 2026, (7, 23, 3, 47, 57, 70463)),
        ("2026-11-26 17:38:37,763 x", 2026, (11, 26, 17, 38, 37, 763000)),
        ("ERROR 09-05 08:04:13 [m.py:1]", None, (9, 5, 8, 4, 13, 0)),
        ("[rank0]:[E603 18:38:55.636744330 O.cpp:4]", None, (6, 3, 18, 38, 55, 636000)),
        ("[rank0]:[E1129 08:37:32.296830396 c.ts:4]", None, (11, 29, 8, 37, 32, 296000)),
        ("E0824 11:45:01.752239 15252 ../x.cpp:3009]", None, (8, 24, 11, 45, 1, 752000)),
        ("[Thu Nov 26 23:29:41 2026] oom", 2026, (11, 26, 23, 29, 41, 0)),
        ("Nov 26 23:29:41 host-a kernel: oom", None, (11, 26, 23, 29, 41, 0)),
    ],
)
def test_the_forms_of_time(text, year, rest):
    stamp = stamp_of(text.encode())
    assert (stamp.year, stamp.rest) == (year, rest)


def test_a_time_that_no_calendar_has_is_none():
    verdict, _ = verdict_of({"a": "E9999 88:99:77.111 error code is 507034\n"})
    assert verdict.first.entry.id == "507034"
    assert verdict.first.at is None


# ---- the data


def test_every_entry_is_complete_and_found_by_its_own_words():
    entries = all_entries()
    assert len(entries) >= 60
    assert len({e.id.casefold() for e in entries}) == len(entries)
    for e in entries:
        assert e.source.startswith(("https://", "v4_ascend/")), e.id
        if not e.pattern:  # a pattern's line stands among the excerpts or below
            shown = f"error code is {e.id}[" if e.id.isdigit() else e.words[0]
            assert e.shows_in(shown), e.id
        assert find(e.id.lower()) is e


def test_a_source_of_ours_is_a_file_that_says_so():
    root = Path(__file__).parents[2]
    for e in all_entries():
        if e.evidence == "ours":
            text = (root / e.source).read_text()
            parts = [p for w in e.words for p in (w.strip(" :()"),)]
            assert any(p in text for p in parts) or e.id == "gloo-timeout", (e.id, parts)


def test_every_error_class_has_an_entry():
    names = {
        n
        for n, c in vars(v4_ascend.errors).items()
        if isinstance(c, type) and issubclass(c, v4_ascend.errors.V4AscendError)
    }
    assert names <= {e.id for e in all_entries()}


WANTED = """507034 507035 507011 EI0002 EI0006 EI0007 EI0015 EJ0001 EL0009 EZ9999 561002 161001
161002 hccl-root-info-1 npu-oom cuda-oom oom-killer host-oom nccl-2 nccl-watchdog rank-ended
rank-stuck not-finite"""


def test_the_codes_people_paste_are_known():
    assert not [code for code in WANTED.split() if find(code) is None]


def test_commands_in_next_steps_exist():
    commands = typer.main.get_command(app).commands
    for e in all_entries():
        for step in e.next:
            for name in re.findall(r"v4-ascend ([a-z][a-z-]+)", step):
                assert name in commands, (e.id, name)


# ---- what is no log


@pytest.mark.parametrize("data", [b"", b"\n\n\n", os.urandom(1 << 18), b"\0" * (3 << 20)])
def test_garbage_has_no_error(data):
    verdict, _ = verdict_of({"x.bin": data})
    assert verdict.first is None or verdict.first.entry is None


def test_a_line_that_never_ends_is_read_in_pieces():
    verdict, _ = verdict_of({"x": b"x" * (5 << 20) + b" error code is 507034 "})
    assert verdict.first.entry.id == "507034"


def test_random_cuts_of_the_excerpts_never_break_it():
    rng = random.Random(7)
    whole = "".join(t for c in CASES for t in c["logs"].values()).encode()
    for _ in range(60):
        a, b = sorted(rng.randrange(len(whole)) for _ in range(2))
        verdict, findings = verdict_of({"cut.log": whole[a:b]}, two_hosts())
        list(verdict_lines(verdict, two_hosts(), findings.files_without_time))


class Endless(io.RawIOBase):
    """A log of `n` bytes that is in no memory."""

    def __init__(self, line, n):
        self.block, self.left = line * (1 + (1 << 20) // len(line)), n

    def read(self, size=-1):
        size = min(size, self.left, len(self.block))
        self.left -= size
        return self.block[:size]


def test_a_long_log_takes_bounded_memory():
    findings = Findings()
    tracemalloc.start()
    findings.read("long", Endless(b"step 7: 12 tokens, 0.1 s, everything is well here\n", 24 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


# ---- the command


def test_a_code_alone_prints_its_entry():
    code, out, _ = command("507034")
    assert code == 0
    assert out.startswith("507034 (ACL_ERROR_RT_VECTOR_CORE_TIMEOUT): vector core timeout [CANN]")
    assert [line.split(":")[0] for line in out.splitlines()[1:3]] == ["why", "do"]
    assert "source: https://" in out


def test_a_code_nobody_knows_is_unknown():
    for unknown in ("599999", "EI9999", "NOSUCH99"):
        code, out, _ = command(unknown)
        assert (code, out.split(";")[0]) == (1, f"{unknown}: unknown, and no file")


def test_what_is_neither_file_nor_code_is_a_mistake(tmp_path):
    code, _, err = command(tmp_path / "gone.log")
    assert (code, err) == (
        2,
        f"error: {tmp_path}/gone.log: cannot be read: No such file or directory\n",
    )
    code, _, err = command()
    assert (code, err.split(";")[0]) == (2, "error: explain-error: nothing to explain")
    code, _, err = command(tmp_path)
    assert (code, err) == (2, f"error: {tmp_path}: a folder without *.log\n")
    code, _, err = command("--name", "nobody", XDG_STATE_HOME=str(tmp_path))
    assert code == 2
    assert err.startswith("error: --name: nobody has no logs in")


def test_a_deployment_by_name_with_its_plan(tmp_path):
    folder = tmp_path / "v4-ascend" / "pair"
    folder.mkdir(parents=True)
    two_hosts().write(folder / "plan.json")
    (folder / "ranks.log").write_text("[1]: MemoryError\n")
    (folder / "ranks-host-b.log").write_text("[0]: BrokenPipeError: [Errno 32] Broken pipe\n")
    code, out, err = command("--name", "pair", "--json", XDG_STATE_HOME=str(tmp_path))
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["version"], answer["status"], answer["diagnostics"]) == (1, "ok", [])
    first = answer["data"]["first"]
    assert (first["rank"], first["error"]["id"]) == (1, "host-oom")
    assert first["who"] == "rank 1 (stage 0, layers 0 to 4, experts 4 to 7, host-a device 1)"
    assert [f["rank"] for f in answer["data"]["rest"]] == [2]


def test_standard_input_and_an_unknown_error():
    code, out, _ = command("-", stdin=b"ValueError: zebra\n")
    assert code == 1
    assert out.splitlines()[0] == "standard input: unknown error, time unknown"
    assert "line: standard input:1: ValueError: zebra" in out
    code, out, _ = command("-", stdin=b"all is well\n")
    assert (code, out) == (1, "no error found in these logs\n")


def test_the_list_and_its_json():
    code, out, _ = command("--list")
    assert code == 0
    assert len(out.splitlines()) == len(all_entries())
    code, out, _ = command("--list", "--json")
    assert len(json.loads(out)["data"]) == len(all_entries())


def test_help_and_codes_need_no_torch():
    script = (
        "import sys\nfrom v4_ascend.cli import main\nsys.argv[1:] = ['explain-error', '507034']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
