"""Bytes: of weights, of the KV cache, of what an engine needs beside them. Pure functions of spec, scheme and hardware.

The serving engine sizes its cache with these functions, so a figure printed here is the figure it allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmopt_cli.estimate.constants import VLLM, Constants
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import Scheme, find_scheme

Layout = Literal["engine", "llmopt"]
KV_BYTES = 2.0  # a cached value in 16 bits


def kv_values_per_layer(spec: ModelSpec, layout: Layout = "engine", tp: int = 1) -> int:
    """Values that one token adds to one attention layer's cache on one GPU of `tp`.

    KV heads are shared out among the GPUs, one copy on each where there are fewer of them. "engine" keeps the latent
    of MLA (arXiv 2405.04434), whole on every GPU; "llmopt", our runtime, expands it to keys and values per head.
    """
    if spec.latent and layout == "engine":
        return spec.latent.kv_rank + spec.latent.rope_dim
    if spec.latent:
        return math.ceil(spec.num_heads / tp) * (spec.head_dim + spec.latent.v_dim)
    return math.ceil(spec.num_kv_heads / tp) * 2 * spec.head_dim


def kv_bytes_per_token(spec: ModelSpec, bytes_per_value: float, layout: Layout = "engine", tp: int = 1) -> float:
    """KV bytes that one token adds on one GPU of `tp` while it is inside every window.

    Linear-attention layers add none in an "engine"; "llmopt" keeps every layer alike.
    """
    layers = spec.num_layers - (spec.num_linear_layers if layout == "engine" else 0)
    return layers * kv_values_per_layer(spec, layout, tp) * bytes_per_value


def kv_block_bytes(spec: ModelSpec, block_size: int, bytes_per_value: float) -> int:
    """Bytes of one KV block of `block_size` tokens in our runtime, all layers together."""
    return math.ceil(block_size * kv_bytes_per_token(spec, bytes_per_value, layout="llmopt"))


def kv_sequence_bytes(spec: ModelSpec, length: int, bytes_per_value: float = KV_BYTES, tp: int = 1) -> float:
    """KV bytes of one sequence of `length` tokens on one GPU of `tp`: sliding layers keep their window only."""
    window = min(length, spec.sliding_window or length)
    kept = spec.num_full_layers * length + spec.num_sliding_layers * window
    return kept * kv_values_per_layer(spec, tp=tp) * bytes_per_value


def weight_bytes(spec: ModelSpec, scheme: Scheme) -> float:
    """What the scheme covers in its bits, scales included; the rest (embeddings, head, norms) in 16 or 32."""
    covered = covered_params(spec, scheme)
    return (covered * scheme.bits_per_weight + (spec.num_params - covered) * scheme.other_bits) / 8


def covered_params(spec: ModelSpec, scheme: Scheme) -> int:
    """Parameters that `scheme` stores in its own bits."""
    return {"linear": spec.linear_params, "experts": spec.expert_params, "all": spec.num_params}[scheme.covers]


def activation_bytes(
    spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int, tp: int = 1, constants: Constants = VLLM
) -> float:
    """Peak of a step: the sampler's float32 copies of all logits, or one FFN over a full batch of prompt tokens."""
    sampler = constants.sampler_copies * spec.vocab_size * max_num_seqs * 4
    moe = spec.experts
    width = max(spec.ffn_size, moe.per_token * moe.ffn_size + moe.shared_ffn_size if moe else 0)
    ffn = constants.ffn_copies * width / tp + constants.hidden_copies * spec.hidden_size
    return max(sampler, max_num_batched_tokens * ffn * 2)


@dataclass(frozen=True, slots=True)
class Budget:
    """One GPU's memory as an engine's log adds it up, in bytes. `free` goes to the KV cache; below zero: no fit."""

    usable: float
    weights: float
    activations: float
    non_torch: float
    kv_limit: float | None = None

    @property
    def free(self) -> float:
        """What is left for the KV cache, or the limit that was set for it."""
        left = self.usable - self.weights - self.activations - self.non_torch
        return left if self.kv_limit is None else min(left, self.kv_limit)


def budget(on: Deployment) -> Budget:
    """Memory of one GPU: KV = utilization x usable - weights - activation peak - non-torch (vLLM's rule).

    With pipeline stages it is the mean GPU: the first and last hold the embeddings beside their layers.
    """
    engine, batching = on.engine, on.batching
    draft = weight_bytes(on.draft.spec, find_scheme("bf16")) / on.tp if on.draft else 0.0
    return Budget(
        usable=on.hardware.memory_bytes * engine.memory_utilization,
        weights=weight_bytes(on.spec, on.scheme) / on.gpus + draft,
        activations=activation_bytes(on.spec, batching.max_num_seqs, batching.max_num_batched_tokens, on.tp, engine),
        non_torch=engine.non_torch_one if on.gpus == 1 else engine.non_torch_many,
        kv_limit=batching.kv_cache_memory_bytes,
    )


def sequence_bytes(on: Deployment, length: int) -> float:
    """KV bytes on one GPU of one request of `length` tokens, the draft's cache included."""
    target = kv_sequence_bytes(on.spec, length, on.kv_bytes, on.tp) / on.pp
    return target + (kv_sequence_bytes(on.draft.spec, length, tp=on.tp) if on.draft else 0.0)
