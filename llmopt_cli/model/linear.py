"""Linear layers as the runtime holds them: several members of one input run as one product, weights packed or not.

A member is a linear of the checkpoint (`q_proj`); its rows are a slice of the merged tensor, so weights stream straight
into place and nothing is copied to fuse. Knows no file format: formats unpack into the one in-memory form here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_kernels import int4_linear


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
    """Integer weights that stay packed in memory, unpacked where they are used.

    `codes` uint8 (out, in/2), two 4-bit codes a byte, even column low; `scales` float32 and `zeros` uint8 (out, G). A
    weight is `(code - zero) * scale`; `dtype` is that of input and output.
    """

    def __init__(self, members: Mapping[str, int], in_features: int, group_size: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        rows, groups = sum(members.values()), in_features // group_size
        self.members, self.in_features, self.group_size, self.dtype = dict(members), in_features, group_size, dtype
        self.codes = nn.Parameter(torch.empty(rows, in_features // 2, dtype=torch.uint8), requires_grad=False)
        # float32 holds every file's scales exactly, whatever the model computes in.
        self.scales = nn.Parameter(torch.empty(rows, groups, dtype=torch.float32), requires_grad=False)
        self.zeros = nn.Parameter(torch.empty(rows, groups, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def like(cls, name: str, linear: nn.Linear, group_size: int) -> Self:
        """An empty packed twin of `linear`; `group_size` 0 is one group a row."""
        size = group_size or linear.in_features
        members = {name: linear.out_features}
        return cls(members, linear.in_features, size, linear.bias is not None, linear.weight.dtype)

    @classmethod
    def merged(cls, members: Sequence[PackedLinear]) -> PackedLinear | None:
        """One packed linear with the rows of all, or None if their storage does not agree."""
        first = members[0]
        if any(
            member.group_size != first.group_size or (member.bias is None) != (first.bias is None) for member in members
        ):
            return None
        names = {name: rows for member in members for name, rows in member.members.items()}
        return cls(names, first.in_features, first.group_size, first.bias is not None, first.dtype)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """(`member.codes`, its rows) for every member and tensor."""
        tensors = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        return member_slots(self.members, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        out = int4_linear(x, self.codes, self.scales, self.zeros)
        return out if self.bias is None else out + self.bias


def merge(members: Mapping[str, nn.Module]) -> nn.Module | None:
    """One module for linears of the same input, empty, to be filled through its slots; None if they cannot be one."""
    linears = list(members.values())
    if all(type(linear) is nn.Linear for linear in linears):
        plain = {name: linear for name, linear in members.items() if isinstance(linear, nn.Linear)}
        agree = len({linear.bias is None for linear in plain.values()}) == 1
        return MergedLinear(plain) if agree else None
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    return PackedLinear.merged(packed) if len(packed) == len(linears) else None


def member_slots(members: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """Each member's rows of each tensor, under the name `member.tensor`."""
    start = 0
    for name, rows in members.items():
        for suffix, tensor in tensors.items():
            if tensor is not None:
                yield f"{name}.{suffix}", tensor.data[start : start + rows]
        start += rows
