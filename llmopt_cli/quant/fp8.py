"""Weights as 8-bit floats (e4m3, arXiv 2209.05433): a scale for each row, for square blocks, or one for the whole.

Pure functions on tensors. Inputs are rounded to e4m3, too: scaled when they come, or by a scale that is fixed here
from the largest input of the calibration text.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import FloatCodes
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.scheme import Scheme

LARGEST = 448.0  # of e4m3, which has no infinity: what is larger would become NaN
SMALLEST = 1e-12  # of a scale: zeros stay zeros


def fp8(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    """`weight` float32 [out, in] as the nearest e4m3 of w / scale, scale = max |w| / 448 (section 3), without data.

    The maximum is of a square block if the scheme has groups (their size is the block's area), of the whole weight if
    the scale of its inputs is fixed beforehand, and of a row otherwise.
    """
    block = math.isqrt(scheme.group_size)
    if block:
        rows, columns = weight.shape
        whole = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
        tiles = whole.view(whole.shape[0] // block, block, -1, block).abs()
        scales = scale_of(tiles.amax((1, 3)))
        spread = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    else:
        spread = scales = scale_of(weight.abs().amax((0, 1) if scheme.static_inputs else 1, keepdim=True))
    codes = (weight / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Solved(FloatCodes(codes, scales.view(-1, scales.shape[-1]), block), scheme.method or "fp8")


def with_fixed_inputs(codes: FloatCodes, max_abs: Tensor, linear: str) -> FloatCodes:
    """`codes` with the scale of inputs whose largest absolute values were `max_abs` [in].

    ModelError names the linear if it saw no inputs: a guess would cut off all that it ever sees.
    """
    largest = max_abs.max()
    if not float(largest) > 0:
        raise ModelError(
            f"`{linear}` saw no inputs, so a scale for them can't be fixed",
            "give more --samples, or take --method fp8, which scales inputs when they come",
        )
    return replace(codes, input_scale=scale_of(largest).view(1))


def scale_of(largest: Tensor) -> Tensor:
    """The scale, float32, under which the largest absolute value is the largest of e4m3."""
    return (largest / LARGEST).clamp(min=SMALLEST).float()
