"""Does it fit, on how many GPUs, how fast, for how much: the verdicts on figures of memory, latency and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.constants import VLLM
from llmopt_cli.estimate.cost import usd_per_tokens
from llmopt_cli.estimate.latency import Band, StepModel, tpot_band, ttft_band
from llmopt_cli.estimate.memory import Budget, budget, kv_sequence_bytes
from llmopt_cli.estimate.rules import Comparison, side_by_side
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.hardware import GIB, Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching, Recipe
from llmopt_cli.spec.scheme import Scheme, find_scheme

GPU_COUNTS = (1, 2, 4, 8)  # one server; tensor parallelism does not leave it
CHECKED = frozenset(("H100-SXM5-80GB", "H200-SXM-141GB", "B200-SXM-180GB", "GB200-NVL72"))
SMALLER = ("int8", "awq")  # the precisions to offer where fewer GPUs would do


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests at once, and the tokens of each."""

    concurrency: int
    input_len: int
    output_len: int

    @property
    def length(self) -> int:
        """Tokens of one request when it ends."""
        return self.input_len + self.output_len


class Verdict(StrEnum):
    """Whether a number of GPUs holds the model and the load."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "does not fit"


@dataclass(frozen=True, slots=True)
class Fit:
    """A model on `gpus` GPUs: one GPU's memory, and the KV tokens and requests of the load that it leaves room for."""

    gpus: int
    budget: Budget
    kv_tokens: int
    max_requests: int
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Speed:
    """The load on the recommended GPUs with `batch` requests at once. Seconds; tokens are output tokens."""

    batch: int
    prefill: float
    ttft: float
    ttft_band: Band | None
    tpot: float
    tpot_band: Band

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests together."""
        return self.batch / self.tpot


@dataclass(frozen=True, slots=True)
class Price:
    """USD an hour for one GPU, and who says so."""

    usd_per_hour: float
    source: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, names resolved: a model in a precision on a GPU, under a load."""

    spec: ModelSpec
    hardware: Hardware
    scheme: Scheme
    load: Load
    batching: Batching
    gpu_counts: tuple[int, ...]
    price: Price | None

    @property
    def needed(self) -> int:
        """Requests that must be in memory at once."""
        return min(self.load.concurrency, self.batching.max_num_seqs)


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer. Without a recommendation (nothing fits) there is no speed and no cost."""

    question: Question
    comparisons: list[Comparison]
    fits: tuple[Fit, ...]
    recommended: Fit | None
    smaller: tuple[tuple[Scheme, Fit], ...]
    speed: Speed | None
    caveats: list[str]

    @property
    def usd_per_1k(self) -> float | None:
        """USD per 1,000 output tokens, where there is a price and a speed."""
        price = self.question.price
        if not (price and self.speed and self.recommended):
            return None
        return usd_per_tokens(price.usd_per_hour * self.recommended.gpus, self.speed.tokens_per_s)


def deployment(recipe: Path | None, **flags: Any) -> Recipe:
    """The recipe in a file, or the flags on top of vLLM's default batching; flags win, None is no flag."""
    if recipe is None:
        if flags.get("model") is None:
            raise UsageError("no model given", "add `--model 70b`; all names: `llmopt models`")
        flags["max_num_seqs"] = flags.get("max_num_seqs") or int(VLLM.max_num_seqs)
        flags["max_num_batched_tokens"] = max(int(VLLM.max_num_batched_tokens), flags["max_num_seqs"])
    return Recipe.resolve(recipe, **flags)


