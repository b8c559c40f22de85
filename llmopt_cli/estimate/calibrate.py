"""`estimate --calibrate`: the constants of an engine on a machine, fitted to the runs that `bench` kept.

Least squares on log(predicted / measured) of mean TTFT and mean TPOT over a few factors (`KNOBS`), each of which
scales constants that a handful of runs cannot tell apart. Every load is then predicted by a fit that did not see it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from llmopt_cli.errors import LlmoptError, UsageError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.constants import Constants, find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.host import Calibration, Machine, Spread
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.least_squares import Vector, minimize
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.predict import deployment, load_of
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.result import Result, read_lines
from llmopt_cli.spec.workload import Workload

T = TypeVar("T")
FITTED = ("ttft_ms", "tpot_ms")
FIGURES = (*FITTED, "offline_tok_s")  # named as the bands are; throughput follows from the constants
FEWEST = 6  # different loads, of two figures each
SIZES = 16  # lengths of a run that a fit looks at
FAILED = 0.01  # of the requests, above which a run says nothing


@dataclass(frozen=True, slots=True)
class Knob:
    """One factor on the constants in `names`, and the range in which the first of them may end.

    The search begins at what an engine has everywhere, or at `usual` where that is zero. `spread` is how far off it is
    expected to be, as a logarithm: of two knobs that explain the runs alike, the one with the larger spread is turned.
    """

    what: str
    names: tuple[str, ...]
    least: float
    most: float
    spread: float
    usual: float = 0.0

    def bounds(self, constants: Constants) -> tuple[float, float]:
        """Of a turn."""
        start = self._start(constants, self.names[0])
        return math.log(self.least / start) / self.spread, math.log(self.most / start) / self.spread

    def turned(self, constants: Constants, turn: float) -> dict[str, float]:
        """The constants scaled by e^(`spread` x `turn`)."""
        return {name: self._start(constants, name) * math.exp(self.spread * turn) for name in self.names}

    def _start(self, constants: Constants, name: str) -> float:
        found: float = getattr(constants, name) or self.usual
        return found


KNOBS = (
    Knob("between two steps", ("step_s",), 1e-5, 1.0, spread=2.0, usual=1e-3),
    Knob("a kernel", ("gemm_s", "attention_s", "norm_s"), 1e-7, 1e-2, spread=1.0),
    Knob(
        "memory",
        (
            "memory_efficiency",
            "memory_efficiency_int8",
            "memory_efficiency_int4",
            "memory_efficiency_fp4",
            "cache_efficiency",
            "cache_efficiency_fp8",
        ),
        0.01,
        1.5,  # of a copy's bandwidth: reading alone may be faster
        spread=0.5,
    ),
    Knob(
        "arithmetic",
        (
            "compute_efficiency_prefill",
            "compute_efficiency_decode",
            "attention_compute_efficiency",
            "head_compute_efficiency",
        ),
        0.001,
        1.5,  # of one large product's rate
        spread=0.5,
    ),
    Knob("to dispatch", ("dispatch_s",), 1e-5, 10.0, spread=2.0),
    Knob("queueing", ("queue_slope",), 1e-4, 10.0, spread=2.0),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One line of a results file as far as a fit needs it; `what` tells loads apart.

    `measured` is in seconds and output tokens a second, by figure.
    """

    what: tuple[object, ...]
    on: Deployment
    load: Load
    measured: dict[str, float]

    def residuals(self, constants: Constants) -> Vector:
        """log(predicted / measured) of what is fitted: TTFT, TPOT."""
        step = StepModel(replace(self.on, engine=constants))
        predicted = step.ttft(self.load), step.tpot(self.load)
        return [math.log(seconds / self.measured[figure]) for figure, seconds in zip(FITTED, predicted, strict=True)]

    def all_residuals(self, constants: Constants) -> Vector:
        """log(predicted / measured) of every figure."""
        step = StepModel(replace(self.on, engine=constants))
        throughput = work(step, self.load).tokens_per_s
        return [*self.residuals(constants), math.log(throughput / self.measured["offline_tok_s"])]


