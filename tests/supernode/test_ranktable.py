import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4_ascend.config.devices import DeviceProfile, device_profile
from v4_ascend.config.topology import Supernode
from v4_ascend.errors import ConfigError, RankTableError
from v4_ascend.supernode.ranktable.conversion import convert
from v4_ascend.supernode.ranktable.dumps import parse_dump
from v4_ascend.supernode.ranktable.file import parse_table, read_table, table_json, write_table
from v4_ascend.supernode.ranktable.generation import (
    generate,
    hosts_from_folder,
    placeholder_hosts,
    version_for,
)
from v4_ascend.supernode.ranktable.model import (
    Address,
    Device,
    Host,
    Level,
    RankTable,
    hosts_of,
)

# The examples of the HCCL user guide: two servers of two devices each, and for 1.2 two
# supernodes of one server.
V1_0 = {
    "status": "completed",
    "version": "1.0",
    "server_count": "2",
    "server_list": [
        {
            "server_id": f"node_{s}",
            "host_ip": f"172.16.0.11{s}",
            "device": [
                {
                    "device_id": str(d),
                    "device_ip": f"192.168.{s + 1}.{d + 8}",
                    "device_port": "16667",
                    "host_port": str(16666 + d),
                    "rank_id": str(2 * s + d),
                }
                for d in range(2)
            ],
        }
        for s in range(2)
    ],
}
V1_2 = {
    "status": "completed",
    "version": "1.2",
    "server_count": "4",
    "server_list": [
        {
            "server_id": f"node_{s}",
            "host_ip": f"172.16.0.10{s}",
            "device": [
                {
                    "device_id": str(d),
                    "super_device_id": str(2 * (s % 2) + d),
                    "device_ip": f"192.168.{s + 1}.{d + 6}",
                    "device_port": "16666",
                    "backup_device_ip": f"192.168.{s + 1}.{7 - d}",
                    "backup_device_port": "16667",
                    "host_port": str(16665 + d),
                    "rank_id": str(2 * s + d),
                }
                for d in range(2)
            ],
        }
        for s in range(4)
    ],
    "super_pod_list": [
        {
            "super_pod_id": str(p),
            "server_list": [{"server_id": f"node_{2 * p}"}, {"server_id": f"node_{2 * p + 1}"}],
        }
        for p in range(2)
    ],
}
V2_0 = {
    "status": "completed",
    "version": "2.0",
    "rank_count": 4,
    "rank_list": [
        {
            "rank_id": 2 * s + d,
            "local_id": d,
            "device_id": d,
            "device_port": 16666 + 2 * s + d,
            "host_port": 60001 + 2 * s + d,
            "level_list": [
                {
                    "net_layer": 0,
                    "net_instance_id": f"az0-rack0-pod{s}",
                    "net_type": "TOPO_FILE_DESC",
                    "net_attr": "",
                    "rank_addr_list": [
                        {"addr_type": "IPV4", "addr": f"172.16.{s}.{10 + 18 * d}", "ports": ["1/0"]}
                    ],
                },
                {
                    "net_layer": 1,
                    "net_instance_id": "az0",
                    "net_type": "CLOS",
                    "net_attr": "",
                    "rank_addr_list": [
                        {
                            "addr_type": "IPV4",
                            "addr": f"172.16.{s}.{15 + 18 * d}",
                            "ports": ["0/4", "0/5", "0/6", "0/7"],
                            "plane_id": "plane0",
                        },
                        {
                            "addr_type": "IPV4",
                            "addr": f"172.16.{s}.{5 + 18 * d}",
                            "ports": ["1/5", "1/6"],
                            "plane_id": "plane1",
                        },
                    ],
                },
            ],
        }
        for s in range(2)
        for d in range(2)
    ],
}
EXAMPLES = {"1.0": V1_0, "1.2": V1_2, "2.0": V2_0}
ABSENT = object()


def steps_of(path):
    return [int(i) if i else key for i, key in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path)]


def planted(version, *changes):
    """The example of a version with values changed at JSON paths."""
    table = copy.deepcopy(EXAMPLES[version])
    for path, value in changes:
        *steps, last = steps_of(path)
        at = table
        for step in steps:
            at = at[step]
        if value is ABSENT:
            del at[last]
        elif isinstance(last, int) and last == len(at):
            at.append(copy.deepcopy(value))
        else:
            at[last] = copy.deepcopy(value)
    return table


def problems_of(table):
    with pytest.raises(RankTableError) as e:
        parse_table(json.dumps(table), "t.json")
    return list(e.value.problems)


@pytest.mark.parametrize("version", EXAMPLES)
def test_the_guides_example_is_written_as_it_was_read(version):
    text = json.dumps(EXAMPLES[version])
    table = parse_table(text, "t.json")
    assert json.loads(table_json(table)) == EXAMPLES[version]
    assert table_json(parse_table(table_json(table), "t.json")) == table_json(table)


def test_a_table_of_1_2_in_one_form():
    table = parse_table(json.dumps(V1_2), "t.json")
    host = table.hosts[3]
    assert (host.name, host.host_ip, host.supernode) == ("node_3", "172.16.0.103", "1")
    assert host.devices[1] == Device(
        rank_id=7,
        device_id=1,
        device_ip="192.168.4.7",
        device_port=16666,
        host_port=16666,
        super_device_id=3,
        backup_device_ip="192.168.4.6",
        backup_device_port=16667,
    )


def test_a_table_of_2_0_in_one_form():
    table = parse_table(json.dumps(V2_0), "t.json")
    assert [(h.name, h.supernode, h.host_ip) for h in table.hosts] == [
        ("az0-rack0-pod0", "az0", None),
        ("az0-rack0-pod1", "az0", None),
    ]
    device = table.hosts[1].devices[0]
    assert (device.rank_id, device.local_id, device.device_id, device.device_ip) == (2, 0, 0, None)
    assert device.levels[1].addresses[1] == Address(
        addr_type="IPV4", addr="172.16.1.5", ports=("1/5", "1/6"), plane_id="plane1"
    )


