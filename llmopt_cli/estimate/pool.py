"""How engines divide a GPU: what they leave alone, what the KV cache gets, and what they batch untold.

One row an engine, each with its source. Bytes, and GiB where a name says so; how much weights and activations take is
`memory`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmopt_cli.estimate.constants import Constants
from llmopt_cli.spec.hardware import GIB, Hardware
from llmopt_cli.spec.recipe import Batching

MIB = 1024**2
Rule = Literal["of_total", "static", "of_free", "after_load"]


@dataclass(frozen=True, slots=True)
class Tier:
    """What an engine batches on GPUs from `gib` upwards, unless told otherwise."""

    gib: float
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Pool:
    """One engine's way with memory.

    `of_total`: weights, activations and cache share `memory_utilization` of the GPU, or all but `spare`. `static`: a
    share of the GPU for weights and cache, the rest for activations. `of_free`: the cache takes `share` of what
    everything else leaves. `after_load`: as that, with activations in the rest. What is given of `logit_copies`,
    `non_torch_one` and `non_torch_many` replaces the engine's constants. Experts are padded to a multiple of
    `expert_multiple` where they are quantized alone.
    """

    rule: Rule
    source: str
    tiers: tuple[Tier, ...]
    share: float = 1.0
    spare: float | None = None
    logit_copies: float | None = None
    non_torch_one: float | None = None
    non_torch_many: float | None = None
    graphs: float = 0.0
    expert_multiple: int = 1


POOLS: dict[str, Pool] = {
    "vllm": Pool(
        "of_total",
        "vLLM 0.11 logs (llm-d-planner); batching on large GPUs as vLLM 0.33 chooses it",
        (Tier(160, 1024, 16384), Tier(70, 1024, 8192), Tier(0, 256, 2048)),
        graphs=0.25 * GIB,  # the logs: -0.9 to +1.0 beside the profile; it lies outside the utilization
        expert_multiple=256,
    ),
    "sglang": Pool(
        "static",
        "SGLang 0.5 server_args: mem_fraction_static from the GPU; vLLM issue 21348: 367,404 tokens on 4 x H100",
        # Requests: the largest batch in a CUDA graph.
        (
            Tier(160, 512, 16384),
            Tier(60, 256, 8192),
            Tier(35, 32, 4096),
            Tier(20, 24, 2048),
            Tier(0, 8, 2048),
        ),
        non_torch_one=0.6 * GIB,
        non_torch_many=2.1 * GIB,
        expert_multiple=256,
    ),
    "trtllm": Pool(
        "of_free",
        "TensorRT-LLM: free_gpu_memory_fraction 0.9, max_batch_size 2048, max_num_tokens 8192",
        (Tier(0, 2048, 8192),),
        share=0.9,
        logit_copies=1.0,
    ),
    "llamacpp": Pool(
        "of_total",
        "llama.cpp: --fit leaves 1024 MiB; compute buffer of Llama-3-8B 258.5 MiB = logits of one ubatch of 512 tokens",
        (Tier(0, 512, 512),),
        spare=1024 * MIB,
        logit_copies=1.0,
        non_torch_one=0.5 * GIB,
        non_torch_many=0.5 * GIB,
    ),
    "llmopt": Pool(
        "after_load",
        "runtime/kv_cache.py: 0.9 of what is free once the weights are loaded, activations in the rest",
        (Tier(0, 64, 1024),),
        share=0.9,
    ),
}


def find_pool(engine: Constants) -> Pool:
    """The way of `engine`; engines without a row are counted as vLLM."""
    return POOLS.get(engine.name, POOLS["vllm"])


def own_batching(engine: Constants, hardware: Hardware) -> Batching:
    """What the engine batches on this GPU if nobody tells it: more than is assumed here where the GPU is large."""
    tiers = find_pool(engine).tiers
    if engine.name == "vllm" and hardware.name.startswith("A100"):  # vLLM counts A100s among the small
        tiers = tiers[-1:]
    fitting = next(tier for tier in tiers if hardware.memory_gib >= tier.gib)
    return Batching(fitting.max_num_seqs, fitting.max_num_batched_tokens)


def static_fraction(hardware: Hardware, gpus: int) -> float:
    """SGLang's mem_fraction_static: all but what it sets aside for activations, graphs and parallelism (MiB)."""
    tier = next(tier for tier in POOLS["sglang"].tiers if hardware.memory_gib >= tier.gib)
    aside = 512 + 1.5 * tier.max_num_batched_tokens + 2 * tier.max_num_seqs + gpus / 8 * 1024
    if hardware.memory_gib > 60:
        aside = max(aside, 10 * 1024)
    return 1 - aside * MIB / hardware.memory_bytes
