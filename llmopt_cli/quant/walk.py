"""Walking a model block by block: what each block is given, what its linears see of it, and the head at the end.

The model's own forward does everything outside the blocks: they are passed over, or stand in for themselves. Knows how
to run blocks and collect statistics; neither structure nor quantization.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.structure import Group, of_expert

BATCH_TOKENS = 512
STRIP = 256  # columns of a Gram matrix at once: what lies above their diagonal block follows from what lies below
Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of every block, but for the hidden states


class _EnoughError(Exception):
    """All that was wanted has been seen: the rest of the forward pass is not needed."""


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

        def catch(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            answers.append(output)
            raise _EnoughError

        with self.skeleton.block(0) as block:
            hook = block.register_forward_hook(catch)
            with contextlib.suppress(_EnoughError):
                self._forward(ids)
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
            recorder = self._recorder(entered, arguments)
            with standing_in(dict.fromkeys(self.skeleton.blocks, recorder)), contextlib.suppress(_EnoughError):
                self._forward(ids)
            self._keep(tuple(ids.shape), arguments)
            yield entered[0]

    def _recorder(self, entered: list[Tensor], arguments: Arguments) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden_states)
            arguments.append((args, kwargs))
            if len(arguments) == len(self.skeleton.blocks):
                raise _EnoughError
            return self._wrap(hidden_states)

        return forward

    def _keep(self, shape: tuple[int, ...], arguments: Arguments) -> None:
        known = self._arguments.setdefault((shape[0], shape[1]), arguments)
        if known is not arguments and not _equal(known, arguments):
            raise ModelError("the blocks are given more than hidden states that depends on the tokens: can't be walked")

    @torch.inference_mode()
    def run(self, index: int, hidden: Tensor, products: torch.dtype = torch.float32) -> Tensor:
        """The output [B, L, H] of block number `index`, which must hold its weights; `products` says how it multiplies.

        The hidden states themselves stay float32.
        """
        args, kwargs = self._arguments[hidden.shape[0], hidden.shape[1]][index]
        device = self.skeleton.device
        with torch.autocast(device.type, products, enabled=products != torch.float32):
            return first_output(self.skeleton.blocks[index](hidden.to(device), *args, **kwargs))

    @torch.inference_mode()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, L, V] where `hidden` [B, L, H] came out of the last block for `ids`. Needs the outside."""
        *before, last = self.skeleton.blocks
        output = self._wrap(hidden.to(self.skeleton.device))
        with standing_in(dict.fromkeys(before, _pass_over(self._wrap)) | {last: lambda *_, **__: output}):
            logits: Tensor = self._forward(ids).logits
        return logits

    def at(self, ids: Tensor, hidden: Tensor, positions: slice) -> Tensor:
        """The logits [B, T, V] at some positions: what follows the blocks takes each by itself."""
        return self.logits(ids[:, positions], hidden[:, positions])

    def behind(self, hidden: Tensor) -> Tensor:
        """Logits [B, L, V] behind the last block's `hidden` [B, L, H], whatever the tokens. Needs the outside."""
        return self.logits(torch.zeros(hidden.shape[:2], dtype=torch.long), hidden)

    def _forward(self, ids: Tensor) -> Any:
        return self.skeleton.model(input_ids=ids.to(self.skeleton.device), use_cache=False)


