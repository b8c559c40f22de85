"""Which policies a model can't have, as far as its files tell: before weights are read.

What only the model itself shows (masks, rotations) is found by `compressor`, and refused in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmopt_cli.errors import CapacityError, UsageError
from llmopt_cli.model.load import context_limit
from llmopt_cli.model.rotation import by_length
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting, Streaming
from llmopt_cli.spec.recipe import Batching

Reasons = dict[type[KvPolicy], str]
WINDOWS = "limits attention to a window"
LEARNED_TABLE = re.compile(r"(\w+\.){0,2}(wpe|embed_positions|position_embeddings)\.weight")  # a decoder's, as stored


def refuse_unfit_policy(policy: KvPolicy, checkpoint: Checkpoint, batching: Batching) -> None:
    """Raise what `check` raises, if the files of a checkpoint say so already."""
    limit = batching.max_model_len or context_limit(checkpoint)
    check(policy, checkpoint.name, known_reasons(checkpoint), batching.block_size, limit)


def known_reasons(checkpoint: Checkpoint) -> Reasons:
    """Why no request can have a policy of a kind, as `name` does ...; empty where the files say nothing against it."""
    spec = checkpoint.spec
    kinds = {WINDOWS: spec.num_sliding_layers, "keeps its cache latent (MLA)": spec.latent}
    reason = next((kind for kind, holds in kinds.items() if holds), "")
    stored = any(LEARNED_TABLE.fullmatch(name) for name in checkpoint.tensors)
    turning = "has learned positions" if stored else by_length(_angles(checkpoint.config))
    return {Selecting: reason, Streaming: reason or turning}


def check(policy: KvPolicy, name: str, reasons: Reasons, block_size: int, limit: int) -> None:
    """UsageError for one of the `reasons` of model `name`, CapacityError if more is kept than `limit` tokens."""
    if reason := reasons[type(policy)]:
        hint = "go without: all of its cache is kept" if reasons[Selecting] else "take `snapkv`, which turns no keys"
        raise UsageError(f"`{name}` {reason}: it can't have kv_policy `{policy}`", hint)
    if isinstance(policy, Streaming) and (most := policy.most_cached(block_size)) > limit:
        raise CapacityError(
            f"kv_policy `{policy}` keeps up to {most:,} tokens and the context is {limit:,}",
            "give it a smaller window",
        )


def _angles(config: Mapping[str, object]) -> object:
    """What config.json says of rotary angles, under its name of today or that of before."""
    return config.get("rope_parameters") or config.get("rope_scaling")
