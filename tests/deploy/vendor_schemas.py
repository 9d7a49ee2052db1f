"""Make tests/data/schemas from published packages: ``python vendor_schemas.py FOLDER``.

FOLDER has the unpacked wheels of kubernetes-validate and check-jsonschema, which carry the schemas
of Kubernetes and of the compose specification. Descriptions are left out, and of Kubernetes all
that none of our manifests can have in it.
"""

import json
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "data" / "schemas"
KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
COMPOSE = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
CORE = "io.k8s.api.core.v1."
ROOTS = [CORE + kind for kind in ("PodTemplateSpec", "Service", "ConfigMap")]
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def undescribed(schema):
    """Without what is for people, and with references into the same file."""
    if isinstance(schema, list):
        return [undescribed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if k != "description" or not isinstance(v, str)}
    if "$ref" in kept:
        kept["$ref"] = "#/" + kept["$ref"].partition("#/")[2]
    return {k: undescribed(v) for k, v in kept.items()}


def references(schema):
    if isinstance(schema, list):
        for s in schema:
            yield from references(s)
    elif isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for s in schema.values():
            yield from references(s)


def kubernetes(folder):
    definitions = json.loads((folder / KUBERNETES).read_text())["$defs"]
    kept, wanted = {}, list(ROOTS)
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = undescribed(definitions[name])
            wanted += references(kept[name])
    return {"$schema": DRAFT, "$defs": dict(sorted(kept.items()))}


def write(name, schema):
    (OUT / name).write_text(json.dumps(schema, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    packages = Path(sys.argv[1])
    write("kubernetes.json", kubernetes(packages))
    compose = undescribed(json.loads((packages / COMPOSE).read_text()))
    write("compose-spec.json", compose)
