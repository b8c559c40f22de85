"""SmoothQuant on a layer whose outliers are known, its factor against a loop; and the ranges of a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from llmopt_cli.errors import ModelError
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.quant import smooth
from llmopt_cli.quant.int8 import int8
from llmopt_cli.quant.kv_scales import kv_scales, watched
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.quant.structure import Group, find_groups, fold
from llmopt_cli.quant.walk import Seen, observe

SCHEME = METHODS["smoothquant"].scheme
WIDTH = 128


class Gated(nn.Module):
    """The linears of a gated MLP that read its input, or a lone one."""

    def __init__(self, lone: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 96, bias=False)
        self.gate = None if lone else nn.Linear(WIDTH, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x)
        return out if self.gate is None else torch.tanh(self.gate(x)) * out


class Block(nn.Module):
    """A norm with a few huge gains, and what reads it."""

    def __init__(self, lone: bool, outlier: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH)
        self.norm.weight.data[::32] = outlier
        self.mlp = Gated(lone)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm(x))
        return out


@dataclass
class Layer:
    block: Block
    group: Group
    seen: Seen
    held_out: Tensor

    @torch.inference_mode()
    def error(self, scale: Tensor) -> float:
        """Relative output error on held-out inputs, weights and inputs rounded after the norm took up `scale`."""
        before = self.block(self.held_out)
        saved = {name: value.clone() for name, value in self.block.state_dict().items()}
        assert self.group.producer is not None
        scale = fold(self.block, self.group.producer, scale, torch.float32)
        hooks = []
        for name in self.group.linears:
            linear = self.block.get_submodule(name)
            weight = self.block.get_parameter(f"{name}.weight")
            weight.copy_(int8(weight * scale, None, SCHEME).codes.dequantize())
            hooks.append(linear.register_forward_pre_hook(lambda _, args: (round_inputs(args[0], SCHEME),)))
        after = self.block(self.held_out)
        for hook in hooks:
            hook.remove()
        self.block.load_state_dict(saved)
        return float((after - before).norm() / before.norm())


@pytest.fixture
def layer() -> Callable[..., Layer]:
    def make(lone: bool = False, outlier: float = 50.0) -> Layer:
        block = Block(lone, outlier).requires_grad_(False).eval()
        fitted, held_out = (torch.randn(4, 64, WIDTH) for _ in range(2))
        [group] = find_groups(block, lambda: block(fitted[:1]), "0")
        [seen] = observe(block, [group], iter(torch.split(fitted, 1)), block, 128)
        return Layer(block, group, seen, held_out)

    return make


PLAIN = torch.ones(WIDTH)


@pytest.mark.parametrize("lone", [True, False])
def test_smoothing_halves_the_error_of_rounded_inputs_where_channels_are_outliers(
    lone: bool, layer: Callable[..., Layer]
) -> None:
    made = layer(lone)
    choice = smooth.choose(made.block, made.group, made.seen, SCHEME)
    assert choice.scaled
    assert choice.clipped == set(made.group.linears)
    assert made.error(choice.scale) < 0.5 * made.error(PLAIN)


def test_the_factor_is_that_of_the_paper(layer: Callable[..., Layer]) -> None:
    made = layer()
    weights = [made.block.get_parameter(f"{name}.weight") for name in made.group.linears]
    found = smooth.smoothing(made.seen.max_abs, weights)
    for channel in range(0, WIDTH, 9):
        largest = max(float(weight[:, channel].abs().max()) for weight in weights)
        assert float(found[channel]) == pytest.approx(float(made.seen.max_abs[channel]) ** 0.8 / largest**0.2, rel=1e-5)


def test_a_factor_that_raises_the_error_is_left_out(layer: Callable[..., Layer]) -> None:
    made = layer(outlier=1.0)
    wrong = made.seen.max_abs.clone()
    wrong[5] *= 1e6  # so that the weights of one channel would leave no codes for those of the others
    choice = smooth.choose(made.block, made.group, replace(made.seen, max_abs=wrong), SCHEME)
    assert not choice.scaled


def test_without_a_norm_before_it_nothing_is_smoothed(layer: Callable[..., Layer]) -> None:
    made = layer()
    choice = smooth.choose(made.block, replace(made.group, producer=None), made.seen, SCHEME)
    assert not choice.scaled
    assert choice.clipped == set(made.group.linears)


def test_the_search_leaves_the_block_as_it_was(layer: Callable[..., Layer]) -> None:
    made = layer()
    before, output = {name: value.clone() for name, value in made.block.state_dict().items()}, made.block(made.held_out)
    smooth.choose(made.block, made.group, made.seen, SCHEME)
    assert all(torch.equal(value, before[name]) for name, value in made.block.state_dict().items())
    assert torch.equal(made.block(made.held_out), output)


def test_kv_scales_are_the_largest_numbers_that_a_cache_would_hold() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 64, (2, 12))
    with torch.inference_mode():
        cached = model(ids, use_cache=True).past_key_values.layers[1]
        with watched(model.model.layers[1], "model.layers.1") as ranges:
            model(ids[:1], use_cache=False)
            model(ids[1:], use_cache=False)
    found = kv_scales(model.model.layers[1], "model.layers.1", ranges)
    assert found.keys() == {"model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"}
    for name, numbers in (("k", cached.keys), ("v", cached.values)):
        scale = found[f"model.layers.1.self_attn.{name}_scale"]
        assert scale.shape == (1,)
        assert float(scale) == pytest.approx(float(numbers.abs().max()) / 448, rel=1e-5)


def test_a_block_without_a_cache_is_named() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"`layers\.3` is given no KV cache"), watched(block, "layers.3"):
        block(torch.ones(1, 4))
