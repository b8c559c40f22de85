"""Walking a model block by block: what each block is given, what its linears see of it, and the head at the end.

The model's own forward does everything outside the blocks: they are passed over, or stand in for themselves. Knows how
to run blocks and collect statistics; neither structure nor quantization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.structure import Group

BATCH_TOKENS = 512
Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of every block, but for the hidden states


class Walk:
    """A skeleton that runs. The arguments of its blocks (masks, rotary angles) depend on the shape of a batch alone.

    They are recorded once for every shape of token ids [B, L]; ModelError if they turn out to depend on the tokens.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._arguments: dict[tuple[int, int], Arguments] = {}
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden

    @torch.inference_mode()
    def learn(self, *windows: Tensor) -> None:
        """Find out how blocks answer (with a tensor or a tuple that begins with one) and what else they are given.

        Recorded for the shapes of the first and of the last batch of each of `windows`: all there are.
        """
        with self.skeleton.outside():
            self._learn_answer(windows[0][:1])
            for ids in windows:
                batches = torch.split(ids, at_once(ids))
                for batch in (batches[0], batches[-1]):
                    next(self.enter(batch, len(batch)))

    def _learn_answer(self, ids: Tensor) -> None:
        answers: list[Any] = []
        with self.skeleton.block(0) as block:
            hook = block.register_forward_hook(lambda _, args, output: answers.append(output))
            others = self.skeleton.blocks[1:]
            try:
                with _standing_in([_pass_over(self._wrap)] * len(others), others):
                    self._forward(ids)
            except (AttributeError, TypeError, RuntimeError, IndexError):
                if not answers:  # after the first answer it is the stand-ins that answered in the wrong way
                    raise
            hook.remove()
        if isinstance(answers[0], tuple):
            rest = answers[0][1:]
            self._wrap = lambda hidden: (hidden, *rest)

    @torch.inference_mode()
    def enter(self, windows: Tensor, together: int) -> Iterator[Tensor]:
        """What reaches the first block for token ids [N, L], `together` windows at a time. Needs the outside."""
        for ids in torch.split(windows, together):
            entered: list[Tensor] = []
            arguments: Arguments = []
            recorders = [self._recorder(entered, arguments)] * len(self.skeleton.blocks)
            with _standing_in(recorders, self.skeleton.blocks):
                self._forward(ids)
            self._keep(tuple(ids.shape), arguments)
            yield entered[0]

    def _recorder(self, entered: list[Tensor], arguments: Arguments) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden_states)
            arguments.append((args, kwargs))
            return self._wrap(hidden_states)

        return forward

    def _keep(self, shape: tuple[int, ...], arguments: Arguments) -> None:
        known = self._arguments.setdefault((shape[0], shape[1]), arguments)
        if known is not arguments and not _equal(known, arguments):
            raise ModelError("the blocks are given more than hidden states that depends on the tokens: can't be walked")

    @torch.inference_mode()
    def run(self, index: int, hidden: Tensor, block: nn.Module | None = None) -> Tensor:
        """The output [B, L, H] of block number `index` (or of `block` in its place), which must hold its weights."""
        args, kwargs = self._arguments[hidden.shape[0], hidden.shape[1]][index]
        hidden = hidden.to(self.skeleton.device)
        return first_output((block or self.skeleton.blocks[index])(hidden, *args, **kwargs))

    @torch.inference_mode()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, L, V] where `hidden` [B, L, H] came out of the last block for `ids`. Needs the outside."""
        blocks = self.skeleton.blocks
        last = self._wrap(hidden.to(self.skeleton.device))
        with _standing_in([_pass_over(self._wrap)] * (len(blocks) - 1) + [lambda *_, **__: last], blocks):
            logits: Tensor = self._forward(ids).logits
        return logits

    def _forward(self, ids: Tensor) -> Any:
        return self.skeleton.model(input_ids=ids.to(self.skeleton.device), use_cache=False)


def at_once(windows: Tensor) -> int:
    """How many of these windows run together."""
    return max(1, BATCH_TOKENS // windows.shape[1])


@contextmanager
def _standing_in(forwards: Sequence[Callable[..., Any]], blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks compute something else for a while."""
    changed = list(blocks)
    for block, forward in zip(changed, forwards, strict=True):
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block in changed:
            del block.__dict__["forward"]


