"""How many tokens to draft, from what was measured: none where it seems to lose, now and then a few to see if it wins.

Pure arithmetic on acceptance and times; the clock is the caller's. Knows no model, no proposer and no request's text.

A draft of k tokens, each of which stands with chance a, brings a + a^2 + ... + a^k tokens more (Leviathan et al., arXiv
2211.17192); here each place has its own a, for whoever is right about a token is likelier right about the next. Tokens
are taken by the chance that all up to them stand, of all requests together. What a step takes is known for every number
of tokens that was seen, and so is what proposing takes.

Where nothing is drafted, drafts are still proposed now and then and compared with what comes: nobody has to verify them
to find out that they would stand. What seems worse is tried in earnest, too, as often as may be lost on it: without,
nobody would notice that times have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from llmopt_cli.runtime.speculative.times import Clocks

MEMORY, MEMORY_OF_ALL = 0.96, 0.98  # of a mean that is kept when something new is measured: a request's, everybody's
FOUND, AGAIN = 0.99, 0.5  # of whether there is anything to propose: at times, or again and again from now on
PRIOR, GUESSED = 0.7, 4  # the chance that a token of a first draft stands: as if so many had told
LOWEST, HIGHEST = 0.02, 0.98  # chances are kept between
FLOORS = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1)  # a token is drafted if the chance that all up to it stand is at least this
TRYING, MORE = 0.0015, 0.02  # of the time may be lost on trying what seems worse; more, by how often drafts won lately
LATELY, BEFORE = 0.998, 0.95  # how much of how often that was is kept at a step with drafts, at others looked at
LEAST = 0.01  # of a step that trying takes, whatever was measured
COMPARED = 4  # tokens of drafts that are only compared, of so many requests at once if that takes less than a step
AT_ONCE = 8
EARNEST = 8  # of so many tries one is in earnest,
HOPELESS, DESPAIR = 0.7, 0.8  # unless it promises less than so much, or that times a factor for each time it did
BEGIN, STAY = 1.25, 1.08  # what drafts must promise, where there are none and where there are: the best is overrated
LESSONS, LESSON = 80.0, 4  # time at first, in steps without drafts: one request is drafted for, or none, in turns
DOUBT = 0.1  # more of the time may be lost on trying, divided by how much has told what drafts are worth
TRUTH = 0.995  # of the means that are kept of what drafts promise and bring
LONGEST = 3.0  # times what was expected that a step with drafts may take: more says nothing of the next
PAUSED = 10.0  # times a step without drafts: what takes longer was a pause of the machine
PAUSE = 3  # steps without drafts where some win: the first one is slower, whatever comes after something else is
LASTS = 4  # steps for which what was decided lasts
NAP = 64  # steps at most in which nothing is asked


@dataclass(slots=True)
class _Chance:
    """How often something was so: the mean of all that `told` where few did, of the latest where many did."""

    mean: float = PRIOR
    told: int = GUESSED

    def learn(self, right: float, memory: float, count: int = 1) -> None:
        """Of `count` more this share was right."""
        kept = min(memory**count, self.told / (self.told + count))
        self.mean = _kept(kept * self.mean + (1 - kept) * right)
        self.told += count


@dataclass(slots=True)
class _Habit:
    """How often a request's drafted tokens stand where those before do, by place; how much there is of a draft, too.

    Lately, and again and again.
    """

    stands: list[_Chance]
    found: _Chance
    again: float = 0.0

    @property
    def likely(self) -> float:
        """How much of the next draft there will be."""
        return max(self.found.mean, self.again)

    def copy(self) -> _Habit:
        """That of someone new."""
        return _Habit([*map(copy, self.stands)], copy(self.found))


@dataclass(slots=True)
class _Truth:
    """How much of what is promised comes true, of late: those that promise most are those that err most."""

    promised: float = 1.0
    came: float = 1.0

    def learn(self, promised: float, came: float) -> None:
        """One more promise, and what came of it."""
        self.promised = TRUTH * self.promised + (1 - TRUTH) * promised
        self.came = TRUTH * self.came + (1 - TRUTH) * came

    def share(self, least: float = 0.3, most: float = 1.0) -> float:
        """Of the next promise."""
        return min(max(self.came / self.promised, least), most)


class Controller:
    """Decides for all requests that decode together. `most` is the longest draft.

    `comparing` says that the drafts of the last answer are not to be verified, but compared with what comes.
    """

    def __init__(self, most: int, clocks: Clocks) -> None:
        self.most = most
        self.comparing = False
        self._clocks = clocks
        self._habits: dict[str, _Habit] = {}
        self._usual = _Habit([_Chance() for _ in range(most)], _Chance(1.0, 1))
        self._cap = min(2, most)  # drafts grow while they win
        self._held: dict[str, int] = {}
        self._left = 0  # steps for which what is held still holds
        self._clock, self._batch = 0.0, 0
        self._drafting = False  # whether what is held is to draft, for any of those that run
        self._try_at = 0.0  # when what seems worse is tried again
        self._lessons = LESSONS
        self._tries = self._turn = self._earnest = 0  # the last: steps that are left of a try in earnest
        self._at_once = 1  # requests that were compared, the last time
        self._compared = 0.0  # seconds that it took to compare, the last time
        self._lately = 0.0  # how much was drafted, 0 to 1
        self._hopeless = HOPELESS
        self._trying = False
        self._pause = 0  # steps of trying without that are left
        self._news = True  # since the last decision
        self._gain = 1.0  # that the drafts that are held promised
        self._standing, self._finding, self._lasting = _Truth(), _Truth(), _Truth()
        self._forecast = 0.0  # seconds of a step with the drafts that are held

    def lengths(self, requests: Sequence[str], batch: int, now: float) -> list[int]:
        """How many tokens to draft for each; all zero where that is best. `now` counts the seconds of all steps.

        `batch` counts all that run, those that can't be drafted for, too.
        """
        self.comparing, self._clock, self._batch, self._drafting = False, now, batch, False
        if not requests or not self._clocks.knows(batch):
            return [0] * len(requests)  # what it takes without drafts comes first
        if self._lessons > 0:
            return self._lesson(requests)
        self._left -= 1
        if self._left < 0 and (self._news or not self._held.keys() >= set(requests)):
            self._decide(requests)
        found = [self._held.get(name, 0) for name in requests]
        self._drafting = any(found)
        self._pause = self._pause if self._drafting else 0
        if self._drafting and (self._pause or now >= self._try_at):
            self._pause = (self._pause or PAUSE) - 1
            self._news, self._trying = self._pause == 0, True
            return [0] * len(found)
        if not self._drafting and (self._earnest or now >= self._try_at):
            self._left, self._trying = 0, True
            return self._try(requests)
        return found

    def _lesson(self, requests: Sequence[str]) -> list[int]:
        """A draft for one or for none; these end early where drafts seem hopeless."""
        self._tries, self._trying = self._tries + 1, True
        known = self._tries % (2 * LESSON) == 0 and self._clocks.proposing(1, 1)
        if known and self._best(requests)[0] < HOPELESS:
            self._lessons = 0.0
        drafted = 0 if self._tries // LESSON % 2 else min(COMPARED, self.most)
        return [drafted, *[0] * (len(requests) - 1)]

    def _decide(self, requests: Sequence[str]) -> None:
        """Hold what is best for some steps."""
        drafted = any(self._held.values())
        self._gain, lengths = self._best(requests)
        if self._gain < (STAY if drafted else BEGIN):
            self._gain, lengths = 1.0, [0] * len(requests)
        if drafted != any(lengths):  # something else is to be tried from now on
            self._earnest = 0
            alone = self._clocks.alone(self._batch)
            lost = self._compared if drafted else PAUSE * (self._gain - 1) * alone
            self._try_at = self._clock + max(lost, LEAST * alone) / self._share()
        self._held = dict(zip(requests, lengths, strict=True))
        self._left, self._news = LASTS - 1, False
        if max(lengths) == self._cap:
            self._cap = min(2 * self._cap, self.most)

    def _try(self, requests: Sequence[str]) -> list[int]:
        """Drafts where none seem best."""
        if self._earnest:
            self._earnest -= 1
            return self._best(requests)[1]
        self._tries += 1
        if self._tries % EARNEST == 0:
            promised, best = self._best(requests)
            self._hopeless = HOPELESS if promised > self._hopeless else DESPAIR * self._hopeless
            if self._hopeless == HOPELESS:
                self._earnest = LESSON - 1  # the first step does not tell how long they take
                return best
        self.comparing = True
        count, length, spare = len(requests), min(COMPARED, self.most), self._clocks.alone(self._batch)
        several = min(AT_ONCE, count)
        while several > 1 and self._clocks.proposing(several, length) > spare:
            several -= 1
        chosen = {(self._turn + index) % count for index in range(several)}
        self._turn, self._at_once = self._turn + several, several
        return [length if index in chosen else 0 for index in range(count)]

    def _best(self, requests: Sequence[str]) -> tuple[float, list[int]]:
        """The drafts that promise most, and how much faster than none they are."""
        batch, lengths = self._batch, [0] * len(requests)
        if not self._clocks.proposing(1, 1):
            return 0.0, lengths  # what it takes to propose comes first, too
        places = self._places(requests)
        best, taken, brought, drafted, end = 0.0, lengths, 0.0, 0.0, 0
        for floor in FLOORS:
            while end < len(places) and places[end][0] >= floor:
                standing, found, index = places[end]
                brought, drafted, end = brought + standing * found, drafted + found, end + 1
                lengths[index] += 1
            seconds = self._seconds(drafted, lengths)
            rate = (batch + self._standing.share() * brought) / (self._lasting.share(1.0, LONGEST) * seconds)
            if end and rate > best:
                best, taken, self._forecast = rate, lengths.copy(), seconds
        return best * self._clocks.alone(batch) / batch, taken

    def _places(self, requests: Sequence[str]) -> list[tuple[float, float, int]]:
        """All that may be drafted, the likeliest first: the chances that it stands and is found, and for whom."""
        places, there = [], self._finding.share()
        for index, name in enumerate(requests):
            habit, standing = self._habits.get(name, self._usual), 1.0
            found = there * habit.likely
            for chance in habit.stands[: self._cap]:
                standing *= chance.mean
                if standing < FLOORS[-1]:
                    break
                places.append((standing, found, index))
        places.sort(reverse=True)
        return places

    def _seconds(self, drafted: float, lengths: Sequence[int]) -> float:
        """A step takes in the mean with so many tokens drafted, of so many asked for each request."""
        alone, asked = self._clocks.alone(self._batch), len(lengths) - lengths.count(0)
        tokens = max(lengths) if asked == 1 else max(1, round(drafted))  # one request gets all of them or none
        more = max(0.0, self._clocks.drafted(self._batch, tokens) - alone)
        return alone + min(1.0, drafted / tokens) * more + self._clocks.proposing(asked, max(lengths))

    def stepped(self, requests: int, drafted: int, seconds: float | None, proposing: float) -> None:
        """A step of so many requests, with `drafted` tokens beside theirs, took so long, of that `proposing`.

        None where there was something else in it: that tells nothing of what drafts take.
        """
        self._lately = 1 - LATELY * (1 - self._lately) if drafted else BEFORE * self._lately
        alone = self._clocks.alone(requests)
        took = min(alone + proposing if seconds is None else seconds, PAUSED * alone)
        now = self._clock + took
        if self._drafting or drafted:
            lost = PAUSE * (self._gain - 1) * alone if self._drafting else took - alone
            measured = seconds is not None and self._lessons <= 0 and self._forecast > 0
            if measured and self._drafting != self._trying:  # held, or tried in earnest
                # Where some numbers of tokens are very dear, steps take longer than with the mean number.
                self._lasting.learn(1.0, min(took / self._forecast, LONGEST))
            pause = max(lost, LEAST * alone) / self._share()
            if self._drafting and (self._trying or not drafted):
                self._try_at = max(self._try_at, now + pause)
            elif not self._drafting and self._lessons <= 0:
                self._try_at = max(self._try_at, now) + pause
        elif self.comparing or (self._trying and self._lessons <= 0):  # or there was nothing to propose
            self._compared = min(proposing, max(PAUSED * alone, 2 * self._compared))
            self._try_at = max(self._try_at, now) + max(self._compared, LEAST * alone) / self._share()
        self._news = self._news or bool(drafted)
        if self._trying and self._lessons > 0:
            self._lessons -= max(1.0, took / alone)
        self._trying = False
        if not self._clocks.proposing(1, 1):
            self._try_at = 0.0  # the first time there was more to do: once more

    def rest(self, requests: int) -> int:
        """For how many steps of as many requests nothing is to be drafted, nor anything to be asked."""
        alone = self._clocks.alone(requests)
        if self._drafting or self._news or self._lessons > 0 or not alone:
            return 0
        return min(NAP, max(0, int((self._try_at - self._clock) / alone)))

    def _share(self) -> float:
        """Of the time that may be lost on trying."""
        return TRYING + MORE * self._lately + DOUBT / max(self._usual.stands[0].told, self._usual.found.told)

    def proposed(self, name: str, asked: int, drafted: int) -> None:
        """For a request there were so many tokens of those asked for."""
        own, share = self._own(name), drafted / asked
        if not self.comparing:
            self._finding.learn(own.likely, share)
        own.again = AGAIN * own.again + (1 - AGAIN) * share
        own.found.learn(share, FOUND)
        self._usual.found.learn(share, FOUND)
        self._news = self._news or drafted > 0 or not self.comparing

    def verified(self, name: str, drafted: int, stood: int, compared: bool = False) -> None:
        """Of a request's draft so many tokens stood; those behind the first that did not say nothing."""
        if not drafted:
            return
        own = self._own(name)
        self._standing.learn(sum(accumulate([chance.mean for chance in own.stands[:drafted]], mul)), stood)
        # Comparing is seldom, so that much may have changed since; but those compared at once are of one mind.
        of_all = 1 - (1 - MEMORY) / self._at_once if compared else MEMORY_OF_ALL
        for index in range(min(stood + 1, drafted)):
            for one, memory in ((own, MEMORY), (self._usual, of_all)):
                one.stands[index].learn(index < stood, memory)
        self._news = True

    def recalled(self, name: str, places: Sequence[tuple[int, int]]) -> None:
        """Of drafts that nobody asked for so many tokens would have been judged at each place, and so many stood."""
        own = self._own(name)
        for index, (judged, right) in enumerate(places[: self.most]):
            for one, memory in ((own, MEMORY), (self._usual, MEMORY_OF_ALL)):
                one.stands[index].learn(right / max(1, judged), memory, judged)
            self._news = self._news or judged > 0

    def _own(self, name: str) -> _Habit:
        """That of a request, from now on."""
        found = self._habits.get(name)
        if found is None:
            found = self._habits[name] = self._usual.copy()
        return found

    def forget(self, name: str) -> None:
        """A request has ended."""
        self._habits.pop(name, None)
        self._held.pop(name, None)


def _kept(chance: float) -> float:
    return min(max(chance, LOWEST), HIGHEST)
