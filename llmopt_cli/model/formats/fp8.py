"""The `fp8` file format of transformers and DeepSeek: e4m3 weights, a float32 scale for each square block.

A linear `X` with weight [out, in] is stored as
    X.weight            float8_e4m3fn [out, in]
    X.weight_scale_inv  float32 [ceil(out/128), ceil(in/128)], or one number for the whole weight
and means weight * weight_scale_inv, despite the name. Inputs are rounded to e4m3 when they come: 128 of a token share
a scale, or the whole token where the weight has one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.model.codes import FloatCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, refuse, taken
from llmopt_cli.spec.scheme import Scheme, find_scheme

BLOCK = 128


def pack(weight: FloatCodes, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix."""
    assert weight.block == (BLOCK if scheme.group_size else 0)
    assert weight.block or weight.scales.numel() == 1
    scales = weight.scales if weight.block else weight.scales.view(())
    return {"weight": weight.codes.cpu().contiguous(), "weight_scale_inv": scales.to("cpu", torch.float32).contiguous()}


def unpack(parts: Mapping[str, Tensor], scheme: Scheme) -> FloatCodes:
    """The linear in its stored tensors."""
    weight, scales = taken(parts, "weight", "weight_scale_inv")
    check(weight.dtype == torch.float8_e4m3fn and weight.ndim == 2, parts, "one fp8 linear")
    if not scheme.group_size:
        check(scales.numel() == 1, parts, "one fp8 linear with one scale")
        return FloatCodes(weight, scales.float().view(1, 1))
    blocks = tuple(-(-size // BLOCK) for size in weight.shape)
    check(scales.shape == blocks, parts, f"one fp8 linear in blocks of {BLOCK}")
    return FloatCodes(weight, scales.float(), BLOCK)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear cannot be stored, or None: every shape can."""
    if scheme.compute != "fp8" or scheme.static_inputs:
        return f"fp8 files hold e4m3 weights whose inputs are scaled when they come, not {scheme.name}"
    return None


def config(scheme: Scheme, left: Sequence[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if exceptions:
        raise UsageError("an fp8 file holds one precision for all linears", "take --format compressed-tensors")
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK] if scheme.group_size else None,
        "scale_fmt": "float",
        "modules_to_not_convert": list(left) or None,
    }


def parse_config(found: Mapping[str, Any]) -> Schemes:
    """What a `quantization_config` declares; CheckpointError unless inputs are scaled when they come."""
    block = found.get("weight_block_size", [BLOCK, BLOCK])
    refusals = (
        (found.get("quant_method") != "fp8", f"the method `{found.get('quant_method')}`"),
        (found.get("activation_scheme", "dynamic") != "dynamic", "input scales fixed beforehand"),
        (block is not None and list(block) != [BLOCK, BLOCK], f"blocks of {block}"),
        (found.get("scale_fmt") not in (None, "float"), f"scales stored as `{found.get('scale_fmt')}`"),
    )
    refuse(refusals, f"the fp8 reader takes e4m3 weights with one scale, or one for each {BLOCK} x {BLOCK}")
    return Schemes(find_scheme("fp8_block" if block else "fp8"))


FP8 = Format(
    name="fp8",
    quant_method="fp8",
    bits=(8,),
    markers=("weight_scale_inv",),
    suffixes=("weight", "weight_scale_inv"),
    engines={"llmopt": "yes", "transformers": "yes", "vLLM": "on GPUs", "SGLang": "on GPUs"},
    pack=pack,
    unpack=unpack,
    misfit=misfit,
    config=config,
    parse_config=parse_config,
)
