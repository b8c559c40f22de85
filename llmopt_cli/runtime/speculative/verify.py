"""Exact speculative sampling: which drafted tokens stand, and what comes in the place of the first that does not.

What results is distributed as if every token had been drawn from the model alone, whoever proposed (Leviathan et al.,
arXiv 2211.17192; Chen et al., arXiv 2302.01318). Works on one position; knows no request and no model.
"""

from __future__ import annotations

from random import Random

from torch import Tensor

from llmopt_cli.runtime.sampler import invert


def choose(target: Tensor, drafted: int, chances: Tensor | None, stream: Random) -> int:
    """The token for a position whose `target` weights float64 [V] >= 0 are known: the `drafted` one if that stands.

    `chances` float32 [V] is the distribution from which it was drawn, None if it was certain. It stands with
    probability min(1, p / q); else another token is drawn from what is left of p above q.

    What was certain stands if it is what is drawn: with the same chance, and a seed means the same with and without it.
    """
    if chances is None:
        return draw(target, stream)
    target = target / target.sum()
    # Python's uniforms have 53 bits: one in 2^24 of float32's is 0, which would let any draft pass.
    if stream.random() * float(chances[drafted]) < float(target[drafted]):
        return drafted
    left = target.sub(chances.to(target)).clamp_(min=0)
    if not float(left.sum()) > 0:  # rounding: p and q are the same
        left = target
    return draw(left, stream)


def draw(weights: Tensor, stream: Random) -> int:
    """A token by its weight: `weights` float64 [V] >= 0."""
    return int(invert(weights[None], [stream.random()])[0])
