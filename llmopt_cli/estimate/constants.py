"""The constants of the closed forms, each with its source. What a calibration replaces is one of these objects.

The defaults are one hand-chosen set for every engine (`REFERENCE`); `assets/catalog/engines.csv` says where an engine
differs from it, on every GPU or on some. "serving runs" are 1,060 published TPOT measurements of Llama-3.1-8B,
Llama-3.1-70B and Qwen3-32B under vLLM, SGLang and TensorRT-LLM on H100, H200, B200 and GB200 (aiconfigurator,
silicon_sample.csv), on which the values were chosen by hand; "operator tables" are the kernel times measured in the
same repository.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from llmopt_cli.errors import UnknownNameError
from llmopt_cli.spec.checkpoint import ASSETS
from llmopt_cli.spec.hardware import GIB, Hardware
from llmopt_cli.spec.recipe import Batching

T = TypeVar("T")
TABLE = ASSETS / "catalog" / "engines.csv"


def _constant(value: T, source: str) -> T:
    found: T = field(default=value, metadata={"source": source})
    return found


@dataclass(frozen=True, slots=True)
class Override:
    """One constant of an engine on some GPUs: `where` is a GPU's name or its architecture, empty for all of them.

    A fitted one has the value that the fit starts from, which was chosen by hand or from operator tables.
    """

    where: str
    name: str
    value: float
    source: str
    start: float | None = None


@dataclass(frozen=True, slots=True)
class Constants:
    """Times in seconds, memory in bytes, efficiencies as fractions of a datasheet's peak."""

    name: str = _constant("reference", "the engine")
    overrides: tuple[Override, ...] = _constant((), "assets/catalog/engines.csv, each with its own source")
    # Time
    gemm_s: float = _constant(5e-6, "serving runs; operator tables: 3.8 us on H100, 5.9 us on A100")
    quantize_s: float = _constant(0.0, "before a GEMM with 8 or 4-bit inputs; operator tables: 3-9 us more a GEMM")
    quantize_blocks_s: float = _constant(0.0, "the same for FP8 in blocks; operator tables: 2-10 us under SGLang")
    attention_s: float = _constant(8e-6, "serving runs; operator tables: 13-21 us for one decode kernel alone")
    experts_s: float = _constant(0.0, "routing, sorting and summing up of a layer of experts; fitted per engine")
    latent_s: float = _constant(0.0, "what latent attention launches beside its GEMMs; fitted per engine")
    indexer_s: float = _constant(110e-6, "a layer's indexer of sparse attention: GLM-5 under SGLang, 6 serving runs")
    allreduce_s: float = _constant(8e-6, "serving runs; operator tables: 3-5 us TensorRT-LLM, 12-14 us vLLM on H100")
    hop_s: float = _constant(10e-6, "aiconfigurator: constant of a point-to-point transfer")
    norm_s: float = _constant(3e-6, "aiconfigurator: constant of its elementwise kernels")
    step_s: float = _constant(0.0, "scheduling and sampling between two steps; fitted per engine")
    host_s: float = _constant(0.0, "least time of a layer where the host launches each kernel (no CUDA graphs)")
    memory_efficiency: float = _constant(0.8, "serving runs; aiconfigurator: mem_bw_empirical_scaling")
    cache_efficiency: float = _constant(0.8, "as memory_efficiency; operator tables: 0.73 on A100 to 0.94 on B200")
    cache_efficiency_fp8: float = _constant(0.8, "operator tables: 0.88 on B200; converting limits it on Hopper")
    memory_efficiency_int8: float = _constant(0.62, "gpt-fast: weight-only int8 at batch 1 is 16-34 % below 0.8")
    memory_efficiency_int4: float = _constant(0.5, "gpt-fast: weight-only int4 at batch 1 is 46-58 % below 0.8")
    memory_efficiency_fp4: float = _constant(0.65, "operator tables: 0.50 TensorRT-LLM to 0.73 vLLM on Blackwell")
    compute_efficiency_decode: float = _constant(0.5, "serving runs, up to `decode_tokens` in one step")
    compute_efficiency_prefill: float = _constant(0.6, "serving runs; operator tables: 0.49-0.86 by dtype and GPU")
    compute_efficiency_blocks: float = _constant(0.6, "FP8 in blocks, prefill; operator tables: 0.51-0.75")
    compute_efficiency_fp4: float = _constant(0.3, "operator tables: 0.29-0.43 on Blackwell")
    unpack_efficiency: float = _constant(1.0, "what unpacking to 16 bits leaves of the compute rate; fitted per engine")
    decode_tokens: float = _constant(256, "serving runs: where the larger tiles of a GEMM begin to fill")
    attention_compute_efficiency: float = _constant(0.5, "operator tables: 0.50 A100, 0.55 H100")
    head_compute_efficiency: float = _constant(0.7, "serving runs")
    link_efficiency: float = _constant(0.7, "operator tables: large all-reduces over NVLink")
    dispatch_s: float = _constant(58.5e-3, "vLLM TTFT on 318 serving runs, fitted with the two below")
    queue_slope: float = _constant(0.07, "as dispatch_s")
    queue_power: float = _constant(0.98, "as dispatch_s")
    alike_slope: float = _constant(0.0, "queue_slope where all requests are alike and end together; 0: the same")
    reserved_output: float = _constant(0.5, "share of its answer a request holds memory for: half, as it grows")
    # Memory
    memory_utilization: float = _constant(0.9, "vLLM's gpu_memory_utilization for years; 0.92 since 2026")
    sampler_copies: float = _constant(9.55, "vLLM logs of Llama-3.1-8B, Qwen3-0.6B, gpt-oss (0.11) and V0: within 1 %")
    profile_copies: float = _constant(1.35, "hidden states of the step beside the sampler; the same logs")
    ffn_copies: float = _constant(3, "gate, up and their product; vLLM log of Qwen2.5-1.5B on T4, 32k-token prefill")
    hidden_copies: float = _constant(4, "the same log")
    non_torch_one: float = _constant(0.15 * GIB, "vLLM 0.11 logs (llm-d-planner): 0.13-0.15 GiB; vLLM 0.19: 2.0")
    non_torch_many: float = _constant(0.6 * GIB, "vLLM 0.11 logs (llm-d-planner), tensor parallel: 0.55-0.6 GiB")
    max_num_seqs: float = _constant(256, "vLLM's default on A100 and smaller GPUs")
    max_num_batched_tokens: float = _constant(2048, "as max_num_seqs")

    def on(self, hardware: Hardware) -> Self:
        """The constants on one kind of GPU: what holds for its architecture, then what holds for it alone."""
        values = {
            override.name: override.value
            for where in (hardware.arch, hardware.name)
            for override in self.overrides
            if override.where == where
        }
        return replace(self, overrides=(), **values)  # type: ignore[arg-type]  # all of them are floats

    def sourced(self, hardware: Hardware) -> dict[str, tuple[float, str]]:
        """Every constant on one kind of GPU: its value, and who says so."""
        sources = {name: str(one.metadata["source"]) for name, one in self.__dataclass_fields__.items()}
        for where in ("", hardware.arch, hardware.name):
            sources |= {one.name: one.source for one in self.overrides if one.where == where}
        here = self.on(hardware)
        return {name: (getattr(here, name), source) for name, source in sources.items() if name not in _NO_FIGURES}


_NO_FIGURES = frozenset(("name", "overrides"))
REFERENCE = Constants()


def read_engines() -> dict[str, Constants]:
    """The engines of the table, by name."""
    rows: dict[str, list[Override]] = {}
    with TABLE.open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            start = float(row["start"]) if row["start"] else None
            override = Override(row["where"], row["constant"], float(row["value"]), row["source"], start)
            rows.setdefault(row["engine"], []).append(override)
    return {name: build_engine(name, overrides) for name, overrides in rows.items()}


def build_engine(name: str, overrides: list[Override]) -> Constants:
    """`REFERENCE` with what holds everywhere; the rest waits for its GPU."""
    everywhere = {override.name: override.value for override in overrides if not override.where}
    return replace(REFERENCE, name=name, overrides=tuple(overrides), **everywhere)


ENGINES = read_engines()
VLLM = ENGINES["vllm"]


def find_engine(name: str) -> Constants:
    """The constants of an engine; an unknown name raises UnknownNameError with the nearest ones."""
    if name.lower() not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    return ENGINES[name.lower()]


def default_batching(engine: Constants) -> Batching:
    """How the engine batches unless told otherwise."""
    return Batching(int(engine.max_num_seqs), int(engine.max_num_batched_tokens))
