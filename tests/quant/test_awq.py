"""AWQ on layers whose truth is known: it beats rounding where channels are salient, and keeps out where it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from llmopt_cli.quant import awq
from llmopt_cli.quant.awq import Choice
from llmopt_cli.quant.gptq import gptq
from llmopt_cli.quant.grid import quantize_weight
from llmopt_cli.quant.structure import Group, Producer, find_groups
from llmopt_cli.quant.walk import Seen, observe
from llmopt_cli.spec.scheme import Scheme, find_scheme

SCHEME = replace(find_scheme("awq"), group_size=32)
WIDTH = 128


class Gated(nn.Module):
    """A norm, and two linears of its output that are multiplied and summed up by a third: a gated MLP."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.RMSNorm(WIDTH)
        self.mlp = nn.Module()
        self.mlp.gate, self.mlp.up = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.down = nn.Linear(96, WIDTH, bias=False)
        self.mlp.forward = lambda x: torch.tanh(self.mlp.gate(x)) * self.mlp.up(x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.mlp(self.norm(x)))
        return out


@dataclass
class Layer:
    block: Gated
    group: Group
    seen: Seen
    held_out: Tensor

    def error(self, choice: Choice) -> float:
        """Relative output error on held-out inputs of the block with gate and up quantized as chosen."""
        with torch.inference_mode():
            before = self.block(self.held_out)
            saved = [linear.weight.clone() for linear in (self.block.mlp.gate, self.block.mlp.up)]
            for name in self.group.linears:
                parameter = self.block.get_parameter(f"{name}.weight")
                weight, gram = awq.rescale(parameter, self.seen.gram, choice.scale)
                found = quantize_weight(weight, SCHEME, gram if name in choice.clipped else None)
                parameter.copy_(found.dequantize() / choice.scale)
            after = self.block(self.held_out)
            for linear, weight in zip((self.block.mlp.gate, self.block.mlp.up), saved, strict=True):
                linear.weight.copy_(weight)
        return float((after - before).norm() / before.norm())

    def gptq_error(self, choice: Choice, scheme: Scheme) -> float:
        """Squared error, on the calls observed, that GPTQ leaves after scaling as chosen."""
        total = 0.0
        with torch.inference_mode():
            saved = {name: self.block.get_parameter(f"{name}.weight").clone() for name in self.group.linears}
            for name, weight in saved.items():
                codes = gptq(*awq.rescale(weight, self.seen.gram, choice.scale), scheme).codes
                self.block.get_parameter(f"{name}.weight").copy_(codes.dequantize() / choice.scale)
            for call in self.seen.calls:
                total += float((self.block.mlp(*call.args) - call.output).square().sum())
            for name, weight in saved.items():
                self.block.get_parameter(f"{name}.weight").copy_(weight)
        return total


def watch(block: Gated, group: Group, batches: Iterable[Tensor]) -> Seen:
    (seen,) = observe(block, [group], iter(batches), block, 512)
    return seen


@pytest.fixture
def layer() -> Callable[..., Layer]:
    def make(seed: int, salience: float = 30.0) -> Layer:
        """Inputs with correlated channels, of which every sixteenth is `salience` times as large."""
        block = Gated(seed).requires_grad_(False).eval()
        mixing = torch.randn(WIDTH, WIDTH) / WIDTH**0.5 + torch.eye(WIDTH)
        sizes = torch.where(torch.arange(WIDTH) % 16 == 0, salience, 1.0)
        fitted, held_out = (torch.randn(8, 128, WIDTH) @ mixing * sizes for _ in range(2))
        group = find_groups(block, lambda: block(fitted[:1]), "0")[0]
        assert group == Group(("mlp.gate", "mlp.up"), "mlp", Producer("norm", "gain", (1, 1, WIDTH)))
        return Layer(block, group, watch(block, group, fitted.split(1)), held_out)

    return make


