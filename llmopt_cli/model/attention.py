"""The bridge between transformers' attention interface and the paged cache.

Every attention module carries a `PagedLayer`: its own KV tensors and the `AttentionContext` it shares with the other
layers of its model. Nothing is looked up by `layer_idx`, which would cost torch.compile one graph a layer. Semantics
that the paged op does not have (sinks, soft-caps, masks) are refused, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_kernels import PagedBatch, Pages, paged_attention, store_kv

NAME = "llmopt_paged"
UNSUPPORTED = {
    "s_aux": "attention sinks",
    "softcap": "soft-capped attention logits",
    "position_bias": "a position bias",
}


@dataclass
class AttentionContext:
    """What all layers of one model share: the running step's batch, or None outside of steps (probing, verifying)."""

    batch: PagedBatch | None = None


@dataclass
class PagedLayer:
    """One attention module's place in the paged cache. `k` and `v` are hung here by the cache.

    `seen` is what its first call showed: KV heads, head sizes of keys and values, scaling and window.
    """

    context: AttentionContext
    k: Pages | None = None
    v: Pages | None = None
    seen: LayerFacts | None = field(default=None)


@dataclass(frozen=True)
class LayerFacts:
    """The facts of one attention layer, as its own forward states them."""

    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    window: int | None


def attend(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Store this step's keys and values, then attend over the cache. (T, H, D), (T, K, D), (T, K, Dv) -> (T, H, Dv).

    Outside of a step the T tokens are one sequence without a past.
    """
    batch = layer.context.batch
    if batch is None:
        layer.seen = LayerFacts(key.shape[1], key.shape[2], value.shape[2], scaling, window)
        return _without_cache(query, key, value, scaling)
    assert layer.k is not None, "the cache is hung on the layers before the first step"
    assert layer.v is not None
    store_kv(key, value, layer.k, layer.v, batch.new_slots)
    return paged_attention(query, layer.k, layer.v, batch, scaling, window)


def interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (1, H, T, D) in, (1, T, H, Dv) out; rotary is applied, KV is not repeated."""
    refuse(module, attention_mask, kwargs)
    layer = getattr(module, "paged", None)
    if not isinstance(layer, PagedLayer):
        raise ModelError(f"`{type(module).__name__}` is not an attention layer of a decoder")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attend(layer, q, k, v, scale, sliding_window).unsqueeze(0), None


def refuse(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise ModelError if the call asks for something that the paged op would silently leave out."""
    wanted = [what for name, what in UNSUPPORTED.items() if kwargs.get(name) is not None]
    if not getattr(module, "is_causal", True):
        wanted.append("attention in both directions")
    if attention_mask is not None:
        wanted.append("an attention mask of its own")
    if wanted:
        raise ModelError(f"`{type(module).__name__}` uses {wanted[0]}, which the runtime does not support")


def register() -> None:
    """Make `NAME` known to transformers; for a name without a mask function it builds no masks."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, interface)


def attach(model: nn.Module) -> AttentionContext:
    """Hang a PagedLayer on every module that may be an attention layer; returns the context they share."""
    context = AttentionContext()
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged = PagedLayer(context)  # type: ignore[assignment]
    return context


def paged_layers(model: nn.Module) -> list[PagedLayer]:
    """The layers that dispatched in the probing call, in order."""
    found = [module.paged for module in model.modules() if hasattr(module, "paged")]
    return [layer for layer in found if isinstance(layer, PagedLayer) and layer.seen is not None]


def _without_cache(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)
