"""Seconds of one model step on one kind of GPU, in closed form: a launch per kernel, plus compute or memory.

A roofline alone is 44 % off; efficiencies and launch times bring the median error on TPOT to 11 % (see `tpot_band`).
Knows nothing of queues: arrival, batching over time and distributions are a simulation's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmopt_cli.estimate.constants import VLLM, Constants
from llmopt_cli.estimate.memory import KV_BYTES, kv_values_per_layer
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import Scheme


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


@dataclass(frozen=True, slots=True)
class StepModel:
    """The time of one step of `spec` in `scheme` on `tp` GPUs. Lengths and batches in tokens and requests.

    Grouped-query, sliding-window, latent attention and experts are counted as what they read and multiply.
    """

    spec: ModelSpec
    hardware: Hardware
    scheme: Scheme
    tp: int = 1
    constants: Constants = VLLM

    def decode(self, batch: int, context: float) -> float:
        """One token for each of `batch` requests whose contexts are `context` tokens long on average."""
        full, sliding = self._decode_attention(batch, context), 0.0
        if window := self.spec.sliding_window:
            sliding = self._decode_attention(batch, min(context, window))
        return self._layers(batch, full, sliding) + self._head(batch)

    def prefill(self, tokens: int) -> float:
        """The prompt of one request, up to its first token."""
        window = min(tokens, self.spec.sliding_window or tokens)
        full, sliding = self._prefill_attention(tokens, tokens), self._prefill_attention(tokens, window)
        return self._layers(tokens, full, sliding) + self._head(1)

    def tpot(self, batch: int, input_len: int, output_len: int) -> float:
        """Time per output token: a decode step, and the share of the other requests' prefills that delays it."""
        step = self.decode(batch, input_len + output_len / 2)
        return step + (batch - 1) * self.prefill(input_len) / output_len

    def ttft(self, batch: int, input_len: int) -> float:
        """Time to first token with `batch` requests in a closed loop: dispatch and prefill, stretched by queueing."""
        c = self.constants
        return c.dispatch_s + self.prefill(input_len) * (1 + c.queue_slope * math.pow(batch - 1, c.queue_power))

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
        compute = 2 * tokens * visits * n * k / (self.hardware.flops(fp8=not self.scheme.weight_only) * efficiency)
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

    def _decode_attention(self, batch: int, context: float) -> float:
        read = batch * context * kv_values_per_layer(self.spec, tp=self.tp) * KV_BYTES
        return self.constants.attention_s + read / self._bandwidth

    def _prefill_attention(self, tokens: int, window: int) -> float:
        """QK and PV over the causal pairs: 2 FLOPs a pair, head and dimension of each."""
        spec, c = self.spec, self.constants
        pairs = window * (tokens - window / 2)
        dims = spec.head_dim + (spec.latent.v_dim if spec.latent else spec.head_dim)
        work = 2 * pairs * dims * spec.num_heads / self.tp
        return c.attention_s + work / (self.hardware.flops() * c.attention_compute_efficiency)

    def _head(self, positions: int) -> float:
        c, weights = self.constants, self.spec.vocab_size / self.tp * self.spec.hidden_size
        compute = 2 * positions * weights / (self.hardware.flops() * c.head_compute_efficiency)
        return max(compute, 2 * weights / self._bandwidth)
