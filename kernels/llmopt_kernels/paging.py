"""`Pages`: the keys or values of one layer's cache. `PagedBatch`: which query tokens of a step belong to whom, and
which cache slots each may look at. `Rule`: what a layer makes of what it sees.

A batch is built once a step and shared by all layers. A slot is a token's place in the cache: block * block_size +
offset. Requests attend by slots: what comes later in the cache is not seen, whatever its position.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

QUANTIZED = {  # the largest value of each dtype into which a cache can be quantized
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
}

SHORT = 8  # query tokens of a request up to which it runs with others in one group


@dataclass(frozen=True, eq=False)
class Pages:
    """Cached keys or values of one layer: `values` (S, K, D) in the model's dtype, or in one of QUANTIZED.

    Those have `scales` float32 (S, K): every token's head has its own, so nothing has to be calibrated. A `fixed` scale
    was calibrated: all of `scales` are that, and what is larger than the dtype holds is cut off.
    """

    values: Tensor
    scales: Tensor | None = None
    fixed: float | None = None

    @classmethod
    def empty(
        cls, slots: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, fixed: float | None = None
    ) -> Self:
        """Zeros, not garbage: a masked NaN would still poison the sum over values."""
        values = torch.zeros(slots, heads, dim, dtype=dtype, device=device)
        scales = torch.full((slots, heads), fixed or 0.0, device=device) if dtype in QUANTIZED else None
        return cls(values, scales, fixed)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)


@dataclass(frozen=True, eq=False)
class Rule:
    """How one layer attends: scores are `q k^T * scale`, bent to `softcap * tanh(score / softcap)` if there is one.

    A token sees `window` positions, itself included, and none before its own `chunk` of so many positions. `sinks`
    float32 (H,) are scores that take their part of each head's softmax and give no value (gpt-oss).
    """

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Span(NamedTuple):
    """The queries of one request in a step: `length` tokens, the last of `context` cached ones, in these blocks.

    Where tokens were dropped from the cache, positions are that many `ahead` of slots.
    """

    length: int
    context: int
    blocks: Sequence[int]
    ahead: int = 0


@dataclass
class Rows:
    """Requests with equally many query tokens, `count`, attended together.

    `starts` (B,) are the places of their first ones in the packed batch, `tables` (B, M) their blocks padded with 0,
    `lengths` (B,) their cached tokens, of which the last `count` are the queries.
    """

    starts: Tensor
    count: int
    tables: Tensor
    lengths: Tensor
    longest: int
    block_size: int
    _masks: dict[tuple[int | None, int | None], Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        """(B, Q) the places of all query tokens."""
        return self.starts[:, None] + torch.arange(self.count, device=self.starts.device)

    @cached_property
    def slots(self) -> Tensor:
        """(B, L) the slots of all cached tokens, up to the longest request."""
        offsets = torch.arange(self.block_size, device=self.tables.device)
        return (self.tables[..., None] * self.block_size + offsets).flatten(1)[:, : self.longest]

    def singles(self) -> Iterator[Rows]:
        """Every query token as a group of its own, with what it may see as its whole past."""
        for request, length in enumerate(self.lengths.tolist()):
            for query in range(self.count):
                seen = length - self.count + query + 1
                one = slice(request, request + 1)
                lengths = torch.full_like(self.lengths[one], seen)
                yield Rows(self.starts[one] + query, 1, self.tables[one], lengths, seen, self.block_size)

    def visible(self, rule: Rule) -> Tensor:
        """(B, 1, Q, L) bool: causal, aligned at each request's last token, within the rule's window and chunk."""
        key = (rule.window, rule.chunk)
        if key not in self._masks:
            device = self.tables.device
            keys = torch.arange(self.longest, device=device)
            queries = self.lengths[:, None] - torch.arange(self.count, 0, -1, device=device)  # (B, Q) positions
            self._masks[key] = sees(queries[..., None], keys, rule.window, rule.chunk)[:, None]
        return self._masks[key]


def sees(queries: Tensor, keys: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Whether the token at each position of `queries` sees that of `keys`; both are broadcast."""
    mask = keys <= queries
    if window is not None:
        mask = mask & (keys > queries - window)
    return mask if chunk is None else mask & (keys >= queries // chunk * chunk)


class PagedBatch:
    """One step's attention metadata, from the spans in the order in which their queries are packed.

    `new_slots` (T,) is where the step's own keys and values go; `groups` holds the short requests in padded groups
    and every longer chunk of a prompt as a group of its own.
    """

    def __init__(self, spans: Sequence[Span], block_size: int, device: torch.device) -> None:
        self.spans = spans
        self._block_size = block_size
        self._device = device

    @cached_property
    def positions(self) -> Tensor:
        """(T,) the position of every query token in its sequence."""
        return indices(
            [at for length, context, _, ahead in self.spans for at in range(context + ahead - length, context + ahead)],
            self._device,
        )

    @cached_property
    def new_slots(self) -> Tensor:
        """(T,) the slot of every query token."""
        size = self._block_size
        return indices(
            [
                blocks[at // size] * size + at % size
                for length, context, blocks, _ in self.spans
                for at in range(context - length, context)
            ],
            self._device,
        )

    @cached_property
    def groups(self) -> list[Rows]:
        """The spans as groups of equal query length: short ones together, prompt chunks one by one."""
        ends = list(accumulate([span[0] for span in self.spans]))
        placed = [(end - span[0], span) for end, span in zip(ends, self.spans, strict=True)]
        short = [one for one in placed if one[1][0] <= SHORT]
        lengths = {span[0] for _, span in short}
        if len(lengths) > 1 and self._device.type == "cpu":  # drafts of several lengths, say: one op takes them all
            short, lengths = [token for start, span in short for token in _singly(start, span)], {1}
        groups = [[one for one in short if one[1][0] == length] for length in sorted(lengths)]
        groups += [[one] for one in placed if one[1][0] > SHORT]
        return [self._group(group) for group in groups]

    def _group(self, placed: Sequence[tuple[int, Span]]) -> Rows:
        size = self._block_size
        longest = max([span.context for _, span in placed])
        width = -(-longest // size)
        padding, tables = [0] * width, array("q")
        for _, span in placed:
            tables.extend(span.blocks[:width])
            tables.extend(padding[len(span.blocks) :])
        return Rows(
            starts=indices([start for start, _ in placed], self._device),
            count=placed[0][1].length,
            tables=indices(tables, self._device).view(-1, width),
            lengths=indices([span.context for _, span in placed], self._device),
            longest=longest,
            block_size=size,
        )


def _singly(start: int, span: Span) -> Iterator[tuple[int, Span]]:
    """Every query token of a span as a span of its own, with what it may see as its whole past."""
    before = span.context - span.length + 1
    return ((start + query, Span(1, before + query, span.blocks, span.ahead)) for query in range(span.length))


def indices(numbers: Iterable[int], device: torch.device) -> Tensor:
    """int64 (n,): by way of an array, which takes a list of numbers several times faster than torch does."""
    held = array("q", numbers)
    return torch.frombuffer(held, dtype=torch.int64).to(device) if held else torch.empty(0, dtype=torch.int64)
