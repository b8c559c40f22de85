"""A model's way from tokens to logits, where that is the plain one: embedding, angles, layers, norm, output head.

transformers' own forward does the same with masks, caches and outputs around it that nobody needs here. Ours is kept
only if it gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.model.fused import FusedLayer, FusedRMSNorm, Together

See = Callable[[Tensor], None]
TOKENS = 5  # of the run that shows whether both ways give the same numbers


@dataclass(frozen=True, eq=False)
class Decoder:
    """The parts of one model, in the order in which they run."""

    embed: Any
    angles: Any
    layers: list[FusedLayer]
    together: Together
    norm: Any
    head: Any

    @classmethod
    def of(cls, model: Any) -> Decoder | None:
        """The plain way through `model`, its weights loaded; None if it has another one."""
        parts, head = dict(model.base_model.named_children()), model.get_output_embeddings()
        wanted = {"embed_tokens", "rotary_emb", "layers", "norm"}
        if parts.keys() != wanted or head is None or not isinstance(parts["norm"], FusedRMSNorm):
            return None
        layers = [layer for layer in parts["layers"] if isinstance(layer, FusedLayer)]
        if not layers or len(layers) < len(parts["layers"]):
            return None
        found = cls(parts["embed_tokens"], parts["rotary_emb"], layers, Together(layers), parts["norm"], head)
        return found if found._equals(model) else None

    def __call__(self, ids: Tensor, positions: Tensor, rows: Tensor | None = None, see: See | None = None) -> Tensor:
        """Logits (1, N, V) of the `rows` (N,) of the packed tokens `ids` (1, T), or of all, at `positions` (1, T).

        `see` is shown what the head reads, (T, H).
        """
        x = self.embed(ids)
        angles = self.angles(x, position_ids=positions)
        done = self.together.run(x, angles)
        if done is None:
            for layer in self.layers:
                x = layer.in_parts(x, angles)
        else:
            x = done
        x = self.norm(x)
        if see is not None:
            see(x[0])
        logits: Tensor = self.head(x if rows is None else x[:, rows])
        return logits

    @torch.inference_mode()
    def _equals(self, model: Any) -> bool:
        """Whether it computes what the model's own forward does: both run the same modules, so bit for bit."""
        device = next(model.parameters()).device
        ids, positions = (torch.arange(TOKENS, device=device)[None] for _ in range(2))
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return torch.equal(self(ids, positions), expected)
