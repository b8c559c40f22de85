"""The bridge between transformers' attention interface and the paged cache.

Every attention module carries a `PagedLayer`: its own KV tensors and the `AttentionContext` it shares with the other
layers of its model. Nothing is looked up by `layer_idx`, which would cost torch.compile one graph a layer. What the
paged op does not know (masks of other kinds, position biases) is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_kernels import PagedBatch, Pages, Rule, paged_attention, sees, store_kv
from llmopt_kernels import attend as attend_alone

Watcher = Callable[[Tensor, Tensor, Rule], None]  # of queries (T, H, D) and keys (T, K, D), rotated

NAME = "llmopt_paged"
PROBE = "llmopt_probe"  # the same for one call, in which the masks say what each layer sees
UNSUPPORTED = {"position_bias": "a position bias"}


@dataclass
class AttentionContext:
    """What all layers of one model share: the running step's batch, or None outside of steps (probing, verifying).

    `apart`: in this step some layer is watched or has tables of its own, so that no two may run as one op.
    """

    batch: PagedBatch | None = None
    apart: bool = False


@dataclass
class PagedLayer:
    """One attention module's place in the paged cache. `k` and `v` are hung here by the cache.

    `seen` is what a call outside of steps showed, `calls` how many there were; `reach` is what its masks showed.
    `watcher` sees every call; `own` are tables for this layer alone and the caches they point into.
    """

    context: AttentionContext
    k: Pages | None = None
    v: Pages | None = None
    seen: LayerFacts | None = field(default=None)
    calls: int = 0
    reach: Reach | None = None
    watcher: Watcher | None = None
    own: tuple[PagedBatch, Pages, Pages] | None = None

    def limited(self, rule: Rule) -> Rule:
        """`rule` as it holds here: a reach known from masks wins over the rule's."""
        reach = self.reach
        if reach is None or (reach.window, reach.chunk) == (rule.window, rule.chunk):
            return rule
        return replace(rule, window=reach.window, chunk=reach.chunk)


@dataclass(frozen=True)
class LayerFacts:
    """The facts of one attention layer, as its own forward states them."""

    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Reach:
    """How far back a layer's tokens see; see `llmopt_kernels.Rule`."""

    window: int | None = None
    chunk: int | None = None


def attend(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Store this step's keys and values, then attend over the cache. (T, H, D), (T, K, D), (T, K, Dv) -> (T, H, Dv).

    Outside of a step the T tokens are one sequence without a past.
    """
    rule = layer.limited(rule)
    if layer.watcher is not None:
        layer.watcher(query, key, rule)
    batch = layer.context.batch
    if batch is None:
        shape = (key.shape[1], key.shape[2], value.shape[2])
        layer.seen = LayerFacts(*shape, rule.scale, rule.window, rule.softcap)
        layer.calls += 1
        return attend_alone(query, key, value, rule)
    assert layer.k is not None, "the cache is hung on the layers before the first step"
    assert layer.v is not None
    batch, k, v = layer.own or (batch, layer.k, layer.v)
    store_kv(key, value, k, v, batch.new_slots)
    return paged_attention(query, k, v, batch, rule)


def interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (1, H, T, D) in, (1, T, H, Dv) out; rotary is applied, KV is not repeated."""
    layer = getattr(module, "paged", None)
    if not isinstance(layer, PagedLayer):
        raise ModelError(f"`{type(module).__name__}` is not an attention layer of a decoder")
    refuse(module, kwargs)
    note_mask(layer, attention_mask)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks = None if s_aux is None else s_aux.float()
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attend(layer, q, k, v, Rule(scale, sliding_window, None, softcap, sinks)).unsqueeze(0), None


def refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise ModelError if the call asks for something that the paged op would silently leave out."""
    wanted = [what for name, what in UNSUPPORTED.items() if kwargs.get(name) is not None]
    if not getattr(module, "is_causal", True):
        wanted.append("attention in both directions")
    if wanted:
        raise ModelError(f"`{type(module).__name__}` uses {wanted[0]}, which the runtime does not support")


def note_mask(layer: PagedLayer, mask: Tensor | None) -> None:
    """Keep what a mask of the probing call says; raise ModelError for any other mask than those of `describe`."""
    if mask is None:
        return
    reach = getattr(mask, "reach", None)
    if reach is None:
        raise ModelError("a layer uses an attention mask of its own, which the runtime does not support")
    layer.reach = reach


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """transformers' mask signature: a causal mask that carries the `Reach` that `mask_function` is found to have."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    mask.reach = _reach(mask_function, local_size, device)  # type: ignore[attr-defined]
    return mask


def _reach(mask_function: Callable[..., Tensor], size: int | None, device: torch.device | str) -> Reach | None:
    """The reach that equals a mask function wherever windows or chunks of `size` begin and end; None if none does."""
    step = size or 8
    places = [step * times + offset for times in (0, 1, 2, 3, 7) for offset in (-1, 0, 1, step // 2)]
    at = torch.tensor(sorted({place for place in places if place >= 0}), device=device)
    queries, keys = at[:, None], at[None, :]
    found = mask_function(0, 0, queries, keys)
    known = [Reach(), Reach(window=size), Reach(chunk=size)]
    return next((r for r in known if torch.equal(found, sees(queries, keys, r.window, r.chunk))), None)


def register() -> None:
    """Make `NAME` and `PROBE` known to transformers; for a name without a mask function it builds no masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, interface)
    AttentionInterface.register(PROBE, interface)
    AttentionMaskInterface.register(PROBE, describe)


@contextmanager
def probing(model: Any) -> Iterator[None]:
    """Within it the model builds masks, and its layers keep what they say."""
    for layer in all_layers(model):
        layer.seen, layer.reach, layer.calls = None, None, 0
    model.set_attn_implementation(PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def attach(model: nn.Module) -> AttentionContext:
    """Hang a PagedLayer on every module that may be an attention layer; returns the context they share."""
    context = AttentionContext()
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged = PagedLayer(context)  # type: ignore[assignment]
    return context


def all_layers(model: nn.Module) -> list[PagedLayer]:
    """What `attach` hung up, in order."""
    found = [module.paged for module in model.modules() if hasattr(module, "paged")]
    return [layer for layer in found if isinstance(layer, PagedLayer)]


def paged_layers(model: nn.Module) -> list[PagedLayer]:
    """The layers that dispatched in the probing call, in order."""
    return [layer for layer in all_layers(model) if layer.seen is not None]
