"""Hardware: units, and what stands in where an accelerator lacks a figure."""

from __future__ import annotations

from llmopt_cli.spec.hardware import Hardware

CARD = Hardware("card", "ACME", "first", memory_gib=23.5, memory_gb=24, bandwidth_gb_s=1000, bf16_tflops=100)


def test_units_are_bytes_and_seconds() -> None:
    assert CARD.memory_bytes == 23.5 * 1024**3
    assert CARD.bandwidth == 1e12
    assert CARD.flops() == 1e14


def test_without_fp8_cores_products_run_in_16_bits() -> None:
    assert CARD.flops("fp8") == CARD.flops()
    fp8 = Hardware("card", "ACME", "second", 23.5, 24, 1000, bf16_tflops=100, fp8_tflops=200)
    assert fp8.flops("fp8") == 2e14
    assert fp8.flops() == 1e14


def test_an_unnamed_link_counts_as_pcie() -> None:
    assert CARD.over_pcie
    assert CARD.link_bandwidth == 16e9
    assert not Hardware("card", "ACME", "third", 23.5, 24, 1000, 100, link_gb_s=300, link="NVLink3").over_pcie