def test_a_cabinet_on_layer_0_is_as_many_hosts_as_device_ids_start_again():
    changes = [(f"rank_list[{r}].local_id", r) for r in range(4)]
    changes += [(f"rank_list[{r}].level_list[0].net_instance_id", "rack") for r in range(4)]
    table = parse_table(json.dumps(planted("2.0", *changes)), "t.json")
    assert hosts_of(table) == ((("rack/0", "rack/1"),), 2)
    assert [d.rank_id for d in table.hosts[1].devices] == [2, 3]


def test_2_0_with_eids_a_shared_host_nic_and_no_status_is_right():
    eids = [(f"rank_list[{r}].level_list[0].rank_addr_list[0].addr_type", "EID") for r in range(4)]
    eids += [
        (f"rank_list[{r}].level_list[0].rank_addr_list[0].addr", f"{0x100000DFDF0020 + r:032x}")
        for r in range(4)
    ]
    nic = [
        (
            f"rank_list[{r}].level_list[1]",
            {
                "net_layer": 3,
                "net_instance_id": "cluster",
                "net_type": "CLOS",
                "rank_addr_list": [
                    {"addr_type": "IPV6", "addr": f"fd00::{r // 2 + 1}", "ports": ["d2h"]}
                ],
            },
        )
        for r in range(4)
    ]
    given_table = planted("2.0", *eids, *nic, ("status", ABSENT))
    table = parse_table(json.dumps(given_table), "t.json")
    assert json.loads(table_json(table)) == {**given_table, "status": "completed"}
    assert table.supernodes == ()


def test_1_2_without_supernodes_is_server_mode():
    changes = [("super_pod_list", ABSENT), ("server_count", ABSENT)]
    changes += [
        (f"server_list[{s}].device[{d}].super_device_id", ABSENT)
        for s in range(4)
        for d in range(2)
    ]
    table = parse_table(json.dumps(planted("1.2", *changes)), "t.json")
    assert table.supernodes == ()
    assert "super_pod_list" not in json.loads(table_json(table))


def test_device_ip_may_be_absent_in_one_server_and_in_one_supernode():
    one = planted(
        "1.0",
        ("server_list", V1_0["server_list"][:1]),
        ("server_count", "1"),
        ("server_list[0].device[0].device_ip", ABSENT),
    )
    assert parse_table(json.dumps(one), "t.json").devices[0].device_ip is None
    pod = planted(
        "1.2",
        ("server_list", V1_2["server_list"][:2]),
        ("super_pod_list", V1_2["super_pod_list"][:1]),
        ("server_count", "2"),
        ("server_list[1].device[0].device_ip", ABSENT),
    )
    assert parse_table(json.dumps(pod), "t.json").devices[2].device_ip is None


