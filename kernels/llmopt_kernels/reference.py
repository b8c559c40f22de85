"""The ops of the runtime in plain torch: the specification that faster versions are tested against.

Shapes: T query tokens of all requests packed one after the other, H query heads, K key-value heads, D head size,
S slots of the paged cache, B requests of a step. Knows nothing of models, requests or schedulers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_kernels.paging import QUANTIZED, Pages, Rows

SMALLEST_SCALE = 1e-12  # of a head of zeros


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


def dequantize_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`(code - zero) * scale` per group along the input dimension.

    codes uint8 (N, K/2): column 2j in the low nibble of byte j; scales float32 (N, G), as exact as any file's; zeros
    uint8 (N, G), with K/G columns a group. Returns (N, K) in the dtype of `scales`.
    """
    rows, groups = scales.shape
    values = torch.stack((codes & 15, codes >> 4), dim=-1).view(rows, groups, -1)
    steps = values.to(torch.int8) - zeros.to(torch.int8).unsqueeze(-1)
    return (steps.to(scales.dtype) * scales.unsqueeze(-1)).view(rows, -1)


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x (..., K) times the weights that the codes mean, transposed -> (..., N); see `dequantize_int4`."""
    return F.linear(x, dequantize_int4(codes, scales, zeros).to(x.dtype))


def quantize_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every head of x (T, K, D) in `dtype`, one of QUANTIZED, so that its largest value is the dtype's.

    Returns the codes (T, K, D) and their scales float32 (T, K).
    """
    wide = x.float()
    scales = (wide.abs().amax(-1) / QUANTIZED[dtype]).clamp(min=SMALLEST_SCALE)
    codes = wide / scales[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


def store_kv(key: Tensor, value: Tensor, k: Pages, v: Pages, slots: Tensor) -> None:
    """Write new keys (T, K, D) and values (T, K, Dv) into their `slots` (T,) of the caches."""
    for new, pages in ((key, k), (value, v)):
        if pages.scales is None:
            pages.values.index_copy_(0, slots, new)
            continue
        codes, scales = quantize_heads(new, pages.values.dtype)
        _bytes(pages.values).index_copy_(0, slots, _bytes(codes))
        pages.scales.index_copy_(0, slots, scales)


def attend_rows(query: Tensor, k: Pages, v: Pages, out: Tensor, group: Rows, scale: float, window: int | None) -> None:
    """Causal attention of one group's queries over its cached tokens, into its rows of `out` (T, H, Dv).

    query (T, H, D); the caches already hold the step's own keys and values; `window` is the number of positions a token
    sees, itself included. Gathers the pages, padded to the group's longest request.
    """
    out[group.rows] = _attend(query[group.rows], k, v, group.slots, group.visible(window), scale)


def _attend(q: Tensor, k: Pages, v: Pages, slots: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v over gathered pages.

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
        return _sdpa(q.float(), keys.float(), values.float(), visible, scale).to(q.dtype)
    return _sdpa(q, keys, values, visible, scale)


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
