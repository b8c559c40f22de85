"""The ops of the runtime in plain torch: the specification that faster versions are tested against.

Shapes: T query tokens of all requests packed one after the other, H query heads, K key-value heads, D head size,
S slots of the paged cache, B requests of a step. Knows nothing of models, requests or schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_kernels.layers import Layer
from llmopt_kernels.paging import QUANTIZED, PagedBatch, Pages, Rows, Rule, sees

SMALLEST_SCALE = 1e-12  # of a head of zeros
TILE = {"cpu": 1, "cuda": 16}  # rows of one product in `linear_rows`


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)`, the mean in float32 (arXiv 1910.07467). x (..., N), weight (N,)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head by its position's angle (arXiv 2104.09864). x (T, H, D); cos, sin (T, D)."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for gate and up side by side (arXiv 2002.05202). (..., 2N) -> (..., N)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def argmax(x: Tensor) -> Tensor:
    """Where each row of x (T, N) has its largest number, the first of several -> int64 (T,); with a NaN, anywhere."""
    return x.argmax(-1)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, in products of always the same shape: no row depends on the others.

    A row's result depends on the shape of a library's product, for that decides the order of its additions.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = []
    for part in torch.split(rows, TILE[x.device.type]):
        tile = x.new_zeros(TILE[x.device.type], x.shape[-1])  # of its own: alignment decides, too
        tile[: len(part)] = part
        parts.append(F.linear(tile, weight, bias)[: len(part)])
    return torch.cat(parts).view(*x.shape[:-1], -1) if parts else x.new_empty(*x.shape[:-1], weight.shape[0])


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`(code - zero) * scale` per group along the input dimension.

    codes uint8 (N, K/2): column 2j in the low nibble of byte j; scales (N, G), as the file stored them; zeros uint8
    (N, G), or (1, 1) for all, with K/G columns a group. Returns (N, K) in float32, or float64 where the scales are.
    """
    rows, groups = scales.shape
    wide = scales if scales.dtype == torch.float64 else scales.float()
    values = torch.stack((codes & 15, codes >> 4), dim=-1).view(rows, groups, -1)
    steps = values.to(torch.int8) - zeros.to(torch.int8).unsqueeze(-1)
    return (steps.to(wide.dtype) * wide.unsqueeze(-1)).view(rows, -1)