# A rule broken once: version, what is changed, where it is found, what it says.
D, A = "server_list[1].device[1]", "rank_list[3].level_list[1].rank_addr_list[1]"
ADDRESSES = [{"addr_type": "EID", "addr": f"{n:032x}", "ports": [f"0/{n}"]} for n in range(1, 26)]
LEVELS = [
    {
        "net_layer": min(n, 7),
        "net_instance_id": f"i{n}",
        "net_type": "TOPO_FILE_DESC",
        "rank_addr_list": [ADDRESSES[n]],
    }
    for n in range(9)
]
BROKEN = [
    ("1.0", [("status", "initializing")], "status", 'must be "completed", got "initializing"'),
    ("1.0", [("status", "planned")], "status", "a planned table has placeholders"),
    ("1.0", [("status", ABSENT)], "", '"status" is missing'),
    ("1.0", [("version", "1.1")], "version", 'must be "1.0" or "1.2" or "2.0", got "1.1"'),
    ("1.0", [("version", 1.0)], "version", "got 1.0"),
    ("1.0", [("server_count", "3")], "server_count", 'must be "2", .* got "3"'),
    ("1.0", [("server_count", 2)], "server_count", "must be a string of digits.* got 2$"),
    ("1.0", [("server_count", ABSENT)], "", '"server_count" is missing'),
    ("1.0", [("servers", [])], "", 'unknown key "servers"; did you mean'),
    ("1.0", [(f"{D}.super_device_id", "1")], D, 'unknown key "super_device_id"'),
    ("1.0", [("server_list", [])], "server_list", "at least one entry, got \\[\\]"),
    (
        "1.0",
        [
            ("server_list[1]", "node_1"),
            ("server_list[0].device[0].rank_id", "1"),
            ("server_list[0].device[1].rank_id", "0"),
        ],
        "server_list[1]",
        'must be an object, got "node_1"',
    ),
    (
        "1.0",
        [("server_list[1].device", ABSENT), ("server_list[1].host_ip", ABSENT)],
        "server_list[1]",
        '"device" is missing',
    ),
    (
        "1.0",
        [("server_list[1].server_id", "node_0")],
        "server_list[1].server_id",
        r'"node_0" is at server_list\[0\].server_id too',
    ),
    (
        "1.0",
        [("server_list[1].server_id", "n" * 65)],
        "server_list[1].server_id",
        "a string of 1 to 64 characters",
    ),
    (
        "1.0",
        [("server_list[1].host_ip", "fd00::1")],
        "server_list[1].host_ip",
        'must be an IPv4 address, got "fd00::1"',
    ),
    ("1.0", [(f"{D}.device_ip", "192.168.1.300")], f"{D}.device_ip", 'got "192.168.1.300"'),
    ("1.0", [(f"{D}.device_ip", "fe80::1%eth0")], f"{D}.device_ip", "an IPv4 or IPv6 address"),
    ("1.0", [(f"{D}.device_ip", "0.0.0.0")], f"{D}.device_ip", "of one interface"),
    (
        "1.0",
        [(f"{D}.device_ip", "192.168.1.8")],
        f"{D}.device_ip",
        r"is at server_list\[0\].device\[0\].device_ip too",
    ),
    (
        "1.0",
        [(f"{D}.device_ip", "fd00::1"), ("server_list[0].device[0].device_ip", "fd00:0::1")],
        f"{D}.device_ip",
        '"fd00::1" is at',
    ),
    (
        "1.0",
        [(f"{D}.device_ip", ABSENT)],
        f"{D}.device_ip",
        r"required with more than one server \(2\)",
    ),
    ("1.0", [(f"{D}.device_port", "1023")], f"{D}.device_port", 'from "1024" to "65535", got'),
    ("1.0", [(f"{D}.device_port", "65536")], f"{D}.device_port", 'got "65536"'),
    ("1.0", [(f"{D}.host_port", "16666")], f"{D}.host_port", "host_port 16666 is at"),
    ("1.0", [(f"{D}.rank_id", "03")], f"{D}.rank_id", 'string of digits.* got "03"'),
    ("1.0", [(f"{D}.rank_id", 3)], f"{D}.rank_id", "string of digits.* got 3$"),
    ("1.0", [(f"{D}.rank_id", "2")], f"{D}.rank_id", "rank_id 2 is at"),
    (
        "1.0",
        [("server_list[1].device[0].rank_id", "3"), (f"{D}.rank_id", "4")],
        f"{D}.rank_id",
        'must be below 4, the number of devices, got "4"',
    ),
    ("1.0", [(f"{D}.device_id", "0")], f"{D}.device_id", "device_id 0 is at"),
    ("1.0", [(f"{D}.device_id", ABSENT)], D, '"device_id" is missing'),
    (
        "1.2",
        [("server_list[3].device[0].super_device_id", "1")],
        "server_list[3].device[0].super_device_id",
        "super_device_id 1 is at server_list.2.* unique",
    ),
    ("1.2", [(f"{D}.super_device_id", ABSENT)], D, '"super_device_id" is missing; super_pod_list'),
    (
        "1.2",
        [
            (f"{D}.device_ip", ABSENT),
            ("server_list[1].device[0].backup_device_ip", ABSENT),
            ("server_list[1].device[0].backup_device_port", ABSENT),
        ],
        f"{D}.device_ip",
        r"required with more than one supernode \(2\)",
    ),
    (
        "1.2",
        [(f"{D}.backup_device_ip", "192.168.1.6")],
        f"{D}.backup_device_ip",
        r"is of server_list\[0\].device\[0\]; it must be of the other die",
    ),
    ("1.2", [(f"{D}.backup_device_ip", "192.168.2.7")], f"{D}.backup_device_ip", "other die"),
    (
        "1.2",
        [(f"{D}.backup_device_port", "16666")],
        f"{D}.backup_device_port",
        r"16666 is the device_port of server_list\[1\].device\[0\]",
    ),
    ("1.2", [(f"{D}.backup_device_ip", ABSENT)], f"{D}.backup_device_port", "needs a backup"),
    (
        "1.2",
        [
            ("super_pod_list[1].super_pod_id", "0"),
            ("super_pod_list[1].server_list", V1_2["super_pod_list"][1]["server_list"]),
            ("server_list[2].device[0].super_device_id", "8"),
            ("server_list[2].device[1].super_device_id", "9"),
            ("server_list[3].device[0].super_device_id", "10"),
            ("server_list[3].device[1].super_device_id", "11"),
        ],
        "super_pod_list[1].super_pod_id",
        'super_pod_id "0" is at',
    ),
    (
        "1.2",
        [("super_pod_list[1].server_list[2]", {"server_id": "node_9"})],
        "super_pod_list[1].server_list[2].server_id",
        '"node_9" is not in server_list',
    ),
    (
        "1.2",
        [("super_pod_list[1].server_list[1]", ABSENT)],
        "server_list[3].server_id",
        '"node_3" is in no supernode',
    ),
    (
        "1.2",
        [("super_pod_list[1].server_list[2]", {"server_id": "node_1"})],
        "super_pod_list[1].server_list[2].server_id",
        '"node_1" is at',
    ),
    ("2.0", [("rank_count", 5)], "rank_count", "must be 4, the ranks in rank_list, got 5"),
    ("2.0", [("rank_count", 65537)], "rank_count", "an integer from 1 to 65536"),
    ("2.0", [("rank_count", "4")], "rank_count", 'an integer .* got "4"'),
    ("2.0", [("rank_list[3].rank_id", True)], "rank_list[3].rank_id", "integer .* got true"),
    ("2.0", [("rank_list[3].rank_id", 0)], "rank_list[3].rank_id", "rank_id 0 is at"),
    ("2.0", [("rank_list[3].rank_id", 4)], "rank_list[3].rank_id", "must be below 4"),
    ("2.0", [("rank_list[3].local_id", 65)], "rank_list[3].local_id", "from 0 to 64, got 65"),
    ("2.0", [("rank_list[3].local_id", 0)], "rank_list[3].local_id", "local_id 0 is at"),
    ("2.0", [("rank_list[3].device_port", 80)], "rank_list[3].device_port", "got 80"),
    ("2.0", [("rank_list[3].server", "a")], "rank_list[3]", 'unknown key "server"'),
    (
        "2.0",
        [
            ("rank_list[3].level_list[1].net_layer", 0),
            ("rank_list[3].level_list[1].net_type", "TOPO_FILE_DESC"),
        ],
        "rank_list[3].level_list[1].net_layer",
        "must be above 0, the level before it, got 0",
    ),
    (
        "2.0",
        [("rank_list[3].level_list[0].net_layer", 1), ("rank_list[3].level_list[1].net_layer", 2)],
        "rank_list[3].level_list[0].net_layer",
        "must be 0 in the first level, got 1",
    ),
    (
        "2.0",
        [("rank_list[3].level_list[1].net_layer", 8)],
        "rank_list[3].level_list[1].net_layer",
        "from 0 to 7, got 8",
    ),
    (
        "2.0",
        [("rank_list[3].level_list[0].net_type", "CLOS")],
        "rank_list[3].level_list[0].net_type",
        'on layer 0, got "CLOS"',
    ),
    (
        "2.0",
        [("rank_list[3].level_list[1].net_type", "MESH")],
        "rank_list[3].level_list[1].net_type",
        'must be "TOPO_FILE_DESC" or "CLOS", got "MESH"',
    ),
    (
        "2.0",
        [("rank_list[3].level_list[1].rank_addr_list", ADDRESSES)],
        "rank_list[3].level_list[1].rank_addr_list",
        "at most 24 addresses, got 25",
    ),
    ("2.0", [(f"{A}.addr_type", "IPv4")], f"{A}.addr_type", '"EID" or "IPV4" or "IPV6"'),
    ("2.0", [(f"{A}.addr_type", "EID")], f"{A}.addr", "32 hexadecimal digits"),
    ("2.0", [(f"{A}.addr_type", "IPV6")], f"{A}.addr", 'an IPv6 address, got "172.16.1.23"'),
    ("2.0", [(f"{A}.addr", "172.16.0.10")], f"{A}.addr", 'addr "172.16.0.10" is at rank_list.0'),
    ("2.0", [(f"{A}.addr", "172.16.1.33")], f"{A}.addr", 'addr "172.16.1.33" is at rank_list.3'),
    ("2.0", [(f"{A}.ports", ["0/7"])], f"{A}.ports", 'port "0/7" is at'),
    ("2.0", [(f"{A}.ports", ["die1"])], f"{A}.ports", 'each "die/port" or "d2h", got'),
    ("2.0", [(f"{A}.ports", [])], f"{A}.ports", "1 to 16 ports"),
    ("2.0", [(f"{A}.ports", [f"1/{p}" for p in range(8, 18)])], f"{A}.ports", "32 characters"),
]
# Rules that one change breaks at several places.
ALL_PROBLEMS = {
    "ranks cross servers": (
        planted(
            "1.0",
            ("server_list[0].device[1].rank_id", "2"),
            ("server_list[1].device[0].rank_id", "1"),
        ),
        ["server_list[0].device: ranks 0, 2 are not contiguous", "server_list[1].device: ranks"],
    ),
    "servers of a supernode apart": (
        planted("1.2", ("server_list", [V1_2["server_list"][i] for i in (0, 2, 1, 3)])),
        [
            'server_list[2].server_id: "node_1" is of supernode "0", whose other servers end at '
            "server_list[0]; list them together",
            'server_list[3].server_id: "node_3" is of supernode "1"',
        ],
    ),
    "nine levels": (
        planted("2.0", ("rank_list[3].level_list", LEVELS)),
        [
            "rank_list[3].level_list: must have at most 8 levels, got 9",
            "rank_list[3].level_list[8].net_layer: must be above 7",
        ],
    ),
    "SDIDs without supernodes": (
        planted(
            "1.2",
            ("super_pod_list", ABSENT),
            ("server_list", V1_2["server_list"][:1]),
            ("server_count", "1"),
        ),
        [f"server_list[0].device[{d}].super_device_id: needs a super_pod_list" for d in (0, 1)],
    ),
}


