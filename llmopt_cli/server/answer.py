"""One answer in the making: what its outputs become, as a whole or as a stream, in OpenAI's words.

Knows outputs and what of them was asked for; no socket and no route. Outputs come with the index of what was drawn;
choices are numbered as clients see them: the `n` of the first prompt, then those of the second.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from llmopt_cli.errors import LlmoptError
from llmopt_cli.runtime.request import FinishReason, RequestOutput, TokenLogprobs
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.logprobs import Worder
from llmopt_cli.server.protocol import ChatRequest, CompletionRequest, usage
from llmopt_cli.server.sampling import StreamOptions

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, slots=True)
class Face:
    """How one of the two endpoints words its answers.

    `whole(text)` is what a choice of a complete answer holds, `piece(text, first)` one of a stream, `first` marking the
    choice's first piece.
    """

    id_prefix: str
    whole_object: str
    piece_object: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str, bool], dict[str, Any]]


CHAT = Face(
    id_prefix="chatcmpl-",
    whole_object="chat.completion",
    piece_object="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    piece=lambda text, first: {"delta": {"role": "assistant", "content": text} if first else {"content": text}},
)
COMPLETION = Face(
    id_prefix="cmpl-",
    whole_object="text_completion",
    piece_object="text_completion",
    whole=lambda text: {"text": text},
    piece=lambda text, first: {"text": text},
)


@dataclass(slots=True)
class _Sent:
    """How much of a choice has gone out: tokens, and characters of its text by its tokens."""

    tokens: int = 0
    characters: int = 0


@dataclass
class Answer:
    """The answer to `body`: to its `prompts`, token ids, before whose answers the texts `echoes` are put."""

    body: ChatRequest | CompletionRequest
    model: str
    prompts: Sequence[Sequence[int]]
    echoes: Sequence[str]
    worder: Worder
    latest: dict[int, RequestOutput] = field(default_factory=dict)
    sent: dict[int, _Sent] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def face(self) -> Face:
        """The endpoint's way to say it."""
        return CHAT if isinstance(self.body, ChatRequest) else COMPLETION

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        """The answer in one piece. A request that failed is raised as ApiError."""
        async with aclosing(outputs):
            async for index, output in outputs:
                self._receive(index, output)
        choices = [self._whole(index, output) for index, output in enumerate(self._picked())]
        answer = self._envelope(self.face.whole_object, choices) | {"usage": self._usage()}
        if isinstance(self.body, ChatRequest) and self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(self.latest[0])
        return answer

    async def events(self, outputs: Outputs, options: StreamOptions) -> AsyncGenerator[str, None]:
        """The answer as JSON chunks, then OpenAI's end mark.

        An error before the first chunk is raised, as the response can still be that error; a later one is a chunk.
        """
        try:
            async with aclosing(outputs):
                async for index, output in outputs:
                    for chunk in self._chunks(index, self._receive(index, output)):
                        if options.continuous_usage_stats:
                            chunk["usage"] = self._usage()
                        elif options.include_usage:
                            chunk["usage"] = None
                        yield _dump(chunk)
            if options.include_usage:
                yield _dump(self._envelope(self.face.piece_object, []) | {"usage": self._usage()})
        except (LlmoptError, ApiError) as error:
            if not self.latest:
                raise
            yield _dump((ApiError.of(error) if isinstance(error, LlmoptError) else error).body())
        yield "[DONE]"

    def _receive(self, index: int, output: RequestOutput) -> RequestOutput:
        """Keep the latest output of each; one that failed raises ApiError."""
        if output.error:
            raise ApiError.of_output(output)
        if isinstance(self.body, CompletionRequest) and self.body.echo_only:
            output = replace(
                output, text="", delta="", token_ids=(), logprobs=(), beams=(), finish_reason=FinishReason.LENGTH
            )
        self.latest[index] = output
        return output

    def _picked(self) -> list[RequestOutput]:
        """What was drawn, as choices: of several answers to a prompt the best `n`, by log-probability per token."""
        picked: list[RequestOutput] = []
        for first in range(0, len(self.latest), self.body.answers):
            drawn = [self.latest[index] for index in range(first, first + self.body.answers)]
            drawn = _spread(drawn[0], self.body.n) if drawn[0].beams else drawn
            if self.body.ranked:
                drawn = sorted(drawn, key=_mean_logprob, reverse=True)[: self.body.n]
            picked += drawn
        return picked

    def _whole(self, index: int, output: RequestOutput) -> dict[str, Any]:
        echo = self.echoes[index // self.body.n]
        choice = self._choice(index, output, self.face.whole(echo + output.text))
        if isinstance(self.body, CompletionRequest) and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(output)
        return choice

    def _chunks(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks that an output adds: one, or one for each of the beams that end together."""
        chunks = []
        spread = _spread(output, self.body.n) if output.beams else [output]
        for choice, part in enumerate(spread, start=index * self.body.n if output.beams else index):
            first = choice not in self.sent
            text = self.echoes[choice // self.body.n] + part.delta if first else part.delta
            told = self._choice(choice, part, self.face.piece(text, first))
            chunks.append(self._envelope(self.face.piece_object, [told]))
        return chunks

    def _choice(self, index: int, output: RequestOutput, content: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(index, output),
            "finish_reason": output.finish_reason,
        }

    def _logprobs(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """Those of the tokens that have not gone out yet; an echoed prompt's go with the first."""
        first = index not in self.sent
        sent, told = self.sent.setdefault(index, _Sent()), self.body.told
        if told is None:
            return None
        fresh: list[TokenLogprobs | int] = list(output.logprobs[sent.tokens :])
        sent.tokens = len(output.logprobs)
        if isinstance(self.body, ChatRequest):
            return self.worder.chat(output.logprobs[len(output.logprobs) - len(fresh) :])
        if first and self.body.echo:
            prompt, echo = self.prompts[index // self.body.n], self.echoes[index // self.body.n]
            fresh = [prompt[0], *_cut(output.prompt_logprobs or (), told), *fresh]
            sent.characters = len(echo) - self.worder.length(prompt)  # some tokenizers put a space before a text
        worded = self.worder.completion(fresh, sent.characters)
        sent.characters += self.worder.length([one if isinstance(one, int) else one.token for one in fresh])
        return worded

    def _prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None]:
        return self.worder.prompt(_cut(output.prompt_logprobs or (), self.body.prompt_logprobs or 0))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.face.id_prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, however many answers it has; every token that was drawn counts."""
        asked = [output for index, output in self.latest.items() if index % self.body.answers == 0]
        drawn = [part for output in self.latest.values() for part in _spread(output, self.body.n)]
        return usage(
            prompt_tokens=sum(output.num_prompt_tokens for output in asked),
            completion_tokens=sum(len(output.token_ids) for output in drawn),
            cached_tokens=sum(output.num_cached_tokens for output in asked),
        )


def _spread(output: RequestOutput, most: int) -> list[RequestOutput]:
    """The beams of an output as outputs of their own, at most so many; without beams itself."""
    if not output.beams:
        return [output]
    return [
        replace(output, text=one.text, delta=one.text, token_ids=one.token_ids, finish_reason=one.finish_reason)
        for one in output.beams[:most]
    ]


def _mean_logprob(output: RequestOutput) -> float:
    return sum(one.logprob for one in output.logprobs) / len(output.logprobs)


def _cut(positions: Sequence[TokenLogprobs], most: int) -> list[TokenLogprobs]:
    """With so many of the likeliest tokens at most."""
    return [replace(one, top=one.top[:most]) for one in positions]


def _dump(data: dict[str, Any]) -> str:
    # ASCII only: some clients split lines at U+2028 and its like, which JSON lets stand unescaped.
    return json.dumps(data, separators=(",", ":"))
