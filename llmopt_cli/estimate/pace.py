"""`Pace`: seconds of many steps at once. While the same requests decode, a step's time is a straight line of context.

Knows the step model and no requests. What it adds up is what single steps take, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmopt_cli.estimate.latency import Chunk, StepModel

PROBES = (0.25, 0.5, 0.8)  # where between its ends a line is compared with the model


@dataclass(frozen=True, slots=True)
class Line:
    """The time of a decode step of mean context `low` to `high`: `first` + `slope` x (context - low)."""

    low: float
    high: float
    first: float
    slope: float

    def at(self, context: float) -> float:
        """Seconds of one step."""
        return self.first + self.slope * (context - self.low)

    def total(self, context: float, steps: int) -> float:
        """Seconds of so many steps, of which the first has `context` and each one token more than the last."""
        return steps * self.at(context + (steps - 1) / 2)

    def steps_until(self, context: float, seconds: float, most: int) -> int:
        """The fewest steps, 1 to `most`, that take at least so long; `most` if even those do not."""
        if self.total(context, most) < seconds:
            return most
        start = self.at(context) - self.slope / 2  # total(k) = slope/2 k^2 + start k
        root = 2 * seconds / (start + math.sqrt(max(0.0, start**2 + 2 * self.slope * seconds)))
        steps = min(max(1, math.ceil(root)), most)
        while steps > 1 and self.total(context, steps - 1) >= seconds:
            steps -= 1
        while self.total(context, steps) < seconds:
            steps += 1
        return steps


class Pace:
    """The step times of one deployment; straight stretches are looked for once."""

    def __init__(self, step: StepModel) -> None:
        self._step = step
        self._lines: dict[int, Line] = {}

    def mixed(self, decodes: int, context: float, chunks: Sequence[Chunk]) -> float:
        """One step. A draft's gain is in the decoding alone; prompts pass pipeline stages one after another."""
        if not chunks:
            return self._step.decode(decodes, context)
        whole = self._step.step(decodes, context, chunks)
        if not decodes or self._step.on.draft is None:
            return whole
        return whole + self._step.decode(decodes, context) - self._step.step(decodes, context)

    def line(self, decodes: int, low: float, high: float) -> Line:
        """A straight stretch from `low` on, up to `high` or as far below it as the time is straight."""
        known = self._lines.get(decodes)
        if known and known.low <= low and high <= known.high:
            return known
        longest = max(high, float(self._step.spec.max_context))
        for start, end in ((1.0, longest), (low, longest), (low, high)):
            if line := self._straight(decodes, start, end):
                self._lines[decodes] = line
                return line
        while high > low + 1:
            high = (low + high) / 2
            if line := self._straight(decodes, low, high):
                return line
        return Line(low, low, self._step.decode(decodes, low), 0.0)

    def _straight(self, decodes: int, low: float, high: float) -> Line | None:
        first, last = self._step.decode(decodes, low), self._step.decode(decodes, high)
        line = Line(low, high, first, (last - first) / (high - low) if high > low else 0.0)
        between = [low + share * (high - low) for share in PROBES]
        fits = (math.isclose(line.at(one), self._step.decode(decodes, one), rel_tol=1e-12) for one in between)
        return line if all(fits) else None