@pytest.mark.parametrize(
    ("version", "changes", "where", "says"),
    [pytest.param(*b, id=f"{b[0]} {b[2]}: {b[3][:30]}") for b in BROKEN],
)
def test_a_broken_rule_is_refused_at_its_place(version, changes, where, says):
    (problem,) = problems_of(planted(version, *changes))
    place = re.escape(f"t.json: {where}: " if where else "t.json: ")
    assert re.match(f"{place}.*{says}|{place}{says}", problem), problem
    assert "\n" not in problem


@pytest.mark.parametrize("name", ALL_PROBLEMS)
def test_a_rule_that_more_than_one_entry_breaks(name):
    table, expected = ALL_PROBLEMS[name]
    found = problems_of(table)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"t.json: {start}")


def test_all_problems_are_reported_together():
    table = planted(
        "1.2",
        ("server_list[0].device[0].device_port", "80"),
        ("server_list[1].device[0].device_ip", "192.168.3.6"),
        ("server_list[3].rack", "7"),
    )
    table["server_list"][1]["device"][1].pop("backup_device_ip")
    assert [p.split(": ")[1] for p in problems_of(table)] == [
        "server_list[3]",
        "server_list[0].device[0].device_port",
        "server_list[2].device[0].device_ip",
        "server_list[1].device[1].backup_device_port",
    ]


def test_a_key_given_twice_is_refused():
    text = json.dumps(V1_0).replace('"rank_id": "3"', '"rank_id": "2", "rank_id": "3"')
    with pytest.raises(RankTableError, match=r"server_list\[1\].device\[1\].rank_id: .* twice"):
        parse_table(text, "t.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "status": "completed",\n}', r"^t.json:3: is not JSON: "),
        ("", "^t.json:1: is not JSON: "),
        ('{\n"rank_count": NaN}', "^t.json:2: is not JSON: NaN"),
        ("[" * 100_000, "^t.json:1: is not JSON"),
        ("[]", r"^t.json: must be an object, got \[\]"),
        ("{}", "^t.json: version: must be .* got null"),
    ],
    ids=["comma", "empty", "NaN", "deep", "list", "no version"],
)
def test_what_is_no_table_is_refused_with_its_line(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_table(text, "t.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read: No such file"), (b"\xff", "is not UTF-8 text")],
    ids=["absent", "bytes"],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_path(content, says, tmp_path):
    file = tmp_path / "t.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: {says}"):
        read_table(file)