PLAIN = Choice(torch.ones(WIDTH), frozenset())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_awq_halves_the_error_of_rounding_where_channels_are_salient(seed: int, layer: Callable[..., Layer]) -> None:
    made = layer(seed)
    choice = awq.choose(made.block, made.group, made.seen, SCHEME)
    assert choice.scaled
    assert made.error(choice) < 0.5 * made.error(PLAIN)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scale_alone_takes_a_third_off(seed: int, layer: Callable[..., Layer]) -> None:
    made = layer(seed)
    choice = awq.choose(made.block, made.group, made.seen, SCHEME)
    assert made.error(Choice(choice.scale, frozenset())) < 0.67 * made.error(PLAIN)


@pytest.mark.parametrize("bits", [3, 4])
def test_before_gptq_a_scale_is_taken_only_if_gptq_leaves_less_with_it(bits: int, layer: Callable[..., Layer]) -> None:
    made, scheme = layer(0), replace(SCHEME, weight_bits=bits)
    choice = awq.choose_for_gptq(made.block, made.group, made.seen, scheme)
    assert choice.clipped == {"mlp.gate", "mlp.up"}
    assert made.gptq_error(choice, scheme) <= made.gptq_error(replace(PLAIN, clipped=choice.clipped), scheme)


def test_salient_channels_are_the_ones_scaled_up(layer: Callable[..., Layer]) -> None:
    made = layer(0)
    scale = awq.choose(made.block, made.group, made.seen, SCHEME).scale
    assert float(scale[::16].min()) > 2 * float(scale[torch.arange(WIDTH) % 16 != 0].median())


def test_the_search_leaves_the_block_as_it_was(layer: Callable[..., Layer]) -> None:
    made = layer(0)
    before = {name: value.clone() for name, value in made.block.state_dict().items()}
    awq.choose(made.block, made.group, made.seen, SCHEME)
    assert all(torch.equal(value, before[name]) for name, value in made.block.state_dict().items())


def test_without_a_producer_nothing_is_scaled(layer: Callable[..., Layer]) -> None:
    made = layer(0)
    choice = awq.choose(made.block, replace(made.group, producer=None), made.seen, SCHEME)
    assert not choice.scaled
    assert choice.clipped == {"mlp.gate", "mlp.up"}


def test_what_the_grid_holds_exactly_is_left_alone(layer: Callable[..., Layer]) -> None:
    made = layer(0)
    for name in made.group.linears:
        codes = torch.randint(-8, 8, (96, WIDTH // 32, 32))
        codes[..., 0], codes[..., 1] = -8, 7
        made.block.get_parameter(f"{name}.weight").copy_(codes.view(96, WIDTH) / 64)
    seen = watch(made.block, made.group, made.held_out.split(1))
    choice = awq.choose(made.block, made.group, seen, SCHEME)
    assert not choice.scaled
    assert choice.clipped == frozenset()


def test_candidates_start_with_none_and_are_normalised_and_tied() -> None:
    producer = Producer("v", "rows", (2, 3, 4))
    mean_abs = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    first, *others = awq.candidates(mean_abs, [weight], producer, replace(SCHEME, group_size=8))
    assert torch.equal(first, torch.ones(24))
    assert len(others) == 2 * (awq.STEPS + 1)
    for scale in others:
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)
        heads = scale.view(2, 3, 4)
        assert torch.equal(heads, heads[:, :1].expand_as(heads))


def test_statistics_equal_those_of_all_inputs_at_once(layer: Callable[..., Layer]) -> None:
    made = layer(0)
    with torch.inference_mode():
        inputs = made.block.norm(made.held_out).reshape(-1, WIDTH)
    seen = watch(made.block, made.group, made.held_out.split(3))
    assert seen.tokens == 8 * 128
    assert torch.allclose(seen.gram, inputs.T @ inputs / len(inputs), atol=1e-4)
    assert torch.allclose(seen.mean_abs, inputs.abs().mean(0), atol=1e-5)
