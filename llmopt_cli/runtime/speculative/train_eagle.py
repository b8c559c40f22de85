"""An EAGLE head as it learns: it runs on its own guesses while it learns, as it will when it drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmopt_cli.runtime.speculative.heads import LAYER
from llmopt_cli.runtime.speculative.heads_output import ranks_of

FADING = 0.8  # each step counts so much of the one before it
CLOSENESS = 0.1  # weight of the distance between hidden states beside that between distributions


class EaglePupil(nn.Module):
    """One Llama layer, without a norm before its attention, on pairs of an embedding and a hidden state.

    `spec` are the shapes as in its config.json; `embed` int64 (...) -> (..., H); `output` the model's output matrix
    float32 (V, H), of which it drafts the `tokens` (K,); `angles` are cos and sin (P, D). It learns `steps` in a row.
    """

    def __init__(
        self,
        config: dict[str, Any],
        embed: Callable[[Tensor], Tensor],
        output: Tensor,
        tokens: Tensor,
        angles: tuple[Tensor, Tensor],
        steps: int,
    ) -> None:
        super().__init__()
        size, inner, self._dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * self._dim, config["num_key_value_heads"] * self._dim
        shapes = {
            "fc": (size, 2 * size),
            f"{LAYER}self_attn.q_proj": (queries, size),
            f"{LAYER}self_attn.k_proj": (keys, size),
            f"{LAYER}self_attn.v_proj": (keys, size),
            f"{LAYER}self_attn.o_proj": (size, queries),
            f"{LAYER}mlp.gate_proj": (inner, size),
            f"{LAYER}mlp.up_proj": (inner, size),
            f"{LAYER}mlp.down_proj": (size, inner),
        }
        self._names = list(shapes)
        self.matrices = nn.ParameterList(
            [torch.randn(shape, device=output.device) * shape[1] ** -0.5 for shape in shapes.values()]
        )
        self.norm = nn.Parameter(output.new_ones(size))
        self.eps, self.count = config["rms_norm_eps"], steps
        self._embed, self._angles = embed, angles
        self._output, self._tokens, self._rows = output, tokens, output[tokens]

    def unroll(self, ids: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """Hidden states (B, L - 1, H) that are guessed for tokens 1..L-1, with 1, 2, ... guesses in a row.

        The first `step` rows of later ones mean nothing: too little came before them.
        """
        cos, sin = (table[: ids.shape[1] - 1] for table in self._angles)
        embedded, known = self._embed(ids[:, 1:]), hidden[:, :-1]
        fc, q, k, v, o, gate, up, down = self.matrices
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for _ in range(self.count):
            x = F.linear(torch.cat((embedded, known), dim=-1), fc)
            query = turned(self._split(F.linear(x, q)), cos, sin)
            keys.append(turned(self._split(F.linear(x, k)), cos, sin))
            values.append(self._split(F.linear(x, v)))
            x = x + F.linear(attended(query, keys, values), o)
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.norm
            x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
            yield x
            known = x.roll(1, dims=1)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.view(*x.shape[:2], -1, self._dim).transpose(1, 2)

    def loss(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Cross entropy against the model's own distribution, and the distance of its hidden state, for each step."""
        target = hidden[:, 1:]
        with torch.no_grad():
            said = F.linear(target, self._rows).softmax(-1)
        total = hidden.new_zeros(())
        for step, guess in enumerate(self.unroll(ids, hidden)):
            found = F.linear(guess[:, step:], self._rows).flatten(0, 1)
            far = F.smooth_l1_loss(guess[:, step:], target[:, step:])
            total = total + FADING**step * (F.cross_entropy(found, said[:, step:].flatten(0, 1)) + CLOSENESS * far)
        return total

    def ranks(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """See `Pupil`."""
        said = F.linear(hidden[:, 1:], self._output).argmax(-1)
        rows = ids.shape[1] - self.count
        found = [
            ranks_of(said[:, step : step + rows], F.linear(guess[:, step : step + rows], self._rows), self._tokens)
            for step, guess in enumerate(self.unroll(ids, hidden))
        ]
        return torch.stack(found, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of EAGLE's files."""
        named = {f"{name}.weight": matrix for name, matrix in zip(self._names, self.matrices, strict=True)}
        return {**named, "token_map": self._tokens, f"{LAYER}post_attention_layernorm.weight": self.norm}


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, heads, T, D) by cos and sin (T, D)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Causal attention of step s = len(keys): (B, H, T, D) over (B, K, T, D) each -> (B, T, H * D).

    The token at t sees what step 1 made of those up to t - s + 1, and behind them what steps 2, ..., s made of one
    each: the chain of guesses that led there.
    """
    groups = query.shape[1] // keys[0].shape[1]
    keys, values = ([one.repeat_interleave(groups, dim=1) for one in held] for held in (keys, values))
    tokens, depth = query.shape[2], len(keys)
    scores = query @ keys[0].transpose(-1, -2)
    places = torch.arange(tokens, device=query.device)
    back = places[:, None] - places  # how far back a key lies
    chain = [
        (back == away, keys[-1 - away].roll(away, 2), values[-1 - away].roll(away, 2)) for away in range(depth - 1)
    ]
    for diagonal, key, _ in chain:
        scores = torch.where(diagonal, (query * key).sum(-1, keepdim=True), scores)
    scores = (scores * query.shape[-1] ** -0.5).masked_fill(back < 0, -torch.inf)
    weights = scores.softmax(-1)
    out: Tensor = weights @ values[0]
    for away, (diagonal, _, value) in enumerate(chain):
        share = (weights * diagonal).sum(-1, keepdim=True)
        out = out + share * (value - values[0].roll(away, 2))
    return out.transpose(1, 2).flatten(2)