@dataclass(frozen=True, slots=True)
class Change:
    """A constant in use before, and as it is now."""

    what: str
    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runs of one engine on one machine gave. Errors are medians by figure, as fractions.

    `left_out` are those of runs that the fit had not seen. `kept` is false where it predicts these no better than the
    constants in use before, or where there are too few runs, and then `reason` says so.
    """

    machine: str
    engine: str
    runs: int
    loads: int
    changes: list[Change]
    before: dict[str, float]
    after: dict[str, float]
    left_out: dict[str, float]
    kept: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All engines and machines among the results, why other lines were skipped, and where the constants were kept."""

    outcomes: list[Outcome]
    skipped: Counter[str]
    file: Path | None


class Skipped(Exception):  # no error: why a line says nothing about constants
    """A line that is left aside."""


def calibrate(source: Path) -> Report:
    """Fit what is in a results folder or file, and keep what predicts better; raises UsageError if nothing is there."""
    groups, skipped = read_runs(source)
    outcomes, file = [], None
    for (machine, engine), runs in groups:
        outcome, calibration = _fitted(machine, engine, runs)
        outcomes.append(outcome)
        if calibration:
            current = next(one for one in host.machines() if one.name == machine.name)  # it may have just been changed
            file = host.keep(current.with_calibration(calibration))
    return Report(outcomes, skipped, file)


def read_runs(source: Path) -> tuple[list[tuple[tuple[Machine, str], list[Run]]], Counter[str]]:
    """The runs by machine and engine, and how many lines were skipped for which reason."""
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise UsageError(f"there are no results in `{source}`", "make some: `llmopt bench demo --concurrency 1,2,4,8`")
    groups: dict[tuple[str, str], tuple[Machine, list[Run]]] = {}
    skipped = Counter[str]()
    for file in files:
        for _, found in read_lines(file):
            try:
                machine, run = _run(found)
            except (Skipped, LlmoptError) as reason:
                skipped[str(reason)] += 1
                continue
            groups.setdefault((machine.name, run.on.engine.name), (machine, []))[1].append(run)
    return [((machine, engine), runs) for (_, engine), (machine, runs) in groups.items()], skipped


def _run(found: Result | str) -> tuple[Machine, Run]:
    if isinstance(found, str):
        raise Skipped("a line that is no result")
    _check(found)
    recipe, workload = _noun(Recipe, found.recipe), _noun(Workload, found.workload)
    if workload.arrivals.concurrency is None:
        raise Skipped("an open loop: how many requests ran at once is not known")
    machine = _machine(found, recipe)
    on = deployment(recipe, found.environment)
    load = load_of(workload, on)
    few = replace(load, sizes=_spread(load.sizes), cached_share=found.metrics.get("cached_input_share") or 0.0)
    what = (recipe.model, on.scheme.name, on.kv.name, workload.name, load.concurrency)
    return machine, Run(what, on, few, _measured(found))


def _check(found: Result) -> None:
    metrics = found.metrics
    reasons = (
        (found.verb != "bench", "no bench run"),
        (found.target != "engine", "a server: its settings are its own"),
        (found.partial, "an interrupted run"),
        (bool(found.recipe.get("speculation")), "a run with drafts: what they bring is the text's"),
        (metrics.get("failed", 0) > FAILED * metrics.get("completed", 0), "a run with failed requests"),
        (not all(metrics.get(f"mean_{figure}") for figure in FITTED), "a run without TTFT and TPOT"),
    )
    for applies, reason in reasons:
        if applies:
            raise Skipped(reason)


