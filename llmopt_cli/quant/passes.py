"""The calibration text through one block while it is quantized, as often as there is something new to be seen.

A module that is finished does not run again: attention, say, whose output is that of its output projection, is that
linear alone, on inputs that were kept on disk when it was observed. Knows nothing of quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.quant.skeleton import trim
from llmopt_cli.quant.streams import Stream, Writer
from llmopt_cli.quant.structure import Group
from llmopt_cli.quant.walk import Seen, caught, observe, places, standing_in

Step = Callable[[Tensor], Tensor]  # a batch of hidden states [B, L, H] through the block


@dataclass(eq=False)
class Passes:
    """Passes of the stream `hidden`, so many windows `together`, through `block`; `step` runs one batch.

    `products` is the dtype in which what is seen is multiplied, `calls` how many tokens of calls are kept. `plain`
    holds what the unquantized model has where errors are looked for. `place` says where the inputs of a linear are
    kept; without it, everything runs every time.
    """

    block: nn.Module
    hidden: Stream
    together: int
    step: Step
    products: torch.dtype
    calls: int = 0
    plain: Mapping[str, Stream] = field(default_factory=dict)
    place: Callable[[str], Path] | None = None
    _kept: dict[Group, Stream] = field(default_factory=dict)

    def watch(self, groups: Sequence[Group]) -> list[Seen]:
        """What `groups` see, and how far that is from what the unquantized model has, if known."""
        trim()
        parts = {name: self.plain[name].batches(self.together) for name in self._places(groups)}
        states = (dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True))
        batches, step = self.hidden.batches(self.together), self._past_finished()
        with self._keeping(groups) as keep:
            found = observe(
                self.block, groups, batches, step, self.calls, states if parts else None, self.products, keep
            )
        trim()
        return found

    def finish(self, path: Path) -> None:
        """Let the stream through the block as it is now, to `path`."""
        self.hidden.mapped(path, self.together, self._past_finished())

    def _places(self, groups: Sequence[Group]) -> list[str]:
        return list(places(self.block, groups).values()) if self.plain else []

    @contextmanager
    def _keeping(self, groups: Sequence[Group]) -> Iterator[Callable[[Tensor], None] | None]:
        """Keep what the last linear of a module reads: it is quantized next, and then the module is finished.

        Not if the block puts out its output: few passes follow then, and inputs of an MLP are wide.
        """
        group = groups[0]
        if self.place is None or group.whole is None or not group.sum:
            yield None
            return
        with Writer(self.place(group.linears[0])) as writer:
            yield writer.add
        self._kept[group] = writer.stream

    def _past_finished(self) -> Step:
        """`step`, for all batches in turn, without what is finished."""
        kept = {group: stream.batches(self.together) for group, stream in self._kept.items()}

        def step(hidden: Tensor) -> Tensor:
            finished = (self._finished(group, next(inputs).to(hidden.device)) for group, inputs in kept.items())
            with standing_in(dict(finished)):
                return self.step(hidden)

        return step

    def _finished(self, group: Group, inputs: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
        """The module that `group` ends, and its forward pass where its last linear reads `inputs`."""
        assert group.whole is not None
        whole, linear = group.whole, self.block.get_submodule(group.linears[0])
        return self.block.get_submodule(whole.name), lambda *_, **__: whole.answer(linear(inputs))


def let_through(
    block: nn.Module, hidden: Stream, together: int, step: Step, paths: Mapping[str, Path], within: torch.dtype
) -> dict[str, Stream]:
    """A stream through `block` once, and with it what modules read, by their names, kept in the dtype `within`.

    `` in `paths` is what the block puts out.
    """
    with ExitStack() as stack:
        writers = {name: stack.enter_context(Writer(path)) for name, path in paths.items()}
        for batch in hidden.batches(together):
            found, _ = caught(block, list(paths), (), partial(step, batch))
            for name, writer in writers.items():
                # Some blocks hand their MLP the tokens of all windows in one row.
                state = found[name].reshape(*batch.shape[:2], -1)
                writer.add(state.to(within) if name else state)
    return {name: writer.stream for name, writer in writers.items()}
