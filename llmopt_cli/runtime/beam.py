"""Beam search: which sequences go on, which have ended, and when none can become better.

The rules and the scores are those of transformers' `generate(num_beams=K)`, in float32. `BeamSearch` knows scores only;
`Beams` moves the requests that run them: a beam that goes on twice is forked, so that beams share the blocks of what
they have in common. Beams are ordinary requests to the scheduler: one that is ahead of the others is parked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt_cli.runtime.journal import Journal
from llmopt_cli.runtime.live import Live, broken
from llmopt_cli.runtime.request import NOT_NUMBERS, FinishReason, Hypothesis, Request, RequestOutput
from llmopt_cli.runtime.state import SchedulerState
from llmopt_cli.runtime.tokenizer import TextStream, Tokenizer

Continuations = tuple[Tensor, Tensor]  # log-probabilities float32 (C,) and tokens (C,) of what may follow, best first


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence that ended: its generated tokens, the last included."""

    score: float
    token_ids: tuple[int, ...]
    reason: FinishReason


@dataclass
class BeamSearch:
    """The search for `width` sequences of at most `max_tokens`, which any of `end_ids` ends.

    `ended` are the best so far, best first; `done` says that no running beam is expected to become better than them.
    """

    width: int
    length_penalty: float
    max_tokens: int
    end_ids: frozenset[int]
    scores: Tensor = field(default_factory=lambda: torch.zeros(1))  # of the running beams, float32
    ended: list[Ended] = field(default_factory=list)
    done: bool = False

    @property
    def count(self) -> int:
        """Continuations of each beam to look at: so many that `width` go on even if all others end."""
        return self.width * max(2, 1 + len(self.end_ids))

    def step(self, beams: Sequence[Sequence[int]], rows: Sequence[Continuations]) -> list[tuple[int, int]]:
        """Choose those that go on, as (index of the beam, next token), best first.

        `beams` are the tokens that each running one has generated, `rows` what may follow each.
        """
        sums = (torch.stack([values for values, _ in rows]) + self.scores[:, None]).flatten()
        best, where = sums.topk(min(self.count, len(sums)))
        per_beam = len(rows[0][0])
        candidates = [
            (place // per_beam, int(rows[place // per_beam][1][place % per_beam])) for place in where.tolist()
        ]
        length = len(beams[0]) + 1
        reasons = [self._reason(token, length) for _, token in candidates]
        penalized = (best / length**self.length_penalty).tolist()
        for (beam, token), reason, score in list(zip(candidates, reasons, penalized, strict=True))[: self.width]:
            if reason is not None:
                self.ended.append(Ended(score, (*beams[beam], token), reason))
        self.ended = sorted(self.ended, key=lambda one: -one.score)[: self.width]
        going = [place for place, reason in enumerate(reasons) if reason is None][: self.width]
        self.scores = best[going]
        full = len(self.ended) == self.width
        self.done = not going or (full and penalized[going[0]] <= self.ended[-1].score)
        return [candidates[place] for place in going]

    def _reason(self, token: int, length: int) -> FinishReason | None:
        if token in self.end_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self.max_tokens else None


@dataclass
class _Group:
    """One search and the requests that are its beams, in the order of `search.scores`; `rows` of those that ran."""

    live: Live
    search: BeamSearch
    beams: list[Request]
    rows: dict[str, Continuations] = field(default_factory=dict)
    born: int = 0


class Beams:
    """All beam searches of an engine, and the requests that run them."""

    def __init__(self, state: SchedulerState, tokenizer: Tokenizer) -> None:
        self._state = state
        self._tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}  # by the request that asked
        self._of: dict[str, _Group] = {}  # by each of its beams
        self.requests: dict[str, Request] = {}  # every beam by its id
        self.journal: Journal | None = None

    def start(self, live: Live) -> None:
        """Search for the request `live`, which was queued: it is the first beam."""
        request, params = live.request, live.params
        limit = min(params.max_tokens, live.max_model_len - request.num_prompt)
        search = BeamSearch(params.beams, params.length_penalty, limit, frozenset(live.history.end_ids))
        group = _Group(live, search, [request])
        self.requests[request.request_id] = request
        self._of[request.request_id] = self._groups[request.request_id] = group

    def take(self, names: Sequence[str], logits: Tensor) -> list[RequestOutput]:
        """Go on by the logits float32 (N, V) of the beams `names`; returns the outputs of searches that ended."""
        groups = {id(self._of[name]): self._of[name] for name in names}
        wrong = {id(self._of[names[row]]) for row in broken(logits)}
        logprobs = torch.log_softmax(logits, dim=-1)
        for row, name in enumerate(names):
            count = min(self._of[name].search.count, logits.shape[1])
            values, tokens = logprobs[row].topk(count)
            self._of[name].rows[name] = values.cpu(), tokens.cpu()
        outputs = []
        for key, group in groups.items():
            if key in wrong:
                outputs.append(self.fail(group.live, NOT_NUMBERS))
            elif len(group.rows) < len(group.beams):
                self._park([beam for beam in group.beams if beam.request_id in group.rows])
            elif (output := self._advance(group)) is not None:
                outputs.append(output)
        return outputs

    def owner(self, name: str) -> str:
        """The request that asked for the beam `name`."""
        return self._of[name].live.request.request_id

    def fail(self, live: Live, error: str) -> RequestOutput:
        """End a search without a result."""
        self.drop(live)
        return live.fail(error)

    def drop(self, live: Live) -> None:
        """Take a search and its beams out, wherever they are."""
        for beam in self._groups.pop(live.request.request_id).beams:
            self._drop(beam)

    def _advance(self, group: _Group) -> RequestOutput | None:
        """All beams are computed: choose, and let requests follow."""
        beams = group.beams
        for beam in beams:
            if beam in self._state.parked:
                self._state.resume(beam)
                self._log("resume", beam.request_id)
        moves = group.search.step([beam.output_ids for beam in beams], [group.rows[b.request_id] for b in beams])
        group.rows.clear()
        if group.search.done:
            self.drop(group.live)
            return self._output(group)
        kept = {index for index, _ in moves}
        for index, beam in enumerate(beams):
            if index not in kept:
                self._drop(beam)
        group.beams = []
        for index, _ in moves:  # forked first: what is forked has the tokens of before
            again = beams[index] in group.beams
            group.beams.append(self._fork(group, beams[index]) if again else beams[index])
        for beam, (_, token) in zip(group.beams, moves, strict=True):
            beam.token_ids.append(token)
            if self.journal:
                self.journal.take(beam.request_id, [token], finished=False)
        return None

    def _fork(self, group: _Group, parent: Request) -> Request:
        group.born += 1
        root = group.live.request
        name = f"{root.request_id}/{group.born}"
        child = Request(name, list(parent.token_ids), root.num_prompt, root.params, salt=root.salt)
        child.priority, child.deadline = root.priority, root.deadline
        self._state.fork(parent, child)
        self._log("fork", name, parent.request_id)
        self.requests[name] = child
        self._of[name] = group
        return child

    def _park(self, beams: Sequence[Request]) -> None:
        for beam in beams:
            if beam in self._state.running:
                self._state.park(beam)
                self._log("park", beam.request_id)

    def _drop(self, beam: Request) -> None:
        self._state.drop(beam)
        del self.requests[beam.request_id], self._of[beam.request_id]
        if self.journal:
            self.journal.drop(beam.request_id)

    def _log(self, event: str, name: str, parent: str | None = None) -> None:
        if self.journal:
            self.journal.move(event, name, parent)

    def _output(self, group: _Group) -> RequestOutput:
        """The last output of a search: its best sequence, and all of them."""
        live, prompt = group.live, group.live.request.token_ids[: group.live.request.num_prompt]
        found = []
        for one in group.search.ended:
            text = TextStream(self._tokenizer, prompt, ())
            for token in one.token_ids[: -1 if one.reason is FinishReason.STOP else None]:
                text.push(token)
            text.close()
            found.append(Hypothesis(text.text, one.token_ids, one.score, one.reason))
        best, request = found[0], live.request
        return RequestOutput(
            request_id=request.request_id,
            text=best.text,
            delta=best.text,
            token_ids=best.token_ids,
            num_new_tokens=len(best.token_ids),
            num_prompt_tokens=request.num_prompt,
            finish_reason=best.finish_reason,
            num_cached_tokens=request.num_hit or 0,
            cache_miss=request.cache_miss,
            beams=tuple(found),
        )
