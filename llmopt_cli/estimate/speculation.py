"""What speculation is expected to gain: tokens of a step, and how many times as fast decoding is (arXiv 2211.17192).

The paper's model: each drafted token is accepted with one chance, independent of all else. Times are the step model's.
Where nothing is drafted in some steps, or fewer tokens than asked for, the same formulas take the means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmopt_cli.estimate.latency import StepModel, expected_tokens


@dataclass(frozen=True, slots=True)
class Gain:
    """In a `share` of a request's steps, `length` tokens are drafted, each accepted with chance `acceptance`.

    Then a step brings `tokens_per_step`, and decoding is `speedup` times as fast as without; None without a machine.
    """

    share: float
    length: float
    acceptance: float
    tokens_per_step: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Decoding:
    """`batch` requests of `context` tokens on average that decode together, on a deployment with a draft."""

    step: StepModel
    batch: int
    context: float

    def asked(self) -> Gain:
        """With a full draft in every step, and the acceptance that is assumed."""
        draft = self.step.on.draft
        assert draft
        return gain(draft.acceptance, draft.tokens, on=self)

    def relative(self, length: float, share: float) -> float:
        """How many times as long a step takes on average, with drafts of `length` tokens in a `share` of them."""
        part = math.ceil(self.batch / self.step.on.pp)  # of the batch, in one pipeline stage
        plain = StepModel(replace(self.step.on, draft=None)).step(part, self.context)
        return 1 + share * (self.step.round(part, self.context, length) / plain - 1) if share else 1.0


def gain(acceptance: float, length: float, share: float = 1.0, on: Decoding | None = None) -> Gain:
    """The closed form; a speed-up only `on` something."""
    tokens = 1 + share * (expected_tokens(acceptance, length) - 1)
    return Gain(share, length, acceptance, tokens, tokens / on.relative(length, share) if on else None)
