"""The AWQ-gemm layout: bytes written by hand, the round trip, the refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats import awq
from llmopt_cli.spec.scheme import find_scheme

SCHEME = find_scheme("awq")


def _random(out_features: int, groups: int, group_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, groups * group_size), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand((out_features, groups), generator=generator).half()
    return codes, scales, zeros


def test_bytes_of_one_word_are_those_of_the_layout() -> None:
    # One input row, outputs 0..7 with codes 0..7. Nibbles from the lowest: columns 0 2 4 6 1 3 5 7 -> 0x75316420.
    # The second word holds outputs 8..15 with codes 8..15 -> 0xFDB9ECA8, negative as an int32.
    codes = torch.arange(16, dtype=torch.uint8)[:, None]
    zeros = torch.full((16, 1), 8, dtype=torch.uint8)
    scales = torch.arange(16)[:, None] / 16
    stored = awq.pack(IntCodes(codes, scales, zeros), SCHEME)
    assert stored["qweight"].numpy().tobytes() == bytes.fromhex("20643175" + "a8ecb9fd")
    assert stored["qzeros"].numpy().tobytes() == bytes.fromhex("88888888" * 2)
    assert stored["scales"].dtype == torch.float16
    assert stored["scales"].tolist() == [[index / 16 for index in range(16)]]


def test_a_hand_written_linear_dequantizes_to_the_hand_computed_weight() -> None:
    # [out 8, in 2], one group per input: output 1 has code 3 (nibble 4 of the word) in row 0 and 1 in row 1.
    qweight = torch.tensor([[0x3 << 16], [0x1 << 16]], dtype=torch.int32)
    qzeros = torch.tensor([[0x5 << 16], [0]], dtype=torch.int32)
    scales = torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16)
    scheme = replace(SCHEME, group_size=1)
    weight = awq.unpack({"qweight": qweight, "qzeros": qzeros, "scales": scales}, scheme).dequantize()
    expected = torch.zeros(8, 2)
    expected[1] = torch.tensor([(3 - 5) * 0.5, (1 - 0) * 2.0])
    assert torch.equal(weight, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 33), st.integers(0, 2**31))
def test_unpack_inverts_pack(words: int, groups: int, group_size: int, seed: int) -> None:
    codes, scales, zeros = _random(8 * words, groups, group_size, seed)
    stored = awq.pack(IntCodes(codes, scales, zeros), SCHEME)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "qweight": (groups * group_size, words),
        "qzeros": (groups, words),
        "scales": (groups, 8 * words),
    }
    read = awq.unpack(stored, replace(SCHEME, group_size=group_size))
    for found, wanted in zip((read.codes, read.scales, read.zeros), (codes, scales, zeros), strict=True):
        assert torch.equal(found, wanted)


def test_dequantize_equals_the_formula_element_by_element() -> None:
    codes, scales, zeros = _random(8, 3, 5, seed=1)
    weight = IntCodes(codes, scales, zeros).dequantize()
    for row in range(8):
        for column in range(15):
            group = column // 5
            wanted = (int(codes[row, column]) - int(zeros[row, group])) * float(scales[row, group])
            assert float(weight[row, column]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "reason"),
    [(16, 256, 128, None), (12, 256, 128, "12 outputs"), (16, 192, 128, "192 inputs")],
)
def test_misfit_names_the_side_that_does_not_divide(
    out_features: int, in_features: int, group_size: int, reason: str | None
) -> None:
    found = awq.misfit(out_features, in_features, replace(SCHEME, group_size=group_size))
    assert found is None if reason is None else reason in str(found)


def test_tensors_of_different_linears_are_refused() -> None:
    stored = awq.pack(IntCodes(*_random(16, 2, 8, seed=0)), SCHEME)
    other = awq.pack(IntCodes(*_random(24, 2, 8, seed=0)), SCHEME)
    with pytest.raises(CheckpointError, match="not one AWQ-gemm linear"):
        awq.unpack(stored | {"qzeros": other["qzeros"]}, replace(SCHEME, group_size=8))


def test_config_parses_back_to_its_scheme() -> None:
    scheme = find_scheme("awq")
    written = awq.config(scheme, ["lm_head"])
    assert written["quant_method"] == "awq"
    assert written["modules_to_not_convert"] == ["lm_head"]
    assert awq.parse_config(written).default == scheme


def test_one_group_per_row_is_minus_one_in_the_file_and_zero_in_the_scheme() -> None:
    scheme = awq.parse_config({"quant_method": "awq", "bits": 4, "group_size": -1, "version": "GEMM"}).default
    assert scheme.group_size == 0
    assert awq.config(scheme)["group_size"] == -1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"bits": 8}, "8 bits"),
        ({"zero_point": False}, "without zero points"),
        ({"group_size": 0}, "group size 0"),
    ],
)
def test_what_is_not_four_bit_gemm_is_refused_by_name(change: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        awq.parse_config(awq.config(find_scheme("awq")) | change)
