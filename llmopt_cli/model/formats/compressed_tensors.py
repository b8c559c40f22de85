"""The compressed-tensors file format of vLLM and llm-compressor: packed integers, int8 and fp8 products.

A linear `X` with weight [out, in] and G groups of inputs is stored, at `b` bits, in one of three ways:
    pack-quantized   X.weight_packed int32 [out, ceil(in*b/32)], the bit stream of a row's codes (dense since 0.18);
                     X.weight_scale [out, G]; X.weight_shape int64 [2]; with zeros, X.weight_zero_point int32
                     [ceil(out*b/32), G], the bit stream of a group's zeros; maybe X.weight_g_idx int32 [in]
    int-quantized    X.weight int8 [out, in], X.weight_scale [out, 1]
    float-quantized  X.weight float8_e4m3fn [out, in], X.weight_scale [out, 1], [1] or [ceil(out/128), ceil(in/128)];
                     maybe X.input_scale [1]
A code is stored plus 2**(b-1), as are zeros; a weight is (code - zero) * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.model.codes import Codes, FloatCodes, IntCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, check_groups, group_misfit, refuse, taken
from llmopt_cli.model.formats.words import pack_words, unpack_words
from llmopt_cli.spec.scheme import Scheme, find_scheme

BITS = (2, 3, 4, 8)
BLOCK = 128
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
)
LAYOUT = {"bf16": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}  # by what is multiplied
READER = "the compressed-tensors reader takes packed integers, and int8 or fp8 weights with inputs of the same"


def pack(weight: IntCodes | FloatCodes, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix; scales keep their dtype."""
    if isinstance(weight, FloatCodes):
        return _pack_float(weight)
    return _pack_int8(weight) if scheme.compute == "int8" else _pack_words(weight, scheme)


