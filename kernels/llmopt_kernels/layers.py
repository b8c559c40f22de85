"""`Layer`: a decoder layer of the plain kind, its weights and its cache, as one op takes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmopt_kernels.paging import Pages, Rule


@dataclass(frozen=True, eq=False)
class Weights:
    """Of a pre-norm layer: attention over heads of size D, then a gated MLP of inner width I, each added to its input.

    `norm` and `mlp_norm` (N,); `qkv` ((H + 2K) * D, N) with the rows of all query heads, then keys, then values; `o`
    (N, H * D); `gate_up` (2I, N); `down` (N, I); biases of their rows, or None. `q_norm` and `k_norm` (D,), both or
    none, are gains of an RMSNorm of each head. `eps`, `head_eps`, `mlp_eps` are those of the norms.
    """

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    eps: float
    head_eps: float
    mlp_eps: float

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order above."""
        attention = (self.norm, self.qkv, self.qkv_bias, self.q_norm, self.k_norm, self.o, self.o_bias)
        return (*attention, self.mlp_norm, self.gate_up, self.gate_up_bias, self.down, self.down_bias)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer as it runs: its weights, the pages of its keys and values, and how it attends."""

    weights: Weights
    k: Pages
    v: Pages
    rule: Rule
