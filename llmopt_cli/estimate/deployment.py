"""`Deployment`: a recipe whose names are resolved, on a number of GPUs. What memory and latency are functions of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.constants import VLLM, Constants, default_batching, find_engine
from llmopt_cli.estimate.draft import Draft
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching, Recipe
from llmopt_cli.spec.scheme import BF16, KV_16, KvDtype, Scheme


@dataclass(frozen=True, slots=True)
class Deployment:
    """`spec` in `scheme` on `tp` x `pp` GPUs of one kind under `engine`: every layer split in `tp`, layers in `pp`.

    With `attention_dp` above 1, only experts are split among all `tp`: as many groups of GPUs hold whole attention
    layers, each for its own requests. With `expert_parallel`, GPUs hold whole experts, not a slice of each.
    """

    spec: ModelSpec
    hardware: Hardware
    scheme: Scheme
    tp: int = 1
    pp: int = 1
    engine: Constants = VLLM
    kv: KvDtype = KV_16
    batching: Batching = field(default_factory=lambda: default_batching(VLLM))
    draft: Draft | None = None
    attention_dp: int = 1
    expert_parallel: bool = False

    @property
    def attention_tp(self) -> int:
        """GPUs that share one layer's attention."""
        return self.tp // self.attention_dp

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp

    @property
    def kv_bytes(self) -> float:
        """Bytes of one cached value."""
        return self.kv.bytes_per_value(self.spec.head_dim)

    @property
    def draft_scheme(self) -> Scheme:
        """In what a draft's own weights are: 16 bits, or 32 as the target's."""
        return self.scheme if self.scheme.weight_bits > 16 else BF16

    @property
    def draft_bytes(self) -> float:
        """Bytes of a draft's own weights."""
        return self.draft.params * self.draft_scheme.weight_bits / 8 if self.draft else 0.0

    def split(self, tp: int, pp: int = 1) -> Self:
        """The same on another number of GPUs."""
        return replace(self, tp=tp, pp=pp)


def wanted(recipe: Path | None, **flags: Any) -> Recipe:
    """The recipe in a file, or the flags on top of the engine's own batching; flags win, None is no flag."""
    if recipe is None:
        if flags.get("model") is None:
            raise UsageError("no model given", "add `--model 70b`; all names: `llmopt models`")
        flags["engine"] = flags.get("engine") or VLLM.name
        usual = default_batching(find_engine(flags["engine"]))
        flags["max_num_seqs"] = flags.get("max_num_seqs") or usual.max_num_seqs
        flags["max_num_batched_tokens"] = max(usual.max_num_batched_tokens, flags["max_num_seqs"])
    return Recipe.resolve(recipe, **flags)
