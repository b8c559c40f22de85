"""How a bill looks: as JSON and as the cost tables of `llmopt estimate`. Computes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.bill import Bill, Rates
    from llmopt_cli.estimate.cost import Day, TokenCost


def usd(value: float | None) -> str:
    """An amount as people write it: cents, or three digits of less than a dollar; a dash where there is none."""
    return "-" if value is None else f"${value:,.2f}" if value >= 1 or value == 0 else f"${plain(value, 3)}"


def data(bill: Bill) -> dict[str, Any]:
    """The whole bill as JSON; every key names its unit."""
    return {
        "price": dataclasses.asdict(bill.price),
        "spot_price": bill.spot and dataclasses.asdict(bill.spot),
        "given_load": _rates_data(bill.given),
        "best_load": bill.best and _rates_data(bill.best),
        "asked_day": bill.asked and dataclasses.asdict(bill.asked),
        "api_usd_per_1m": bill.api and dataclasses.asdict(bill.api),
        "break_even_day": bill.break_even and dataclasses.asdict(bill.break_even),
        "days": [dataclasses.asdict(day) for day in bill.days],
    }


def _rates_data(rates: Rates) -> dict[str, Any]:
    return {
        "concurrency": rates.load.concurrency,
        "meets_slo": rates.good,
        "prefill_s_per_request": rates.cost.work.prefill,
        "decode_s_per_request": rates.cost.work.decode,
        "output_tokens_per_s": rates.cost.work.tokens_per_s,
        **_cost_data(rates.cost),
        "usd_per_1m_good_output_tokens": rates.cost.all_in() if rates.good else None,
        "spot": rates.spot and _cost_data(rates.spot),
    }


def _cost_data(cost: TokenCost) -> dict[str, float]:
    return {
        "usd_per_hour": cost.usd_per_hour,
        "usd_per_request": cost.per_request,
        "usd_per_1k_input_tokens": cost.input(1000),
        "usd_per_1k_output_tokens": cost.output(1000),
        "usd_per_1m_input_tokens": cost.input(),
        "usd_per_1m_output_tokens": cost.output(),
        "usd_per_1k_output_tokens_prompts_included": cost.all_in(1000),
        "usd_per_1m_output_tokens_prompts_included": cost.all_in(),
    }


def render(bill: Bill) -> list[RenderableType]:
    """Prices of a token, then what a day costs."""
    columns = ("USD at", "1K in", "1K out", "1M in", "1M out", "1K out, all in", "1M out, all in", "1M good out")
    rows = [row for rates in (bill.given, bill.best) if rates for row in _rate_rows(bill, rates)]
    caption = (
        "in and out share the hour by the seconds that prefill and decoding take; all in: the whole hour over the "
        "output tokens = hourly rate x seconds per 1K / 3600; good: where TTFT and TPOT keep to the limits"
    )
    parts: list[RenderableType] = ["", table("What a token costs", columns, _unique(rows), caption)]
    return [*parts, _price_lines(bill), "", _day_table(bill)]


def _unique(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return list({row[0]: row for row in rows}.values())


def _rate_rows(bill: Bill, rates: Rates) -> list[tuple[str, ...]]:
    at = f"{rates.load.concurrency:,} at once" + (", spot" if bill.spot else "")
    rows = [_rate_row(f"{rates.load.concurrency:,} at once", rates.cost, rates.good)]
    return [*rows, _rate_row(at, rates.spot, rates.good)] if rates.spot else rows


def _rate_row(name: str, cost: TokenCost, good: bool) -> tuple[str, ...]:
    amounts = (cost.input(1000), cost.output(1000), cost.input(), cost.output(), cost.all_in(1000), cost.all_in())
    return name, *map(usd, amounts), usd(cost.all_in() if good else None)


def _price_lines(bill: Bill) -> str:
    gpus = bill.plan.recommended.gpus if bill.plan.recommended else 0
    work = bill.given.cost.work
    pairs = [
        ("price", f"{gpus} x {usd(bill.price.usd_per_hour)}/h: {bill.price.source}"),
        (
            "request",
            f"{work.prefill * 1e3:,.1f} ms of prefill + {work.decode * 1e3:,.1f} ms of decoding at the given load",
        ),
    ]
    if bill.spot:
        pairs.insert(1, ("spot", f"{gpus} x {usd(bill.spot.usd_per_hour)}/h: {bill.spot.source}"))
    if bill.best is None:
        pairs.append(("limits", "no load keeps to them here, not even one request"))
    return lines(pairs)


def _day_table(bill: Bill) -> RenderableType:
    columns = ["tokens a day", "requests", "replicas", "idle", "a day", "1M out, all in"]
    named = [("asked", bill.asked), ("break-even", bill.break_even)]
    days = [(f"{name}: {plain(day.tokens, 3)}", day) for name, day in named if day]
    days += [(f"{day.tokens:,.0f}", day) for day in bill.days]
    rows = [_day_row(name, day) for name, day in days]
    if bill.api:
        columns += ["API", "cheaper"]
        rows = [(*row, usd(day.api_usd), _winner(day)) for row, (_, day) in zip(rows, days, strict=True)]
    load = bill.daily.load.concurrency
    title = f"What a day costs, each replica with up to {load:,} requests at once and paid for 24 hours"
    return table(title, columns, rows, _verdict(bill))


def _day_row(name: str, day: Day) -> tuple[str, ...]:
    requests = plain(day.requests, 3)
    return name, requests, str(day.replicas), f"{day.idle_share:.1%}", usd(day.usd), usd(day.usd_per_1m_output)


def _winner(day: Day) -> str:
    return "own GPUs" if day.api_usd is not None and day.usd < day.api_usd else "API"


def _verdict(bill: Bill) -> str | None:
    if bill.api is None:
        return None
    asked = f"{usd(bill.api.input)} in, {usd(bill.api.output)} out per 1M tokens"
    if bill.break_even is None:
        return f"The API ({asked}) is cheaper at every volume: even GPUs that are never idle cost more."
    return f"Own GPUs win from {plain(bill.break_even.tokens, 3)} tokens a day against an API at {asked}."
