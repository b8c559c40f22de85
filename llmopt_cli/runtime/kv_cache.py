"""The paged KV cache: its dtype, and the tensors hung on each attention layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmopt_cli.errors import CapacityError, ModelError, UnknownNameError
from llmopt_cli.model.attention import PagedLayer
from llmopt_cli.runtime.budget import CacheSize, Needs, mib
from llmopt_cli.runtime.kv_scales import LayerScales
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_kernels import QUANTIZED, Pages

SCALE_BYTES = 4  # of a quantized head: float32
DTYPES = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """What `--kv-cache-dtype` names; `auto` is the model's own. UnknownNameError if the engine has no such cache."""
    if name == "auto":
        return model_dtype
    if name not in DTYPES:
        raise UnknownNameError("KV cache dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def needs_of(
    checkpoint: Checkpoint, batching: Batching, dtype: torch.dtype, kv_dtype: torch.dtype, weights: int | None = None
) -> Needs:
    """What a checkpoint needs to run; without `weights` those bytes are what its file headers say."""
    stored = checkpoint.tensors.values()
    return Needs(
        name=checkpoint.name,
        spec=checkpoint.spec,
        batching=batching,
        weights=sum(one.held(dtype.itemsize) for one in stored) if weights is None else weights,
        value_bytes=dtype.itemsize,
        kv_bytes=kv_dtype.itemsize,
        kv_scale_bytes=SCALE_BYTES if kv_dtype in QUANTIZED else 0,
        quantized=checkpoint.quantization is not None,
    )


def check_layers(layers: Sequence[PagedLayer], needs: Needs, dtype: torch.dtype) -> None:
    """Raise ModelError if the layers cache another number of bytes for a token than config.json says."""
    scales = 2 * needs.kv_scale_bytes
    seen = [layer.seen for layer in layers if layer.seen is not None]
    assert len(seen) == len(layers), "layers are probed when the model is loaded"
    token = sum(facts.kv_heads * (dtype.itemsize * (facts.head_dim + facts.value_dim) + scales) for facts in seen)
    needed, said = needs.batching.block_size * token, needs.block_bytes
    if needed != said:
        raise ModelError(
            f"the layers' keys and values take {needed:,} bytes a block where config.json makes {said:,}; "
            "layers of several shapes are not supported"
        )


def hang_cache(
    layers: Sequence[PagedLayer],
    size: CacheSize,
    dtype: torch.dtype,
    device: torch.device,
    scales: Sequence[LayerScales] | None = None,
) -> tuple[Pages, Pages] | None:
    """Allocate keys and values for every layer: (slots, KV heads, head size). Exactly `size.nbytes` in all.

    Layers of one shape have their slots one after the other in the same tensors: those of all keys and of all values
    are returned, None if shapes differ. `scales` are those of a calibrated cache, one pair a layer. Raises
    CapacityError if there are not as many bytes; no layer holds a tensor then.
    """
    seen = [layer.seen for layer in layers if layer.seen is not None]
    assert len(seen) == len(layers), "layers are probed when the model is loaded"
    alike = len({(facts.kv_heads, facts.head_dim, facts.value_dim) for facts in seen}) == 1
    fixed: Sequence[tuple[float | None, float | None]] = scales or [(None, None)] * len(layers)
    try:
        if alike:
            slots, heads = len(layers) * size.num_tokens, seen[0].kv_heads
            k = Pages.empty(slots, heads, seen[0].head_dim, dtype, device)
            v = Pages.empty(slots, heads, seen[0].value_dim, dtype, device)
            for number, (layer, (key, value)) in enumerate(zip(layers, fixed, strict=True)):
                own = slice(number * size.num_tokens, (number + 1) * size.num_tokens)
                layer.k, layer.v = _part(k, own, key), _part(v, own, value)
            return k, v
        for layer, facts, (key, value) in zip(layers, seen, fixed, strict=True):
            layer.k = Pages.empty(size.num_tokens, facts.kv_heads, facts.head_dim, dtype, device, key)
            layer.v = Pages.empty(size.num_tokens, facts.kv_heads, facts.value_dim, dtype, device, value)
    except RuntimeError as error:  # out of memory: on a CPU torch has no narrower class for it
        release_cache(layers)
        raise CapacityError(
            f"{device} has no {mib(size.nbytes)} left for the KV cache",
            "give less with `--kv-cache-memory-bytes`, or lower `--max-model-len`",
        ) from error
    return None


def _part(pages: Pages, own: slice, fixed: float | None) -> Pages:
    """Some slots of `pages`, their scales `fixed` if they are calibrated."""
    scales = None if pages.scales is None else pages.scales[own]
    if scales is not None and fixed is not None:
        scales.fill_(fixed)
    return Pages(pages.values[own], scales, fixed)


def copy_blocks(layers: Sequence[PagedLayer], copies: Sequence[tuple[int, int]], block_size: int) -> None:
    """Copy blocks of the cache, each pair's first to its second, one pair after the other."""
    for source, target in copies:
        old, new = (slice(block * block_size, (block + 1) * block_size) for block in (source, target))
        for layer in layers:
            for pages in (layer.k, layer.v):
                assert pages is not None, "the cache is hung on the layers before the first step"
                pages.values[new] = pages.values[old]
                if pages.scales is not None:
                    pages.scales[new] = pages.scales[old]


def release_cache(layers: Sequence[PagedLayer]) -> None:
    """Drop the tensors, so that another engine can take the model."""
    for layer in layers:
        layer.k = layer.v = None
