"""What speculation did during a run, by the target's own counters, beside what the closed form gives for it.

Two readings of a counter make a run's figure. Formula and measurement never agree to the digit: the formula takes every
drafted token to be accepted with one chance, and an adaptive engine drafts most where most is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

from llmopt_cli.estimate.speculation import Decoding, Gain, gain
from llmopt_cli.runtime.stats import Tally
from llmopt_cli.spec.recipe import Speculation

Totals = dict[str, float]  # by the names of `Tally`'s fields; seconds, and counts of tokens, drafts and steps
FIELDS = ("drafts", "tokens", "accepted", "judged", "steps", "emitted", "seconds", "alone")
METRICS = {  # of a server's /metrics; the first three are vLLM's, too
    "spec_decode_num_drafts_total": "drafts",
    "spec_decode_num_draft_tokens_total": "tokens",
    "spec_decode_num_accepted_tokens_total": "accepted",
    "spec_decode_num_judged_tokens_total": "judged",
    "spec_decode_num_steps_total": "steps",
    "spec_decode_num_step_tokens_total": "emitted",
    "spec_decode_step_seconds_total": "seconds",
    "spec_decode_undrafted_step_seconds_total": "alone",
}
PREFIXES = ("llmopt:", "vllm:")  # our server has every metric under both
SAMPLE = re.compile(r"^(\w+:)(\w+)(?:\{.*\})? (\S+)", re.MULTILINE)


@runtime_checkable
class Drafting(Protocol):
    """A target that may speculate."""

    async def drafted(self) -> Totals | None:
        """Its totals since it started; None if nothing is drafted there, or nobody says so."""
        ...


async def read(target: object) -> Totals | None:
    """Those of a target, if it may speculate."""
    return await target.drafted() if isinstance(target, Drafting) else None


def totals(tally: Tally) -> Totals:
    """Those of an engine."""
    return {name: float(getattr(tally, name)) for name in FIELDS}


def read_metrics(text: str) -> Totals | None:
    """Those in Prometheus' text format, all engines of a server together; None without any."""
    for prefix in PREFIXES:
        found: Totals = {}
        for kind, name, value in SAMPLE.findall(text):
            if kind == prefix and name in METRICS:
                found[METRICS[name]] = found.get(METRICS[name], 0.0) + float(value)
        if found:
            return found
    return None


def between(before: Totals | None, after: Totals | None) -> Totals | None:
    """What a run added."""
    if before is None or after is None:
        return None
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def together(runs: Iterable[Totals | None]) -> Totals | None:
    """All runs pooled; None if nothing was told of any."""
    told = [one for one in runs if one is not None]
    return {name: sum(one[name] for one in told) for name in told[0]} if told else None


def figures(ran: Totals, asked: Speculation | None, on: Decoding | None) -> dict[str, Any]:
    """`measured`, and the `formula`'s figures: with the drafts `asked` for, with as many as were drafted in the run
    (their share of all steps and mean length), and with these and the acceptance that was measured.

    `off` is formula / measured - 1 of what both tell. None stands for what was not told, or cannot be.
    """
    measured = _measured(ran)
    length, share = measured["length"], measured["share"]
    formula: dict[str, Gain] = {}
    if asked:
        formula["as_asked"] = on.asked() if on else gain(asked.acceptance, asked.num_speculative_tokens)
    if asked and length is not None and share is not None:
        formula["as_drafted"] = gain(asked.acceptance, length, share, on)
    if measured["acceptance"] is not None and length is not None and share is not None:
        formula["as_accepted"] = gain(measured["acceptance"], length, share, on)
    return {
        "measured": measured,
        "formula": {name: asdict(one) | {"off": _off(asdict(one), measured)} for name, one in formula.items()},
    }


def _measured(ran: Mapping[str, float]) -> dict[str, float | None]:
    """`share` of steps with a draft, mean `length` of a draft, `acceptance` of the tokens that were judged (those
    behind the first that did not stand say nothing), `accepted_share` of all drafted ones, tokens of a step, and the
    speed-up in decoding by the engine's own account: its steps' times without drafts against those it took."""
    return {
        "share": _ratio(ran, "drafts", "steps"),
        "length": _ratio(ran, "tokens", "drafts"),
        "acceptance": _ratio(ran, "accepted", "judged"),
        "accepted_share": _ratio(ran, "accepted", "tokens"),
        "tokens_per_step": _ratio(ran, "emitted", "steps"),
        "speedup": _ratio(ran, "alone", "seconds") or None,  # 0: it took no step without drafts to compare with
    }


def _ratio(ran: Mapping[str, float], above: str, below: str) -> float | None:
    return ran[above] / ran[below] if ran.get(below) else None


def _off(formula: Mapping[str, float | None], measured: Mapping[str, float | None]) -> dict[str, float]:
    pairs = {name: (formula[name], measured[name]) for name in ("tokens_per_step", "speedup")}
    return {name: said / found - 1 for name, (said, found) in pairs.items() if said and found}
