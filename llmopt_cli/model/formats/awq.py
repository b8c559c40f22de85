"""The AWQ "gemm" file format: 4-bit codes, eight columns to a 32-bit word, as AutoAWQ writes and every engine reads it.

Pure functions between a linear's plain integers (codes, scales, zeros) and its stored tensors, and the
`quantization_config` beside them. Knows neither how codes are chosen nor how they are multiplied.

A linear `X` with weight [out, in] and groups of `g` inputs (G = in / g) is stored, with no g_idx, as
    X.qweight  int32  [in, out/8]    X.qzeros  int32  [G, out/8]    X.scales  float16  [G, out]
and means W[o, i] = (code[o, i] - zero[o, i // g]) * scale[o, i // g]. The zero is the true one: no "minus one".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.spec.scheme import Scheme, find_scheme

BITS = 4
WORD = 32 // BITS  # codes in one stored word
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i (bits 4i..4i+3) of word c holds column 8c + COLUMN_OF_NIBBLE[i]
SUFFIXES = ("qweight", "qzeros", "scales")


def pack(weight: IntCodes) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix; scales are rounded to float16 here.

    `out` must be a multiple of 8: callers refuse other shapes (`misfit`) before they quantize.
    """
    rows, columns = weight.codes.shape
    assert weight.bits == BITS
    assert misfit(rows, columns, weight.group_size) is None
    return {
        "qweight": _pack_columns(weight.codes.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
    }


def unpack(parts: Mapping[str, Tensor]) -> IntCodes:
    """The linear in its stored tensors, scales in their stored dtype.

    Raises CheckpointError if the three shapes do not belong together.
    """
    qweight, qzeros, scales = (parts[suffix] for suffix in SUFFIXES)
    groups, columns = scales.shape
    words = columns // WORD
    if columns % WORD or qweight.shape[0] % groups or qweight.shape[1] != words or qzeros.shape != (groups, words):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (qweight, qzeros, scales))
        raise CheckpointError(f"qweight, qzeros and scales of shapes {shapes} are not one AWQ-gemm linear")
    return IntCodes(
        _unpack_columns(qweight).T.contiguous(), scales.T.contiguous(), _unpack_columns(qzeros).T.contiguous()
    )


def misfit(out_features: int, in_features: int, group_size: int) -> str | None:
    """Why a linear of this shape cannot be stored, or None if it can."""
    if out_features % WORD:
        return f"its {out_features} outputs are no multiple of {WORD}"
    if group_size and in_features % group_size:
        return f"its {in_features} inputs are no multiple of the group size {group_size}"
    return None


def config(scheme: Scheme, modules_to_not_convert: Sequence[str] | None = None) -> dict[str, Any]:
    """`quantization_config` of config.json. The names are of modules left as they were, matched as substrings."""
    return {
        "quant_method": "awq",
        "bits": scheme.weight_bits,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(modules_to_not_convert) if modules_to_not_convert else None,
    }


def parse_config(found: Mapping[str, Any]) -> Scheme:
    """The scheme that a `quantization_config` declares; CheckpointError unless it is 4-bit gemm with zero points."""
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    group_size = found.get("group_size", 128)
    refusals = (
        (found.get("quant_method") != "awq", f"the method `{found.get('quant_method')}`"),
        (version != "gemm", f"the layout `{version}`"),
        (found.get("bits", BITS) != BITS, f"{found.get('bits')} bits"),
        (found.get("zero_point", True) is not True, "weights without zero points"),
        (not isinstance(group_size, int) or group_size < -1 or group_size == 0, f"the group size {group_size}"),
    )
    for refused, what in refusals:
        if refused:
            raise CheckpointError(
                f"the AWQ reader takes 4-bit `gemm` weights with zero points; this checkpoint has {what}",
                "give the unquantized model to `llmopt quantize --method awq`",
            )
    return replace(find_scheme("awq"), group_size=max(group_size, 0))


def _pack_columns(codes: Tensor) -> Tensor:
    """uint8 [rows, columns] -> int32 [rows, columns/8]."""
    nibbles = codes.reshape(codes.shape[0], -1, WORD)[..., list(COLUMN_OF_NIBBLE)].to(torch.int32)
    return (nibbles << _shifts(codes)).sum(-1, dtype=torch.int32)


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 [rows, columns/8] -> uint8 [rows, columns]."""
    nibbles = ((words[..., None] >> _shifts(words)) & (2**BITS - 1)).to(torch.uint8)
    codes = torch.empty_like(nibbles)
    codes[..., list(COLUMN_OF_NIBBLE)] = nibbles
    return codes.view(words.shape[0], -1)


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, BITS, dtype=torch.int32, device=like.device)