def pack_low(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (N, K) of 2 or 3 bits -> uint8 (N, K * bits / 8), K a multiple of 8.

    A row is the low two bits of all columns, four to a byte, then their third bits, eight to a byte; lowest first.
    """
    low = sum((codes[:, i::4] & 3) << 2 * i for i in range(4))
    high = sum((codes[:, i::8] >> 2) << i for i in range(8))
    assert isinstance(low, Tensor)
    assert isinstance(high, Tensor)
    return low if bits == 2 else torch.cat((low, high), dim=1)


def nibbles(packed: Tensor, bits: int) -> Tensor:
    """What `pack_low` packed, as codes of 4 bits, two to a byte: uint8 (N, K * bits / 8) -> (N, K/2)."""
    columns = packed.shape[1] // bits * 8
    low, high = packed[:, : columns // 4], packed[:, columns // 4 :]
    codes = torch.stack([low >> 2 * i & 3 for i in range(4)], dim=-1).flatten(1)
    if bits == 3:
        codes = codes | torch.stack([high >> i & 1 for i in range(8)], dim=-1).flatten(1) << 2
    return codes[:, 0::2] | codes[:, 1::2] << 4


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x (..., K) times the weights that the codes mean, transposed -> (..., N); see `dequantize_int4`."""
    return F.linear(x, dequantize_int4(codes, scales, zeros).to(x.dtype))


def quantize_heads(x: Tensor, dtype: torch.dtype, fixed: float | None = None) -> tuple[Tensor, Tensor]:
    """Every head of x (T, K, D) in `dtype`, one of QUANTIZED, so that its largest value is the dtype's.

    With a `fixed` scale all heads have that, and larger values become the dtype's largest. Returns the codes (T, K, D)
    and their scales float32 (T, K).
    """
    wide, top = x.float(), QUANTIZED[dtype]
    if fixed is None:
        scales = (wide.abs().amax(-1) / top).clamp(min=SMALLEST_SCALE)
        codes = wide / scales[..., None]
    else:
        scales, codes = wide.new_full(x.shape[:-1], fixed), (wide / fixed).clamp(-top, top)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


def store_kv(key: Tensor, value: Tensor, k: Pages, v: Pages, slots: Tensor) -> None:
    """Write new keys (T, K, D) and values (T, K, Dv) into their `slots` (T,) of the caches."""
    for new, pages in ((key, k), (value, v)):
        if pages.scales is None:
            pages.values.index_copy_(0, slots, new)
            continue
        codes, scales = quantize_heads(new, pages.values.dtype, pages.fixed)
        _bytes(pages.values).index_copy_(0, slots, _bytes(codes))
        pages.scales.index_copy_(0, slots, scales)


def attend_rows(query: Tensor, k: Pages, v: Pages, out: Tensor, group: Rows, rule: Rule) -> None:
    """Causal attention of one group's queries over its cached tokens, into its rows of `out` (T, H, Dv).

    query (T, H, D); the caches already hold the step's own keys and values. Gathers the pages, padded to the group's
    longest request.
    """
    out[group.rows] = _attend(query[group.rows], k, v, group.slots, group.visible(rule), rule)


def attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Causal attention of T tokens without a past: (T, H, D), (T, K, D), (T, K, Dv) -> (T, H, Dv)."""
    positions = torch.arange(query.shape[0], device=query.device)
    visible = sees(positions[:, None], positions, rule.window, rule.chunk)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return _weigh(q, k, v, visible, rule)[0]


def decoder_layers(x: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, batch: PagedBatch) -> Tensor:
    """A step through decoder layers: x (T, N) -> (T, N); cos, sin (T, D). Each stores its new keys and values first."""
    for layer in layers:
        weights = layer.weights
        attended = _attend_layer(rms_norm(x, weights.norm, weights.eps), layer, cos, sin, batch)
        x = x + F.linear(attended.flatten(1), weights.o, weights.o_bias)
        normed = rms_norm(x, weights.mlp_norm, weights.mlp_eps)
        gated = silu_mul(F.linear(normed, weights.gate_up, weights.gate_up_bias))
        x = x + F.linear(gated, weights.down, weights.down_bias)
    return x


def _attend_layer(x: Tensor, layer: Layer, cos: Tensor, sin: Tensor, batch: PagedBatch) -> Tensor:
    """What the heads of a layer see for its normed input (T, N) -> (T, H, D)."""
    weights, k, v = layer.weights, layer.k, layer.v
    kv_heads, dim = k.values.shape[1:]
    heads = F.linear(x, weights.qkv, weights.qkv_bias).view(len(x), -1, dim)
    query, key, value = heads.tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        query = rms_norm(query, weights.q_norm, weights.head_eps)
        key = rms_norm(key, weights.k_norm, weights.head_eps)
    store_kv(rotary(key, cos, sin), value, k, v, batch.new_slots)
    out, query = torch.empty_like(query), rotary(query, cos, sin)
    for group in batch.groups:
        attend_rows(query, k, v, out, group, layer.rule)
    return out


def _attend(q: Tensor, k: Pages, v: Pages, slots: Tensor, visible: Tensor, rule: Rule) -> Tensor:
    """Attention over gathered pages.

    q (B, Q, H, D), slots (B, L), visible (B, 1, Q, L) -> (B, Q, H, Dv).
    """
    keys, values = (_gather(pages, slots, q.dtype) for pages in (k, v))
    if slots.shape[0] > 1:
        # Padding reads slots of others: masked, yet their NaN would spread, for 0 * NaN is NaN.
        padding = ~visible.any(dim=2)[..., None]
        keys, values = keys.masked_fill(padding, 0), values.masked_fill(padding, 0)
    q = q.transpose(1, 2)
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # The CPU's masked 16-bit attention is several times slower than float32, and less exact.
        return _weigh(q.float(), keys.float(), values.float(), visible, rule).to(q.dtype)
    return _weigh(q, keys, values, visible, rule)


def _gather(pages: Pages, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The cached heads at `slots` (B, L) -> (B, K, L, D), in `dtype` where they are quantized."""
    # embedding() gathers rows several times faster than fancy indexing on the CPU.
    stored = pages.values if pages.scales is None else _bytes(pages.values)
    found = F.embedding(slots, stored.flatten(1)).view(*slots.shape, *stored.shape[1:])
    if pages.scales is not None:
        wide = found.view(pages.values.dtype).float() * F.embedding(slots, pages.scales)[..., None]
        found = wide.to(dtype)
    return found.transpose(1, 2)


def _bytes(codes: Tensor) -> Tensor:
    """8-bit floats as the integers that torch can copy and gather."""
    return codes.view(torch.int8)


def _weigh(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: Rule) -> Tensor:
    """q (B, H, Q, D), k (B, K, L, D), v (B, K, L, Dv), visible (..., Q, L) -> (B, Q, H, Dv)."""
    if rule.softcap is None and rule.sinks is None:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=rule.scale, enable_gqa=gqa)
        return out.transpose(1, 2)
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if rule.sinks is not None:
        scores = torch.cat((scores, rule.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights.to(v.dtype) @ v).transpose(1, 2)
