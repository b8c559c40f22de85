"""Does it fit, on how many GPUs, how fast, for how much: the verdicts on figures of memory, latency and cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate import bands, host
from llmopt_cli.estimate.bands import Band
from llmopt_cli.estimate.cost import usd_per_tokens
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import Budget, budget, sequence_bytes
from llmopt_cli.estimate.question import Question
from llmopt_cli.estimate.rules import Comparison, side_by_side
from llmopt_cli.estimate.slo import keep_up
from llmopt_cli.estimate.speculation import Decoding, Gain
from llmopt_cli.estimate.splits import Split
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.scheme import Scheme, find_scheme

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
    """The load on the recommended GPUs with `batch` requests at once. Seconds; tokens are output tokens.

    `speculation` is what drafts make of decoding, and is in all these figures.
    """

    batch: int
    prefill: float
    ttft: float
    ttft_band: Band | None
    tpot: float
    tpot_band: Band | None
    tokens_per_s: float
    throughput_band: Band | None
    speculation: Gain | None


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


def at_rate(question: Question, rate: float) -> Question:
    """The same for `rate` requests a second: with as many at once as the fewest GPUs that keep up have under way.

    Raises CapacityError if none do.
    """
    for split in question.splits:
        fit = weigh(question, split)
        most = min(fit.max_requests, question.base.batching.max_num_seqs)
        busy = keep_up(StepModel(fit.on), question.load, rate, most) if most else None
        if busy:
            return replace(question, load=busy)
    most_gpus = max(tp * pp for tp, pp in question.splits)
    raise CapacityError(
        f"{rate:.3g} requests a second are more than {most_gpus} x {question.base.hardware.name} keep up with",
        "see what does with `--compare`, or ask for less",
    )


def answer(question: Question) -> Plan:
    """Weigh every GPU count, recommend the fewest GPUs that hold the load, and time it there."""
    fits = tuple(weigh(question, split) for split in question.splits)
    recommended = _best(fits)
    shown = recommended or fits[-1]
    step = StepModel(shown.on)
    running = question.load.at(min(question.needed, shown.max_requests))
    return Plan(
        question=question,
        comparisons=side_by_side(step, shown.budget, question.batch),
        fits=fits,
        recommended=recommended,
        smaller=_smaller(question, recommended),
        speed=_speed(step, running) if recommended else None,
        caveats=_caveats(question, shown, running.concurrency),
    )


def weigh(question: Question, split: Split) -> Fit:
    """The memory of the deployment cut in this way, and whether it holds the load."""
    on, length = question.base.split(*split), question.load.length
    memory, sequence = budget(on), sequence_bytes(on, length)
    requests, tokens = max(0, int(memory.free / sequence)), max(0, int(memory.free / sequence * length))
    if tokens < question.load.longest:
        requests = 0  # the longest could never run
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


def recommend(question: Question) -> Fit | None:
    """What `answer` recommends, without timing it."""
    return _best(tuple(weigh(question, split) for split in question.splits))


def _best(fits: tuple[Fit, ...]) -> Fit | None:
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
        fits = (weigh(other, split) for split in question.splits)
        best = next((fit for fit in fits if fit.verdict is Verdict.FITS), None)
        if best and (recommended is None or recommended.verdict is not Verdict.FITS or best.gpus < recommended.gpus):
            found.append((scheme, best))
    return tuple(found)


def _speed(step: StepModel, load: Load) -> Speed:
    return Speed(
        batch=load.concurrency,
        prefill=step.mean_prefill(load),
        ttft=step.ttft(load),
        ttft_band=_band("ttft_ms", step.on),
        tpot=step.tpot(load),
        tpot_band=_band("tpot_ms", step.on),
        tokens_per_s=work(step, load).tokens_per_s,
        throughput_band=_band("offline_tok_s", step.on),
        speculation=Decoding(step, step.running(load), load.context).asked() if step.on.draft else None,
    )


def _band(figure: str, on: Deployment) -> Band | None:
    """By the calibration of this machine, else by published runs."""
    return host.band(figure, on) or bands.find(figure, on)


def chosen(plan: Plan, wanted: Recipe) -> Recipe:
    """The recipe of what is recommended, ready for an engine; raises CapacityError where nothing fits."""
    fit, question = plan.recommended, plan.question
    if fit is None:
        raise CapacityError(
            f"{question.base.spec.name} does not fit, so there is no recipe", "see above for what would help"
        )
    limit = min(question.max_model_len, fit.kv_tokens)
    return replace(
        wanted,
        gpu=f"{question.base.hardware.name}x{fit.gpus}",
        tensor_parallel_size=fit.on.tp,
        pipeline_parallel_size=fit.on.pp,
        batching=replace(wanted.batching, max_model_len=limit),
    )


def title(plan: Plan) -> str:
    """A recipe's first line: what was asked, and what was expected of the answer."""
    load, speed = plan.question.load, plan.speed
    asked = f"{load.concurrency} requests at once, {load.input_len:,.0f} tokens in, {load.output_len:,.0f} out"
    if speed is None:
        return asked
    return f"{asked}: TTFT {speed.ttft * 1e3:,.0f} ms, TPOT {speed.tpot * 1e3:,.1f} ms expected"


def _caveats(question: Question, fit: Fit, batch: int) -> list[str]:
    """What the figures leave out, for this question."""
    spec, hardware, scheme = question.base.spec, question.base.hardware, question.base.scheme
    known = (
        (
            hardware.over_pcie and fit.gpus > 1,
            "over PCIe no more than 2 GPUs share a layer, the others are stages: on L40S, large all-reduces were "
            "measured at 20 GB/s on 2 GPUs, and at 1 to 9 on 4 and 8",
        ),
        (
            0 < batch < question.load.concurrency,
            f"speed and cost are those of the {batch:,} requests that run at once; the others wait for a place, and "
            "TTFT leaves that wait out",
        ),
        (
            not scheme.weight_only and hardware.fp8_tflops is None,
            f"{hardware.name} has no FP8 tensor cores: weights are stored in FP8, products are 16-bit",
        ),
        (scheme.weight_bits > 16, "products of 32-bit weights are timed at the 16-bit rate"),
    )
    return [f"{spec.name}: {reason}" for reason in spec.unmodelled] + [text for applies, text in known if applies]
