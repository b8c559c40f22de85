"""What a quantized weight is once it is out of its file: small numbers, and those that give them their scale.

One class for each way to mean a weight; every file format packs and unpacks one of them. Knows no file and no method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True, eq=False)
class IntCodes:
    """A weight [out, in] as `bits`-bit integers, G groups of neighbouring inputs with a scale and a zero each.

    `codes` uint8 [out, in], `scales` float [out, G] (negative ones are allowed), `zeros` uint8 [out, G]: the weight is
    (code - zero) * scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the middle code, so that no zeros need to be stored."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        rows, groups = self.scales.shape
        grouped = self.codes.view(rows, groups, -1).float() - self.zeros[..., None].float()
        return (grouped * self.scales[..., None].float()).view(rows, -1)

    def with_scales(self, scales: Tensor) -> Self:
        """The same codes under other scales [out, G]."""
        return replace(self, scales=scales)


@dataclass(frozen=True, eq=False)
class FloatCodes:
    """A weight [out, in] in 8-bit floats: `codes` float8_e4m3fn [out, in], times `scales` float32.

    `scales` is [out, 1] (a scale a row), [1, 1] (one for all) or [ceil(out/b), ceil(in/b)] for blocks of `block` = b.
    """

    codes: Tensor
    scales: Tensor
    block: int = 0

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        scales = self.scales.float()
        if self.block:
            rows, columns = self.codes.shape
            scales = scales.repeat_interleave(self.block, 0)[:rows].repeat_interleave(self.block, 1)[:, :columns]
        return self.codes.float() * scales


@dataclass(frozen=True, eq=False)
class TableCodes:
    """A weight [out, in] as 4-bit indices into a table of 16 values, in flat blocks with an absolute maximum each.

    `codes` uint8 [out, in]; `absmax` float32 [out * in / blocksize], row by row; `table` float32 [16].
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    blocksize: int = 64

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        values = self.table[self.codes.long()].view(-1, self.blocksize) * self.absmax[:, None]
        return values.view(self.codes.shape)


Codes = IntCodes | FloatCodes | TableCodes
