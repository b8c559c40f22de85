"""Repacking: the same weights in another format, or one sentence on why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.model.codes import FloatCodes, IntCodes
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.load import load_model
from llmopt_cli.model.stream import Store
from llmopt_cli.quant.convert import TARGETS, convert
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme, find_scheme

WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32}
SCHEME = replace(find_scheme("gptq"), group_size=32)


def quiet(_: str) -> Any:
    return nullcontext(lambda done, total: None)


def random_codes(rows: int, columns: int, scheme: Scheme, seed: int) -> IntCodes:
    generator = torch.Generator().manual_seed(seed)
    top, shape = 2**scheme.weight_bits, (rows, columns // (scheme.group_size or columns))
    codes = torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    scales = (torch.randn(shape, generator=generator) * 0.02).half()
    return IntCodes(codes, scales, torch.full_like(zeros, top // 2) if scheme.symmetric else zeros, scheme.weight_bits)


def quantized(plain: Path, folder: Path, form: str, scheme: Scheme) -> Path:
    folder.mkdir()
    stored, layout = load_file(plain / "model.safetensors"), FORMATS[form]
    for seed, name in enumerate([name for name in stored if name.endswith("_proj.weight")]):
        codes = random_codes(*stored.pop(name).shape, scheme, seed)
        linear = name.removesuffix(".weight")
        stored |= {f"{linear}.{suffix}": part for suffix, part in layout.pack(codes, scheme).items()}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = layout.config(scheme, ["lm_head"], {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with Store(Checkpoint.open(folder)) as store:
        return {name: store.get(name) for name in store.names}


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_through_all_formats_changes_no_weight(
    tiny: Callable[..., Path], tmp_path: Path, symmetric: bool
) -> None:
    scheme = replace(SCHEME, symmetric=symmetric)
    first = quantized(tiny("Llama", **WIDE), tmp_path / "awq", "awq", scheme)
    folder = first
    for form in ("gptq", "compressed-tensors", "gptq_v2", "awq"):
        made = convert(str(folder), form, tmp_path / f"to-{form}", False, quiet)
        folder = Path(made.path)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == FORMATS[form].quant_method
        assert (folder / "quantize_config.json").exists() == (FORMATS[form].quant_method == "gptq")
        assert (folder / "tokenizer.json").exists()
        assert made.linears == 14
    before, after = weights(first), weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if symmetric:  # the codes themselves are back where they were
        stored, again = (load_file(one / "model.safetensors") for one in (first, folder))
        assert all(torch.equal(stored[name], again[name]) for name in stored)
    load_model(Checkpoint.open(folder), "float32", "cpu")


@pytest.mark.parametrize("bits", [3, 8])
def test_other_bits_go_between_gptq_and_compressed_tensors(
    tiny: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    scheme = replace(SCHEME, weight_bits=bits, symmetric=False)
    source = quantized(tiny("Llama", **WIDE), tmp_path / "source", "compressed-tensors", scheme)
    made = convert(str(source), "gptq", tmp_path / "gptq", False, quiet)
    before, after = weights(source), weights(Path(made.path))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match=rf"`model.layers.0.mlp.down_proj` .* hold 4 bits a weight, not {bits}"):
        convert(str(source), "awq", tmp_path / "awq", False, quiet)
    assert not (tmp_path / "awq").exists()


def test_scales_that_float16_does_not_hold_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized(tiny("Llama", **WIDE), tmp_path / "source", "compressed-tensors", SCHEME)
    stored = load_file(source / "model.safetensors")
    stored = {name: t.float() + 1e-6 if name.endswith("_scale") else t for name, t in stored.items()}
    save_file(stored, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="no float16 numbers"):
        convert(str(source), "gptq", tmp_path / "gptq", False, quiet)


def test_scattered_groups_and_floats_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized(tiny("Llama", **WIDE), tmp_path / "source", "gptq", SCHEME)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.g_idx"
    stored[name] = stored[name].flip(0).contiguous()
    save_file(stored, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj` .*desc_act"):
        convert(str(source), "awq", tmp_path / "out", False, quiet)
    fp8, layout = find_scheme("fp8_block"), FORMATS["fp8"]
    floats = FloatCodes(torch.zeros(64, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), 128)
    linear = "model.layers.0.self_attn.k_proj"
    plain = {name: tensor for name, tensor in stored.items() if not name.startswith(linear)}
    save_file(plain | {f"{linear}.{s}": t for s, t in layout.pack(floats, fp8).items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = layout.config(fp8, [], {})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no integers"):
        convert(str(source), "gptq", tmp_path / "out", False, quiet)


def test_what_is_not_quantized_or_not_a_target_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny("Llama", **WIDE)
    with pytest.raises(CheckpointError, match="not quantized"):
        convert(str(plain), "gptq", tmp_path / "out", False, quiet)
    with pytest.raises(UsageError, match="unknown format `fp8`"):
        convert(str(plain), "fp8", tmp_path / "out", False, quiet)
    source = quantized(plain, tmp_path / "source", "gptq", SCHEME)
    with pytest.raises(UsageError, match="exists already"):
        convert(str(source), "awq", source, False, quiet)
    assert set(TARGETS) <= set(FORMATS)
