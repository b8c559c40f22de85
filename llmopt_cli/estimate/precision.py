"""Which precision is fastest at which batch: each against 16 bits, and the batch where they cross.

Few bits win while a step waits for the weights to be read, and lose where it waits for the products. Knows no quality
and asks for no memory: the times are those of a deployment that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from llmopt_cli.estimate.choices import Risk, remark, risk, schemes
from llmopt_cli.estimate.compare import thinned
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.scheme import Scheme, find_scheme

BATCHES = (1, 8, 64, 256)
POWERS = tuple(2**power for power in range(11))  # a crossing is looked for up to the last of them
AHEAD = 1.005  # less is a tie: where products bind both, they differ by roundings
BASE = find_scheme("bf16")


@dataclass(frozen=True, slots=True)
class Crossing:
    """The first batch at which the faster of a precision and 16 bits is no longer the one that is it at batch 1."""

    batch: int
    faster_below: bool


@dataclass(frozen=True, slots=True)
class Speedup:
    """Tokens a second relative to 16 bits, for each of BATCHES; without a crossing it stays as at batch 1."""

    scheme: Scheme
    risk: Risk
    remark: str
    factors: tuple[float, ...]
    crossing: Crossing | None


def speedups(on: Deployment, load: Load) -> tuple[Speedup, ...]:
    """Every precision that this engine and accelerator have, on these GPUs and for requests of these lengths."""
    few = thinned(load)
    found = []
    for scheme in schemes(on.engine.name, on.hardware):
        if scheme is not BASE:
            factor = partial(_factor, StepModel(replace(on, scheme=BASE)), StepModel(replace(on, scheme=scheme)), few)
            factors = tuple(map(factor, BATCHES))
            found.append(Speedup(scheme, risk(scheme), remark(scheme, on.hardware), factors, _crossing(factor)))
    return tuple(found)


def _factor(base: StepModel, other: StepModel, load: Load, batch: int) -> float:
    """Of output tokens a second with the same batch, prompts included, whether memory holds it or not."""
    return work(other, load.at(batch)).tokens_per_s / work(base, load.at(batch)).tokens_per_s


def _crossing(factor: Callable[[int], float]) -> Crossing | None:
    """Doubled until the order has changed, then halved."""
    ahead = factor(1) > AHEAD
    high = next((batch for batch in POWERS if (factor(batch) > AHEAD) != ahead), None)
    if high is None:
        return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (factor(middle) > AHEAD) == ahead else (low, middle)
    return Crossing(high, ahead)
