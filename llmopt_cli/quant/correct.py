"""Correction for errors upstream: a weight that makes good what its inputs lost in the layers before it.

One formula on tensors. Knows neither how inputs were observed nor what the corrected weight is put on.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 1.0  # how much of the best correction is taken
DAMPING = 0.01  # added to the Hessian's diagonal, relative to its mean


def propagated(
    weight: Tensor, gram: Tensor, cross: Tensor, strength: float = STRENGTH, damping: float = DAMPING
) -> Tensor:
    """The weight float32 [out, in] to quantize instead of `weight` (quantization error propagation, arXiv 2504.09629).

    `gram` H [in, in] is the mean of x x^T and `cross` C [in, in] that of (x' - x) x^T, where x is what the layer sees
    and x' what it would see were nothing quantized. W + c W C (H + d)^-1 is for c = 1 and d = 0 the least squares
    solution of W' x = W x', the output wanted; putting that on a grid by GPTQ is what GPTAQ does (arXiv 2504.02692).
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    square = gram.clone()
    square.diagonal().add_(damping * mean)
    owed: Tensor = torch.linalg.solve(square, weight @ cross, left=False)
    return weight + strength * owed
