"""Every stored format runs: loaded as it is coded, computing what its dequantized weights compute, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import Codes, FloatCodes, IntCodes, Nested, TableCodes, kind_of
from llmopt_cli.model.formats.bitsandbytes import code_table, nested_table
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.model.linear import CodedLinear, JoinedLinear, PackedLinear
from llmopt_cli.model.load import load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import Scheme, find_scheme

WIDE = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32}
INTS = replace(find_scheme("gptq"), group_size=32)
NF4 = find_scheme("nf4")
CASES: dict[str, tuple[str, Scheme]] = {
    "gptq-2": ("gptq", replace(INTS, weight_bits=2)),
    "gptq-3": ("gptq", replace(INTS, weight_bits=3)),
    "gptq-4": ("gptq", INTS),
    "gptq-8": ("gptq", replace(INTS, weight_bits=8)),
    "gptq-row": ("gptq", replace(INTS, group_size=0)),
    "gptq-asym": ("gptq", replace(INTS, symmetric=False)),
    "gptq_v2-asym": ("gptq_v2", replace(INTS, symmetric=False)),
    "ct-4": ("compressed-tensors", INTS),
    "ct-3-asym": ("compressed-tensors", replace(INTS, weight_bits=3, symmetric=False)),
    "ct-8": ("compressed-tensors", replace(INTS, weight_bits=8, group_size=0)),
    "ct-w8a8": ("compressed-tensors", find_scheme("w8a8")),
    "ct-fp8": ("compressed-tensors", find_scheme("fp8")),
    "ct-fp8-static": ("compressed-tensors", replace(find_scheme("fp8"), static_inputs=True)),
    "ct-fp8-block": ("compressed-tensors", find_scheme("fp8_block")),
    "bnb-nf4": ("bitsandbytes", NF4),
    "bnb-nf4-double": ("bitsandbytes", replace(NF4, scale_bits=8)),
    "bnb-fp4": ("bitsandbytes", replace(NF4, name="fp4")),
    "bnb-int8": ("bitsandbytes", replace(find_scheme("int8"), compute="int8", outliers=1.5)),
    "fp8-block": ("fp8", find_scheme("fp8_block")),
}


def random_codes(rows: int, columns: int, scheme: Scheme, generator: torch.Generator) -> Codes:
    """Codes whose weights have the size of a trained model's."""

    def integers(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)

    kind = kind_of(scheme)
    if kind is TableCodes:
        return _table_codes(rows, columns, scheme, integers)
    if kind is FloatCodes:
        codes = torch.randn(rows, columns, generator=generator).mul(50).to(torch.float8_e4m3fn)
        block = 128 if scheme.group_size else 0
        shape = (-(-rows // 128), -(-columns // 128)) if block else (1 if scheme.static_inputs else rows, 1)
        given = torch.tensor([0.01]) if scheme.static_inputs else None
        return FloatCodes(codes, torch.rand(shape, generator=generator) * 0.002 + 0.001, block, given)
    groups, top = columns // (scheme.group_size or columns), 2**scheme.weight_bits
    zeros = torch.full((rows, groups), top // 2, dtype=torch.uint8) if scheme.symmetric else integers(top, rows, groups)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) * (0.3 / top)
    signs = torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1, 1)  # a scale may be negative
    scales = scales * 127 / 127 if scheme.compute == "int8" else (scales * signs).half()
    return IntCodes(integers(top, rows, columns), scales, zeros, scheme.weight_bits)


def _table_codes(rows: int, columns: int, scheme: Scheme, integers: Callable[..., Tensor]) -> TableCodes:
    blocks = -(-rows * columns // 64)
    absmax: Tensor | Nested = integers(200, blocks).float() / 1000
    if scheme.scale_bits == 8:
        absmax = Nested(integers(256, blocks), torch.rand(-(-blocks // 256)) * 0.05, nested_table(), 0.125)
    return TableCodes(integers(256, rows, columns // 2), absmax, code_table(scheme.name))


def quantized(
    folder: Path, target: Path, form: str, schemes: Callable[[str], Scheme]
) -> tuple[Path, dict[str, Tensor], dict[str, Codes]]:
    """A copy of `folder` whose block linears are random codes; the weights that they mean, and the codes."""
    shutil.copytree(folder, target)
    stored = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    meant, made, layout = dict(stored), {}, FORMATS[form]
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        linear, scheme = name.removesuffix(".weight"), schemes(name)
        made[linear] = random_codes(*stored.pop(name).shape, scheme, generator)
        stored |= {f"{linear}.{suffix}": part for suffix, part in layout.pack(made[linear], scheme).items()}
        meant[name] = made[linear].dequantize()
    save_file(stored, target / "model.safetensors")
    default = schemes("")
    others = {linear: schemes(linear) for linear in made if schemes(linear) != default}
    write_config(target, layout.config(default, ["lm_head"], others))
    return target, meant, made


def write_config(folder: Path, quantization: Mapping[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(quantization)}))


def reference_model(plain: Path, meant: dict[str, Tensor], made: dict[str, Codes], scheme: Scheme) -> Any:
    """transformers' model with dense float32 weights, inputs of the quantized linears rounded before they are used."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    missing = model.load_state_dict(meant, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])  # that of a tied model is its embedding
    for linear, codes in made.items():
        given = getattr(codes, "input_scale", None)
        rounder = lambda _, args, given=given: (round_inputs(args[0], scheme, given),)
        model.get_submodule(linear).register_forward_pre_hook(rounder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_those_of_the_dequantized_weights(
    tiny: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    form, scheme = CASES[case]
    greedy_equal(tiny("Llama", **WIDE), tmp_path, form, scheme)


@pytest.mark.parametrize("form", ["awq", "gptq", "compressed-tensors"])
def test_greedy_tokens_of_the_demo_model_equal_those_of_the_dequantized_weights(tmp_path: Path, form: str) -> None:
    greedy_equal(BUNDLED["demo"], tmp_path, form, INTS)


def greedy_equal(plain: Path, tmp_path: Path, form: str, scheme: Scheme) -> None:
    folder, meant, made = quantized(plain, tmp_path / "quantized", form, lambda _: scheme)
    reference = reference_model(plain, meant, made, scheme)
    batching = Batching(max_num_batched_tokens=64)
    engine = Engine.from_pretrained(folder, dtype="float32", device="cpu", batching=batching)
    prompt = list(range(20, 41))
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=6
    )
    [found] = engine.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True))
    assert list(found.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_weights_take_the_memory_that_their_file_takes(tiny: Callable[..., Path], tmp_path: Path, case: str) -> None:
    form, scheme = CASES[case]
    folder, _, made = quantized(tiny("Llama", **WIDE), tmp_path / "quantized", form, lambda _: scheme)
    checkpoint = Checkpoint.open(folder)
    loaded = load_model(checkpoint, "bfloat16", "cpu")
    kept = [module for module in loaded.model.modules() if isinstance(module, PackedLinear | CodedLinear)]
    stored = sum(header.nbytes for name, header in checkpoint.tensors.items() if name.startswith(tuple(made)))
    assert loaded.fused["attention"] == loaded.fused["mlp"] == 2
    held = sum(tensor.nbytes for module in kept for tensor in module.parameters())
    assert 0.9 * stored < held < 1.05 * stored


def test_members_of_different_precision_run_side_by_side(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny("Llama", **WIDE)
    wide = replace(INTS, weight_bits=8, zero_bits=8)

    def scheme(name: str) -> Scheme:
        return wide if "v_proj" in name or "up_proj" in name else INTS

    for form in ("gptq", "compressed-tensors"):
        folder, meant, _ = quantized(plain, tmp_path / form, form, scheme)
        loaded = load_model(Checkpoint.open(folder), "float32", "cpu")
        reference = reference_model(plain, meant, {}, INTS)
        assert sum(isinstance(module, JoinedLinear) for module in loaded.model.modules()) == 4
        ids = torch.arange(10, 16)[None]
        with torch.inference_mode():
            found = loaded.model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False).logits
            assert torch.allclose(found, reference(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_in_the_order_of_activations_are_read(tiny: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    plain = tiny("Llama", **WIDE)
    scheme = replace(INTS, weight_bits=bits)
    folder, meant, made = quantized(plain, tmp_path / "quantized", "gptq", lambda _: scheme)
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for linear, codes in made.items():
        assert isinstance(codes, IntCodes)
        columns = codes.codes.shape[1]
        groups = (torch.arange(columns) // 32)[torch.randperm(columns, generator=generator)].to(torch.int32)
        stored[f"{linear}.g_idx"] = groups
        meant[f"{linear}.weight"] = replace(codes, groups=groups).dequantize()
    save_file(stored, folder / "model.safetensors")
    loaded = load_model(Checkpoint.open(folder), "float32", "cpu")
    ids = torch.arange(10, 16)[None]
    with torch.inference_mode():
        found = loaded.model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False).logits
        expected = reference_model(plain, meant, {}, scheme)(ids).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_quantized_experts_are_expanded_into_the_models_stacks(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny("Mixtral", num_local_experts=4, **WIDE)
    folder = tmp_path / "quantized"
    shutil.copytree(plain, folder)
    stored, meant = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    generator, layout = torch.Generator().manual_seed(0), FORMATS["gptq"]
    for name in [name for name in stored if ".experts." in name]:
        codes = random_codes(*stored.pop(name).shape, INTS, generator)
        linear, meant[name] = name.removesuffix(".weight"), codes.dequantize()
        stored |= {f"{linear}.{suffix}": part for suffix, part in layout.pack(codes, INTS).items()}
    save_file(stored, folder / "model.safetensors")
    write_config(folder, layout.config(INTS, ["lm_head"], {}))
    dense = tmp_path / "dense"
    shutil.copytree(plain, dense)
    save_file(meant, dense / "model.safetensors")
    ids = torch.arange(10, 16)[None]
    with torch.inference_mode():
        found, expected = (
            load_model(Checkpoint.open(one), "float32", "cpu").model(
                input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False
            )
            for one in (folder, dense)
        )
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("case", "change", "what"),
    [
        ("gptq-4", {"bits": 8}, "not one GPTQ linear of 8 bits"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "the layout `marlin`"),
        ("ct-4", {"transform_config": {"config_groups": {}}}, "rotations"),
        ("ct-w8a8", {"quant_method": "quark"}, "`quark` are not read"),
        ("bnb-nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "codes stored as `bfloat16`"),
        ("fp8-block", {"weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
    ],
)
def test_what_the_tensors_do_not_hold_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, case: str, change: dict[str, Any], what: str
) -> None:
    form, scheme = CASES[case]
    folder, _, _ = quantized(tiny("Llama", **WIDE), tmp_path / "quantized", form, lambda _: scheme)
    found = Checkpoint.open(folder).quantization
    assert found is not None
    write_config(folder, dict(found) | change)
    with pytest.raises(CheckpointError, match=what):
        load_model(Checkpoint.open(folder))


def test_a_lost_tensor_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, _, _ = quantized(tiny("Llama", **WIDE), tmp_path / "quantized", "gptq", lambda _: INTS)
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.self_attn.q_proj.scales"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`model.layers.1.self_attn.q_proj`: .* lacks its `scales`"):
        load_model(Checkpoint.open(folder))
