"""Compose files and manifests: valid by published schemas, exact per device, without secrets."""

import copy
import json
import re
import stat
from pathlib import Path

import manifest_schemas
import pytest
import typer.main
import vllm_published as published
import yaml
from typer.testing import CliRunner

from v4_ascend.cli.app import app
from v4_ascend.cli.deploy_containers import written
from v4_ascend.cli.deploy_vllm import planned_pools
from v4_ascend.config.topology import load_topology
from v4_ascend.deploy.containers.platforms import platforms
from v4_ascend.deploy.doctor.matrix import matrix
from v4_ascend.deploy.vllm.launches import launches
from v4_ascend.deploy.vllm.recipes import recipes
from v4_ascend.errors import ConfigError, NotYetError
from v4_ascend.supernode.planning import deploy_plan, find_model

# device, devices of a host, model, layout of two hosts
DEVICES = {
    "a2": ("ascend-a2-64", 8, "flash", {"dp_size": 4, "tp_size": 4, "ep_size": 16}),
    "a3": ("ascend-a3-64", 16, "flash", {"dp_size": 8, "tp_size": 4, "ep_size": 32}),
    "950": ("ascend-950dt-96", 8, "flash", {"dp_size": 16, "ep_size": 16}),
    "hopper": ("nvidia-h200", 8, "flash", {"dp_size": 16, "ep_size": 16}),
    "cpu": ("cpu", 1, "tiny", {"pp_size": 2}),
}
WORKLOADS = ["leader-worker-set", "volcano-job", "ascend-job"]


def topology(family, folder, **changes):
    device, n, model, layout = DEVICES[family]
    hosts = {"name": "s", "hosts": ["node-1", "node-2"], "devices_per_host": n}
    wanted = {
        "name": "it",
        "cluster": {"device": device, "supernodes": [hosts]},
        "model": {"checkpoint": "/models/it", "name": f"v4-{model}"},
        "serve": {
            "max_model_len": 8192,
            "concurrency": 16,
            "host": "0.0.0.0",
            "require_key": False,
            "port": 8000,
        },
        "layout": layout,
        "launcher": "docker",
    }
    for key, value in changes.items():
        section = wanted.setdefault(key, {})
        wanted[key] = section | value if isinstance(value, dict) else value
    file = folder / "t.yaml"
    file.write_text(yaml.safe_dump(wanted))
    return load_topology(str(file))


def compose(wanted, host="node-1"):
    return yaml.safe_load(written(wanted).files[f"{host}/compose.yaml"])


def kubernetes(family, folder, workload="leader-worker-set", **changes):
    k = {"workload": workload, "namespace": "serving"} | changes.pop("kubernetes", {})
    changes = {"container": {"image": "registry/v4:1"}} | changes
    wanted = topology(family, folder, launcher="kubernetes", kubernetes=k, **changes)
    return {d["kind"]: d for d in yaml.safe_load_all(written(wanted).files["manifests.yaml"])}


