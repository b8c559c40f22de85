"""Cached heads at chosen slots: read as numbers, turned, or moved as they are stored.

A `Pages` of all layers has the slots of one layer after the other. Moving takes codes with their scales: it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt_cli.model.rotation import Rotation
from llmopt_kernels import Pages
from llmopt_kernels.reference import quantize_heads

Stored = tuple[Tensor, Tensor | None]  # what `lift` takes out: values (N, K, D) and scales (N, K)


def slots_of(blocks: Sequence[int], block_size: int, count: int, device: torch.device) -> Tensor:
    """(count,) the first slots of these blocks."""
    starts = torch.tensor(blocks, dtype=torch.long, device=device)[:, None] * block_size
    return (starts + torch.arange(block_size, device=device)).flatten()[:count]


def read(pages: Pages, slots: Tensor) -> Tensor:
    """What is cached at `slots` (N,), float32 (N, K, D)."""
    values, scales = lift(pages, slots)
    wide = values.view(pages.values.dtype).float()
    return wide if scales is None else wide * scales[..., None]


def lift(pages: Pages, slots: Tensor) -> Stored:
    """A copy of what is stored at `slots`: (N,), or (N, K) where every head has its own."""
    heads = torch.arange(pages.values.shape[1], device=slots.device)
    places = slots if slots.ndim == 2 else slots[:, None]
    return _raw(pages)[places, heads], None if pages.scales is None else pages.scales[places, heads]


def put(pages: Pages, slots: Tensor, stored: Stored) -> None:
    """Store at `slots` (N,) what was lifted."""
    values, scales = stored
    _raw(pages)[slots] = values
    if pages.scales is not None and scales is not None:
        pages.scales[slots] = scales


def turn(pages: Pages, old: Tensor, new: Tensor, rotation: Rotation, distance: int) -> None:
    """Store the keys at `old` slots (N,) at `new` ones, as they are `distance` positions further on."""
    keys = rotation.turn(read(pages, old), distance)
    if pages.scales is None:
        put(pages, new, (keys.to(pages.values.dtype), None))
        return
    codes, scales = quantize_heads(keys, pages.values.dtype, pages.fixed)
    put(pages, new, (codes.view(_raw(pages).dtype), scales))


def _raw(pages: Pages) -> Tensor:
    """8-bit floats as the integers that torch can gather and scatter."""
    values = pages.values
    return values.view(torch.int8) if pages.scales is not None else values
