"""What a quantized weight is once it is out of its file: small numbers, and those that give them their scale.

One class for each way to mean a weight; every file format packs and unpacks one of them. Knows no file and no method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from llmopt_cli.model.ggml import decoded
from llmopt_cli.spec.gguf import BLOCK_TYPES
from llmopt_cli.spec.scheme import Scheme


@dataclass(frozen=True, eq=False)
class IntCodes:
    """A weight [out, in] as `bits`-bit integers, in G groups of inputs with a scale and a zero each.

    `codes` uint8 [out, in], `scales` float [out, G] (negative ones are allowed), `zeros` uint8 [out, G], or [1, 1] for
    all: the weight is (code - zero) * scale. The groups are of neighbouring inputs, all of one size, unless `groups`
    int32 [in] says of every input which group it is in (GPTQ files quantized in the order of activations).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4
    groups: Tensor | None = None

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
        if self.groups is not None:
            steps = self.codes.float() - self.zeros.expand(self.scales.shape)[:, self.groups].float()
            return steps * self.scales[:, self.groups].float()
        rows, groups = self.scales.shape
        grouped = self.codes.view(rows, groups, -1).float() - self.zeros[..., None].float()
        return (grouped * self.scales[..., None].float()).view(rows, -1)

    def rows(self, start: int, stop: int) -> Self:
        """The same for some of the rows."""
        part = slice(start, stop)
        zeros = self.zeros if len(self.zeros) == 1 else self.zeros[part]
        return replace(self, codes=self.codes[part], scales=self.scales[part], zeros=zeros)

    def with_scales(self, scales: Tensor) -> Self:
        """The same codes under other scales [out, G]."""
        return replace(self, scales=scales)


@dataclass(frozen=True, eq=False)
class FloatCodes:
    """A weight [out, in] in 8-bit floats: `codes` float8_e4m3fn [out, in], times `scales` float32.

    `scales` is [out, 1] (a scale a row), [1, 1] (one for all) or [ceil(out/b), ceil(in/b)] for blocks of `block` = b.
    `input_scale` float32 [1], if there is one, is what inputs are divided by before they are rounded to float8.
    """

    codes: Tensor
    scales: Tensor
    block: int = 0
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        scales = self.scales.float()
        if self.block:
            rows, columns = self.codes.shape
            scales = scales.repeat_interleave(self.block, 0)[:rows].repeat_interleave(self.block, 1)[:, :columns]
        return _float8(self.codes) * scales

    def rows(self, start: int, stop: int) -> Self:
        """The same for some of the rows; `start` is a multiple of the block."""
        if self.block:
            part = slice(start // self.block, -(-stop // self.block))
        else:
            part = slice(start, stop) if len(self.scales) > 1 else slice(None)
        return replace(self, codes=self.codes[start:stop], scales=self.scales[part])


@dataclass(frozen=True, eq=False)
class Nested:
    """n positive numbers as 8-bit indices into a table, in blocks of `blocksize` with an absolute maximum each.

    The double quantization of arXiv 2305.14314: `codes` uint8 [n], `absmax` float32 [ceil(n / blocksize)], `table`
    float32 [256]; a number is table[code] * absmax + offset, which may be a tensor [1].
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: float | Tensor
    blocksize: int = 256

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The numbers from `start` to before `stop`, float32."""
        codes = self.codes[start:stop]
        blocks = torch.arange(start, start + len(codes), device=codes.device) // self.blocksize
        return _looked_up(self.table, codes) * self.absmax[blocks] + self.offset


@dataclass(frozen=True, eq=False)
class TableCodes:
    """A weight [out, in] as 4-bit indices into a table of 16 values, in flat blocks with an absolute maximum each.

    `codes` uint8 [out, in/2], two indices a byte, the first in the high nibble; `absmax` float32
    [ceil(out * in / blocksize)], row by row, or how it is quantized itself; `table` float32 [16].
    """

    codes: Tensor
    absmax: Tensor | Nested
    table: Tensor
    blocksize: int = 64

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        indices = torch.stack((self.codes >> 4, self.codes & 15), dim=-1).flatten(1)
        absmax = self.absmax.values() if isinstance(self.absmax, Nested) else self.absmax
        scales = absmax.repeat_interleave(self.blocksize)[: indices.numel()]
        return _looked_up(self.table, indices) * scales.view(indices.shape)

    def rows(self, start: int, stop: int) -> Self:
        """The same for some of the rows; `start` is where a block begins."""
        width = 2 * self.codes.shape[1]
        first, end = start * width // self.blocksize, -(-stop * width // self.blocksize)
        absmax = self.absmax
        part = absmax.values(first, end) if isinstance(absmax, Nested) else absmax[first:end]
        return replace(self, codes=self.codes[start:stop], absmax=part)


@dataclass(frozen=True, eq=False)
class GgmlCodes:
    """A weight [out, in] in blocks of one of GGML's types, see `model.ggml`: `codes` uint8 [out, bytes of a row]."""

    codes: Tensor
    type: str

    def dequantize(self) -> Tensor:
        """The weight it means, float32 [out, in]."""
        return decoded(self.codes, self.type)

    def rows(self, start: int, stop: int) -> Self:
        """The same for some of the rows."""
        return replace(self, codes=self.codes[start:stop])


Codes = IntCodes | FloatCodes | TableCodes | GgmlCodes
KINDS: dict[str, type[Codes]] = {
    **dict.fromkeys(("nf4", "fp4"), TableCodes),
    **dict.fromkeys(("fp8", "fp8_block"), FloatCodes),
    **dict.fromkeys(BLOCK_TYPES, GgmlCodes),
}


def kind_of(scheme: Scheme) -> type[Codes]:
    """The class that a weight of this scheme is: integers, unless its name says otherwise."""
    return KINDS.get(scheme.name, IntCodes)


def _looked_up(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices] for uint8 indices; index_select is several times faster than indexing on the CPU."""
    return table.index_select(0, indices.flatten().int()).view(indices.shape)


def _float8(codes: Tensor) -> Tensor:
    """e4m3 as float32, looked up: the CPU converts them one by one. What is float32 already stays as it is."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes
    values = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
    return _looked_up(values, codes.view(torch.uint8))