def templates(manifests):
    """Pod templates of a workload, the first pod's first."""
    if "LeaderWorkerSet" in manifests:
        group = manifests["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    if "Job" in manifests:
        return [t["template"] for t in manifests["Job"]["spec"]["tasks"]]
    roles = manifests["AscendJob"]["spec"]["replicaSpecs"]
    return [roles[role]["template"] for role in ("Master", "Worker") if role in roles]


def container(template):
    (found,) = template["spec"]["containers"]
    return found


@pytest.mark.parametrize("family", DEVICES)
def test_compose_files_are_valid(family, tmp_path):
    for host in ("node-1", "node-2"):
        assert manifest_schemas.compose_problems(compose(topology(family, tmp_path), host)) == []


@pytest.mark.parametrize("name", ["flash-a3-pd", "pro-950-pd", "flash-a2"])
def test_compose_files_of_vllm_are_valid_and_run_its_commands(name, tmp_path):
    file = published.topology_file(name, tmp_path)
    wanted = load_topology(str(file), ["launcher=docker"])
    found = {}
    for text in written(wanted).files.values():
        document = yaml.safe_load(text)
        assert manifest_schemas.compose_problems(document) == []
        found |= document["services"]
    launches = published.launched(file)
    assert set(found) == {x.name for x in launches}
    for launch in launches:
        service = found[launch.name]
        assert service["entrypoint"][:2] == ["/bin/bash", "-c"]
        command = [a.replace("$$", "$") for a in service["command"]]
        if launch.role == "proxy":
            assert command[1].startswith("/vllm-workspace/vllm-ascend/examples/")
            assert set(service["depends_on"]) == {
                x.name for x in launches if x.host == launch.host and x is not launch
            }
            command[:2] = launch.argv[:2]
        assert command == list(launch.argv)
        address = service["environment"].get("HCCL_IF_IP", "${V4_ASCEND_ADDRESS:?")
        assert address.startswith("${V4_ASCEND_ADDRESS:?")


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("family", DEVICES)
def test_manifests_are_valid_and_fit_together(family, workload, tmp_path):
    if workload == "ascend-job" and family in ("hopper", "cpu"):
        with pytest.raises(ConfigError, match=r"t\.yaml:\d+: kubernetes\.workload: ascend-job is"):
            kubernetes(family, tmp_path, workload)
        return
    found = kubernetes(family, tmp_path, workload)
    for document in found.values():
        assert manifest_schemas.manifest_problems(document) == []
        assert document["metadata"]["namespace"] == "serving"
    first, other = templates(found)
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= first["metadata"]["labels"].items()
    assert not selector.items() <= other["metadata"]["labels"].items()
    (port,) = found["Service"]["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in container(first)["ports"]]
    for template in (first, other):
        volumes = [v["name"] for v in template["spec"]["volumes"]]
        assert volumes == [m["name"] for m in container(template)["volumeMounts"]]
        assert len(set(volumes)) == len(volumes)
        assert found["ConfigMap"]["metadata"]["name"] in str(template["spec"]["volumes"][0])
    others_probes = {k for k in container(other) if k.endswith("Probe")}
    assert others_probes == set()
    # A service that leads to ready pods alone must not be what makes a pod ready.
    assert ("readinessProbe" in container(first)) is (workload != "ascend-job")


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("family", ["a2", "a3", "950", "hopper"])
def test_manifests_of_vllm_are_valid_and_run_its_commands(family, workload, tmp_path):
    vllm = {"engine": "vllm", "runtime": {"max_chunk": 512}}
    if workload == "ascend-job":
        says = "ascend-job is of NPUs" if family == "hopper" else "vLLM's hosts meet at several"
        with pytest.raises(ConfigError, match=says):
            kubernetes(family, tmp_path, workload, **vllm)
        return
    found = kubernetes(family, tmp_path, workload, **vllm)
    for document in found.values():
        assert manifest_schemas.manifest_problems(document) == []
    wanted = topology(family, tmp_path, **vllm)
    as_run = {"LWS_LEADER_ADDRESS": "first", "LWS_WORKER_INDEX": "1", "VC_TASK_INDEX": "0"}
    for launch, template in zip(published_launches(wanted), templates(found), strict=True):
        args = [expanded(a, as_run) for a in container(template)["args"]]
        assert args[2] == "first" or args[2].startswith("it-first-0.")
        own = without(launch.argv, "--data-parallel-start-rank", "--data-parallel-address")
        assert args[3:] == own
        env = {e["name"]: e.get("value") for e in container(template)["env"]}
        told = {k: v for k, v in launch.env.items() if not v.startswith("{")}
        assert told.items() <= env.items()
        interfaces = {k for k, v in launch.env.items() if v == "{interface}"}
        assert interfaces == set(re.findall(r"^export (\w+)=", script_of(found), re.MULTILINE))
        assert {k for k, v in launch.env.items() if v == "{address}"} <= {
            e["name"] for e in container(template)["env"] if "valueFrom" in e
        }


def published_launches(wanted):
    return launches(wanted, planned_pools(wanted))


def script_of(manifests):
    return manifests["ConfigMap"]["data"]["start.sh"]


def expanded(word, variables):
    """A word of a pod's command, as a kubelet expands it."""
    return re.sub(
        r"\$\$|\$\((\w+)\)", lambda m: "$" if m[1] is None else variables.get(m[1], m[0]), word
    )


def without(words, *flags):
    """A command without some flags and their values."""
    kept = list(words)
    for flag in flags:
        if flag in kept:
            i = kept.index(flag)
            del kept[i : i + 2]
    return kept


def test_one_pod_of_vllm_needs_no_image_of_ours_and_its_key_is_a_secret(tmp_path):
    one = {"supernodes": [{"name": "s", "host_count": 1, "devices_per_host": 16}]}
    wanted = topology(
        "a3", tmp_path, launcher="kubernetes", engine="vllm", cluster=one,
        runtime={"max_chunk": 512}, layout={"dp_size": 4, "tp_size": 4, "ep_size": 16},
        serve={"api_keys": ["of-mine"]},
        kubernetes={"workload": "ascend-job"}, model={"checkpoint": "/models/$(HOME)"},
    )  # fmt: skip
    found = written(wanted)
    assert "of-mine" not in found.shown() + " ".join(found.steps)
    assert found.private == {"key": "of-mine"}
    assert found.steps[0].endswith("create secret generic it-secret --from-file=key={out}/key")
    manifests = {d["kind"]: d for d in yaml.safe_load_all(found.files["manifests.yaml"])}
    for document in manifests.values():
        assert manifest_schemas.manifest_problems(document) == []
    pod = container(templates(manifests)[0])
    assert pod["image"] == f"quay.io/ascend/vllm-ascend:v{recipes().vllm_ascend}-a3"
    assert expanded(pod["args"][5], {"HOME": "/root"}) == "/models/$(HOME)"
    keys = [e["valueFrom"]["secretKeyRef"] for e in pod["env"] if e["name"] == "VLLM_API_KEY"]
    assert keys == [{"name": "it-secret", "key": "key"}]
    assert "data-parallel" not in script_of(manifests)
    two = topology("a3", tmp_path, launcher="docker", engine="vllm", runtime={"max_chunk": 512},
                   serve={"api_keys": ["a", "b"]})  # fmt: skip
    with pytest.raises(NotYetError, match="serve.api_keys: 2; vLLM takes one"):
        written(two)


def test_pods_with_other_numbers_of_dp_ranks_are_refused(tmp_path):
    hosts = {"supernodes": [{"name": "s", "host_count": 3, "devices_per_host": 6}]}
    with pytest.raises(NotYetError, match=r"as many DP ranks on every host; .* at 0, 6, 12"):
        kubernetes("hopper", tmp_path, engine="vllm", cluster=hosts, runtime={"max_chunk": 512})


PLANTED = {
    "a misspelt key": ("LeaderWorkerSet", "spec.replica", 1, "replica"),
    "a misspelt key of a pod": (
        "LeaderWorkerSet",
        "spec.leaderWorkerTemplate.workerTemplate.spec.hostNetwrk",
        True,
        "hostNetwrk",
    ),
    "a number that is a word": ("LeaderWorkerSet", "spec.leaderWorkerTemplate.size", "2", "size"),
    "a value that is none": ("LeaderWorkerSet", "spec.startupPolicy", "Now", "startupPolicy"),
    "a pod without containers": (
        "LeaderWorkerSet",
        "spec.leaderWorkerTemplate.workerTemplate.spec.containers",
        None,
        "containers",
    ),
    "a port that is a word": ("Service", "spec.ports", [{"port": "http"}], "spec/ports"),
    "data that is no text": ("ConfigMap", "data", {"plan.json": 1}, "data"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_schemas_refuse_what_is_wrong(planted, tmp_path):
    kind, path, value, says = PLANTED[planted]
    document = copy.deepcopy(kubernetes("cpu", tmp_path)[kind])
    *parents, last = path.split(".")
    section = document
    for key in parents:
        section = section[key]
    section[last] = value
    if value is None:
        del section[last]
    assert says in " ".join(manifest_schemas.manifest_problems(document))


@pytest.mark.parametrize(
    ("key", "value"), [("comand", []), ("shm_size", []), ("network_mode", 1), ("volumes", [{}])]
)
def test_the_compose_schema_refuses_what_is_wrong(key, value, tmp_path):
    document = compose(topology("cpu", tmp_path))
    document["services"]["v4-ascend"][key] = value
    assert key in " ".join(manifest_schemas.compose_problems(document))


def service(family, folder, **changes):
    return compose(topology(family, folder, **changes))["services"]["v4-ascend"]


def test_a_950_has_other_devices_and_mounts_than_a2_and_a3(tmp_path):
    a2, a3, a5 = (service(f, tmp_path) for f in ("a2", "a3", "950"))
    cards = [f"/dev/davinci{n}:/dev/davinci{n}" for n in range(16)]
    rest = [f"/dev/{d}:/dev/{d}" for d in ("davinci_manager", "devmm_svm", "hisi_hdc")]
    assert a2["devices"] == cards[:8] + rest
    assert a3["devices"] == cards + rest
    rest = [f"/dev/{d}:/dev/{d}" for d in ("davinci_manager", "hisi_hdc", "ummu", "uburma")]
    assert a5["devices"] == cards[:8] + rest
    inside = {m["target"] for m in a5["volumes"]} - {m["target"] for m in a3["volumes"]}
    assert inside >= {"/etc/hccl_rootinfo.json", "/etc/hixlep", "/lib/route.conf"}
    for one in (a2, a3, a5):
        assert all(m["read_only"] for m in one["volumes"])
        assert "privileged" not in one
        assert "user" not in one


def test_a_gpu_is_asked_for_and_nobody_is_root_who_need_not_be(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 1234)
    monkeypatch.setattr("os.getgid", lambda: 5678)
    gpu, cpu = service("hopper", tmp_path), service("cpu", tmp_path)
    (devices,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert devices["device_ids"] == [str(n) for n in range(8)]
    for one in (gpu, cpu):
        assert (one["user"], one["cap_drop"]) == ("1234:5678", ["ALL"])
        assert "devices" not in one


def test_the_first_host_alone_has_the_api_and_all_know_where_it_is(tmp_path):
    wanted = topology("950", tmp_path, container={"port": 1234, "image": "mine:2"})
    first, other = (compose(wanted, h)["services"]["v4-ascend"] for h in ("node-1", "node-2"))
    assert "urlopen('http://127.0.0.1:8000/ready')" in first["healthcheck"]["test"][-1]
    assert "healthcheck" not in other
    for i, one in enumerate((first, other)):
        words = " ".join(one["command"])
        assert f"--index {i} --first node-1 --port 1234 " in words
        assert one["image"] == "mine:2"
        assert one["environment"]["HCCL_CONNECT_TIMEOUT"].isdecimal()
        assert "HCCL_SOCKET_IFNAME" not in one["environment"]  # the host knows it better


def test_resources_annotations_and_labels_are_the_schedulers(tmp_path):
    a3 = kubernetes("a3", tmp_path, "volcano-job")
    job, (first, other) = a3["Job"], templates(a3)
    assert job["metadata"]["annotations"] == {
        "huawei.com/schedule_policy": "chip2-node16-sp",
        "sp-block": "32",
    }
    assert container(first)["resources"]["limits"] == {"huawei.com/Ascend910": 16}
    env = {e["name"]: e for e in container(first)["env"]}
    field = env["ASCEND_VISIBLE_DEVICES"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['huawei.com/Ascend910']"
    assert container(first)["args"][container(first)["args"].index("--index") + 1] == "0"
    assert container(other)["args"][container(other)["args"].index("--other") + 1] == (
        "$(VC_TASK_INDEX)"
    )
    a5 = kubernetes("950", tmp_path, "ascend-job")
    job, (first, other) = a5["AscendJob"], templates(a5)
    assert job["metadata"]["annotations"] == {
        "huawei.com/schedule_policy": "chip8-node8-ra64-sp",
        "sp-block": "16",
        "ra-block": "16",
    }
    assert job["metadata"]["labels"]["framework"] == "pytorch"
    assert container(other)["name"] == "ascend"
    assert container(other)["resources"]["requests"] == {"huawei.com/npu": 8}
    # Its operator makes a service of the port of this name, and MASTER_ADDR of the service.
    ports = {p["name"]: p["containerPort"] for p in container(first)["ports"]}
    assert ports["ascendjob-port"] == 29400
    assert "$(MASTER_ADDR)" in container(other)["args"]


@pytest.mark.parametrize(
    ("workload", "variables"),
    [
        ("leader-worker-set", {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "first"}),
        ("volcano-job", {"VC_TASK_INDEX": "0"}),
        ("ascend-job", {"RANK": "1", "MASTER_ADDR": "first"}),
    ],
)
def test_with_a_controllers_variables_pods_run_a_command_of_ours(workload, variables, tmp_path):
    command = typer.main.get_command(app).commands["host"]
    indices = []
    for template in templates(kubernetes("950", tmp_path, workload)):
        args = container(template)["args"]
        words = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], a) for a in args]
        assert words[:2] == ["v4-ascend", "host"]
        options = command.make_context("host", words[2:]).params
        indices.append(options["index"] if options["other"] is None else 1 + options["other"])
        mounts = [m["mountPath"] for m in container(template)["volumeMounts"]]
        assert str(options["plan"].parent) in mounts
        assert str(options["secret"].parent) in mounts
    assert indices == [0, 1]


def test_keys_of_the_section_reach_the_pods(tmp_path):
    k = {
        "resource": "huawei.com/ascend-1980",
        "checkpoint_claim": "weights/flash/w8a8",
        "host_network": True,
        "node_selector": {"accelerator-type": "module-a3-16"},
    }
    reference = {"reference": "/models/reference.safetensors"}
    (first, _) = templates(kubernetes("a3", tmp_path, kubernetes=k, model=reference))
    assert container(first)["resources"]["limits"] == {"huawei.com/ascend-1980": 16}
    assert first["spec"]["nodeSelector"] == {"accelerator-type": "module-a3-16"}
    assert first["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    volumes = {v["name"]: v for v in first["spec"]["volumes"]}
    mounts = {m["name"]: m for m in container(first)["volumeMounts"]}
    claim = {"claimName": "weights", "readOnly": True}
    assert volumes["checkpoint"]["persistentVolumeClaim"] == claim
    assert mounts["checkpoint"]["subPath"] == "flash/w8a8"
    assert mounts["reference"]["mountPath"] == reference["reference"]


def test_one_host_is_one_pod_of_each_kind(tmp_path):
    one = {"supernodes": [{"name": "s", "host_count": 1, "devices_per_host": 8}]}
    for workload in WORKLOADS:
        found = kubernetes("950", tmp_path, workload, cluster=one, layout="auto")
        for document in found.values():
            assert manifest_schemas.manifest_problems(document) == []
    assert set(found["AscendJob"]["spec"]["replicaSpecs"]) == {"Master"}
    annotations = found["AscendJob"]["metadata"]["annotations"]
    assert annotations == {"huawei.com/schedule_policy": "chip8-node8"}


def test_what_is_written_is_its_owners_and_a_secret_stays(tmp_path):
    wanted = topology("cpu", tmp_path, serve={"api_keys": ["key-of-mine"]})
    out = tmp_path / "out"
    names = written(wanted).write(out)
    assert set(names) == {
        "node-1/compose.yaml", "node-2/compose.yaml", "plan.json", "RUN.txt", "secret",
    }  # fmt: skip
    secret = (out / "secret").read_text()
    assert len(secret) == 65
    for name in names:
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o600
        assert name in ("secret", "plan.json") or secret.strip() not in (out / name).read_text()
        assert name == "plan.json" or "key-of-mine" not in (out / name).read_text()
    plan = deploy_plan(wanted, find_model(wanted).config)
    assert (out / "plan.json").read_text() == plan.model_dump_json(indent=2) + "\n"
    written(wanted).write(out)
    assert (out / "secret").read_text() == secret
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(ConfigError, match="--out: .*foreign is there and was not written by"):
        written(wanted).write(foreign)
    with pytest.raises(ConfigError, match="--out: .*nowhere is no folder"):
        written(wanted).write(tmp_path / "nowhere" / "out")


def test_keys_are_in_no_manifest_and_the_plan_with_them_is_a_secret(tmp_path):
    image = {"image": "registry/v4:1"}
    wanted = topology(
        "cpu", tmp_path, launcher="kubernetes", container=image, serve={"api_keys": ["of-mine"]}
    )
    found = written(wanted)
    assert "of-mine" not in found.shown() + " ".join(found.steps)
    kinds = [d["kind"] for d in yaml.safe_load_all(found.files["manifests.yaml"])]
    assert kinds == ["LeaderWorkerSet", "Service"]
    assert json.loads(found.private["plan.json"])["api_keys"] == ["of-mine"]
    create = next(s for s in found.steps_for(Path("/a b")) if "create secret" in s)
    assert create.endswith("--from-file=secret=/dev/stdin --from-file=plan.json='/a b'/plan.json")


def test_vllms_key_is_in_a_file_of_its_own(tmp_path):
    wanted = topology(
        "a3", tmp_path, engine="vllm", serve={"api_keys": ["of-mine"]}, runtime={"max_chunk": 512}
    )
    found = written(wanted)
    assert "of-mine" not in found.shown()
    assert found.private == {"keys.env": "VLLM_API_KEY=of-mine\n"}
    both = compose(wanted)["services"]["both-node-1-8000"]
    assert both["env_file"] == ["../keys.env"]
    assert both["image"] == f"quay.io/ascend/vllm-ascend:v{recipes().vllm_ascend}-a3"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"serve": {"host": "127.0.0.1"}}, ConfigError, "serve.host: 127.0.0.1 is not reached"),
        (
            {"container": {}},
            ConfigError,
            "^container.image: missing; nodes pull one .*docker build",
        ),
        ({"name": "it-"}, ConfigError, "name: 'it-': names in Kubernetes"),
        (
            {"cluster": {"device": "cpu-emulated-npu"}, "layout": "auto"},
            NotYetError,
            "cluster.device: not yet; deploy does emulated NPUs with launcher local",
        ),
        ({"model": {"checkpoint": "hf:a/b"}}, ConfigError, "hf:a/b: containers are given a folder"),
        ({"model": {"checkpoint": "it"}}, ConfigError, "it is relative; containers need a path"),
        ({"model": {"reference": "r"}}, ConfigError, "model.reference: r is relative"),
    ],
)
def test_what_no_cluster_would_run_is_refused(changes, error, says, tmp_path):
    with pytest.raises(error, match=says):
        kubernetes("cpu", tmp_path, **changes)


