"""How advice looks: as JSON and as lines, and the table of precisions by batch. Computes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.estimate.precision import AHEAD, BATCHES, POWERS
from llmopt_cli.output import table
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.views.cost import usd

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.advice import Advice, Advised
    from llmopt_cli.estimate.offer import Offer
    from llmopt_cli.estimate.precision import Speedup

TITLES = {
    "fit": "Does not hold the load. The cheapest changes that do",
    "slo": "Misses the limits of a good request. The cheapest changes that keep to them",
    "price": "Holds the load. The changes that make a token cheapest",
}
NOTHING = {
    "fit": "No single change holds the load: try a smaller model, or --compare for every accelerator.",
    "slo": "No single change keeps to the limits: relax them, or see --compare for every accelerator.",
    "price": "No single change makes a token cheaper by 3 % or more.",
}


def data(advice: Advice, speedups: tuple[Speedup, ...]) -> dict[str, Any]:
    """Advice and precisions as JSON; every key names its unit."""
    return {
        "goal": advice.goal,
        "now": {"kv_bytes_per_gpu": advice.fit.budget.free, **(offer_data(advice.offer) if advice.offer else {})},
        "changes": [_change_data(advice, one) for one in advice.options],
        "precisions": [_speedup_data(one) for one in speedups],
    }


def offer_data(one: Offer) -> dict[str, Any]:
    """One deployment's figures."""
    on = one.on
    return {
        "gpu": on.hardware.name,
        "gpus": one.gpus,
        "replicas": one.replicas,
        "tensor_parallel": on.tp,
        "pipeline_parallel": on.pp,
        "scheme": on.scheme.name,
        "kv_cache_dtype": on.kv.name,
        "verdict": one.fit.verdict,
        "kv_tokens": one.fit.kv_tokens,
        "max_requests": one.fit.max_requests,
        "batch": one.load.concurrency,
        "ttft_s": one.ttft,
        "tpot_s": one.tpot,
        "output_tokens_per_s": one.tokens_per_s,
        "output_tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
        "usd_per_hour": one.usd_per_hour,
        "usd_per_1m_output_tokens": one.usd_per_1m,
        "meets_slo": one.meets,
    }


def _change_data(advice: Advice, one: Advised) -> dict[str, Any]:
    fix = one.fix
    return {
        "change": fix.name,
        "flags": fix.flags,
        "quality_risk": fix.risk.text,
        "kv_bytes_per_gpu": one.offer.fit.budget.free,
        "kv_bytes_per_gpu_gained": _gained(advice, one),
        **offer_data(one.offer),
    }


def _gained(advice: Advice, one: Advised) -> float:
    return one.offer.fit.budget.free - advice.fit.budget.free


def _speedup_data(one: Speedup) -> dict[str, Any]:
    return {
        "scheme": one.scheme.name,
        "speed_against_bf16": {str(batch): factor for batch, factor in zip(BATCHES, one.factors, strict=True)},
        "crossing": one.crossing and dataclasses.asdict(one.crossing),
        "quality_risk": one.risk.text,
        "remark": one.remark,
    }


def render(advice: Advice, speedups: tuple[Speedup, ...]) -> list[RenderableType]:
    """What to change, and what each precision does at which batch."""
    return ["", _advice_part(advice), "", speedup_table(speedups)]


def _advice_part(advice: Advice) -> RenderableType:
    if not advice.options:
        return NOTHING[advice.goal]
    columns = (
        "change",
        "flags",
        "KV per GPU",
        "KV tokens",
        "at once",
        "GPUs",
        "$/h",
        "tok/s",
        "1M out",
        "quality lost",
    )
    rows = [
        _row(one.fix.name, one.fix.flags, one.offer, one.fix.risk.text, _gib(advice, one)) for one in advice.options
    ]
    if advice.offer:
        free = f"{advice.fit.budget.free / GIB:,.1f} GiB"
        rows.insert(0, _row("as it is", "", advice.offer, "", free))
    return table(TITLES[advice.goal], columns, rows)


def _gib(advice: Advice, one: Advised) -> str:
    return f"{one.offer.fit.budget.free / GIB:,.1f} GiB ({_gained(advice, one) / GIB:+,.1f})"


def _row(name: str, flags: str, one: Offer, risk: str, gib: str) -> tuple[str, ...]:
    held, hourly = one.replicas * one.load.concurrency, usd(one.usd_per_hour)
    counts = (f"{one.fit.kv_tokens:,}", f"{held:,}", str(one.gpus))
    return name, flags, gib, *counts, hourly, f"{one.tokens_per_s:,.0f}", usd(one.usd_per_1m), risk


def speedup_table(speedups: tuple[Speedup, ...]) -> RenderableType:
    """Each precision against 16 bits."""
    columns = ("precision", *(f"batch {batch}" for batch in BATCHES), "against bf16", "quality lost")
    rows = [
        (one.scheme.name, *(f"{plain(factor, 3)} x" for factor in one.factors), said(one), one.risk.text)
        for one in speedups
    ]
    return table("Tokens a second of each precision against bf16, same GPUs and lengths", columns, rows)


def said(one: Speedup) -> str:
    """The crossing in words."""
    remark = f"; {one.remark}" if one.remark else ""
    if one.crossing is None:
        return f"{'faster' if one.factors[0] > AHEAD else 'never faster'} up to batch {POWERS[-1]:,}{remark}"
    return f"faster {'below' if one.crossing.faster_below else 'from'} batch {one.crossing.batch:,}{remark}"
