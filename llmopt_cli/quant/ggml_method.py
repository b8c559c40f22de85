"""Encoding into GGML's blocks as a solver: the importance is the diagonal of the statistics that all methods share."""

from __future__ import annotations

from torch import Tensor

from llmopt_cli.quant.ggml import encode
from llmopt_cli.quant.solved import Solved
from llmopt_cli.spec.gguf import block_of, fitting
from llmopt_cli.spec.scheme import Scheme

LEAST = 1e-6  # of the mean importance: an input that calibration never saw move still counts for something


def ggml(weight: Tensor, gram: Tensor | None, scheme: Scheme, *, name: str) -> Solved:
    """Encode into the block type that the scheme is named after, or one that divides the rows.

    Without `gram` all inputs count the same.
    """
    kind = fitting(block_of(scheme.name), weight.shape[1])
    importance = None if gram is None else gram.diagonal()
    if importance is not None:
        mean = importance.mean()
        importance = importance.clamp(min=LEAST * float(mean)) if mean > 0 else None
    return Solved(encode(weight, kind, importance), name)
