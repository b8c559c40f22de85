"""Speculation in the engine: who is drafted for before a step, and what the step taught.

Between a proposer, which guesses, and a controller, which decides how far; judging is `drafted`'s business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.live import Live
from llmopt_cli.runtime.request import Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.controller import Controller
from llmopt_cli.runtime.speculative.proposer import Proposer, Remembering, Watching
from llmopt_cli.runtime.speculative.times import Clocks
from llmopt_cli.runtime.stats import Tally

FEWER = 0.8  # of the requests are left: then what was decided is asked again


class Speculator:
    """Drafts up to `most` tokens a request with `proposer`; always that many unless it may `adapt`.

    While nothing is drafted, most steps take no longer with it, however many requests run.
    """

    def __init__(self, proposer: Proposer, most: int, adapt: bool = True) -> None:
        self.tally = Tally()
        self._proposer, self._most = proposer, most
        self._watching = proposer if isinstance(proposer, Watching) else None
        self._clocks = Clocks(proposer.in_turn)
        self._controller = Controller(most, self._clocks) if adapt else None
        self._known: dict[str, Request] = {}
        self._live: Mapping[str, Live] = {}
        self._asked: dict[str, int] = {}  # tokens that were to be drafted, if any, by request
        self._guessed: dict[str, tuple[int, tuple[int, ...]]] = {}  # from where on, and what was proposed
        self._ready: set[str] = set()  # those with whom the proposer is up to date
        self._unseen: deque[tuple[Sequence[Chunk], Tensor]] = deque()
        self._waiting = 0  # tokens in it
        self._began = self._proposing = 0.0
        self._spent = 0.0  # seconds of all steps
        self._slept = 0.0  # of those in which nobody was asked, since the last count
        self._rest = self._rested = 0  # steps in which nothing is drafted and nobody asked: still, and so far
        self._few = 0.0  # requests left for which that is over
        self._resting = self._refused = False  # refused: of those that were to be drafted for, one was not

    def draft(self, running: Sequence[Request], live: Mapping[str, Live], journal: Journal | None = None) -> None:
        """Before a step is planned: give those that decode what is to be verified in it. Beams are not `live`."""
        if self._rest > 0 and len(running) >= self._few:
            self._rest, self._rested, self._resting = self._rest - 1, self._rested + 1, True
            return
        self._began, self._asked, self._rest, self._resting = time.perf_counter(), {}, 0, False
        slept, self._rested = self._rested * self._clocks.alone(len(running)), 0
        self._slept, self._spent = self._slept + slept, self._spent + slept
        self._live = live
        self._forget(live)
        self._compare()
        here = [live[one.request_id] for one in running if one.request_id in live]
        open_to = [(one, most) for one in here if (most := one.most_drafts) > 0]
        for one in here:
            one.request.drafts = ()
        names = [one.request.request_id for one, _ in open_to]
        wanted = self._lengths(names, len(running))
        if any(wanted):
            self._propose([(one, min(most, each)) for (one, most), each in zip(open_to, wanted, strict=True)])
        for one in here if journal else ():
            if journal and one.request.drafts:
                journal.draft(one.request)
        self._proposing = time.perf_counter() - self._began

    def _lengths(self, names: Sequence[str], batch: int) -> list[int]:
        """How many tokens to draft for each of those for whom that can be done."""
        if self._controller is None:
            return [self._most] * len(names)
        return self._controller.lengths(names, batch, self._spent)

    def _propose(self, wanted: Sequence[tuple[Live, int]]) -> None:
        """Ask for so many tokens of each."""
        self._show()
        requests, lengths = [one.request for one, _ in wanted], [length for _, length in wanted]
        found = self._proposer.propose(requests, lengths)
        comparing = self._controller is not None and self._controller.comparing
        self._refused = any(length and not draft.tokens for length, draft in zip(lengths, found, strict=True))
        for (one, length), draft in zip(wanted, found, strict=True):
            if not length:
                continue
            request, tokens = one.request, draft.tokens[:length]
            self._asked[request.request_id], self._known[request.request_id] = length, request
            if self._controller:
                self._controller.proposed(request.request_id, length, len(tokens))
                self._controller.recalled(request.request_id, draft.recalled)
            if comparing and tokens:
                self._guessed[request.request_id] = (request.num_tokens, tokens)
            elif not comparing:
                request.drafts, one.chances = tokens, draft.chances

    def _compare(self) -> None:
        """What would have become of drafts that nobody verified, as far as it came."""
        for name, (start, tokens) in list(self._guessed.items()):
            came = self._live[name].request.token_ids[start : start + len(tokens)] if name in self._live else None
            if came is not None and len(came) < len(tokens):
                continue
            del self._guessed[name]
            if came is not None and self._controller:
                stood = next((place for place, token in enumerate(came) if token != tokens[place]), len(came))
                self._controller.verified(name, len(tokens), stood, compared=True)

    def _forget(self, live: Mapping[str, Live]) -> None:
        """Those that have ended since."""
        gone = [name for name, request in self._known.items() if name not in live or live[name].request is not request]
        for name in gone:
            del self._known[name]
            self._guessed.pop(name, None)
            self._proposer.forget(name)
            if self._controller:
                self._controller.forget(name)

    @property
    def see(self) -> Callable[[Sequence[Chunk], Tensor], None] | None:
        """What is to be given the hidden states (T, H) of the step that comes, if the proposer may draft from them."""
        return self._see if self._watching and self._rest <= self._watching.unseen else None

    def _see(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Keep them until a draft is wanted: the latest of so many tokens, and never less than those of one step."""
        assert self._watching is not None
        self._unseen.append((chunks, hidden))
        self._waiting += len(hidden)
        while self._waiting > self._watching.unseen and len(self._unseen) > 1:
            self._waiting -= len(self._unseen.popleft()[1])

    def _show(self) -> None:
        """Let the proposer see what it has not, of those that are still here; beams would never be forgotten."""
        if self._watching is None:
            return
        for chunks, hidden in self._unseen:
            here = [chunk.request_id in self._live for chunk in chunks]
            if not all(here):
                parts = torch.split(hidden, [chunk.length for chunk in chunks])
                hidden = torch.cat([part for part, kept in zip(parts, here, strict=True) if kept] or [hidden[:0]])
                chunks = [chunk for chunk, kept in zip(chunks, here, strict=True) if kept]
            self._watching.see(chunks, hidden)
            for chunk in chunks:
                self._known[chunk.request_id] = self._live[chunk.request_id].request
        self._unseen.clear()
        self._waiting = 0

    def learn(self, chunks: Sequence[Chunk], outputs: Sequence[RequestOutput]) -> None:
        """After a step: what became of the drafts, and how long it took, if all that ran were decoding."""
        decoded = [one for one in outputs if len(one.token_ids) > one.num_new_tokens]  # a prompt's last token is none
        if self._resting:
            self.tally.add_plain(len(decoded))
            return
        whole, drafted = time.perf_counter() - self._began, 0
        self._spent += whole
        if self._asked or any([one.drafts for one in chunks]):  # noqa: C419  a list is the faster one
            drafts = {one.request_id: one.drafts for one in chunks}
            drafted = sum(drafts.values())
            self._count(drafts, decoded)
        else:
            self.tally.add_plain(len(decoded))
        caught_up = self._ready.issuperset(self._asked)  # else there was more to do, and less for those left out
        if self._asked and caught_up and not (self._clocks.in_turn and self._refused):
            self._clocks.add_proposal(len(self._asked), max(self._asked.values()), self._proposing)
        if len(decoded) == len(chunks) and sum([one.length for one in chunks]) == len(chunks) + drafted:
            self._time(len(chunks), drafted, sum([one.num_new_tokens for one in decoded]), whole)
        elif self._controller and decoded:
            self._controller.stepped(len(decoded), drafted, None, self._proposing)
        if self._controller and decoded:
            self._rest, self._few = self._controller.rest(len(chunks)), FEWER * len(chunks)
        self._ready = set() if self._rest else set(self._asked)

    def _count(self, drafts: Mapping[str, int], decoded: Sequence[RequestOutput]) -> None:
        """Count the drafts that stood."""
        for output in decoded:
            drafted = drafts.get(output.request_id, 0)
            stood = min(drafted, output.num_new_tokens - 1)
            self.tally.add(drafted, stood)
            if self._controller and drafted and not output.finished:
                self._controller.verified(output.request_id, drafted, stood)

    def _time(self, requests: int, drafted: int, emitted: int, whole: float) -> None:
        """A step of decoding alone took `whole` seconds."""
        clocks = self._clocks
        clocks.add_step(requests, drafted, whole - self._proposing)
        if clocks.knows(requests):
            self.tally.seconds += whole + self._slept
            self.tally.alone += emitted / requests * clocks.alone(requests) + self._slept
            self._slept = 0.0
        if self._controller:
            self._controller.stepped(requests, drafted, whole, self._proposing)

    def forget_ended(self) -> None:
        """Forget what requests that ended have left; what was learnt about drafting stays."""
        self._forget(self._live)
        if isinstance(self._proposer, Remembering):
            self._proposer.forget_ended()

    def close(self) -> None:
        """Let go of what the proposer holds."""
        self._unseen.clear()
        self._proposer.close()
