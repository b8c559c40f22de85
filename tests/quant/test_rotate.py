"""Rotated models compute what they did, in float32, and those that could not are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.rotate import Rotation, fold_gain, orthogonal, rotate_block, rotate_embedding
from llmopt_cli.quant.structure import find_blocks, find_groups

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
SAME = [
    LlamaConfig(**GROUPED, attention_bias=True),
    Qwen2Config(**GROUPED),
    Qwen3Config(**GROUPED, head_dim=16),
    MistralConfig(**GROUPED),
    Phi3Config(**GROUPED),
]
REFUSED = [
    Gemma2Config(**GROUPED, head_dim=12),
    Olmo2Config(**GROUPED),
    OPTConfig(**SHAPE, ffn_dim=80, word_embed_proj_dim=48),
]


def model_of(config: PreTrainedConfig) -> Any:
    """Random weights, with gains and biases that do something and one channel that is an outlier."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter))
    model.get_input_embeddings().weight[:, 5] *= 30
    return model


def inputs_of(model: Any, block: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    caught: list[tuple[Tensor, dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kw: caught.append((args[0], kw)), with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    hook.remove()
    return caught[0]


@torch.inference_mode()
def rotate(model: Any, ids: Tensor) -> Rotation:
    """Rotate every part of a model that is in memory as a whole."""
    prefix, blocks = find_blocks(model)
    rotation = Rotation.make(model.config.hidden_size, seed=0)
    given = [inputs_of(model, block, ids) for block in blocks]
    for index, (block, (hidden, arguments)) in enumerate(zip(blocks, given, strict=True)):

        def run(x: Tensor, block: nn.Module = block, arguments: Any = arguments) -> Tensor:
            out = block(x, **arguments)
            return out[0] if isinstance(out, tuple) else out

        where = f"{prefix}.{index}"
        groups = find_groups(block, lambda run=run, hidden=hidden: run(hidden), where)
        rotate_block(block, where, groups, rotation, run, hidden)
    fold_gain(model.model.norm, [model.get_output_embeddings()], rotation.residual)
    rotate_embedding(model.get_input_embeddings().weight, rotation)
    return rotation


@pytest.mark.parametrize("config", SAME, ids=lambda config: config.model_type)
def test_a_rotated_model_has_the_same_logits(config: PreTrainedConfig) -> None:
    model, ids = model_of(config), torch.arange(1, 33).view(2, 16)
    before = model(input_ids=ids, use_cache=False).logits
    weights = {name: value.clone() for name, value in model.named_parameters()}
    rotate(model, ids)
    after = model(input_ids=ids, use_cache=False).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    kept = [name for name, value in model.named_parameters() if torch.equal(value, weights[name])]
    assert all(name.endswith((".bias", "q_norm.weight", "k_norm.weight")) for name in kept)


@pytest.mark.parametrize("config", SAME[:4], ids=lambda config: config.model_type)
def test_values_are_rotated_head_by_head(config: PreTrainedConfig) -> None:
    model, ids = model_of(config), torch.arange(1, 17).view(1, 16)
    value = model.model.layers[0].self_attn.v_proj.weight.double()
    gain = model.model.layers[0].input_layernorm.weight.double()
    rotation = rotate(model, ids)
    width = model.model.layers[0].self_attn.head_dim
    unheaded = rotation.of_heads(width) @ model.model.layers[0].self_attn.v_proj.weight.double().view(2, width, -1)
    assert torch.allclose(unheaded.reshape(value.shape), (value * gain) @ rotation.residual, atol=1e-5)


@pytest.mark.parametrize("config", REFUSED, ids=lambda config: config.model_type)
def test_a_model_that_a_rotation_would_change_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ModelError, match=r"layers\.0` would not compute the same"):
        rotate(model_of(config), torch.arange(1, 17).view(1, 16))


def test_an_outlier_channel_is_spread_over_all() -> None:
    model = model_of(SAME[0])
    embedding = model.get_input_embeddings().weight
    peak = float(embedding.abs().amax(0).max() / embedding.abs().amax(0).median())
    rotate_embedding(embedding, Rotation.make(48, seed=0))
    spread = float(embedding.abs().amax(0).max() / embedding.abs().amax(0).median())
    assert peak > 20
    assert spread < 4


@pytest.mark.parametrize("size", [1, 8, 12, 48, 96, 35])
def test_matrices_of_any_size_are_orthogonal_and_seeded(size: int) -> None:
    matrix = orthogonal(size, seed=1)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, orthogonal(size, seed=1))
    assert size == 1 or not torch.equal(matrix, orthogonal(size, seed=2))


def test_a_power_of_two_is_a_hadamard_matrix() -> None:
    assert torch.allclose(orthogonal(64, seed=0).abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
