"""The requests in the engine, each with its answer so far, and what the logits of a step make of them.

Knows who waits for whose prompt and which requests are beams; nothing of how logits are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from llmopt_cli.runtime.beam import Beams
from llmopt_cli.runtime.compression.change import Change
from llmopt_cli.runtime.drafted import verified_tokens
from llmopt_cli.runtime.grammar import Constraint
from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.live import Live, next_tokens
from llmopt_cli.runtime.request import TIME_UP, Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.state import SchedulerState
from llmopt_cli.runtime.tokenizer import Tokenizer


class Answers:
    """All requests of an engine by id: `live`. Tells the `journal`, if there is one, what happens to them."""

    def __init__(self, state: SchedulerState, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.live: dict[str, Live] = {}
        self.journal: Journal | None = None
        self._state = state
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._beams = Beams(state, tokenizer)
        self._twins: dict[str, list[str]] = {}  # who waits for whose prompt

    def record(self, journal: Journal) -> None:
        """Tell `journal` from now on."""
        self.journal = self._beams.journal = journal

    def start(self, request: Request, constraint: Constraint | None) -> None:
        """Queue a request."""
        context = request.params.context(self._max_model_len)
        live = self.live[request.request_id] = Live.start(request, self._tokenizer, context, constraint)
        self._state.add(request)
        if self.journal:
            self.journal.add(request)
        if request.params.beams:
            self._beams.start(live)
        if request.twin in self.live:
            parent = self.live[request.twin].request
            assert parent.token_ids[: parent.num_prompt] == request.token_ids, "twins have the same prompt"
            assert parent.salt == request.salt, "twins may share what is cached"
            self._twins.setdefault(request.twin, []).append(request.request_id)

    def requests(self, chunks: Sequence[Chunk | Change]) -> dict[str, Request]:
        """What the scheduler knows by the names of those that run: requests, or beams of one."""
        live, beams = self.live, self._beams.requests
        if not beams:
            return {chunk[0]: live[chunk[0]].request for chunk in chunks}
        names = [chunk.request_id for chunk in chunks]
        return {name: beams[name] if name in beams else live[name].request for name in names}

    def drop(self, name: str) -> None:
        """Take a request out, wherever it is; an unknown one has ended already."""
        live = self.live.pop(name, None)
        if live is None:
            return
        self._twins.pop(name, None)
        if live.params.beams:
            self._beams.drop(live)
            return
        self._state.drop(live.request)
        if self.journal:
            self.journal.drop(name)

    def end_late(self, names: Sequence[str]) -> list[RequestOutput]:
        """Let requests fail whose deadline came; beams of one search have the same."""
        owners = [self._beams.owner(name) if name in self._beams.requests else name for name in names]
        ended = []
        for name in dict.fromkeys(owners):
            self._twins.pop(name, None)
            live = self.live.pop(name)
            ended.append(self._beams.fail(live, TIME_UP) if live.params.beams else live.fail(TIME_UP))
        return ended

    def take(self, chunks: Sequence[Chunk], logits: Tensor) -> list[RequestOutput]:
        """Go on with all that was computed to its end, by the rows of `logits` float32 (N, V) of a step.

        The requests of outputs that are finished are still `live`, and in the scheduler's state.
        """
        found: list[RequestOutput] = []
        if any([chunk.drafts for chunk in chunks]):  # noqa: C419  a list is the faster one
            found, chunks, logits = self._take_drafted(chunks, logits)
        names, logits = self._score_prompts(chunks, logits)
        if self._beams.requests:
            mine = [row for row, name in enumerate(names) if name in self._beams.requests]
            rest = [row for row, name in enumerate(names) if name not in self._beams.requests]
            found += self._beams.take([names[row] for row in mine], logits[mine])
            names, logits = [names[row] for row in rest], logits[rest]
        if self._twins:
            names, logits = self._with_twins(names, logits)
        return found + next_tokens([self.live[name] for name in names], logits)

    def _take_drafted(self, chunks: Sequence[Chunk], logits: Tensor) -> tuple[list[RequestOutput], list[Chunk], Tensor]:
        """The outputs of those with drafts, and of others that can be judged with them; the rest, and their rows."""
        judged = [chunk.drafts > 0 or self._is_greedy(chunk) for chunk in chunks]
        lives = [self.live[chunk.request_id] for chunk in itertools.compress(chunks, judged)]
        counts = [chunk.num_logits for chunk in itertools.compress(chunks, judged)]
        if sum(counts) == len(logits):
            return verified_tokens(lives, counts, logits), [], logits[:0]
        rows = {True: list[int](), False: list[int]()}
        ends = itertools.accumulate(chunk.num_logits for chunk in chunks)
        for chunk, end, mine in zip(chunks, ends, judged, strict=True):
            rows[mine] += range(end - chunk.num_logits, end)
        left = [chunk for chunk, mine in zip(chunks, judged, strict=True) if not mine]
        return verified_tokens(lives, counts, logits[rows[True]]), left, logits[rows[False]]

    def _is_greedy(self, chunk: Chunk) -> bool:
        """Whether what comes next for a request is what its row finds likeliest, and nobody else waits for that."""
        live = self.live.get(chunk.request_id)  # None for a beam
        alone = live is not None and live.params.temperature == 0 and not live.params.beams
        return alone and chunk.samples and not chunk.scored and chunk.request_id not in self._twins

    def end(self, outputs: Sequence[RequestOutput]) -> bool:
        """Note what requests got, and let those go of which it was the last; whether there were any."""
        if self.journal:
            self._note(outputs, self.journal)
        finished = [output for output in outputs if output.finish_reason is not None]
        for output in finished:
            live = self.live.pop(output.request_id)
            # What a failure computed is not to be found by others; beams are gone already.
            (self._state.release if output.error or output.beams else self._state.finish)(live.request)
        return bool(finished)

    def _note(self, outputs: Sequence[RequestOutput], journal: Journal) -> None:
        for output in outputs:
            name = output.request_id
            live = self.live[name]
            if live.params.beams:
                continue
            if output.error:
                journal.drop(name)
            else:
                journal.take(name, live.request.token_ids[-output.num_new_tokens :], output.finished)

    def _with_twins(self, names: list[str], logits: Tensor) -> tuple[list[str], Tensor]:
        """Let those who wait for a prompt that is now computed begin: they draw from its row."""
        rows = {name: row for row, name in enumerate(names)}
        for name in names:
            for child in self._twins.pop(name, ()):
                live, twin = self.live[name], self.live.get(child)
                if twin is None or twin.request.blocks:
                    continue  # gone, or it began by itself
                alike = live.request.num_tokens == twin.request.num_tokens == live.request.num_prompt
                if alike and self._state.fork(live.request, twin.request):
                    twin.prompt_logprobs = list(live.prompt_logprobs)
                    rows[child] = rows[name]
                    if self.journal:
                        self.journal.move("fork", child, name)
        return list(rows), logits[list(rows.values())]

    def _score_prompts(self, chunks: Sequence[Chunk], logits: Tensor) -> tuple[list[str], Tensor]:
        """Take out the rows that score prompts; returns who samples, and their rows."""
        if not any([chunk.scored for chunk in chunks]):  # noqa: C419  a list is the faster one
            return [chunk.request_id for chunk in chunks if chunk.samples], logits
        ready: list[str] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            if chunk.scored:
                self.live[chunk.request_id].score(chunk.start, logits[row : row + chunk.length])
            row += chunk.num_logits
            if chunk.samples:
                ready.append(chunk.request_id)
                rows.append(row - 1)
        return ready, logits[rows] if len(rows) < len(logits) else logits
