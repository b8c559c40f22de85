"""Which change helps most: every fix is planned anew, and those that work are ranked by money, then by risk.

A fix changes one thing of a question. Where the question is not met (it does not fit, or misses the limits of a good
request) the cheapest fixes are advised; where it is, those that make a token cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmopt_cli.estimate.choices import KV_FP8, LOSSLESS, Risk, remark, risk, runs_on, schemes
from llmopt_cli.estimate.offer import Offer, timed
from llmopt_cli.estimate.plan import Fit, Plan, Verdict, recommend, weigh
from llmopt_cli.estimate.question import Question, price_of
from llmopt_cli.estimate.splits import splits
from llmopt_cli.spec.catalog import gpus
from llmopt_cli.spec.scheme import find_kv_dtype
from llmopt_cli.spec.workload import Slo

MOST = 3
WORTH = 0.97  # what a change must leave of the price of a token to be worth a line
REPLICAS = (2, 4, 8)
BATCHED_TOKENS = (512, 1024)
RISK = 4  # the worst rank that is advised: 3 bits and their 5-10 % are not
Goal = Literal["fit", "slo", "price"]


@dataclass(frozen=True, slots=True)
class Fix:
    """One change: what it is, the flags that make it, its risk, and the question it leads to."""

    kind: str
    name: str
    flags: str
    question: Question
    risk: Risk = LOSSLESS
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class Advised:
    """A fix and what it leads to."""

    fix: Fix
    offer: Offer


@dataclass(frozen=True, slots=True)
class Advice:
    """What the question leads to as it is (`offer` is None where not one request fits), and the best changes."""

    goal: Goal
    fit: Fit
    offer: Offer | None
    options: tuple[Advised, ...]


def advise(plan: Plan, slo: Slo) -> Advice:
    """At most three changes, of different kinds: to meet the question if it is not met, else to pay less a token."""
    question, fit = plan.question, plan.recommended or plan.fits[-1]
    now = timed(question, fit, slo) if plan.recommended else None
    goal = _goal(fit, now)
    tried = (Advised(fix, made) for fix in fixes(question, fit) if (made := apply(fix, slo)))
    helping = sorted((one for one in tried if _helps(goal, one.offer, now)), key=lambda one: _order(goal, one))
    best = {one.fix.kind: one for one in reversed(helping)}
    options = [one for one in helping if best[one.fix.kind] is one][:MOST]
    return Advice(goal, fit, now, tuple(options))


def apply(fix: Fix, slo: Slo) -> Offer | None:
    """Plan the fixed question anew and time what it recommends; None: still not one request fits."""
    recommended = recommend(fix.question)
    return timed(fix.question, recommended, slo, fix.replicas) if recommended else None


def _goal(fit: Fit, now: Offer | None) -> Goal:
    if now is None or fit.verdict is not Verdict.FITS:
        return "fit"
    return "price" if now.meets else "slo"


def _helps(goal: Goal, made: Offer, now: Offer | None) -> bool:
    if goal == "fit":
        return made.good
    assert now
    if goal == "slo":  # to let fewer in would keep the limits by letting the others wait
        return made.good and made.replicas * made.load.concurrency >= now.load.concurrency
    return made.good and _price(made) < WORTH * _price(now)


def _price(one: Offer) -> float:
    """USD of a token, or GPU seconds of one where no price is known."""
    return 1 / one.tokens_per_s_per_gpu if one.usd_per_1m is None else one.usd_per_1m


def _order(goal: Goal, one: Advised) -> tuple[float, ...]:
    made = one.offer
    hourly = math.inf if made.usd_per_hour is None else made.usd_per_hour
    if goal == "price":
        return _price(made), one.fix.risk.rank
    return hourly, made.gpus, one.fix.risk.rank, _price(made)


def fixes(question: Question, fit: Fit) -> Iterator[Fix]:
    """Every change of one thing, where `fit` is what the question leads to as it is."""
    for kind in KINDS:
        yield from kind(question, fit)


def _with(question: Question, **changes: Any) -> Question:
    return replace(question, base=replace(question.base, **changes))


def _batching(question: Question, **changes: Any) -> Question:
    return _with(question, batching=replace(question.base.batching, **changes))


def _fewer_seqs(question: Question, fit: Fit) -> Iterator[Fix]:
    """Fewer places in the batch: less memory for the sampler, and less that must fit at once."""
    now = question.base.batching.max_num_seqs
    powers = {2**power for power in range(now.bit_length()) if 2**power < now}
    for seqs in sorted(powers | _all_held(question, fit), reverse=True):
        name = f"max_num_seqs {now} -> {seqs}"
        yield Fix("seqs", name, f"--max-num-seqs {seqs}", _batching(question, max_num_seqs=seqs))


def _all_held(question: Question, fit: Fit) -> set[int]:
    """The most places that memory can fill: fewer of them leave room for more requests. Empty if all or none can."""
    low, high = 0, question.base.batching.max_num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        held = weigh(_batching(question, max_num_seqs=middle), (fit.on.tp, fit.on.pp)).max_requests >= middle
        low, high = (middle, high) if held else (low, middle)
    return {low} - {0}


def _fewer_tokens(question: Question, fit: Fit) -> Iterator[Fix]:
    """Smaller chunks of prompts: less memory for activations."""
    now = question.base.batching.max_num_batched_tokens
    for tokens in BATCHED_TOKENS:
        if question.base.batching.max_num_seqs <= tokens < now:
            name = f"max_num_batched_tokens {now} -> {tokens}"
            smaller = _batching(question, max_num_batched_tokens=tokens)
            yield Fix("tokens", name, f"--max-num-batched-tokens {tokens}", smaller)


def _kv_fp8(question: Question, fit: Fit) -> Iterator[Fix]:
    if question.base.kv.bits > 8:
        smaller = _with(question, kv=find_kv_dtype("fp8"))
        yield Fix("kv", "KV cache in FP8", "--kv-cache-dtype fp8", smaller, KV_FP8)


def _weights(question: Question, fit: Fit) -> Iterator[Fix]:
    """The precisions that the accelerator computes sensibly, smaller than what there is."""
    base = question.base
    for scheme in schemes(base.engine.name, base.hardware):
        other = scheme.bits_per_weight < base.scheme.bits_per_weight or scheme.compute != base.scheme.compute
        if other and risk(scheme).rank <= RISK:
            said = remark(scheme, base.hardware)
            name = f"weights in {scheme.name}" + (f" ({said})" if said else "")
            yield Fix("weights", name, f"--scheme {scheme.name}", _with(question, scheme=scheme), risk(scheme))


def _shorter(question: Question, fit: Fit) -> Iterator[Fix]:
    """A context that what is left of the memory can hold."""
    limit, longest = question.base.batching.max_model_len, question.load.longest
    if limit and longest <= fit.kv_tokens < limit:
        name = f"max_model_len {limit:,} -> {fit.kv_tokens:,}"
        smaller = _batching(question, max_model_len=fit.kv_tokens)
        yield Fix("context", name, f"--max-model-len {fit.kv_tokens}", smaller)


def _more_gpus(question: Question, fit: Fit) -> Iterator[Fix]:
    """The same accelerator more often: layers split, or in stages where links are slow."""
    gpu = question.base.hardware
    for tp, pp in splits(question.base.spec, gpu):
        if tp * pp > fit.gpus:
            split = f"--tp {tp}" + (f" --pp {pp}" if pp > 1 else "")
            more = replace(question, splits=((tp, pp),))
            yield Fix("gpus", f"{_split_name(tp, pp)} on {tp * pp} x {gpu.name}", split, more)


def _split_name(tp: int, pp: int) -> str:
    return " ".join([f"TP{tp}"] * (tp > 1) + [f"PP{pp}"] * (pp > 1)) or "one GPU"


def _replicas(question: Question, fit: Fit) -> Iterator[Fix]:
    """The whole deployment more often, each with its part of the requests."""
    for count in REPLICAS:
        if count <= question.load.concurrency:
            part = replace(question, load=question.load.at(math.ceil(question.load.concurrency / count)))
            on, each = replace(part, splits=((fit.on.tp, fit.on.pp),)), f"{fit.gpus} GPU" + "s" * (fit.gpus > 1)
            yield Fix("replicas", f"{count} replicas of {each}", f"start {count} engines", on, replicas=count)


def _other_gpu(question: Question, fit: Fit) -> Iterator[Fix]:
    """Every accelerator with more memory or bandwidth that the engine runs on, at its listed price."""
    base = question.base
    for gpu in (entry.item for entry in gpus() if runs_on(base.engine.name, entry.item)):
        larger = gpu.memory_bytes > base.hardware.memory_bytes or gpu.bandwidth > base.hardware.bandwidth
        if gpu.price_usd_hour is None or not larger:
            continue
        price = price_of(gpu, None)
        for tp, pp in splits(base.spec, gpu):
            on = replace(question, base=replace(base, hardware=gpu), splits=((tp, pp),), price=price)
            flags = f'--gpu "{gpu.name}" --tp {tp}' + (f" --pp {pp}" if pp > 1 else "")
            yield Fix("gpu", f"{tp * pp} x {gpu.name}", flags, on)


KINDS: tuple[Callable[[Question, Fit], Iterator[Fix]], ...] = (
    _fewer_seqs,
    _fewer_tokens,
    _kv_fp8,
    _weights,
    _shorter,
    _more_gpus,
    _replicas,
    _other_gpu,
)
