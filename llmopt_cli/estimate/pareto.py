"""The frontier of speed for one user and throughput, or price, for all: what a larger batch or other GPUs trade.

Takes the deployments of a comparison and varies their batch; draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Literal

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.compare import Comparison, thinned
from llmopt_cli.estimate.cost import MILLION, usd_per_tokens
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.offer import Offer
from llmopt_cli.estimate.work import work

Axis = Literal["throughput", "cost"]
BATCHES = tuple(2**power for power in range(13))


@dataclass(frozen=True, slots=True)
class Point:
    """One deployment at one batch: output tokens a second for each user, and the figure to trade it for.

    `value` is output tokens a second and GPU on the axis "throughput", USD for a million of them on "cost".
    """

    on: Deployment
    batch: int
    per_user: float
    value: float

    @property
    def name(self) -> str:
        """`2 x H100-SXM5-80GB fp8 tp2`."""
        on = self.on
        split = f" tp{on.tp}" * (on.tp > 1) + f" pp{on.pp}" * (on.pp > 1)
        return f"{on.gpus} x {on.hardware.name} {on.scheme.name}{split}"


@dataclass(frozen=True, slots=True)
class Picture:
    """All points, and those that no other beats on both figures, the fastest for a user first."""

    axis: Axis
    points: tuple[Point, ...]
    frontier: tuple[Point, ...]

    @property
    def stretches(self) -> list[list[Point]]:
        """The frontier, cut where it passes from one deployment to another."""
        return [list(points) for _, points in groupby(self.frontier, key=lambda point: point.name)]


def picture(comparison: Comparison, axis: Axis = "throughput") -> Picture:
    """The points of every offer of a comparison; raises UsageError where no price is known and "cost" is wanted."""
    points = tuple(point for one in comparison.offers for point in _points(comparison, one, axis))
    if not points:
        why = "no deployment fits" if not comparison.offers else "none of these accelerators has a price"
        raise UsageError(f"there is nothing to draw: {why}", "try another --model, or give a price with --gpu-price")
    return Picture(axis, points, frontier(points, axis))


def frontier(points: Iterable[Point], axis: Axis) -> tuple[Point, ...]:
    """The points of which no other is at least as good on both figures and better on one."""
    sign = 1 if axis == "cost" else -1
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.per_user, sign * point.value)):
        if not kept or sign * point.value < sign * kept[-1].value:
            kept.append(point)
    return tuple(kept)


def _points(comparison: Comparison, one: Offer, axis: Axis) -> Iterator[Point]:
    question, step = comparison.question, StepModel(one.on)
    most, few = min(one.fit.max_requests, question.base.batching.max_num_seqs), thinned(question.load)
    for batch in _batches(most):
        load = few.at(batch)
        tokens_per_s = work(step, load).tokens_per_s
        if axis == "throughput":
            yield Point(one.on, batch, 1 / step.tpot(load), tokens_per_s / one.gpus)
        elif one.usd_per_hour is not None:
            yield Point(one.on, batch, 1 / step.tpot(load), usd_per_tokens(one.usd_per_hour, tokens_per_s, MILLION))


def _batches(most: int) -> Sequence[int]:
    smaller = list(takewhile(lambda batch: batch < most, BATCHES))
    return [*smaller, most]
