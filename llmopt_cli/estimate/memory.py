"""Bytes: of weights, of the KV cache, of what an engine needs beside them. Pure functions of spec, scheme and hardware.

The serving engine sizes its cache with these functions, so a figure printed here is the figure it allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmopt_cli.estimate.constants import VLLM, Constants
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import Scheme

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
    """Linear layers in the scheme's bits, scales included; embeddings, head and norms stay in 16 (or 32) bits."""
    other_bits = max(16, scheme.weight_bits)
    return (spec.linear_params * scheme.bits_per_weight + (spec.num_params - spec.linear_params) * other_bits) / 8


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


def budget(
    spec: ModelSpec,
    hardware: Hardware,
    scheme: Scheme,
    tp: int = 1,
    max_num_seqs: int = int(VLLM.max_num_seqs),
    max_num_batched_tokens: int = int(VLLM.max_num_batched_tokens),
    kv_limit: float | None = None,
    constants: Constants = VLLM,
) -> Budget:
    """Memory of one GPU of `tp`: KV = utilization x usable - weights - activation peak - non-torch (vLLM's rule)."""
    return Budget(
        usable=hardware.memory_bytes * constants.memory_utilization,
        weights=weight_bytes(spec, scheme) / tp,
        activations=activation_bytes(spec, max_num_seqs, max_num_batched_tokens, tp, constants),
        non_torch=constants.non_torch_one if tp == 1 else constants.non_torch_many,
        kv_limit=kv_limit,
    )
