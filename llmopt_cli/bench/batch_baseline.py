"""transformers' continuous batching as a target: the manager behind `model.generate_batch`, in the engine's process.

Requests are handed to it as they come, as to our engine. Its cache is bounded: with its default it is several times
slower on a CPU, and what is compared is batching, not defaults.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from llmopt_cli.bench.baseline import load_plain
from llmopt_cli.bench.metrics import Chunk, Reply
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.errors import ServerError, UsageError
from llmopt_cli.runtime import Engine
from llmopt_cli.runtime.async_engine import release_threads

BLOCK, BLOCKS, STEP_TOKENS = 16, 256, 256
NO_END = -1  # what it takes for "no end token"


class GenerateBatchTarget:
    """The engine's checkpoint, dtype and device; as many requests at once as the engine batches, greedily."""

    name = "generate_batch"
    remembers = False
    at_once: int | None = None

    def __init__(self, engine: Engine) -> None:
        self.model = engine.checkpoint.name
        self.context: int | None = engine.max_model_len
        self.encode: Callable[[str], list[int]] | None = engine.tokenizer.encode
        self._eos = sorted(engine.tokenizer.eos_ids)
        self._plain = load_plain(engine)
        blocks = max(BLOCKS, 2 * -(-engine.max_model_len // BLOCK))
        self._bounds = ContinuousBatchingConfig(num_blocks=blocks, page_size=BLOCK, max_batch_tokens=STEP_TOKENS)
        self._manager: Any = None
        self._ids = itertools.count()

    async def __aenter__(self) -> Self:
        release_threads()  # of this thread: the manager has one of its own
        settings = GenerationConfig(do_sample=False, eos_token_id=NO_END, max_new_tokens=1)
        self._manager = self._plain.init_continuous_batching(settings, self._bounds)
        self._manager.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._manager.stop, block=True)
        self._manager.destroy()

    async def send(self, ask: Ask) -> Reply:
        """Stream through the manager; raises ServerError if it fails, UsageError for draws."""
        if ask.params.temperature:
            raise UsageError("generate_batch is compared on greedy requests", "set the workload's temperature to 0")
        name, arrived = f"ask-{next(self._ids)}", asyncio.Queue[Any]()
        self._manager.register_result_handler(name, arrived.put_nowait)
        ends = NO_END if ask.params.ignore_eos else self._eos
        wanted = ask.params.max_tokens
        self._manager.add_request(list(ask.prompt), name, wanted, streaming=True, eos_token_id=ends)
        try:
            return Reply(tuple(await self._stamped(arrived)), len(ask.prompt))
        except asyncio.CancelledError:
            self._manager.cancel_request(name)
            raise

    async def _stamped(self, arrived: asyncio.Queue[Any]) -> list[Chunk]:
        """When each token of one request came; what comes is cumulative."""
        chunks: list[Chunk] = []
        known = 0
        while True:
            output = await arrived.get()
            if output.error:
                raise ServerError(f"generate_batch failed: {output.error}")
            if new := len(output.generated_tokens) - known:
                chunks.append(Chunk(time.perf_counter(), new))
                known += new
            if output.is_finished():
                return chunks
