"""The published layouts as topologies, and a generated launch in the golden file's spelling."""

from pathlib import Path

import yaml

from v4_ascend.config.topology import load_topology
from v4_ascend.deploy.vllm.arguments import arguments, parse
from v4_ascend.deploy.vllm.launches import launches
from v4_ascend.supernode.planning import find_model, plan_pools

DATA = Path(__file__).parent.parent / "data" / "vllm"
LAYOUTS = yaml.safe_load((DATA / "published_layouts.yaml").read_text())["layouts"]
PLACES = ("ASCEND_RT_VISIBLE_DEVICES", "data-parallel-rank", "port")


def topology_file(name, folder):
    """Write what an engineer would to get a published layout: its sizes, nothing of its flags."""
    layout = LAYOUTS[name]
    shape, processes = layout["shape"], layout["processes"]
    roles = {p["role"]: p["flags"] for p in processes}
    first, n = processes[0]["flags"], 16 if "a3" in shape["device"] else 8
    dp, tp = shape["dp"], shape["tp"]
    n = shape.get("devices", n)
    draft = roles.get("decode", first)["speculative-config"]["num_speculative_tokens"]
    parallel = {"dp_size": dp, "tp_size": tp, "ep_size": dp * tp}
    parallel["dsa_cp"] = bool(first.get("additional-config", {}).get("enable_dsa_cp"))
    hosts = [f"p{i}" for i in range(shape["hosts"])]
    topology = {
        "name": name,
        "cluster": {
            "device": shape["device"],
            "supernodes": [{"name": "p", "hosts": hosts, "devices_per_host": n}],
        },
        "model": {"checkpoint": "/models/it", "name": f"v4-{shape['model']}"},
        "serve": {
            "max_model_len": shape["context"],
            "concurrency": first["max-num-seqs"] * dp,
            "host": first.get("host", "0.0.0.0"),
            "require_key": False,
            "port": first["port"] if isinstance(first["port"], int) else 9000,
            "n_draft_tokens": draft,
            "memory_utilisation": first["gpu-memory-utilization"],
        },
        "runtime": {"max_chunk": first["max-num-batched-tokens"]},
        "engine": "vllm",
        "launcher": "ssh",
    }
    if "decode" not in roles:
        return _write(folder, topology | {"layout": parallel})
    decode, dp, tp = roles["decode"], shape["decode_dp"], shape["decode_tp"]
    names = [f"d{i}" for i in range(shape["decode_hosts"])]
    second = {"name": "d", "hosts": names, "devices_per_host": n}
    topology["cluster"]["supernodes"].append(second)
    topology["cluster"]["pools"] = [
        _pool("prefill", "p", first, parallel),
        _pool("decode", "d", decode, {"dp_size": dp, "tp_size": tp, "ep_size": dp * tp}),
    ]
    return _write(folder, topology)


def _pool(role, supernode, flags, parallel):
    return {
        "role": role,
        "supernodes": [supernode],
        "layout": parallel,
        "concurrency": flags["max-num-seqs"] * parallel["dp_size"],
        "max_chunk": flags["max-num-batched-tokens"],
        "memory_utilisation": flags["gpu-memory-utilization"],
        "block_size": flags.get("block-size", 128),
    }


def _write(folder, topology):
    file = folder / "published.yaml"
    file.write_text(yaml.safe_dump(topology))
    return file


def planned(file):
    """Return the topology of a file and its pools."""
    topology = load_topology(str(file))
    return topology, plan_pools(topology, find_model(topology))


def launched(file):
    """Return all processes that a topology file starts."""
    return launches(*planned(file))


def spelled(launch):
    """Spell env and flags of a launch as the golden file does."""
    values = parse(launch.argv, arguments("0.23.0"))
    flags = {k if v is not False else f"no-{k}": v is False or v for k, v in values.items()}
    env = {k: _marked(v) for k, v in launch.env.items()}
    flags.pop("served-model-name")
    return env, {k: _marked(v) for k, v in flags.items()}


def _marked(value):
    return {"{address}": "$LOCAL", "{interface}": "$NIC", "p0": "$FIRST", "d0": "$FIRST"}.get(
        str(value), value
    )


def published(process):
    """Return env and flags of a published process."""
    return dict(process["env"]), dict(process["flags"])


def leaves(value, path=""):
    """Flatten JSON into dotted paths."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in leaves(value[key], f"{path}.{key}").items()}
    return {path[1:]: value}
