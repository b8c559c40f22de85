"""The engine: schedule, run, sample, post-process. Synchronous; `async_engine` puts it on a thread.

Knows requests, tokens and text; nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Self

from llmopt_cli.errors import CapacityError, UsageError
from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import LoadedModel, context_limit, load_model, pick_device, pick_dtype, read_config
from llmopt_cli.model.lora import Loras
from llmopt_cli.output import Report
from llmopt_cli.runtime.answers import Answers
from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.budget import share_out
from llmopt_cli.runtime.compression.compressor import Compressor
from llmopt_cli.runtime.grammar import Constraint, GrammarCompiler
from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.kv_cache import cache_dtype, check_layers, copy_blocks, hang_cache, needs_of, release_cache
from llmopt_cli.runtime.kv_scales import read_scales
from llmopt_cli.runtime.opening import refuse_foreign, with_length
from llmopt_cli.runtime.probe import free_memory, total_memory
from llmopt_cli.runtime.request import Request, RequestOutput, SamplingParams
from llmopt_cli.runtime.runner import ModelRunner
from llmopt_cli.runtime.scheduler import SchedulerState, schedule
from llmopt_cli.runtime.speculative.build import make_proposer, open_drafter, refuse_unfit
from llmopt_cli.runtime.speculative.proposer import Proposer
from llmopt_cli.runtime.speculative.speculator import Speculator
from llmopt_cli.runtime.stats import EngineStats
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.adapter import Adapter
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Recipe, Speculation


class Engine:
    """Continuous batching of one model over one paged cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        batching: Batching,
        kv_cache_dtype: str = "auto",
        adapters: Sequence[Adapter] = (),
        speculation: Speculation | None = None,
    ) -> None:
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.dtype, self.device = loaded.dtype, loaded.device
        self.batching = with_length(batching, context_limit(checkpoint))
        self.max_model_len, self.kv_dtype = self.batching.max_model_len or 0, cache_dtype(kv_cache_dtype, loaded.dtype)
        self._loras = Loras(loaded.model, adapters)
        self.adapters = self._loras.names
        weights = loaded.weight_bytes + self._loras.nbytes
        needs = needs_of(checkpoint, self.batching, loaded.dtype, self.kv_dtype, weights)
        self._layers = paged_layers(loaded.model)
        check_layers(self._layers, needs, self.kv_dtype)
        scales = read_scales(checkpoint, self.kv_dtype)
        drafter = None if speculation is None else open_drafter(speculation, checkpoint, loaded, self.batching)
        own = needs.block_bytes / (needs.block_bytes + (drafter.block_bytes if drafter else 0))
        self.memory = share_out(needs, int(own * free_memory(loaded.device)), total_memory(loaded.device))
        self.cache_size = self.memory.cache
        whole = hang_cache(self._layers, self.cache_size, self.kv_dtype, loaded.device, scales)
        self._loras.hang()
        self._compressor = Compressor(loaded, self._layers, checkpoint, whole, self.batching)
        self._runner = ModelRunner(loaded, batching.block_size, self._loras, self._compressor, batching.deterministic)
        self._speculator: Speculator | None = None
        if speculation is not None:
            proposer = make_proposer(speculation, drafter, loaded, self.cache_size, self.batching)
            self.draft_with(proposer, speculation.num_speculative_tokens, speculation.adaptive)
        blocks = BlockPool(self.cache_size.num_blocks)
        self._state = SchedulerState(self.batching, blocks, share_prefixes=batching.enable_prefix_caching)
        self._loaded, self._speculation = loaded, speculation
        self._answers = Answers(self._state, tokenizer, self.max_model_len)
        self._journal: Journal | None = None
        self._compiler: GrammarCompiler | None = None
        self._compiling, self._ids = Lock(), itertools.count()
        self.num_steps, self._seed = 0, os.urandom(16)  # so that nobody can make up prompts whose hashes meet
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
        adapters: Mapping[str, str | Path] | None = None,
        speculation: Speculation | None = None,
        trust_remote_code: bool = False,
        report: Report | None = None,
    ) -> Self:
        """Load `model` (a folder, a hub id, `demo`) and LoRA `adapters`, folders by name, and size its cache."""
        opened = [Adapter.open(name, folder) for name, folder in (adapters or {}).items()]
        checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
        tokenizer = Tokenizer(checkpoint, trust_remote_code)
        batching = batching or Batching()
        # What is wrong or does not fit is told before the weights are read.
        refuse_unfit(speculation, checkpoint, tokenizer)
        place = pick_device(device)
        kind = pick_dtype(dtype, read_config(checkpoint, trust_remote_code), place)
        kv_dtype = cache_dtype(kv_cache_dtype, kind)
        needs = needs_of(checkpoint, with_length(batching, context_limit(checkpoint)), kind, kv_dtype)
        factors = sum(header.held(kind.itemsize) for adapter in opened for header in adapter.tensors)
        share_out(needs, free_memory(place) - needs.weights - factors, total_memory(place))
        loaded = load_model(checkpoint, dtype, device, trust_remote_code, report)
        return cls(checkpoint, loaded, tokenizer, batching, kv_cache_dtype, opened, speculation)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        trust_remote_code: bool = False,
        report: Report | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Self:
        """Load the model of a deployment; raises UsageError for what this engine does not do."""
        refuse_foreign(recipe)
        return cls.from_pretrained(
            recipe.model,
            dtype=recipe.dtype,
            device=recipe.device,
            kv_cache_dtype=recipe.kv_cache_dtype,
            batching=recipe.batching,
            speculation=recipe.speculation,
            adapters=adapters,
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
        if params.kv_policy is not None:
            self._compressor.check(params.kv_policy)
        if len(prompt_ids) >= params.context(self.max_model_len):
            at_limit = self.max_model_len >= context_limit(self.checkpoint)
            raise CapacityError(
                f"the prompt has {len(prompt_ids):,} tokens and the context is {self.max_model_len:,}",
                f"{'' if at_limit else 'raise `--max-model-len`, or '}shorten the prompt",
            )
        self._loras.require(params.adapter)
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
        twin: str | None = None,
    ) -> str:
        """Queue a request; returns its id. Raises what `check` and `compile` raise.

        `constraint` is what `compile` made of it, if that was done already. `twin` is a request queued before with the
        same prompt, which is then computed once, and its blocks are shared.
        """
        self.check(prompt_ids, params)
        constraint = constraint or self.compile(params)
        request_id = request_id or f"request-{next(self._ids)}"
        if request_id in self._answers.live:
            raise UsageError(f"request id `{request_id}` is already running")
        salt = hashlib.blake2b(params.owner, key=self._seed, digest_size=16).digest()
        deadline = None if params.max_seconds is None else time.monotonic() + params.max_seconds
        request = Request(
            request_id,
            list(prompt_ids),
            len(prompt_ids),
            params,
            salt=salt,
            priority=params.priority,
            deadline=deadline,
            twin=twin if params.kv_policy is None else None,  # what is compressed has one holder
        )
        self._answers.start(request, constraint)
        self._prompt_tokens += len(prompt_ids)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Schedule, run, sample, post-process: a token or more for every request that was computed to its end."""
        self._state.now = time.monotonic()
        if self._speculator:
            self._speculator.draft(self._state.running, self._answers.live, self._journal)
            self._runner.see = self._speculator.see
        plan = schedule(self._state)
        if self._journal and (plan.chunks or plan.expired):
            self._journal.plan(self._state.now, plan)
        self._preemptions += len(plan.preempted)
        late = self._answers.end_late(plan.expired)
        if not plan.chunks:
            return late
        try:
            if plan.changes:
                self._compressor.apply(plan.changes, self._answers.requests(plan.changes))
            copy_blocks(self._layers, plan.copies, self.cache_size.block_size)
            logits = self._runner.run(plan.chunks, self._answers.requests(plan.chunks))
        except BaseException:
            self.abort_all()  # the plan counts tokens as computed that never were: nobody may go on from there
            raise
        self.num_steps += 1
        outputs = self._answers.take(plan.chunks, logits)
        self._count(outputs)
        if self._speculator:
            self._speculator.learn(plan.chunks, outputs)
        if self._answers.end(outputs):
            self._state.running = [r for r in self._state.running if r.finish_reason is None]
        return late + outputs

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; an unknown id is one that already ended."""
        self._answers.drop(request_id)

    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._answers.live)

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
            speculation=self._speculator.tally if self._speculator else None,
        )

    def startup_report(self) -> dict[str, Any]:
        """What was loaded and how memory is shared out; bytes and tokens."""
        return {
            "model": self.checkpoint.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "kv_cache_dtype": str(self.kv_dtype).removeprefix("torch."),
            **self.memory.record(),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.batching.max_num_seqs,
            "max_num_batched_tokens": self.batching.max_num_batched_tokens,
            "adapters": self.adapters,
            "speculation": self._speculation and self._speculation.record(),
            "fused": dict(self._loaded.fused),
        }

    def draft_with(self, proposer: Proposer, most: int, adapt: bool = True) -> None:
        """Let `proposer` draft up to `most` tokens from now on, always that many unless the engine may `adapt`."""
        assert self._speculator is None, "there is a proposer already"
        self._speculator = Speculator(proposer, most, adapt)

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left in the cache, and to whoever drafts."""
        self._state.blocks.forget()
        if self._speculator:
            self._speculator.forget_ended()
        if self._journal:
            self._journal.forget()

    def record(self, path: Path) -> None:
        """Log what the scheduler is given and what it plans from now on, for `replay`. Only while nothing runs."""
        assert not self._answers.live, "a log begins with an empty engine"
        self.reset_prefix_cache()
        self._journal = Journal.open(path, self._state)
        self._answers.record(self._journal)

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler and blocks; meant for idle moments and tests."""
        self._state.check_integrity()

    def abort_all(self) -> None:
        """Drop every request."""
        for request_id in list(self._answers.live):
            self.abort(request_id)

    def close(self) -> None:
        """Drop every request and let go of the cache."""
        self.abort_all()
        if self._journal:
            self._journal.close()
        if self._speculator:
            self._speculator.close()
        self._loras.release()
        self._compressor.close()
        release_cache(self._layers)

    def _count(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep the totals."""
        self._generation_tokens += sum([output.num_new_tokens for output in outputs])
        for output in [one for one in outputs if len(one.token_ids) <= 1 or one.beams]:
            self._queries += output.num_prompt_tokens if self.batching.enable_prefix_caching else 0
            self._hits += output.num_cached_tokens