def _pack_words(weight: IntCodes, scheme: Scheme) -> dict[str, Tensor]:
    assert weight.symmetric or not scheme.symmetric
    assert weight.groups is None
    parts = {
        "weight_packed": pack_words(weight.codes, weight.bits),
        "weight_scale": weight.scales.cpu().contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = pack_words(weight.zeros.T, weight.bits).T.contiguous()
    return parts


def _pack_int8(weight: IntCodes) -> dict[str, Tensor]:
    assert weight.bits == 8
    assert weight.symmetric
    codes = (weight.codes.to(torch.int16) - 128).to("cpu", torch.int8)
    return {"weight": codes.contiguous(), "weight_scale": weight.scales.cpu().contiguous()}


def _pack_float(weight: FloatCodes) -> dict[str, Tensor]:
    scales = weight.scales.cpu().contiguous()
    parts = {"weight": weight.codes.cpu().contiguous(), "weight_scale": scales}
    if weight.scales.numel() == 1 and not weight.block:
        parts["weight_scale"] = scales.view(1)
    if weight.input_scale is not None:
        parts["input_scale"] = weight.input_scale.to("cpu", torch.float32).view(1)
    return parts


def unpack(parts: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The linear in its stored tensors, scales in their stored dtype."""
    if "weight_packed" in parts:
        return check_groups(_unpack_words(parts, scheme), scheme)
    [weight] = taken(parts, "weight")
    return _unpack_int8(parts) if weight.dtype == torch.int8 else _unpack_float(parts, scheme)


def _unpack_words(parts: Mapping[str, Tensor], scheme: Scheme) -> IntCodes:
    packed, scales, shape = taken(parts, "weight_packed", "weight_scale", "weight_shape")
    bits = scheme.weight_bits
    rows, columns = (int(size) for size in shape) if shape.numel() == 2 else (0, 0)
    what = f"one packed linear of {bits} bits and shape {[rows, columns]}"
    check(packed.shape == (rows, -(-columns * bits // 32)) and scales.ndim == 2, parts, what)
    check(scales.shape[0] == rows and columns % scales.shape[1] == 0, parts, what)
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if not scheme.symmetric:
        [stored] = taken(parts, "weight_zero_point")
        check(stored.shape == (-(-rows * bits // 32), scales.shape[1]), parts, what)
        zeros = unpack_words(stored.T, bits, rows).T.contiguous()
    groups = parts.get("weight_g_idx")
    return IntCodes(unpack_words(packed, bits, columns), scales, zeros, bits, groups)


def _unpack_int8(parts: Mapping[str, Tensor]) -> IntCodes:
    weight, scales = taken(parts, "weight", "weight_scale")
    check(scales.numel() in (1, weight.shape[0]), parts, "one int8 linear with a scale a row")
    scales = scales.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)
    return IntCodes(codes, scales, torch.full_like(scales, 128, dtype=torch.uint8), 8)


def _unpack_float(parts: Mapping[str, Tensor], scheme: Scheme) -> FloatCodes:
    weight, scales = taken(parts, "weight", "weight_scale")
    check(weight.dtype == torch.float8_e4m3fn and weight.ndim == 2, parts, "one fp8 linear")
    given = taken(parts, "input_scale")[0].float().view(1) if scheme.static_inputs else None
    if scheme.group_size:
        blocks = tuple(-(-size // BLOCK) for size in weight.shape)
        check(scales.shape == blocks, parts, f"one fp8 linear in blocks of {BLOCK}")
        return FloatCodes(weight, scales, BLOCK, given)
    check(scales.numel() in (1, weight.shape[0]), parts, "one fp8 linear with a scale a row")
    return FloatCodes(weight, scales.reshape(-1, 1), 0, given)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be stored, or None if it can."""
    if scheme.weight_bits not in BITS or scheme.compute not in LAYOUT:
        return f"compressed-tensors files hold 2, 3, 4 or 8 bits a weight, or fp8, not {scheme.name}"
    if scheme.compute == "int8" and (scheme.group_size or not scheme.symmetric):
        return "int8 products take one symmetric scale a row"
    return None if scheme.compute == "fp8" else group_misfit(in_features, scheme)


def config(scheme: Scheme, left: Sequence[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """`quantization_config` of config.json: a group for all linears, and one for each other scheme."""
    groups = {"group_0": _group(["Linear"], scheme)}
    for index, other in enumerate(dict.fromkeys(exceptions.values()), 1):
        groups[f"group_{index}"] = _group([name for name, one in exceptions.items() if one == other], other)
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.20.0",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(left),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
    }


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    inputs = None if scheme.compute == "bf16" else _inputs(scheme)
    return {
        "targets": targets,
        "weights": _weights(scheme),
        "input_activations": inputs,
        "output_activations": None,
        "format": LAYOUT[scheme.compute],
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    kind = "float" if scheme.compute == "fp8" else "int"
    common = {"num_bits": scheme.weight_bits, "type": kind, "symmetric": scheme.symmetric, "dynamic": False}
    if scheme.compute == "fp8" and scheme.group_size:
        return common | {"strategy": "block", "block_structure": [BLOCK, BLOCK], "group_size": None}
    if scheme.compute == "fp8" and scheme.static_inputs:
        return common | {"strategy": "tensor", "group_size": None}
    if scheme.group_size:
        return common | {"strategy": "group", "group_size": scheme.group_size}
    return common | {"strategy": "channel", "group_size": None}


def _inputs(scheme: Scheme) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float" if scheme.compute == "fp8" else "int", "symmetric": True}
    if scheme.static_inputs:
        return common | {"strategy": "tensor", "dynamic": False}
    if scheme.group_size:
        return common | {"strategy": "group", "group_size": BLOCK, "dynamic": True}
    return common | {"strategy": "token", "dynamic": True}


def parse_config(found: Mapping[str, Any]) -> Schemes:
    """What a `quantization_config` declares; CheckpointError unless `unpack` reads all of its groups."""
    method, groups = found.get("quant_method"), found.get("config_groups")
    refusals = (
        (method != "compressed-tensors", f"the method `{method}`"),
        (not isinstance(groups, dict) or not groups, "no config_groups"),
        (found.get("quantization_status", "compressed") != "compressed", "weights that were not compressed"),
        (bool((found.get("sparsity_config") or {}).get("format", "dense") != "dense"), "sparse weights"),
        (bool(found.get("transform_config")), "rotations to be made at run time"),
    )
    refuse(refusals, READER)
    schemes = {tuple(group.get("targets", ())): _scheme(group) for group in found["config_groups"].values()}
    named = [(target, scheme) for targets, scheme in schemes.items() for target in targets if target != "Linear"]
    rest = next((scheme for targets, scheme in schemes.items() if "Linear" in targets), next(iter(schemes.values())))
    return Schemes(rest, tuple((_pattern(target), scheme) for target, scheme in named))


def _pattern(target: str) -> str:
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights: Mapping[str, Any] = group.get("weights") or {}
    inputs = group.get("input_activations")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    bits: Any = weights.get("num_bits")
    size: Any = weights.get("group_size")
    grouped = strategy == "group"
    refuse(
        (
            (kind not in ("int", "float") or bits not in BITS, f"weights of {bits} bits, type `{kind}`"),
            (kind == "float" and bits != 8, f"floats of {bits} bits"),
            (strategy not in ("group", "channel", "tensor", "block"), f"the strategy `{strategy}` for weights"),
            (strategy == "block" and kind == "int", "integers in blocks"),
            (strategy == "block" and list(weights.get("block_structure") or ()) != [BLOCK, BLOCK], "other blocks"),
            (grouped and (kind == "float" or not isinstance(size, int) or size < 1), f"groups of {size}"),
        ),
        READER,
    )
    compute = _compute(kind, bits, inputs)
    if kind == "float":
        static = inputs is not None and inputs.get("dynamic") is False
        name = "fp8_block" if strategy == "block" else "fp8"
        return replace(find_scheme(name), compute=compute, static_inputs=static)
    symmetric = weights.get("symmetric", True) is True
    base = find_scheme("w8a8" if compute == "int8" else "gptq")
    return replace(base, weight_bits=bits, group_size=size if grouped else 0, symmetric=symmetric, compute=compute)


def _compute(kind: str, bits: Any, inputs: Mapping[str, Any] | None) -> Any:
    """What is multiplied: "int8" and "fp8" where inputs are rounded to it, else "bf16"."""
    if inputs is None:
        return "bf16"
    dynamic = inputs.get("dynamic") is True
    refuse(
        (
            (inputs.get("type") != kind or inputs.get("num_bits") != 8 or bits != 8, "inputs of another precision"),
            (inputs.get("symmetric", True) is not True, "inputs with a zero point"),
            (kind == "int" and not dynamic, "int8 inputs whose scale is fixed beforehand"),
            (dynamic and inputs.get("strategy") not in ("token", "group"), "inputs scaled otherwise than by token"),
        ),
        READER,
    )
    return "int8" if kind == "int" else "fp8"


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    quant_method="compressed-tensors",
    bits=BITS,
    markers=("weight_scale",),
    suffixes=SUFFIXES,
    engines={
        "llmopt": "yes",
        "vLLM": "yes",
        "SGLang": "yes",
        "transformers": "yes; weights with zeros only with dequantize=True",
    },
    pack=pack,
    unpack=unpack,
    misfit=misfit,
    config=config,
    parse_config=parse_config,
    cache_key="kv_cache_scheme",
)