def _pass_over(wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return wrap(hidden_states)

    return forward


def _equal(one: Any, other: Any) -> bool:
    """Whether two structures of arguments hold the same numbers."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return True


def first_output(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its arguments and its first output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(eq=False)
class Seen:
    """What the readers of one tensor saw. `gram` [in, in] is the mean of x x^T; `mean_abs`, `max_abs` [in] are of |x|.

    `calls` are some calls of their parent, enough to compare its outputs. `cross` [in, in] is the mean of
    (x' - x) x^T where x' is what they would have seen in the unquantized model, if that runs alongside.
    """

    gram: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)
    cross: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count inputs [..., in]; until `close`, sums stand where means will be."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            self.gram.addmm_(rows.T, rows)
            self.mean_abs.add_(rows.abs().sum(0))
            torch.maximum(self.max_abs, rows.abs().amax(0), out=self.max_abs)
        self.tokens += len(rows)

    def close(self) -> None:
        """Turn sums into means."""
        for total in (self.gram, self.mean_abs, *([] if self.cross is None else [self.cross])):
            total.div_(max(1, self.tokens))


class _EnoughError(Exception):
    """All readers have been called: the rest of the block's forward is not needed."""


@torch.inference_mode()
def observe(
    block: nn.Module,
    groups: Sequence[Group],
    batches: Iterator[Tensor],
    run: Callable[[Tensor], Tensor],
    tokens: int,
) -> list[Seen]:
    """Run batches through `block`, as far as the linears of `groups` go, and gather what each group sees.

    Calls of a group's parent are kept until they hold `tokens` tokens.
    """
    found = [_empty(block, group) for group in groups]
    for hidden in batches:
        parents = [
            group.parent if _compared(group) and sum(_tokens(call) for call in seen.calls) < tokens else None
            for group, seen in zip(groups, found, strict=True)
        ]
        for seen, (x, call) in zip(found, _caught(block, groups, parents, partial(run, hidden)), strict=True):
            seen.add(x)
            if call is not None:
                seen.calls.append(call)
    for seen in found:
        seen.close()
    return found


@torch.inference_mode()
def cross_moments(
    groups: Sequence[Group],
    runs: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]],
    batches: Iterator[tuple[Tensor, Tensor]],
    found: Sequence[Seen],
) -> None:
    """Set `cross` of what was seen: `runs` and each of `batches` are those of the quantized and of the plain model."""
    none = [None] * len(groups)
    for pair in batches:
        ours, plain = (
            _caught(block, groups, none, partial(run, hidden)) for (block, run), hidden in zip(runs, pair, strict=True)
        )
        for seen, (x, _), (true, _) in zip(found, ours, plain, strict=True):
            rows, wanted = (part.reshape(-1, part.shape[-1]) for part in (x, true))
            if rows.shape == wanted.shape:  # an expert may be sent other tokens by the two
                seen.cross = torch.zeros_like(seen.gram) if seen.cross is None else seen.cross
                seen.cross.addmm_((wanted - rows).T, rows, alpha=1 / max(1, seen.tokens))


def _caught(
    block: nn.Module, groups: Sequence[Group], parents: Sequence[str | None], run: Callable[[], Any]
) -> list[tuple[Tensor, Call | None]]:
    """What the first linear of each group reads in one run, and the call of its parent if one is asked for."""
    inputs: dict[int, Tensor] = {}
    calls: dict[int, Call] = {}
    wanted = {index for index, parent in enumerate(parents) if parent is not None}

    def reader(index: int) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Tensor]) -> None:
            inputs[index] = args[0]
            if len(inputs) == len(groups) and not wanted:
                raise _EnoughError

        return catch

    def parent(index: int) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[index] = Call(args, kwargs, first_output(output))

        return catch

    hooks = [block.get_submodule(one.linears[0]).register_forward_pre_hook(reader(i)) for i, one in enumerate(groups)]
    hooks += [
        block.get_submodule(str(parents[index])).register_forward_hook(parent(index), with_kwargs=True)
        for index in wanted
    ]
    try:
        with contextlib.suppress(_EnoughError):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [(inputs[index], calls.get(index)) for index in range(len(groups))]


def _empty(block: nn.Module, group: Group) -> Seen:
    weight: Any = block.get_submodule(group.linears[0]).weight
    width = weight.shape[1]
    return Seen(weight.new_zeros(width, width), weight.new_zeros(width), weight.new_zeros(width))


def _compared(group: Group) -> bool:
    """Whether calls are worth keeping: of a lone linear the second moments say enough, unless a norm may be scaled."""
    return group.parent != group.linears[0] or (group.producer is not None and group.producer.kind != "rows")


def _tokens(call: Call) -> int:
    return call.output.numel() // call.output.shape[-1]
