"""The OpenAPI document: FastAPI's, with the bodies and errors that our routes handle themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from v4_ascend.runtime.api.anthropic_bodies import CountBody, MessagesBody
from v4_ascend.runtime.api.openai_bodies import ChatBody, CompletionBody
from v4_ascend.runtime.api.responses_bodies import ResponsesBody
from v4_ascend.runtime.api.tokens import DetokenizeBody, TokenizeBody

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/chat/completions": (ChatBody,),
    "/v1/completions": (CompletionBody,),
    "/v1/responses": (ResponsesBody,),
    "/v1/messages": (MessagesBody,),
    "/v1/messages/count_tokens": (CountBody,),
    "/tokenize": (TokenizeBody, ChatBody),
    "/detokenize": (DetokenizeBody,),
}
_REF = "#/components/schemas/{model}"
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}


def document(app: FastAPI) -> dict[str, Any]:
    """Return what ``/openapi.json`` says: each POST with the body it reads, and that it may refuse.

    Where the deployment has no keys, none is needed: both ways to send one are optional.
    """
    out = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = dict.fromkeys((m, "validation") for bodies in BODIES.values() for m in bodies)
    refs, schemas = models_json_schema(list(models), ref_template=_REF)  # type: ignore[arg-type]
    components = out.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas["$defs"])
    components["securitySchemes"] = _KEYS
    refused = {"description": "refused; the body says why, in the form of its API"}
    for path, bodies in BODIES.items():
        choices = [refs[m, "validation"] for m in bodies]
        schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
        out["paths"][path]["post"] |= {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "security": [{}, *({name: []} for name in _KEYS)],
        }
        out["paths"][path]["post"]["responses"]["4XX"] = refused
    return out
