"""Walking a model block by block: what each block is given, and what its linears see of it.

Knows how to run blocks and collect statistics; neither structure nor quantization. Activations of all samples stay in
memory, float32: samples x length x hidden x 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError

BATCH_TOKENS = 2048


@dataclass(eq=False)
class Batch:
    """Some sequences on their way through the model: `hidden` [B, L, H] before a block, and what else each block gets.

    `arguments[i]` are block i's other arguments (masks, rotary angles): they differ where blocks differ in kind.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its arguments and its first output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What the readers of one tensor saw. `gram` [in, in] is the mean of x x^T, `mean_abs` [in] that of |x|.

    `calls` are some calls of their parent, enough to compare its outputs.
    """

    tokens: int
    gram: Tensor
    mean_abs: Tensor
    calls: list[Call]


@torch.inference_mode()
def enter(model: Any, blocks: nn.ModuleList, windows: Tensor) -> list[Batch]:
    """Run the model once over token ids [N, L] and keep what reaches its blocks."""
    batches: list[Batch] = []
    hooks = [
        block.register_forward_pre_hook(_keeper(batches, index), with_kwargs=True) for index, block in enumerate(blocks)
    ]
    for ids in torch.split(windows, max(1, BATCH_TOKENS // windows.shape[1])):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return batches


def _keeper(batches: list[Batch], index: int) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if index == 0:
            batches.append(Batch(args[0] if args else kwargs["hidden_states"], []))
        batches[-1].arguments.append((args[1:], others))

    return keep


@torch.inference_mode()
def run_block(block: nn.Module, batch: Batch, index: int) -> Tensor:
    """The output [B, L, H] of block number `index`."""
    args, kwargs = batch.arguments[index]
    return first_output(block(batch.hidden, *args, **kwargs))


def first_output(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@torch.inference_mode()
def observe(block: nn.Module, index: int, batches: Sequence[Batch], reader: str, parent: str, call_tokens: int) -> Seen:
    """Run all batches through `block`; gather what its linear `reader` sees, and calls of `parent` of `call_tokens`."""
    linear: Any = block.get_submodule(reader)
    gram = linear.weight.new_zeros(linear.in_features, linear.in_features)
    mean_abs = linear.weight.new_zeros(linear.in_features)
    tokens = 0
    calls: list[Call] = []

    def gather(_: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal tokens
        x = args[0].reshape(-1, linear.in_features)
        gram.addmm_(x.T, x)
        mean_abs.add_(x.abs().sum(0))
        tokens += len(x)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not calls or tokens <= call_tokens:
            calls.append(Call(args, kwargs, first_output(output)))

    hooks = [linear.register_forward_pre_hook(gather)]
    if parent != reader:
        hooks.append(block.get_submodule(parent).register_forward_hook(keep, with_kwargs=True))
    for batch in batches:
        run_block(block, batch, index)
    for hook in hooks:
        hook.remove()
    if not bool(gram.isfinite().all()):
        raise ModelError(
            f"block {index} feeds `{reader}` numbers that are not finite", "check the model, or try --device cpu"
        )
    return Seen(tokens, gram / tokens, mean_abs / tokens, calls)


def advance(block: nn.Module, index: int, batches: Sequence[Batch]) -> None:
    """Replace every batch's hidden states by the output of `block`."""
    for batch in batches:
        batch.hidden = run_block(block, batch, index)
