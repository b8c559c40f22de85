"""How a comparison looks: as JSON and as a ranked table. Computes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.choices import remark
from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import table
from llmopt_cli.views.advice import offer_data
from llmopt_cli.views.cost import usd

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.compare import Comparison
    from llmopt_cli.estimate.offer import Offer


def data(comparison: Comparison, top: int) -> dict[str, Any]:
    """The best `top` as JSON, and how many there were."""
    return {
        "model": comparison.question.base.spec.name,
        "weighed": comparison.weighed,
        "hold_a_request": len(comparison.offers),
        "slo": dataclasses.asdict(comparison.slo),
        "ranked": [offer_data(one) for one in comparison.offers[:top]],
        "cheapest": comparison.cheapest and offer_data(comparison.cheapest),
    }


def render(comparison: Comparison, top: int) -> list[RenderableType]:
    """The best `top`, and the cheapest that does."""
    if not comparison.offers:
        return [f"None of {comparison.weighed:,} deployments holds {comparison.question.base.spec.name}."]
    columns = ("deployment", "precision", "fits", "TTFT ms", "TPOT ms", "tok/s", "per GPU", "$/h", "1M out", "limits")
    rows = [_row(comparison, one) for one in comparison.offers[:top]]
    load, shown = comparison.question.load, min(top, len(rows))
    title = (
        f"{comparison.question.base.spec.name}, {load.concurrency:,} requests at once, "
        f"{load.input_len:,.0f} tokens in, {load.output_len:,.0f} out: the best {shown} of "
        f"{len(comparison.offers):,} that hold a request ({comparison.weighed:,} weighed)"
    )
    order = "by USD for 1M output tokens, prompts included; without a price by tokens/s per GPU"
    caption = f"{order}; what holds the whole load and keeps to the limits comes first"
    return [table(title, columns, rows, caption), _cheapest(comparison)]


def _row(comparison: Comparison, one: Offer) -> tuple[str, ...]:
    on, needed = one.on, comparison.question.needed
    return (
        name(one),
        " ".join(filter(None, (on.scheme.name, f"({said})" if (said := remark(on.scheme, on.hardware)) else ""))),
        "yes" if one.load.concurrency >= needed else f"{one.load.concurrency} of {needed}",
        plain(one.ttft * 1e3, 3),
        plain(one.tpot * 1e3, 3),
        f"{one.tokens_per_s:,.0f}",
        f"{one.tokens_per_s_per_gpu:,.0f}",
        usd(one.usd_per_hour),
        usd(one.usd_per_1m),
        "kept" if one.meets else "missed",
    )


def name(one: Offer) -> str:
    """`4 x H100-SXM5-80GB tp4`."""
    on = one.on
    return f"{on.gpus} x {on.hardware.name}" + f" tp{on.tp}" * (on.tp > 1) + f" pp{on.pp}" * (on.pp > 1)


def _cheapest(comparison: Comparison) -> str:
    one = comparison.cheapest
    if one is None:
        return "Cheapest: none with a known price holds the load and keeps to the limits."
    return (
        f"Cheapest that holds the load and keeps to the limits: {name(one)} in {one.on.scheme.name}, "
        f"{usd(one.usd_per_hour)} an hour, TTFT {plain(one.ttft * 1e3, 3)} ms, TPOT {plain(one.tpot * 1e3, 3)} ms."
    )
