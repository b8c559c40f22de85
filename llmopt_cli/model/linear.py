"""Linear layers as the runtime holds them: several members of one input run as one product, weights packed or not.

A member is a linear of the checkpoint (`q_proj`); its rows are a slice of the merged tensor, so weights stream straight
into place and nothing is copied to fuse. Knows no file format: what they unpack to is held in one of two ways here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_cli.model.codes import Codes, FloatCodes, GgmlCodes, IntCodes, Nested, TableCodes
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.spec.gguf import BLOCK_TYPES
from llmopt_cli.spec.scheme import Scheme
from llmopt_kernels import int4_linear

NIBBLE = 4  # bits: codes of up to so many are packed two a byte
EXPANDED = 2**18  # weights that CodedLinear expands at a time
ALIGNED = 128  # rows: a multiple of them begins a block in every format


class MergedLinear(nn.Module):
    """`x @ weight.T + bias` with the rows of all members stacked. x (..., in) -> (..., sum of the members' outputs)."""

    def __init__(self, members: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        first = next(iter(members.values()))
        rows = sum(member.out_features for member in members.values())
        self.members = {name: member.out_features for name, member in members.items()}
        self.weight = nn.Parameter(first.weight.new_empty(rows, first.in_features), requires_grad=False)
        self.bias = None
        if first.bias is not None:
            self.bias = nn.Parameter(first.bias.new_empty(rows), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run all members at once."""
        return F.linear(x, self.weight, self.bias)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`member.weight`, its rows) for every member and tensor."""
        return member_slots(self.members, {"weight": self.weight, "bias": self.bias})


class PackedLinear(nn.Module):
    """Integer weights of 2 to 4 bits that stay packed in memory, unpacked where they are used.

    `codes` uint8 (out, in/2), two codes a byte, even column low; `scales` float32 and `zeros` uint8 (out, G). A weight
    is `(code - zero) * scale`; `dtype` is that of input and output. With `order` int32 (in), column j belongs to input
    order[j]: so groups are of neighbours again where a file scatters them.
    """

    def __init__(
        self,
        members: Mapping[str, int],
        in_features: int,
        group_size: int,
        bias: bool,
        dtype: torch.dtype,
        ordered: bool = False,
    ) -> None:
        super().__init__()
        rows, groups = sum(members.values()), in_features // group_size
        self.members, self.in_features, self.group_size, self.dtype = dict(members), in_features, group_size, dtype
        self.codes = nn.Parameter(torch.empty(rows, in_features // 2, dtype=torch.uint8), requires_grad=False)
        # float32 holds every file's scales exactly, whatever the model computes in.
        self.scales = nn.Parameter(torch.empty(rows, groups, dtype=torch.float32), requires_grad=False)
        self.zeros = nn.Parameter(torch.empty(rows, groups, dtype=torch.uint8), requires_grad=False)
        self.order = nn.Parameter(torch.empty(in_features, dtype=torch.int32), requires_grad=False) if ordered else None
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def like(cls, name: str, linear: nn.Linear, group_size: int, ordered: bool = False) -> Self:
        """An empty packed twin of `linear`; `group_size` 0 is one group a row."""
        size = group_size or linear.in_features
        members = {name: linear.out_features}
        return cls(members, linear.in_features, size, linear.bias is not None, linear.weight.dtype, ordered)

    @classmethod
    def merged(cls, members: Sequence[PackedLinear]) -> PackedLinear | None:
        """One packed linear with the rows of all, or None if their storage does not agree."""
        first = members[0]
        kinds = {(member.group_size, member.bias is None) for member in members}
        if len(kinds) > 1 or any(member.order is not None for member in members):
            return None
        names = {name: rows for member in members for name, rows in member.members.items()}
        return cls(names, first.in_features, first.group_size, first.bias is not None, first.dtype)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`member.codes`, its rows) for every member and tensor."""
        if self.order is not None:  # belongs to no row
            yield f"{next(iter(self.members))}.order", self.order.data
        tensors = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        yield from member_slots(self.members, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        out = int4_linear(x, self.codes, self.scales, self.zeros)
        return out if self.bias is None else out + self.bias


class CodedLinear(nn.Module):
    """Weights of any other meaning, kept as the file codes them and expanded some rows at a time where they are used.

    The tensors of its codes are parameters of the same names. Where the scheme multiplies int8 or fp8, inputs are
    rounded as `round_inputs` says and multiplied in float32 with the expanded weight: the result is that of the integer
    or fp8 product, the speed is not. `dtype` is that of input and output.
    """

    def __init__(self, name: str, codes: Codes, scheme: Scheme, linear: nn.Linear) -> None:
        super().__init__()
        self.members = {name: linear.out_features}
        self.in_features, self.scheme, self.dtype = linear.in_features, scheme, linear.weight.dtype
        self._form = codes
        self._fields = tuple(tensors(codes))
        for field, tensor in tensors(codes).items():
            self.register_parameter(field, nn.Parameter(tensor, requires_grad=False))
        self.bias = (
            nn.Parameter(torch.empty_like(linear.bias), requires_grad=False) if linear.bias is not None else None
        )

    @property
    def holds_floats(self) -> bool:
        """Whether some bytes of the codes are parts of floats: large ones could be infinite."""
        return isinstance(self._form, GgmlCodes)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`name.field`, its tensor) for every tensor of the codes, and the bias."""
        [name] = self.members
        for field, parameter in self.named_parameters(recurse=False):
            yield f"{name}.{field}", parameter.data

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        codes = replace(self._form, **{field: getattr(self, field) for field in self._fields})
        [rows] = self.members.values()
        step = max(EXPANDED // self.in_features // ALIGNED, 1) * ALIGNED
        inputs = (
            x if self.scheme.weight_only else round_inputs(x.float(), self.scheme, getattr(codes, "input_scale", None))
        )
        parts = (codes.rows(start, min(start + step, rows)).dequantize() for start in range(0, rows, step))
        out = torch.cat([F.linear(inputs, part.to(inputs.dtype)) for part in parts], dim=-1).to(x.dtype)
        return out if self.bias is None else out + self.bias


class JoinedLinear(nn.Module):
    """Linears of the same input whose storage does not agree: run one by one, their outputs side by side."""

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., sum of the members' outputs)."""
        return torch.cat([member(x) for member in self.children()], dim=-1)


def quantized_twin(
    name: str, linear: nn.Linear, kind: type[Codes], scheme: Scheme, ordered: bool
) -> PackedLinear | CodedLinear:
    """An empty linear in place of `linear`, for weights of this kind and scheme; `ordered`: groups are scattered."""
    if kind is IntCodes and scheme.weight_bits <= NIBBLE:
        return PackedLinear.like(name, linear, scheme.group_size, ordered)
    return CodedLinear(name, _empty(kind, linear.out_features, linear.in_features, scheme, ordered), scheme, linear)


def _empty(kind: type[Codes], rows: int, columns: int, scheme: Scheme, ordered: bool) -> Codes:
    """Codes of the shapes that `resident` gives them."""
    size = scheme.group_size
    if kind is GgmlCodes:
        block = BLOCK_TYPES[scheme.name]
        return GgmlCodes(torch.empty(rows, columns // block.size * block.nbytes, dtype=torch.uint8), block.name)
    if kind is TableCodes:
        absmax = torch.empty(-(-rows * columns // size))
        return TableCodes(torch.empty(rows, columns // 2, dtype=torch.uint8), absmax, torch.empty(16), size)
    if kind is FloatCodes:
        blocks = (-(-rows // ALIGNED), -(-columns // ALIGNED)) if size else (rows, 1)
        given = torch.empty(1) if scheme.static_inputs else None
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        return FloatCodes(codes, torch.empty(blocks), ALIGNED if size else 0, given)
    groups = columns // (size or columns)
    order = torch.empty(columns, dtype=torch.int32) if ordered else None
    codes, zeros = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, groups, dtype=torch.uint8)
    return IntCodes(codes, torch.empty(rows, groups), zeros, scheme.weight_bits, order)


def resident(codes: Codes) -> dict[str, Tensor]:
    """The tensors that the linear for these codes holds, by the names of its slots."""
    if isinstance(codes, IntCodes) and codes.bits <= NIBBLE:
        return _nibbles(codes)
    if isinstance(codes, FloatCodes) and not codes.block and codes.scales.numel() == 1:
        codes = replace(codes, scales=codes.scales.expand(codes.codes.shape[0], 1))
    if isinstance(codes, TableCodes) and isinstance(codes.absmax, Nested):
        codes = replace(codes, absmax=codes.absmax.values())
    return tensors(codes)


def _nibbles(codes: IntCodes) -> dict[str, Tensor]:
    values, order = codes.codes, {}
    if codes.groups is not None:
        order["order"] = codes.groups.argsort(stable=True).to(torch.int32)
        values = values[:, order["order"]]
    return order | {
        "codes": values[:, 0::2] | (values[:, 1::2] << NIBBLE),
        "scales": codes.scales,
        "zeros": codes.zeros,
    }


def tensors(codes: Codes) -> dict[str, Tensor]:
    """The codes' tensors by field."""
    found = {field.name: getattr(codes, field.name) for field in fields(codes)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def merge(members: Mapping[str, nn.Module]) -> nn.Module | None:
    """One module for linears of the same input, empty, to be filled through its slots; None if they cannot be one."""
    linears = list(members.values())
    if all(type(linear) is nn.Linear for linear in linears):
        plain = {name: linear for name, linear in members.items() if isinstance(linear, nn.Linear)}
        agree = len({linear.bias is None for linear in plain.values()}) == 1
        return MergedLinear(plain) if agree else None
    if not all(isinstance(linear, PackedLinear | CodedLinear) or type(linear) is nn.Linear for linear in linears):
        return None
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    merged = PackedLinear.merged(packed) if len(packed) == len(linears) else None
    return merged or JoinedLinear(members)


def member_slots(members: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """Each member's rows of each tensor, under the name `member.tensor`."""
    start = 0
    for name, rows in members.items():
        for suffix, tensor in tensors.items():
            if tensor is not None:
                yield f"{name}.{suffix}", tensor.data[start : start + rows]
        start += rows
