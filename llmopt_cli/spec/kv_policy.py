"""`KvPolicy`: which cached tokens a request keeps. Numbers and their spelling; no tensors and no blocks.

`Streaming` drops what lies between the first and the last tokens, again and again; `Selecting` drops once, behind the
prompt, what the prompt's end does not look at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from llmopt_cli.errors import UnknownNameError, UsageError

OFF = "none"
EXAMPLE = "write it as `streaming:sinks=4,window=1020`, or `snapkv:budget=256,window=32`"


@dataclass(frozen=True, slots=True)
class Streaming:
    """StreamingLLM (arXiv 2309.17453): the first `sinks` tokens and the last `window`, each in whole blocks.

    What is dropped depends on positions alone: at every multiple of the `stride`, all blocks that end before the window
    of the token there. Between two of them the window grows, so answers do not depend on how a prompt is cut.
    """

    sinks: int = 4
    window: int = 1020
    unbounded: ClassVar[bool] = True  # the context limit does not hold for it

    def __post_init__(self) -> None:
        _check(self.sinks >= 0, f"kv_policy: sinks must be at least 0, not {self.sinks}")
        _check(self.window >= 1, f"kv_policy: window must be at least 1, not {self.window}")

    def __str__(self) -> str:
        return f"streaming:sinks={self.sinks},window={self.window}"

    def stride(self, block_size: int) -> int:
        """Tokens from one moment of dropping to the next: a quarter of the window, in blocks."""
        return max(1, self.window // 4 // block_size) * block_size

    def sink_blocks(self, block_size: int) -> int:
        """Blocks at the beginning that are kept."""
        return -(-self.sinks // block_size)

    def dropped(self, position: int, block_size: int) -> int:
        """Blocks that the token at `position` does not see any more."""
        stride = self.stride(block_size)
        start = position // stride * stride - self.window
        return max(0, start // block_size - self.sink_blocks(block_size))

    def most_cached(self, block_size: int) -> int:
        """Slots that it takes at most, those of the sinks twice: as they were, and as they are turned."""
        return self._most_seen(block_size) + self.sink_blocks(block_size) * block_size

    def _most_seen(self, block_size: int) -> int:
        return self.window + (self.sink_blocks(block_size) + 1) * block_size + self.stride(block_size)

    def longest_run(self, num_computed: int, num_prompt: int, block_size: int) -> int:
        """Tokens that can run before something is to be dropped."""
        stride, first = self.stride(block_size), self._first(block_size)
        return first - num_computed if num_computed < first else stride - num_computed % stride

    def cached_at_first(self, num_tokens: int, num_prompt: int, block_size: int) -> int:
        """Slots for which a request of so many known tokens must have room when it begins."""
        return min(num_tokens, self._most_seen(block_size))

    def shared(self, num_prompt: int, block_size: int) -> int:
        """Tokens at the beginning that may be found in the cache: those that see all before them, less one."""
        return self._first(block_size) - 1

    def _first(self, block_size: int) -> int:
        """The position at which something is dropped for the first time."""
        stride, full = self.stride(block_size), self.window + (self.sink_blocks(block_size) + 1) * block_size
        return -(-full // stride) * stride


@dataclass(frozen=True, slots=True)
class Selecting:
    """SnapKV (arXiv 2404.14469), or with `pyramid` PyramidKV (arXiv 2406.02069).

    Behind the prompt `budget` slots are kept in every layer, or on average over the layers: the last `window` tokens,
    and for each KV head those that they look at most, in scores pooled over `kernel` positions. A budget of 1 or less
    is a share of the prompt.
    """

    budget: float = 0.25
    window: int = 32
    kernel: int = 5
    pyramid: bool = False
    unbounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        budget = self.budget
        _check(self.window >= 1, f"kv_policy: window must be at least 1, not {self.window}")
        _check(budget > 0, f"kv_policy: budget must be above 0, not {budget:g}")
        _check(
            budget <= 1 or budget == int(budget), f"kv_policy: budget must be a whole number or a share, not {budget:g}"
        )
        _check(
            budget <= 1 or budget >= self.window,
            f"kv_policy: budget {budget:g} is below the window of {self.window} that it holds",
        )
        _check(self.kernel >= 1 and self.kernel % 2 == 1, f"kv_policy: kernel must be odd, not {self.kernel}")

    def __str__(self) -> str:
        name = "pyramidkv" if self.pyramid else "snapkv"
        return f"{name}:budget={self.budget:g},window={self.window},kernel={self.kernel}"

    def kept(self, num_prompt: int, block_size: int) -> int:
        """Slots that a prompt keeps, per layer or on average; all of it where the budget is no less.

        With a pyramid they are whole blocks, so that what follows falls into the same places in all layers.
        """
        wanted = math.ceil(self.budget * num_prompt) if self.budget <= 1 else int(self.budget)
        wanted = max(wanted, self.window)
        if self.pyramid:
            wanted = max(wanted // block_size, -(-self.window // block_size)) * block_size
        return min(wanted, num_prompt)

    def longest_run(self, num_computed: int, num_prompt: int, block_size: int) -> int:
        """Tokens that can run before something is to be dropped."""
        return num_prompt - num_computed if num_computed < num_prompt else 2**31

    def cached_at_first(self, num_tokens: int, num_prompt: int, block_size: int) -> int:
        """Slots for which a request of so many known tokens must have room when it begins."""
        return num_prompt if self.kept(num_prompt, block_size) < num_prompt else num_tokens

    def shared(self, num_prompt: int, block_size: int) -> int:
        """Tokens at the beginning that may be found in the cache: the queries of a voting window must be computed."""
        return num_prompt - self.window if self.kept(num_prompt, block_size) < num_prompt else 2**31


KvPolicy = Streaming | Selecting
KINDS: dict[str, tuple[type[KvPolicy], dict[str, Any]]] = {
    "streaming": (Streaming, {}),
    "snapkv": (Selecting, {}),
    "pyramidkv": (Selecting, {"pyramid": True}),
}


def parse_policy(text: str) -> KvPolicy | None:
    """What `text` spells, such as `snapkv:budget=256,window=32`; None for `none`. UsageError if it spells nothing."""
    name, _, rest = text.strip().partition(":")
    if name == OFF and not rest:
        return None
    if name not in KINDS:
        raise UnknownNameError("kv_policy", name, [OFF, *KINDS])
    kind, given = KINDS[name]
    known = {one.name: float if one.name == "budget" else int for one in fields(kind) if one.name != "pyramid"}
    values = dict(given)
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UsageError(f"kv_policy: {name} has no setting `{key}`, but {', '.join(known)}", EXAMPLE)
        try:
            values[key] = known[key](value)
        except ValueError:
            raise UsageError(f"kv_policy: {key} must be a number, not `{value}`", EXAMPLE) from None
    return kind(**values)


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise UsageError(message, EXAMPLE)
