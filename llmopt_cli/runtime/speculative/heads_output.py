"""The model's output matrix, and the few rows of it that most drafts need.

Most of what a small step reads is the output matrix, and most of what is said are a few tokens: drafting among the
commonest alone costs hardly a right guess (FR-Spec, arXiv 2502.14856). As `token_map`, they are stored as vLLM does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt_cli.model.load import LoadedModel

SHARE = 4  # one token of so many is drafted


@torch.no_grad()
def output_matrix(loaded: LoadedModel) -> Tensor:
    """float32 (V, H) of the model's output head, whatever holds it."""
    head, width = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings().embedding_dim
    ones = torch.eye(width, dtype=loaded.dtype, device=loaded.device)
    columns: Tensor = head(ones) - head(torch.zeros_like(ones[:1]))
    return columns.T.float().contiguous()


def commonest(ids: Tensor, vocabulary: int) -> Tensor:
    """int64 (V / SHARE,): the tokens that come most often in `ids`, in order of their numbers."""
    counts = torch.bincount(ids.flatten(), minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[: max(1, vocabulary // SHARE)].sort().values


def ranks_of(said: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """How many of the drafted `tokens` (K,), in order of their numbers, are likelier than what is `said` (...).

    `logits` are (..., K); K for what is not drafted. int64 (...).
    """
    places = torch.searchsorted(tokens, said.contiguous()).clamp(max=len(tokens) - 1)
    others = (~(logits <= logits.gather(-1, places[..., None]))).sum(-1)  # NaN is no better than any
    return torch.where(tokens[places] == said, others, len(tokens))
