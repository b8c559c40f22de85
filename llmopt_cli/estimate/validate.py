"""`estimate --validate`: published measurements replayed, and how far the closed forms were off.

Errors are |predicted / measured - 1|. Knows the rows through `published`, the figures through the estimators.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from llmopt_cli.estimate import bands, published
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.memory import budget, kv_sequence_bytes, weight_bytes
from llmopt_cli.estimate.published import Case
from llmopt_cli.spec.hardware import GB, GIB

Key = TypeVar("Key", bound=Any)  # what groups are sorted by


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row, predicted; `ratio` is predicted / measured."""

    case: Case
    predicted: float

    @property
    def ratio(self) -> float:
        """Above 1: estimated too high."""
        return self.predicted / self.case.value

    @property
    def error(self) -> float:
        """Absolute percentage error as a fraction."""
        return abs(self.ratio - 1)

    @property
    def covered(self) -> bool | None:
        """Whether the measured value lies in the band that goes with the prediction; None where there is none."""
        band = bands.find(self.case.figure, self.case.on)
        return band.low <= 1 / self.ratio <= band.high if band else None


def _decode_tok_s(step: StepModel, case: Case) -> float:
    batch = case.load.concurrency
    return batch / step.decode(batch, case.load.context)


def _prefill_tok_s(step: StepModel, case: Case) -> float:
    tokens, batch = round(case.load.input_len), case.load.concurrency
    seconds = step.prefill(tokens) if batch == 1 else step.step(0, 0, [(tokens, 0)] * batch)
    return batch * tokens / seconds


def _static_tok_s(step: StepModel, case: Case) -> float:
    load = case.load
    batch, outputs = load.concurrency, load.output_len
    prefill = step.step(0, 0, [(round(load.input_len), 0)] * batch)
    return batch * outputs / (prefill + outputs * step.decode(batch, load.context))


def _offline_tok_s(step: StepModel, case: Case) -> float:
    replicas = max(1, case.gpus // step.on.gpus)
    total = step.throughput(case.load, max(1, case.load.concurrency // replicas)) * replicas
    return total / (step.on.gpus * replicas) if case.row["metric"].endswith("per_gpu") else total


def _peak_gb(step: StepModel, case: Case) -> float:
    """Weights and a cache laid out beforehand for every request; what a prompt's logits take is not published."""
    cache = case.load.concurrency * kv_sequence_bytes(step.spec, case.load.longest, step.on.kv_bytes)
    return (weight_bytes(step.spec, step.scheme) + cache) / GB


PREDICT: dict[str, Callable[[StepModel, Case], float]] = {
    "tpot_ms": lambda step, case: step.tpot(case.load) * 1e3,
    "ttft_ms": lambda step, case: step.ttft(case.load) * 1e3,
    "offline_tok_s": _offline_tok_s,
    "decode_tok_s": _decode_tok_s,
    "decode_b1_tok_s": _decode_tok_s,
    "prefill_tok_s": _prefill_tok_s,
    "static_tok_s": _static_tok_s,
    "weights_gib": lambda step, case: budget(step.on).weights / GIB,
    "activations_gib": lambda step, case: budget(step.on).activations / GIB,
    "non_torch_gib": lambda step, case: budget(step.on).non_torch / GIB,
    "kv_gib": lambda step, case: budget(step.on).free / GIB,
    "kv_tokens": lambda step, case: budget(step.on).free / kv_sequence_bytes(step.spec, 1, step.on.kv_bytes, step.tp),
    "peak_gb": _peak_gb,
}


def predict(case: Case) -> Outcome:
    """The row's figure as the estimator has it."""
    return Outcome(case, PREDICT[case.figure](StepModel(case.on), case))


@dataclass(frozen=True, slots=True)
class Summary:
    """The errors of some rows: median of |predicted / measured - 1|, median ratio - 1, and the share inside its band.

    `covered` is None where no row has a band.
    """

    rows: int
    median_error: float
    bias: float
    covered: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Self:
        """Of at least one row."""
        inside = [found for outcome in outcomes if (found := outcome.covered) is not None]
        return cls(
            len(outcomes),
            statistics.median(outcome.error for outcome in outcomes),
            statistics.median(outcome.ratio for outcome in outcomes) - 1,
            sum(inside) / len(inside) if inside else None,
        )


@dataclass(frozen=True, slots=True)
class Validation:
    """All rows of a file: those predicted, and why the others were not."""

    outcomes: tuple[Outcome, ...]
    skipped: Counter[str]

    def by(self, key: Callable[[Outcome], Key]) -> dict[Key, Summary]:
        """The errors of each group of rows, in the order of the keys."""
        groups: dict[Key, list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault(key(outcome), []).append(outcome)
        return {name: Summary.of(groups[name]) for name in sorted(groups)}

    def worst(self, count: int) -> list[Outcome]:
        """The rows that are furthest off, as factors, whichever way."""
        return sorted(self.outcomes, key=lambda outcome: -abs(math.log(outcome.ratio)))[:count]


def validate(path: Path) -> Validation:
    """Replay a file of published measurements; raises UsageError where it cannot be read."""
    outcomes, skipped = [], Counter[str]()
    for _, found in published.resolved(published.read(path)):
        if isinstance(found, str):
            skipped[found] += 1
            continue
        outcome = predict(found)
        if outcome.predicted > 0:
            outcomes.append(outcome)
        else:
            skipped["by the memory model it does not fit"] += 1
    return Validation(tuple(outcomes), skipped)
