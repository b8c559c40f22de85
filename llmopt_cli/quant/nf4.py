"""Weights as the nearest of 16 tabled values, in blocks with an absolute maximum: NF4 and FP4 (arXiv 2305.14314).

Pure functions on tensors that need no data. Ties go as in bitsandbytes, so that codes are the same byte for byte. (Of
the absolute maxima's codes its C++ backend takes the second nearest now and then; its torch backend does as we do.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_cli.model.codes import Nested, TableCodes
from llmopt_cli.model.formats.bitsandbytes import NESTED_BLOCK, code_table, double_quantized, nested_table
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.scheme import Scheme

SMALLEST = 1e-38  # of an absolute maximum: a block of zeros stays one


def nf4(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    """`weight` float32 [out, in] in the table that the scheme is called after ("nf4" or "fp4"), equation 4.

    Blocks are of `scheme.group_size` weights, row after row. Under double quantization (section 3) their absolute
    maxima, less their mean, are 8-bit codes themselves; weights are rounded before that.
    """
    table = code_table(scheme.name).to(weight.device)
    indices, absmax = _nearest(weight.flatten(), table, scheme.group_size)
    indices = indices.view(weight.shape)
    packed = indices[:, ::2] << 4 | indices[:, 1::2]
    stored = _nested(absmax) if double_quantized(scheme) else absmax
    return Solved(TableCodes(packed, stored, table, scheme.group_size), scheme.name)


def _nested(absmax: Tensor) -> Nested:
    offset = absmax.mean()
    table = nested_table().to(absmax.device)
    codes, outer = _nearest(absmax - offset, table, NESTED_BLOCK)
    return Nested(codes, outer, table, float(offset), NESTED_BLOCK)


def _nearest(values: Tensor, table: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For values [n] in blocks of `size`, the last one maybe shorter: indices uint8 [n], maxima [ceil(n / size)]."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)
    absmax = blocks.abs().amax(-1)
    scaled = blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]
    order = table.argsort(stable=True)
    middles = (table[order[1:]] + table[order[:-1]]) / 2
    indices = order[torch.bucketize(scaled, middles, out_int32=True)].to(torch.uint8)
    return indices.flatten()[: len(values)], absmax
