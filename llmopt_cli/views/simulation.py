"""How a simulation looks: as JSON and as the tables of `llmopt estimate --simulate`. Computes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.simulate import Simulation, Spread
    from llmopt_cli.spec.workload import Slo

LATENCIES = ("ttft", "tpot", "e2e")


def data(simulation: Simulation) -> dict[str, Any]:
    """All of it but the single requests: seconds, tokens, USD; every key names its unit."""
    spreads: dict[str, Spread | None] = {name: getattr(simulation, name) for name in LATENCIES}
    per_s = simulation.per_s
    return {
        "workload": asdict(simulation.workload),
        "replicas": simulation.replicas,
        "gpus": simulation.replicas * simulation.on.gpus,
        "completed": len(simulation.served),
        "refused": simulation.refused,
        "clipped": simulation.clipped,
        "duration_s": simulation.duration,
        **{f"{name}_s": asdict(spread) if spread else None for name, spread in spreads.items()},
        "requests_per_s": per_s(len(simulation.served)),
        "input_tokens_per_s": per_s(simulation.input_tokens),
        "output_tokens_per_s": per_s(simulation.output_tokens),
        "goodput_requests_per_s": per_s(len(simulation.good)),
        "slo_attainment": simulation.attainment,
        "slo_met": simulation.met,
        "busy_share": simulation.busy_share,
        "cached_input_share": simulation.cached_share,
        "kv_tokens": simulation.kv_tokens,
        "longest_queue_requests": simulation.longest_queue,
        "preemptions": simulation.preemptions,
        "steps": simulation.steps,
        "usd_per_hour": simulation.usd_per_hour,
        "usd_per_1k_good_output_tokens": simulation.usd_per_1k_good,
    }


def render(simulation: Simulation) -> list[RenderableType]:
    """The same for people."""
    return [_heading(simulation), _latency_table(simulation), lines([*_rates(simulation), *_strain(simulation)])]


def _latency_table(simulation: Simulation) -> RenderableType:
    rows = []
    for name in LATENCIES:
        spread: Spread | None = getattr(simulation, name)
        if spread:
            values = (spread.mean, spread.p50, spread.p90, spread.p99)
            rows.append((f"{name.upper()}, ms", *(plain(value * 1e3, 4) for value in values)))
    return table("", ("latency", "mean", "p50", "p90", "p99"), rows)


def _heading(simulation: Simulation) -> str:
    on, workload = simulation.on, simulation.workload
    count = f"{simulation.replicas} replicas of " if simulation.replicas > 1 else ""
    deployment = f"{count}{on.spec.name} in {on.scheme.name} on {on.gpus} x {on.hardware.name}"
    load = f"{len(simulation.served):,} requests of {workload.name}, {workload.arrivals.label}"
    return f"\nSimulated: {deployment}; {load}"


def _rates(simulation: Simulation) -> list[tuple[str, str]]:
    per_s = simulation.per_s
    rates = [
        ("served", f"{plain(per_s(len(simulation.served)), 3)} requests/s in {simulation.duration:,.0f} s"),
        (
            "tokens",
            f"{per_s(simulation.input_tokens):,.0f} in/s, {per_s(simulation.output_tokens):,.0f} out/s; "
            f"{simulation.cached_share:.0%} of the prompts from the prefix cache",
        ),
        ("goodput", f"{plain(per_s(len(simulation.good)), 3)} requests/s within {limits(simulation.workload.slo)}"),
        ("attainment", f"{simulation.attainment:.1%} of all requests{_verdict(simulation)}"),
    ]
    if simulation.usd_per_1k_good is not None:
        price = f"${simulation.usd_per_hour:,.2f}/h for all GPUs"
        rates.append(("cost", f"${plain(simulation.usd_per_1k_good, 3)} per 1K good output tokens, {price}"))
    return rates


def _verdict(simulation: Simulation) -> str:
    if simulation.met is None:
        return ""
    return f", {simulation.workload.slo.share:.0%} wanted: {'met' if simulation.met else 'not met'}"


def _strain(simulation: Simulation) -> list[tuple[str, str]]:
    notes = [
        ("busy", f"{simulation.busy_share:.0%} of the time; {simulation.steps:,} steps"),
        ("queue", f"{simulation.longest_queue:,} requests at most; {simulation.preemptions:,} preemptions"),
    ]
    if simulation.clipped:
        notes.append(("clipped", f"{simulation.clipped:,} requests are longer than the context and lost prompt"))
    if simulation.refused:
        notes.append(("refused", f"{simulation.refused:,} requests need more than {simulation.kv_tokens:,} KV tokens"))
    return notes


def limits(slo: Slo) -> str:
    """`TTFT 500 ms, TPOT 50 ms`."""
    named = (("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("E2E", slo.e2e_ms))
    return ", ".join(f"{name} {limit:g} ms" for name, limit in named if limit is not None) or "no limit"
