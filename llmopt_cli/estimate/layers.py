"""Seconds of all layers of a deployment but for attention itself, prepared once: a step only multiplies and adds.

Knows the shapes of a model's products and who shares them; no requests, no contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmopt_cli.estimate.comm import all_reduce
from llmopt_cli.estimate.constants import Constants
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.gemm import Matmul, Rates
from llmopt_cli.estimate.memory import kv_values_per_layer
from llmopt_cli.spec.scheme import BF16, Scheme

# Layers of sparse attention choose the tokens to attend to by an indexer.
INDEXED = frozenset(("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM"))


@dataclass(frozen=True)
class Layers:
    """The layers of `on` under `constants`, which are those of the engine on this GPU."""

    on: Deployment
    constants: Constants

    def seconds(self, tokens: float) -> float:
        """One pass of `tokens` tokens, those of all groups of data parallel attention together."""
        fixed, per_token = self._flat
        own = tokens / self.on.attention_dp
        found = fixed + own * per_token + sum([count * one.seconds(own) for count, one in self._products])
        return found + self._experts(tokens) if self.on.spec.experts else found

    def _experts(self, tokens: float) -> float:
        """Of E experts, k a token, T tokens drawing independently touch E x (1 - (1 - k/E)^T)."""
        spec, moe = self.on.spec, self.on.spec.experts
        assert moe
        touched = moe.count * (1 - (1 - moe.per_token / moe.count) ** tokens)
        return spec.num_moe_layers * sum([one.seconds(tokens, touched) for one in self._expert])

    @cached_property
    def rates(self) -> Rates:
        """What the GPU does under the engine."""
        return Rates(self.on.hardware, self.constants)

    @cached_property
    def _products(self) -> tuple[tuple[int, Matmul], ...]:
        """How often each product that every token takes part in is met in a pass."""
        spec = self.on.spec
        counted = (
            (spec.num_layers, self._projections()),
            (spec.num_layers - spec.num_moe_layers, self._gated(self._linear, spec.ffn_size / self.on.attention_tp)),
            (spec.num_moe_layers, self._beside_experts() if spec.experts else ()),
        )
        return tuple((count, one) for count, matmuls in counted for one in matmuls if count)

    @property
    def _linear(self) -> Scheme:
        """What the linear layers outside of the experts are stored in."""
        return BF16 if self.on.scheme.covers == "experts" else self.on.scheme

    def _projections(self) -> tuple[Matmul, ...]:
        """The GEMMs around attention."""
        spec, tp = self.on.spec, self.on.attention_tp
        h, heads = spec.hidden_size, spec.num_heads / tp
        if mla := spec.latent:
            whole = heads * spec.head_dim
            query = [(mla.q_rank, h), (whole, mla.q_rank)] if mla.q_rank else [(whole, h)]
            latent = [(mla.kv_rank + mla.rope_dim, h), (heads * (mla.nope_dim + mla.v_dim), mla.kv_rank)]
            shapes = [*query, *latent, (h, heads * mla.v_dim)]
        else:
            shapes = [(heads * spec.head_dim + kv_values_per_layer(spec, tp=tp), h), (h, heads * spec.head_dim)]
        return tuple(self.rates.matmul(self._linear, n, k) for n, k in shapes)

    def _gated(self, scheme: Scheme, width: float, visits: float = 1) -> tuple[Matmul, ...]:
        """The two GEMMs of an FFN, the gate beside the first; each of `visits` passes of a token is multiplied."""
        h, gates = self.on.spec.hidden_size, 2 if self.on.spec.gated_ffn else 1
        up, down = self.rates.matmul(scheme, gates * width, h, visits), self.rates.matmul(scheme, h, width, visits)
        # The activation between them reads two values and writes one, in 16 bits.
        return up._replace(after=6 * visits * width / self.rates.bandwidth), down

    @cached_property
    def _expert(self) -> tuple[Matmul, ...]:
        """One routed expert's GEMMs, per GPU of all that share the experts."""
        moe = self.on.spec.experts
        return self._gated(self.on.scheme, moe.ffn_size / self.on.tp, moe.per_token) if moe else ()

    def _beside_experts(self) -> tuple[Matmul, ...]:
        """The router, and what every token visits beside its experts."""
        moe = self.on.spec.experts
        assert moe
        router = self.rates.matmul(BF16, moe.count, self.on.spec.hidden_size)
        shared = self._gated(self._linear, moe.shared_ffn_size / self.on.attention_tp)
        return (router, *shared) if moe.shared_ffn_size else (router,)

    @cached_property
    def _flat(self) -> tuple[float, float]:
        """Seconds of a pass, and per token, of what is no product: norms, exchanges, what experts and MLA launch.

        A norm reads the sum and its addend and writes both, in 16 bits.
        """
        spec, c = self.on.spec, self.constants
        latency, moved = self._exchange()
        layer = 2 * c.norm_s + latency + (c.latent_s if spec.latent else 0.0)
        layer += c.indexer_s if spec.architecture in INDEXED else 0.0
        fixed = spec.num_layers * layer + spec.num_moe_layers * c.experts_s + spec.num_linear_layers * c.attention_s
        return fixed, spec.num_layers * (2 * 8 * spec.hidden_size / self.rates.bandwidth + moved)

    def _exchange(self) -> tuple[float, float]:
        """After attention and after the FFN, [tokens, hidden] in 16 bits among the GPUs that shared the work.

        With data parallel attention, tokens travel to their experts' GPUs and back instead (8 bits out, 16 back).
        """
        on, c, h = self.on, self.constants, self.on.spec.hidden_size
        latency = per_token = 0.0
        if on.attention_tp > 1:
            link = all_reduce(on.hardware, on.attention_tp, c.link_efficiency)
            times = 1 if on.attention_dp > 1 else 2
            latency, per_token = times * (link.latency or c.allreduce_s), times * h * 2 / link.rate
        if on.attention_dp > 1 and on.spec.experts:
            copies = min(on.spec.experts.per_token, on.tp - 1)
            latency += 2 * c.allreduce_s
            per_token += 3 * copies * h / (on.hardware.link_bandwidth * c.link_efficiency)
        return latency, per_token
