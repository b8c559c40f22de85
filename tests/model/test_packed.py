"""Packed checkpoints: loaded as integers, kept as integers, and computing what their dequantized weights compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats import awq
from llmopt_cli.model.linear import JoinedLinear, MergedLinear, PackedLinear, merge
from llmopt_cli.model.load import load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import find_scheme

GROUP = 32


def packed_checkpoint(folder: Path, target: Path, group: int = GROUP) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of `folder` whose block linears hold random codes; also the weights that those codes mean."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    meant = dict(tensors)
    scheme = replace(find_scheme("awq"), group_size=group)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
        zeros = torch.randint(0, 16, (rows, columns // group), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(rows, columns // group, generator=generator) * 0.02 + 0.01).half().float()
        packed = awq.pack(IntCodes(codes, scales, zeros), scheme)
        tensors |= {name.replace("weight", suffix): tensor for suffix, tensor in packed.items()}
        meant[name] = IntCodes(codes, scales, zeros).dequantize()
    save_file(tensors, target / "model.safetensors")
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": awq.config(scheme)}))
    return target, meant


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Qwen2", {}), ("Llama", {"attention_bias": True})])
def test_packed_output_equals_dequantized_weights_token_for_token(
    tiny: Callable[..., Path], tmp_path: Path, family: str, changes: dict[str, bool]
) -> None:
    plain = tiny(family, **changes)
    folder, meant = packed_checkpoint(plain, tmp_path / "packed")
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    reference.load_state_dict(meant)
    engine = Engine.from_pretrained(folder, dtype="float32", device="cpu", batching=Batching(max_num_batched_tokens=64))
    prompt = list(range(20, 41))
    ids = torch.tensor([prompt])
    expected = reference.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=6)
    [found] = engine.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True))
    assert list(found.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_packed_in_memory(tiny: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    wide = tiny("Llama", hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=4096)
    checkpoint = Checkpoint.open(packed_checkpoint(wide, tmp_path / "packed", group=128)[0])
    loaded = load_model(checkpoint, dtype, "cpu")
    packed = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 2 * 4  # q/k/v and gate/up run as one each
    resident = sum(t.nbytes for module in packed for t in [*module.parameters(), *module.buffers()])
    stored = sum(h.nbytes for name, h in checkpoint.tensors.items() if name.endswith(awq.SUFFIXES))
    assert resident == pytest.approx(stored, rel=0.05)


def test_the_16_bit_product_agrees_with_the_dequantized_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(packed_checkpoint(tiny("Llama"), tmp_path / "packed")[0])
    exact, fast = (load_model(checkpoint, dtype, "cpu").model for dtype in ("float32", "bfloat16"))
    ids = torch.arange(10, 16)[None]
    with torch.inference_mode():
        first, second = (m(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False) for m in (exact, fast))
    assert nn.functional.cosine_similarity(first.logits, second.logits.float(), dim=-1).min() > 0.999


def test_linears_merge_only_where_their_storage_agrees() -> None:
    plain, biased = nn.Linear(64, 8, bias=False), nn.Linear(64, 8)
    small, large = (PackedLinear.like("x", plain, group) for group in (32, 64))
    assert isinstance(merge({"a": plain, "b": nn.Linear(64, 24, bias=False)}), MergedLinear)
    assert isinstance(merge({"a": small, "b": PackedLinear.like("b", plain, 32)}), PackedLinear)
    assert merge({"a": plain, "b": biased}) is None
    assert isinstance(merge({"a": small, "b": large}), JoinedLinear)
    assert isinstance(merge({"a": plain, "b": small}), JoinedLinear)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_formats_the_loader_does_not_read_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = packed_checkpoint(tiny("Llama"), tmp_path / "packed")
    edit_config(folder, quant_method="hqq")
    with pytest.raises(CheckpointError, match="`hqq`"):
        load_model(Checkpoint.open(folder))
    edit_config(folder, quant_method="awq", version="gemv")
    with pytest.raises(CheckpointError, match="gemv"):
        load_model(Checkpoint.open(folder))


def test_a_group_size_that_the_tensors_do_not_have_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = packed_checkpoint(tiny("Llama"), tmp_path / "packed")
    edit_config(folder, group_size=16)
    with pytest.raises(CheckpointError, match="groups of 32 where the config says 4 bits in groups of 16"):
        load_model(Checkpoint.open(folder))
