"""GGUF: block types as their layouts make them, and the mixes of llama.cpp by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.gguf import BLOCK_BITS, MIXES
from llmopt_cli.spec.scheme import SCHEMES

# Bytes of one block over its weights: scales, minima and codes as ggml-common.h lays them out.
LAYOUTS = {
    "q8_0": (2 + 32, 32),
    "q5_0": (2 + 4 + 16, 32),
    "q5_1": (4 + 4 + 16, 32),
    "q4_0": (2 + 16, 32),
    "q6_k": (2 + 16 + 64 + 128, 256),
    "q5_k": (4 + 12 + 32 + 128, 256),
    "q4_k": (4 + 12 + 128, 256),
    "q3_k": (2 + 12 + 32 + 64, 256),
    "q2_k": (4 + 16 + 64, 256),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_are_those_of_the_block(name: str) -> None:
    size, weights = LAYOUTS[name]
    assert BLOCK_BITS[name] == 8 * size / weights


def test_half_the_layers_of_an_m_mix_get_more() -> None:
    bits = MIXES["q4_k_m"].bits(find_model("llama-3.1-8b"))
    assert bits["down"] == bits["value"] == (4.5 + 6.5625) / 2
    assert (bits["ffn"], bits["embedding"], bits["head"], bits["norm"]) == (4.5, 4.5, 6.5625, 32)


def test_a_tied_embedding_is_stored_as_the_head_is() -> None:
    assert MIXES["q4_k_m"].bits(find_model("llama-3.2-1b"))["embedding"] == 6.5625


def test_rows_that_fill_no_block_of_256_take_a_larger_type() -> None:
    spec = replace(find_model("llama-3.1-8b"), hidden_size=4096 + 32)
    bits = MIXES["q4_k_m"].bits(spec)
    assert (bits["ffn"], bits["head"]) == (5.5, 8.5)
    assert bits["down"] == (4.5 + 6.5625) / 2


@pytest.mark.parametrize("name", MIXES)
def test_the_nominal_bits_of_a_scheme_are_the_mean_in_the_layers_of_an_8b(name: str) -> None:
    spec = find_model("llama-3.1-8b")
    layers = {kind: count for kind, count in spec.matrices().items() if kind not in ("embedding", "head", "norm")}
    bits = MIXES[name].bits(spec)
    mean = sum(count * bits[kind] for kind, count in layers.items()) / sum(layers.values())
    assert SCHEMES[name].bits_per_weight == pytest.approx(mean, abs=0.01)
