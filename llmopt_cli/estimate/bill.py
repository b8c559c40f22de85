"""What a plan costs: a token at the given load and at the best one, on spot GPUs, by the day, and against an API."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.cost import ApiPrice, Day, TokenCost, break_even, day
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import Plan
from llmopt_cli.estimate.question import Price
from llmopt_cli.estimate.slo import best_load, meets
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.workload import Slo

VOLUMES = tuple(10**power for power in range(5, 10))  # tokens a day in the table, prompts and answers


@dataclass(frozen=True, slots=True)
class Rates:
    """What `load` costs at a rate; `good` says whether its requests keep to the limits."""

    load: Load
    cost: TokenCost
    spot: TokenCost | None
    good: bool


@dataclass(frozen=True, slots=True)
class Bill:
    """Prices of a plan. `best` is the load with the cheapest good token; None where no load keeps to the limits.

    `days` are charged at the best load's prices, else at the given one's. `break_even` is None without an API price,
    and where the API is cheaper even than GPUs that are never idle.
    """

    plan: Plan
    price: Price
    spot: Price | None
    given: Rates
    best: Rates | None
    asked: Day | None
    api: ApiPrice | None
    break_even: Day | None
    days: tuple[Day, ...]

    @property
    def daily(self) -> Rates:
        """The load at which a day is charged."""
        return self.best or self.given


def bill(
    plan: Plan,
    slo: Slo,
    *,
    requests_per_day: float | None = None,
    spot_price: float | None = None,
    api: ApiPrice | None = None,
) -> Bill | None:
    """The bill of a plan's recommendation; None where nothing fits or nobody says what the GPU costs."""
    question, fit = plan.question, plan.recommended
    if fit is None or plan.speed is None or question.price is None:
        return None
    spot = spot_of(question.base.hardware, question.price, spot_price)
    step = StepModel(fit.on)
    most = min(fit.max_requests, question.base.batching.max_num_seqs)
    best_at = best_load(step, question.load, slo, most)
    given = _rates(step, question.load.at(plan.speed.batch), slo, question.price, spot)
    best = _rates(step, best_at, slo, question.price, spot) if best_at else None
    cost = (best or given).cost
    even = break_even(cost, api) if api else None
    per_request = cost.work.input_len + cost.work.output_len
    return Bill(
        plan=plan,
        price=question.price,
        spot=spot,
        given=given,
        best=best,
        asked=day(cost, requests_per_day, api) if requests_per_day else None,
        api=api,
        break_even=day(cost, even, api) if even else None,
        days=tuple(day(cost, tokens / per_request, api) for tokens in VOLUMES),
    )


def _rates(step: StepModel, load: Load, slo: Slo, price: Price, spot: Price | None) -> Rates:
    cost = TokenCost(price.usd_per_hour * step.on.gpus, work(step, load))
    cheaper = replace(cost, usd_per_hour=spot.usd_per_hour * step.on.gpus) if spot else None
    return Rates(load, cost, cheaper, meets(step, load, slo))


def spot_of(hardware: Hardware, price: Price, given: float | None) -> Price | None:
    """USD an hour for one that may be taken away: as given, else the low end of the catalogue's range.

    None where the catalogue has no range, or none that begins below `price`.
    """
    if given is not None:
        if not 0 <= given < math.inf:
            raise UsageError(f"--spot-price {given} is no price", "give USD an hour for one GPU, such as 1.2")
        return Price(given, "--spot-price")
    low = re.match(r"\d+(\.\d+)?(?=-)", hardware.price_range)
    if low is None or float(low[0]) >= price.usd_per_hour:
        return None
    return Price(float(low[0]), f"low end of the range {hardware.price_range}: {hardware.price_source}")