def _noun(kind: type[T], record: Any) -> T:
    """A record as the noun it was."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError:
        raise Skipped(f"a {kind.__name__.lower()} of another version") from None


def _machine(found: Result, recipe: Recipe) -> Machine:
    for machine in host.machines():
        if machine.computes(found.environment, recipe.device):
            return machine
    raise Skipped("a machine that was not measured: run `llmopt env --probe` there first")


def _measured(found: Result) -> dict[str, float]:
    times = {figure: found.metrics[f"mean_{figure}"] / 1e3 for figure in FITTED}
    return times | {"offline_tok_s": found.metrics["output_throughput"]}


def _spread(sizes: Sequence[T]) -> tuple[T, ...]:
    """At most SIZES of them, evenly from the shortest to the longest."""
    ordered, few = sorted(sizes), min(SIZES, len(sizes))  # type: ignore[type-var]
    return tuple(ordered[(2 * index + 1) * len(ordered) // (2 * few)] for index in range(few))


def _fitted(machine: Machine, engine: str, runs: list[Run]) -> tuple[Outcome, Calibration | None]:
    """Fit one engine on one machine; without a calibration where nothing was gained."""
    start = find_engine(engine)
    used = host.tuned(runs[0].on).engine.on(runs[0].on.hardware)
    loads = {run.what for run in runs}
    outcome = Outcome(machine.name, engine, len(runs), len(loads), [], _errors(runs, used), {}, {}, kept=False)
    if len(loads) < FEWEST:
        reason = f"{len(loads)} different loads are too few for {len(KNOBS)} constants: measure {FEWEST} or more"
        return replace(outcome, reason=reason), None
    learned, unseen = fit(start, runs)
    constants = replace(start, **learned)  # type: ignore[arg-type]  # all of them are floats
    left_out = _medians(unseen)
    found = replace(outcome, changes=_changes(used, learned), after=_errors(runs, constants), left_out=left_out)
    if sum(left_out[figure] - outcome.before[figure] for figure in FITTED) >= 0:
        return replace(found, reason="runs it had not seen are predicted no better than before"), None
    return replace(found, kept=True), Calibration(
        engine=engine,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        runs=len(runs),
        models=sorted({run.on.spec.name for run in runs}),
        schemes=sorted({run.on.scheme.name for run in runs}),
        constants=learned,
        errors={figure: _band(unseen, index) for index, figure in enumerate(FIGURES)},
    )


def fit(start: Constants, runs: Sequence[Run]) -> tuple[dict[str, float], list[Vector]]:
    """The constants by name, and for each run the residuals by a fit that had not seen its load."""
    bounds = [knob.bounds(start) for knob in KNOBS]

    def constants(at: Vector) -> Constants:
        return replace(start, **turned(start, at))  # type: ignore[arg-type]

    def residuals(at: Vector) -> Vector:
        now = constants(at)
        return [residual for run in runs for residual in run.residuals(now)]

    found = minimize(residuals, bounds)
    rows: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        rows[run.what] += range(len(FITTED) * index, len(FITTED) * (index + 1))
    blind = {what: constants(found.without(left_out, bounds)) for what, left_out in rows.items()}
    return turned(start, found.at), [run.all_residuals(blind[run.what]) for run in runs]


def turned(start: Constants, at: Vector) -> dict[str, float]:
    """Every constant that a knob moves."""
    turns = (knob.turned(start, turn) for knob, turn in zip(KNOBS, at, strict=True))
    return {name: value for turn in turns for name, value in turn.items()}


def _changes(used: Constants, learned: dict[str, float]) -> list[Change]:
    """One line a knob: its first constant stands for all."""
    return [Change(knob.what, knob.names[0], getattr(used, knob.names[0]), learned[knob.names[0]]) for knob in KNOBS]


def _errors(runs: Iterable[Run], constants: Constants) -> dict[str, float]:
    return _medians([run.all_residuals(constants) for run in runs])


def _medians(residuals: Sequence[Vector]) -> dict[str, float]:
    """Median of |predicted / measured - 1| by figure."""
    columns = zip(FIGURES, zip(*residuals, strict=True), strict=True)
    return {figure: statistics.median(abs(math.expm1(log)) for log in logs) for figure, logs in columns}


def _band(residuals: Sequence[Vector], index: int) -> Spread:
    """Of measured / predicted, the middle 80 %."""
    logs = [-row[index] for row in residuals]
    deciles = statistics.quantiles(logs, n=10, method="inclusive")
    median = statistics.median(abs(math.expm1(-log)) for log in logs)
    return Spread(median, math.exp(min(deciles[0], 0.0)), math.exp(max(deciles[-1], 0.0)))
