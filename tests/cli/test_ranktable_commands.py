"""`ranktable` as a user types it."""

import json
import subprocess
import sys

import pytest

TOPOLOGY = """\
name: pair
cluster:
  device: {device}
  supernodes: [{{name: sp0, hosts: [a, b], devices_per_host: 2}}]
model: {{checkpoint: /models/v4, name: v4}}
serve: {{max_model_len: 1024}}
"""
DUMP = """\
+ npu-smi info -m
NPU ID      Chip ID      Chip Logic ID      Chip Name
0           0            0                  910B3
0           1            -                  Mcu
1           0            1                  910B3
+ hccn_tool -i 0 -ip -g
ipaddr:192.168.{0}.1
netmask:255.255.255.0
+ hccn_tool -i 1 -ip -g
ipaddr:192.168.{0}.2
netmask:255.255.255.0
"""


def ranktable(folder, *args):
    return subprocess.run(
        [sys.executable, "-m", "v4_ascend", "ranktable", *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dumps").mkdir()
    for i, name in enumerate("ab"):
        (tmp_path / "dumps" / f"{name}.txt").write_text(DUMP.format(i))
    (tmp_path / "t.yaml").write_text(TOPOLOGY.format(device="cpu"))
    (tmp_path / "950.yaml").write_text(TOPOLOGY.format(device="ascend-950dt-96"))
    return tmp_path


def files_of(folder):
    return sorted(p.name for p in folder.iterdir())


GENERATE = ("generate", "--topology", "t.yaml", "--version", "1.0", "--dumps", "dumps")


def test_a_table_from_dumps_is_one_that_validates(folder):
    done = ranktable(folder, *GENERATE, "--out", "t.json")
    assert (done.returncode, done.stdout) == (
        0,
        "t.json: rank table 1.0, completed: 2 hosts, 4 devices\n",
    )
    done = ranktable(folder, "validate", "t.json")
    assert (done.returncode, done.stdout) == (
        0,
        "t.json: rank table 1.0, completed: 2 hosts, 4 devices\n",
    )
    done = ranktable(folder, "validate", "t.json", "--json")
    assert json.loads(done.stdout) == {
        "version": 1,
        "status": "ok",
        "data": {
            "version": "1.0",
            "status": "completed",
            "hosts": 2,
            "devices": 4,
            "supernodes": [],
        },
        "diagnostics": [],
    }


def test_without_out_the_table_is_all_of_stdout(folder):
    done = ranktable(folder, *GENERATE)
    table = json.loads(done.stdout)
    assert table["server_list"][1]["device"][1] == {
        "device_id": "1",
        "device_ip": "192.168.1.2",
        "rank_id": "3",
    }


def test_every_problem_is_a_line_or_a_diagnostic_and_exits_2(folder):
    table = json.loads(ranktable(folder, *GENERATE).stdout)
    table["server_list"][0]["device"][0]["device_port"] = "80"
    table["server_list"][1]["device"][1]["device_ip"] = "192.168.0.1"
    (folder / "t.json").write_text(json.dumps(table))
    done = ranktable(folder, "validate", "t.json")
    first, second = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert first.startswith("error: t.json: server_list[0].device[0].device_port: must be")
    assert second.startswith("t.json: server_list[1].device[1].device_ip: device_ip ")
    assert '"192.168.0.1" is at server_list[0].device[0].device_ip too' in second
    report = json.loads((done := ranktable(folder, "validate", "t.json", "--json")).stdout)
    assert (done.returncode, report["status"], report["data"]) == (2, "error", None)
    assert report["diagnostics"] == [first.removeprefix("error: "), second]


def test_what_is_no_json_is_a_diagnostic_with_its_line(folder):
    (folder / "t.json").write_text('{\n"status": }')
    done = ranktable(folder, "validate", "t.json", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["diagnostics"][0].startswith("t.json:2: is not JSON")


def test_the_version_is_by_default_what_the_soc_reads(folder):
    done = ranktable(folder, "generate", "--topology", "950.yaml", "--placeholder")
    table = json.loads(done.stdout)
    assert (table["version"], table["status"], table["rank_count"]) == ("2.0", "planned", 4)


def test_a_planned_table_does_not_validate_and_stays_planned(folder):
    placeholders = ("generate", "--topology", "t.yaml", "--placeholder", "--version", "1.2")
    done = ranktable(folder, *placeholders, "--out", "t.json")
    assert done.stdout == "t.json: rank table 1.2, planned: 2 hosts, 4 devices, 1 supernode\n"
    done = ranktable(folder, "validate", "t.json")
    assert done.returncode == 2
    assert "generate one from dumps" in done.stderr
    done = ranktable(folder, "convert", "t.json", "--to", "1.0")
    assert json.loads(done.stdout)["status"] == "planned"
    assert done.stderr.splitlines() == [
        "note: version 1.0 has no key for super_device_id of 4 devices",
        "note: version 1.0 has no key for supernode of 2 hosts",
    ]


def test_a_conversion_that_lacks_facts_writes_nothing(folder):
    ranktable(folder, *GENERATE, "--out", "t.json")
    before = files_of(folder)
    done = ranktable(folder, "convert", "t.json", "--to", "1.2", "--out", "u.json")
    assert done.returncode == 2
    assert "t.json: super_device_id: version 1.2 needs it, 4 devices lack it" in done.stderr
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("generate", "--topology", "t.yaml", "--version", "1.0"), "addresses are never made up"),
        ((*GENERATE, "--placeholder"), "and not both"),
        (GENERATE[:3] + GENERATE[5:], "--version: device 'cpu' has soc None"),
        ((*GENERATE[:-1], "nowhere"), "--dumps: no folder nowhere"),
        ((*GENERATE, "--out", "no/t.json"), "--out: no folder no"),
        (("generate", "--topology", "950.yaml", "--dumps", "dumps"), "level_list: version 2.0"),
        (("validate", "nowhere.json"), "nowhere.json: cannot be read"),
        (("convert", "t.yaml", "--to", "1.0"), "t.yaml:1: is not JSON"),
    ],
    ids=["no source", "two sources", "no soc", "no dumps", "no parent", "950", "absent", "yaml"],
)
def test_wrong_input_is_one_clear_error(folder, args, says):
    before = files_of(folder)
    done = ranktable(folder, *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(folder) == before
