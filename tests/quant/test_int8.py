"""8 bits a row: the bytes that bitsandbytes 0.50.2 makes of the same weights, and a naive loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.bitsandbytes import pack
from llmopt_cli.quant.int8 import int8
from llmopt_cli.quant.methods import METHODS

SCHEME = METHODS["int8"].scheme
# What bitsandbytes.functional.int8_vectorwise_quant (0.50.2, CPU) makes of weight(4, 32) in float16, plus 128.
BYTES = (
    "01d9b28c653e18f0c9a37c552f08e0b9936c461ff7d0aa835d3610e7c19a744d26ffd8b18b643d16efc8a27b542d07e0b9926b441ef7d0a9825c35"
    "0ee7c099734b24ffd8b18a633c14efc8a17a532c05dfb8916a431cf7cfa8815a330ce7c099714a22ffd8b089613a12efc8a079512a03dfb8906941"
    "1af7cfa88059310ae7bf"
)
LARGEST = [1.0, 0.994140625, 1.97265625, 1.9560546875]


def weight(rows: int, columns: int) -> Tensor:
    """Numbers without a generator, as float16 holds them: bitsandbytes takes no others."""
    index = torch.arange(rows * columns).view(rows, columns)
    return (((index * 7919) % 1009 - 504).float() / 504 * (1 + index // 64 % 23).float()).half().float()


def solved(found: Tensor) -> IntCodes:
    codes = int8(found, None, SCHEME).codes
    assert isinstance(codes, IntCodes)
    return codes


def test_codes_and_maxima_are_those_of_bitsandbytes() -> None:
    found = solved(weight(4, 32))
    assert bytes(found.codes.flatten().tolist()).hex() == BYTES
    assert pack(found, SCHEME)["SCB"].tolist() == LARGEST


def test_rounding_equals_a_naive_loop() -> None:
    values = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    found = solved(values)
    for row in range(5):
        largest = max(abs(value) for value in values[row].tolist())
        assert float(found.scales[row, 0]) == pytest.approx(largest / 127)
        assert found.codes[row].tolist() == [round(127 * value / largest) + 128 for value in values[row].tolist()]


def test_a_row_of_zeros_stays_one() -> None:
    values = torch.zeros(2, 8)
    values[1, 3] = 1
    assert torch.equal(solved(values).dequantize(), values)


def test_the_grid_is_symmetric_whatever_the_signs() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(solved(-values).dequantize(), -solved(values).dequantize())


def test_the_threshold_of_outliers_is_that_of_the_paper() -> None:
    assert SCHEME.outliers == 6.0
    assert SCHEME.compute == "int8"
