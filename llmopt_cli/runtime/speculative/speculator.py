"""Speculation in the engine: who is drafted for before a step, and what the step taught.

Between a proposer, which guesses, and a controller, which decides how far; judging is `drafted`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.live import Live
from llmopt_cli.runtime.request import Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.controller import Controller, Times
from llmopt_cli.runtime.speculative.proposer import Proposer, Watching
from llmopt_cli.runtime.stats import Tally


class Speculator:
    """Drafts up to `most` tokens a request with `proposer`; always that many unless it may `adapt`."""

    def __init__(self, proposer: Proposer, most: int, adapt: bool = True) -> None:
        self.tally = Tally()
        self._proposer, self._most = proposer, most
        self._times, self._proposals = Times(), Times()
        self._controller = Controller(most, self._times, self._proposals) if adapt else None
        self._known: dict[str, Request] = {}
        self._live: Mapping[str, Live] = {}
        self._proposing = 0.0
        self._began = 0.0

    def draft(self, running: Sequence[Request], live: Mapping[str, Live], journal: Journal | None = None) -> None:
        """Before a step is planned: give those that decode what is to be verified in it. Beams are not `live`."""
        begun = time.perf_counter()
        self._live = live
        self._forget(live)
        here = [live[one.request_id] for one in running if one.request_id in live]
        for one in here:
            one.request.drafts = ()
            self._known[one.request.request_id] = one.request
        open_to = [one for one in here if one.most_drafts > 0]
        names = [one.request.request_id for one in open_to]
        wanted = self._controller.lengths(names) if self._controller else [self._most] * len(names)
        lengths = [min(one.most_drafts, length) for one, length in zip(open_to, wanted, strict=True)]
        if any(lengths):
            self._propose(open_to, lengths)
        for one in here if journal else ():
            if journal and one.request.drafts:
                journal.draft(one.request)
        self._began = time.perf_counter()
        self._proposing = self._began - begun

    def _propose(self, lives: Sequence[Live], lengths: Sequence[int]) -> None:
        found = self._proposer.propose([one.request for one in lives], lengths)
        for one, draft, length in zip(lives, found, lengths, strict=True):
            one.request.drafts, one.chances = draft.tokens[:length], draft.chances

    def _forget(self, live: Mapping[str, Live]) -> None:
        """Those that have ended since."""
        gone = [name for name, request in self._known.items() if name not in live or live[name].request is not request]
        for name in gone:
            del self._known[name]
            self._proposer.forget(name)
            if self._controller:
                self._controller.forget(name)

    @property
    def see(self) -> Callable[[Sequence[Chunk], Tensor], None] | None:
        """What is to be shown the hidden states (T, H) of every step, if the proposer drafts from them."""
        watching = self._proposer
        if not isinstance(watching, Watching):
            return None

        def show(chunks: Sequence[Chunk], hidden: Tensor) -> None:
            if all([chunk.request_id in self._live for chunk in chunks]):  # noqa: C419  beams would never be forgotten
                watching.see(chunks, hidden)

        return show

    def learn(self, chunks: Sequence[Chunk], outputs: Sequence[RequestOutput]) -> None:
        """After a step: what became of the drafts, and how long it took, if all that ran were decoding."""
        ran = {one.request_id: one for one in chunks if one.samples and one.length == one.drafts + 1}
        # A prompt's last token may run alone, too: it lies before the answer.
        decoded = [
            (output, ran[output.request_id].drafts)
            for output in outputs
            if output.request_id in ran and ran[output.request_id].start >= output.num_prompt_tokens
        ]
        for output, drafted in decoded:
            stood = min(drafted, output.num_new_tokens - 1)
            self.tally.add(drafted, stood)
            if self._controller and not output.finished:
                self._controller.verified(output.request_id, drafted, stood)
        if len(decoded) == len(chunks):
            emitted = sum(output.num_new_tokens for output, _ in decoded)
            self._time(len(chunks), sum(drafted for _, drafted in decoded), emitted)

    def _time(self, requests: int, drafted: int, emitted: int) -> None:
        """A step of decoding alone has ended."""
        running = time.perf_counter() - self._began
        self._times.add(requests + drafted, running)
        if drafted:
            self._proposals.add(drafted, self._proposing)
        self.tally.seconds += self._proposing + running
        self.tally.alone += emitted / requests * self._times.at(requests)
        if self._controller:
            self._controller.stepped(requests, drafted, self._proposing + running)

    def close(self) -> None:
        """Let go of what the proposer holds."""
        self._proposer.close()
