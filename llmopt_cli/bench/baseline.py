"""Plain transformers as a target: `model.generate`, one request after another, in the process of the engine.

It is what people compare with, not a strong opponent: no batching, no packing, eager modules.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from llmopt_cli.bench.metrics import Chunk, Reply
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.errors import ModelError
from llmopt_cli.runtime import Engine
from llmopt_cli.runtime.async_engine import release_threads


def load_plain(engine: Engine) -> Any:
    """The engine's checkpoint as transformers loads it, in the engine's dtype and place; ModelError if it can't."""
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(engine.checkpoint.path, dtype=engine.dtype)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(
            f"transformers cannot load `{engine.checkpoint.name}`, so there is nothing to compare with: {error}",
            "leave --against out, or compare the unquantized model",
        ) from None
    return model.to(engine.device).eval()


class TransformersTarget:
    """The engine's checkpoint, dtype and device under `generate`. A cancelled request ends at its next token."""

    name = "transformers"
    remembers = False
    at_once: int | None = 1

    def __init__(self, engine: Engine) -> None:
        self.model = engine.checkpoint.name
        self.context: int | None = engine.max_model_len
        self.encode: Callable[[str], list[int]] | None = engine.tokenizer.encode
        self._eos = sorted(engine.tokenizer.eos_ids)
        self._model = load_plain(engine)
        # `generate` fills what a config leaves open from the model's own: there a None could not mean "no end token".
        self._model.generation_config = GenerationConfig()
        self._one_at_a_time = asyncio.Lock()

    async def __aenter__(self) -> Self:
        release_threads()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def send(self, ask: Ask) -> Reply:
        """Generate in a thread, so that the loop can stop it."""
        stamps = _Stamps()
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(self._generate, ask, stamps)
            except asyncio.CancelledError:
                stamps.cancelled = True
                raise
        return Reply(tuple(stamps.chunks), len(ask.prompt))

    def _generate(self, ask: Ask, stamps: _Stamps) -> None:
        params = ask.params
        prompt = torch.tensor([list(ask.prompt)], device=self._model.device)
        config = GenerationConfig(
            max_new_tokens=params.max_tokens,
            eos_token_id=None if params.ignore_eos else self._eos,
            pad_token_id=0,
            do_sample=params.temperature > 0,
        )
        if params.temperature:
            config.update(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
            torch.manual_seed(params.seed or 0)
        mask = torch.ones_like(prompt)
        try:
            self._model.generate(prompt, attention_mask=mask, generation_config=config, streamer=stamps)
        except _Cancelled:
            return
        finally:
            release_threads()  # this thread is kept for later, and is not to slow down whoever is measured in between


class _Cancelled(Exception):
    """Leaves `generate` from inside."""


class _Stamps:
    """A streamer of transformers: notes when new tokens are known. The first call of `put` brings the prompt."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.cancelled = False
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.cancelled:
            raise _Cancelled
        if self._seen_prompt:
            self.chunks.append(Chunk(time.perf_counter(), value.numel()))
        self._seen_prompt = True

    def end(self) -> None:
        pass
