"""The constants of the closed forms, each with its source. What a calibration replaces is one of these objects.

"serving runs" are 1,060 published TPOT measurements of Llama-3.1-8B, Llama-3.1-70B and Qwen3-32B under vLLM, SGLang
and TensorRT-LLM on H100, H200, B200 and GB200 (aiconfigurator, silicon_sample.csv), on which the values were chosen
by hand; "operator tables" are the kernel times measured in the same repository.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from llmopt_cli.errors import UnknownNameError
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.recipe import Batching

T = TypeVar("T")


def _constant(value: T, source: str) -> T:
    found: T = field(default=value, metadata={"source": source})
    return found


@dataclass(frozen=True, slots=True)
class Constants:
    """Times in seconds, memory in bytes, efficiencies as fractions of a datasheet's peak."""

    name: str = _constant("vllm", "the engine")
    # Time
    gemm_s: float = _constant(5e-6, "serving runs; operator tables: 3.8 us on H100, 5.9 us on A100")
    attention_s: float = _constant(8e-6, "serving runs; operator tables: 13-21 us for one decode kernel alone")
    allreduce_s: float = _constant(8e-6, "serving runs; operator tables: 3-5 us TensorRT-LLM, 12-14 us vLLM on H100")
    hop_s: float = _constant(10e-6, "aiconfigurator: constant of a point-to-point transfer")
    norm_s: float = _constant(3e-6, "aiconfigurator: constant of its elementwise kernels")
    memory_efficiency: float = _constant(0.8, "serving runs; aiconfigurator: mem_bw_empirical_scaling")
    memory_efficiency_int8: float = _constant(0.62, "gpt-fast: weight-only int8 at batch 1 is 16-34 % below 0.8")
    memory_efficiency_int4: float = _constant(0.5, "gpt-fast: weight-only int4 at batch 1 is 46-58 % below 0.8")
    compute_efficiency_decode: float = _constant(0.5, "serving runs, up to `decode_tokens` in one step")
    compute_efficiency_prefill: float = _constant(0.6, "serving runs; operator tables: 0.49-0.86 by dtype and GPU")
    decode_tokens: float = _constant(256, "serving runs: where the larger tiles of a GEMM begin to fill")
    attention_compute_efficiency: float = _constant(0.5, "operator tables: 0.50 A100, 0.55 H100")
    head_compute_efficiency: float = _constant(0.7, "serving runs")
    link_efficiency: float = _constant(0.7, "operator tables: large all-reduces over NVLink")
    dispatch_s: float = _constant(58.5e-3, "vLLM TTFT on 318 serving runs, fitted with the two below")
    queue_slope: float = _constant(0.07, "as dispatch_s")
    queue_power: float = _constant(0.98, "as dispatch_s")
    # Memory
    memory_utilization: float = _constant(0.9, "vLLM's gpu_memory_utilization for years; 0.92 since 2026")
    sampler_copies: float = _constant(9.7, "vLLM 0.11 logs of 12 models on H100 (llm-d-planner), within 6 %")
    ffn_copies: float = _constant(3, "gate, up and their product; vLLM log of Qwen2.5-1.5B on T4, 32k-token prefill")
    hidden_copies: float = _constant(4, "the same log")
    non_torch_one: float = _constant(0.15 * GIB, "vLLM 0.11 logs (llm-d-planner): 0.13-0.15 GiB; vLLM 0.19: 2.0")
    non_torch_many: float = _constant(0.6 * GIB, "vLLM 0.11 logs (llm-d-planner), tensor parallel: 0.55-0.6 GiB")
    max_num_seqs: float = _constant(256, "vLLM's default on A100 and smaller GPUs")
    max_num_batched_tokens: float = _constant(2048, "as max_num_seqs")


VLLM = Constants()
ENGINES: dict[str, Constants] = {"vllm": VLLM, "llmopt": Constants(name="llmopt")}


def find_engine(name: str) -> Constants:
    """The constants of an engine; an unknown name raises UnknownNameError with the nearest ones."""
    if name.lower() not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    return ENGINES[name.lower()]


def default_batching(engine: Constants) -> Batching:
    """How the engine batches unless told otherwise."""
    return Batching(int(engine.max_num_seqs), int(engine.max_num_batched_tokens))
