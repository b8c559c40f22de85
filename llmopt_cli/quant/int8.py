"""8-bit integers with one scale a row, after LLM.int8() (Dettmers et al., arXiv 2208.07339).

A pure function on tensors. That inputs are rounded to 8 bits as well, but for those at least as large as a threshold,
is a matter of the product: the scheme says so, the file's config repeats it, and weights don't depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_cli.model.codes import IntCodes
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.scheme import Scheme

TOP = 127
MIDDLE = 128  # the code of zero
OUTLIER = 6.0  # section 3.2: inputs at least this large are multiplied in 16 bits


def int8(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    """`weight` float32 [out, in] as round(127 * w / max |row|), section 2.1: codes 1 to 255 about 128, float32 scales.

    It needs no data. -128 stays unused: the grid is the same on both sides of zero.
    """
    assert scheme.weight_bits == 8
    largest = weight.abs().amax(-1, keepdim=True)
    factor = TOP / largest.clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight * factor).round() + MIDDLE
    scales = largest / TOP
    zeros = torch.full_like(scales, MIDDLE, dtype=torch.uint8)
    return Solved(IntCodes(codes.to(torch.uint8), scales, zeros, 8), scheme.method or "int8")