def test_a_file_larger_than_hccl_reads_is_refused_unread(tmp_path):
    file = tmp_path / "t.json"
    with file.open("wb") as f:
        f.truncate((1 << 30) + 1)
    with pytest.raises(ConfigError, match="has 1073741825 bytes"):
        read_table(file)


def test_a_table_replaces_the_file_before_and_needs_its_folder(tmp_path):
    table = parse_table(json.dumps(V1_0), "t.json")
    file = tmp_path / "t.json"
    file.write_text("older")
    write_table(table, file)
    assert read_table(file) == table
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ConfigError, match="--out: no folder"):
        write_table(table, tmp_path / "no" / "t.json")
    assert list(tmp_path.iterdir()) == [file]


def test_writing_over_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "t.json").mkdir()
    with pytest.raises(ConfigError, match="--out: cannot write"):
        write_table(parse_table(json.dumps(V1_0), "t.json"), tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "t.json"]


PORT = st.none() | st.integers(1024, 65535)
NAME = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=64)


@st.composite
def tables(draw, version):
    n_hosts, n_devices = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    names = draw(st.lists(NAME, min_size=n_hosts, max_size=n_hosts, unique=True))
    order = draw(st.permutations(range(n_hosts)))
    has_supernodes = version == "1.2" and draw(st.booleans())
    split = draw(st.integers(1, n_hosts))
    hosts = []
    for h, name in enumerate(names):
        devices = []
        for d in range(n_devices):
            n = order[h] * n_devices + d
            facts = {"rank_id": n, "device_id": d, "device_port": draw(PORT)}
            if version == "2.0":
                facts |= {"host_port": draw(PORT), "local_id": d}
                facts["levels"] = draw(levels(name, n))
            else:
                facts["device_ip"] = draw(st.sampled_from([f"10.0.0.{n + 1}", f"fd00::{n + 1:x}"]))
                facts["host_port"] = 2000 + d if draw(st.booleans()) else None
            if has_supernodes:
                facts["super_device_id"] = n * 7
            if version == "1.2" and draw(st.booleans()):
                facts |= {"backup_device_ip": f"10.9.0.{n + 1}", "backup_device_port": draw(PORT)}
            devices.append(Device(**facts))
        has_host_ip = version != "2.0" and draw(st.booleans())
        hosts.append(
            Host(
                name=name,
                host_ip=f"10.1.0.{h}" if has_host_ip else None,
                supernode=("a" if h < split else "b") if has_supernodes else None,
                devices=tuple(devices),
            )
        )
    if version == "2.0":  # a 2.0 table lists ranks, and so hosts, in their order
        hosts = [
            h.model_copy(update={"supernode": h.devices[0].levels[1].net_instance_id})
            if len(h.devices[0].levels) > 1
            else h
            for h in sorted(hosts, key=lambda h: h.devices[0].rank_id)
        ]
    status = draw(st.sampled_from(["completed", "planned"]))
    return RankTable(version=version, status=status, hosts=tuple(hosts))


@st.composite
def levels(draw, instance, n):
    def address(layer):
        plane = draw(st.none() | st.just("plane0"))
        ports = (f"{layer}/{n}", "0/31")
        kind = draw(st.sampled_from(["EID", "IPV4", "IPV6"]))
        addr = {"EID": f"{n:030x}{layer:02x}", "IPV4": f"10.{layer}.0.{n}", "IPV6": f"fd00::{n}"}
        return Address(addr_type=kind, addr=addr[kind], ports=ports, plane_id=plane)

    attr = draw(st.none() | st.just("x"))
    inner = Level(
        net_layer=0,
        net_instance_id=instance,
        net_type="TOPO_FILE_DESC",
        net_attr=attr,
        addresses=(address(0),),
    )
    outer = Level(net_layer=1, net_instance_id="pod", net_type="CLOS", addresses=(address(1),))
    return (inner, outer)


