"""NF4 and FP4: the bytes that bitsandbytes 0.50.2 makes of the same weights, and naive loops."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmopt_cli.model.codes import Nested, TableCodes
from llmopt_cli.model.formats.bitsandbytes import code_table
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.quant.nf4 import nf4
from llmopt_cli.spec.scheme import Scheme, find_scheme

# What bitsandbytes.functional.quantize_4bit (0.50.2, CPU) stores for weight(4, 32).
BYTES = {
    "nf4": "0ec8521fda7410ec9531fdb7420eda631feb8521fda7310ec9521fdb7420ed9631feb8521fda6310ec9521fdb7420ec9631f"
    "eb8420fda6310ec9521fdb7410ec",
    "fp4": "b246fda3579cab256eda3241fdb256eca3241fda3579cab256eda3241fab256eca3241fdb3579cab256eda3241cab256eda3"
    "241fdb3579cab256eda3248cab25",
}
# The first 16 digits of the SHA-256 of what it stores for weight(300, 64) under double quantization; the maxima's codes
# are of its torch backend (quantize_blockwise): the C++ one takes the second nearest value for 2 of these 300.
CODES = {"nf4": "7ac7ddb28117363b", "fp4": "ee4ddcd3f9b8a151"}
NESTED_CODES, NESTED_ABSMAX, OFFSET = "de66a796d879dc27", "b4e1901135f6e6a7", 11.830826759338379


def weight(rows: int, columns: int) -> Tensor:
    """Numbers without a generator: the same wherever float32 is. Blocks of 64 differ in size."""
    index = torch.arange(rows * columns).view(rows, columns)
    return ((index * 7919) % 1009 - 504).float() / 504 * (1 + index // 64 % 23).float()


def plain(name: str, blocksize: int = 64) -> Scheme:
    return replace(find_scheme("nf4"), name=name, group_size=blocksize)


def solved(found: Tensor, scheme: Scheme) -> TableCodes:
    codes = nf4(found, None, scheme).codes
    assert isinstance(codes, TableCodes)
    return codes


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(name: str) -> None:
    assert bytes(solved(weight(4, 32), plain(name)).codes.flatten().tolist()).hex() == BYTES[name]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_is_that_of_bitsandbytes(name: str) -> None:
    found = solved(weight(300, 64), METHODS[name].scheme)
    assert isinstance(found.absmax, Nested)
    assert digest(found.codes) == CODES[name]
    assert digest(found.absmax.codes) == NESTED_CODES
    assert digest(found.absmax.absmax) == NESTED_ABSMAX
    assert found.absmax.offset == pytest.approx(OFFSET, rel=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_weight_is_its_nearest_value(name: str) -> None:
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = solved(values, plain(name, blocksize=32)).dequantize()
    table = code_table(name).tolist()
    for row in range(3):
        largest = max(abs(value) for value in values[row].tolist())
        for value, near in zip(values[row].tolist(), found[row].tolist(), strict=True):
            best = min(abs(value - entry * largest) for entry in table)
            assert abs(value - near) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_what_the_table_holds_comes_back_exactly(name: str) -> None:
    values = code_table(name).repeat(2, 4) * 0.5
    assert torch.equal(solved(values, plain(name)).dequantize(), values)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_block_of_zeros_stays_one(name: str) -> None:
    assert not solved(torch.zeros(2, 64), plain(name)).dequantize().any()


def test_a_last_block_may_be_short() -> None:
    values = weight(3, 32)  # 96 weights: a block and a half
    found = solved(values, plain("nf4"))
    assert isinstance(found.absmax, Tensor)
    assert found.absmax.tolist() == [float(values[:2].abs().max()), float(values[2].abs().max())]
    assert float((found.dequantize() - values).abs().max()) < 0.16 * float(values.abs().max())


def test_double_quantization_costs_little() -> None:
    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    once, twice = (solved(values, scheme).dequantize() for scheme in (plain("nf4"), METHODS["nf4"].scheme))
    errors = [float((one - values).norm() / values.norm()) for one in (once, twice)]
    assert errors[0] < errors[1] < 1.02 * errors[0]
