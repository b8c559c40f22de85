"""Does it fit, on how many GPUs, how fast, for how much: the verdicts on figures of memory, latency and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.constants import find_engine
from llmopt_cli.estimate.cost import usd_per_tokens
from llmopt_cli.estimate.deployment import Deployment, Draft
from llmopt_cli.estimate.latency import Band, StepModel, tpot_band, ttft_band
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import Budget, budget, sequence_bytes
from llmopt_cli.estimate.rules import Comparison, side_by_side
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.hardware import GIB, Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Recipe, Speculation
from llmopt_cli.spec.scheme import Scheme, find_kv_dtype, find_scheme

GPU_COUNTS = (1, 2, 4, 8)  # one server; tensor parallelism does not leave it
CHECKED = frozenset(("H100-SXM5-80GB", "H200-SXM-141GB", "B200-SXM-180GB", "GB200-NVL72"))
SMALLER = ("int8", "awq")  # the precisions to offer where fewer GPUs would do


class Verdict(StrEnum):
    """Whether a number of GPUs holds the model and the load."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "does not fit"


@dataclass(frozen=True, slots=True)
class Fit:
    """A deployment, one GPU's memory, and the KV tokens and requests of the load that it leaves room for."""

    on: Deployment
    budget: Budget
    kv_tokens: int
    max_requests: int
    verdict: Verdict
    reason: str

    @property
    def gpus(self) -> int:
        """GPUs of the deployment."""
        return self.on.gpus


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
    """What is asked, names resolved: a deployment, of which the number of GPUs is open, under a load."""

    base: Deployment
    load: Load
    gpu_counts: tuple[int, ...]
    price: Price | None

    @property
    def needed(self) -> int:
        """Requests that must be in memory at once."""
        return min(self.load.concurrency, self.base.batching.max_num_seqs)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request that the engine is to accept."""
        return self.base.batching.max_model_len or self.base.spec.max_context


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


def ask(recipe: Recipe, load: Load, gpu_price: float | None = None) -> Question:
    """Resolve the names of a deployment; raises UsageError where it contradicts itself."""
    if recipe.gpu is None:
        raise UsageError("no accelerator given", "add `--gpu a100` or `--gpu h100x4`; all of them: `llmopt gpus`")
    hardware, count = find_gpu(recipe.gpu)
    base = Deployment(
        spec=find_model(recipe.model),
        hardware=hardware,
        scheme=find_scheme(recipe.scheme or recipe.dtype),
        pp=recipe.pipeline_parallel_size,
        engine=find_engine(recipe.engine),
        kv=find_kv_dtype(recipe.kv_cache_dtype),
        batching=recipe.batching,
        draft=_draft(recipe.speculation),
    )
    counts = _gpu_counts(base.spec, count, recipe.tensor_parallel_size)
    question = Question(base, load, counts, _price(hardware, gpu_price))
    _check_lengths(question)
    return question


def _draft(speculation: Speculation | None) -> Draft | None:
    if speculation is None:
        return None
    return Draft(find_model(speculation.model), speculation.num_speculative_tokens, speculation.acceptance)


def _check_lengths(question: Question) -> None:
    spec, limit, load = question.base.spec, question.max_model_len, question.load
    if limit > spec.max_context:
        raise UsageError(f"--max-model-len {limit:,} is beyond the {spec.max_context:,} tokens of {spec.name}")
    if load.longest > limit:
        longest = max(load.sizes, key=sum)
        raise UsageError(
            f"input {longest.input_len:,} + output {longest.output_len:,} tokens exceed the context of {limit:,}",
            f"for example `--input-len {limit * 3 // 4} --output-len {limit // 4}`",
        )


def answer(question: Question) -> Plan:
    """Weigh every GPU count, recommend the fewest GPUs that hold the load, and time it there."""
    fits = tuple(_fit(question, gpus) for gpus in question.gpu_counts)
    recommended = _recommend(fits)
    shown = recommended or fits[-1]
    step = StepModel(shown.on)
    running = question.load.at(min(question.needed, shown.max_requests))
    return Plan(
        question=question,
        comparisons=side_by_side(step, shown.budget, question.load.at(question.needed)),
        fits=fits,
        recommended=recommended,
        smaller=_smaller(question, recommended),
        speed=_speed(step, running) if recommended else None,
        caveats=_caveats(question, shown, running.concurrency),
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


def _fit(question: Question, tp: int) -> Fit:
    on, length = question.base.split(tp, question.base.pp), question.load.longest
    memory, sequence = budget(on), sequence_bytes(on, length)
    requests, tokens = max(0, int(memory.free / sequence)), max(0, int(memory.free / sequence * length))
    verdict, reason = _verdict(question, memory, requests, tokens)
    return Fit(on, memory, tokens, requests, verdict, reason)


def _verdict(question: Question, memory: Budget, requests: int, tokens: int) -> tuple[Verdict, str]:
    if memory.weights > memory.usable:
        return (
            Verdict.NO,
            f"does not fit: {memory.weights / GIB:,.1f} GiB of weights, {memory.usable / GIB:,.1f} GiB to use",
        )
    if requests < 1:
        return Verdict.NO, f"does not fit: room for {tokens:,} KV tokens, one request needs {question.load.longest:,}"
    if requests < question.needed:
        return Verdict.TIGHT, f"fits, but only {tokens:,} KV tokens: {requests} of {question.needed} requests"
    limit = question.base.batching.max_model_len
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
        if scheme.weight_bits >= question.base.scheme.weight_bits:
            continue
        other = replace(question, base=replace(question.base, scheme=scheme))
        fits = (_fit(other, gpus) for gpus in question.gpu_counts)
        best = next((fit for fit in fits if fit.verdict is Verdict.FITS), None)
        if best and (recommended is None or recommended.verdict is not Verdict.FITS or best.gpus < recommended.gpus):
            found.append((scheme, best))
    return tuple(found)


def _speed(step: StepModel, load: Load) -> Speed:
    return Speed(
        batch=load.concurrency,
        prefill=step.mean_prefill(load),
        ttft=step.ttft(load),
        ttft_band=ttft_band(step.spec),
        tpot=step.tpot(load),
        tpot_band=tpot_band(step.spec),
    )


def _caveats(question: Question, fit: Fit, batch: int) -> list[str]:
    """What the figures leave out, for this question."""
    spec, hardware, scheme = question.base.spec, question.base.hardware, question.base.scheme
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
