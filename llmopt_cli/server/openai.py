"""OpenAI's routes: models, chat completions and text completions, whole or as a stream.

Knows the request bodies and the service; what is computed, and when, is the engine's business.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmopt_cli.errors import LlmoptError
from llmopt_cli.runtime.request import RequestOutput
from llmopt_cli.server.guard import GuardedRoute
from llmopt_cli.server.protocol import ApiError, ChatRequest, CompletionRequest, StreamOptions, model_card, usage
from llmopt_cli.server.service import Service
from llmopt_cli.server.streaming import EventStream, unless_gone

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class Face:
    """How one of the two endpoints words its answers.

    `whole(index, text, finish_reason)` is a choice of a complete answer; `piece(index, text, finish_reason, first)` one
    of a stream, `first` marking the choice's first piece.
    """

    id_prefix: str
    whole_object: str
    piece_object: str
    whole: Callable[[int, str, str | None], dict[str, Any]]
    piece: Callable[[int, str, str | None, bool], dict[str, Any]]


def _choice(index: int, finish_reason: str | None, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


CHAT = Face(
    id_prefix="chatcmpl-",
    whole_object="chat.completion",
    piece_object="chat.completion.chunk",
    whole=lambda index, text, reason: _choice(
        index, reason, message={"role": "assistant", "content": text, "refusal": None}
    ),
    piece=lambda index, text, reason, first: _choice(
        index, reason, delta={"role": "assistant", "content": text} if first else {"content": text}
    ),
)
COMPLETION = Face(
    id_prefix="cmpl-",
    whole_object="text_completion",
    piece_object="text_completion",
    whole=lambda index, text, reason: _choice(index, reason, text=text),
    piece=lambda index, text, reason, first: _choice(index, reason, text=text),
)


@dataclass
class Answer:
    """One answer in the making: the prompts' latest outputs, and how they are worded.

    `echoes` are the texts put before the answers, one a prompt.
    """

    face: Face
    model: str
    echoes: Sequence[str]
    latest: dict[int, RequestOutput] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        """The answer in one piece."""
        async for index, output in outputs:
            self.latest[index] = output
        choices = [
            self.face.whole(index, echo + self.latest[index].text, self.latest[index].finish_reason)
            for index, echo in enumerate(self.echoes)
        ]
        return self._envelope(self.face.whole_object, choices) | {"usage": self._usage()}

    async def events(self, outputs: Outputs, options: StreamOptions) -> AsyncGenerator[str, None]:
        """The answer as JSON chunks, then OpenAI's end mark.

        An error before the first chunk is raised, as the response can still be that error; a later one is a chunk.
        """
        try:
            async with aclosing(outputs):
                async for index, output in outputs:
                    chunk = self._chunk(index, output)
                    if options.continuous_usage_stats:
                        chunk["usage"] = self._usage()
                    elif options.include_usage:
                        chunk["usage"] = None
                    yield _dump(chunk)
            if options.include_usage:
                yield _dump(self._envelope(self.face.piece_object, []) | {"usage": self._usage()})
        except LlmoptError as error:
            if not self.latest:
                raise
            yield _dump(ApiError.of(error).body())
        yield "[DONE]"

    def _chunk(self, index: int, output: RequestOutput) -> dict[str, Any]:
        first = index not in self.latest
        self.latest[index] = output
        text = self.echoes[index] + output.delta if first else output.delta
        return self._envelope(self.face.piece_object, [self.face.piece(index, text, output.finish_reason, first)])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.face.id_prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        outputs = self.latest.values()
        return usage(
            prompt_tokens=sum(output.num_prompt_tokens for output in outputs),
            completion_tokens=sum(len(output.token_ids) for output in outputs),
            cached_tokens=sum(output.num_cached_tokens for output in outputs),
        )


def _dump(data: dict[str, Any]) -> str:
    # ASCII only: some clients split lines at U+2028 and its like, which JSON lets stand unescaped.
    return json.dumps(data, separators=(",", ":"))


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
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The card of a model by name."""
        self._check_model(name)
        return JSONResponse(self._card())

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        turns = [message.turn() for message in body.messages]
        prompt = await asyncio.to_thread(self._engine.tokenizer.chat, turns)  # a long one would hold up everybody
        return await self._answer(CHAT, body, [prompt], [""], request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several texts."""
        self._check_model(body.model)
        prompts, echoes = await asyncio.to_thread(self._encoded, body)
        return await self._answer(COMPLETION, body, prompts, echoes, request)

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
        face: Face,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str],
        request: Request,
    ) -> Response:
        params = [body.sampling(self._max_tokens(len(prompt), body.limit)) for prompt in prompts]
        outputs = self._service.run(prompts, params)
        answer = Answer(face, self._service.model_name, echoes)
        if not body.stream:
            return JSONResponse(await unless_gone(request.receive, answer.whole(outputs)))
        events = answer.events(outputs, body.stream_options or StreamOptions())
        return await EventStream.begin(request.receive, events)

    def _max_tokens(self, num_prompt: int, limit: int | None) -> int:
        """What the client asked for, or all there is room for. A prompt too long is left to the engine to refuse."""
        context = self._engine.max_model_len
        room = max(context - num_prompt, 1)
        if limit is not None and num_prompt < context and limit > room:
            raise ApiError(
                400,
                f"the context holds {context} tokens; the prompt has {num_prompt} and max_tokens asks for {limit} more",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return room if limit is None else limit

    def _check_model(self, name: str | None) -> None:
        served = self._service.model_name
        if name is not None and name != served:
            raise ApiError(
                404, f"model `{name}` is not served here, but `{served}` is", param="model", code="model_not_found"
            )

    def _card(self) -> dict[str, Any]:
        return model_card(self._service.model_name, self._started, self._engine.max_model_len)
