"""Every accelerator, precision and split side by side under one load, ranked; and the frontier of speed and throughput.

Deployments that do not hold one request are dropped before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import mean

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.choices import runs_on, schemes
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.offer import Offer, timed
from llmopt_cli.estimate.plan import Fit, weigh
from llmopt_cli.estimate.question import Question, ask, price_of
from llmopt_cli.estimate.slo import keep_up
from llmopt_cli.estimate.splits import Split, splits
from llmopt_cli.spec.catalog import find_gpu, gpus
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.workload import Size, Slo

SLICES, PARTS = 6, 8  # of a distribution of lengths: its means and its mean context stay within 2 %


@dataclass(frozen=True, slots=True)
class Comparison:
    """All offers, the best first. `weighed` counts the deployments looked at, `cheapest` is the least USD an hour.

    With a `rate` of requests a second, offers are those that keep up, each with what it then has under way.
    """

    question: Question
    slo: Slo
    rate: float | None
    weighed: int
    offers: tuple[Offer, ...]
    cheapest: Offer | None


def compare(
    recipe: Recipe, load: Load, slo: Slo, gpu_price: float | None = None, rate: float | None = None
) -> Comparison:
    """Rank what holds the model of `recipe`: on its accelerator in all precisions, or on all of the catalogue.

    A precision or a split that the recipe names stays. Raises UsageError where the recipe contradicts itself, and for
    one price for all of the catalogue.
    """
    if gpu_price is not None and recipe.gpu is None:
        raise UsageError("--gpu-price is that of one GPU, and all of them are compared", "name it: `--gpu h100`")
    named = find_gpu(recipe.gpu)[0] if recipe.gpu else None
    some = recipe if named else replace(recipe, gpu=gpus()[0].names[0])
    question, few = ask(some, load, gpu_price), thinned(load)
    weighed, found = 0, []
    for other, split in _deployments(question, recipe, [named] if named else _known(question), gpu_price):
        weighed += 1
        fit = weigh(other, split)
        if running := _running(fit, few, rate):
            found.append(timed(replace(other, load=running), fit, slo))
    found.sort(key=_order if rate is None else _order_at_rate)
    return Comparison(question, slo, rate, weighed, tuple(found), _cheapest(found))


def _running(fit: Fit, load: Load, rate: float | None) -> Load | None:
    """What a deployment is timed under: all of a closed load, what a rate keeps under way; None if it can't."""
    if not fit.max_requests or rate is None:
        return load if fit.max_requests else None
    most = min(fit.max_requests, fit.on.batching.max_num_seqs)
    mean = Load.fixed(1, round(load.input_len), max(1, round(load.output_len)))  # to time it 50 times is enough
    busy = keep_up(StepModel(fit.on), replace(mean, cached_share=load.cached_share), rate, most)
    return load.at(busy.concurrency) if busy else None


def _known(question: Question) -> list[Hardware]:
    engine = question.base.engine.name
    return [entry.item for entry in gpus() if runs_on(engine, entry.item)]


def _deployments(
    question: Question, recipe: Recipe, hardware: Iterable[Hardware], gpu_price: float | None
) -> Iterator[tuple[Question, Split]]:
    """One question for each accelerator, precision and number of stages, and how it is cut."""
    base = question.base
    for gpu in hardware:
        price = price_of(gpu, gpu_price)
        tps = recipe.tensor_parallel_size
        for scheme in (base.scheme,) if recipe.scheme else schemes(base.engine.name, gpu):
            for tp, pp in ((tps, base.pp),) if tps else splits(base.spec, gpu):
                on = replace(base, hardware=gpu, scheme=scheme)
                yield replace(question, base=on, splits=((tp, pp),), price=price), (tp, pp)


def _order(one: Offer) -> tuple[bool, bool, float, float]:
    """What keeps to the limits and holds the whole load first; then by price of a token, then by its speed."""
    return not one.good, one.usd_per_1m is None, one.usd_per_1m or 0.0, -one.tokens_per_s_per_gpu


def _order_at_rate(one: Offer) -> tuple[bool, bool, float, float]:
    """Whoever keeps up makes the same tokens: what keeps to the limits first, then by price an hour and TPOT."""
    return not one.good, one.usd_per_hour is None, one.usd_per_hour or 0.0, one.tpot


def _cheapest(offers: Iterable[Offer]) -> Offer | None:
    """The least USD an hour that holds the load and keeps to the limits."""
    priced = [(one.usd_per_hour, one) for one in offers if one.good and one.usd_per_hour is not None]
    return min(priced, key=lambda pair: pair[0])[1] if priced else None


def thinned(load: Load) -> Load:
    """A few lengths in place of hundreds: slices by prompt, each in parts by answer, every part its mean."""
    if len(load.sizes) <= SLICES * PARTS:
        return load
    return replace(load, sizes=tuple(size for part in _cut(sorted(load.sizes), SLICES) for size in _means(part)))


def _means(sizes: list[Size]) -> Iterator[Size]:
    """One prompt for all of them: it is the prompts that take time to evaluate."""
    prompt = round(mean(size.input_len for size in sizes))
    for part in _cut(sorted(sizes, key=lambda size: size.output_len), PARTS):
        yield Size(prompt, max(1, round(mean(size.output_len for size in part))))


def _cut(sizes: list[Size], parts: int) -> Iterator[list[Size]]:
    for index in range(parts):
        yield sizes[len(sizes) * index // parts : len(sizes) * (index + 1) // parts]
