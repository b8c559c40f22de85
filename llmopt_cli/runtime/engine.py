"""The engine: schedule, run, sample, post-process. Synchronous; `async_engine` puts it on a thread.

Knows requests, tokens and text; nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from llmopt_cli.errors import CapacityError, UsageError
from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.output import Report
from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.grammar import Constraint, GrammarCompiler
from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.kv_cache import cache_dtype, hang_cache, release_cache, size_cache
from llmopt_cli.runtime.live import Live, next_tokens
from llmopt_cli.runtime.request import Request, RequestOutput, SamplingParams
from llmopt_cli.runtime.runner import ModelRunner
from llmopt_cli.runtime.scheduler import Chunk, SchedulerState, schedule
from llmopt_cli.runtime.stats import EngineStats
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Recipe


class Engine:
    """Continuous batching of one model over one paged cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        batching: Batching,
        kv_cache_dtype: str = "auto",
    ) -> None:
        spec = checkpoint.spec
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.dtype, self.device = loaded.dtype, loaded.device
        self.max_model_len = batching.max_model_len or spec.max_context
        if self.max_model_len > spec.max_context:
            raise UsageError(
                f"--max-model-len {self.max_model_len} is above the model's own limit of {spec.max_context:,} tokens",
                "give at most that, or leave the flag out",
            )
        self.batching = replace(batching, max_model_len=self.max_model_len)
        self.kv_dtype = cache_dtype(kv_cache_dtype, loaded.dtype)
        self.cache_size = size_cache(spec, batching, self.max_model_len, self.kv_dtype, loaded.device)
        self._layers = paged_layers(loaded.model)
        hang_cache(self._layers, self.cache_size, self.kv_dtype, loaded.device)
        self._loaded = loaded
        self._runner = ModelRunner(loaded, batching.block_size)
        share = batching.enable_prefix_caching
        self._state = SchedulerState(self.batching, BlockPool(self.cache_size.num_blocks), share_prefixes=share)
        self._seed = os.urandom(16)  # so that nobody can make up prompts whose hashes meet
        self._live: dict[str, Live] = {}
        self._journal: Journal | None = None
        self._compiler: GrammarCompiler | None = None
        self._compiling = Lock()
        self._ids = itertools.count()
        self._preemptions = self._prompt_tokens = self._generation_tokens = self._queries = self._hits = 0

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Checkpoint,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_cache_dtype: str = "auto",
        batching: Batching | None = None,
        trust_remote_code: bool = False,
        report: Report | None = None,
    ) -> Self:
        """Load `model` (a folder, a hub id, `demo`) and size its cache."""
        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
        tokenizer = Tokenizer(checkpoint, trust_remote_code)
        cache_dtype(kv_cache_dtype, torch.float32)  # a wrong name is told before the weights are read
        loaded = load_model(checkpoint, dtype, device, trust_remote_code, report)
        return cls(checkpoint, loaded, tokenizer, batching or Batching(), kv_cache_dtype)

    @classmethod
    def from_recipe(cls, recipe: Recipe, trust_remote_code: bool = False, report: Report | None = None) -> Self:
        """Load the model of a deployment; raises UsageError for what this engine does not do."""
        _refuse_foreign(recipe)
        return cls.from_pretrained(
            recipe.model,
            dtype=recipe.dtype,
            device=recipe.device,
            kv_cache_dtype=recipe.kv_cache_dtype,
            batching=recipe.batching,
            trust_remote_code=trust_remote_code,
            report=report,
        )

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        report: Report | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt (text or token ids); outputs in the order of the prompts."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts with {len(each)} sets of sampling parameters")
        encoded = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        for ids, one in zip(encoded, each, strict=True):
            self.check(ids, one)
        order: list[str] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for ids, one in zip(encoded, each, strict=True):
                order.append(self.add_request(ids, one))
            while len(finished) < len(order):
                outputs = (output for output in self.step() if output.finished and output.request_id in order)
                finished |= {output.request_id: output for output in outputs}
                if report:
                    report(len(finished), len(order))
        finally:
            for request_id in order:  # after Ctrl-C; those that finished are gone already
                self.abort(request_id)
        return [finished[request_id] for request_id in order]

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise CapacityError or UsageError for a request that can never run."""
        if not prompt_ids:
            raise UsageError("the prompt has no tokens")
        if len(prompt_ids) >= self.max_model_len:
            raise CapacityError(
                f"the prompt has {len(prompt_ids):,} tokens and the context is {self.max_model_len:,}",
                "shorten the prompt" if self._at_limit() else "raise `--max-model-len`, or shorten the prompt",
            )
        vocabulary = self.checkpoint.spec.vocab_size
        named = (*prompt_ids, *params.allowed_token_ids, *(token for token, _ in params.logit_bias))
        strange = next((token for token in named if not 0 <= token < vocabulary), None)
        if strange is not None:
            raise UsageError(f"token id {strange} is outside the vocabulary of {vocabulary:,}")

    def compile(self, params: SamplingParams) -> Constraint | None:
        """What its grammar makes of a request, if it has one; UsageError if it is wrong. May take long: any thread."""
        if params.grammar is None:
            return None
        with self._compiling:
            if self._compiler is None:
                tokenizer, vocab_size = self.tokenizer, self.checkpoint.spec.vocab_size
                self._compiler = GrammarCompiler(tokenizer.backend, vocab_size, tokenizer.eos_ids)
        return self._compiler.compile(params.grammar)

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        constraint: Constraint | None = None,
    ) -> str:
        """Queue a request; returns its id. Raises what `check` and `compile` raise.

        `constraint` is what `compile` made of it, if that was done already.
        """
        self.check(prompt_ids, params)
        constraint = constraint or self.compile(params)
        request_id = request_id or f"request-{next(self._ids)}"
        if request_id in self._live:
            raise UsageError(f"request id `{request_id}` is already running")
        salt = hashlib.blake2b(params.cache_salt.encode(), key=self._seed, digest_size=16).digest()
        deadline = None if params.max_seconds is None else time.monotonic() + params.max_seconds
        request = Request(
            request_id,
            list(prompt_ids),
            len(prompt_ids),
            params,
            salt=salt,
            priority=params.priority,
            deadline=deadline,
        )
        self._live[request_id] = Live.start(request, self.tokenizer, self.max_model_len, constraint)
        self._state.add(request)
        if self._journal:
            self._journal.add(request)
        self._prompt_tokens += len(prompt_ids)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Schedule, run, sample, post-process: one token for every request that was computed to its end."""
        self._state.now = time.monotonic()
        plan = schedule(self._state)
        if self._journal and (plan.chunks or plan.expired):
            self._journal.plan(self._state.now, plan)
        self._preemptions += len(plan.preempted)
        late = [self._live.pop(request_id).fail("its time was up") for request_id in plan.expired]
        if not plan.chunks:
            return late
        try:
            logits = self._runner.run(plan.chunks, {key: live.request for key, live in self._live.items()})
        except BaseException:
            self.abort_all()  # the plan counts tokens as computed that never were: nobody may go on from there
            raise
        ready, logits = self._score_prompts(plan.chunks, logits)
        outputs = next_tokens(ready, logits)
        for live, output in zip(ready, outputs, strict=True):
            self._count(live, output)
        if any(output.finished for output in outputs):
            self._state.running = [r for r in self._state.running if r.request_id in self._live]
        return late + outputs

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; an unknown id is one that already ended."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        self._state.drop(live.request)
        if self._journal:
            self._journal.drop(request_id)

    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._live)

    def stats(self) -> EngineStats:
        """The load now and the totals since start."""
        blocks = self._state.blocks
        return EngineStats(
            num_running=len(self._state.running),
            num_waiting=len(self._state.waiting),
            kv_cache_usage=1 - blocks.num_free / blocks.num_blocks,
            num_blocks=blocks.num_blocks,
            block_size=self.cache_size.block_size,
            num_preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
        )

    def startup_report(self) -> dict[str, Any]:
        """What was loaded and how memory is shared out; bytes and tokens."""
        return {
            "model": self.checkpoint.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "weights_bytes": self._loaded.weight_bytes,
            "kv_cache_dtype": str(self.kv_dtype).removeprefix("torch."),
            "kv_cache_bytes": self.cache_size.nbytes,
            "kv_cache_tokens": self.cache_size.num_tokens,
            "block_size": self.cache_size.block_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.batching.max_num_seqs,
            "max_num_batched_tokens": self.batching.max_num_batched_tokens,
            "fused": dict(self._loaded.fused),
        }

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left in the cache."""
        self._state.blocks.forget()
        if self._journal:
            self._journal.forget()

    def record(self, path: Path) -> None:
        """Log what the scheduler is given and what it plans from now on, for `replay`. Only while nothing runs."""
        assert not self._live, "a log begins with an empty engine"
        self.reset_prefix_cache()
        self._journal = Journal.open(path, self._state)

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler and blocks; meant for idle moments and tests."""
        self._state.check_integrity()

    def abort_all(self) -> None:
        """Drop every request."""
        for request_id in list(self._live):
            self.abort(request_id)

    def close(self) -> None:
        """Drop every request and let go of the cache."""
        self.abort_all()
        if self._journal:
            self._journal.close()
        release_cache(self._layers)

    def _score_prompts(self, chunks: Sequence[Chunk], logits: Tensor) -> tuple[list[Live], Tensor]:
        """Take out the rows that score prompts; returns the requests that sample, and their rows."""
        ready: list[Live] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            live = self._live[chunk.request_id]
            if chunk.scored:
                live.score(chunk.start, logits[row : row + chunk.length])
            row += chunk.num_logits
            if chunk.samples:
                ready.append(live)
                rows.append(row - 1)
        return ready, logits[rows] if len(rows) < len(logits) else logits

    def _count(self, live: Live, output: RequestOutput) -> None:
        """Keep the totals, and let a request go that has ended."""
        request = live.request
        self._generation_tokens += output.num_new_tokens
        if len(output.token_ids) <= 1:
            self._queries += request.num_prompt if self.batching.enable_prefix_caching else 0
            self._hits += request.num_hit or 0
        if self._journal and not output.error:
            self._journal.take(request.request_id, request.token_ids[-1], output.finished)
        elif self._journal:
            self._journal.drop(request.request_id)
        if output.finished:
            # What a failure computed is not to be found by others.
            (self._state.release if output.error else self._state.finish)(request)
            del self._live[request.request_id]

    def _at_limit(self) -> bool:
        return self.max_model_len >= self.checkpoint.spec.max_context


def _refuse_foreign(recipe: Recipe) -> None:
    """What a recipe may ask of other engines, and this one would have to ignore."""
    asked = {
        f"the engine {recipe.engine}": recipe.engine != "llmopt",
        f"tensor_parallel_size {recipe.tensor_parallel_size}": (recipe.tensor_parallel_size or 1) > 1,
        f"pipeline_parallel_size {recipe.pipeline_parallel_size}": recipe.pipeline_parallel_size > 1,
        "speculation": recipe.speculation is not None,
    }
    if foreign := [name for name, applies in asked.items() if applies]:
        raise UsageError(f"the recipe asks for {foreign[0]}, which llmopt's engine does not have", "take it out")
