"""How many tokens to draft, from what was measured: none where speculation loses, now and then a few to see if it wins.

Pure arithmetic on acceptance and times; the clock is the caller's. Knows no model, no proposer and no request's text.

A draft of k tokens, each of which stands with chance a, brings a + a^2 + ... + a^k tokens more (Leviathan et al., arXiv
2211.17192). What a step takes is known for every number of tokens that was seen, and so is what proposing takes.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

MEMORY = 0.9  # of a mean that is kept when something new is measured
PRIOR = 0.7  # the chance that a first draft stands
LOWEST, HIGHEST = 0.02, 0.98  # chances are kept between
FLOORS = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1)  # a token is drafted if the chance that all up to it stand is at least this
PROBE_SHARE = 0.005  # of the time may be lost on trying whether drafting wins again
PROBE_TOKENS = 2
GAIN = 1.03  # that drafting must promise: figures are noisy
LASTS = 4  # steps for which a decision holds


@dataclass(slots=True)
class Times:
    """Seconds by a number of tokens: a mean for each that was seen, straight lines between them."""

    seen: dict[int, float] = field(default_factory=dict)
    _known: list[int] = field(default_factory=list)

    def add(self, tokens: int, seconds: float) -> None:
        """Something over so many took so long. A single outlier, such as a pause of the machine, weighs little."""
        old = self.seen.get(tokens)
        if old is None:
            self._known.insert(bisect(self._known, tokens), tokens)
            self.seen[tokens] = seconds
        else:
            self.seen[tokens] = MEMORY * old + (1 - MEMORY) * min(seconds, 3 * old)

    def at(self, tokens: int) -> float:
        """What it takes; beyond what was seen as at the edge, and in proportion where one size alone was seen."""
        if tokens in self.seen or not self._known:
            return self.seen.get(tokens, 0.0)
        if len(self._known) == 1:
            return self.seen[self._known[0]] * max(1.0, tokens / max(1, self._known[0]))
        place = min(max(bisect(self._known, tokens) - 1, 0), len(self._known) - 2)
        low, high = self._known[place : place + 2]
        slope = max(0.0, (self.seen[high] - self.seen[low]) / (high - low))
        return max(self.seen[low] + slope * (tokens - low), 0.1 * self.seen[low])


class Controller:
    """Decides for all requests that decode together. `most` is the longest draft.

    `steps` are the times of steps by the tokens in them, `proposals` those of proposing by the tokens proposed.
    """

    def __init__(self, most: int, steps: Times, proposals: Times) -> None:
        self.most = most
        self._steps, self._proposals = steps, proposals
        self._chances: dict[str, float] = {}
        self._usual = PRIOR
        self._cap = 1  # drafts grow while they win
        self._held: dict[str, int] = {}
        self._left = 0  # steps for which what is held still holds
        self._clock = 0.0  # seconds of steps seen
        self._probe_at = 0.0

    def lengths(self, requests: Sequence[str]) -> list[int]:
        """How many tokens to draft for each; all zero where that is best."""
        if self._left <= 0 or any(name not in self._held for name in requests):
            self._held = dict(zip(requests, self._decide(requests), strict=True))
            self._left = LASTS if any(self._held.values()) else 1
        self._left -= 1
        found = [self._held[name] for name in requests]
        if any(found) or self._clock < self._probe_at or not requests:
            return found
        self._left = 0
        chosen = max(range(len(requests)), key=lambda index: self._chance(requests[index]))
        return [min(PROBE_TOKENS, self.most) if index == chosen else 0 for index in range(len(requests))]

    def _decide(self, requests: Sequence[str]) -> list[int]:
        count = len(requests)
        if count not in self._steps.seen:
            return [0] * count  # what it takes without drafts comes first
        chances = [self._chance(name) for name in requests]
        best, lengths = self._rate(count, count, 0) * GAIN, [0] * count
        for floor in FLOORS:
            tried = [reach(chance, floor, self._cap) for chance in chances]
            tokens = count + sum(gain(chance, length) for chance, length in zip(chances, tried, strict=True))
            rate = self._rate(tokens, count + sum(tried), sum(tried))
            if sum(tried) and rate > best:
                best, lengths = rate, tried
        if max(lengths) == self._cap:
            self._cap = min(2 * self._cap, self.most)
        return lengths

    def _rate(self, brought: float, run: int, drafted: int) -> float:
        """Tokens a second if a step over `run` tokens brings so many."""
        seconds = self._steps.at(run) + (self._proposals.at(drafted) if drafted else 0.0)
        return brought / seconds if seconds else brought

    def _chance(self, name: str) -> float:
        return self._chances.get(name, self._usual)

    def stepped(self, requests: int, drafted: int, seconds: float) -> None:
        """A step of so many requests, with `drafted` tokens beside theirs, took so long, proposing included."""
        self._clock += seconds
        if drafted and not any(self._held.values()):  # it was a probe
            lost = max(0.0, seconds - self._steps.at(requests))
            self._probe_at = self._clock + lost / PROBE_SHARE

    def verified(self, name: str, drafted: int, stood: int) -> None:
        """Of a request's draft so many tokens stood; those behind the first that did not say nothing."""
        chance = self._chance(name)
        for index in range(min(stood + 1, drafted)):
            chance = MEMORY * chance + (1 - MEMORY) * (index < stood)
            self._usual = 0.98 * self._usual + 0.02 * (index < stood)
        self._chances[name] = min(max(chance, LOWEST), HIGHEST)

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._chances.pop(name, None)
        self._held.pop(name, None)


def reach(chance: float, floor: float, most: int) -> int:
    """The longest draft whose last token stands with a chance of at least `floor`."""
    length, standing = 0, chance
    while length < most and standing >= floor:
        length, standing = length + 1, standing * chance
    return length


def gain(chance: float, length: int) -> float:
    """Tokens that a draft of this length brings on average."""
    return chance * (1 - chance**length) / (1 - chance)
