"""Seconds of one model step on one kind of GPU, in closed form: a launch per kernel, plus compute or memory.

A roofline alone is 44 % off; efficiencies and launch times bring the median error on TPOT to a tenth (see `bands`).
Knows nothing of arrivals: batching over time and distributions are a simulation's business. `ttft` and `tpot` are
means in a closed loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmopt_cli.estimate.constants import Constants
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.gemm import Matmul
from llmopt_cli.estimate.layers import Layers
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import budget, kv_values_per_layer, sequence_bytes
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import Scheme

_ROUNDS = 3  # of the fixed point between queueing and decoding; more change nothing
Chunk = tuple[int, int]  # (prompt tokens computed in this step, tokens of the same prompt in cache before)


@dataclass(frozen=True)
class StepModel:
    """The time of one forward pass of a deployment. Lengths in tokens, batches in requests, times in seconds.

    Grouped-query, sliding-window, latent attention and experts are counted as what they read and multiply. With data
    parallel attention, tokens and requests are those of all its groups together, shared out evenly.
    """

    on: Deployment

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.on.spec

    @property
    def hardware(self) -> Hardware:
        """The GPU."""
        return self.on.hardware

    @property
    def scheme(self) -> Scheme:
        """The precision."""
        return self.on.scheme

    @property
    def tp(self) -> int:
        """GPUs among which every layer is split."""
        return self.on.tp

    @cached_property
    def constants(self) -> Constants:
        """Those of the engine on this GPU."""
        return self.on.engine.on(self.hardware)

    def step(self, decodes: int, context: float, chunks: Sequence[Chunk] = (), width: float = 1) -> float:
        """One pass, through all pipeline stages: `width` tokens for each of `decodes` requests, and `chunks`.

        `context` is the mean number of tokens that those requests have in cache.
        """
        tokens = decodes * width + sum(new for new, _ in chunks)
        window = self.spec.sliding_window
        full = self._decode_attention(decodes, context, width) if decodes else 0.0
        sliding = self._decode_attention(decodes, min(context, window or context), width) if decodes else 0.0
        for (new, before), count in Counter(chunks).items():
            full += count * self._prefill_attention(new, before, None)
            sliding += count * self._prefill_attention(new, before, window)
        attention = self._full_layers * full + self.spec.num_sliding_layers * sliding
        layers = max(self._layers.seconds(tokens) + attention, self._host_s)
        return layers + self._head(decodes * width + len(chunks)) + self._hops(tokens) + self.constants.step_s

    @cached_property
    def _full_layers(self) -> int:
        return self.spec.num_full_layers

    @cached_property
    def _host_s(self) -> float:
        return self.constants.host_s * self.spec.num_layers

    def decode(self, batch: int, context: float) -> float:
        """Time per token of each of `batch` requests whose contexts are `context` tokens long on average.

        Pipeline stages work on as many parts of the batch at once. With a draft it is the time of drafting and
        verifying, divided by the tokens they are expected to yield (arXiv 2211.17192, equation 1).
        """
        part, draft = math.ceil(batch / self.on.pp), self.on.draft
        if draft is None:
            return self.step(part, context)
        return self.round(part, context, draft.tokens) / expected_tokens(draft.acceptance, draft.tokens)

    def round(self, batch: int, context: float, tokens: float) -> float:
        """Proposing `tokens` (a mean, it may be a fraction) for each of `batch` requests, and verifying them."""
        return self._proposing(batch, context, tokens) + self.step(batch, context, width=tokens + 1)

    def _proposing(self, batch: int, context: float, tokens: float) -> float:
        drafter = self._drafter
        heads = sum(one.seconds(batch * (tokens if each else 1)) for one, each in self._heads)
        if drafter is None:
            return heads
        # It runs inside of a step: what passes between two of them is met once.
        return tokens * (heads + drafter.step(batch, context) - drafter.constants.step_s)

    @cached_property
    def _drafter(self) -> StepModel | None:
        """What runs for each drafted token."""
        spec = self.on.draft.spec if self.on.draft else None
        return StepModel(replace(self.on, spec=spec, scheme=self.on.draft_scheme, draft=None)) if spec else None

    @cached_property
    def _heads(self) -> list[tuple[Matmul, bool]]:
        """What is multiplied beside it, and whether that is done for each drafted token."""
        products = self.on.draft.products if self.on.draft else ()
        matmul = self._layers.rates.matmul
        return [(matmul(self.on.draft_scheme, one.rows / self.tp, one.columns), one.each) for one in products]

    def prefill(self, tokens: int, cached: int = 0) -> float:
        """The prompt of one request, up to its first token; the first `cached` tokens are in the prefix cache.

        Groups of data parallel attention take in a prompt each at the same time. Pipeline stages work on m chunks of it
        at once, so that n stages need (m + n - 1) / m n of the time of one GPU.
        """
        new, stages = max(1, tokens - cached), self.on.pp
        chunks = math.ceil(new / self.on.batching.max_num_batched_tokens)
        whole = self.step(0, 0, [(new, cached)] * self.on.attention_dp)
        return whole * (chunks + stages - 1) / (chunks * stages)

    def tpot(self, load: Load) -> float:
        """Time per output token: a decode step, and the share of the other requests' prefills that delays it.

        Where an engine takes in all prompts before it goes on decoding, those that still queue do not decode: a fixed
        point, as requests that answer slowly queue for less of their time.
        """
        held, prefill = self.running(load), self.mean_prefill(load)
        tpot = self._tpot(load, held, prefill)
        if not (self.constants.alike_slope and load.alike):
            return tpot
        queued = self._queue(load, held, prefill)
        for _ in range(_ROUNDS):
            answering = load.output_len * tpot
            tpot = self._tpot(load, 1 + (held - 1) * answering / (answering + queued), prefill)
        return tpot

    def _tpot(self, load: Load, decoding: float, prefill: float) -> float:
        others = max(0.0, decoding / self.on.attention_dp - 1)
        return self.decode(math.ceil(decoding), load.context) + others * prefill / self.on.pp / load.output_len

    def ttft(self, load: Load) -> float:
        """Mean time to first token in a closed loop: dispatch and prefill, the queue before it, and a free place.

        Where memory holds fewer requests than ask, c clients share R places: each waits c/R - 1 rounds.
        """
        running, prefill = self.running(load), self.mean_prefill(load)
        served = self.constants.dispatch_s + prefill + self._queue(load, running, prefill)
        if running == load.concurrency:
            return served
        rounds = load.concurrency / running - 1
        return served + rounds * (served + load.output_len * self.tpot(load))

    def _queue(self, load: Load, held: int, prefill: float) -> float:
        """Seconds behind the prefills of others. Requests that are all alike end, and so queue, together."""
        c, others = self.constants, max(0.0, held / self.on.attention_dp - 1)
        slope, power = (c.alike_slope, 1.0) if c.alike_slope and load.alike else (c.queue_slope, c.queue_power)
        return prefill * slope * math.pow(others, power)

    def running(self, load: Load) -> int:
        """The requests of a load that hold a place at once: what asks, the engine admits, and memory holds.

        The limits are those of one group of data parallel attention. What does not fit at all is timed as if it did:
        that it does not is the memory model's to say.
        """
        on, limit = self.on, self.on.batching.max_num_seqs
        held = sequence_bytes(on, math.ceil(load.input_len + self.constants.reserved_output * load.output_len))
        places = int(self._cache_bytes / held) if self._cache_bytes >= held > 0 else limit
        return max(1, min(load.concurrency, on.attention_dp * min(limit, places)))

    @cached_property
    def _cache_bytes(self) -> float:
        return budget(self.on).free

    def throughput(self, load: Load, requests: int) -> float:
        """Output tokens a second of `requests` that are all there from the start, prompts packed into full steps.

        As many as hold a place run at once, wave after wave; what is left for the last wave runs in a smaller batch.
        """
        batch = self.running(load.at(requests))
        waves, rest = divmod(requests, batch)
        decoding = waves * self.decode(batch, load.context) + (self.decode(rest, load.context) if rest else 0.0)
        return requests * load.output_len / (requests * self.packed_prefill(load) + load.output_len * decoding)

    def packed_prefill(self, load: Load) -> float:
        """Seconds of one prompt among as many as fill a step."""
        tokens = max(1, round(load.input_len))
        packed = max(1, self.on.batching.max_num_batched_tokens // tokens) * self.on.attention_dp
        return self.step(0, 0, [(tokens, 0)] * packed) / packed / self.on.pp

    def mean_prefill(self, load: Load) -> float:
        """Seconds of one prompt, over the distribution of their lengths."""
        prompts = Counter(size.input_len for size in load.sizes)
        total = sum(count * self.prefill(length, int(length * load.cached_share)) for length, count in prompts.items())
        return total / len(load.sizes)

    @cached_property
    def _layers(self) -> Layers:
        return Layers(self.on, self.constants)

    def _hops(self, tokens: float) -> float:
        """Hidden states in 16 bits from stage to stage."""
        c, moved = self.constants, tokens * self.spec.hidden_size * 2
        return (self.on.pp - 1) * (c.hop_s + moved / (self.hardware.link_bandwidth * c.link_efficiency))

    def _decode_attention(self, batch: int, context: float, width: float = 1) -> float:
        """Reads the cache once; in the latent space of MLA every head multiplies all of it (arXiv 2405.04434, 2.1)."""
        reading, multiplying = self._attention_s
        cached = batch * context / self.on.attention_dp
        return self.constants.attention_s + cached * max(reading, width * multiplying)

    @cached_property
    def _attention_s(self) -> tuple[float, float]:
        """Seconds for each cached token of one request: to read it, and to multiply it with one query."""
        spec, c, tp = self.spec, self.constants, self.on.attention_tp
        read = kv_values_per_layer(spec, tp=tp) * self.on.kv_bytes
        dims = 2 * spec.latent.kv_rank + spec.latent.rope_dim if spec.latent else 2 * spec.head_dim
        work = 2 * spec.num_heads / tp * dims
        compute = self.hardware.flops() * c.attention_compute_efficiency
        efficiency = c.cache_efficiency if self.on.kv.bits > 8 else c.cache_efficiency_fp8
        return read / (self.hardware.bandwidth * efficiency), work / compute if spec.latent else 0.0

    def _prefill_attention(self, tokens: int, before: int, window: int | None) -> float:
        """QK and PV over the causal pairs; groups of data parallel attention take `attention_dp` chunks at a time."""
        pairs = _causal_pairs(before + tokens, window) - _causal_pairs(before, window)
        return self.constants.attention_s / self.on.attention_dp + pairs * self._pair_s

    @cached_property
    def _pair_s(self) -> float:
        """Seconds of a query and a key: 2 FLOPs a head and dimension of each."""
        spec = self.spec
        dims = spec.head_dim + (spec.latent.v_dim if spec.latent else spec.head_dim)
        rate = self.hardware.flops() * self.constants.attention_compute_efficiency
        return 2 * dims * spec.num_heads / self.on.tp / rate

    def _head(self, positions: float) -> float:
        per_position, weights = self._head_s
        return max(positions / self.on.attention_dp * per_position, weights)

    @cached_property
    def _head_s(self) -> tuple[float, float]:
        """The output matrix: seconds to multiply one position, and to read it."""
        weights = self.spec.vocab_size * self.spec.hidden_size / self.on.attention_tp
        bits = self.scheme.bits_per_weight if self.scheme.covers == "all" else 16
        rate = self.hardware.flops() * self.constants.head_compute_efficiency
        return 2 * weights / rate, weights * bits / 8 / self._layers.rates.bandwidth


def _causal_pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key not after it, of which at most `window` lie back."""
    window = min(tokens, window or tokens)
    return window * (tokens - window / 2)


def expected_tokens(acceptance: float, drafted: float) -> float:
    """Tokens that one round of drafting and verifying yields: (1 - a^(k+1)) / (1 - a) for acceptance a of k drafted.

    Every drafted token is accepted with the same chance once those before it are (arXiv 2211.17192, equation 1).
    """
    return drafted + 1 if acceptance == 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
