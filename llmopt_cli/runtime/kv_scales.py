"""Scales of a KV cache in 8-bit floats that a checkpoint brings: one for a layer's keys, one for its values.

vLLM's meaning: a cached number is x / scale in e4m3. They are used whole or refused, never in part: a scale that went
missing costs a fifth of the right answers, and nobody sees it. Knows their names, not how they are applied.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.stream import Store
from llmopt_cli.spec.checkpoint import Checkpoint

NAME = re.compile(r"\.layers\.(\d+)\.(?:\w+\.)*([kv])_scale$")
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
WAY_OUT = "leave `--kv-cache-dtype` out or take int8: neither reads them"


class LayerScales(NamedTuple):
    """What a layer's cached keys and values are divided by."""

    key: float
    value: float


def read_scales(checkpoint: Checkpoint, dtype: torch.dtype) -> list[LayerScales] | None:
    """The scales for a cache of `dtype`, layer by layer; None if the checkpoint has none, or not for this dtype.

    Raises CheckpointError if it has some that can't be used: of another kind, not positive, not for every layer.
    """
    declared = (checkpoint.quantization or {}).get("kv_cache_scheme")
    named = {match.groups(): name for name in checkpoint.tensors if (match := NAME.search(name))}
    if dtype != torch.float8_e4m3fn or not (declared or named):
        return None
    if declared and any(declared.get(key) != value for key, value in SCHEME.items()):
        raise CheckpointError("the checkpoint's KV scales are not of e4m3 with one for a layer", WAY_OUT)
    with Store(checkpoint) as store:
        found = {place: _value(store, name) for place, name in named.items()}
    layers = range(checkpoint.spec.num_layers)
    return [LayerScales(*(_usable(found, layer, side) for side in "kv")) for layer in layers]


def _value(store: Store, name: str) -> float:
    tensor = store.read(name)
    return tensor.float().item() if tensor.numel() == 1 else math.nan


def _usable(found: dict[tuple[str, ...], float], layer: int, side: str) -> float:
    value = found.get((str(layer), side))
    if value is None:
        raise CheckpointError(f"the checkpoint has KV scales, but no {side}_scale for layer {layer}", WAY_OUT)
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"the {side}_scale of layer {layer} is {value:g}, which is no KV scale", WAY_OUT)
    return value
