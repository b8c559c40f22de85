"""Damped Gauss-Newton (Levenberg, Marquardt) for a handful of unknowns, in plain Python. Knows no physics.

Minimizes the sum of Huber's loss of the residuals (so that a run amid other load does not bend the rest) and of
`RIDGE` x the squares of the unknowns, which keeps at their start those that no residual says anything about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Vector = list[float]
Residuals = Callable[[Vector], Vector]
RIDGE = 0.0004  # one unknown off by 1 weighs as much as one residual of 0.02
BEND = 0.2  # where Huber's loss turns from square to linear
STEPS = 60
CHANGE = 1e-3  # of an unknown, to see what it does to the residuals
CLOSE = 1e-5  # relative gain at which the search ends


@dataclass(frozen=True, slots=True)
class Fit:
    """The unknowns found, the residuals there, and the rows of their derivatives."""

    at: Vector
    residuals: Vector
    jacobian: list[Vector]

    def without(self, left_out: Sequence[int], bounds: Sequence[tuple[float, float]]) -> Vector:
        """The unknowns if these residuals had not been there, to first order: one step from the whole fit."""
        kept = [row for row in range(len(self.residuals)) if row not in set(left_out)]
        step = _step(self.at, [self.residuals[row] for row in kept], [self.jacobian[row] for row in kept], 0.0)
        return _moved(self.at, step, bounds)


def minimize(residuals: Residuals, bounds: Sequence[tuple[float, float]]) -> Fit:
    """Search from all zeros within `bounds`."""
    at, damping = [0.0] * len(bounds), 1e-2
    now = residuals(at)
    jacobian = _jacobian(residuals, at, now)
    for _ in range(STEPS):
        tried = _moved(at, _step(at, now, jacobian, damping), bounds)
        then = residuals(tried)
        gain = _loss(at, now) - _loss(tried, then)
        if gain <= 0:
            damping *= 4
            if damping > 1e6:
                break
            continue
        done = gain < CLOSE * _loss(at, now)
        at, now, damping = tried, then, damping / 4
        jacobian = _jacobian(residuals, at, now)
        if done:
            break
    return Fit(at, now, jacobian)


def _jacobian(residuals: Residuals, at: Vector, now: Vector) -> list[Vector]:
    """Rows of d residual / d unknown, by forward differences."""
    columns = []
    for index in range(len(at)):
        moved = [value + CHANGE * (place == index) for place, value in enumerate(at)]
        columns.append([(then - before) / CHANGE for then, before in zip(residuals(moved), now, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _loss(at: Vector, residuals: Vector) -> float:
    huber = sum(r * r if abs(r) < BEND else BEND * (2 * abs(r) - BEND) for r in residuals)
    return huber + RIDGE * sum(value * value for value in at)


def _step(at: Vector, residuals: Vector, jacobian: list[Vector], damping: float) -> Vector:
    """Solve (J'WJ + (RIDGE + damping) I) step = -(J'Wr + RIDGE at), W the weights that make Huber's loss of squares."""
    size = range(len(at))
    weights = [min(1.0, BEND / max(abs(r), 1e-12)) for r in residuals]
    rows = list(zip(weights, residuals, jacobian, strict=True))
    normal = [
        [sum(w * row[i] * row[j] for w, _, row in rows) + (RIDGE + damping) * (i == j) for j in size] for i in size
    ]
    right = [-sum(w * row[i] * r for w, r, row in rows) - RIDGE * at[i] for i in size]
    return solve(normal, right)


def _moved(at: Vector, step: Vector, bounds: Sequence[tuple[float, float]]) -> Vector:
    return [min(max(value + by, low), high) for value, by, (low, high) in zip(at, step, bounds, strict=True)]


def solve(matrix: list[Vector], right: Vector) -> Vector:
    """x of matrix x = right by Gauss's elimination with pivots; the matrix must not be singular."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for below in range(column + 1, size):
            factor = rows[below][column] / rows[column][column]
            rows[below] = [one - factor * other for one, other in zip(rows[below], rows[column], strict=True)]
    found: Vector = []
    for row in reversed(rows):
        known = sum(one * value for one, value in zip(reversed(row[-1 - len(found) : -1]), found, strict=True))
        found.append((row[-1] - known) / row[size - 1 - len(found)])
    return found[::-1]
