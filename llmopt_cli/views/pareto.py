"""How a frontier looks: JSON, and a scatter of letters in the terminal. Knows where a point goes, not what it means."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.pareto import Picture, Point

PER_USER = "output tokens/s for each user"
VALUE = {"throughput": "output tokens/s per GPU", "cost": "USD per 1M output tokens, prompts included"}
LETTERS = string.ascii_uppercase + string.ascii_lowercase
WIDTH, HEIGHT, MARGIN = 72, 20, 9  # characters: of the plot, and of the labels to its left


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic axis from `low` to `high`, both above 0."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float]) -> Self:
        """The axis that all values lie on, with a little room."""
        known = list(values)
        return cls(min(known) / 1.1, max(known) * 1.1)

    def at(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    @property
    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten on it."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = (digit * 10.0**power for power in powers for digit in (1, 2, 5))
        return [mark for mark in marks if self.low <= mark <= self.high]


def scales(picture: Picture) -> tuple[Scale, Scale]:
    """The axes of all points: speed for a user, and what it is traded for."""
    users = Scale.around(point.per_user for point in picture.points)
    return users, Scale.around(point.value for point in picture.points)


def legend(picture: Picture) -> list[tuple[str, list[Point]]]:
    """A letter for each stretch of the frontier; beyond 52 of them the last letter stays."""
    return [(LETTERS[min(index, len(LETTERS) - 1)], points) for index, points in enumerate(picture.stretches)]


def data(picture: Picture) -> dict[str, Any]:
    """The frontier as JSON; the points under it are counted."""
    unit = {"throughput": "output_tokens_per_s_per_gpu", "cost": "usd_per_1m_output_tokens"}[picture.axis]
    return {
        "points": len(picture.points),
        "frontier": [
            {
                "deployment": point.name,
                "batch": point.batch,
                "output_tokens_per_s_per_user": point.per_user,
                unit: point.value,
            }
            for point in picture.frontier
        ],
    }


def render(picture: Picture) -> list[RenderableType]:
    """The scatter and its legend."""
    return ["", scatter(picture), "", legend_table(picture)]


def scatter(picture: Picture) -> str:
    """Letters for the frontier, dots for what it beats, both axes logarithmic.

    Where stretches meet in one place, the shortest is shown.
    """
    users, values = scales(picture)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    stretches = sorted(legend(picture), key=lambda stretch: len(stretch[1]), reverse=True)
    for mark, points in [("·", picture.points), *stretches]:
        for point in points:
            row = HEIGHT - 1 - round(values.at(point.value) * (HEIGHT - 1))
            grid[row][round(users.at(point.per_user) * (WIDTH - 1))] = mark
    labels = {HEIGHT - 1 - round(values.at(tick) * (HEIGHT - 1)): plain(tick, 3) for tick in values.ticks}
    rows = [f"{labels.get(row, ''):>{MARGIN}} |{''.join(cells)}" for row, cells in enumerate(grid)]
    axis = f"{'':>{MARGIN}} +{'-' * WIDTH}"
    heading = f"{VALUE[picture.axis]} (up) against {PER_USER} (right), both logarithmic"
    return "\n".join([heading, *rows, axis, f"{'':>{MARGIN}}  {_tick_line(users)}"])


def _tick_line(scale: Scale) -> str:
    """The labels of the lower axis, each where its value lies; those that would touch are left out."""
    line = ""
    for tick in scale.ticks:
        label, start = plain(tick, 3), round(scale.at(tick) * (WIDTH - 1))
        if start > len(line) or not line:
            line = line.ljust(start) + label
    return line


def legend_table(picture: Picture) -> RenderableType:
    """What each letter is."""
    columns = ("frontier", "deployment", "batch", "tok/s for a user", VALUE[picture.axis])
    return table(f"Nothing else of {len(picture.points):,} points beats these", columns, legend_rows(picture))


def legend_rows(picture: Picture) -> list[tuple[str, ...]]:
    """Letter, deployment, and what it spans: batches, speeds and values."""
    return [
        (
            letter,
            points[0].name,
            _span([point.batch for point in points]),
            _span([point.per_user for point in points]),
            _span([point.value for point in points]),
        )
        for letter, points in legend(picture)
    ]


def _span(values: list[float] | list[int]) -> str:
    ends = [plain(value, 3) for value in (values[0], values[-1])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
