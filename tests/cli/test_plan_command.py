"""`plan` and `fit` as a user types them."""

import json
import subprocess
import sys
import textwrap

import pytest

GOOD = """\
name: here
cluster:
  device: ascend-950dt-96
  supernodes: [{name: a, host_count: 8, devices_per_host: 8}]
  fabric: {board: 8, cabinet: 64}
model: {checkpoint: /nowhere, name: v4-pro}
serve: {max_model_len: 131072, concurrency: 64}
"""


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "v4_ascend", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_planning_never_imports_torch():
    code = (
        "import sys; from v4_ascend.cli.app import app; "
        "app(['plan', '--topology', 'supernode'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_the_shipped_supernode_is_planned_and_written(tmp_path):
    out = tmp_path / "bundle"
    done = run("plan", "--topology", "supernode", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["data"]
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["ranks"]) == facts["pools"][0]["chosen"]["n_used"] == 64
    assert sorted(p.name for p in (out / "env").iterdir()) == [f"sp0-host{i}.env" for i in range(8)]
    env = (out / "env" / "sp0-host7.env").read_text()
    assert "export V4_ASCEND_NODE_RANK=7" in env
    assert "export HCCL_BUFFSIZE=" in env
    assert all(
        line.startswith("# ")
        for line, following in zip(env.splitlines(), env.splitlines()[1:], strict=False)
        if following.startswith("export")
    )
    assert "v4-pro" in (out / "plan.html").read_text()
    again = run("plan", "run", "--topology", "supernode", "--out", out)
    assert again.returncode == 0, again.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_an_env_file_is_shell(tmp_path):
    out = tmp_path / "bundle"
    assert run("plan", "--topology", "supernode", "--out", out).returncode == 0
    script = f"V4_ASCEND_NIC=eth0; set -eu; . {out}/env/sp0-host0.env; echo $HCCL_SOCKET_IFNAME"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "eth0\n")


def test_no_legal_layout_exits_3_and_says_what_would_do(tmp_path):
    out = tmp_path / "bundle"
    small = ["--set", "cluster.supernodes=[{name: a, host_count: 1, devices_per_host: 8}]"]
    done = run("plan", "--topology", "supernode", *small, "--out", out)
    assert done.returncode == 3
    assert "no legal layout of v4-pro on 8 x ascend-950dt-96" in done.stderr
    assert not out.exists()
    fit = run("fit", "--model", "v4-pro", "--device", "ascend-910b4-32", "--devices", "8")
    assert fit.returncode == 3
    assert "48 x ascend-910b4-32 would do" in fit.stderr


