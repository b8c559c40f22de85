"""A rehearsal, before an hour is spent: every kind of block is tried with what is wanted of it, on a few tokens.

Knows which wishes a model may refuse; what it takes to fulfil them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from llmopt_cli.quant.kv_scales import kv_scales, watched
from llmopt_cli.quant.outside import refuse_unturnable
from llmopt_cli.quant.rotate import Rotation, rotate_block
from llmopt_cli.quant.structure import find_groups
from llmopt_cli.quant.walk import Walk

TOKENS = 32


@torch.inference_mode()
def rehearse(walk: Walk, rotation: Rotation | None, scales: bool) -> None:
    """ModelError if the model can't be rotated, or its KV cache can't be watched, where that is wanted."""
    if rotation is None and not scales:
        return
    skeleton = walk.skeleton
    ids = torch.arange(TOKENS)[None] % skeleton.checkpoint.spec.vocab_size
    walk.learn(ids)
    if rotation is not None:
        refuse_unturnable(walk, ids, rotation)
    with skeleton.outside():
        hidden = next(walk.enter(ids, 1)).to(skeleton.device)
    for index in _one_of_each_kind(skeleton.blocks):
        where, run = f"{skeleton.prefix}.{index}", partial(walk.run, index)
        with skeleton.block(index) as block:
            if scales:
                with watched(block, where) as ranges:
                    run(hidden)
                kv_scales(block, where, ranges)
            if rotation is not None:
                rotate_block(block, where, find_groups(block, partial(run, hidden), where), rotation, run, hidden)


def _one_of_each_kind(blocks: nn.ModuleList) -> Iterator[int]:
    """The first of all blocks with the same modules and shapes."""
    seen = set()
    for index, block in enumerate(blocks):
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        kind = (modules, tuple(parameter.shape for parameter in block.parameters()))
        if kind not in seen:
            seen.add(kind)
            yield index
