"""Medusa heads as they learn: each is to say what the model itself will say, so many tokens later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmopt_cli.runtime.speculative.heads_output import ranks_of

FADING = 0.8  # each head counts so much of the one before it


class MedusaPupil(nn.Module):
    """`count` heads of `layers` residual blocks before the model's output matrix float32 (V, H).

    They draft the `tokens` (K,) alone. Published heads have output matrices of their own: with two blocks they draft no
    better than these, and each is one more matrix to read.
    """

    def __init__(self, output: Tensor, tokens: Tensor, count: int, layers: int) -> None:
        super().__init__()
        size = output.shape[1]
        zeros = output.new_zeros
        self.weights = nn.ParameterList([zeros(count, size, size) for _ in range(layers)])
        self.biases = nn.ParameterList([zeros(count, size) for _ in range(layers)])
        self.count, self._output, self._tokens, self._rows = count, output, tokens, output[tokens]

    def logits(self, hidden: Tensor, head: int) -> Tensor:
        """(..., K) of one head on hidden states (..., H)."""
        x = hidden
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x + F.silu(F.linear(x, weight[head], bias[head]))
        return F.linear(x, self._rows)

    def loss(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Cross entropy against the model's own distribution at each head's place."""
        with torch.no_grad():
            said = F.linear(hidden, self._rows).softmax(-1)
        total = hidden.new_zeros(())
        for head in range(self.count):
            found = self.logits(hidden[:, : -1 - head], head).flatten(0, 1)
            total = total + FADING**head * F.cross_entropy(found, said[:, 1 + head :].flatten(0, 1))
        return total

    def ranks(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """See `Pupil`."""
        rows = hidden.shape[1] - self.count
        said = F.linear(hidden, self._output).argmax(-1)
        found = [
            ranks_of(said[:, 1 + head : 1 + head + rows], self.logits(hidden[:, :rows], head), self._tokens)
            for head in range(self.count)
        ]
        return torch.stack(found, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of Medusa's files."""
        layers = len(self.weights)
        named: dict[str, Tensor] = {}
        for head in range(self.count):
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                named |= {f"{head}.{layer}.linear.weight": weight[head], f"{head}.{layer}.linear.bias": bias[head]}
            named[f"{head}.{layers}.weight"] = self._output
        return {**named, "token_map": self._tokens}
