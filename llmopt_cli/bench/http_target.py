"""A server that speaks OpenAI's completions API as a target: connections, the event stream, whose tokens came when.

Knows HTTP and server-sent events; what the times mean is the business of `metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from llmopt_cli.bench.drafts import Totals, read_metrics
from llmopt_cli.bench.metrics import Chunk, Reply
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.errors import ServerError, UsageError


class Model(BaseModel):
    """One entry of the server's list; `max_model_len` is vLLM's addition to OpenAI's."""

    id: str
    max_model_len: PositiveInt | None = None


class Models(BaseModel):
    """What a server can be asked for."""

    data: list[Model]


class CachedTokens(BaseModel):
    """The part of a prompt that was in a cache."""

    cached_tokens: NonNegativeInt | None = None


class Usage(BaseModel):
    """Tokens so far, or in all."""

    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None
    prompt_tokens_details: CachedTokens | None = None


class Choice(BaseModel):
    """A piece of an answer."""

    text: str | None = None


class Event(BaseModel):
    """One server-sent event of a completion, as far as it matters here. `error` has another shape on every server."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


class HttpTarget:
    """A server at `base_url` (with or without `/v1`), asked over one connection per request under way.

    `served_model=None` takes the first one the server lists. Without `encode` prompts are sent as text.
    """

    remembers = True

    def __init__(
        self,
        base_url: str,
        served_model: str | None = None,
        api_key: str | None = None,
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.name = base_url.rstrip("/").removesuffix("/v1")
        self.context: int | None = None
        self.encode = encode
        self.model = served_model or ""
        self._client = _connect(f"{self.name}/v1/", api_key)

    async def __aenter__(self) -> Self:
        try:
            models = await self._models()
        except ServerError:
            await self._client.aclose()
            raise
        self.model = self.model or next(iter(models), "")
        self.context = models.get(self.model)
        return self

    async def _models(self) -> dict[str, int | None]:
        """The context of each model there, None if it is not told."""
        try:
            answer = await self._client.get("models")
            if answer.status_code != 200:
                raise _refusal(answer)
            return {model.id: model.max_model_len for model in Models.model_validate_json(answer.content).data}
        except httpx.HTTPError as error:
            reason = f"no server answers at {self.name}: {error or type(error).__name__}"
            raise ServerError(reason, "start one with `llmopt serve`, or check --base-url") from None
        except ValidationError:
            raise ServerError(f"{self.name} does not speak OpenAI's API: it lists no models") from None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, ask: Ask) -> Reply:
        """Stream one completion; raises ServerError with the server's own words."""
        tally = Tally()
        try:
            async with self._client.stream("POST", "completions", json=self._body(ask)) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _refusal(answer)
                async for text in answer.aiter_text():
                    tally.add(time.perf_counter(), text)
        except httpx.HTTPError as error:
            raise ServerError(f"the answer of {self.name} broke off: {error or type(error).__name__}") from None
        return tally.reply()

    async def drafted(self) -> Totals | None:
        """See `Drafting`: from the server's metrics, which not every server has."""
        try:
            answer = await self._client.get(f"{self.name}/metrics")
        except httpx.HTTPError:
            return None
        return read_metrics(answer.text) if answer.status_code == 200 else None

    def _body(self, ask: Ask) -> dict[str, Any]:
        params = ask.params
        optional = {"seed": params.seed, "ignore_eos": params.ignore_eos or None}  # not every server knows ignore_eos
        return {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        } | {name: value for name, value in optional.items() if value is not None}


class Read(NamedTuple):
    """What one read from the socket brought; `told` is the count of tokens so far, if the server says it as it goes."""

    at: float
    events: int
    told: int | None


class Tally:
    """Counts the tokens of a server-sent event stream, read by read.

    Events that come in one read came at one time, so they make one chunk. How many tokens it holds is told by the
    usage in the events; else the total at the end is shared out; else each event with text counts for a token.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._usage = Usage()
        self._reads: list[Read] = []

    def add(self, at: float, text: str) -> None:
        """Take what was read at time `at`; it may end amid a line. Raises ServerError if the server gives up."""
        *lines, self._rest = (self._rest + text).split("\n")
        data = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        events = [_event(item) for item in data if item != "[DONE]"]
        self._usage = next((event.usage for event in reversed(events) if event.usage), self._usage)
        answers = [(event.choices[0].text, event.usage) for event in events if event.choices]
        if answers:
            _, usage = answers[-1]
            told = usage.completion_tokens if usage else None
            self._reads.append(Read(at, sum(bool(text) for text, _ in answers), told))

    def reply(self) -> Reply:
        """The chunks with their tokens; raises ServerError if there are none."""
        with_text = sum(read.events for read in self._reads)
        total = with_text if self._usage.completion_tokens is None else self._usage.completion_tokens
        if not self._reads or not total:
            raise ServerError("the server answered without a single token")
        counts = [read.told for read in self._reads if read.told is not None]
        exact = len(counts) == len(self._reads)
        if not exact:
            shares = accumulate(read.events for read in self._reads[:-1])
            counts = [round(total * share / max(with_text, 1)) for share in shares] + [total]
        pairs = zip(self._reads, pairwise([0, *counts]), strict=True)
        details = self._usage.prompt_tokens_details or CachedTokens()
        return Reply(
            chunks=tuple(Chunk(read.at, after - before) for read, (before, after) in pairs if after > before),
            prompt_tokens=self._usage.prompt_tokens or 0,
            cached_tokens=details.cached_tokens or 0,
            interpolated=not exact and total != len(self._reads),
        )


def _connect(url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client for `url`; raises UsageError if no server can be at it, or the key in no header."""
    try:
        if (httpx.URL(url).port or 0) > 65535:  # httpx would fail only on connecting, and with an OverflowError
            raise httpx.InvalidURL("a port is at most 65535")
        return httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(600, connect=10),
            limits=httpx.Limits(max_connections=None),
        )
    except httpx.InvalidURL as error:
        raise UsageError(f"--base-url is no URL: {error}", "for example `http://localhost:8000`") from None
    except UnicodeEncodeError:
        raise UsageError("an API key consists of ASCII characters", "check --api-key and LLMOPT_API_KEY") from None


def _event(text: str) -> Event:
    """The event in `text`; raises ServerError if it tells of an error or is none."""
    try:
        event = Event.model_validate_json(text)
    except ValidationError:
        raise ServerError(f"the server sent what is no event of a completion: {text[:200]}") from None
    if event.error:
        raise ServerError(f"the server gave up: {_words(event.error)}")
    return event


def _refusal(answer: httpx.Response) -> ServerError:
    """The server's own words, if there are any."""
    try:
        words = _words(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        words = answer.text[:200] or answer.reason_phrase
    return ServerError(f"{answer.url.host} answered {answer.status_code}: {words}")


def _words(error: Any) -> str:
    """What an error says, in OpenAI's shape or any other."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
