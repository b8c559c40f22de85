"""The GPTQ file formats, v1 and v2: 2, 3, 4 or 8-bit codes in dense words along the inputs.

A linear `X` with weight [out, in] and G groups of inputs is stored, at `b` bits, as
    X.qweight  int32 [in*b/32, out]   word r of column o continues the bit stream of the codes of output o
    X.qzeros   int32 [G, out*b/32]    the bit stream of a group's zeros, in the order of the outputs
    X.scales   float16 [G, out]       X.g_idx  int32 [in], the group of every input
and means W[o, i] = (code[o, i] - zero[o, g]) * scale[o, g] with g = g_idx[i]. Version 1 stores zero - 1, version 2 the
zero itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmopt_cli import __version__
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, check_groups, group_misfit, refuse, taken
from llmopt_cli.model.formats.words import pack_words, unpack_words
from llmopt_cli.spec.scheme import Scheme, find_scheme

BITS = (2, 3, 4, 8)
WHOLE = 32  # inputs and outputs come in multiples of it, so that words end where rows do
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
READER = "the GPTQ reader takes weights of 2, 3, 4 or 8 bits"


def pack(weight: IntCodes, scheme: Scheme, version: int) -> dict[str, Tensor]:
    """The stored tensors of one linear; scales are rounded to float16 here."""
    rows, columns = weight.codes.shape
    assert misfit(rows, columns, replace(scheme, weight_bits=weight.bits)) is None
    assert weight.symmetric or not scheme.symmetric
    assert weight.groups is None
    if version == 1:
        weight = without_zero_zero(weight)
    stored_zeros = (weight.zeros - (2 - version)) & (2**weight.bits - 1)
    return {
        "qweight": pack_words(weight.codes, weight.bits).T.contiguous(),
        "qzeros": pack_words(stored_zeros.T, weight.bits),
        "scales": weight.scales.T.to("cpu", torch.float16).contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // weight.group_size,
    }


def without_zero_zero(weight: IntCodes) -> IntCodes:
    """The same weight with no zero of 0, which version 1 cannot store: minus one, it wraps to the largest number.

    Such a group is turned round: codes and zero count from the other end, and the scale changes its sign.
    """
    top = 2**weight.bits - 1
    turned = weight.zeros == 0
    if not bool(turned.any()):
        return weight
    group_of = torch.arange(weight.codes.shape[1], device=turned.device) // weight.group_size
    return replace(
        weight,
        codes=torch.where(turned[:, group_of], top - weight.codes, weight.codes),
        zeros=torch.where(turned, top, weight.zeros),
        scales=torch.where(turned, -weight.scales, weight.scales),
    )


def unpack(parts: Mapping[str, Tensor], scheme: Scheme, version: int) -> IntCodes:
    """The linear in its stored tensors, scales in their stored dtype."""
    qweight, qzeros, scales = taken(parts, "qweight", "qzeros", "scales")
    bits = scheme.weight_bits
    groups, rows = scales.shape
    columns = qweight.shape[0] * 32 // bits
    words = -(-rows * bits // 32)
    fits = columns * bits == qweight.shape[0] * 32 and qweight.shape[1] == rows and qzeros.shape == (groups, words)
    check(fits and columns % groups == 0, parts, f"one GPTQ linear of {bits} bits")
    zeros = unpack_words(qzeros, bits, rows).T.contiguous()
    codes = unpack_words(qweight.T, bits, columns)
    zeros = (zeros + (2 - version)) & (2**bits - 1)
    order = _order(parts, columns, groups)
    return check_groups(IntCodes(codes, scales.T.contiguous(), zeros, bits, order), scheme)


def _order(parts: Mapping[str, Tensor], columns: int, groups: int) -> Tensor | None:
    """g_idx where it is not what every reader would assume."""
    order = parts.get("g_idx")
    if order is None or torch.equal(order, torch.arange(columns, dtype=order.dtype) // (columns // groups)):
        return None
    fits = order.shape == (columns,) and int(order.min()) >= 0
    equal = fits and torch.equal(order.long().bincount(), torch.full((groups,), columns // groups))
    check(equal, parts, "one GPTQ linear whose g_idx makes groups of one size")
    return order.to(torch.int32)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be stored, or None if it can."""
    if scheme.weight_bits not in BITS:
        return f"GPTQ files hold 2, 3, 4 or 8 bits a weight, not {scheme.weight_bits}"
    if not scheme.weight_only:
        return "GPTQ files say nothing of rounded inputs"
    for count, side in ((out_features, "outputs"), (in_features, "inputs")):
        if count % WHOLE:
            return f"its {count} {side} are no multiple of {WHOLE}"
    return group_misfit(in_features, scheme)


def config(scheme: Scheme, left: Sequence[str], exceptions: Mapping[str, Scheme], version: int) -> dict[str, Any]:
    """`quantization_config` of config.json, and content of quantize_config.json.

    `dynamic` names what is other than the rest, as regular expressions: `-:` for linears left alone.
    """
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in left if name != "lm_head"}
    for name, other in exceptions.items():
        dynamic[f"+:^{re.escape(name)}$"] = _grid(other)
    found = {
        "quant_method": "gptq",
        **_grid(scheme),
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": _name(version),
        "pack_dtype": "int32",
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "meta": {"quantizer": [f"llmopt:{__version__}"]},
    }
    return found | {"dynamic": dynamic} if dynamic else found


def _grid(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.weight_bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}


def parse_config(found: Mapping[str, Any]) -> Schemes:
    """What a `quantization_config` declares; CheckpointError unless it is GPTQ of 2, 3, 4 or 8 bits, v1 or v2."""
    layout = found.get("checkpoint_format") or "gptq"
    refuse(
        (
            (found.get("quant_method") != "gptq", f"the method `{found.get('quant_method')}`"),
            (layout not in (_name(1), _name(2)), f"the layout `{layout}`"),
        ),
        READER,
    )
    dynamic = found.get("dynamic") or {}
    changed = {key: value for key, value in dynamic.items() if not key.startswith("-:")}
    rules = tuple((key.removeprefix("+:"), _scheme(dict(found) | value)) for key, value in changed.items())
    return Schemes(_scheme(found), rules)


def _scheme(found: Mapping[str, Any]) -> Scheme:
    bits: Any = found.get("bits")
    group_size: Any = found.get("group_size", -1)
    refuse(
        (
            (bits not in BITS, f"{bits} bits"),
            (not isinstance(group_size, int) or group_size < -1 or group_size == 0, f"the group size {group_size}"),
        ),
        READER,
    )
    symmetric = found.get("sym", True) is True
    return replace(
        find_scheme("gptq"), weight_bits=bits, group_size=max(group_size, 0), symmetric=symmetric, zero_bits=bits
    )


def _name(version: int) -> str:
    return "gptq" if version == 1 else "gptq_v2"


def _format(version: int, engines: Mapping[str, str]) -> Format:
    return Format(
        name=_name(version),
        quant_method="gptq",
        bits=BITS,
        markers=("qweight",),
        suffixes=SUFFIXES,
        engines=engines,
        pack=partial(pack, version=version),
        unpack=partial(unpack, version=version),
        misfit=misfit,
        config=partial(config, version=version),
        parse_config=parse_config,
        config_copy="quantize_config.json",
        head_key="lm_head",
    )


GPTQ = _format(1, {"llmopt": "yes", "vLLM": "symmetric weights", "SGLang": "yes", "transformers": "with gptqmodel"})
GPTQ_V2 = _format(2, {"llmopt": "yes", "transformers": "with gptqmodel"})
