"""A model that is never loaded: walked block by block it computes what transformers computes, for every family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.streams import Stream
from llmopt_cli.quant.structure import find_groups, find_linears, find_routers, find_stages
from llmopt_cli.quant.walk import Walk, at_once
from llmopt_cli.spec.checkpoint import Checkpoint

Tiny = Callable[..., Path]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"head_dim": 16, "sliding_window": 8},
    "Gemma3Text": {"head_dim": 16, "num_hidden_layers": 6, "sliding_window": 8},
    "Phi3": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 64},
    "Qwen3Moe": MOE | {"head_dim": 16},
}
CPU = torch.device("cpu")


def ids(count: int = 5, length: int = 40) -> torch.Tensor:
    return torch.randint(7, 4000, (count, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def walked(walk: Walk, tokens: torch.Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits [N, L, V], one block in memory at a time, in batches of two windows."""
    monkeypatch.setattr("llmopt_cli.quant.walk.BATCH_TOKENS", 2 * tokens.shape[1])
    walk.learn(tokens)
    with walk.skeleton.outside():
        stream = Stream.write(folder / "states", walk.enter(tokens, at_once(tokens)))
    for index in range(len(walk.skeleton.blocks)):
        with walk.skeleton.block(index):
            stream = stream.mapped(stream.path, at_once(tokens), lambda hidden, index=index: walk.run(index, hidden))
    with walk.skeleton.outside():
        pairs = zip(torch.split(tokens, 1), stream.batches(1), strict=True)
        return torch.cat([walk.logits(window, hidden) for window, hidden in pairs])


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_block_by_block_is_running_the_model(
    family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(family, **FAMILIES[family])
    with Skeleton(Checkpoint.open(folder), CPU) as skeleton:
        found = walked(Walk(skeleton), ids(), tmp_path, monkeypatch)
        assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids(), use_cache=False).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_the_weights_of_experts_are_linears_under_the_names_of_the_file(tiny: Tiny) -> None:
    folder = tiny("Mixtral", **FAMILIES["Mixtral"])
    stored = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "layers.1" in name}
    with Skeleton(Checkpoint.open(folder), CPU) as skeleton, skeleton.block(1) as block:
        for name, linear in find_linears(block, "1").items():
            place = skeleton.stored[f"{skeleton.prefix}.1.{name}.weight"]
            assert torch.equal(linear.weight, stored.pop(place))
        assert skeleton.stored["model.layers.1.mlp.experts.2.up_proj.weight"].endswith("experts.2.w3.weight")
        assert find_routers(block) == {"mlp.gate"}
    assert {tensor.ndim for name, tensor in stored.items() if not name.endswith("gate.weight")} == {1}


def test_all_experts_are_observed_in_one_run_and_everything_else_by_itself(tiny: Tiny) -> None:
    with Skeleton(Checkpoint.open(tiny("Qwen3Moe", **FAMILIES["Qwen3Moe"])), CPU) as skeleton:
        walk, tokens = Walk(skeleton), ids(1, 32)
        walk.learn(tokens)
        with skeleton.outside():
            hidden = next(walk.enter(tokens, 1))
        with skeleton.block(0) as block:
            stages = find_stages(block, find_groups(block, lambda: walk.run(0, hidden), "0"))
    assert [len(stage) for stage in stages] == [1, 1, 4, 4]
    assert stages[3][2].linears == ("mlp.experts.2.down_proj",)


def test_experts_of_an_unknown_kind_are_refused_by_name(tiny: Tiny) -> None:
    folder = tiny("GptOss", head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts.*can't be taken apart"):
        Skeleton(Checkpoint.open(folder), CPU)


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("Llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        Skeleton(Checkpoint.open(tmp_path / "model"), CPU)
