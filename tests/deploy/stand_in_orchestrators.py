"""Stand-ins for the commands `kubectl` and `docker`: what they are told, and a folder as cluster.

They show what `deploy`, `status` and `down` ask of these commands, nothing about a cluster. Objects
are files; pods and containers come from what was applied, without anything that runs. What they
are not told in this project's tests they refuse.
"""

import json
import os
import sys
from pathlib import Path

import yaml

PLACE = Path(os.environ["STAND_IN_CLUSTER"])
FAULT = os.environ.get("STAND_IN_FAULT", "")


def main():
    tool, *words = sys.argv[1:]
    with (PLACE / "told").open("a") as f:
        f.write(json.dumps([tool, *words]) + "\n")
    {"kubectl": kubectl, "docker": docker}[tool](words)


def kubectl(words):
    namespace, verb, *rest = words[1:]
    assert words[0] == "--namespace"
    given = dict(zip(rest, rest[1:], strict=False))
    if FAULT == "no cluster":
        raise SystemExit("The connection to the server localhost:8080 was refused")
    if verb == "apply":
        for document in documents(given["--filename"]):
            metadata = document["metadata"]
            assert metadata["namespace"] == namespace
            file(document["kind"], metadata["name"]).write_text(json.dumps(document))
    elif verb == "get":
        assert rest[0] == "pods"
        assert given["--output"] == "json"
        sys.stdout.write(json.dumps({"items": pods(*given["--selector"].split("="))}))
    elif verb == "delete" and rest[0] == "secret":
        file("Secret", rest[1]).unlink(missing_ok=True)
    elif verb == "delete":
        for document in documents(given["--filename"]):
            file(document["kind"], document["metadata"]["name"]).unlink(missing_ok=True)
    else:
        raise SystemExit(f"error: unknown command {verb!r}")


def documents(name):
    return yaml.safe_load_all(sys.stdin.read() if name == "-" else Path(name).read_text())


def file(kind, name):
    return PLACE / f"{kind}-{name}.json"


def pods(label, value):
    """Pods of the LeaderWorkerSets that are there, as the API lists them."""
    found = []
    for stored in PLACE.glob("LeaderWorkerSet-*.json"):
        job = json.loads(stored.read_text())
        group = job["spec"]["leaderWorkerTemplate"]
        for i in range(group["size"]):
            template = group["leaderTemplate" if i == 0 else "workerTemplate"]
            labels = template["metadata"]["labels"]
            if labels.get(label) != value:
                continue
            name = job["metadata"]["name"]
            metadata = {"name": f"{name}-0" + (f"-{i}" if i else ""), "labels": labels}
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            if FAULT == "no image" and i == 1:
                waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
                status = {
                    "phase": "Pending",
                    "containerStatuses": [{"state": {"waiting": waiting}}],
                }
            elif FAULT == "no node":
                message = "0/4 nodes are available"
                condition = {"type": "PodScheduled", "status": "False", "message": message}
                status = {"phase": "Pending", "conditions": [condition]}
            found.insert(0, {"metadata": metadata, "spec": {"nodeName": f"n{i}"}, "status": status})
    return found


def docker(words):
    assert words[0] == "compose"
    if words[1] == "version":
        if FAULT == "no compose":
            raise SystemExit("docker: unknown command: docker compose")
        return
    source, verb = Path(words[2]), words[3]
    assert words[1] == "--file"
    stored = PLACE / f"compose-{source.parent.name}.json"
    if verb == "up":
        stored.write_text(json.dumps(yaml.safe_load(source.read_text())))
    elif verb == "down":
        stored.unlink()
    elif verb == "ps" and stored.exists():
        for name in json.loads(stored.read_text())["services"]:
            state = {"State": "running", "Health": "healthy", "ExitCode": 0}
            if FAULT == "exited":
                state = {"State": "exited", "Health": "", "ExitCode": 6}
            sys.stdout.write(json.dumps({"Name": f"it-{name}-1", "Service": name} | state) + "\n")


main()