@pytest.mark.parametrize("version", EXAMPLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_table_survives_writing_and_reading(version, data):
    table = data.draw(tables(version))
    assert parse_table(table_json(table), "t.json", allow_planned=True) == table


MAPPING = {
    "A2": "NPU ID                         Chip ID                        Chip Logic ID"
    "                  Chip Name\n",
    "A3": "NPU ID                         Chip ID                        Chip Logic ID"
    "                  Chip Phy-ID                    Chip Name\n",
    "950": "NPU ID                         Slot ID                        Chip ID"
    "                        Chip Phy-ID                    Chip Name\n",
}
ROW = {"A2": "{0} 0 {0} 910B3\n{0} 1 - Mcu\n", "950": "{0} {0} 0 {0} Ascend950DT\n"}
FRAME = "+--------+--------+--------+----------+-------------+------------+\n"
PORTS = (
    FRAME
    + "| UdieID | PortID | Speed  | PortType | Link Status | Media Type |\n"
    + FRAME
    + "| 0      | 4      | 200    | UB       | UP          | Optical    |\n"
    + "| 0      | 5      | 200    | UB       | UP          | Optical    |\n"
    + "| 1      | 0      | 200    | ETH      | DOWN        | Electrical |\n"
    + FRAME
)


def a2_dump(subnet=1, n=8):
    text = "$ npu-smi info -m\n" + MAPPING["A2"] + "".join(ROW["A2"].format(d) for d in range(n))
    for d in range(n):
        text += f"\n$ hccn_tool -i {d} -ip -g\nipaddr:192.168.{subnet}.{d + 1}\n"
        text += "netmask:255.255.255.0\n"
    return text


def a3_dump(pod=0, server=40, n=4):
    """As `set -x` writes it, with the full path of the tools."""
    rows = "".join(f"{d // 2} {d % 2} {d} {d} Ascend910\n" for d in range(n))
    text = "+ /usr/local/bin/npu-smi info -m\n" + MAPPING["A3"] + rows
    for d in range(n):
        text += f"+ npu-smi info -t spod-info -i {d // 2} -c {d % 2}\n"
        text += f"\tSDID                           : {167772160 + 16 * server + d}\n"
        text += f"\tSuper Pod Size : 384\n\tSuper Pod ID : {pod}\n\tServer Index : {server}\n"
        text += f"+ hccn_tool -i {d} -ip -g\nipaddr:10.{pod}.{server}.{d + 1}\nnetmask:255.0.0.0\n"
    return text


def a5_dump(n=2):
    text = "npu-smi info -m\n" + MAPPING["950"] + "".join(ROW["950"].format(d) for d in range(n))
    for d in range(n):
        text += f"hccn_tool -g -dev_info -i {d}\n{PORTS}"
    return text


DUMPS = {"A2": a2_dump, "A3": a3_dump, "950": a5_dump}


def test_a_dump_of_a2():
    dump = parse_dump(a2_dump(), "h.txt", "h")
    assert (dump.generation, dump.host.name, dump.host.supernode) == ("A2", "h", None)
    assert [d.device_id for d in dump.host.devices] == list(range(8))
    assert dump.host.devices[7].device_ip == "192.168.1.8"


def test_a_dump_of_a3():
    dump = parse_dump(a3_dump(), "h.txt", "h")
    assert (dump.generation, dump.host.supernode) == ("A3", "0")
    last = dump.host.devices[3]
    assert (last.device_id, last.device_ip, last.super_device_id) == (3, "10.0.40.4", 167772803)


def test_a_dump_of_950_says_ports_and_no_addresses():
    dump = parse_dump(a5_dump(), "h.txt", "h")
    assert (dump.generation, len(dump.host.devices)) == ("950", 2)
    assert dump.ports[1] == {"0/4": True, "0/5": True, "1/0": False}
    assert dump.host.devices[1].levels == ()


def test_output_of_other_commands_is_passed_over():
    text = "$ hostname\nnode-1\n" + a2_dump() + "$ hccn_tool -i 0 -link -g\nlink status: UP\n"
    assert parse_dump(text, "h.txt", "h") == parse_dump(a2_dump(), "h.txt", "h")


def without_last(text, n_lines):
    return "\n".join(text.splitlines()[:-n_lines]) + "\n"


WRONG_DUMPS = [
    ("no command", "NPU ID\n0\n", 1, "no output of `npu-smi info -m`"),
    ("cut in a pair", without_last(a2_dump(), 1), 48, "must print 'netmask'; is it cut"),
    ("cut after a command", without_last(a2_dump(), 2), 48, "printed nothing; is it cut"),
    ("cut between commands", without_last(a2_dump(), 3), 44, "not for device 7"),
    ("cut in the mapping", a3_dump().replace("1 1 3 3 Ascend910\n", ""), 5, "not chip 1"),
    ("cut in a table", without_last(a5_dump(), 1), 19, "frame; is it cut"),
    ("cut in a row", a5_dump().replace("1 1 0 1 Ascend950DT", "1 1 0"), 4, "5 columns"),
    ("empty mapping", "$ npu-smi info -m\n" + MAPPING["A2"], 1, "no devices; is it cut"),
    ("two hosts", a2_dump() + a2_dump(2), 51, "comes a second time; a dump is of one host"),
    ("two chips", a2_dump().replace("7 0 7 910B3", "7 0 7 Ascend950DT"), 17, "beside 910B3"),
    ("another chip", a2_dump().replace("910B3", "310P"), 3, "'310P' is no Ascend910B"),
    ("A3 in A2", a2_dump() + "$ npu-smi info -t spod-info -i 0 -c 0\nSDID : 1\n", 51, "on A2"),
    ("950 in A2", a2_dump() + "$ hccn_tool -g -dev_info -i 0\n", 51, "not asked on A2"),
    ("A2 in 950", a5_dump() + "$ hccn_tool -i 0 -ip -g\n", 21, "not asked on 950"),
    ("a device twice", a2_dump().replace("-i 7", "-i 6"), 48, "a second time for device 6"),
    ("a device more", a2_dump().replace("-i 7", "-i 9"), 48, "of no device"),
    ("a row twice", a2_dump().replace("7 0 7", "6 0 6"), 17, "device 6 .* a second time"),
    ("two pairs", a2_dump() + "ipaddr:10.0.0.1\n", 51, "'ipaddr' comes a second time"),
    ("an error", a2_dump().replace("netmask:", "error "), 22, "must print key: value"),
    ("no address", a2_dump().replace("192.168.1.8", "none"), 49, "ipaddr must be an IPv4"),
    (
        "two places",
        a3_dump().replace("Server Index : 40", "Server Index : 41", 1),
        15,
        "are 0, 40 and were 0, 41",
    ),
    ("an SDID twice", a3_dump().replace("167772801", "167772800"), 15, "SDID 167772800 comes"),
    ("no SDID", a3_dump().replace("167772800", "N/A"), 8, "SDID must be a number"),
    ("no link", a5_dump().replace("DOWN", "-", 1), 11, "UP or DOWN"),
    ("no number", a2_dump().replace("-i 7", "-i all"), 48, "must have -i with a number"),
    ("no column", a2_dump().replace("Chip Logic ID", "Logic"), 2, "a column 'Chip Logic ID'"),
    ("a quote", a2_dump() + '$ npu-smi "\n', 51, "is no command"),
]


@pytest.mark.parametrize(
    ("text", "line", "says"), [pytest.param(*w[1:], id=w[0]) for w in WRONG_DUMPS]
)
def test_a_dump_that_is_cut_or_mixed_is_refused_with_its_line(text, line, says):
    with pytest.raises(ConfigError, match=f"^h.txt:{line}: .*{says}"):
        parse_dump(text, "h.txt", "h")


def supernode(name, *hosts, n=8):
    return Supernode(name=name, hosts=hosts, devices_per_host=n)


def folder_of(tmp_path, **dumps):
    for name, text in dumps.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def test_a_table_from_dumps_of_a2_numbers_ranks_over_hosts(tmp_path):
    folder = folder_of(tmp_path, a=a2_dump(1), b=a2_dump(2))
    hosts = hosts_from_folder([supernode("x", "b"), supernode("y", "a")], folder, "f.yaml:3")
    table = generate(hosts, "1.0")
    assert (table.version, table.status) == ("1.0", "completed")
    assert [h.name for h in table.hosts] == ["b", "a"]
    assert [d.rank_id for d in table.devices] == list(range(16))
    assert table.devices[8].device_ip == "192.168.1.1"


def test_a_table_from_dumps_of_a3_has_the_topologys_supernodes(tmp_path):
    folder = folder_of(tmp_path, a=a3_dump(0, 1), b=a3_dump(0, 2), c=a3_dump(1, 1))
    pods = [supernode("x", "a", "b", n=4), supernode("y", "c", n=4)]
    table = generate(hosts_from_folder(pods, folder, "f.yaml:3"), "1.2")
    assert hosts_of(table) == ((("a", "b"), ("c",)), 4)
    assert parse_table(table_json(table), "t.json") == table


def one_host_of_2_0():
    """Ports that are up in a dump of 950."""
    table = {**V2_0, "rank_list": copy.deepcopy(V2_0["rank_list"][:2]), "rank_count": 2}
    for rank in table["rank_list"]:
        rank["level_list"][0]["rank_addr_list"][0]["ports"] = ["0/5"]
        rank["level_list"][1]["rank_addr_list"] = rank["level_list"][1]["rank_addr_list"][:1]
        rank["level_list"][1]["rank_addr_list"][0]["ports"] = ["0/4"]
    return table


def test_a_table_of_2_0_takes_addresses_from_the_hosts_own_table(tmp_path):
    folder = folder_of(tmp_path, a=a5_dump())
    (folder / "a.json").write_text(json.dumps(one_host_of_2_0()))
    table = generate(hosts_from_folder([supernode("x", "a", n=2)], folder, "f.yaml:3"), "2.0")
    assert json.loads(table_json(table)) == one_host_of_2_0()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"0/5": ["1/0"]}, "device 0: port 1/0 is down in .*a.txt"),
        ({"0/5": ["1/9"]}, "device 0: port 1/9 is absent in .*a.txt"),
    ],
    ids=["down", "absent"],
)
def test_ports_that_the_dump_does_not_show_up_are_refused(changes, says, tmp_path):
    folder = folder_of(tmp_path, a=a5_dump())
    text = json.dumps(one_host_of_2_0())
    for port, ports in changes.items():
        text = text.replace(json.dumps([port]), json.dumps(ports))
    (folder / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        hosts_from_folder([supernode("x", "a", n=2)], folder, "f.yaml:3")


def table_of_one_server(**changes):
    table = planted("1.0", ("server_list", V1_0["server_list"][:1]), ("server_count", "1"))
    table["server_list"][0]["device"][0] |= changes
    return json.dumps(table)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (table_of_one_server(), "device 0: device_ip is 192.168.1.8, in .*a.txt 192.168.1.1"),
        (table_of_one_server(device_id="5"), r"has not the devices of .*a.txt: \[0, 1\]"),
        (json.dumps(V1_0), "must be a table of one host, has node_0, node_1"),
    ],
    ids=["address", "devices", "two hosts"],
)
def test_a_hosts_table_that_its_dump_contradicts_is_refused(table, says, tmp_path):
    folder = folder_of(tmp_path, a=a2_dump(n=2))
    (folder / "a.json").write_text(table)
    with pytest.raises(ConfigError, match=says):
        hosts_from_folder([supernode("x", "a", n=2)], folder, "f.yaml:3")


