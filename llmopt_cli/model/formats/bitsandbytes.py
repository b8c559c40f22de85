"""The bitsandbytes file format: NF4 and FP4 with or without double quantization (arXiv 2305.14314), LLM.int8.

A linear `X` with weight [out, in] is stored in 4 bits, in n = ceil(out * in / 64) flat blocks, as
    X.weight            uint8 [out*in/2, 1], two codes a byte, the first in the high nibble
    X.weight.absmax     float32 [n], or uint8 [n] under double quantization
    X.weight.quant_map  float32 [16]
    X.weight.nested_absmax float32 [ceil(n/256)], X.weight.nested_quant_map float32 [256]    double quantization
    X.weight.quant_state.bitsandbytes__nf4 (or __fp4)    JSON as uint8: blocks, shape, offset of the absmax
and in 8 bits as X.weight int8 [out, in], X.SCB float32 [out] (a weight is code * SCB / 127), X.weight_format uint8 [].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.model.codes import IntCodes, Nested, TableCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, refuse, taken
from llmopt_cli.spec.scheme import Scheme, find_scheme

STATE = "weight.quant_state.bitsandbytes__"
SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"{STATE}nf4",
    f"{STATE}fp4",
    "SCB",
    "weight_format",
)
OUTLIERS = 6.0  # inputs at least this large stay in 16 bits (arXiv 2208.07339)
BLOCK, NESTED_BLOCK = 64, 256
TOP = 127
# Quantiles of the normal distribution, as appendix E of arXiv 2305.14314 lists them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4": FP4}


def code_table(name: str) -> Tensor:
    """The 16 values of `nf4` or `fp4`, float32, in the order of their codes."""
    return torch.tensor(TABLES[name], dtype=torch.float32)


def nested_table() -> Tensor:
    """The 256 values of double quantization, float32 ascending: dynamic tree quantization (arXiv 1511.04561).

    The decade of 10**-k has 2**(6-k) values of either sign, in the middle of equal parts of it; and there are 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        middles = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [sign * middle for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)


