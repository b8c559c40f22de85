"""Bytes: of weights, of the KV cache, of what an engine needs beside them. Pure functions of spec, scheme and hardware.

The serving engine sizes its cache with these functions, so a figure printed here is the figure it allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmopt_cli.estimate.constants import VLLM, Constants, find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.pool import Pool, find_pool, static_fraction
from llmopt_cli.spec.model import Matrix, ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import COVERED, Scheme

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


def kv_block_bytes(spec: ModelSpec, block_size: int, bytes_per_value: float, scale_bytes: int = 0) -> int:
    """Bytes of one KV block of `block_size` tokens in our runtime, all layers together.

    `scale_bytes` is what every token's key head and value head adds in a quantized cache.
    """
    heads = spec.num_heads if spec.latent else spec.num_kv_heads  # a latent is kept expanded here
    scales = spec.num_layers * 2 * heads * scale_bytes
    return math.ceil(block_size * (kv_bytes_per_token(spec, bytes_per_value, layout="llmopt") + scales))


def kv_sequence_bytes(
    spec: ModelSpec, length: int, bytes_per_value: float = KV_BYTES, tp: int = 1, layout: Layout = "engine"
) -> float:
    """KV bytes of one sequence of `length` tokens on one GPU of `tp`.

    An "engine" keeps only the window of sliding layers; "llmopt" keeps every token of every layer.
    """
    if layout == "llmopt":
        return length * kv_bytes_per_token(spec, bytes_per_value, layout, tp)
    window = min(length, spec.sliding_window or length)
    kept = spec.num_full_layers * length + spec.num_sliding_layers * window
    return kept * kv_values_per_layer(spec, tp=tp) * bytes_per_value


def state_bytes(spec: ModelSpec, tp: int = 1) -> float:
    """What linear-attention layers keep of one request on one GPU of `tp`, however long it is."""
    layer = spec.linear_attention.state_bytes if spec.linear_attention else 0
    return spec.num_linear_layers * layer / tp


def weight_bytes(spec: ModelSpec, scheme: Scheme) -> float:
    """What the scheme covers in its bits, scales included; the rest (embeddings, head, norms) in 16 or 32."""
    bits = scheme.matrix_bits(spec)
    return sum(count * bits[kind] for kind, count in spec.matrices().items()) / 8


def covered_params(spec: ModelSpec, scheme: Scheme) -> int:
    """Parameters that `scheme` stores in its own bits."""
    return sum(count for kind, count in spec.matrices().items() if kind in COVERED[scheme.covers])


def gpu_weight_bytes(on: Deployment) -> float:
    """Weights on the fullest GPU: of the stages of a pipeline the first or the last, which hold the embeddings too."""
    bits, held = on.scheme.matrix_bits(on.spec), _held(on)
    size = {kind: count * bits[kind] / 8 for kind, count in held.items()}
    ends = {kind: size.pop(kind) for kind in ("embedding", "head") if kind in size}
    if on.pp == 1:
        return sum(size.values()) + sum(ends.values())
    return sum(size.values()) * _stage(on) + max(ends.values())


def _stage(on: Deployment) -> float:
    """Share of the layers on the GPUs that have most of them."""
    return math.ceil(on.spec.num_layers / on.pp) / on.spec.num_layers


def _held(on: Deployment) -> dict[Matrix, float]:
    """Weights of each kind on one GPU, all stages together: what is not split among heads or columns is copied."""
    spec, heads = on.spec, on.attention_tp
    kv_share = math.ceil(spec.num_kv_heads / heads) / spec.num_kv_heads
    experts = _padding(on) / on.tp
    share: dict[Matrix, float] = {
        "query": 1 / heads,
        "output": 1 / heads,
        "key": kv_share,
        "value": kv_share,
        "latent": 1,
        "router": 1,
        "norm": 1,
        "expert_ffn": experts,
        "expert_down": experts,
    }
    return {kind: count * share.get(kind, 1 / on.tp) for kind, count in spec.matrices().items()}


def _padding(on: Deployment) -> float:
    """How much wider kernels for experts of 4 bits store them than they are (gpt-oss: 2,880 as 3,072)."""
    moe, multiple = on.spec.experts, find_pool(on.engine).expert_multiple
    if not moe or on.scheme.covers != "experts":
        return 1.0
    width = moe.ffn_size / (1 if on.expert_parallel else on.tp)
    return math.ceil(width / multiple) * multiple / width


def activation_bytes(
    spec: ModelSpec, max_num_seqs: int, max_num_batched_tokens: int, tp: int = 1, constants: Constants = VLLM
) -> float:
    """Peak of a step: sampling for a full batch, beside all its hidden states, or one FFN over its prompt tokens.

    Sampling holds copies of all logits, of every request and in float32, on every GPU.
    """
    copies, hidden = find_pool(constants).logit_copies, 2 * max_num_batched_tokens * spec.hidden_size
    logits = 4 * spec.vocab_size * max_num_seqs
    sampler = (constants.sampler_copies if copies is None else copies) * logits + constants.profile_copies * hidden
    moe = spec.experts
    width = max(spec.ffn_size, moe.per_token * moe.ffn_size + moe.shared_ffn_size if moe else 0)
    ffn = constants.ffn_copies * width / tp * 2 * max_num_batched_tokens + constants.hidden_copies * hidden
    return max(sampler, ffn)


@dataclass(frozen=True, slots=True)
class Budget:
    """One GPU's memory as an engine's log adds it up, in bytes. `free` goes to the KV cache; below zero: no fit.

    `graphs` lie outside `usable`, and where `apart` is set so do the activations. The cache takes `share` of what is
    left, at most `kv_limit`.
    """

    usable: float
    weights: float
    activations: float
    non_torch: float
    kv_limit: float | None = None
    graphs: float = 0.0
    apart: bool = False
    share: float = 1.0

    @property
    def free(self) -> float:
        """What is left for the KV cache, or the limit that was set for it."""
        left = self.usable - self.weights - (0 if self.apart else self.activations) - self.non_torch
        mine = left * self.share if left > 0 else left
        return mine if self.kv_limit is None else min(mine, self.kv_limit)


def own_budget(spec: ModelSpec, batching: Batching, free: int, weights: int, bytes_per_value: int) -> Budget:
    """Memory of our runtime on a device that has `free` bytes left beside the `weights` it holds.

    A step computes with values of `bytes_per_value`; it peaks beside the cache, in what that leaves.
    """
    ours = find_engine("llmopt")
    step = activation_bytes(spec, batching.max_num_seqs, batching.max_num_batched_tokens, constants=ours)
    return Budget(
        usable=free + weights,
        weights=weights,
        activations=step * bytes_per_value / KV_BYTES,
        non_torch=0.0,
        kv_limit=batching.kv_cache_memory_bytes,
        apart=True,
        share=find_pool(ours).share,
    )


def budget(on: Deployment) -> Budget:
    """Memory of the fullest GPU. vLLM: KV = utilization x usable - weights - activation peak - non-torch."""
    engine, batching, pool = on.engine, on.batching, find_pool(on.engine)
    return Budget(
        usable=_usable(on, pool),
        weights=gpu_weight_bytes(on) + on.draft_bytes / on.tp,
        activations=activation_bytes(on.spec, batching.max_num_seqs, batching.max_num_batched_tokens, on.tp, engine),
        non_torch=_non_torch(on, pool),
        kv_limit=batching.kv_cache_memory_bytes,
        graphs=pool.graphs,
        apart=pool.rule in ("static", "after_load"),
        share=pool.share,
    )


def _usable(on: Deployment, pool: Pool) -> float:
    total = on.hardware.memory_bytes
    if pool.rule == "static":
        return total * static_fraction(on.hardware, on.gpus)
    if pool.rule != "of_total":
        return total
    return total * on.engine.memory_utilization if pool.spare is None else total - pool.spare


def _non_torch(on: Deployment, pool: Pool) -> float:
    ours = (pool.non_torch_one, on.engine.non_torch_one), (pool.non_torch_many, on.engine.non_torch_many)
    own, usual = ours[on.gpus > 1]
    return usual if own is None else own


def sequence_bytes(on: Deployment, length: int) -> float:
    """Bytes on the fullest GPU of one request of `length` tokens: whole blocks, constant states, the draft's cache."""
    spec, layout = on.spec, layout_of(on.engine)
    tokens = math.ceil(length / on.batching.block_size) * on.batching.block_size
    cache = kv_sequence_bytes(spec, tokens, on.kv_bytes, on.attention_tp, layout)
    state = state_bytes(spec, on.attention_tp) if layout == "engine" else 0.0
    drafts = on.draft.spec if on.draft else None
    draft = kv_sequence_bytes(drafts, tokens, tp=on.tp, layout=layout) if drafts else 0.0
    return (cache + state) * _stage(on) + draft


def layout_of(engine: Constants) -> Layout:
    """How an engine lays out its cache."""
    return "llmopt" if engine.name == "llmopt" else "engine"
