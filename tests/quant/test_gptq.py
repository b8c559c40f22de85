"""GPTQ against the definition: one column at a time with explicit inverses, and what it promises about errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.quant.gptq import factor, gptq, improve, refit, round_in_turn
from llmopt_cli.quant.grid import Grid, extremes, grouped, output_error, quantize_weight, relative_error, storable
from llmopt_cli.spec.scheme import Scheme, find_scheme


def scheme(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> Scheme:
    return replace(find_scheme("gptq"), weight_bits=bits, group_size=group_size, symmetric=symmetric)


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def correlated(tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs to fit and held out, with correlated channels of very different sizes."""
    mixing = random(width, width, seed=seed + 10) / width**0.5 + 0.3 * torch.eye(width)
    sizes = torch.exp(0.8 * random(1, width, seed=seed + 20))
    fitted, held_out = (random(tokens, width, seed=seed + index) @ mixing * sizes for index in (1, 2))
    return fitted, held_out


def naive(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Algorithm of the paper without its tricks: after each input, the inverse of what is left of H is made anew."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for index in range(len(weight)):
        inverse = torch.linalg.inv(hessian[index:, index:])
        scale, zero = grid.scales[index], grid.zeros[index]
        codes[index] = (weight[index] / scale).round().add(zero).clamp(0, 2**grid.bits - 1)
        error = weight[index] - (codes[index] - zero) * scale
        weight[index:] -= inverse[:, :1] / inverse[0, 0] * error
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_codes_are_those_of_explicit_inverses(bits: int) -> None:
    width, rows = 192, 24  # more than a block of updates
    weight = random(width, rows).double()
    gram = gram_of(correlated(2000, width, seed=0)[0]).double()
    grid = extremes(weight[:, :, None].float(), scheme(bits, 1))
    grid = Grid(grid.scales.expand(width, rows).double() * 0.8, grid.zeros.double(), bits)
    order = gram.diagonal().argsort(descending=True)
    upper, damping = factor(gram.float(), order)
    assert upper is not None
    assert damping == 0.01
    hessian = gram + torch.eye(width, dtype=torch.float64) * (damping * gram.diagonal().mean())
    expected = naive(weight[order], hessian[order][:, order], grid.at(order))
    exact = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    assert torch.allclose(upper.double(), exact, atol=1e-4 * float(exact.abs().max()))
    found = round_in_turn(weight[order], exact, grid.at(order))
    steps, wanted = ((codes - grid.zeros[order]) * grid.scales[order] for codes in (found, expected))
    assert float((steps - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, True), (3, False), (2, True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_rounding_by_far_on_correlated_inputs(bits: int, symmetric: bool, seed: int) -> None:
    fitted, held_out = correlated(4096, 128, seed)
    weight, plan = random(96, 128, seed=seed + 5), scheme(bits, 64, symmetric)
    found = gptq(weight, gram_of(fitted), plan)
    rounded = quantize_weight(weight, plan)
    errors = [relative_error(weight, codes.dequantize(), gram_of(held_out)) for codes in (found.codes, rounded)]
    assert errors[0] < 0.62 * errors[1]
    assert (found.method, found.damping) == ("gptq", 0.01)


def test_each_round_of_fitting_lowers_the_error() -> None:
    weight = random(64, 128)
    gram = gram_of(correlated(2048, 128, seed=3)[0])
    grid = extremes(grouped(weight, scheme(3)), scheme(3))
    codes = grid.codes(grouped(weight, scheme(3))).view_as(weight).T.contiguous()

    def error(codes: Tensor, grid: Grid) -> float:
        values = (codes.T.reshape(64, 4, 32) - grid.zeros[..., None]) * grid.scales[..., None]
        return float(output_error(weight, values.view_as(weight), gram).sum())

    errors = [error(codes, grid)]
    for _ in range(3):
        grid = refit(weight.T.contiguous(), gram, codes, grid)
        errors.append(error(codes, grid))
        wide = Grid(grid.scales.T.repeat_interleave(32, 0), grid.zeros.T.repeat_interleave(32, 0), 3)
        codes = improve(weight.T.contiguous(), gram, codes, wide)
        errors.append(error(codes, grid))
    assert errors[3] < errors[2] < errors[1] < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_one_better_code_is_found_for_every_input_given_the_others() -> None:
    weight, gram = random(8, 3), gram_of(correlated(500, 8, seed=1)[0])
    grid = Grid(torch.full((8, 3), 0.25), torch.full((8, 3), 8.0), 4)
    codes = torch.randint(16, (8, 3), generator=torch.Generator().manual_seed(0)).float()
    expected = codes.clone()
    for index in range(8):
        trials = []
        for code in range(16):
            expected[index] = code
            error = (expected - 8) * 0.25 - weight
            trials.append(((gram @ error) * error).sum(0))
        expected[index] = torch.stack(trials).argmin(0).float()
    assert torch.equal(improve(weight, gram, codes, grid), expected)


def test_scales_are_refitted_by_least_squares() -> None:
    weight, gram = random(16, 5), gram_of(correlated(500, 16, seed=1)[0])
    codes = torch.randint(16, (16, 5), generator=torch.Generator().manual_seed(0)).float()
    grid = Grid(torch.full((5, 1), 0.25), torch.full((5, 1), 8.0), 4)
    found = refit(weight, gram, codes, grid)
    root = torch.linalg.cholesky(gram.double()).T
    for column in range(5):
        step = (root @ (codes[:, column].double() - 8))[:, None]
        scale = torch.linalg.lstsq(step, (root @ weight[:, column].double())[:, None]).solution
        assert float(found.scales[column, 0]) == pytest.approx(float(scale), rel=1e-3)


def test_inputs_that_are_always_zero_are_left_to_rounding() -> None:
    inputs = correlated(1000, 64, seed=0)[0]
    inputs[:, 5::7] = 0
    weight = random(32, 64)
    found = gptq(weight, gram_of(inputs), scheme()).codes
    dead = inputs.abs().sum(0) == 0
    steps = found.scales.float().abs().repeat_interleave(32, 1)
    within = weight.abs() < 7 * steps
    missed = (found.dequantize() - weight).abs()
    assert bool((missed <= 0.51 * steps)[within & dead].all())
    assert relative_error(weight, found.dequantize(), gram_of(inputs)) < 0.1


@pytest.mark.parametrize(("lowest", "damping"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_escalates_until_the_hessian_is_positive(lowest: float, damping: float) -> None:
    vectors = torch.linalg.qr(random(64, 64).double()).Q
    values = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    values[0] = lowest
    found = gptq(random(16, 64), ((vectors * values) @ vectors.T).float(), scheme())
    assert (found.method, found.damping) == ("gptq", damping)


def test_a_hessian_that_no_damping_mends_is_reported() -> None:
    weight = random(16, 64)
    gram = torch.eye(64)
    gram[0, 1] = gram[1, 0] = 50
    found = gptq(weight, gram, scheme())
    assert (found.method, found.damping) == ("rtn", 0.0)
    assert torch.equal(found.codes.dequantize(), quantize_weight(weight, scheme()).dequantize())


def test_fewer_tokens_than_inputs_are_enough_to_go_on() -> None:
    inputs = random(20, 64)
    found = gptq(random(16, 64), gram_of(inputs), scheme())
    assert found.method == "gptq"
    assert bool(found.codes.dequantize().isfinite().all())


def test_scales_are_ones_that_a_file_can_hold() -> None:
    found = gptq(random(16, 64) * 1e-6, gram_of(random(200, 64)), scheme()).codes
    assert torch.equal(found.scales.float(), storable(found.scales.float()))
    assert found.symmetric
