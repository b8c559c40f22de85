"""`EngineStats`: what an engine counts, for dashboards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """Totals since start: drafts, their tokens, and how many stood at each place of a draft.

    `judged` are those that stood and the first of each draft that did not: what lies behind it says nothing.
    """

    drafts: int = 0
    tokens: int = 0
    stood: list[int] = field(default_factory=list)
    steps: int = 0  # of requests while they decode, with a draft or without
    emitted: int = 0  # tokens that those brought
    seconds: float = 0.0  # of steps in which all were decoding, drafting included; of many alike where none is drafted
    alone: float = 0.0  # and how long those would have taken that bring as many tokens without drafts, as was measured
    judged: int = 0

    def add(self, drafted: int, stood: int) -> None:
        """One more step of one request."""
        self.steps += 1
        self.emitted += stood + 1
        if drafted:
            self.drafts += 1
            self.tokens += drafted
            self.judged += min(stood + 1, drafted)
            self.stood += [0] * (drafted - len(self.stood))
            for place in range(stood):
                self.stood[place] += 1

    def add_plain(self, requests: int) -> None:
        """One more step of so many requests, without drafts."""
        self.steps += requests
        self.emitted += requests

    @property
    def accepted(self) -> int:
        """Drafted tokens that stood."""
        return sum(self.stood)

    @property
    def speedup(self) -> float:
        """How much longer steps without drafts, of as many requests, would have taken for as many tokens.

        NaN as long as no such step was seen.
        """
        return self.alone / self.seconds if self.seconds else math.nan

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that stood."""
        return self.accepted / max(1, self.tokens)

    @property
    def length(self) -> float:
        """Tokens that a request gets by a step, one included that needs no draft."""
        return self.emitted / max(1, self.steps)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's load and the totals since start. `kv_cache_usage` is the held share of blocks, 0..1.

    `prefix_cache_queries` are prompt tokens looked up in the prefix cache, `prefix_cache_hits` those found. `stalled`
    is 1 while requests run and no step ends, as who runs the engine saw it, `num_stalls` how often that began.
    `speculation` is None where nothing is drafted.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_blocks: int
    block_size: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    stalled: int = 0
    num_stalls: int = 0
    speculation: Tally | None = None
