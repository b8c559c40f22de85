"""What a step makes of requests with drafts: tokens that stand, one more, and where the text ends.

Position by position, as if each had had a step of its own: parameters, grammars and ends count at every token. Knows
how to judge drafts; not who made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from llmopt_cli.runtime.live import Live, broken, shaped
from llmopt_cli.runtime.request import NOT_NUMBERS, RequestOutput
from llmopt_cli.runtime.sampler import top_logprobs, weights_of
from llmopt_cli.runtime.speculative.verify import choose, draw
from llmopt_kernels import argmax


def verified_tokens(lives: Sequence[Live], counts: Sequence[int], logits: Tensor) -> list[RequestOutput]:
    """Go on with all of `lives`, each of which has so many (`counts`) of the rows `logits` float32 (N, V).

    A request has a row for its last known token, and one for each of its drafts.
    """
    spans = [range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
    # Rows that nothing shapes can be weighed together: what stands before them changes nothing about them.
    drawn = {
        row: live.params
        for live, rows in zip(lives, spans, strict=True)
        if live.params.temperature > 0 and not live.shapes_logits
        for row in rows
    }
    weights = weights_of(logits[list(drawn)], list(drawn.values())) if drawn else ()
    step = _Step(logits, argmax(logits).tolist(), dict(zip(drawn, weights, strict=True)), set(broken(logits)))
    return [step.judge(live, rows) for live, rows in zip(lives, spans, strict=True)]


@dataclass(frozen=True)
class _Step:
    """The rows of a step: `weights` of those that are drawn from as they are, `broken` that are no numbers."""

    logits: Tensor
    likeliest: Sequence[int]
    weights: Mapping[int, Tensor]
    broken: set[int]

    def judge(self, live: Live, rows: range) -> RequestOutput:
        """The tokens of a request that stand, and one more."""
        drafts, known = live.request.drafts[: len(rows) - 1], live.request.num_tokens
        error = None
        for place, row in enumerate(rows):
            drafted = drafts[place] if place < len(drafts) else None
            chances = None if live.chances is None or drafted is None else live.chances[place]
            found = self._token(live, row, drafted, chances)
            if isinstance(found, str):
                error = found
                break
            live.append(found)
            if live.request.finish_reason or found != drafted:
                break
        tokens = live.request.token_ids[known:]
        if live.params.logprobs is not None and tokens:
            raw = self.logits[rows.start : rows.start + len(tokens)]
            live.logprobs += top_logprobs(raw, tokens, [live.params.logprobs] * len(tokens))
        live.request.rewind()
        return live.fail(error, len(tokens)) if error else live.output(len(tokens))

    def _token(self, live: Live, row: int, drafted: int | None, chances: Tensor | None) -> int | str:
        """What comes at one position, or what went wrong there."""
        if row in self.broken:
            return NOT_NUMBERS
        likeliest, weights = self.likeliest[row], self.weights.get(row)
        if live.shapes_logits:
            logits, wrong = shaped([live], self.logits[row : row + 1])
            if wrong:
                return wrong[0]
            likeliest = int(logits[0].argmax())
            weights = weights_of(logits, [live.params])[0] if live.params.temperature > 0 else None
        if weights is None:
            return likeliest
        return draw(weights, live.stream) if drafted is None else choose(weights, drafted, chances, live.stream)