@pytest.mark.parametrize(
    ("supernodes", "says"),
    [
        ([Supernode(name="x", host_count=2)], "^f.yaml:3: supernode 'x' has host_count"),
        ([supernode("x", "z")], "has no z.txt or z.json"),
        ([supernode("x", "a", n=16)], "'a' has 4 devices, the topology says devices_per_host 16"),
        ([supernode("x", "a", "c", n=4)], "'c' is in supernode '1', 'a' in '0'"),
    ],
    ids=["unnamed", "no file", "devices", "two physical supernodes"],
)
def test_hosts_that_do_not_fit_the_topology_are_refused(supernodes, says, tmp_path):
    folder = folder_of(tmp_path, a=a3_dump(0), c=a3_dump(1))
    with pytest.raises(ConfigError, match=says):
        hosts_from_folder(supernodes, folder, "f.yaml:3")


@pytest.mark.parametrize(
    ("generation", "version", "says"),
    [
        ("A2", "1.2", "super_device_id: version 1.2 needs it, 8 devices lack it"),
        ("A2", "2.0", "level_list: version 2.0 needs it, 8 devices lack it"),
        ("950", "2.0", "the first is device 0 of 'a'; a 2.0 table of the host has it"),
    ],
)
def test_what_a_dump_does_not_say_is_not_made_up(generation, version, says):
    dump = parse_dump(DUMPS[generation](), "a.txt", "a")
    with pytest.raises(RankTableError, match=says):
        generate([dump.host], version)


