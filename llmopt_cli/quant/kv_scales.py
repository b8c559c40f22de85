"""Scales for a KV cache in 8-bit floats: the largest key and value of each layer on the calibration text.

Keys are seen as they are cached, behind the rotary embedding. Knows how to watch one block and what engines read of
it (vLLM's `k_scale` and `v_scale`); neither walks a model nor writes files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.fp8 import scale_of

CACHES = ("past_key_values", "layer_past")  # what transformers calls the cache that a block is given
# `kv_cache_scheme` of a compressed-tensors config for such scales: e4m3, one scale for a layer's keys, one for values.
KV_CACHE_SCHEME: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
    "group_size": None,
}


class Ranges:
    """Stands in for a cache that keeps nothing: it notes the largest |key| and |value| [1] that passed."""

    def __init__(self) -> None:
        self.key = torch.zeros(1)
        self.value = torch.zeros(1)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The tensors of this call, as a cache without a past would answer."""
        self.key = torch.maximum(self.key, keys.abs().amax().float().cpu())
        self.value = torch.maximum(self.value, values.abs().amax().float().cpu())
        return keys, values


@contextmanager
def watched(block: nn.Module, where: str) -> Iterator[Ranges]:
    """While it lasts, what `block` would cache is noted. ModelError if it takes no cache by any name we know."""
    ranges = Ranges()

    def hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = next((name for name in CACHES if name in kwargs), None)
        if name is None:
            raise ModelError(f"`{where}` is given no KV cache, so its keys can't be seen", "leave out --kv-scales")
        return args, kwargs | {name: ranges}

    hook = block.register_forward_pre_hook(hand_over, with_kwargs=True)
    try:
        yield ranges
    finally:
        hook.remove()


def kv_scales(block: nn.Module, where: str, ranges: Ranges) -> dict[str, Tensor]:
    """The tensors to store, by name in the tree: float32 [1] each, what a cached number is divided by.

    ModelError if the block has cached nothing, or has not one attention.
    """
    if not bool(ranges.value > 0):
        raise _no_cache(where)
    home = attention_of(block, where)
    return {f"{home}.k_scale": scale_of(ranges.key), f"{home}.v_scale": scale_of(ranges.value)}


def attention_of(block: nn.Module, where: str) -> str:
    """The name in the tree of the block's attention; ModelError if it has not one."""
    attention = [name for name, module in block.named_modules() if name and hasattr(module, "layer_idx")]
    if len(attention) != 1:
        raise _no_cache(where)
    return f"{where}.{attention[0]}"


def _no_cache(where: str) -> ModelError:
    return ModelError(f"`{where}` has no attention that fills a KV cache", "leave out --kv-scales")
