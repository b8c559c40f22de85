"""Proposers that look up how the text went on when its last tokens occurred before. They cost no pass of any model.

`NGram` is prompt lookup (Saxena 2023; vLLM's `ngram`): what followed the latest occurrence of a few last tokens.
`Suffix` takes the longest suffix that occurred, in this text or in answers that ended, and trusts it as far as it is
long (SuffixDecoding, arXiv 2411.04975). Both index every token once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.speculative.automaton import Automaton
from llmopt_cli.runtime.speculative.proposer import Draft

REMEMBERED = 200_000  # tokens of ended answers, in each of two generations
SEPARATOR = -1  # between answers: no token
REACH = 2  # tokens proposed for each that matched, at most
FEWEST = 2  # tokens that must match


@dataclass(slots=True)
class _Places:
    """Where each n-gram of a text ended last, but for the one that ends the text."""

    indexed: int = 0
    last: dict[tuple[int, ...], int] = field(default_factory=dict)

    def catch_up(self, tokens: Sequence[int], shortest: int, longest: int) -> None:
        """Index the tokens that came since."""
        for end in range(max(self.indexed, shortest), len(tokens)):
            for size in range(shortest, min(longest, end) + 1):
                self.last[tuple(tokens[end - size : end])] = end
        self.indexed = len(tokens)


class NGram:
    """Proposes what followed the latest occurrence of the longest of the text's last n-grams that occurred before."""

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self._shortest, self._longest = shortest, longest
        self._places: dict[str, _Places] = {}

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where no n-gram recurs."""
        return [self._propose(request, length) for request, length in zip(requests, lengths, strict=True)]

    def _propose(self, request: Request, length: int) -> Draft:
        tokens = request.token_ids
        places = self._places.setdefault(request.request_id, _Places())
        places.catch_up(tokens, self._shortest, self._longest)
        for size in range(min(self._longest, len(tokens)), self._shortest - 1, -1):
            found = places.last.get(tuple(tokens[-size:]))
            if found is not None:
                return Draft(tuple(_cycled(tokens, found, length)))
        return Draft()

    def forget(self, request_id: str) -> None:
        """Drop a request's index."""
        self._places.pop(request_id, None)

    def close(self) -> None:
        """Nothing is held."""


def _cycled(tokens: Sequence[int], start: int, length: int) -> list[int]:
    """`length` tokens from `start` on; where the text ends, what was proposed goes on as part of it."""
    period = len(tokens) - start
    return [tokens[start + index % period] for index in range(length)]


@dataclass(slots=True)
class _Matched:
    """A request, its own text, and how much of its end occurs in what is remembered of others, by generation."""

    request: Request
    own: Automaton = field(default_factory=Automaton)
    repeated: tuple[int, int] = (0, 0)
    elsewhere: dict[int, tuple[int, int]] = field(default_factory=dict)


class Suffix:
    """Proposes what followed the longest suffix of the text that occurred in it before, or in other answers.

    What is said under a cache salt stays out of other answers, as with the prefix cache.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._matched: dict[str, _Matched] = {}
        self._others: dict[int, Automaton] = {0: Automaton()}  # generations, the newest last
        self._remembered = remembered

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where fewer than FEWEST tokens occurred before; up to REACH times as many as did."""
        return [self._propose(request, length) for request, length in zip(requests, lengths, strict=True)]

    def _propose(self, request: Request, length: int) -> Draft:
        matched = self._matched.get(request.request_id)
        if matched is None:
            matched = self._matched[request.request_id] = _Matched(request)
        self._catch_up(matched)
        size, place = matched.repeated
        found = [(size, _cycled(matched.own.text, place, min(length, REACH * size)) if size else [])]
        for generation, (state, size) in matched.elsewhere.items():
            other = self._others[generation]
            ahead = other.text[other.ends[state] : other.ends[state] + min(length, REACH * size)]
            found.append((size, ahead[: ahead.index(SEPARATOR)] if SEPARATOR in ahead else ahead))
        _, tokens = max((one for one in found if one[0] >= FEWEST and one[1]), default=(0, []), key=lambda one: one[0])
        return Draft(tuple(tokens))

    def _catch_up(self, matched: _Matched) -> None:
        own, others = matched.own, self._others.items()
        for token in matched.request.token_ids[len(own.text) :]:
            own.add(token)
            matched.repeated = own.repeated()
            if not matched.request.params.cache_salt:
                known = matched.elsewhere
                matched.elsewhere = {name: one.follow(*known.get(name, (0, 0)), token) for name, one in others}

    def forget(self, request_id: str) -> None:
        """Remember an ended request's text for others. The oldest is forgotten when there is too much."""
        matched = self._matched.pop(request_id, None)
        if matched is None or matched.request.params.cache_salt:
            return
        newest = max(self._others)
        for token in (*matched.request.token_ids, SEPARATOR):
            self._others[newest].add(token)
        if len(self._others[newest].text) > self._remembered:
            self._others.pop(newest - 1, None)
            self._others[newest + 1] = Automaton()

    def close(self) -> None:
        """Nothing is held."""
