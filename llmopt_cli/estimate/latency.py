"""Seconds of one model step on one kind of GPU, in closed form: a launch per kernel, plus compute or memory.

A roofline alone is 44 % off; efficiencies and launch times bring the median error on TPOT to 11 % (see `tpot_band`).
Knows nothing of queues: arrival, batching over time and distributions are a simulation's business.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmopt_cli.estimate.constants import Constants
from llmopt_cli.estimate.deployment import Deployment, Draft
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import kv_values_per_layer
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import Scheme, find_scheme


@dataclass(frozen=True, slots=True)
class Band:
    """How far the closed form was off: the median of |predicted / measured - 1|, and on what."""

    median_error: float
    basis: str


DENSE_TPOT = Band(0.112, "median error on 1,060 published runs of Llama-3.1-8B/70B and Qwen3-32B, H100 to GB200")
EXPERTS_TPOT = Band(0.17, "median error on 51 published runs of DeepSeek-V3/R1, Qwen3-235B, gpt-oss and GLM-5, no FP4")
# The constants of TTFT were fitted to 318 runs, of which the median error is 14 %: that is no band for other runs.
DENSE_TTFT = Band(0.34, "median error on 12 published vLLM runs of Llama-3.1-70B, H100 and H200")


def tpot_band(spec: ModelSpec) -> Band:
    """The band of the measured slice that `spec` belongs to."""
    return EXPERTS_TPOT if spec.experts else DENSE_TPOT


def ttft_band(spec: ModelSpec) -> Band | None:
    """As `tpot_band`; None for experts, for which no run under vLLM is at hand to compare with."""
    return None if spec.experts else DENSE_TTFT


DRAFTS_IN = find_scheme("bf16")
Chunk = tuple[int, int]  # (prompt tokens computed in this step, tokens of the same prompt in cache before)


@dataclass(frozen=True, slots=True)
class StepModel:
    """The time of one forward pass of a deployment. Lengths in tokens, batches in requests, times in seconds.

    Grouped-query, sliding-window, latent attention and experts are counted as what they read and multiply.
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

    @property
    def constants(self) -> Constants:
        """Those of the engine."""
        return self.on.engine

    def step(self, decodes: int, context: float, chunks: Sequence[Chunk] = (), width: int = 1) -> float:
        """One pass, through all pipeline stages: `width` tokens for each of `decodes` requests, and `chunks`.

        `context` is the mean number of tokens that those requests have in cache.
        """
        tokens = decodes * width + sum(new for new, _ in chunks)
        window = self.spec.sliding_window
        full = self._decode_attention(decodes, context) if decodes else 0.0
        sliding = self._decode_attention(decodes, min(context, window or context)) if decodes else 0.0
        for new, before in chunks:
            full += self._prefill_attention(new, before, None)
            sliding += self._prefill_attention(new, before, window)
        return self._layers(tokens, full, sliding) + self._head(decodes * width + len(chunks)) + self._hops(tokens)

    def decode(self, batch: int, context: float) -> float:
        """Time per token of each of `batch` requests whose contexts are `context` tokens long on average.

        Pipeline stages work on as many parts of the batch at once. With a draft it is the time of drafting and
        verifying, divided by the tokens they are expected to yield (arXiv 2211.17192, equation 1).
        """
        part, draft = math.ceil(batch / self.on.pp), self.on.draft
        if draft is None:
            return self.step(part, context)
        drafting = draft.tokens * StepModel(replace(self.on, spec=draft.spec, scheme=DRAFTS_IN, draft=None)).step(
            part, context
        )
        verifying = self.step(part, context, width=draft.tokens + 1)
        return (drafting + verifying) / expected_tokens(draft)

    def prefill(self, tokens: int, cached: int = 0) -> float:
        """The prompt of one request, up to its first token; the first `cached` tokens are in the prefix cache."""
        return self.step(0, 0, [(max(1, tokens - cached), cached)])

    def tpot(self, load: Load) -> float:
        """Time per output token: a decode step, and the share of the other requests' prefills that delays it."""
        step = self.decode(load.concurrency, load.context)
        return step + (load.concurrency - 1) * self.mean_prefill(load) / self.on.pp / load.output_len

    def ttft(self, load: Load) -> float:
        """Mean time to first token in a closed loop: dispatch and prefill, stretched by queueing."""
        c = self.constants
        stretch = 1 + c.queue_slope * math.pow(load.concurrency - 1, c.queue_power)
        return c.dispatch_s + self.mean_prefill(load) * stretch

    def mean_prefill(self, load: Load) -> float:
        """Seconds of one prompt, over the distribution of their lengths."""
        prompts = Counter(size.input_len for size in load.sizes)
        total = sum(count * self.prefill(length, int(length * load.cached_share)) for length, count in prompts.items())
        return total / len(load.sizes)

    def _layers(self, tokens: int, full_attention: float, sliding_attention: float) -> float:
        spec = self.spec
        attention = spec.num_full_layers * full_attention + spec.num_sliding_layers * sliding_attention
        ffn = (spec.num_layers - spec.num_moe_layers) * self._ffn(tokens, spec.ffn_size)
        every_layer = self._projections(tokens) + self._norms(tokens) + self._allreduces(tokens)
        linear = spec.num_linear_layers * self.constants.attention_s
        return attention + linear + ffn + spec.num_moe_layers * self._experts(tokens) + spec.num_layers * every_layer

    @property
    def _bandwidth(self) -> float:
        return self.hardware.bandwidth * self.constants.memory_efficiency

    @property
    def _weight_bandwidth(self) -> float:
        """Bytes per second at which quantized weights stream through their kernels."""
        c = self.constants
        if not (self.scheme.weight_only and self.scheme.quantized):
            return self._bandwidth
        efficiency = c.memory_efficiency_int8 if self.scheme.weight_bits == 8 else c.memory_efficiency_int4
        return self.hardware.bandwidth * efficiency

    def _gemm(self, tokens: float, n: float, k: float, copies: float = 1, visits: float = 1) -> float:
        """`tokens` x k times k x n. Of such matrices `copies` are read (experts) and a token multiplies `visits`."""
        c = self.constants
        efficiency = c.compute_efficiency_decode if tokens <= c.decode_tokens else c.compute_efficiency_prefill
        compute = 2 * tokens * visits * n * k / (self.hardware.flops(self.scheme.compute) * efficiency)
        weights = copies * n * k * self.scheme.bits_per_weight / 8
        return c.gemm_s + max(compute, (weights + 2 * tokens * visits * (n + k)) / self._weight_bandwidth)

    def _projections(self, tokens: int) -> float:
        """The GEMMs around attention."""
        spec, h, heads = self.spec, self.spec.hidden_size, self.spec.num_heads / self.tp
        if mla := spec.latent:
            query = (
                [(mla.q_rank, h), (heads * spec.head_dim, mla.q_rank)] if mla.q_rank else [(heads * spec.head_dim, h)]
            )
            latent = [(mla.kv_rank + mla.rope_dim, h), (heads * (mla.nope_dim + mla.v_dim), mla.kv_rank)]
            shapes = [*query, *latent, (h, heads * mla.v_dim)]
        else:
            shapes = [(heads * spec.head_dim + kv_values_per_layer(spec, tp=self.tp), h), (h, heads * spec.head_dim)]
        return sum(self._gemm(tokens, n, k) for n, k in shapes)

    def _ffn(self, tokens: int, width: float, copies: float = 1, visits: float = 1) -> float:
        spec, width = self.spec, width / self.tp
        first = self._gemm(tokens, (2 if spec.gated_ffn else 1) * width, spec.hidden_size, copies, visits)
        activation = 6 * tokens * visits * width / self._bandwidth
        return first + activation + self._gemm(tokens, spec.hidden_size, width, copies, visits)

    def _experts(self, tokens: int) -> float:
        """Of E experts, k a token, T tokens drawing independently touch E x (1 - (1 - k/E)^T)."""
        moe = self.spec.experts
        if not moe:
            return 0.0
        touched = moe.count * (1 - (1 - moe.per_token / moe.count) ** tokens)
        shared = self._ffn(tokens, moe.shared_ffn_size) if moe.shared_ffn_size else 0.0
        router = self._gemm(tokens, moe.count, self.spec.hidden_size)
        return router + self._ffn(tokens, moe.ffn_size, touched, moe.per_token) + shared

    def _norms(self, tokens: int) -> float:
        return 2 * (self.constants.norm_s + 8 * tokens * self.spec.hidden_size / self._bandwidth)

    def _allreduces(self, tokens: int) -> float:
        """Two of [tokens, hidden] in 16 bits, each moving 2 (tp-1)/tp of it over the link."""
        if self.tp == 1:
            return 0.0
        c, share = self.constants, 2 * (self.tp - 1) / self.tp
        moved = share * tokens * self.spec.hidden_size * 2
        return 2 * (c.allreduce_s + moved / (self.hardware.link_bandwidth * c.link_efficiency))

    def _hops(self, tokens: int) -> float:
        """Hidden states in 16 bits from stage to stage."""
        c, moved = self.constants, tokens * self.spec.hidden_size * 2
        return (self.on.pp - 1) * (c.hop_s + moved / (self.hardware.link_bandwidth * c.link_efficiency))

    def _decode_attention(self, batch: int, context: float) -> float:
        read = batch * context * kv_values_per_layer(self.spec, tp=self.tp) * self.on.kv_bytes
        return self.constants.attention_s + read / self._bandwidth

    def _prefill_attention(self, tokens: int, before: int, window: int | None) -> float:
        """QK and PV over the causal pairs: 2 FLOPs a pair, head and dimension of each."""
        spec, c = self.spec, self.constants
        pairs = _causal_pairs(before + tokens, window) - _causal_pairs(before, window)
        dims = spec.head_dim + (spec.latent.v_dim if spec.latent else spec.head_dim)
        work = 2 * pairs * dims * spec.num_heads / self.tp
        return c.attention_s + work / (self.hardware.flops() * c.attention_compute_efficiency)

    def _head(self, positions: int) -> float:
        c, weights = self.constants, self.spec.vocab_size / self.tp * self.spec.hidden_size
        compute = 2 * positions * weights / (self.hardware.flops() * c.head_compute_efficiency)
        return max(compute, 2 * weights / self._bandwidth)


def _causal_pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key not after it, of which at most `window` lie back."""
    window = min(tokens, window or tokens)
    return window * (tokens - window / 2)


def expected_tokens(draft: Draft) -> float:
    """Tokens that one round of drafting and verifying yields: (1 - a^(k+1)) / (1 - a) for acceptance a of k drafted."""
    return sum(draft.acceptance**index for index in range(draft.tokens + 1))
