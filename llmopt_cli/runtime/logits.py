"""What a request's parameters do to its logits before a token is chosen: bias, penalties, what may not come yet.

Works on the rows of requests that ask for something, in float32, in place. Knows neither drawing nor the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmopt_cli.runtime.request import SamplingParams

NEVER = float("-inf")


@dataclass(slots=True)
class History:
    """The tokens of one request, counted: which occurred at all, and how often each was generated.

    `end_ids` are the tokens that would end it.
    """

    seen: set[int]
    end_ids: tuple[int, ...] = ()
    generated: Counter[int] = field(default_factory=Counter)

    def add(self, token: int) -> None:
        """One more generated token."""
        self.seen.add(token)
        self.generated[token] += 1


def shape(logits: Tensor, params: Sequence[SamplingParams], histories: Sequence[History]) -> None:
    """Apply bias and penalties to rows of `logits` float32 (N, V), in place, in vLLM's order."""
    for row, one, history in zip(logits, params, histories, strict=True):
        if history.generated.total() < one.min_tokens:
            _put(row, history.end_ids, NEVER)
        if one.allowed_token_ids:
            kept = row[list(one.allowed_token_ids)]
            row.fill_(NEVER)
            row[list(one.allowed_token_ids)] = kept
        for token, bias in one.logit_bias:
            row[token] += bias
        if one.repetition_penalty != 1:
            _repeat(row, history, one.repetition_penalty)
        if one.presence_penalty or one.frequency_penalty:
            _recur(row, history, one)


def _put(row: Tensor, tokens: Sequence[int], value: float) -> None:
    if tokens:
        row[list(tokens)] = value


def _repeat(row: Tensor, history: History, penalty: float) -> None:
    """Divide what speaks for tokens of prompt and answer, multiply what speaks against (arXiv 1909.05858)."""
    tokens = torch.tensor(sorted(history.seen), device=row.device, dtype=torch.long)
    found = row[tokens]
    row[tokens] = torch.where(found > 0, found / penalty, found * penalty)


def _recur(row: Tensor, history: History, params: SamplingParams) -> None:
    """OpenAI's penalties: once for having been generated, and once more each time."""
    if history.generated:
        tokens = torch.tensor(list(history.generated), device=row.device)
        counts = torch.tensor(list(history.generated.values()), device=row.device, dtype=row.dtype)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts
