"""Bench results as people read them on a terminal. Knows the names in `metrics`, measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmopt_cli.bench.gap import gaps, where
from llmopt_cli.output import lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.spec.result import Result

LATENCIES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2E": "e2el_ms"}
PREDICTED = ("predicted mean", "off by")
PARTS = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99"}
COLUMNS: dict[str, tuple[str, str]] = {  # heading -> (metric, format), one row per load
    "requests/s": ("request_throughput", ",.2f"),
    "output tok/s": ("output_throughput", ",.1f"),
    "all tok/s": ("total_token_throughput", ",.1f"),
    "TTFT p50 ms": ("median_ttft_ms", ",.1f"),
    "TTFT p99 ms": ("p99_ttft_ms", ",.1f"),
    "TPOT p50 ms": ("median_tpot_ms", ",.2f"),
    "ITL p99 ms": ("p99_itl_ms", ",.2f"),
    "goodput/s": ("request_goodput", ",.2f"),
}
FORMULA = {
    "as_asked": "formula, as asked for",
    "as_drafted": "formula, drafts of the run",
    "as_accepted": "formula, drafts and acceptance of the run",
}
DRAFTS: dict[str, tuple[str, str]] = {  # heading -> (figure, format)
    "steps with a draft": ("share", ".0%"),
    "tokens of it": ("length", ".2f"),
    "acceptance": ("acceptance", ".0%"),
    "tokens a step": ("tokens_per_step", ".2f"),
    "speed-up": ("speedup", ".2f"),
}


def show(results: Sequence[Result]) -> list[RenderableType]:
    """Each result in full; several loads also side by side."""
    parts: list[RenderableType] = []
    for result in results:
        parts += [_headline(result), _latencies(result), *_drafts(result), _remarks(result)]
    if len(results) > 1:
        rows = [
            [result.metrics["load"], *(_cell(result.metrics, *spec) for spec in COLUMNS.values())] for result in results
        ]
        parts.append(table("side by side", ["load", *COLUMNS], rows))
    return parts


def _headline(result: Result) -> str:
    metrics = result.metrics
    where = f"{result.workload['name']} on {result.target} ({result.recipe['model']}), {metrics['load']}"
    done = f"{metrics['completed']} requests in {metrics['duration']:.1f} s"
    return f"{where}: {done}{' before it was interrupted' if result.partial else ''}"


def _latencies(result: Result) -> RenderableType:
    """Percentiles, and beside them the mean that was predicted, as far as one was."""
    foretold = PREDICTED if "mean_ttft_ms" in result.predicted else ()
    rows = [
        [name, *(_cell(result.metrics, f"{part}_{metric}", ",.2f") for part in PARTS.values())]
        + [cell for cell in _foretold(result, f"mean_{metric}") if foretold]
        for name, metric in LATENCIES.items()
    ]
    return table("", ["ms", *PARTS, *foretold], rows)


def _foretold(result: Result, figure: str) -> tuple[str, str]:
    value, off = result.predicted.get(figure), result.off(figure)
    return "-" if value is None else f"{value:,.2f}", "-" if off is None else f"{off:+.0%}"


def _drafts(result: Result) -> Iterator[RenderableType]:
    """What speculation did, and what the closed form makes of it."""
    found = result.metrics.get("speculation")
    if found:
        shown = {"measured": found["measured"]} | {FORMULA[name]: row for name, row in found["formula"].items()}
        rows = [
            [name, *(_cell(row, *spec) for spec in DRAFTS.values()), _cell(row.get("off", {}), "speedup", "+.0%")]
            for name, row in shown.items()
        ]
        yield table("", ["speculation", *DRAFTS, "off by"], rows)


def _remarks(result: Result) -> str:
    metrics, workload = result.metrics, result.workload
    pairs = [
        ("workload", f"{workload['description'] or workload['name']}; {_tokens(metrics)}"),
        ("throughput", _throughput(metrics)),
        ("goodput", f"{metrics['request_goodput']:.2f} requests/s keep {_limits(workload['slo'])} ({_share(metrics)})"),
    ]
    if "output_throughput" in result.predicted:
        pairs.append(("predicted", _predicted(result)))
    if reasons := where(result):
        pairs.append(("the gap", f"{' and '.join(gaps(result))} are far off: {'; '.join(reasons)}"))
    if against := metrics.get("against"):
        pairs.append(("against", _against(against)))
    return lines([*pairs, ("run quality", _quality(metrics))]) + "\n"


def _predicted(result: Result) -> str:
    value, off = _foretold(result, "output_throughput")
    return f"{value} output tokens/s ({off}), {result.predicted['basis']}"


def _throughput(metrics: Mapping[str, Any]) -> str:
    return (
        f"{metrics['request_throughput']:,.2f} requests/s, {metrics['output_throughput']:,.1f} output tokens/s, "
        f"{metrics['total_token_throughput']:,.1f} tokens/s with the prompts"
    )


def _tokens(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"{metrics[f'total_{side}_tokens']:,} of {metrics[f'requested_{side}_tokens']:,} tokens {way}"
        for side, way in (("input", "in"), ("output", "out"))
    ]
    clipped = metrics["clipped_requests"]
    return ", ".join(parts) + (f"; {clipped} requests clipped to the context" if clipped else "")


def _limits(slo: Mapping[str, float | None]) -> str:
    names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT"}
    kept = [f"{names[key]} <= {limit:g} ms" for key, limit in slo.items() if limit is not None]
    return " and ".join(kept) or "the SLO (there is none)"


def _share(metrics: Mapping[str, Any]) -> str:
    share = metrics["slo_attainment"]
    return "nothing was sent" if share is None else f"{100 * share:.0f} % of all"


def _against(against: Mapping[str, Any]) -> str:
    return (
        f"{against['ratio']:.2f} times the output tokens/s of {against['target']} ({against['ratio_min']:.2f} to "
        f"{against['ratio_max']:.2f} in {against['pairs']} pairs), which made {against['output_throughput']:,.1f}/s, "
        f"{against['load']}, TPOT p50 {_cell(against, 'median_tpot_ms', '.2f')} ms"
    )


def _quality(metrics: Mapping[str, Any]) -> str:
    sent = metrics["completed"] + metrics["failed"]
    cached = metrics["cached_input_share"]
    parts = [
        f"{metrics['failed']} of {sent} failed",
        f"sent {_cell(metrics, 'p99_send_lag_ms', '.1f')} ms late (p99)",
        f"at most {metrics['max_concurrent_requests']} at once",
        f"{_cell(metrics, 'tokens_per_chunk', '.2f')} tokens a chunk",
        f"{100 * (cached or 0):.0f} % of the prompts from a cache",
    ]
    if metrics["itl_is_interpolated"]:
        parts.append("ITL interpolated: the target does not say how many tokens a chunk holds")
    return ", ".join(parts)


def _cell(metrics: Mapping[str, Any], name: str, form: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else format(value, form)