def ask(recipe: Recipe, load: Load, tp: int | None = None, gpu_price: float | None = None) -> Question:
    """Resolve the names of a deployment; raises UsageError where it contradicts itself."""
    if recipe.gpu is None:
        raise UsageError("no accelerator given", "add `--gpu a100` or `--gpu h100x4`; all of them: `llmopt gpus`")
    spec = find_model(recipe.model)
    hardware, count = find_gpu(recipe.gpu)
    limit = recipe.batching.max_model_len or spec.max_context
    if limit > spec.max_context:
        raise UsageError(f"--max-model-len {limit:,} is beyond the {spec.max_context:,} tokens of {spec.name}")
    if load.length > limit:
        raise UsageError(
            f"input {load.input_len:,} + output {load.output_len:,} tokens exceed the context of {limit:,}",
            f"for example `--input-len {limit * 3 // 4} --output-len {limit // 4}`",
        )
    return Question(
        spec=spec,
        hardware=hardware,
        scheme=find_scheme(recipe.scheme or recipe.dtype),
        load=load,
        batching=recipe.batching,
        gpu_counts=_gpu_counts(spec, count, tp),
        price=_price(hardware, gpu_price),
    )


def answer(question: Question) -> Plan:
    """Weigh every GPU count, recommend the fewest GPUs that hold the load, and time it there."""
    fits = tuple(_fit(question, gpus) for gpus in question.gpu_counts)
    recommended = _recommend(fits)
    shown = recommended or fits[-1]
    load = question.load
    step = StepModel(question.spec, question.hardware, question.scheme, shown.gpus)
    batch = min(question.needed, shown.max_requests)
    return Plan(
        question=question,
        comparisons=side_by_side(step, shown.budget, question.needed, load.input_len, load.output_len),
        fits=fits,
        recommended=recommended,
        smaller=_smaller(question, recommended),
        speed=_speed(step, load, batch) if recommended else None,
        caveats=_caveats(question, shown, batch),
    )


def _gpu_counts(spec: ModelSpec, count: int | None, tp: int | None) -> tuple[int, ...]:
    """The counts to weigh: `tp` alone, or those up to `count`; only such as the heads can be shared out among."""
    if tp and count and tp > count:
        raise UsageError(f"--tp {tp} needs more than the {count} GPUs given")
    most = count or GPU_COUNTS[-1]
    wanted = [tp] if tp else sorted({gpus for gpus in GPU_COUNTS if gpus < most} | {most})
    possible = tuple(gpus for gpus in wanted if _shares(spec, gpus))
    if not possible:
        heads = f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads"
        raise UsageError(
            f"{heads} of {spec.name} cannot be shared out among {tp} GPUs", "leave --tp out to see which can"
        )
    return possible


def _shares(spec: ModelSpec, gpus: int) -> bool:
    """Each GPU gets as many heads, and as many KV heads or a copy of one."""
    return spec.num_heads % gpus == 0 and (spec.num_kv_heads % gpus == 0 or gpus % spec.num_kv_heads == 0)


def _price(hardware: Hardware, given: float | None) -> Price | None:
    if given is not None:
        if not math.isfinite(given):
            raise UsageError(f"--gpu-price {given} is no price", "give USD an hour for one GPU, such as 2.5")
        return Price(given, "--gpu-price")
    if hardware.price_usd_hour is None:
        return None
    spread = f", range {hardware.price_range}" if hardware.price_range else ""
    return Price(hardware.price_usd_hour, f"{hardware.price_source}{spread}")


def _fit(question: Question, gpus: int) -> Fit:
    spec, batching, length = question.spec, question.batching, question.load.length
    memory = budget(
        spec,
        question.hardware,
        question.scheme,
        gpus,
        batching.max_num_seqs,
        batching.max_num_batched_tokens,
        batching.kv_cache_memory_bytes,
    )
    sequence = kv_sequence_bytes(spec, length, tp=gpus)
    requests, tokens = max(0, int(memory.free / sequence)), max(0, int(memory.free / sequence * length))
    verdict, reason = _verdict(question, memory, requests, tokens)
    return Fit(gpus, memory, tokens, requests, verdict, reason)


