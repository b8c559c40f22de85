"""Which tokens of a prompt its end looks at (SnapKV, arXiv 2404.14469), and how many each layer keeps (PyramidKV).

Pure functions of queries, keys and numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_cli.spec.kv_policy import Selecting
from llmopt_kernels import Rule

STEEPNESS = 20  # beyond the window, the top layer keeps this part of the average (the paper's beta)


def chosen(queries: Tensor, keys: Tensor, rule: Rule, kept: int, kernel: int) -> Tensor:
    """The places of the `kept` tokens of each KV head, in order: int64 (kept, K).

    `queries` (W, H, D) are those of the last W of the N tokens whose `keys` are (N, K, D), both float32. The window is
    always kept. Scores are summed over the window and over the queries that share a KV head, then averaged over
    `kernel` neighbours.
    """
    window, tokens = len(queries), len(keys)
    votes = _scores(queries, keys, rule)[:, : tokens - window]
    pooled = F.avg_pool1d(votes[None], kernel, stride=1, padding=kernel // 2, count_include_pad=False)[0]
    best = pooled.topk(kept - window, dim=-1).indices.sort(dim=-1).values  # (K, kept - W)
    last = torch.arange(tokens - window, tokens, device=keys.device).expand(len(best), -1)
    return torch.cat((best, last), dim=-1).T


def _scores(queries: Tensor, keys: Tensor, rule: Rule) -> Tensor:
    """(K, N): how much of their attention the queries give to each token."""
    window, heads = queries.shape[:2]
    tokens, kv_heads = keys.shape[:2]
    grouped = queries.view(window, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("wkgd,nkd->kgwn", grouped, keys) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    at = torch.arange(tokens, device=keys.device)
    hidden = at > at[tokens - window :, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).sum((1, 2))


def pyramid(policy: Selecting, num_layers: int, num_prompt: int, kept: int, block_size: int) -> tuple[int, ...]:
    """Blocks for each layer, falling linearly from the lowest, `kept` slots on average: they are whole blocks.

    No layer keeps less than the window, or more than the prompt.
    """
    least, most = -(-policy.window // block_size), num_prompt // block_size
    average = kept // block_size
    low = max(least, round(least + (average - least) / STEEPNESS))
    high = min(2 * average - low, most)
    low = 2 * average - high
    steps = [high - (high - low) * layer / max(num_layers - 1, 1) for layer in range(num_layers)]
    return _rounded(steps if num_layers > 1 else [float(average)])


def _rounded(shares: list[float]) -> tuple[int, ...]:
    """Whole numbers of the same sum: those nearest to the next one above are raised."""
    whole = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: whole[index] - shares[index])
    for index in order[: round(sum(shares)) - sum(whole)]:
        whole[index] += 1
    return tuple(whole)
