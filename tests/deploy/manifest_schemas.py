"""What published schemas say of compose files and manifests; see tests/data/README.md."""

import json
from functools import cache
from pathlib import Path

import jsonschema_rs
import yaml

DATA = Path(__file__).parents[1] / "data" / "schemas"
CORE = "io.k8s.api.core.v1."
REFERENCES = {
    "pod": f"#/$defs/{CORE}PodTemplateSpec",
    "metadata": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
}


def _joined(schema):
    """Put the pods and the metadata of Kubernetes into a job's own fields."""
    if isinstance(schema, list):
        return [_joined(s) for s in schema]
    if isinstance(schema, dict):
        return {k: REFERENCES.get(v, v) if k == "$ref" else _joined(v) for k, v in schema.items()}
    return schema


@cache
def _validator(kind):
    kubernetes = json.loads((DATA / "kubernetes.json").read_text())
    jobs = _joined(yaml.safe_load((DATA / "jobs.yaml").read_text()))
    name = kind if kind in jobs else CORE + kind
    schema = {"$schema": kubernetes["$schema"], "$ref": f"#/$defs/{name}"}
    return jsonschema_rs.validator_for(schema | {"$defs": kubernetes["$defs"] | jobs})


@cache
def _compose():
    return jsonschema_rs.validator_for(json.loads((DATA / "compose-spec.json").read_text()))


def _problems(validator, document):
    return [f"{'/'.join(map(str, e.instance_path))}: {e.message}" for e in
            validator.iter_errors(document)]  # fmt: skip


def manifest_problems(document):
    """Everything wrong with a manifest, as ``path: what``."""
    return _problems(_validator(document["kind"]), document)


def compose_problems(document):
    """Everything wrong with a compose file."""
    return _problems(_compose(), document)
