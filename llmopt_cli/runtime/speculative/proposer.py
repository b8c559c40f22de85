"""What proposes tokens ahead of the model: its side of the contract with the engine.

A proposer may be wrong as often as it likes, and never has to answer; whatever it says is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next. `chances` float32 [len(tokens), V] are the distributions they were drawn from.

    None says that each was certain: the proposer draws nothing. `recalled` tells of drafts that it would have made
    since it was asked last: for each of their places, how often those before were right, and how often it was, too.
    """

    tokens: tuple[int, ...] = ()
    chances: Tensor | None = None
    recalled: tuple[tuple[int, int], ...] = ()


class Proposer(Protocol):
    """Guesses what requests will say; `in_turn` where each token takes a pass of its own."""

    in_turn: bool

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """At most so many tokens after the last known one of each request; all of its tokens are verified."""
        ...

    def forget(self, request_id: str) -> None:
        """A request has ended, and will not come back."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@runtime_checkable
class Watching(Proposer, Protocol):
    """One that drafts from the model's own hidden states: those of so many latest tokens may wait until it drafts."""

    unseen: int

    def see(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """What the output head read in a step, (T, H), chunk after chunk, before any of it is verified."""
        ...


@runtime_checkable
class Remembering(Proposer, Protocol):
    """One that keeps something of requests that have ended."""

    def forget_ended(self) -> None:
        """Forget all of that."""
        ...
