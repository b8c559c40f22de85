"""How a layer's keys turn with their positions, found by trying: what the keys of one token become further on.

A single token attends to itself alone, so below a rotation nothing in the whole model depends on where it stands. What
does not fit (learned positions, other rotations, angles that depend on the length) is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.attention import PagedLayer
from llmopt_cli.model.load import LoadedModel

DISTANCES = (1, 37)  # of the positions that keys are compared at
TOKEN = 11
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}  # of the largest value
BY_LENGTH = ("dynamic", "longrope", "su")  # their angles change with the longest request of a batch


@dataclass(frozen=True, eq=False)
class Rotation:
    """Turns the first `2 * len(frequencies)` values of each head, in halves or, if `paired`, neighbour by neighbour.

    `frequencies` float64, in radians a position; none leaves the keys as they are.
    """

    frequencies: Tensor
    paired: bool = False

    def turn(self, keys: Tensor, distance: int) -> Tensor:
        """Keys (..., D) as they are `distance` positions further on, in float32."""
        count = len(self.frequencies)
        angles = (self.frequencies * distance).to(keys.device)
        cos, sin = angles.cos().float(), angles.sin().float()
        wide = keys.float()
        turned, rest = wide[..., : 2 * count], wide[..., 2 * count :]
        low, high = (turned[..., ::2], turned[..., 1::2]) if self.paired else turned.chunk(2, dim=-1)
        parts = (low * cos - high * sin, high * cos + low * sin)
        joined = torch.stack(parts, dim=-1).flatten(-2) if self.paired else torch.cat(parts, dim=-1)
        return torch.cat((joined, rest), dim=-1)


def find_rotations(loaded: LoadedModel, layers: Sequence[PagedLayer]) -> list[Rotation]:
    """The rotation of each layer's keys; ModelError, without a subject, if one has others.

    Runs single tokens through the model, which nobody else may run meanwhile.
    """
    if reason := by_length(getattr(loaded.model.config, "rope_parameters", None)):
        raise ModelError(reason)
    buffers = loaded.model.named_buffers()
    tables = [buffer for path, buffer in buffers if path.endswith("inv_freq") and buffer.ndim == 1]
    candidates = [Rotation(table.double().cpu(), paired) for table in tables for paired in (False, True)]
    candidates.append(Rotation(torch.empty(0, dtype=torch.float64)))
    first, *others = [_keys(loaded, layers, position) for position in (0, *DISTANCES)]
    found = []
    for number, start in enumerate(first):
        moved = [(keys[number], distance) for keys, distance in zip(others, DISTANCES, strict=True)]
        fitting = [one for one in candidates if all(_equal(one.turn(start, far), keys) for keys, far in moved)]
        if not fitting:
            raise ModelError("has learned positions, or others that are no plain rotation of keys")
        found.append(fitting[0])
    return found


def by_length(angles: object) -> str:
    """Why keys can't be turned by such angles, the rotary part of a config; empty if they can as far as that tells."""
    kind = angles.get("rope_type", angles.get("type")) if isinstance(angles, dict) else None
    return f"turns keys by angles that depend on the length ({kind})" if kind in BY_LENGTH else ""


@torch.inference_mode()
def _keys(loaded: LoadedModel, layers: Sequence[PagedLayer], position: int) -> list[Tensor]:
    """What every layer caches as the keys of one token at a position: (1, K, D) each."""
    found: list[Tensor] = []
    for layer in layers:
        layer.watcher = lambda _, key, __: found.append(key.clone())
    try:
        token, place = (torch.tensor([number], device=loaded.device) for number in (TOKEN, position))
        loaded.logits(token, place)
    finally:
        for layer in layers:
            layer.watcher = None
    return found


def _equal(keys: Tensor, others: Tensor) -> bool:
    difference = (keys - others.float()).abs().max()
    return bool(difference <= TOLERANCE[others.dtype] * others.float().abs().max())
