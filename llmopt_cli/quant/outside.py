"""What lies outside the blocks, embedding, last norm and head, and how a rotation turns it.

Which module is which is found by running the model. Knows no file and no quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.rotate import TOLERANCE, Rotation, fold_gain, rotate_embedding
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.walk import Walk


@dataclass(frozen=True)
class Outside:
    """Modules by their names in the tree."""

    embedding: str
    norm: str
    head: str

    @property
    def weights(self) -> tuple[str, ...]:
        """The parameters that a rotation turns."""
        return tuple(f"{name}.weight" for name in (self.embedding, self.norm, self.head))


def embedding_and_head(model: Any) -> tuple[str, str]:
    """The names of both; ModelError if there is no head."""
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"`{type(model).__name__}` has no output head that llmopt can find")
    return names[id(model.get_input_embeddings())], names[id(head)]


def with_head(skeleton: Skeleton, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """`dtypes` of parameters by their names in the tree, and that of a head that is still tied to the embedding."""
    embedding, head = (f"{name}.weight" for name in embedding_and_head(skeleton.model))
    return {head: dtypes[embedding]} | dict(dtypes) if embedding in dtypes else dict(dtypes)


def turned_weights(model: Any) -> list[str]:
    """The large parameters that a rotation turns, by their names in the tree."""
    return [f"{name}.weight" for name in embedding_and_head(model)]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says if the head is no longer the embedding."""
    key = "tie_word_embeddings"
    inner = {name: dict(part) | {key: False} for name, part in config.items() if isinstance(part, dict) and key in part}
    return inner | {key: False}


@torch.inference_mode()
def find_outside(walk: Walk, ids: Tensor) -> Outside:
    """The modules, found by a run on token ids [1, L]; ModelError if the head reads no norm. Needs the outside."""
    skeleton = walk.skeleton
    embedding, head = embedding_and_head(skeleton.model)
    written: dict[str, Tensor] = {}
    read: list[Tensor] = []
    hooks = [skeleton.model.get_submodule(head).register_forward_pre_hook(lambda _, args: read.append(args[0]))]
    for name, module in skeleton.model.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1 and not name.startswith(f"{skeleton.prefix}."):
            hooks.append(module.register_forward_hook(lambda _, args, out, name=name: written.update({name: out})))
    walk.logits(ids, next(walk.enter(ids, len(ids))))
    for hook in hooks:
        hook.remove()
    norms = [name for name, out in written.items() if out.shape == read[0].shape and torch.equal(out, read[0])]
    if not norms:
        raise ModelError("the output head reads no norm, so it can't take up a rotation", "leave out --rotate")
    return Outside(embedding, norms[-1], head)


@torch.inference_mode()
def turned(skeleton: Skeleton, outside: Outside, rotation: Rotation) -> dict[str, Tensor]:
    """Embedding, gain and head of a rotated model, float32, by the parameters' names. Needs the outside.

    A head that was the embedding gets a weight of its own: a gain is folded into it.
    """
    model = skeleton.model
    weights = {name: model.get_parameter(name).clone() for name in outside.weights}
    with skeleton.holding(weights):
        fold_gain(model.get_submodule(outside.norm), [model.get_submodule(outside.head)], rotation.residual)
        rotate_embedding(model.get_parameter(f"{outside.embedding}.weight"), rotation)
    return weights


@torch.inference_mode()
def refuse_unturnable(walk: Walk, ids: Tensor, rotation: Rotation) -> None:
    """ModelError unless the model without its blocks computes on `ids` [1, L] what it did when it is rotated."""
    skeleton, turn = walk.skeleton, rotation.residual.float()
    with skeleton.outside():
        outside = find_outside(walk, ids)
        entered = next(walk.enter(ids, len(ids)))
        logits = walk.logits(ids, entered)
        with skeleton.holding(turned(skeleton, outside, rotation)):
            pairs = [(next(walk.enter(ids, len(ids))), entered @ turn), (walk.logits(ids, entered @ turn), logits)]
    if not all(bool((one - other).abs().max() <= TOLERANCE * other.abs().max()) for one, other in pairs):
        raise ModelError(
            f"`{skeleton.checkpoint.name}` does something before or behind its blocks that can't be rotated",
            "leave out --rotate",
        )
