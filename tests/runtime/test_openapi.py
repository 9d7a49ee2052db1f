"""What schemathesis makes of our OpenAPI document, right and wrong, is never the server's fault."""

import httpx
import pytest
import schemathesis
from fastapi.openapi.models import OpenAPI
from hypothesis import given, settings
from schemathesis import GenerationMode
from test_deploy import Box

from v4_ascend.runtime.api.document import BODIES

SHORT = {"type": "integer", "minimum": 1, "maximum": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("openapi"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    done = box.run("deploy", "--topology", box.topology, "--set", "name=openapi", "--detach")
    assert done.returncode == 0, done.stderr
    yield box
    assert box.run("down", "openapi").returncode == 0


@pytest.fixture(scope="module")
def document(served):
    return httpx.get(f"{served.url}/openapi.json").json()


@pytest.fixture(scope="module")
def described(document):
    """The document, narrowed to the model that is there and to short answers."""
    for body in document["components"]["schemas"].values():
        for name, narrower in (
            ("model", {"const": "v4-tiny"}),
            ("n", SHORT),
            ("timeout", {"const": 1}),
            ("max_tokens", SHORT),
            ("max_output_tokens", SHORT),
        ):
            if name in body.get("properties", {}):
                body["properties"][name] = narrower
                body["required"] = sorted({*body.get("required", ()), name})
    return schemathesis.openapi.from_dict(document)


def test_the_document_is_one_and_has_every_body(document):
    OpenAPI.model_validate(document)
    posts = {path for path, methods in document["paths"].items() if "post" in methods}
    assert posts == set(BODIES)


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_the_servers_fault(served, described, path, mode):
    """Bodies that keep to the document, and bodies that do not."""

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(described[path]["POST"].as_strategy(generation_mode=mode))
    def send(case):
        answer = case.call(base_url=served.url, timeout=60)
        assert answer.status_code < 500, f"{case.body!r}: {answer.text}"

    send()
