"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from v4_ascend.runtime.api.controls import parse_body
from v4_ascend.runtime.api.gate import Gate
from v4_ascend.runtime.api.openai import chat_ask
from v4_ascend.runtime.api.openai_bodies import IGNORED, ChatBody
from v4_ascend.runtime.api.service import Service


class TokenizeBody(BaseModel):
    """Text; a conversation has the body of chat completions instead."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """Tokens."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[int] = Field(min_length=1)


def router(service: Service, gate: Gate) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        raw = await gate.read(request)
        if isinstance(raw, dict) and "messages" in raw:
            named = {"model": service.plan.model_name, **raw}
            ids = service.prompt_ids(chat_ask(parse_body(ChatBody, named, IGNORED)))
        else:
            body = parse_body(TokenizeBody, raw)
            first = [service.config.bos_token_id] if body.add_special_tokens else []
            ids = [*first, *service.tokenizer.encode_plain(body.prompt)]
        return {"count": len(ids), "max_model_len": service.plan.max_model_len, "tokens": ids}

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, str]:
        body = parse_body(DetokenizeBody, await gate.read(request))
        service.require_tokens(body.tokens, "tokens")
        return {"prompt": service.tokenizer.decode(body.tokens)}

    return routes
