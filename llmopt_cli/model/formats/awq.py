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

from llmopt_cli.errors import UsageError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, check_groups, group_misfit, refuse, taken
from llmopt_cli.spec.scheme import Scheme, find_scheme

BITS = 4
WORD = 32 // BITS  # codes in one stored word
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i (bits 4i..4i+3) of word c holds column 8c + COLUMN_OF_NIBBLE[i]
SUFFIXES = ("qweight", "qzeros", "scales")


def pack(weight: IntCodes, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix; scales are rounded to float16 here.

    `out` must be a multiple of 8: callers refuse other shapes (`misfit`) before they quantize.
    """
    rows, columns = weight.codes.shape
    assert weight.groups is None
    assert misfit(rows, columns, replace(scheme, group_size=weight.group_size)) is None
    return {
        "qweight": _pack_columns(weight.codes.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], scheme: Scheme) -> IntCodes:
    """The linear in its stored tensors, scales in their stored dtype.

    Raises CheckpointError if the three shapes do not belong together.
    """
    qweight, qzeros, scales = taken(parts, *SUFFIXES)
    groups, columns = scales.shape
    words = columns // WORD
    fits = columns % WORD == 0 and qweight.shape[0] % groups == 0 and qweight.shape[1] == words
    check(fits and qzeros.shape == (groups, words), parts, "one AWQ-gemm linear")
    codes, zeros = _unpack_columns(qweight).T.contiguous(), _unpack_columns(qzeros).T.contiguous()
    return check_groups(IntCodes(codes, scales.T.contiguous(), zeros), scheme)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be stored, or None if it can."""
    if scheme.weight_bits != BITS:
        return f"AWQ-gemm files hold {BITS} bits a weight, not {scheme.weight_bits}"
    if not scheme.weight_only:
        return "AWQ files say nothing of rounded inputs"
    if out_features % WORD:
        return f"its {out_features} outputs are no multiple of {WORD}"
    return group_misfit(in_features, scheme)


def config(scheme: Scheme, left: Sequence[str] = (), exceptions: Mapping[str, Scheme] | None = None) -> dict[str, Any]:
    """`quantization_config` of config.json. The names are of modules left as they were, matched as substrings."""
    if exceptions:
        raise UsageError("an AWQ file holds one precision for all linears", "take --format compressed-tensors or gptq")
    return {
        "quant_method": "awq",
        "bits": scheme.weight_bits,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(left) or None,
    }


def parse_config(found: Mapping[str, Any]) -> Schemes:
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
    refuse(refusals, "the AWQ reader takes 4-bit `gemm` weights with zero points")
    return Schemes(replace(find_scheme("awq"), group_size=max(group_size, 0)))


AWQ = Format(
    name="awq",
    quant_method="awq",
    bits=(BITS,),
    markers=("qweight",),
    suffixes=SUFFIXES,
    engines={"llmopt": "yes", "vLLM": "yes", "SGLang": "yes", "transformers": "with gptqmodel"},
    pack=pack,
    unpack=unpack,
    misfit=misfit,
    config=config,
    parse_config=parse_config,
    head_key="lm_head",
)


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
