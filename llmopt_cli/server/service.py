"""The engine as every HTTP face sees it: who is let in, what is measured, whether it still makes progress.

Knows the async engine and the metrics; no route, no protocol's JSON.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt_cli.errors import CapacityError, UsageError
from llmopt_cli.runtime.request import RequestOutput, SamplingParams
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.metrics import Metrics, RequestClock
from llmopt_cli.server.streaming import merged
from llmopt_cli.spec.kv_policy import KvPolicy

if TYPE_CHECKING:
    from llmopt_cli.runtime import AsyncEngine

LONGEST_RETRY = 60


@dataclass(frozen=True, slots=True)
class Settings:
    """How the server behaves towards its clients; how the model runs is the recipe's business. Times in seconds."""

    served_model_name: str | None = None  # None: the checkpoint's own
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_num_queued_reqs: int = 512
    shutdown_timeout: float = 30.0
    schedule_log: Path | None = None
    kv_policy: KvPolicy | None = None  # of requests that name none


def retry_after(ends: Sequence[float]) -> int:
    """Seconds until a place may be free: the mean gap between the times at which the latest requests ended."""
    if len(ends) < 2:
        return 1
    gap = (ends[-1] - ends[0]) / (len(ends) - 1)
    return min(max(math.ceil(gap), 1), LONGEST_RETRY)


class Service:
    """One running engine behind any number of faces. `draining` is set once, when the server begins to stop."""

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.model_name = settings.served_model_name or engine.engine.checkpoint.name
        if self.model_name in engine.engine.adapters:
            raise UsageError(f"model and adapter are both called `{self.model_name}`", "give `--served-model-name`")
        self.metrics = Metrics(self.model_name, engine.engine.max_model_len, engine.stats)
        self.draining = False
        self.in_flight = 0
        self._most = engine.engine.batching.max_num_seqs + settings.max_num_queued_reqs
        self._ends: deque[float] = deque(maxlen=32)
        self._ids = itertools.count()

    async def run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], answers: int = 1
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Outputs of all prompts as they come, each with its index. Closing it aborts what still runs.

        Each prompt has that many `answers` with a random stream each, one after the other in the order of indices.
        The first iteration raises ApiError if the request is not let in, CapacityError or UsageError if the engine
        refuses it; a later one ServerError when the engine stops or dies.
        """
        count = len(prompts) * answers
        self._admit(count, "prompt" if answers == 1 else "n")
        if not self.in_flight:
            self._ends.clear()  # the gap to an earlier busy time says nothing of this one
        self.in_flight += count
        try:
            streams = [
                stream
                for ids, wanted in zip(prompts, params, strict=True)
                for stream in self._several(ids, wanted, answers)
            ]
            async with aclosing(merged(streams)) as outputs:
                async for item in outputs:
                    yield item
        finally:
            self.in_flight -= count
            self._ends.append(time.monotonic())

    def _admit(self, count: int, param: str) -> None:
        if self.draining:
            self.metrics.rejected("draining")
            raise ApiError(503, "the server is shutting down", code="draining")
        if count > self._most:
            raise ApiError(400, f"{count} answers in one request, at most {self._most} are served", param=param)
        if self.in_flight + count > self._most:
            self.metrics.rejected("queue_full")
            raise ApiError(
                429,
                f"{self.in_flight} requests run or wait and at most {self._most} may; try again later",
                code="queue_full",
                retry_after=retry_after(self._ends),
            )

    def _several(
        self, prompt_ids: Sequence[int], params: SamplingParams, answers: int
    ) -> list[AsyncGenerator[RequestOutput, None]]:
        """The streams of one prompt's answers, which share what is computed of the prompt."""
        name = f"served-{next(self._ids)}"
        first = self._measured(prompt_ids, params, name, None)
        others = [self._measured(prompt_ids, params.child(i), f"{name}.{i}", name) for i in range(1, answers)]
        return [first, *others]

    async def _measured(
        self, prompt_ids: Sequence[int], params: SamplingParams, name: str, twin: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        clock = RequestClock(self.metrics)
        output: RequestOutput | None = None
        refused = False
        try:
            async with aclosing(self.engine.stream(prompt_ids, params, name, twin)) as outputs:
                async for output in outputs:
                    clock.saw(output)
                    yield output
        except (CapacityError, UsageError):
            refused = True
            self.metrics.rejected("invalid")
            raise
        finally:
            if not refused:
                clock.ended(output, params)

    def unhealthy(self) -> str | None:
        """Why the engine can't answer any more, or None."""
        if self.engine.failure is not None:
            return f"the engine died: {self.engine.failure}"
        return self.engine.stalled

    def unready(self) -> str | None:
        """Why no new request is let in, or None."""
        return "the server is shutting down" if self.draining else self.unhealthy()
