"""The paged KV cache: how many blocks fit, and the tensors hung on each attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmopt_cli.errors import CapacityError, ModelError, UnknownNameError
from llmopt_cli.estimate.memory import kv_block_bytes
from llmopt_cli.model.attention import PagedLayer
from llmopt_cli.runtime.probe import free_memory
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_kernels import QUANTIZED, Pages

SCALE_BYTES = 4  # of a quantized head: float32
DTYPES = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
KV_SHARE_OF_FREE = 0.9  # the rest is for activations and for whoever else allocates


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """What `--kv-cache-dtype` names; `auto` is the model's own. UnknownNameError if the engine has no such cache."""
    if name == "auto":
        return model_dtype
    if name not in DTYPES:
        raise UnknownNameError("KV cache dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


@dataclass(frozen=True)
class CacheSize:
    """How large the cache is: blocks of `block_size` tokens, `block_bytes` each over all layers."""

    num_blocks: int
    block_size: int
    block_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes


def size_cache(
    spec: ModelSpec, batching: Batching, max_model_len: int, dtype: torch.dtype, device: torch.device
) -> CacheSize:
    """The cache for `batching`: the bytes asked for, else what full-length requests can use of what is free.

    Raises CapacityError if not even one request of full length fits.
    """
    block_bytes = kv_block_bytes(spec, batching.block_size, dtype.itemsize)
    if dtype in QUANTIZED:
        heads = spec.num_heads if spec.latent else spec.num_kv_heads  # a latent is kept expanded here
        block_bytes += batching.block_size * spec.num_layers * heads * 2 * SCALE_BYTES
    blocks_per_request = -(-max_model_len // batching.block_size)
    if batching.kv_cache_memory_bytes is not None:
        num_blocks = batching.kv_cache_memory_bytes // block_bytes
    else:
        affordable = int(free_memory(device) * KV_SHARE_OF_FREE) // block_bytes
        num_blocks = min(affordable, blocks_per_request * batching.max_num_seqs)
    if num_blocks < blocks_per_request:
        raise CapacityError(
            f"the KV cache would hold {num_blocks * batching.block_size:,} tokens, less than one request of "
            f"{max_model_len:,} ({blocks_per_request * block_bytes / 2**20:,.1f} MiB)",
            (f"lower `--max-model-len` to {num_blocks * batching.block_size}, or " if num_blocks else "")
            + "give more with `--kv-cache-memory-bytes`",
        )
    return CacheSize(num_blocks, batching.block_size, block_bytes)


def hang_cache(layers: Sequence[PagedLayer], size: CacheSize, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate keys and values for every layer: (slots, KV heads, head size). Exactly `size.nbytes` in all.

    Raises ModelError if the layers need another number of bytes than config.json says, CapacityError if there are not
    as many; no layer holds a tensor then.
    """
    slots = size.num_tokens
    seen = [layer.seen for layer in layers if layer.seen is not None]
    assert len(seen) == len(layers), "layers are probed when the model is loaded"
    scales = 2 * SCALE_BYTES if dtype in QUANTIZED else 0
    token = sum(facts.kv_heads * (dtype.itemsize * (facts.head_dim + facts.value_dim) + scales) for facts in seen)
    needed = slots * token
    if needed != size.nbytes:
        raise ModelError(
            f"the layers' keys and values take {needed:,} bytes where config.json makes {size.nbytes:,}; "
            "layers of several shapes are not supported"
        )
    try:
        for layer, facts in zip(layers, seen, strict=True):
            layer.k = Pages.empty(slots, facts.kv_heads, facts.head_dim, dtype, device)
            layer.v = Pages.empty(slots, facts.kv_heads, facts.value_dim, dtype, device)
    except RuntimeError as error:  # out of memory: on a CPU torch has no narrower class for it
        release_cache(layers)
        raise CapacityError(
            f"{device} has no {size.nbytes / 2**20:,.1f} MiB left for the KV cache",
            "give less with `--kv-cache-memory-bytes`, or lower `--max-model-len`",
        ) from error


def release_cache(layers: Sequence[PagedLayer]) -> None:
    """Drop the tensors, so that another engine can take the model."""
    for layer in layers:
        layer.k = layer.v = None
