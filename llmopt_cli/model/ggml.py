"""GGML's block types: how bytes hold the codes and scales of a few dozen weights, and what these mean.

The layouts are those of ggml-common.h: a row is cut into blocks of neighbouring weights, `spec.gguf` has their sizes.
Knows neither files nor how codes are chosen (`quant.ggml`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmopt_cli.spec.gguf import BLOCK_TYPES


def spread(packed: Tensor, width: int, bits: int) -> Tensor:
    """Codes of `bits` bits out of uint8 [N, B], as uint8 [N, B * 8/bits].

    All layouts work alike: of every run of `width` bytes, the lowest bits hold the first `width` codes, the next bits
    the next.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    runs = packed.view(len(packed), -1, 1, width) >> shifts[:, None]
    codes: Tensor = runs & (2**bits - 1)
    return codes.view(len(packed), -1)


def gathered(codes: Tensor, width: int, bits: int) -> Tensor:
    """The inverse of `spread`; bits above the lowest `bits` of a code are ignored."""
    lanes = 8 // bits
    runs = (codes.to(torch.uint8) & (2**bits - 1)).view(len(codes), -1, lanes, width)
    packed: Tensor = runs[:, :, 0].clone()
    for lane in range(1, lanes):
        packed |= runs[:, :, lane] << (lane * bits)
    return packed.view(len(codes), -1)


def halves(numbers: Tensor) -> Tensor:
    """Float numbers [N, k] as the uint8 [N, 2k] of their float16."""
    return numbers.half().contiguous().view(torch.uint8)


def pairs_6bit(scales: Tensor, mins: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits, uint8 [N, 8] each, as the uint8 [N, 12] of q4_k and q5_k."""
    low = [part[:, :4] | (part[:, 4:] >> 4 << 6) for part in (scales, mins)]
    return torch.cat([*low, scales[:, 4:] & 15 | (mins[:, 4:] << 4)], dim=1)


def _pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    scales, mins, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    upper = (scales >> 6 << 4) | (rest & 15), (mins >> 6 << 4) | (rest >> 4)
    return torch.cat([scales & 63, upper[0]], 1), torch.cat([mins & 63, upper[1]], 1)


def _numbers(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.float16).float()


def _pair(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Two float16 numbers out of uint8 [N, 4], as float32 [N, 1] each."""
    numbers = _numbers(packed)
    return numbers[:, :1], numbers[:, 1:]


def _affine(codes: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    """code * scale - min, of codes [N, size] whose k sub-blocks have scales and mins [N, k]."""
    parts = codes.view(*scales.shape, -1).float()
    return (parts * scales[..., None] - mins[..., None]).view(codes.shape)


def _scaled(codes: Tensor, zero: int, scales: Tensor) -> Tensor:
    """(code - zero) * scale, of codes [N, size] whose k sub-blocks have scales [N, k]."""
    return ((codes.view(*scales.shape, -1).float() - zero) * scales[..., None]).view(codes.shape)


def _q4_0(block: Tensor) -> Tensor:
    return _scaled(spread(block[:, 2:], 16, 4), 8, _numbers(block[:, :2]))


def _q4_1(block: Tensor) -> Tensor:
    scale, low = _pair(block[:, :4])
    return _affine(spread(block[:, 4:], 16, 4), scale, -low)


def _q5(high: Tensor, low: Tensor) -> Tensor:
    return spread(low, 16, 4) | (spread(high, 1, 1) << 4)


def _q5_0(block: Tensor) -> Tensor:
    return _scaled(_q5(block[:, 2:6], block[:, 6:]), 16, _numbers(block[:, :2]))


def _q5_1(block: Tensor) -> Tensor:
    scale, low = _pair(block[:, :4])
    return _affine(_q5(block[:, 4:8], block[:, 8:]), scale, -low)


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].contiguous().view(torch.int8).float() * _numbers(block[:, :2])


def _q2_k(block: Tensor) -> Tensor:
    scale, low = _pair(block[:, 80:])
    return _affine(spread(block[:, 16:80], 32, 2), scale * (block[:, :16] & 15), low * (block[:, :16] >> 4))


def _q3_k(block: Tensor) -> Tensor:
    codes = spread(block[:, 32:96], 32, 2) | (spread(block[:, :32], 32, 1) << 2)
    scales = spread(block[:, 96:104], 8, 4) | (spread(block[:, 104:108], 4, 2) << 4)
    return _scaled(codes, 4, _numbers(block[:, 108:]) * (scales.float() - 32))


def _q4_k(block: Tensor) -> Tensor:
    scale, low = _pair(block[:, :4])
    scales, mins = _pairs(block[:, 4:16])
    return _affine(spread(block[:, 16:], 32, 4), scale * scales, low * mins)


def _q5_k(block: Tensor) -> Tensor:
    scale, low = _pair(block[:, :4])
    scales, mins = _pairs(block[:, 4:16])
    codes = spread(block[:, 48:], 32, 4) | (spread(block[:, 16:48], 32, 1) << 4)
    return _affine(codes, scale * scales, low * mins)


def _q6_k(block: Tensor) -> Tensor:
    codes = spread(block[:, :128], 64, 4) | (spread(block[:, 128:192], 32, 2) << 4)
    scales = block[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(codes, 32, _numbers(block[:, 208:]) * scales)


def _f32(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.float32)


def _bf16(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.bfloat16).float()


VALUES: dict[str, Callable[[Tensor], Tensor]] = {  # uint8 [N, bytes of a block] -> float32 [N, weights of it]
    "f32": _f32,
    "f16": _numbers,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def decoded(rows: Tensor, name: str) -> Tensor:
    """The float32 [out, in] that uint8 [out, bytes of a row] of this block type mean."""
    return VALUES[name](rows.reshape(-1, BLOCK_TYPES[name].nbytes)).view(len(rows), -1)
