"""Schemes: what a weight costs in bits, its share of scale and zero included."""

from __future__ import annotations

import pytest

from llmopt_cli.errors import UnknownNameError
from llmopt_cli.spec.scheme import SCHEMES, Scheme, cache_of, find_kv_dtype, find_scheme


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fp32", 32), ("bf16", 16), ("int8", 8), ("fp8", 8), ("int4", 4), ("awq", 4 + 20 / 128), ("gptq", 4 + 20 / 128)],
)
def test_bits_per_weight_include_scales_and_zeros(name: str, bits: float) -> None:
    assert find_scheme(name).bits_per_weight == bits


def test_a_group_with_16_bit_scale_and_zero_costs_a_quarter_bit() -> None:
    assert Scheme("mine", 4, 128, scale_bits=16, zero_bits=16).bits_per_weight == 4.25


def test_every_scheme_is_found_under_its_name_and_the_usual_ones() -> None:
    assert all(find_scheme(name) is scheme for name, scheme in SCHEMES.items())
    assert find_scheme("FP16") is find_scheme("bfloat16") is find_scheme("auto") is SCHEMES["bf16"]


def test_unknown_scheme_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown scheme `aqw`") as error:
        find_scheme("aqw")
    assert "awq" in str(error.value.hint)


def test_a_cache_is_as_wide_as_what_it_is_computed_in() -> None:
    assert cache_of("auto", find_scheme("fp32")).bytes_per_value(128) == 4
    assert cache_of("auto", find_scheme("awq")) == find_kv_dtype("bfloat16")
    assert cache_of("fp8", find_scheme("fp32")).bytes_per_value(128) == 1
