"""How far the closed forms were off on published measurements, by slice; and whether a deployment lies in one.

`assets/catalog/bands.csv` is written by `fit` from cross-validated residuals: no row was predicted by constants fitted
to its own model. Knows no formula.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.spec.checkpoint import ASSETS
from llmopt_cli.spec.model import ModelSpec

if TYPE_CHECKING:
    from llmopt_cli.estimate.validate import Outcome

TABLE = ASSETS / "catalog" / "bands.csv"
COLUMNS = ("figure", "kind", "engine", "rows", "median_error", "low", "high", "archs", "precisions", "gpus")
COVERED = 0.8  # of the rows of a slice are said to lie in its band
TAKEN = 0.88  # of its residuals are made to: the next rows are new
FEWEST = 10  # rows that make a slice of its own
OUTSIDE = 2.0  # beyond what was validated, a band is as much wider in logarithms


@dataclass(frozen=True, slots=True)
class Band:
    """Measured / predicted lay between `low` and `high` for 80 % of `rows` published runs, which `basis` names.

    `median_error` is the median of |predicted / measured - 1|. `outside` says what sets a deployment apart from those
    runs, in which case the band is wider than measured.
    """

    median_error: float
    low: float
    high: float
    rows: int
    basis: str
    outside: str = ""


@dataclass(frozen=True, slots=True)
class Slice:
    """A row of the table: a band, and what was among its runs."""

    band: Band
    archs: frozenset[str]
    precisions: frozenset[str]
    gpus: int


def kind(spec: ModelSpec) -> str:
    """`moe` where there are experts or latent attention, whose formulas are others, else `dense`."""
    return "moe" if spec.experts or spec.latent else "dense"


def precision(on: Deployment) -> str:
    """What of a scheme decides its speed: the bits of a weight and the dtype of the products."""
    return f"w{on.scheme.weight_bits}-{on.scheme.compute}"


def tpot_band(on: Deployment) -> Band | None:
    """The band of time per output token."""
    return find("tpot_ms", on)


def ttft_band(on: Deployment) -> Band | None:
    """The band of time to first token, in a closed loop."""
    return find("ttft_ms", on)


def throughput_band(on: Deployment) -> Band | None:
    """The band of output tokens a second when requests never run out."""
    return find("offline_tok_s", on)


def find(figure: str, on: Deployment) -> Band | None:
    """The band of a figure: of the engine's own runs, else of all engines' together; None where nobody measured it."""
    own, any_engine = ((figure, kind(on.spec), engine) for engine in (on.engine.name, ""))
    found = slices().get(own) or slices().get(any_engine)
    if found is None:
        return None
    outside = ", ".join(_outside(found, on, own in slices()))
    if not outside:
        return found.band
    band = found.band
    return replace(band, low=band.low**OUTSIDE, high=band.high**OUTSIDE, outside=outside)


def _outside(found: Slice, on: Deployment, engine_measured: bool) -> Iterable[str]:
    if not engine_measured:
        yield f"none under {on.engine.name}"
    if on.hardware.arch not in found.archs:
        yield f"none on {on.hardware.arch}"
    if precision(on) not in found.precisions:
        yield f"none with {on.scheme.name} weights"
    if on.gpus > found.gpus:
        yield f"none on more than {found.gpus} GPUs"


@cache
def slices() -> dict[tuple[str, str, str], Slice]:
    """The table, by (figure, kind, engine); the engine is empty for all of them together."""
    with TABLE.open(encoding="utf-8", newline="") as text:
        return {(row["figure"], row["kind"], row["engine"]): _slice(row) for row in csv.DictReader(text)}


def _slice(row: dict[str, str]) -> Slice:
    runs = f"{row['rows']} published runs" + (f" under {row['engine']}" if row["engine"] else "")
    models = "with experts or latent attention" if row["kind"] == "moe" else "of dense models"
    low, high, median = (float(row[name]) for name in ("low", "high", "median_error"))
    band = Band(median, low, high, int(row["rows"]), f"{COVERED:.0%} of {runs} {models}")
    return Slice(band, frozenset(row["archs"].split(";")), frozenset(row["precisions"].split(";")), int(row["gpus"]))


def write(residuals: Sequence[Outcome]) -> None:
    """Replace the table by the slices of these cross-validated outcomes."""
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in residuals:
        case = outcome.case
        for engine in (case.on.engine.name, ""):
            groups[case.figure, case.kind, engine].append(outcome)
    with TABLE.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*key, *_row(group)) for key, group in sorted(groups.items()) if len(group) >= FEWEST)


def _row(group: list[Outcome]) -> tuple[object, ...]:
    logs = sorted(-math.log(outcome.ratio) for outcome in group)
    cut = (1 - TAKEN) / 2
    low, high = (math.exp(_quantile(logs, share)) for share in (cut, 1 - cut))
    on = [outcome.case.on for outcome in group]
    median = statistics.median(outcome.error for outcome in group)
    archs, precisions = (";".join(sorted(set(names))) for names in zip(*_region(on), strict=True))
    gpus = max(deployment.gpus for deployment in on)
    low, high = min(low, 1 / (1 + median)), max(high, 1 + median)  # however one-sided a few rows happened to be
    return len(group), f"{median:.3f}", f"{low:.3f}", f"{high:.3f}", archs, precisions, gpus


def _region(on: list[Deployment]) -> list[tuple[str, str]]:
    return [(deployment.hardware.arch, precision(deployment)) for deployment in on]


def _quantile(ordered: list[float], share: float) -> float:
    """Linear between the neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