def at_once(windows: Tensor) -> int:
    """How many of these windows run together."""
    return max(1, BATCH_TOKENS // windows.shape[1])


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else for a while."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


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

    `calls` are some calls of their parent, enough to compare its outputs. `cross` is the mean of (y' - y) x^T, if it is
    known that the unquantized model has y' in the place of y. That is x itself, and `cross` [in, in]; but [out, in] for
    a group with a `sum`, which y is then. Tokens are multiplied in the dtype `products` and added up in float32.
    """

    gram: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)
    cross: Tensor | None = None
    products: torch.dtype = torch.float32

    def add(self, x: Tensor, missing: Tensor | None = None) -> None:
        """Count inputs [..., in] and y' - y of them; until `close`, sums stand where means will be."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        self.tokens += len(rows)
        self.mean_abs.add_(rows.abs().sum(0))
        torch.maximum(self.max_abs, rows.abs().amax(0), out=self.max_abs)
        rows = rows.to(self.products)
        for start in range(0, rows.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            self.gram[start:, strip] += rows[:, start:].T @ rows[:, strip]
        if missing is not None:
            owed = missing.reshape(-1, missing.shape[-1]).to(self.products)
            self.cross = self.gram.new_zeros(owed.shape[1], rows.shape[1]) if self.cross is None else self.cross
            self.cross += owed.T @ rows

    def close(self) -> None:
        """Turn sums into means."""
        for total in (self.gram, self.mean_abs, *([] if self.cross is None else [self.cross])):
            total.div_(max(1, self.tokens))
        for start in range(0, len(self.gram), STRIP):
            stop = start + STRIP
            self.gram[start:stop, stop:] = self.gram[stop:, start:stop].T


@torch.inference_mode()
def observe(
    block: nn.Module,
    groups: Sequence[Group],
    batches: Iterator[Tensor],
    run: Callable[[Tensor], Tensor],
    tokens: int,
    plain: Iterable[Mapping[str, Tensor]] | None = None,
    products: torch.dtype = torch.float32,
    keep: Callable[[Tensor], None] | None = None,
) -> list[Seen]:
    """Run batches through `block`, as far as the linears of `groups` go, and gather what each group sees.

    Calls of a group's parent are kept until they hold `tokens` tokens. `plain` is what the unquantized model has where
    errors are looked for, batch by batch, by the names of those `places`. `keep` is given what the first group reads.
    """
    found = [_empty(block, group, products) for group in groups]
    compared = {} if plain is None else places(block, groups)
    readers = list(dict.fromkeys([group.linears[0] for group in groups] + list(compared.values())))
    for hidden, wanted in zip(batches, itertools.repeat({}) if plain is None else plain, strict=False):
        parents = {
            group.parent
            for group, seen in zip(groups, found, strict=True)
            if _compared(group) and sum(_tokens(call) for call in seen.calls) < tokens
        }
        inputs, calls = caught(block, readers, parents, partial(run, hidden))
        for group, seen in zip(groups, found, strict=True):
            place = compared.get(group)
            seen.add(inputs[group.linears[0]], None if place is None else _owed(wanted[place], inputs[place]))
            if group.parent in calls:
                seen.calls.append(calls[group.parent])
        if keep is not None:
            keep(inputs[groups[0].linears[0]])
    for seen in found:
        seen.close()
    return found


def _owed(wanted: Tensor, got: Tensor) -> Tensor:
    # Both rounded to what is kept on disk: nothing is owed where nothing was lost.
    return wanted.to(got.device).view_as(got) - got.to(wanted.dtype)


def places(block: nn.Module, groups: Sequence[Group]) -> dict[Group, str]:
    """The module on whose input the errors before each group are seen, `` being what follows the block.

    Groups of experts have none: the unquantized model may send them other tokens.
    """
    return {
        group: group.linears[0] if group.sum is None else group.sum
        for group in groups
        if not of_expert(block, group.linears[0])
    }


def caught(
    block: nn.Module, readers: Sequence[str], parents: Collection[str], run: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Call]]:
    """What the modules `readers` read in one run (`` is the block's own output), and the calls of `parents`."""
    inputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}

    def reader(name: str) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Tensor]) -> None:
            inputs[name] = args[0]
            if len(inputs) == len(readers) and not parents:
                raise _EnoughError

        return catch

    def parent(name: str) -> Callable[..., None]:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = Call(args, kwargs, first_output(output))

        return catch

    hooks = [block.get_submodule(name).register_forward_pre_hook(reader(name)) for name in readers if name]
    hooks += [block.get_submodule(name).register_forward_hook(parent(name), with_kwargs=True) for name in parents]
    try:
        with contextlib.suppress(_EnoughError):
            inputs[""] = run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, calls


def _empty(block: nn.Module, group: Group, products: torch.dtype) -> Seen:
    weight: Any = block.get_submodule(group.linears[0]).weight
    width = weight.shape[1]
    zeros = weight.new_zeros
    return Seen(zeros(width, width), zeros(width), zeros(width), products=products)


def _compared(group: Group) -> bool:
    """Whether calls are worth keeping: of a lone linear the second moments say enough, unless a norm may be scaled."""
    return group.parent != group.linears[0] or (group.producer is not None and group.producer.kind != "rows")


def _tokens(call: Call) -> int:
    return call.output.numel() // call.output.shape[-1]
