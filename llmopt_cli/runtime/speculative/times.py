"""How long steps take, by how many tokens are in them: means that follow the machine, straight lines between them."""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from itertools import accumulate

NEW, OFTEN = 0.05, 0.02  # weight of something new in a mean, once there is much: of drafts, of steps alone
OUTLIER = 1.5  # times the mean: a longer step counts as so long, for machines pause
SHORTER = 0.5  # weight of a step that is as much shorter, where there is not much: no pause explains that
COLD = 3  # the first of a kind: of those the shortest counts, for the code and the memory that they need are cold
SETTLED = 10  # means of so many can tell that the pace has changed: both follow by a power of what is off, the pace
FOLLOWS = 0.2  # by this one; if one followed differences and the other ratios, they would drift apart for ever
PARTS = 8  # of a doubling that are told apart


@dataclass(slots=True)
class Times:
    """Mean seconds by a number of tokens; large numbers that are nearly the same share a mean."""

    new: float = NEW
    seen: dict[int, float] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _known: list[int] = field(default_factory=list)

    def add(self, tokens: int, seconds: float) -> None:
        """Something over so many took so long."""
        place = bucket(tokens)
        old, count = self.seen.get(place), self._counts.get(place, 0)
        if old is None:
            self._known.insert(bisect(self._known, place), place)
            self.seen[place] = seconds
        elif count >= SETTLED:
            self.seen[place] = old * followed(seconds / old, self.new)
        else:
            share = max(self.new if OUTLIER * seconds > old else SHORTER, 1 / (count + 1))
            mean = (1 - share) * old + share * min(seconds, OUTLIER * old)
            self.seen[place] = mean if count >= COLD else min(old, seconds)
        self._counts[place] = count + 1

    def count(self, tokens: int) -> int:
        """How often something over about so many was seen."""
        return self._counts.get(bucket(tokens), 0)

    def at(self, tokens: int, start: tuple[int, float] | None = None) -> float:
        """What it takes. Where nothing larger was seen the line from the smallest on goes on; it may `start` elsewhere.

        What is alone known is all that is expected, nothing where nothing is: nobody tries what is expected to be dear.
        And more tokens never take less.
        """
        place, known = bucket(tokens), self._known
        index = bisect(known, place)
        least = [*accumulate((self.seen[one] for one in reversed(known)), min)][::-1]
        if place in self.seen:
            return least[index - 1]
        points = list(zip(known, least, strict=True))
        below = max([*points[:index], *([start] if start and start[0] <= tokens else [])], default=None)
        if below is None:
            return points[0][1] if points else 0.0
        if index < len(known):
            return _between(below, points[index], tokens)
        first = start or points[0]
        if first[0] >= below[0]:
            return below[1]
        return below[1] + max(0.0, (below[1] - first[1]) / (below[0] - first[0])) * (tokens - below[0])


def followed(off: float, power: float) -> float:
    """What something that is off by so much is to be multiplied by."""
    return math.exp(power * math.log(min(max(off, 1 / OUTLIER), OUTLIER)))


def bucket(tokens: int) -> int:
    """The smallest number that shares a mean with this one."""
    width = max(1, (1 << max(tokens, 1).bit_length() - 1) // PARTS)
    return tokens // width * width


def _between(low: tuple[int, float], high: tuple[int, float], tokens: int) -> float:
    return low[1] + (high[1] - low[1]) * (tokens - low[0]) / (high[0] - low[0])


@dataclass(slots=True)
class Clocks:
    """What was measured: steps alone, by requests; those with drafts, by all tokens in them; proposing, by requests.

    Where tokens are proposed `in_turn`, it is what a pass takes that is measured, and to begin takes one more. All are
    kept relative to one pace, which follows all steps: when a machine becomes slower, everything does.
    """

    in_turn: bool = False
    _alone: Times = field(default_factory=lambda: Times(OFTEN))  # what changes in them is the pace
    _drafted: Times = field(default_factory=Times)
    _proposing: Times = field(default_factory=Times)
    _pace: float = 1.0
    _drafts: bool = False  # in the last step

    def add_step(self, requests: int, drafted: int, seconds: float) -> None:
        """A step of so many requests, with so many tokens drafted for all of them.

        The first one after one of the other kind is slower, for what it needs is cold: it only tells if it is far
        shorter than was known.
        """
        known = self.drafted(requests, drafted) if drafted else self.alone(requests)
        alike, self._drafts = bool(drafted) == self._drafts, bool(drafted)
        if not alike and OUTLIER * seconds >= known > 0:
            return
        times, tokens = (self._drafted if drafted else self._alone), requests + drafted
        relative = seconds / self._pace
        if times.count(tokens) >= SETTLED:
            self._pace *= followed(relative / times.seen[bucket(tokens)], FOLLOWS)
        times.add(tokens, relative)

    def add_proposal(self, requests: int, longest: int, seconds: float) -> None:
        """For so many requests tokens were proposed, at most `longest` for one."""
        self._proposing.add(requests, seconds / self._passes(longest) / self._pace)

    def knows(self, requests: int) -> bool:
        """Whether a step of about so many requests without drafts was seen."""
        return self._alone.count(requests) > 0

    def alone(self, requests: int) -> float:
        """Seconds of a step without drafts."""
        return self._alone.at(requests) * self._pace

    def drafted(self, requests: int, drafted: int) -> float:
        """Seconds of a step with drafts; with more tokens than any that was seen at least those of as many requests."""
        tokens = requests + drafted
        seconds = self._drafted.at(tokens, (requests, self._alone.at(requests)))
        if bucket(tokens) > max(self._drafted.seen, default=0):
            seconds = max(seconds, self._alone.at(tokens))
        return seconds * self._pace

    def proposing(self, requests: int, longest: int) -> float:
        """Seconds of proposing; 0 as long as nothing was seen."""
        return self._proposing.at(requests) * self._passes(longest) * self._pace

    def _passes(self, longest: int) -> int:
        return longest + 1 if self.in_turn else 1
