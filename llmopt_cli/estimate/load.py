"""`Load`: what is asked of a deployment while it is timed. Knows lengths and their means, no model and no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from llmopt_cli.spec.workload import Size


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
    def longest(self) -> int:
        """Tokens of the longest request when it ends."""
        return max(sum(size) for size in self.sizes)

    @property
    def context(self) -> float:
        """Mean tokens in cache of a request that is decoding: long answers are met more often than short ones."""
        steps = sum(size.output_len for size in self.sizes)
        return sum(size.output_len * (size.input_len + size.output_len / 2) for size in self.sizes) / steps
