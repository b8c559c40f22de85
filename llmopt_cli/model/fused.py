"""The blocks that stand in for transformers' own: attention, MLP, RMSNorm, and a layer of these.

They hold the members of the block they replace. Which blocks they can replace is the business of `fuse`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.model.attention import AttentionContext, LayerFacts, PagedLayer, attend, note_mask
from llmopt_cli.model.linear import DenseLinear, MergedLinear
from llmopt_kernels import Layer, Pages, Rule, Stack, Weights, rms_norm, rotary, silu_mul


class FusedAttention(nn.Module):
    """q, k and v as one product, optional per-head norms, rotary, paged attention, output product."""

    def __init__(self, original: nn.Module, facts: LayerFacts, qkv: nn.Module) -> None:
        super().__init__()
        self.paged = PagedLayer(AttentionContext())
        self.layer_idx = original.layer_idx
        self.facts = facts
        self.rule = Rule(facts.scaling, facts.window, None, facts.softcap)
        self.qkv = qkv
        self.q_norm = getattr(original, "q_norm", None)
        self.k_norm = getattr(original, "k_norm", None)
        self.o_proj = original.get_submodule("o_proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (1, T, N); cos and sin (1, T, D). Returns ((1, T, N), None) as the block it replaces."""
        note_mask(self.paged, attention_mask)
        facts = self.facts
        tokens = hidden_states.shape[1]
        heads = self.qkv(hidden_states.squeeze(0)).view(tokens, -1, facts.head_dim)
        query_heads = heads.shape[1] - 2 * facts.kv_heads
        turning = heads[:, : query_heads + facts.kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = turning[:, :query_heads], turning[:, query_heads:]
            turning = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        cos, sin = position_embeddings
        # Some models keep their angles in float32 whatever they compute in.
        turned = rotary(turning, cos.squeeze(0).to(heads.dtype), sin.squeeze(0).to(heads.dtype))
        query, key, value = turned[:, :query_heads], turned[:, query_heads:], heads[:, -facts.kv_heads :]
        out = attend(self.paged, query, key, value, self.rule)
        return self.o_proj(out.reshape(1, tokens, -1)), None


class FusedMLP(nn.Module):
    """gate and up as one product, `silu(gate) * up`, down."""

    def __init__(self, original: nn.Module, gate_up: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = original.get_submodule("down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., N)."""
        out: Tensor = self.down_proj(silu_mul(self.gate_up(x)))
        return out


class FusedRMSNorm(nn.Module):
    """The plain-gain RMSNorm as one op."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., N)."""
        return rms_norm(x, self.weight, self.eps)


class FusedLayer(nn.Module):
    """A pre-norm layer of fused attention, MLP and norms."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = original.get_submodule("input_layernorm")
        self.self_attn: Any = original.get_submodule("self_attn")
        self.post_attention_layernorm = original.get_submodule("post_attention_layernorm")
        self.mlp = original.get_submodule("mlp")
        self._alone = Together([self])
        self._parts: list[nn.Module] = []

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states (1, T, N); cos and sin (1, T, D). Returns (1, T, N)."""
        done = self._alone.run(hidden_states, position_embeddings) if attention_mask is None else None
        return self.in_parts(hidden_states, position_embeddings, attention_mask) if done is None else done

    def in_parts(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """The same, block by block."""
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)[0]
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    @property
    def place(self) -> PagedLayer:
        """Its place in the cache."""
        found: PagedLayer = self.self_attn.paged
        return found

    def is_watched(self) -> bool:
        """Whether a hook waits for what a part of it computes: an adapter, say."""
        self._parts = self._parts or list(self.modules())
        return any([part._forward_hooks or part._forward_pre_hooks for part in self._parts])  # noqa: C419  faster

    def plain(self) -> Layer | None:
        """What it computes with, if that is plain tensors and there is a cache."""
        paged, weights = self.place, _weights(self)
        if weights is None or paged.k is None or paged.v is None:
            return None
        return Layer(weights, paged.k, paged.v, paged.limited(self.self_attn.rule))


class Together:
    """Fused layers that run one after the other: as one op in the steps for which there is one."""

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self._layers = list(layers)
        self._stack = Stack(())
        self._caches: list[weakref.ref[Pages]] = []  # that it was made for; an engine's end is to free them

    def run(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor | None:
        """x (1, T, N), cos and sin (1, T, D) -> (1, T, N); None if the layers have to run one by one."""
        context = self._layers[0].place.context
        batch = context.batch
        if batch is None or context.apart or any([layer.is_watched() for layer in self._layers]):  # noqa: C419  faster
            return None
        x, stack = x.squeeze(0), self._current()
        if not stack.runs(x, batch):
            return None
        cos, sin = (angle.squeeze(0).to(x.dtype) for angle in angles)
        return stack.run(x, cos, sin, batch).unsqueeze(0)

    def _current(self) -> Stack:
        """The layers over the cache that hangs on them now."""
        caches = [layer.place.k for layer in self._layers]
        if [cache() for cache in self._caches] != caches:
            plain = [layer.plain() for layer in self._layers]
            self._stack = Stack([layer for layer in plain if layer is not None] if None not in plain else ())
            self._caches = [weakref.ref(cache) for cache in caches if cache is not None]
        return self._stack


def _weights(layer: Any) -> Weights | None:
    """A layer's, if all of them are plain tensors and its heads are normed alike, or not at all."""
    attention, mlp, first, second = layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    linears = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)
    head_norms = (attention.q_norm, attention.k_norm)
    kinds = {(type(norm), getattr(norm, "eps", 0.0)) for norm in head_norms}
    known = all(isinstance(norm, FusedRMSNorm | None) for norm in head_norms)
    if len(kinds) > 1 or not known or any(type(linear) not in (MergedLinear, DenseLinear) for linear in linears):
        return None
    q_gain, k_gain = (None if norm is None else norm.weight for norm in head_norms)
    qkv, o, gate_up, down = ((linear.weight, linear.bias) for linear in linears)
    eps = (first.eps, kinds.pop()[1], second.eps)
    return Weights(first.weight, *qkv, q_gain, k_gain, *o, second.weight, *gate_up, *down, *eps)