def test_two_plans_are_compared(tmp_path):
    for name, n in (("a", 8), ("b", 16)):
        nodes = f"cluster.supernodes=[{{name: sp0, host_count: {n}, devices_per_host: 8}}]"
        done = run("plan", "--topology", "supernode", "--set", nodes, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    done = run("plan", "diff", tmp_path / "a", tmp_path / "b", "--json")
    changes = json.loads(done.stdout)["data"]
    assert {c["key"] for c in changes["settings"]} >= {"parallel.dp_size"}
    assert changes["ranks"] == 128
    same = run("plan", "diff", tmp_path / "a", tmp_path / "a")
    assert same.stdout == "the plans are the same\n"


BAD = {
    "unknown device": ("ascend-950dt-96", "ascend-950xx", ":3: no device profile 'ascend-950xx'"),
    "duplicate host": (
        "host_count: 8",
        "hosts: [h, h]",
        ":2: cluster: host 'h' is named twice",
    ),
    "duplicate supernode": (
        "[{name: a",
        "[{name: a, host_count: 1}, {name: a",
        "'a' is named twice",
    ),
    "zero hosts": ("host_count: 8", "host_count: 0", ":4: cluster.supernodes[0].host_count must"),
    "no hosts": ("host_count: 8, ", "", ":4: cluster.supernodes[0]: give either hosts or"),
    "both": ("host_count: 8", "host_count: 8, hosts: [h]", "give either hosts or host_count"),
    "no devices": ("devices_per_host: 8", "devices_per_host: 0", "devices_per_host must be"),
    "huge": ("host_count: 8", "host_count: 99999999", "799,999,992 devices, at most 65,536"),
    "a word for a number": (
        "host_count: 8",
        "host_count: eight",
        "must be an integer, got 'eight'",
    ),
    "fabric that does not nest": ("cabinet: 64", "cabinet: 60", "must be a multiple of board (8)"),
    "unknown level": (
        "cabinet: 64",
        "rack: 64",
        ":5: device ascend-950dt-96 knows no level 'rack'",
    ),
    "unknown key": ("serve:", "sevre:", ":7: unknown key sevre; did you mean 'serve'"),
    "key twice": ("name: here", "name: here\nname: there", ":2: name is given twice"),
    "missing key": ("{checkpoint: /nowhere, name: v4-pro}", "{checkpoint: /x}", ":6: missing key"),
    "tabs": ("  device:", "\tdevice:", "is not YAML"),
    "unknown model": ("v4-pro", "v5", ":6: no checkpoint here and no bundled configuration 'v5'"),
    "too long": ("131072", "2000000", ":7: serve.max_model_len (2000000) exceeds"),
    "objective": ("concurrency: 64", "objective: cheap", "objective must be 'throughput' or"),
    "utilisation": ("concurrency: 64", "memory_utilisation: 1.5", "memory_utilisation must be"),
    "ep that does not divide": (
        "concurrency: 64}",
        "concurrency: 64}\nlayout: {dp_size: 64, ep_size: 48}",
        "ep_size (48) must divide",
    ),
    "more ranks than devices": (
        "concurrency: 64}",
        "concurrency: 64}\nlayout: {dp_size: 128, ep_size: 64}",
        ":8: layout: 128 ranks, the pool has 64 devices",
    ),
    "overlapping pools": (
        "  fabric:",
        "  pools: [{role: prefill, supernodes: [a]}, {role: decode, supernodes: [a]}]\n  fabric:",
        "supernode 'a' is in two pools",
    ),
    "format the device lacks": ("name: v4-pro}", "name: v4-pro, weight_format: w8a8}", "w8a8 on"),
    "not text": ("name: here", "name: \x00", "is not YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_and_leaves_nothing(name, tmp_path):
    old, new, says = BAD[name]
    assert old in GOOD
    file = tmp_path / "t.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    done = run("plan", "--topology", file, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.yaml"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "ascend-950dt-96"], "needs --device and --devices"),
        (["--device", "ascend-950dt-69", "--devices", "8"], "did you mean 'ascend-950dt-96'"),
        (["--compare", "v3"], "--compare: must be v3.2"),
        (["--device", "cpu", "--devices", "1", "--context", "99999999"], "--context: 99999999"),
        (["--device", "cpu", "--devices", "1", "--utilisation", "0"], "--utilisation: must be"),
        (["--device", "cpu", "--devices", "1", "--engine", "mindie"], "--engine: must be"),
        (["--device", "cpu", "--devices", "1", "--weight-format", "w8a8"], "w8a8 on cpu"),
    ],
)
def test_a_bad_question_is_refused(args, says):
    done = run("fit", "--model", "v4-flash", *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_out_never_replaces_what_is_no_plan(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    done = run("plan", "--topology", "supernode", "--out", tmp_path / "mine")
    assert done.returncode == 2
    assert "is there and is no plan" in done.stderr
    assert (tmp_path / "mine" / "precious").read_text() == "x"


def test_inline_devices_and_given_links_are_planned(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(
        textwrap.dedent(GOOD).replace(
            "{board: 8, cabinet: 64}",
            "{rack: {n_devices: 64, bytes_per_s: 1e11, latency_s: 1e-6}}",
        )
    )
    done = run("plan", "--topology", file, "--json")
    assert done.returncode == 0, done.stderr
    (level, *_) = json.loads(done.stdout)["data"]["pools"][0]["levels"]
    assert (level["name"], level["source"]) == ("rack", "the topology file")


def test_a_plan_is_simulated_and_a_failed_device_found():
    done = run("plan", "simulate", "--topology", "supernode", "--json")
    for row in json.loads(done.stdout)["data"]:
        assert row["simulated_ms"] == pytest.approx(row["closed_form_ms"], rel=0.05)
    done = run("plan", "simulate", "--topology", "supernode", "--failed", "9")
    assert "stage 0, EP group 0 (devices 0 to 63) never finishes" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--slow", "x=2"], "--slow: 'x' is no device number"),
        (["--slow", "3"], "--slow: must be NAME=FACTOR"),
        (["--slow", "999=2"], "device 999 of 64"),
        (["--contention", "rack=2"], "no level 'rack'"),
        (["--failed", "64"], "device 64 of 64"),
    ],
)
def test_a_bad_fault_is_refused(args, says):
    done = run("plan", "simulate", "--topology", "supernode", *args)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_rank_table_names_the_hosts_and_the_plan_writes_its_part_of_it(tmp_path):
    named = tmp_path / "named.yaml"
    names = ", ".join(f"node-{i}" for i in range(8))
    named.write_text(GOOD.replace("host_count: 8", f"hosts: [{names}]"))
    table = tmp_path / "table.json"
    made = run("ranktable", "generate", "--topology", named, "--placeholder", "--out", table)
    assert made.returncode == 0, made.stderr
    (tmp_path / "t.yaml").write_text(GOOD)
    out = tmp_path / "out"
    options = ("--topology", tmp_path / "t.yaml", "--rank-table", table, "--out", out)
    done = run("plan", "--set", "layout={dp_size: 16, ep_size: 16}", *options)
    assert done.returncode == 0, done.stderr
    plan = json.loads((out / "plan.json").read_text())
    assert [r["host"] for r in plan["ranks"]] == ["node-0"] * 8 + ["node-1"] * 8
    written = json.loads((out / "ranktable.json").read_text())
    given = json.loads(table.read_text())
    assert written["rank_list"] == given["rank_list"][:16]
    assert run("ranktable", "validate", out / "ranktable.json").returncode == 2  # placeholders


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("host_count: 8", "host_count: 4"), "4 hosts of 8 devices, "),
        (("host_count: 8, devices_per_host: 8", "host_count: 8, devices_per_host: 16"), "of 8"),
        (("host_count: 8", "hosts: [q, r, s, t, u, v, w, x]"), "has no host 'q'"),
        (("ascend-950dt-96", "ascend-a3-64"), "reads rank tables 1.0 and 1.2"),
        (("ascend-950dt-96", "nvidia-h200"), "reads rank tables of no version"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_both_numbers(tmp_path, change, says):
    (tmp_path / "good.yaml").write_text(GOOD)
    table = tmp_path / "table.json"
    run(
        "ranktable",
        "generate",
        "--topology",
        tmp_path / "good.yaml",
        "--placeholder",
        "--out",
        table,
    )
    bad = GOOD.replace(*change).replace("fabric: {board: 8, cabinet: 64}", "fabric: {}")
    (tmp_path / "bad.yaml").write_text(bad)
    out = tmp_path / "out"
    done = run("plan", "--topology", tmp_path / "bad.yaml", "--rank-table", table, "--out", out)
    assert done.returncode == 2
    assert "bad.yaml:" in done.stderr
    assert says in done.stderr
    assert not out.exists()


def test_a_topology_cannot_join_what_the_table_has_in_two_supernodes(tmp_path):
    two = GOOD.replace(
        "{name: a, host_count: 8, devices_per_host: 8}",
        "{name: a, host_count: 4, devices_per_host: 8}, "
        "{name: b, host_count: 4, devices_per_host: 8}",
    )
    (tmp_path / "two.yaml").write_text(two)
    (tmp_path / "one.yaml").write_text(GOOD)
    table = tmp_path / "table.json"
    run(
        "ranktable",
        "generate",
        "--topology",
        tmp_path / "two.yaml",
        "--placeholder",
        "--out",
        table,
    )
    done = run("plan", "--topology", tmp_path / "one.yaml", "--rank-table", table)
    assert done.returncode == 2
    assert "would join hosts 'a-host0' of 'a' and 'b-host0' of 'b'" in done.stderr


def test_a_trace_of_expert_load_shows_in_the_plan(tmp_path):
    counts = [[1 + 50 * (e % 64 == 0) for e in range(384)] for _ in range(61)]
    (tmp_path / "load.json").write_text(json.dumps({"version": 1, "counts": counts}))
    done = run("plan", "--topology", "supernode", "--expert-load", tmp_path / "load.json", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)["data"]
    (row,) = [a for a in data["assumptions"] if a["what"].startswith("busiest rank")]
    assert row["label"] == "derived"
    assert "copies of busy experts" in row["source"]
    assert "+" in data["pools"][0]["chosen"]["layout"]
