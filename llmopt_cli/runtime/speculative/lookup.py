"""Proposers that look up how the text went on when its last tokens occurred before. They cost no pass of any model.

`NGram` is prompt lookup (Saxena 2023; vLLM's `ngram`): what followed the latest occurrence of a few last tokens.
`Suffix` takes the longest suffix that occurred, in this text or in answers that ended, and trusts it as far as it is
long (SuffixDecoding, arXiv 2411.04975). Both index every token once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.speculative.automaton import Automaton
from llmopt_cli.runtime.speculative.proposer import Draft

REMEMBERED = 200_000  # tokens of what ended, prompts and answers, in each of two generations
AT_ONCE = 64  # of those that become known at a time
SEPARATOR = -1  # between answers: no token
REACH = 2  # tokens proposed for each that matched, at most
FEWEST = 2  # tokens that must match
LOOKED_AT = 64  # occurrences of an n-gram, at most


@dataclass(slots=True)
class _Places:
    """Where each n-gram of the shortest size ended last, and where the one that ended here ended `before`."""

    indexed: int = 0
    last: dict[tuple[int, ...], int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)

    def catch_up(self, tokens: Sequence[int], size: int) -> None:
        """Index what came since, but for the n-gram that ends the text."""
        first = max(self.indexed, size)
        behind = max(first, len(tokens)) - size
        grams = zip(*(tokens[first - size + offset : behind + offset] for offset in range(size)), strict=True)
        for end, gram in enumerate(grams, first):
            if gram in self.last:
                self.before[end] = self.last[gram]
            self.last[gram] = end
        self.indexed = max(first, len(tokens))

    def find(self, tokens: Sequence[int], shortest: int, longest: int) -> int:
        """Where the longest of the last n-grams ended before, the latest of such places; 0 if nowhere."""
        place = self.last.get(tuple(tokens[-shortest:]), 0)
        found, most = 0, shortest - 1
        for _ in range(LOOKED_AT):
            if not place or most >= longest:
                break
            size = shortest
            while size < min(longest, place) and tokens[place - size - 1] == tokens[-size - 1]:
                size += 1
            found, most = (place, size) if size > most else (found, most)
            place = self.before.get(place, 0)
        return found


class NGram:
    """Proposes what followed the latest occurrence of the longest of the text's last n-grams that occurred before."""

    in_turn = False

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self._shortest, self._longest = shortest, longest
        self._places: dict[str, _Places] = {}

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where no n-gram recurs."""
        return [self._propose(one, most) if most else Draft() for one, most in zip(requests, lengths, strict=True)]

    def _propose(self, request: Request, length: int) -> Draft:
        tokens = request.token_ids
        places = self._places.setdefault(request.request_id, _Places())
        places.catch_up(tokens, self._shortest)
        found = places.find(tokens, self._shortest, self._longest)
        return Draft(tuple(_cycled(tokens, found, length))) if found else Draft()

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

    in_turn = False

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._matched: dict[str, _Matched] = {}
        self._others: dict[int, Automaton] = {0: Automaton()}  # generations, the newest last
        self._ended: deque[int] = deque(maxlen=remembered)  # tokens that are not there yet
        self._remembered = remembered

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where fewer than FEWEST tokens occurred before; up to REACH times as many as did."""
        self._remember()
        return [self._propose(one, most) if most else Draft() for one, most in zip(requests, lengths, strict=True)]

    def _propose(self, request: Request, length: int) -> Draft:
        matched = self._matched.get(request.request_id)
        if matched is None:
            matched = self._matched[request.request_id] = _Matched(request)
        self._catch_up(matched)
        size, place = matched.repeated
        found = [(size, _cycled(matched.own.text, place, min(length, REACH * size)) if size else [])]
        for generation, (state, size) in matched.elsewhere.items():
            other = self._others.get(generation)
            if other is None:  # forgotten since
                continue
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
        """Remember an ended request's text for others, when there is time. The oldest is forgotten in the end."""
        matched = self._matched.pop(request_id, None)
        if matched is not None and not matched.request.params.cache_salt:
            self._ended.extend((*matched.request.token_ids, SEPARATOR))

    def forget_ended(self) -> None:
        """Forget the texts of all that have ended."""
        self._ended.clear()
        self._others = {max(self._others) + 1: Automaton()}

    def _remember(self) -> None:
        """Some more of what has ended."""
        newest = max(self._others)
        for _ in range(min(AT_ONCE, len(self._ended))):
            self._others[newest].add(self._ended.popleft())
        if len(self._others[newest].text) > self._remembered:
            self._others.pop(newest - 1, None)
            self._others[newest + 1] = Automaton()

    def close(self) -> None:
        """Nothing is held."""
