"""What a reader of a result should know, in sentences, out of the reports of its linears. Computes nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmopt_cli.quant.blocks import ModuleReport
from llmopt_cli.quant.calibrate import GRAM

SHARED_AT_MOST = 0.01  # of its 13-grams may a text of another author share


def substitutes(notes: Mapping[str, str]) -> list[str]:
    """What is stored in another precision than the method's name says, once for every reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in notes.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{len(names)} weights, such as `{names[0]}`, are in {reason}" for reason, names in reasons.items()]


def summary(reports: Sequence[ModuleReport], method: str) -> str:
    """How many linears got what was wanted."""
    fallen = sum(report.fallback for report in reports)
    return f"{len(reports) - fallen}/{len(reports)} {method.upper()}, {fallen} fallback"


def warnings(reports: Sequence[ModuleReport], shared: float) -> list[str]:
    """What a reader of the result should know about its calibration."""
    poor = [report for report in reports if report.tokens < report.inputs]
    unseen = [report for report in reports if report.error is None]
    found = []
    if poor:
        least = min(poor, key=lambda report: report.tokens / report.inputs)
        found.append(
            f"{len(poor)} linears saw fewer tokens than they have inputs (`{least.name}`: {least.tokens:,} of "
            f"{least.inputs:,}): their statistics are of low rank; give more --samples"
        )
    if unseen:
        found.append(f"{len(unseen)} linears, all of experts that no token chose, saw none at all")
    if shared > SHARED_AT_MOST:
        found.append(f"{shared:.1%} of the evaluation's {GRAM}-grams are in the calibration text, too: figures flatter")
    return found