def pack(weight: TableCodes | IntCodes, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix."""
    return _pack_int8(weight) if isinstance(weight, IntCodes) else _pack_table(weight, scheme)


def _pack_int8(weight: IntCodes) -> dict[str, Tensor]:
    assert weight.bits == 8
    assert weight.symmetric
    assert weight.scales.shape[1] == 1
    codes = (weight.codes.to(torch.int16) - 128).to("cpu", torch.int8)
    scales = weight.scales.float().flatten().cpu()
    absmax = _absmax(scales)
    assert torch.equal(absmax / TOP, scales), "the scales of LLM.int8 are a maximum over 127"
    return {
        "weight": codes.contiguous(),
        "SCB": absmax,
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


def _absmax(scales: Tensor) -> Tensor:
    """A float32 that divided by 127 is exactly `scales`; the product rounds, so that its neighbours are tried too."""
    found = near = scales * TOP
    for step in (-torch.inf, torch.inf):
        other = near.nextafter(torch.full_like(near, step))
        found = torch.where(found / TOP == scales, found, other)
    return found


def _pack_table(weight: TableCodes, scheme: Scheme) -> dict[str, Tensor]:
    rows, pairs = weight.codes.shape
    state: dict[str, Any] = {
        "quant_type": scheme.name,
        "blocksize": weight.blocksize,
        "dtype": "bfloat16",
        "shape": [rows, 2 * pairs],
    }
    parts = {"weight": weight.codes.reshape(-1, 1).cpu(), "weight.quant_map": weight.table.cpu()}
    if isinstance(weight.absmax, Nested):
        nested = weight.absmax
        parts["weight.absmax"] = nested.codes.cpu()
        parts["weight.nested_absmax"] = nested.absmax.cpu()
        parts["weight.nested_quant_map"] = nested.table.cpu()
        state |= {
            "nested_blocksize": nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
    else:
        parts["weight.absmax"] = weight.absmax.cpu()
    parts[f"{STATE}{scheme.name}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts


def unpack(parts: Mapping[str, Tensor], scheme: Scheme) -> TableCodes | IntCodes:
    """The linear in its stored tensors."""
    return _unpack_int8(parts) if scheme.weight_bits == 8 else _unpack_table(parts, scheme)


def _unpack_int8(parts: Mapping[str, Tensor]) -> IntCodes:
    weight, absmax = taken(parts, "weight", "SCB")
    layout = parts.get("weight_format")
    fits = weight.dtype == torch.int8 and weight.ndim == 2 and absmax.numel() == weight.shape[0]
    check(fits and (layout is None or int(layout) == 0), parts, "one LLM.int8 linear in rows")
    scales = (absmax.float() / TOP).view(-1, 1)
    return IntCodes((weight.short() + 128).to(torch.uint8), scales, torch.full_like(scales, 128, dtype=torch.uint8), 8)


def _unpack_table(parts: Mapping[str, Tensor], scheme: Scheme) -> TableCodes:
    packed, absmax, table = taken(parts, "weight", "weight.absmax", "weight.quant_map")
    state = _state(parts)
    (rows, columns), size = state["shape"], state["blocksize"]
    blocks = -(-rows * columns // size)
    fits = packed.dtype == torch.uint8 and 2 * packed.numel() == rows * columns and columns % 2 == 0
    what = f"one 4-bit linear of shape {[rows, columns]} in blocks of {scheme.group_size}"
    check(fits and size == scheme.group_size and absmax.shape == (blocks,) and table.shape == (16,), parts, what)
    codes = packed.view(rows, columns // 2)
    if "weight.nested_absmax" not in parts:
        return TableCodes(codes, absmax.float(), table.float(), size)
    outer, outer_table = taken(parts, "weight.nested_absmax", "weight.nested_quant_map")
    outer_size = int(state.get("nested_blocksize", NESTED_BLOCK))
    check(outer.shape == (-(-blocks // outer_size),) and outer_table.shape == (256,), parts, "double quantization")
    nested = Nested(absmax, outer.float(), outer_table.float(), float(state["nested_offset"]), outer_size)
    return TableCodes(codes, nested, table.float(), size)


def _state(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    stored = next((tensor for suffix, tensor in parts.items() if suffix.startswith(STATE)), None)
    try:
        state = json.loads(bytes(stored.tolist())) if stored is not None else {}
        rows, columns = state["shape"]
        whole = all(isinstance(number, int) and number > 0 for number in (rows, columns, state["blocksize"]))
        nested = "weight.nested_absmax" not in parts or isinstance(state["nested_offset"], float)
    except (ValueError, KeyError, TypeError):
        whole = nested = False
    if not (whole and nested):
        raise CheckpointError("a bitsandbytes linear lacks a readable quant_state", "download the checkpoint again")
    return dict(state)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be stored, or None if it can."""
    if scheme.weight_bits == 8:
        return "LLM.int8 files hold one scale a row" if scheme.group_size else None
    if scheme.name not in TABLES:
        return f"bitsandbytes files hold nf4, fp4 or int8, not {scheme.name}"
    return f"its {in_features} inputs are no multiple of 2" if in_features % 2 else None


def config(scheme: Scheme, left: Sequence[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if exceptions:
        raise UsageError("a bitsandbytes file holds one precision for all linears", "leave --target-bpw out")
    small, name = scheme.weight_bits == 4, scheme.name if scheme.weight_bits == 4 else "fp4"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": small,
        "_load_in_4bit": small,
        "load_in_8bit": not small,
        "_load_in_8bit": not small,
        "bnb_4bit_quant_type": name,
        "bnb_4bit_use_double_quant": double_quantized(scheme),
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.outliers or OUTLIERS,
        "llm_int8_skip_modules": list(left) or None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def double_quantized(scheme: Scheme) -> bool:
    """Whether the blocks' absolute maxima are 8-bit codes."""
    return scheme.weight_bits == 4 and scheme.scale_bits == 8


def parse_config(found: Mapping[str, Any]) -> Schemes:
    """What a `quantization_config` declares; CheckpointError unless it is 4-bit nf4 or fp4, or LLM.int8."""
    small, large = found.get("load_in_4bit") is True, found.get("load_in_8bit") is True
    name, storage = found.get("bnb_4bit_quant_type", "fp4"), found.get("bnb_4bit_quant_storage", "uint8")
    refusals = (
        (found.get("quant_method") != "bitsandbytes", f"the method `{found.get('quant_method')}`"),
        (small == large, "neither 4 nor 8-bit weights"),
        (small and name not in TABLES, f"the table `{name}`"),
        (small and storage != "uint8", f"codes stored as `{storage}`"),
    )
    refuse(refusals, "the bitsandbytes reader takes nf4, fp4 and int8 weights")
    if large:
        threshold = float(found.get("llm_int8_threshold", OUTLIERS))
        return Schemes(replace(find_scheme("int8"), compute="int8", scale_bits=32, outliers=threshold))
    scheme = replace(find_scheme("nf4"), name=str(name))
    nested = replace(scheme, scale_bits=8, extra_bits=32 / (BLOCK * NESTED_BLOCK))
    return Schemes(nested if found.get("bnb_4bit_use_double_quant") else scheme)


BITSANDBYTES = Format(
    name="bitsandbytes",
    quant_method="bitsandbytes",
    bits=(4, 8),
    markers=("weight.absmax", "SCB"),
    suffixes=SUFFIXES,
    engines={"llmopt": "yes", "transformers": "yes", "vLLM": "on GPUs"},
    pack=pack,
    unpack=unpack,
    misfit=misfit,
    config=config,
    parse_config=parse_config,
)
