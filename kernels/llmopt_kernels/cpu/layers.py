"""Decoder layers as one compiled op: what lies between their products costs less than handing it over and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt_kernels import cpu, rowwise
from llmopt_kernels.layers import Layer
from llmopt_kernels.paging import PagedBatch


class _Step(ctypes.Structure):
    """As in layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out", "slots", "rows", "tables", "lengths")),
        *((name, ctypes.c_int64) for name in ("tokens", "requests", "queries", "block_size", "table_width")),
    )


class _Layer(ctypes.Structure):
    """As in layers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias")),
        *((name, ctypes.c_void_p) for name in ("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "k", "v")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "inner", "window", "chunk")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "eps", "head_eps", "mlp_eps")),
    )


class Stack:
    """Decoder layers that run one after the other. Their tensors are looked up once: they must stay where they are."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._count = len(layers)
        self._able = self._count > 0 and cpu.pairs_bf16() and all(map(_fits, layers))
        self._table = (_Layer * self._count)(*(map(_entry, layers) if self._able else ()))

    def runs(self, x: Tensor, batch: PagedBatch) -> bool:
        """Whether `run` takes this step, and is the fast way: a few tokens that attend as one group."""
        few = self._able and x.dtype == torch.bfloat16 and x.shape[0] <= cpu.MOST_PAIRED and not rowwise.active()
        return few and len(batch.groups) == 1 and cpu.takes(batch.groups[0])

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch) -> Tensor:
        """See `reference.decoder_layers`."""
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        [group] = batch.groups
        tensors = (x, cos, sin, out, batch.new_slots, group.starts, group.tables, group.lengths)
        pointers = [tensor.data_ptr() for tensor in tensors]
        step = _Step(*pointers, len(x), len(group.starts), group.count, group.block_size, group.tables.shape[1])
        op = cpu.op("decoder_layers", torch.bfloat16)
        op(ctypes.addressof(step), ctypes.addressof(self._table), self._count)
        return out


def _fits(layer: Layer) -> bool:
    """Whether the op takes such a layer: all bfloat16 on the CPU, an own cache, widths that are whole pairs."""
    weights, k, v = layer.weights, layer.k.values, layer.v.values
    tensors = [tensor for tensor in weights.tensors() if tensor is not None]
    pairs = not (weights.qkv.shape[1] | weights.o.shape[1] | weights.down.shape[1]) & 1
    dense = all(tensor.is_contiguous() for tensor in tensors)
    own = k.dtype == torch.bfloat16 and k.shape == v.shape and layer.rule.sinks is None
    return pairs and dense and own and cpu.fits(k, v, *tensors)


def _entry(layer: Layer) -> _Layer:
    weights, rule, k = layer.weights, layer.rule, layer.k.values
    _, kv_heads, dim = k.shape
    tensors = (*weights.tensors(), k, layer.v.values)
    return _Layer(
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        *(weights.qkv.shape[1], weights.o.shape[1] // dim, kv_heads, dim, weights.down.shape[1]),
        *(rule.window or 0, rule.chunk or 0),
        *(rule.scale, rule.softcap or 0.0, weights.eps, weights.head_eps, weights.mlp_eps),
    )
