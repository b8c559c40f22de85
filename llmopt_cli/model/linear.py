"""Linear layers as the runtime holds them: several members of one input run as one product, weights packed or not.

A member is a linear of the checkpoint (`q_proj`); its rows are a slice of the merged tensor, so weights stream straight
into place and nothing is copied to fuse. Knows no file format: what they unpack to is held in one of two ways here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_cli.model.codes import Codes, FloatCodes, GgmlCodes, IntCodes, Nested, TableCodes
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.spec.gguf import BLOCK_TYPES, block_of
from llmopt_cli.spec.scheme import Scheme
from llmopt_kernels import int4_linear, linear, nibbles, pack_low

NIBBLE = 4  # bits: codes of so many are packed two a byte, of fewer as `pack_low` does
OCTET = 8  # columns whose codes of fewer bits are whole bytes
TILE = 2**20  # weights whose codes are brought to 4 bits at a time
EXPANDED = 2**18  # weights that CodedLinear expands at a time
ALIGNED = 128  # rows: a multiple of them begins a block in every format


class MergedLinear(nn.Module):
    """`x @ weight.T + bias` with the rows of all members stacked. x (..., in) -> (..., sum of the members' outputs)."""

    def __init__(self, members: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        first = next(iter(members.values()))
        rows = sum(member.out_features for member in members.values())
        self.members = {name: member.out_features for name, member in members.items()}
        self.in_features = first.in_features
        self.weight = nn.Parameter(first.weight.new_empty(rows, first.in_features), requires_grad=False)
        self.bias = None
        if first.bias is not None:
            self.bias = nn.Parameter(first.bias.new_empty(rows), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run all members at once."""
        return linear(x, self.weight, self.bias)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`member.weight`, its rows) for every member and tensor."""
        return member_slots(self.members, {"weight": self.weight, "bias": self.bias})


class DenseLinear(nn.Linear):
    """A linear that is no member of others, with our product in place of torch's."""

    @classmethod
    def of(cls, plain: nn.Linear) -> Self:
        """The same linear, holding the same tensors."""
        # Weights on the meta device cost nothing to make and to throw away.
        ours = cls(plain.in_features, plain.out_features, bias=False, device="meta")
        ours.weight, ours.bias = plain.weight, plain.bias
        return ours

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Stored:
    """How a file stores a quantized linear, as far as it decides what memory holds.

    The dtype of its `scales`, and whether one is `single` for the whole weight; whether `zeros` are stored, or all are
    the middle code; whether groups are `ordered` by a permutation; `nested` absolute maxima of scales (0: none).
    """

    scales: torch.dtype = torch.float32
    single: bool = False
    zeros: bool = True
    ordered: bool = False
    nested: int = 0


class PackedLinear(nn.Module):
    """Integer weights of 2 to 4 bits that stay packed in memory, unpacked where they are used.

    `codes` uint8 (out, in/2), two codes a byte, even column low, or with fewer `bits` (out, in*bits/8) as `pack_low`
    packs them; `scales` (out, G) in the dtype of the file, which holds them exactly; `zeros` uint8 (out, G), or (1, 1)
    for all. A weight is `(code - zero) * scale`; `dtype` is that of input and output. With `order` int32 (in), column j
    belongs to input order[j]: so groups are of neighbours again where a file scatters them.
    """

    def __init__(
        self,
        members: Mapping[str, int],
        in_features: int,
        group_size: int,
        bias: bool,
        dtype: torch.dtype,
        stored: Stored,
        bits: int,
    ) -> None:
        super().__init__()
        rows, groups = sum(members.values()), in_features // group_size
        self.members, self.in_features, self.group_size, self.dtype = dict(members), in_features, group_size, dtype
        self.stored, self.bits = stored, bits
        zeros = (rows, groups) if stored.zeros else (1, 1)
        self.codes = nn.Parameter(torch.empty(rows, in_features * bits // 8, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows, groups, dtype=stored.scales), requires_grad=False)
        self.zeros = nn.Parameter(torch.empty(zeros, dtype=torch.uint8), requires_grad=False)
        order = torch.empty(in_features, dtype=torch.int32) if stored.ordered else None
        self.order = nn.Parameter(order, requires_grad=False) if order is not None else None
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def like(
        cls, name: str, linear: nn.Linear, group_size: int, stored: Stored | None = None, bits: int = NIBBLE
    ) -> Self:
        """An empty packed twin of `linear`; `group_size` 0 is one group a row."""
        size, columns = group_size or linear.in_features, linear.in_features
        members = {name: linear.out_features}
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        return cls(members, columns, size, has_bias, dtype, stored or Stored(), held_bits(bits, columns))

    @classmethod
    def merged(cls, members: Sequence[PackedLinear]) -> PackedLinear | None:
        """One packed linear with the rows of all, or None if their storage does not agree."""
        first = members[0]
        kinds = {(member.group_size, member.bias is None, member.bits, member.stored) for member in members}
        if len(kinds) > 1 or first.stored.ordered:
            return None
        names = {name: rows for member in members for name, rows in member.members.items()}
        stored = replace(first.stored, scales=first.scales.dtype)  # float32 while a fused block is verified
        bias = first.bias is not None
        return cls(names, first.in_features, first.group_size, bias, first.dtype, stored, first.bits)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`member.codes`, its rows) for every member and tensor."""
        if self.order is not None:  # belongs to no row
            yield f"{next(iter(self.members))}.order", self.order.data
        tensors = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        if not self.stored.zeros:  # the one zero is every member's
            yield from ((f"{name}.zeros", self.zeros.data) for name in self.members)
            del tensors["zeros"]
        yield from member_slots(self.members, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        out = int4_linear(x, self.codes, self.scales, self.zeros) if self.bits == NIBBLE else self._in_tiles(x)
        return out if self.bias is None else out + self.bias

    def _in_tiles(self, x: Tensor) -> Tensor:
        """Codes of fewer bits, some rows at a time as codes of 4."""
        step = max(TILE // self.in_features, 1)
        tiles = (slice(start, start + step) for start in range(0, len(self.codes), step))
        parts = [
            int4_linear(
                x,
                nibbles(self.codes[tile], self.bits),
                self.scales[tile],
                self.zeros[tile if self.stored.zeros else ...],
            )
            for tile in tiles
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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
        codes = _rebuilt(self._form, {field: getattr(self, field) for field in self._fields})
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
    name: str, linear: nn.Linear, kind: type[Codes], scheme: Scheme, stored: Stored
) -> PackedLinear | CodedLinear:
    """An empty linear in place of `linear`, for weights of this kind and scheme, stored so."""
    if kind is IntCodes and scheme.weight_bits <= NIBBLE:
        return PackedLinear.like(name, linear, scheme.group_size, stored, scheme.weight_bits)
    return CodedLinear(name, _empty(kind, linear.out_features, linear.in_features, scheme, stored), scheme, linear)


def _empty(kind: type[Codes], rows: int, columns: int, scheme: Scheme, stored: Stored) -> Codes:
    """Codes of the shapes that `resident` gives them."""
    size = scheme.group_size
    if kind is GgmlCodes:
        block = BLOCK_TYPES[block_of(scheme.name)]
        return GgmlCodes(torch.empty(rows, columns // block.size * block.nbytes, dtype=torch.uint8), block.name)
    if kind is TableCodes:
        count = -(-rows * columns // size)
        codes, table = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(16)
        if not stored.nested:
            return TableCodes(codes, torch.empty(count), table, size)
        inner, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(stored.nested)
        return TableCodes(codes, Nested(inner, absmax, torch.empty(256), torch.empty(1)), table, size)
    if kind is FloatCodes:
        blocks = (-(-rows // ALIGNED), -(-columns // ALIGNED)) if size else (1 if stored.single else rows, 1)
        given = torch.empty(1) if scheme.static_inputs else None
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        return FloatCodes(codes, torch.empty(blocks, dtype=stored.scales), ALIGNED if size else 0, given)
    groups = columns // (size or columns)
    order = torch.empty(columns, dtype=torch.int32) if stored.ordered else None
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    zeros = torch.empty((rows, groups) if stored.zeros else (1, 1), dtype=torch.uint8)
    return IntCodes(codes, torch.empty(rows, groups, dtype=stored.scales), zeros, scheme.weight_bits, order)


def resident(codes: Codes, stored: Stored) -> dict[str, Tensor]:
    """The tensors that the linear for these codes holds, by the names of its slots."""
    if isinstance(codes, IntCodes):
        if not stored.zeros:
            assert codes.symmetric, "zeros that no file stores are the middle code"
            codes = replace(codes, zeros=codes.zeros[:1, :1])
        return _packed(codes) if codes.bits <= NIBBLE else tensors(codes)
    if isinstance(codes, TableCodes) and isinstance(codes.absmax, Nested):
        codes = replace(codes, absmax=replace(codes.absmax, offset=torch.tensor([codes.absmax.offset])))
    return tensors(codes)


def held_bits(bits: int, columns: int) -> int:
    """Bits in which integers of up to 4 are held: as they are where that makes whole bytes."""
    return bits if bits in (2, 3) and columns % OCTET == 0 else NIBBLE


def _packed(codes: IntCodes) -> dict[str, Tensor]:
    values, order = codes.codes, {}
    if codes.groups is not None:
        order["order"] = codes.groups.argsort(stable=True).to(torch.int32)
        values = values[:, order["order"]]
    bits = held_bits(codes.bits, values.shape[1])
    packed = values[:, 0::2] | (values[:, 1::2] << NIBBLE) if bits == NIBBLE else pack_low(values, bits)
    return order | {"codes": packed, "scales": codes.scales, "zeros": codes.zeros}


def tensors(codes: Codes | Nested) -> dict[str, Tensor]:
    """The codes' tensors by field; those of a field that is coded itself as `field_inner`."""
    found: dict[str, Tensor] = {}
    for field in fields(codes):
        value = getattr(codes, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, Nested):
            found |= {f"{field.name}_{inner}": tensor for inner, tensor in tensors(value).items()}
    return found


def _rebuilt(form: Codes, held: Mapping[str, Tensor]) -> Codes:
    """`form` with the tensors that `tensors` told of."""
    changes: dict[str, Any] = {field.name: held[field.name] for field in fields(form) if field.name in held}
    if isinstance(form, TableCodes) and isinstance(form.absmax, Nested):
        inner: dict[str, Any] = {name: held[f"absmax_{name}"] for name in tensors(form.absmax)}
        changes["absmax"] = replace(form.absmax, **inner)
    return replace(form, **changes)


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
