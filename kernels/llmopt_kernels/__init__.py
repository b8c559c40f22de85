"""The runtime's ops: each name dispatches to the fastest version that can take its tensors, else to the reference.

Imports torch and nothing of llmopt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_kernels import cpu, reference, rowwise
from llmopt_kernels.cpu import release_threads
from llmopt_kernels.cpu.layers import Stack
from llmopt_kernels.layers import Layer, Weights
from llmopt_kernels.paging import QUANTIZED, PagedBatch, Pages, Rows, Rule, Span, indices, sees
from llmopt_kernels.reference import attend, pack_low
from llmopt_kernels.rowwise import Rowwise

__all__ = [
    "QUANTIZED",
    "Layer",
    "PagedBatch",
    "Pages",
    "Rows",
    "Rowwise",
    "Rule",
    "Span",
    "Stack",
    "Weights",
    "argmax",
    "attend",
    "indices",
    "int4_linear",
    "linear",
    "nibbles",
    "pack_low",
    "paged_attention",
    "release_threads",
    "rms_norm",
    "rotary",
    "sees",
    "silu_mul",
    "store_kv",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return cpu.rms_norm(x, weight, eps) if cpu.fits(x, weight) else reference.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`. The caller gives `x` away: it may be turned in place."""
    whole = cos.shape[-1] == x.shape[-1]  # angles for a part of each head are no business of this op
    return cpu.rotary(x, cos, sin) if whole and cpu.fits(x, cos, sin) else reference.rotary(x, cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return cpu.silu_mul(gate_up) if cpu.fits(gate_up) else reference.silu_mul(gate_up)


def argmax(x: Tensor) -> Tensor:
    """See `reference.argmax`."""
    return cpu.argmax(x) if cpu.fits(x) else reference.argmax(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    ours = cpu.multiplies(x, weight, bias) and not rowwise.active()
    return cpu.linear(x, weight, bias) if ours else F.linear(x, weight, bias)


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """See `reference.int4_linear`."""
    if rowwise.active() and cpu.fits(x):  # always the op for few rows
        flat = x.reshape(-1, x.shape[-1])
        parts = [cpu.int4_linear(part, codes, scales, zeros) for part in torch.split(flat, cpu.MOST_ROWS)]
        return torch.cat(parts).view(*x.shape[:-1], -1)
    return cpu.int4_linear(x, codes, scales, zeros) if cpu.fits(x) else reference.int4_linear(x, codes, scales, zeros)


def nibbles(packed: Tensor, bits: int) -> Tensor:
    """See `reference.nibbles`."""
    compiled = packed.device.type == "cpu" and cpu.library() is not None
    return cpu.nibbles(packed, bits) if compiled else reference.nibbles(packed, bits)


def store_kv(key: Tensor, value: Tensor, k: Pages, v: Pages, slots: Tensor) -> None:
    """See `reference.store_kv`."""
    home = cpu if cpu.fits(key, value) and cpu.stores(key, k) else reference
    home.store_kv(key, value, k, v, slots)


def paged_attention(query: Tensor, k: Pages, v: Pages, batch: PagedBatch, rule: Rule) -> Tensor:
    """Causal attention of packed queries (T, H, D) over the paged cache -> (T, H, Dv); see `reference.attend_rows`."""
    out = query.new_empty(*query.shape[:-1], v.values.shape[-1])
    able, alone = cpu.fits(query) and cpu.reads(query, k), rowwise.active()
    for group in batch.groups:
        home = cpu if able and (alone or cpu.takes(group)) else reference
        for rows in group.singles() if alone and home is reference else (group,):
            home.attend_rows(query, k, v, out, rows, rule)
    return out
