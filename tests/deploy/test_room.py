"""Room beside what runs: idle devices first, then memory; a host that says nothing has none."""

import msgspec
import recorded_hosts
from recorded_hosts import GB

from v4_ascend.config.model import ModelConfig
from v4_ascend.config.presets import preset_path
from v4_ascend.config.topology import load_topology
from v4_ascend.deploy.doctor.facts import Output
from v4_ascend.deploy.doctor.gathering import GPU_QUERY
from v4_ascend.deploy.room import elsewhere, find_room, needed
from v4_ascend.supernode.planning import deploy_pool


def planned(*overrides, topology="laptop", preset="tiny"):
    return deploy_pool(load_topology(topology, overrides), ModelConfig.read(preset_path(preset)))


def a_host(free, **files):
    base = recorded_hosts._facts()
    memory = {"/proc/meminfo": f"MemAvailable: {free // 1024} kB\n"}
    return msgspec.structs.replace(base, files=memory | files)


def test_on_a_cpu_the_host_s_free_memory_decides():
    plan, pool = planned()
    (n,) = needed(pool, plan)
    assert n > 0.5 * GB  # a process with torch, before anything else
    enough = n + (301 << 20)
    room = find_room(pool, plan, plan, {"localhost": a_host(enough)})
    assert (room.is_enough, room.plan, room.shares_devices) == (True, plan, True)
    room = find_room(pool, plan, plan, {"localhost": a_host(n)})
    assert not room.is_enough
    assert room.why.startswith(f"localhost has {n / 1e9:.1f} GB free, ")
    assert room.why.endswith("are needed (modelled)")


def test_a_container_s_limit_counts_and_a_silent_host_has_no_room():
    plan, pool = planned()
    limited = a_host(100 * GB, **{"/sys/fs/cgroup/memory.max": f"{GB // 2}\n"})
    assert "localhost has 0.5 GB free" in find_room(pool, plan, plan, {"localhost": limited}).why
    assert "localhost has 0.0 GB free" in find_room(pool, plan, plan, {"localhost": None}).why


def test_caches_count_with_all_they_may_hold():
    plan, pool = planned()
    more, larger = planned("serve.concurrency=64")
    (a,), (b,) = needed(pool, plan), needed(larger, more)
    per_block = pool.chosen.memory[0].per_block
    assert b - a >= per_block * 60 * 2048 // 128
    few, small = planned("serve.cache_tokens=2048")
    assert needed(small, few)[0] < a


DIES = "{device: ascend-a3-64, supernodes: [{name: s, hosts: [h], devices_per_host: 16}]}"
H200 = "{device: nvidia-h200, supernodes: [{name: s, hosts: [h], devices_per_host: 1}]}"


def test_idle_devices_come_first():
    layout = "layout={dp_size: 4, ep_size: 4}"
    plan, pool = planned(f"cluster={DIES}", layout, "model.weight_format=bf16")
    beside = elsewhere(plan, plan, 16)
    assert [r.device for r in beside.ranks] == [4, 5, 6, 7]
    assert [r.device for r in elsewhere(plan, beside, 16).ranks] == [0, 1, 2, 3]
    assert elsewhere(plan, plan, 7) is None
    room = find_room(pool, plan, plan, {"h": recorded_hosts.a3()})
    assert (room.is_enough, room.why, room.shares_devices) == (True, "devices are idle", False)
    assert [r.device for r in room.plan.ranks] == [4, 5, 6, 7]


def test_without_idle_ones_the_memory_of_the_devices_decides():
    plan, pool = planned(f"cluster={H200}", "serve.cache_tokens=4096")
    (n,) = needed(pool, plan)
    base = recorded_hosts.gpu()

    def with_free(mb):
        cells = ["0", "NVIDIA H200", "575.57.08", "143771", str(143771 - mb), "0"]
        return msgspec.structs.replace(base, commands={GPU_QUERY: Output(0, ", ".join(cells))})

    room = find_room(pool, plan, plan, {"h": with_free(n // (1 << 20) + 1)})
    assert (room.is_enough, room.plan, room.shares_devices) == (True, plan, True)
    room = find_room(pool, plan, plan, {"h": with_free(1000)})
    assert not room.is_enough
    assert room.why.startswith("device 0 of h has 1.0 GB free, ")
    silent = msgspec.structs.replace(base, commands={})
    assert "device 0 of h has 0.0 GB free" in find_room(pool, plan, plan, {"h": silent}).why


def test_caches_that_take_what_is_left_leave_no_room():
    plan, pool = planned(f"cluster={H200}")
    assert needed(pool, plan)[0] > 0.9 * pool.system.profile.memory_bytes.value * 0.92
