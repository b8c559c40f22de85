"""A suffix automaton (Blumer et al. 1985): every substring of a growing text, found in time of its length.

Knows integers; neither requests nor tokens' meaning.
"""

from __future__ import annotations


class Automaton:
    """The smallest automaton of all suffixes of `text`, grown by one symbol at a time, in constant time on average.

    A state stands for substrings that end at the same places: `lengths` has the longest, `links` the state of its
    longest suffix that ends elsewhere too, `ends` the place behind one occurrence. State 0 is the empty string.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.lengths = [0]
        self.links = [-1]
        self.ends = [0]
        self.last = 0
        self._next: list[dict[int, int]] = [{}]

    def add(self, symbol: int) -> None:
        """One more symbol."""
        self.text.append(symbol)
        made = self._new(len(self.text), len(self.text), {})
        state = self.last
        while state >= 0 and symbol not in self._next[state]:
            self._next[state][symbol] = made
            state = self.links[state]
        self.links[made] = 0 if state < 0 else self._ending(state, symbol)
        self.last = made

    def _ending(self, state: int, symbol: int) -> int:
        """The state of exactly the longest string of `state` with `symbol` behind it: split off, if it is not alone."""
        target = self._next[state][symbol]
        if self.lengths[target] == self.lengths[state] + 1:
            return target
        split = self._new(self.lengths[state] + 1, self.ends[target], dict(self._next[target]))
        self.links[split], self.links[target] = self.links[target], split
        while state >= 0 and self._next[state].get(symbol) == target:
            self._next[state][symbol] = split
            state = self.links[state]
        return split

    def _new(self, length: int, end: int, following: dict[int, int]) -> int:
        self.lengths.append(length)
        self.links.append(0)
        self.ends.append(end)
        self._next.append(following)
        return len(self.lengths) - 1

    def repeated(self) -> tuple[int, int]:
        """(length of the longest suffix of the text that occurred before, the place behind an earlier occurrence).

        The occurrence returned is the one before this one, if this was asked after every symbol.
        """
        state = self.links[self.last] if self.text else 0
        if state <= 0:
            return 0, 0
        length, end = self.lengths[state], self.ends[state]
        self.ends[state] = len(self.text)
        return length, end

    def follow(self, state: int, length: int, symbol: int) -> tuple[int, int]:
        """(state, length) of the longest suffix that occurs here, of a string so matched and `symbol` behind it."""
        while state > 0 and symbol not in self._next[state]:
            state = self.links[state]
            length = self.lengths[state]
        target = self._next[state].get(symbol)
        return (0, 0) if target is None else (target, length + 1)
