"""`ModelSpec`: the facts of an architecture that decide memory and time, and the parameter counts that follow.

Knows shapes, not weights, precisions or machines. Features it has no figure for are named in `unmodelled`, so that
whoever uses the spec can say what its answer leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a layer: `count` gated FFNs of width `ffn_size`, of which a token visits `per_token`.

    `shared_ffn_size` is the width of what every token visits beside them; the first or scattered `num_dense_layers`
    layers have an ordinary FFN instead.
    """

    count: int
    per_token: int
    ffn_size: int
    shared_ffn_size: int = 0
    num_dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one low-rank latent a token.

    A key head is `nope_dim + rope_dim` wide, a value head `v_dim`. `q_rank=0`: queries are not low-rank.
    """

    kv_rank: int
    q_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape. `head_dim` is the width of a query and key head, `ffn_size` that of a dense layer's FFN.

    Of `num_layers`, `num_sliding_layers` attend to the last `sliding_window` tokens only and `num_linear_layers` keep
    a state of constant size instead of keys and values. `max_context` is in tokens.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    gated_ffn: bool = True
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    num_linear_layers: int = 0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    unmodelled: tuple[str, ...] = ()

    @staticmethod
    def from_hf(config: Mapping[str, Any], name: str) -> ModelSpec:
        """The spec in a parsed config.json; raises CheckpointError naming a key that is missing or wrong."""
        from llmopt_cli.spec.hf_config import read_spec  # it builds ModelSpecs, so it imports this module

        return read_spec(config, name)

    @property
    def num_full_layers(self) -> int:
        """Layers that keep keys and values of the whole context."""
        return self.num_layers - self.num_sliding_layers - self.num_linear_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers whose FFN is a mixture of experts."""
        return self.num_layers - self.experts.num_dense_layers if self.experts else 0

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention: q, k, v, o projections (and the q, k, v biases)."""
        h, heads = self.hidden_size, self.num_heads
        if mla := self.latent:
            query = mla.q_rank * (h + heads * self.head_dim) if mla.q_rank else h * heads * self.head_dim
            latent = h * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.v_dim)
            return query + latent + heads * mla.v_dim * h
        qkv = (heads + 2 * self.num_kv_heads) * self.head_dim
        return qkv * h + heads * self.head_dim * h + (qkv if self.qkv_bias else 0)

    def ffn_params(self, width: int) -> int:
        """Weights of one FFN of the given width: two matrices, three with a gate."""
        return (3 if self.gated_ffn else 2) * self.hidden_size * width

    def _linear_params(self, experts_visited: int) -> int:
        dense_layers = self.num_layers - self.num_moe_layers
        params = self.num_layers * self.attention_params + dense_layers * self.ffn_params(self.ffn_size)
        if moe := self.experts:
            visited = experts_visited * self.ffn_params(moe.ffn_size) + self.ffn_params(moe.shared_ffn_size)
            params += self.num_moe_layers * (visited + self.hidden_size * moe.count)  # the last term is the router
        return params

    @property
    def linear_params(self) -> int:
        """Weights of all linear layers in the decoder blocks: what a quantization scheme compresses."""
        return self._linear_params(self.experts.count if self.experts else 0)

    @property
    def expert_params(self) -> int:
        """Weights of all routed experts."""
        moe = self.experts
        return self.num_moe_layers * moe.count * self.ffn_params(moe.ffn_size) if moe else 0

    @property
    def embedding_params(self) -> int:
        """Weights of the embedding and, where it is not tied, the output head."""
        return (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size

    @property
    def norm_params(self) -> int:
        """Two norms a layer and the last one; norms of q and k (some hundred values a layer) are not counted."""
        return (2 * self.num_layers + 1) * self.hidden_size

    @property
    def num_params(self) -> int:
        """All weights."""
        return self.linear_params + self.embedding_params + self.norm_params

    @property
    def num_active_params(self) -> int:
        """Weights that one token visits: fewer than all where there are experts."""
        visited = self._linear_params(self.experts.per_token if self.experts else 0)
        return visited + self.embedding_params + self.norm_params
