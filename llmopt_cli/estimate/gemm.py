"""Seconds of one matrix product on one GPU. Knows precisions and rates, no model: shapes are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from llmopt_cli.estimate.constants import Constants
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.scheme import Compute, Scheme

_WIDTH: dict[Compute, int] = {"bf16": 16, "fp8": 8, "int8": 8, "fp4": 4}


class Matmul(NamedTuple):
    """A product prepared: seconds to launch it, to read its weights, and per token to multiply and to move.

    It multiplies at one rate for `few` tokens, at most `limit`, and at another for `many`. `after` is what an
    elementwise kernel takes per token next to it.
    """

    launch: float
    weights: float
    few: float
    many: float
    limit: float
    moved: float
    after: float = 0.0

    def seconds(self, tokens: float, copies: float = 1) -> float:
        """`tokens` times one matrix, or shared out among `copies` of it."""
        compute = tokens * (self.few if tokens <= self.limit else self.many)
        return self.launch + max(compute, copies * self.weights + tokens * self.moved) + tokens * self.after


@dataclass(frozen=True)
class Rates:
    """What one kind of GPU does under one engine."""

    hardware: Hardware
    constants: Constants

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of 16-bit weights and of activations."""
        return self.hardware.bandwidth * self.constants.memory_efficiency

    def matmul(self, scheme: Scheme, n: float, k: float, visits: float = 1) -> Matmul:
        """tokens x k times k x n in `scheme`; of several such matrices a token multiplies `visits`."""
        c, weight_bandwidth = self.constants, self.hardware.bandwidth * self._memory_efficiency(scheme)
        quantize = 0.0 if self._compute(scheme) == "bf16" else c.quantize_blocks_s if _blocks(scheme) else c.quantize_s
        work = 2 * visits * n * k / self.hardware.flops(self._compute(scheme))
        work = work / c.unpack_efficiency if self._unpacked(scheme) else work
        return Matmul(
            launch=c.gemm_s + quantize,
            weights=n * k * scheme.bits_per_weight / 8 / weight_bandwidth,
            few=work / c.compute_efficiency_decode,
            many=work / self._efficiency(scheme),
            limit=c.decode_tokens,
            moved=2 * visits * (n + k) / weight_bandwidth,
        )

    def _compute(self, scheme: Scheme) -> Compute:
        """MXFP4 is a format for 8-bit products on GPUs with FP4, and weight-only on all others."""
        if scheme.name == "mxfp4" and self.hardware.fp4_tflops:
            return "fp8"
        rates = {"fp8": self.hardware.fp8_tflops, "int8": self.hardware.int8_tops, "fp4": self.hardware.fp4_tflops}
        return scheme.compute if rates.get(scheme.compute) else "bf16"

    def _unpacked(self, scheme: Scheme) -> bool:
        """Whether weights are widened before they are multiplied."""
        return scheme.weight_bits < _WIDTH[self._compute(scheme)]

    def _memory_efficiency(self, scheme: Scheme) -> float:
        c = self.constants
        if self._unpacked(scheme):
            return c.memory_efficiency_int8 if scheme.weight_bits == 8 else c.memory_efficiency_int4
        return c.memory_efficiency_fp4 if self._compute(scheme) == "fp4" else c.memory_efficiency

    def _efficiency(self, scheme: Scheme) -> float:
        """Of the compute rate, for many tokens."""
        c = self.constants
        if self._compute(scheme) == "fp4":
            return c.compute_efficiency_fp4
        return c.compute_efficiency_blocks if _blocks(scheme) else c.compute_efficiency_prefill


def _blocks(scheme: Scheme) -> bool:
    """8-bit products with a scale for every block of a matrix, as DeepSeek has them."""
    return scheme.compute == "fp8" and scheme.group_size > 0 and scheme.weight_bits == 8