def _verdict(question: Question, memory: Budget, requests: int, tokens: int) -> tuple[Verdict, str]:
    if memory.weights > memory.usable:
        return (
            Verdict.NO,
            f"does not fit: {memory.weights / GIB:,.1f} GiB of weights, {memory.usable / GIB:,.1f} GiB to use",
        )
    if requests < 1:
        return Verdict.NO, f"does not fit: room for {tokens:,} KV tokens, one request needs {question.load.length:,}"
    if requests < question.needed:
        return Verdict.TIGHT, f"fits, but only {tokens:,} KV tokens: {requests} of {question.needed} requests"
    limit = question.batching.max_model_len
    if limit and tokens < limit:
        return Verdict.TIGHT, f"fits, but only {tokens:,} KV tokens: --max-model-len {limit:,} does not"
    return Verdict.FITS, f"fits, {tokens:,} KV tokens"


def _recommend(fits: tuple[Fit, ...]) -> Fit | None:
    """The fewest GPUs that hold the load, else the most that hold a part of it."""
    whole = [fit for fit in fits if fit.verdict is Verdict.FITS]
    part = [fit for fit in fits if fit.verdict is Verdict.TIGHT]
    return whole[0] if whole else part[-1] if part else None


def _smaller(question: Question, recommended: Fit | None) -> tuple[tuple[Scheme, Fit], ...]:
    """The smaller precisions in which fewer GPUs hold the load."""
    found = []
    for scheme in map(find_scheme, SMALLER):
        if scheme.weight_bits >= question.scheme.weight_bits:
            continue
        fits = (_fit(replace(question, scheme=scheme), gpus) for gpus in question.gpu_counts)
        best = next((fit for fit in fits if fit.verdict is Verdict.FITS), None)
        if best and (recommended is None or recommended.verdict is not Verdict.FITS or best.gpus < recommended.gpus):
            found.append((scheme, best))
    return tuple(found)


def _speed(step: StepModel, load: Load, batch: int) -> Speed:
    return Speed(
        batch=batch,
        prefill=step.prefill(load.input_len),
        ttft=step.ttft(batch, load.input_len),
        ttft_band=ttft_band(step.spec),
        tpot=step.tpot(batch, load.input_len, load.output_len),
        tpot_band=tpot_band(step.spec),
    )


def _caveats(question: Question, fit: Fit, batch: int) -> list[str]:
    """What the figures leave out, for this question."""
    spec, hardware, scheme = question.spec, question.hardware, question.scheme
    known = (
        (
            hardware.over_pcie and fit.gpus > 1,
            "tensor parallelism over PCIe is slower than the closed form has it: on L40S, large all-reduces were "
            "measured at 18.6, 2.5 and 1.1 GB/s on 2, 4 and 8 GPUs; one replica per GPU pays more",
        ),
        (fit.gpus >= 8, "on 8 GPUs the closed form was 16 % too fast for vLLM"),
        (
            0 < batch < question.load.concurrency,
            f"speed and cost are those of the {batch:,} requests that run at once; the others wait for a place, and "
            "TTFT leaves that wait out",
        ),
        (
            batch > 0 and spec.experts is not None,
            "the closed form's TTFT is unproven for experts: on 51 published runs under SGLang and TensorRT-LLM it was "
            "60 % too short",
        ),
        (
            not scheme.weight_only and hardware.fp8_tflops is None,
            f"{hardware.name} has no FP8 tensor cores: weights are stored in FP8, products are 16-bit",
        ),
        (
            scheme.quantized and scheme.weight_only,
            "weight-only precisions were checked for single requests; the cost of unpacking in large batches is not "
            "counted (int4 AWQ on H200: 0.75-0.83x of bf16)",
        ),
        (scheme.weight_bits > 16, "products of 32-bit weights are timed at the 16-bit rate"),
        (
            hardware.name not in CHECKED,
            f"the error bands are those of H100, H200, B200 and GB200, not of {hardware.name}",
        ),
    )
    return [f"{spec.name}: {reason}" for reason in spec.unmodelled] + [text for applies, text in known if applies]