def test_two_supernodes_need_device_ips_and_one_does_not(tmp_path):
    no_ips = [re.sub(r"\+ hccn_tool .*\nipaddr.*\nnetmask.*\n", "", a3_dump(p)) for p in (0, 1)]
    folder = folder_of(tmp_path, a=no_ips[0], b=no_ips[1])
    pods = [supernode("x", "a", n=4), supernode("y", "b", n=4)]
    assert len(generate(hosts_from_folder(pods[:1], folder, "f.yaml:3"), "1.2").devices) == 4
    with pytest.raises(RankTableError, match="device_ip: version 1.2 needs it, 8 devices lack it"):
        generate(hosts_from_folder(pods, folder, "f.yaml:3"), "1.2")


def test_the_same_dump_for_two_hosts_is_refused_by_its_addresses():
    hosts = [parse_dump(a2_dump(), f"{n}.txt", n).host for n in "ab"]
    with pytest.raises(RankTableError, match="generated table: server_list.1.*device_ip .* unique"):
        generate(hosts, "1.0")


@pytest.mark.parametrize("version", EXAMPLES)
def test_placeholders_are_documentation_addresses_and_hccl_must_not_read_them(version):
    pods = [Supernode(name="p", host_count=60, devices_per_host=16), supernode("q", "h", n=16)]
    table = generate(placeholder_hosts(pods, version), version, "planned")
    assert table == generate(placeholder_hosts(pods, version), version, "planned")
    assert len(table.devices) == 61 * 16
    text = table_json(table)
    documented = re.compile(r"192\.0\.2\.|198\.51\.100\.|203\.0\.113\.|2001:db8::")
    addresses = re.findall(r'"(?:addr|device_ip)": "([^"]+)"', text)
    assert len(addresses) == 61 * 16 * (2 if version == "2.0" else 1)
    assert all(documented.match(a) for a in addresses)
    assert addresses[0] == "192.0.2.1"
    with pytest.raises(RankTableError, match="status: .* generate one from dumps"):
        parse_table(text, "t.json")


@pytest.mark.parametrize(
    ("soc", "version"),
    [("Ascend910B3", "1.0"), ("Ascend910_9391", "1.2"), ("Ascend950DT_9582", "2.0")],
)
def test_each_soc_reads_a_version(soc, version):
    cpu = device_profile("cpu", "here").model_dump()
    assert version_for(DeviceProfile(**(cpu | {"soc": soc}))) == version


def test_a_device_that_is_no_ascend_has_no_version():
    with pytest.raises(ConfigError, match="--version: device 'nvidia-h200' has soc 'sm_90'"):
        version_for(device_profile("nvidia-h200", "here"))


def test_1_2_to_1_0_says_what_is_lost():
    table = parse_table(json.dumps(V1_2), "t.json")
    converted, lost = convert(table, "1.0")
    assert lost == [
        "super_device_id of 8 devices",
        "backup_device_ip of 8 devices",
        "backup_device_port of 8 devices",
        "supernode of 4 hosts",
    ]
    assert parse_table(table_json(converted), "t.json") == converted
    assert [d.device_ip for d in converted.devices] == [d.device_ip for d in table.devices]


def test_2_0_of_one_host_to_1_0_loses_every_address():
    table = parse_table(json.dumps(one_host_of_2_0()), "t.json")
    converted, lost = convert(table, "1.0")
    assert lost == ["local_id of 2 devices", "level_list of 2 devices", "supernode of 1 host"]
    assert converted.devices[1] == Device(
        rank_id=1, device_id=1, device_port=16667, host_port=60002
    )


@pytest.mark.parametrize(
    ("version", "to", "says"),
    [
        ("1.0", "1.2", ["super_device_id", "super_pod_list"]),
        ("1.0", "2.0", ["local_id", "level_list"]),
        ("1.2", "2.0", ["local_id", "level_list"]),
        ("2.0", "1.0", ["device_ip"]),
        ("2.0", "1.2", ["super_device_id"]),
    ],
)
def test_facts_a_version_needs_and_the_table_lacks_are_refused(version, to, says):
    with pytest.raises(RankTableError) as e:
        convert(parse_table(json.dumps(EXAMPLES[version]), "t.json"), to, "t.json")
    assert [p.split(": ")[:2] for p in e.value.problems] == [["t.json", s] for s in says]


@pytest.mark.parametrize("version", EXAMPLES)
def test_a_version_to_itself_changes_nothing(version):
    table = parse_table(json.dumps(EXAMPLES[version]), "t.json")
    assert convert(table, version) == (table, [])


def test_a_planned_table_stays_planned_when_converted():
    hosts = placeholder_hosts([supernode("x", "a", "b", n=2)], "1.2")
    converted, _ = convert(generate(hosts, "1.2", "planned"), "1.0")
    assert converted.status == "planned"


def test_hosts_of_a_table_fill_in_a_topology():
    of_1_2 = hosts_of(parse_table(json.dumps(V1_2), "t.json"))
    assert of_1_2 == ((("node_0", "node_1"), ("node_2", "node_3")), 2)
    assert hosts_of(parse_table(json.dumps(V1_0), "t.json")) == ((("node_0",), ("node_1",)), 2)
    pods = tuple(
        Supernode(name=str(i), hosts=names, devices_per_host=of_1_2[1])
        for i, names in enumerate(of_1_2[0])
    )
    assert sum(p.n_devices for p in pods) == 8


def test_hosts_of_different_sizes_are_no_topology():
    table = planted("1.0", ("server_list[1].device[1]", ABSENT))
    with pytest.raises(ConfigError, match="'node_1' has 1 devices, 'node_0' has 2"):
        hosts_of(parse_table(json.dumps(table), "t.json"))
