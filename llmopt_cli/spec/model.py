"""`ModelSpec`: the facts of an architecture that decide memory and time, and the parameter counts that follow.

Knows shapes, not weights, precisions or machines. Features it has no figure for are named in `unmodelled`, so that
whoever uses the spec can say what its answer leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Matrices that engines shard, copy and quantize alike. "query" holds whatever of attention is split among heads and is
# neither key, value nor output; "latent" what every head needs whole.
Matrix = Literal[
    "embedding",
    "head",
    "query",
    "key",
    "value",
    "output",
    "latent",
    "ffn",
    "down",
    "expert_ffn",
    "expert_down",
    "router",
    "norm",
]


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
class LinearAttention:
    """A gated delta-net layer (arXiv 2412.06464), as in Qwen3.5: a state of constant size instead of a cache.

    Each of `value_heads` keeps a float32 matrix `key_dim` x `value_dim`; a convolution over the last `conv_width`
    tokens precedes it, whose inputs are kept in 16 bits.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def channels(self) -> int:
        """Values that the convolution mixes for one token: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_bytes(self) -> int:
        """What one layer keeps of one request, however long."""
        return 4 * self.value_heads * self.key_dim * self.value_dim + 2 * self.channels * (self.conv_width - 1)

    def matrices(self, hidden_size: int) -> dict[Matrix, int]:
        """Weights of one layer: inputs with their gate, decay and rate per value head, convolution; output."""
        values = self.value_heads * self.value_dim
        inputs = (self.channels + values + 2 * self.value_heads) * hidden_size
        return {"query": inputs + self.channels * self.conv_width, "output": values * hidden_size}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape. `head_dim` is the width of a query and key head, `ffn_size` that of a dense layer's FFN.

    Of `num_layers`, `num_sliding_layers` attend to the last `sliding_window` tokens only and `num_linear_layers` keep
    a state of constant size instead of keys and values (`linear_attention`; counted as ordinary attention where its
    shape is unknown). `output_gate`: queries come with a gate of their size. `max_context` is in tokens.
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
    output_gate: bool = False
    gated_ffn: bool = True
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    num_linear_layers: int = 0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    linear_attention: LinearAttention | None = None
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

    def _attention(self) -> dict[Matrix, int]:
        """Weights of one ordinary layer's attention, an output gate and the biases of q, k and v among them."""
        h, heads = self.hidden_size, self.num_heads
        if mla := self.latent:
            queries = heads * self.head_dim * (mla.q_rank or h)
            latent = h * (mla.kv_rank + mla.rope_dim + mla.q_rank)
            expand = mla.kv_rank * heads * (mla.nope_dim + mla.v_dim)
            return {"query": queries + expand, "latent": latent, "output": heads * mla.v_dim * h}
        rows = h + (1 if self.qkv_bias else 0)
        queries, keys = heads * self.head_dim, self.num_kv_heads * self.head_dim
        gated = (2 if self.output_gate else 1) * queries
        return {"query": gated * rows, "key": keys * rows, "value": keys * rows, "output": queries * h}

    def ffn_params(self, width: int) -> int:
        """Weights of one FFN of the given width: two matrices, three with a gate."""
        return (3 if self.gated_ffn else 2) * self.hidden_size * width

    def _ffn(self, layers: int, width: int, kind: Literal["ffn", "expert_ffn"] = "ffn") -> dict[Matrix, int]:
        down: Matrix = "down" if kind == "ffn" else "expert_down"
        return {
            kind: layers * (self.ffn_params(width) - self.hidden_size * width),
            down: layers * self.hidden_size * width,
        }

    def matrices(self, experts_visited: int | None = None) -> dict[Matrix, int]:
        """Weights by kind of matrix, all layers together; of a layer's experts only so many where it is given."""
        moe, found = self.experts, Counter[Matrix]()
        linear = self.linear_attention.matrices(self.hidden_size) if self.linear_attention else self._attention()
        for kind, count in self._attention().items():
            found[kind] += (self.num_layers - self.num_linear_layers) * count
        for kind, count in linear.items():
            found[kind] += self.num_linear_layers * count
        found.update(self._ffn(self.num_layers - self.num_moe_layers, self.ffn_size))
        if moe:
            visited = moe.count if experts_visited is None else experts_visited
            found.update(self._ffn(self.num_moe_layers * visited, moe.ffn_size, "expert_ffn"))
            found.update(self._ffn(self.num_moe_layers, moe.shared_ffn_size))
            found["router"] = self.num_moe_layers * self.hidden_size * moe.count
        found["embedding"] = self.vocab_size * self.hidden_size
        found["head"] = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        found["norm"] = self.norm_params
        return dict(found)

    def columns(self, kind: Matrix) -> int:
        """Width of the rows of a kind of matrix: its number of inputs."""
        value_dim = self.latent.v_dim if self.latent else self.head_dim
        inputs: dict[Matrix, int] = {
            "output": self.num_heads * value_dim,
            "down": self.ffn_size,
            "expert_down": self.experts.ffn_size if self.experts else 0,
        }
        return inputs.get(kind, self.hidden_size)

    @property
    def linear_params(self) -> int:
        """Weights of the linear layers in the decoder blocks that a quantization scheme compresses: routers stay."""
        kept = self.embedding_params + self.norm_params
        return sum(self.matrices().values()) - kept - self.matrices().get("router", 0)

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
        return sum(self.matrices().values())

    @property
    def num_active_params(self) -> int:
        """Weights that one token visits: fewer than all where there are experts."""
        return sum(self.matrices(self.experts.per_token if self.experts else 0).values())
