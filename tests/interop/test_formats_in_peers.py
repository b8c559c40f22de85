"""The files that other libraries write and read: their bytes are ours, and what they load computes what we load.

Skipped where the peer is not installed. They want an environment of their own:

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate pytest pytest-timeout \
        hypothesis compressed-tensors==0.20.0 bitsandbytes==0.50.2 && peers/bin/pip install -e .
    peers/bin/pytest tests/interop/test_formats_in_peers.py -W default
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt_cli.model.codes import Codes, FloatCodes, IntCodes, Nested, TableCodes, kind_of
from llmopt_cli.model.formats.bitsandbytes import code_table, nested_table
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.formats.words import pack_words
from llmopt_cli.model.load import load_model
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint
from llmopt_cli.spec.scheme import Scheme, find_scheme

INTS = replace(find_scheme("gptq"), group_size=32)
NF4 = find_scheme("nf4")
LLM_INT8 = replace(find_scheme("int8"), compute="int8", outliers=6.0)


def rounded(weight: Tensor, scheme: Scheme) -> Codes:
    """`weight` to the nearest value of the scheme's grid."""
    kind = kind_of(scheme)
    if kind is FloatCodes:
        return _rounded_floats(weight, scheme)
    if kind is TableCodes:
        return _rounded_table(weight, scheme)
    bits, half = scheme.weight_bits, 2 ** (scheme.weight_bits - 1)
    groups = weight.view(len(weight), -1, scheme.group_size or weight.shape[1])
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if scheme.symmetric:  # a negative scale where the largest weight is positive: the whole range of codes is used
        extreme = torch.where(high > -low, high, low)
        scales, zeros = extreme / -half, torch.full_like(low, half)
        if scheme.compute == "int8":
            scales = torch.maximum(high, -low) / 127
    else:
        scales = ((high - low) / (2 * half - 1)).half().float()
        zeros = (-low / scales).round()
    scales = scales if scheme.compute == "int8" else scales.half().float()
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    return IntCodes(codes.clamp(0, 2 * half - 1).byte().view(weight.shape), scales, zeros.byte(), bits)


def _rounded_floats(weight: Tensor, scheme: Scheme) -> FloatCodes:
    if not scheme.group_size:
        scales = weight.abs().amax(1, keepdim=True) / 448
        return FloatCodes((weight / scales).to(torch.float8_e4m3fn), scales)
    shape = [-(-size // 128) for size in weight.shape]
    blocks = [[weight[128 * i :, 128 * j :][:128, :128] for j in range(shape[1])] for i in range(shape[0])]
    scales = torch.tensor([[float(block.abs().max()) / 448 for block in row] for row in blocks])
    spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return FloatCodes((weight / spread).to(torch.float8_e4m3fn), scales, 128)


def _rounded_table(weight: Tensor, scheme: Scheme) -> TableCodes:
    table, blocks = code_table(scheme.name), weight.view(-1, 64)
    absmax = blocks.abs().amax(-1)
    codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).byte().view(len(weight), -1)
    found: Tensor | Nested = absmax
    if scheme.scale_bits == 8:
        offset = float(absmax.mean())
        parts = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        tops = parts.abs().amax(-1)
        small = ((parts / tops[:, None])[..., None] - nested_table()).abs().argmin(-1).byte()
        found = Nested(small.flatten()[: len(absmax)], tops, nested_table(), offset)
    return TableCodes((codes[:, 0::2] << 4) | codes[:, 1::2], found, table)


def quantized_demo(folder: Path, form: str, scheme: Scheme) -> Path:
    """The demo model with the linears of its blocks rounded to `scheme`, in the format `form`."""
    demo, layout = BUNDLED["demo"], FORMATS[form]
    shutil.copytree(demo, folder)
    stored = load_file(demo / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        codes, linear = rounded(stored.pop(name).float(), scheme), name.removesuffix(".weight")
        stored |= {f"{linear}.{suffix}": part for suffix, part in layout.pack(codes, scheme).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = layout.config(scheme, ["lm_head"], {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (48, 200), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, bits), pack_words(codes, bits))
    assert torch.equal(helpers.pack_to_int32(signed, bits, packed_dim=0), pack_words(codes.T, bits).T)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes_are_read_and_written_byte_for_byte(name: str, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.get_4bit_type(name, device="cpu"), code_table(name))
    assert torch.equal(functional.create_dynamic_map(), nested_table())
    layout, scheme = FORMATS["bitsandbytes"], replace(NF4, name=name, scale_bits=8 if double else 32)
    weight = torch.randn(96, 320)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=double)
    theirs = {f"weight.{suffix}": part for suffix, part in state.as_dict(packed=True).items()} | {"weight": packed}
    codes = layout.unpack(theirs, scheme)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.allclose(codes.dequantize(), expected, rtol=0 if not double else 1e-6, atol=0 if not double else 1e-7)
    ours = layout.pack(codes, scheme)
    for suffix, part in theirs.items():
        if "quant_state" in suffix:
            written, found = (json.loads(bytes(one[suffix].tolist())) for one in (theirs, ours))
            assert {**found, "dtype": written["dtype"]} == written
        else:
            assert torch.equal(ours[suffix], part), suffix


CASES: dict[str, tuple[str, str, Scheme]] = {
    "ct-4": ("compressed_tensors", "compressed-tensors", INTS),
    "ct-3": ("compressed_tensors", "compressed-tensors", replace(INTS, weight_bits=3)),
    "ct-8": ("compressed_tensors", "compressed-tensors", replace(INTS, weight_bits=8, group_size=0)),
    "ct-w8a8": ("compressed_tensors", "compressed-tensors", find_scheme("w8a8")),
    "ct-fp8": ("compressed_tensors", "compressed-tensors", find_scheme("fp8")),
    "ct-fp8-block": ("compressed_tensors", "compressed-tensors", find_scheme("fp8_block")),
    "bnb-nf4": ("bitsandbytes", "bitsandbytes", NF4),
    "bnb-nf4-double": ("bitsandbytes", "bitsandbytes", replace(NF4, scale_bits=8)),
    "bnb-fp4": ("bitsandbytes", "bitsandbytes", replace(NF4, name="fp4")),
    "bnb-int8": ("bitsandbytes", "bitsandbytes", LLM_INT8),
    "fp8-block": ("accelerate", "fp8", find_scheme("fp8_block")),
}

# KL in nats. Only weights are rounded: no difference but the order of sums. The others compute in bfloat16 (4 bits of
# bitsandbytes), take 127.5 for the top of int8, or leave the rounding of inputs out where there is no GPU (fp8).
CLOSE = {"ct-4": 1e-6, "ct-3": 1e-6, "ct-8": 1e-6, "fp8-block": 5e-3}


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_file_and_agrees(tmp_path: Path, case: str) -> None:
    peer, form, scheme = CASES[case]
    pytest.importorskip(peer)
    from transformers import AutoModelForCausalLM

    folder = quantized_demo(tmp_path / case, form, scheme)
    ids = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    dtype = torch.bfloat16 if form == "fp8" else torch.float32  # what it expands fp8 to without a GPU
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = load_model(Checkpoint.open(folder), "float32", "cpu").model
    with torch.inference_mode():
        expected = theirs(ids).logits.float().log_softmax(-1)
        found = ours(input_ids=ids, position_ids=torch.arange(64)[None], use_cache=False).logits.float().log_softmax(-1)
    agree = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert agree > 0.93  # on tokens at random: near-ties fall either way
    assert kl < CLOSE.get(case, 1e-3)
