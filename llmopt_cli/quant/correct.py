"""Correction for errors upstream: a weight that makes good what was lost in the layers before it.

One formula on tensors. Knows neither how inputs were observed nor what the corrected weight is put on.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5  # how much of the best correction is taken: part of it holds on the calibration text alone
DAMPING = 0.01  # added to the Hessian's diagonal, relative to its mean


def corrected(
    weight: Tensor, gram: Tensor, owed: Tensor, strength: float = STRENGTH, damping: float = DAMPING
) -> Tensor:
    """The weight float32 [out, in] to quantize instead of `weight` (quantization error propagation, arXiv 2504.09629).

    `gram` H [in, in] is the mean of x x^T over inputs x. `owed` [out, in] is the mean of (y' - y) x^T, where y is what
    the layer puts out and y' what would be wanted in its place: W x' of the inputs that the unquantized model has, as
    in the paper; or, for a layer that adds to the residual stream, whatever makes the sum what it is there (LoaQ,
    arXiv 2509.06297), since the stream's own errors are much of what is lost. W + c owed (H + d)^-1 is for c = 1 and
    d = 0 the least squares solution. A singular H corrects nothing.
    """
    mean = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    square = gram.clone()
    square.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(square)
    if int(failed):
        return weight
    del square
    return torch.cholesky_solve(owed.T, lower).T.mul_(strength).add_(weight)