def test_pools_on_different_kinds_of_devices_are_refused(tmp_path):
    file = published.topology_file("flash-a3-pd", tmp_path)
    wanted = yaml.safe_load(file.read_text())
    wanted["cluster"]["pools"][1]["device"] = "ascend-950dt-96"
    file.write_text(yaml.safe_dump(wanted))
    with pytest.raises(NotYetError, match="cluster.pools: a3 and 950 together: not yet"):
        written(load_topology(str(file), ["launcher=docker"]))


def test_a_plan_larger_than_a_configmap_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("v4_ascend.deploy.containers.kubernetes.MAX_CONFIGMAP_BYTES", 100)
    with pytest.raises(ConfigError, match="the plan has .* bytes, a ConfigMap at most 100"):
        kubernetes("cpu", tmp_path)


def run(*args):
    return CliRunner().invoke(app, ["deploy", "--topology", *args])


def test_the_command_prints_or_writes_and_says_what_to_type(tmp_path):
    docker = ("laptop", "--set", "launcher=docker", "--set", "model.checkpoint=/models/tiny")
    shown = run(*docker, "--dry-run")
    assert manifest_schemas.compose_problems(yaml.safe_load(shown.stdout)) == []
    assert "--out DIR writes these files" in shown.stderr
    out = str(tmp_path / "out")
    done = run(*docker, "--dry-run", "--out", out)
    last = f"docker compose --file {out}/localhost/compose.yaml up --detach  # on localhost"
    assert done.stdout.splitlines()[-1] == last
    assert (tmp_path / "out/RUN.txt").read_text().splitlines()[-1] == last
    data = json.loads(run(*docker, "--dry-run", "--json").stdout)["data"]
    assert list(data["files"]) == ["localhost/compose.yaml"]
    assert (data["launcher"], data["steps"][-1]) == ("docker", last.replace(out, "DIR"))


def test_a_key_is_said_once():
    result = run("laptop", "--set", "launcher=docker", "--set", "model.checkpoint=v4")
    assert str(result.exception).startswith("--set model.checkpoint: v4 is relative")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "launcher=docker", "--out", "x"), "--out: goes with --dry-run"),
        (("--dry-run", "--out", "x"), "--out: is of launchers docker and kubernetes, not local"),
        (("--set", "launcher=docker", "--emulate", "2"), "--emulate: runs processes here"),
        (("--set", "launcher=docker", "--conformance"), "--conformance: nothing is started here"),
    ],
)
def test_what_starts_nothing_is_not_asked_to(options, says):
    error = run("laptop", *options).exception
    assert (error.exit_code, says in str(error)) == (2, True), error


def test_every_kind_of_device_has_a_row_and_versions_agree_with_the_recipes():
    assert {p.family for p in platforms().families} == set(DEVICES)
    newest = matrix().stacks[0]
    assert (newest.vllm, newest.vllm_ascend) == (recipes().vllm, recipes().vllm_ascend)
