"""What may be offered: precisions by engine and accelerator, and their cost in quality.

Facts as data; the figures of a choice are computed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.scheme import Scheme, find_scheme

GGUF = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
SERVED = ("bf16", "fp8", "int8", "w8a8", "awq", "nf4", "nvfp4", "gptq-3bit")
OFFERED = {"llamacpp": GGUF}  # other engines: SERVED
NVIDIA = frozenset(("NVIDIA",))
VENDORS = {  # whose accelerators an engine runs on; an engine that is not here: on all
    "vllm": frozenset(("NVIDIA", "AMD", "Intel")),
    "sglang": frozenset(("NVIDIA", "AMD", "Intel")),
    "trtllm": NVIDIA,
    "llmopt": NVIDIA,
}


@dataclass(frozen=True, slots=True)
class Risk:
    """What a choice may cost in quality: a rank to sort by, 0 for nothing, and a sentence."""

    rank: int
    text: str


LOSSLESS = Risk(0, "none")
KV_FP8 = Risk(1, "no figure at hand: measure it")
RISKS = {  # losses as commonly published, in percent of a benchmark's score
    "fp32": LOSSLESS,
    "bf16": LOSSLESS,
    "fp8": Risk(2, "about 1 % (the figure of INT8)"),
    "fp8_block": Risk(2, "about 1 % (the figure of INT8)"),
    "int8": Risk(2, "about 1 %"),
    "w8a8": Risk(2, "about 1 %"),
    "q8_0": Risk(2, "about 1 % (the figure of INT8)"),
    "q6_k": Risk(3, "below Q4_K_M's 2-4 %"),
    "q5_k_m": Risk(3, "below Q4_K_M's 2-4 %"),
    "awq": Risk(3, "1-3 %"),
    "gptq": Risk(4, "2-5 %"),
    "q4_k_m": Risk(4, "2-4 %"),
    "nf4": Risk(4, "depends on the task"),
    "nvfp4": Risk(4, "no figure at hand: measure it"),
    "gptq-3bit": Risk(5, "5-10 %"),
}
UNKNOWN = Risk(4, "no figure at hand: measure it")


def risk(scheme: Scheme) -> Risk:
    """What weights in `scheme` may cost in quality."""
    return RISKS.get(scheme.name, UNKNOWN)


def runs_on(engine: str, hardware: Hardware) -> bool:
    """Whether the engine knows this vendor's accelerators."""
    return engine not in VENDORS or hardware.vendor in VENDORS[engine]


def schemes(engine: str, hardware: Hardware) -> tuple[Scheme, ...]:
    """The precisions that the engine has and the accelerator computes sensibly."""
    return tuple(scheme for scheme in map(find_scheme, OFFERED.get(engine, SERVED)) if sensible(scheme, hardware))


def sensible(scheme: Scheme, hardware: Hardware) -> bool:
    """Whether the accelerator gains from the scheme's products: its rate for them is above that of 16 bits.

    FP8 weights have kernels of their own on Ampere, where products are in 16 bits (see `remark`).
    """
    return scheme.weight_only or hardware.flops(scheme.compute) > hardware.flops() or _fp8_by_weight(scheme, hardware)


def remark(scheme: Scheme, hardware: Hardware) -> str:
    """What must be known about this precision on this accelerator; empty if nothing."""
    return "no FP8 cores: weights alone" if _fp8_by_weight(scheme, hardware) else ""


def _fp8_by_weight(scheme: Scheme, hardware: Hardware) -> bool:
    return scheme.compute == "fp8" and hardware.fp8_tflops is None and hardware.arch == "Ampere"
