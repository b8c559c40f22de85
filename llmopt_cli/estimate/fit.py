"""`python -m llmopt_cli.estimate.fit FILE.csv [--write]`: the fitted constants of every engine, and the bands.

What has a `start` in the engine table is chosen by coordinate descent from there, on the published rows of its engine.
Every error is printed in sample and cross-validated: a model's rows on an architecture predicted without them.
`--write` puts the constants into `engines.csv` and the cross-validated residuals into `bands.csv`. Knows no formula.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llmopt_cli.estimate import bands, published
from llmopt_cli.estimate.constants import ENGINES, TABLE, Constants, Override, build_engine
from llmopt_cli.estimate.published import Case
from llmopt_cli.estimate.validate import Outcome, predict
from llmopt_cli.spec.model import ModelSpec

ROUNDS = ((0.5, 2.0), (0.7, 1.4), (0.85, 1.18), (0.93, 1.07))  # factors tried on every constant, round by round
FIRM = 0.0005  # what the objective must gain by a step, so that a constant nobody needs stays where it was
FOLDS = 4
TAIL = 1.0  # |ln(predicted / measured)| counts up to here: an outlier pulls, but no more than another
LIMITS = {"efficiency": (0.01, 0.97), "slope": (0.01, 3.0), "power": (0.3, 1.4), "_s": (2e-7, 1.0)}


def under(engine: Constants, case: Case) -> Case:
    """The case with other constants; what the row itself says of its engine stays."""
    own = case.on.engine
    engine = replace(engine, memory_utilization=own.memory_utilization, host_s=max(own.host_s, engine.host_s))
    return replace(case, on=replace(case.on, engine=engine))


def objective(engine: Constants, cases: Sequence[Case]) -> float:
    """Mean of the figures' mean |ln(predicted / measured)|: a figure with many rows does not drown the others."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for case in cases:
        ratio = predict(under(engine, case)).ratio
        errors[case.kind, case.figure].append(min(abs(math.log(ratio)), TAIL))
    weighted = [(math.sqrt(len(slice_)), statistics.fmean(slice_)) for slice_ in errors.values()]
    return sum(weight * mean for weight, mean in weighted) / sum(weight for weight, _ in weighted)


def fit(name: str, overrides: list[Override], cases: Sequence[Case]) -> list[Override]:
    """The overrides with the fitted ones moved to where the objective is least."""
    found = [one if one.start is None else replace(one, value=one.start) for one in overrides]
    for steps in ROUNDS:
        for index, override in enumerate(found):
            if override.start is not None:
                found = _moved(name, found, index, steps, [case for case in cases if _touches(override, case)])
    return found


def _touches(override: Override, case: Case) -> bool:
    return override.where in ("", case.on.hardware.arch, case.on.hardware.name)


def _moved(
    name: str, overrides: list[Override], index: int, steps: Sequence[float], cases: Sequence[Case]
) -> list[Override]:
    """With one constant multiplied by the best of the steps, or by none."""
    if not cases:
        return overrides
    best, found, override = objective(build_engine(name, overrides), cases) - FIRM, overrides, overrides[index]
    for step in steps:
        value = _within(override.name, override.value * step)
        trial = [*overrides[:index], replace(override, value=value), *overrides[index + 1 :]]
        if (trial_value := objective(build_engine(name, trial), cases)) < best:
            best, found = trial_value, trial
    return found


def _within(name: str, value: float) -> float:
    low, high = next((limits for part, limits in LIMITS.items() if part in name), (0.0, math.inf))
    return float(f"{min(max(value, low), high):.3g}")


def cross_validated(name: str, overrides: list[Override], cases: Sequence[Case]) -> list[Outcome]:
    """Each fold's cases under constants fitted to the others. A model's runs on an architecture are in one fold.

    Models of one shape (DeepSeek-V3 and R1) count as one, as their runs are the same.
    """
    groups: dict[tuple[ModelSpec, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups[replace(case.on.spec, name="", max_context=0, unmodelled=()), case.on.hardware.arch].append(case)
    folds: list[list[Case]] = [[] for _ in range(min(FOLDS, len(groups)))]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(folds, key=len).extend(group)
    outcomes = []
    for own in folds:
        rows = {case.row["id"] for case in own}
        others = [case for case in cases if case.row["id"] not in rows]
        engine = build_engine(name, fit(name, overrides, others))
        outcomes += [predict(under(engine, case)) for case in own]
    return outcomes


def timed(rows: list[dict[str, str]]) -> dict[str, list[Case]]:
    """The cases about time, by engine."""
    found: dict[str, list[Case]] = defaultdict(list)
    for _, case in published.resolved(rows):
        if isinstance(case, Case) and case.kind != "memory":
            found[case.on.engine.name].append(case)
    return found


def main(arguments: Sequence[str], say: Callable[[str], object]) -> None:
    """Fit, report, and write where asked to."""
    parser = argparse.ArgumentParser(prog="python -m llmopt_cli.estimate.fit", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", action="store_true", help="into the assets")
    parser.add_argument("--engine", help="this one alone")
    asked = parser.parse_args(arguments)
    table: list[tuple[str, Override]] = []
    residuals: list[Outcome] = []
    by_engine = timed(published.read(asked.file))
    for name, engine in ENGINES.items():
        overrides, cases = list(engine.overrides), by_engine.get(name, [])
        if cases and asked.engine in (None, name):
            fitted = fit(name, overrides, cases)
            held_out = cross_validated(name, overrides, cases)
            _report(name, [predict(under(build_engine(name, fitted), case)) for case in cases], held_out, say)
            overrides, residuals = fitted, residuals + held_out
        table += [(name, override) for override in overrides]
    for name, override in table:
        if override.start is not None:
            say(f"{name:10} {override.where:30} {override.name:28} {override.value:.3g}\n")
    if asked.write:
        _write(table)
        bands.write(residuals)


def _report(name: str, fitted: list[Outcome], held_out: list[Outcome], say: Callable[[str], object]) -> None:
    slices: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    order = {case.row["id"]: outcome for outcome in held_out for case in [outcome.case]}
    for outcome in fitted:
        slices[outcome.case.kind, outcome.case.figure].append((outcome.error, order[outcome.case.row["id"]].error))
    for (kind, figure), pairs in sorted(slices.items()):
        inside, outside = (100 * statistics.median(errors) for errors in zip(*pairs, strict=True))
        say(f"{name:10} {kind:6} {figure:18} {len(pairs):4} rows: {inside:5.1f} % fitted, {outside:5.1f} % left out\n")


def _write(table: list[tuple[str, Override]]) -> None:
    with TABLE.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("engine", "where", "constant", "value", "start", "source"))
        for name, one in table:
            start = "" if one.start is None else f"{one.start:.6g}"
            writer.writerow((name, one.where, one.name, f"{one.value:.6g}", start, one.source))


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdout.write)
