"""What can be measured: the seam, and the engine in this process behind it.

A target sends one request, stamps the tokens as they come, and keeps no statistics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from llmopt_cli.bench.drafts import Totals, totals
from llmopt_cli.bench.metrics import Chunk, Reply
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.runtime import AsyncEngine, Engine


class Target(Protocol):
    """Something to send requests to, open while it is a context. `model` is what answers there.

    `context` is its limit in tokens, `encode` its tokenizer; both None if unknown. `remembers` is whether prompts of
    earlier runs may still lie in its prefix cache.
    """

    name: str
    model: str
    context: int | None
    encode: Callable[[str], list[int]] | None
    remembers: bool

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def send(self, ask: Ask) -> Reply:
        """The whole answer, once it is complete. Raises LlmoptError; may be cancelled at any time."""
        ...


class Baseline(Target, Protocol):
    """What a target is compared with: it answers `at_once` requests, or with None as many as come."""

    at_once: int | None


class EngineTarget:
    """The engine in this process: no HTTP in the figures."""

    name = "engine"
    remembers = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model = engine.checkpoint.name
        self.context: int | None = engine.max_model_len
        self.encode: Callable[[str], list[int]] | None = engine.tokenizer.encode

    async def __aenter__(self) -> Self:
        self._running = AsyncEngine(self._engine)
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.__aexit__(kind, error, trace)

    async def send(self, ask: Ask) -> Reply:
        """Stream through the engine; raises CapacityError or ServerError."""
        assert not isinstance(ask.prompt, str), "the engine takes token ids"
        chunks, prompt_tokens, cached_tokens = [], 0, 0
        async for output in self._running.stream(ask.prompt, ask.params):
            if output.num_new_tokens:
                chunks.append(Chunk(time.perf_counter(), output.num_new_tokens))
            prompt_tokens, cached_tokens = output.num_prompt_tokens, output.num_cached_tokens
        return Reply(tuple(chunks), prompt_tokens, cached_tokens)

    async def drafted(self) -> Totals | None:
        """See `Drafting`."""
        tally = self._engine.stats().speculation
        return totals(tally) if tally else None
