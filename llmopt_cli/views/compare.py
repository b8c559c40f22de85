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


CAPTIONS = (
    "by USD for 1M output tokens, prompts included; without a price by tokens/s per GPU; what holds the whole load and",
    "by USD an hour; 1M out: as if the GPUs were never idle; fits: the requests under way at this rate; what",
)


def data(comparison: Comparison, top: int) -> dict[str, Any]:
    """The best `top` as JSON, and how many there were."""
    return {
        "model": comparison.question.base.spec.name,
        "weighed": comparison.weighed,
        "requests_per_s": comparison.rate,
        ("hold_a_request" if comparison.rate is None else "keep_up"): len(comparison.offers),
        "slo": dataclasses.asdict(comparison.slo),
        "ranked": [offer_data(one) for one in comparison.offers[:top]],
        "cheapest": comparison.cheapest and offer_data(comparison.cheapest),
    }


def render(comparison: Comparison, top: int) -> list[RenderableType]:
    """The best `top`, and the cheapest that does."""
    if not comparison.offers:
        wanted = f"{_asked(comparison)} of " if comparison.rate else ""
        return [f"None of {comparison.weighed:,} deployments holds {wanted}{comparison.question.base.spec.name}."]
    columns = ("deployment", "precision", "fits", "TTFT ms", "TPOT ms", "tok/s", "per GPU", "$/h", "1M out", "limits")
    rows = [_row(comparison, one) for one in comparison.offers[:top]]
    load, shown = comparison.question.load, min(top, len(rows))
    title = (
        f"{comparison.question.base.spec.name}, {_asked(comparison)}, "
        f"{load.input_len:,.0f} tokens in, {load.output_len:,.0f} out: the best {shown} of {len(comparison.offers):,} "
        f"that {'keep up' if comparison.rate else 'hold a request'} ({comparison.weighed:,} weighed)"
    )
    caption = f"{CAPTIONS[comparison.rate is not None]} keeps to the limits comes first"
    return [table(title, columns, rows, caption), _cheapest(comparison)]


def _asked(comparison: Comparison) -> str:
    if comparison.rate is None:
        return f"{comparison.question.load.concurrency:,} requests at once"
    return f"{plain(comparison.rate, 3)} requests a second"


def _held(comparison: Comparison, one: Offer) -> str:
    if comparison.rate is not None:
        return f"{one.load.concurrency} at once"
    needed = comparison.question.needed
    return "yes" if one.load.concurrency >= needed else f"{one.load.concurrency} of {needed}"


def _row(comparison: Comparison, one: Offer) -> tuple[str, ...]:
    on = one.on
    return (
        name(one),
        " ".join(filter(None, (on.scheme.name, f"({said})" if (said := remark(on.scheme, on.hardware)) else ""))),
        _held(comparison, one),
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
