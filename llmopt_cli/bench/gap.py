"""Where a gap between a prediction and its measurement can be looked for: only what the result itself shows.

Knows the names in `metrics` and `predicted`; measures and predicts nothing.
"""

from __future__ import annotations

from llmopt_cli.spec.result import Result

WIDE = 0.3  # predicted / measured - 1 from which a gap is worth a word
FIGURES = {"mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT"}
BOUNDS = {
    "overhead": "the fixed time of a step and its kernels",
    "memory": "reading weights and cache",
    "compute": "arithmetic",
}


def gaps(result: Result) -> dict[str, float]:
    """The figures that are far off, by name: predicted / measured - 1."""
    found = {name: result.off(figure) for figure, name in FIGURES.items()}
    return {name: off for name, off in found.items() if off is not None and abs(off) > WIDE}


def where(result: Result) -> list[str]:
    """What can honestly be said about the gaps of a run; nothing if there are none."""
    wide, environment, metrics = gaps(result), result.environment, result.metrics
    if not wide:
        return []
    slower = min(wide.values()) < 0
    busy = environment.load_average + environment.threads
    known = (
        (slower and busy > environment.cores + 0.8, f"the machine was busy (load average {environment.load_average})"),
        (set(wide) == {"TTFT"}, "TPOT is as predicted, so it is prefill, dispatch or queueing"),
        ("TPOT" in wide, f"most of the predicted TPOT is {BOUNDS.get(result.predicted['bound'], 'unknown')}"),
        *_drafted(result),
        (not _full(result), "the load was never full: too few requests for its concurrency"),
        ((metrics.get("p99_send_lag_ms") or 0) > metrics["mean_tpot_ms"], "the client sent late"),
        (
            not result.predicted["basis"].startswith("calibrated"),
            "the constants are not of this machine: `llmopt estimate --calibrate` fits them to results",
        ),
    )
    return [text for applies, text in known if applies]


def _drafted(result: Result) -> list[tuple[bool, str]]:
    """Whether drafts brought as much as was assumed."""
    found = result.metrics.get("speculation", {})
    off = found.get("formula", {}).get("as_asked", {}).get("off", {}).get("tokens_per_step")
    if off is None:
        return []
    brought, assumed = found["measured"]["tokens_per_step"], found["formula"]["as_asked"]["tokens_per_step"]
    return [(abs(off) > WIDE, f"drafts made {brought:.2f} tokens a step where {assumed:.2f} were assumed")]


def _full(result: Result) -> bool:
    """Whether a closed loop had its requests at once, and more than one round of them."""
    wanted = result.workload["arrivals"]["concurrency"]
    return wanted is None or result.metrics["completed"] >= 2 * wanted
