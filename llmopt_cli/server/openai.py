"""OpenAI's routes: models, chat completions and text completions, whole or as a stream.

Knows the request bodies and the service; what is computed, and when, is the engine's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmopt_cli.server.answer import Answer
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.guard import GuardedRoute
from llmopt_cli.server.logprobs import Worder
from llmopt_cli.server.protocol import ChatRequest, CompletionRequest, model_card
from llmopt_cli.server.sampling import StreamOptions
from llmopt_cli.server.service import Service
from llmopt_cli.server.streaming import EventStream, unless_gone


class OpenAIApi:
    """The routes below `/v1`, all behind the API key if there is one."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine.engine
        self._started = int(time.time())
        self.router = APIRouter(prefix="/v1", route_class=GuardedRoute)
        self.router.add_api_route("/models", self.models, methods=["GET"])
        self.router.add_api_route("/models/{name:path}", self.model, methods=["GET"])
        self.router.add_api_route("/chat/completions", self.chat, methods=["POST"])
        self.router.add_api_route("/completions", self.completions, methods=["POST"])

    async def models(self) -> Response:
        """The model that is served, and its adapters as models of their own."""
        names = [self._service.model_name, *self._engine.adapters]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, name: str) -> Response:
        """The card of a model by name."""
        self._adapter(name)
        return JSONResponse(self._card(name))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._adapter(body.model)  # before the work of a template
        turns = [message.turn() for message in body.messages]
        prompt = await asyncio.to_thread(self._engine.tokenizer.chat, turns)  # a long one would hold up everybody
        return await self._answer(body, [prompt], [""], request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts."""
        self._adapter(body.model)
        prompts, echoes = await asyncio.to_thread(self._encoded, body)
        return await self._answer(body, prompts, echoes, request)

    def _encoded(self, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """The token ids of every prompt, and what its answer echoes."""
        tokenizer = self._engine.tokenizer
        prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompt]
        return prompts, echoes

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str],
        request: Request,
    ) -> Response:
        self._check_priority(body.priority)
        adapter, served = self._adapter(body.model), self._service.model_name
        policy = body.policy(self._service.settings.kv_policy)
        unbounded = policy is not None and policy.unbounded
        rooms = [self._max_tokens(0 if unbounded else len(prompt), body.limit, unbounded) for prompt in prompts]
        params = [body.sampling(room, adapter, policy) for room in rooms]
        outputs = self._service.run(prompts, params, body.answers)
        answer = Answer(body, adapter or served, prompts, echoes, Worder(self._engine.tokenizer))
        if not body.stream:
            return JSONResponse(await unless_gone(request.receive, answer.whole(outputs)))
        events = answer.events(outputs, body.stream_options or StreamOptions())
        return await EventStream.begin(request.receive, events)

    def _max_tokens(self, num_prompt: int, limit: int | None, unbounded: bool) -> int:
        """What the client asked for, or all there is room for. A prompt too long is left to the engine to refuse.

        A request that is `unbounded` by the context gets as many as one can hold, unless it asks for more.
        """
        context = self._engine.max_model_len
        room = max(context - num_prompt, 1)
        if limit is not None and num_prompt < context and limit > room and not unbounded:
            raise ApiError(
                400,
                f"the context holds {context} tokens; the prompt has {num_prompt} and max_tokens asks for {limit} more",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return room if limit is None else limit

    def _check_priority(self, priority: int) -> None:
        if priority and self._engine.batching.scheduling_policy != "priority":
            raise ApiError(400, "`priority` needs a server with `--scheduling-policy priority`", param="priority")

    def _adapter(self, name: str | None) -> str:
        """The adapter that a model's name means: none for the name of the base, or without a name."""
        served, adapters = self._service.model_name, self._engine.adapters
        if name is None or name == served:
            return ""
        if name not in adapters:
            known = " and ".join(f"`{one}`" for one in (served, *adapters))
            are = "are" if adapters else "is"
            raise ApiError(
                404, f"model `{name}` is not served here, but {known} {are}", param="model", code="model_not_found"
            )
        return name

    def _card(self, name: str) -> dict[str, Any]:
        parent = self._service.model_name if self._adapter(name) else None
        return model_card(name, self._started, self._engine.max_model_len, parent)
