"""Inputs rounded as a scheme's products take them: int8 or e4m3, scaled when they come or beforehand.

Simulated: the rounded numbers come back in floating point, and the product that follows is an ordinary one. A token is
rounded by itself, so its result does not depend on its neighbours in a batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmopt_cli.spec.scheme import Scheme

INT8_TOP = 127
E4M3_TOP = 448.0
SMALLEST = 1e-12  # of a scale: a token of zeros stays one


def round_inputs(x: Tensor, scheme: Scheme, given: Tensor | None = None) -> Tensor:
    """x (..., in) as the scheme's products see it, in its own dtype; `given` float32 [1] is a scale fixed beforehand.

    "int8": a scale per token, max |x| / 127; inputs at least as large as `scheme.outliers` stay as they are, each by
    itself (LLM.int8, arXiv 2208.07339, keeps the whole column of a batch: a superset). "fp8": max |x| / 448 per token,
    or per 128 inputs of it where the weight is in blocks and they divide. Other schemes leave x alone.
    """
    if scheme.compute == "int8":
        return _int8(x.float(), scheme.outliers).to(x.dtype)
    if scheme.compute == "fp8":
        return _fp8(x.float(), math.isqrt(scheme.group_size), given).to(x.dtype)
    return x


def _int8(x: Tensor, outliers: float) -> Tensor:
    large = x.abs() >= (outliers or math.inf)
    small = x.masked_fill(large, 0)
    scale = (small.abs().amax(-1, keepdim=True) / INT8_TOP).clamp(min=SMALLEST)
    return torch.where(large, x, (small / scale).round() * scale)


def _fp8(x: Tensor, group: int, given: Tensor | None) -> Tensor:
    if given is not None:
        return _e4m3(x / given) * given
    if not group or x.shape[-1] % group:
        scale = (x.abs().amax(-1, keepdim=True) / E4M3_TOP).clamp(min=SMALLEST)
        return _e4m3(x / scale) * scale
    return _fp8(x.view(*x.shape[:-1], -1, group), 0, None).flatten(-2)


def _e4m3(x: Tensor) -> Tensor:
    """Rounded to e4m3, saturating: it has no infinity, and what is too large would become NaN."""
    return x.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).float()
