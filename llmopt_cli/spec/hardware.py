"""`Hardware`: what one accelerator holds and how fast it is. Facts with their sources; no efficiencies, no model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from llmopt_cli.spec.scheme import Compute

GB = 10**9
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator. Rates are dense peaks (no sparsity) of the datasheet; GB is 1e9 bytes, GiB 1024^3.

    `memory_gib` is what a program can use, `memory_gb` what the label says. `link_gb_s` is one direction between two
    of them. Rates that it lacks, and a price nobody published, are None. Prices are USD an hour for one.
    """

    name: str
    vendor: str
    arch: str
    memory_gib: float
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float | None = None
    int8_tops: float | None = None
    fp4_tflops: float | None = None
    link_gb_s: float | None = None
    link: str = ""
    price_usd_hour: float | None = None
    price_range: str = ""
    price_source: str = ""
    spec_source: str = ""
    notes: str = ""

    @property
    def memory_bytes(self) -> float:
        """Usable memory in bytes."""
        return self.memory_gib * GIB

    @property
    def bandwidth(self) -> float:
        """Peak memory bandwidth in bytes per second."""
        return self.bandwidth_gb_s * GB

    @property
    def link_bandwidth(self) -> float:
        """One direction to another accelerator, in bytes per second; PCIe 3.0 x16 where no source names the link."""
        return (self.link_gb_s or 16) * GB

    @property
    def over_pcie(self) -> bool:
        """Whether accelerators talk over PCIe, where tensor parallelism pays little."""
        return self.link.startswith("PCIe") or not self.link

    def flops(self, compute: Compute = "bf16") -> float:
        """Peak multiply-adds x 2 per second in `compute`, or in 16 bits where the tensor cores lack that dtype."""
        rates = {"bf16": self.bf16_tflops, "fp8": self.fp8_tflops, "int8": self.int8_tops, "fp4": self.fp4_tflops}
        return (rates[compute] or self.bf16_tflops) * 1e12


EXAMPLE = "for example four lines: `name: My GPU`, `memory_gib: 47.5`, `bandwidth_gb_s: 900`, `bf16_tflops: 180`"


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFile(Hardware):
    """An accelerator that a YAML file describes, and how many there are of it.

    Without `memory_gb` the label is what is usable. Figures must be positive numbers.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}

    vendor: str = ""
    arch: str = ""
    memory_gb: float = 0.0
    count: int | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            lowest = one.name in ("memory_gb", "price_usd_hour")  # these may be zero
            if isinstance(value, int | float) and (value < 0 or not (value or lowest) or math.isinf(value)):
                raise ValueError(f"{one.name} must be a positive number, not {value:g}")

    def hardware(self, source: str) -> Hardware:
        """The accelerator itself; `source` is the file."""
        facts = {one.name: getattr(self, one.name) for one in fields(Hardware)}
        facts["memory_gb"] = self.memory_gb or round(self.memory_bytes / GB, 1)
        facts["spec_source"] = self.spec_source or source
        return Hardware(**facts)
