"""A request while it is in the engine: its text, its random stream, what its parameters must remember.

Turns one token after the other into outputs, and knows when to stop. Knows no batch and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from random import Random
from typing import Self

import torch
from torch import Tensor

from llmopt_cli.runtime.grammar import Constraint
from llmopt_cli.runtime.logits import NEVER, History, shape
from llmopt_cli.runtime.request import (
    NOT_NUMBERS,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    Tokens,
)
from llmopt_cli.runtime.sampler import sample, top_logprobs
from llmopt_cli.runtime.tokenizer import TextStream, Tokenizer


@dataclass(slots=True)
class Live:
    """A request, its text so far and its random stream. `prompt_logprobs` grows while the prompt is computed.

    `chances` are the distributions [drafts, V] from which its drafts were drawn, if they were.
    """

    request: Request
    text: TextStream
    stream: Random
    history: History
    max_model_len: int
    constraint: Constraint | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    shown: int = 0  # characters already handed out
    chances: Tensor | None = None
    shapes_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.shapes_logits = self.params.shapes_logits or self.constraint is not None

    @classmethod
    def start(
        cls, request: Request, tokenizer: Tokenizer, max_model_len: int, constraint: Constraint | None = None
    ) -> Self:
        """A request that has generated nothing yet."""
        params, prompt = request.params, request.token_ids
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *sorted(tokenizer.eos_ids))
        history = History(set(prompt) if params.repetition_penalty != 1 else set(), ends)
        return cls(
            request, TextStream(tokenizer, prompt, params.stop), Random(params.seed), history, max_model_len, constraint
        )

    @property
    def params(self) -> SamplingParams:
        """How to choose its tokens."""
        return self.request.params

    @property
    def most_drafts(self) -> int:
        """How many tokens can be drafted for it now: none while its prompt is computed, or for its last token."""
        request = self.request
        known, alone = len(request.token_ids), self.params.beams or self.params.kv_policy
        if known - request.num_computed != 1 or known == request.num_prompt or alone:
            return 0
        return max(0, min(self.params.max_tokens - (known - request.num_prompt), self.max_model_len - known) - 1)

    def take(self, token: int) -> RequestOutput:
        """One more token: text, end, output."""
        self.append(token)
        return self.output(1)

    def append(self, token: int) -> None:
        """One more token, maybe the last, without an output."""
        self.request.token_ids.append(token)
        if self.shapes_logits:  # nobody else asks what came
            self.history.add(token)
        complete = self.constraint is not None and self.constraint.accept(token)
        self.request.finish_reason = self._reason_to_stop(token) or (FinishReason.STOP if complete else None)

    def fail(self, error: str, num_new_tokens: int = 0) -> RequestOutput:
        """End without another token."""
        self.request.finish_reason = FinishReason.ERROR
        return self.output(num_new_tokens, error)

    def score(self, start: int, logits: Tensor) -> None:
        """`logits` (L, V) of the tokens from position `start` on: what they say of the prompt's tokens after them.

        A request that had to start again is scored once.
        """
        first = max(start, len(self.prompt_logprobs)) + 1
        tokens = self.request.token_ids[first : min(start + len(logits) + 1, self.request.num_prompt)]
        if tokens:
            rows = logits[first - 1 - start :][: len(tokens)]
            self.prompt_logprobs += top_logprobs(rows, tokens, [self.params.prompt_logprobs or 0] * len(tokens))

    def output(self, num_new_tokens: int, error: str | None = None) -> RequestOutput:
        """What there is so far, of which `num_new_tokens` are new."""
        request = self.request
        if request.finish_reason is not None:
            self.text.close()
        text = self.text.text
        delta, self.shown = text[self.shown :], len(text)
        return RequestOutput(  # by place: one is made for every token
            request.request_id,
            text,
            delta,
            Tokens(request.token_ids, request.num_prompt),
            num_new_tokens,
            request.num_prompt,
            request.finish_reason,
            request.num_hit or 0,
            request.cache_miss,
            error,
            tuple(self.logprobs),
            None if request.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )

    def _reason_to_stop(self, token: int) -> FinishReason | None:
        params, known = self.request.params, len(self.request.token_ids)
        generated = known - self.request.num_prompt
        # The stop token itself is never part of the text.
        if token in self.history.end_ids or self.text.push(token, generated >= params.min_tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if known >= self.max_model_len or generated >= params.max_tokens else None


def next_tokens(ready: Sequence[Live], logits: Tensor) -> list[RequestOutput]:
    """Choose the next token of every request from its row of `logits` float32 (N, V).

    A request whose logits are not numbers fails alone.
    """
    if not ready:
        return []
    raw, params = logits, [live.params for live in ready]
    logits, wrong = shaped(ready, logits)
    tokens = sample(logits, params, [live.stream for live in ready])
    wanted = [row for row, one in enumerate(params) if one.logprobs is not None]
    if wanted:
        counts = [params[row].logprobs or 0 for row in wanted]
        for row, found in zip(wanted, top_logprobs(raw[wanted], [tokens[row] for row in wanted], counts), strict=True):
            ready[row].logprobs.append(found)
    for row in broken(raw):
        wrong[row] = NOT_NUMBERS
    return [
        live.fail(wrong[row]) if row in wrong else live.take(token)
        for row, (live, token) in enumerate(zip(ready, tokens, strict=True))
    ]


def broken(logits: Tensor) -> list[int]:
    """The rows that hold no number to choose by: the maximum of a row with a NaN is NaN."""
    return [row for row, top in enumerate(logits.amax(-1).tolist()) if not isfinite(top)]


def shaped(ready: Sequence[Live], logits: Tensor) -> tuple[Tensor, dict[int, str]]:
    """The logits after bias, penalties and grammars, and what went wrong in which row."""
    rows = [row for row, live in enumerate(ready) if live.shapes_logits]
    if not rows:
        return logits, {}
    part = logits[rows]
    shape(part, [ready[row].params for row in rows], [ready[row].history for row in rows])
    wrong = {}
    for place, row in enumerate(rows):
        constraint = ready[row].constraint
        problem = constraint.mask(part[place]) if constraint else None
        if problem or bool(part[place].amax() == NEVER):
            wrong[row] = problem or "its parameters leave no token that may come"
    return logits.index_copy(0, torch.tensor(rows, device=logits.device), part), wrong
