"""`Load`: what is asked of a deployment while it is timed. Knows lengths and their means, no model and no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Self

from llmopt_cli.spec.workload import Size, Workload

DRAWS = 2048  # lengths drawn of a distribution
BANDS = 12  # of prompts, and of answers within each, one size of which is timed


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` requests at the same time, whose lengths are drawn from `sizes`, each equally likely.

    Of every prompt the first `cached_share` is found in the prefix cache.
    """

    concurrency: int
    sizes: tuple[Size, ...]
    cached_share: float = 0.0

    @classmethod
    def fixed(cls, concurrency: int, input_len: int, output_len: int) -> Self:
        """All requests alike."""
        return cls(concurrency, (Size(input_len, output_len),))

    @classmethod
    def of(cls, workload: Workload, context: int | None = None) -> Self:
        """Of a workload: some of its lengths, clipped to `context`, and what of its prompts was met before.

        An open loop has no concurrency of its own and gets 1; `slo.keep_up` finds what its rate keeps busy.
        """
        sizes = _some(workload, context)
        return cls(workload.arrivals.concurrency or 1, sizes, _shared(workload))

    def at(self, concurrency: int) -> Self:
        """The same requests, more or fewer at once."""
        return replace(self, concurrency=concurrency)

    @property
    def input_len(self) -> float:
        """Mean prompt in tokens."""
        return sum(size.input_len for size in self.sizes) / len(self.sizes)

    @property
    def output_len(self) -> float:
        """Mean answer in tokens."""
        return sum(size.output_len for size in self.sizes) / len(self.sizes)

    @property
    def alike(self) -> bool:
        """Whether all requests have the same lengths."""
        return len(set(self.sizes)) == 1

    @property
    def length(self) -> int:
        """Mean tokens of a request when it ends, rounded up: what a place in the cache has to hold."""
        return math.ceil(sum(sum(size) for size in self.sizes) / len(self.sizes))

    @property
    def longest(self) -> int:
        """Tokens of the longest request when it ends."""
        return max(sum(size) for size in self.sizes)

    @property
    def context(self) -> float:
        """Mean tokens in cache of a request that is decoding: long answers are met more often than short ones."""
        steps = sum(size.output_len for size in self.sizes)
        return sum(size.output_len * (size.input_len + size.output_len / 2) for size in self.sizes) / steps


def _some(workload: Workload, context: int | None) -> tuple[Size, ...]:
    """At most BANDS^2 lengths: one of each band of answers within each band of prompts, so that rare ones count."""
    drawn = workload if workload.input_len.kind == "trace" else replace(workload, num_requests=DRAWS)
    sizes, rng = drawn.sizes(context)[0], Random(workload.seed)
    if len(set(sizes)) == 1:
        return (sizes[0],)
    if len(sizes) <= BANDS**2:
        return tuple(sizes)
    bands = [sorted(band, key=lambda size: size.output_len) for band in _cut(sorted(sizes))]
    return tuple(rng.choice(cell) for band in bands for cell in _cut(band))


def _cut(sizes: list[Size]) -> list[list[Size]]:
    """Into BANDS parts of equal size, at least one each."""
    ends = [index * len(sizes) // BANDS for index in range(BANDS + 1)]
    return [sizes[start:end] for start, end in pairwise(ends)]


def _shared(workload: Workload) -> float:
    """The part of all prompt tokens that an endless prefix cache would have met before."""
    block, prefixes = workload.prefixes()
    known: set[int] = set()
    hits = 0
    for numbers in prefixes:
        hits += sum(number in known for number in numbers)
        known.update(numbers)
    return block * hits / sum(size.input_len for size in workload.sizes(None)[0])
