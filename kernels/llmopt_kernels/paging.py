"""`Pages`: the keys or values of one layer's cache. `PagedBatch`: which query tokens of a step belong to whom, and
which cache slots each may look at.

A batch is built once a step and shared by all layers. A slot is a token's place in the cache: block * block_size +
offset. There is room for more: block tables could differ per layer, and `visible` could hold a mask among drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

QUANTIZED = {  # the largest value of each dtype into which a cache can be quantized
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e5m2: 57344.0,
}


@dataclass(frozen=True, eq=False)
class Pages:
    """Cached keys or values of one layer: `values` (S, K, D) in the model's dtype, or in one of QUANTIZED.

    Those have `scales` float32 (S, K): every token's head has its own, so nothing has to be calibrated.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def empty(cls, slots: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Self:
        """Zeros, not garbage: a masked NaN would still poison the sum over values."""
        values = torch.zeros(slots, heads, dim, dtype=dtype, device=device)
        return cls(values, torch.zeros(slots, heads, device=device) if dtype in QUANTIZED else None)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)


@dataclass(frozen=True)
class Span:
    """The queries of one request in a step: `length` tokens, the last of `context` cached ones, in these blocks."""

    length: int
    context: int
    blocks: Sequence[int]


@dataclass
class Rows:
    """Requests with equally many query tokens, attended together.

    `rows` (B, Q) are their places in the packed batch, `tables` (B, M) their blocks padded with 0, `lengths` (B,) their
    cached tokens, of which the last Q are the queries.
    """

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    longest: int
    block_size: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @cached_property
    def slots(self) -> Tensor:
        """(B, L) the slots of all cached tokens, up to the longest request."""
        offsets = torch.arange(self.block_size, device=self.tables.device)
        return (self.tables[..., None] * self.block_size + offsets).flatten(1)[:, : self.longest]

    def visible(self, window: int | None) -> Tensor:
        """(B, 1, Q, L) bool: causal, aligned at each request's last token; with `window` only that many positions."""
        if window not in self._masks:
            device, count = self.tables.device, self.rows.shape[1]
            keys = torch.arange(self.longest, device=device)
            queries = self.lengths[:, None] - torch.arange(count, 0, -1, device=device)  # (B, Q) positions
            mask = keys <= queries[..., None]
            if window is not None:
                mask &= keys > queries[..., None] - window
            self._masks[window] = mask[:, None]
        return self._masks[window]


class PagedBatch:
    """One step's attention metadata, from the spans in the order in which their queries are packed.

    `new_slots` (T,) is where the step's own keys and values go; `groups` holds the one-token requests as one padded
    group and every chunk of a prompt as a group of its own.
    """

    def __init__(self, spans: Sequence[Span], block_size: int, device: torch.device) -> None:
        self.spans = spans
        self._block_size = block_size
        self._device = device

    @cached_property
    def positions(self) -> Tensor:
        """(T,) the position of every query token in its sequence."""
        each = [position for span in self.spans for position in range(span.context - span.length, span.context)]
        return torch.tensor(each, device=self._device)

    @cached_property
    def new_slots(self) -> Tensor:
        """(T,) the slot of every query token."""
        size = self._block_size
        slots = [
            span.blocks[position // size] * size + position % size
            for span in self.spans
            for position in range(span.context - span.length, span.context)
        ]
        return torch.tensor(slots, device=self._device)

    @cached_property
    def groups(self) -> list[Rows]:
        """The spans as groups of equal query length: all decodes in one, prompt chunks one by one."""
        starts = [0]
        for span in self.spans:
            starts.append(starts[-1] + span.length)
        placed = list(zip(starts, self.spans, strict=False))
        decodes = [(start, span) for start, span in placed if span.length == 1]
        groups = ([decodes] if decodes else []) + [[(start, span)] for start, span in placed if span.length > 1]
        return [self._group(group) for group in groups]

    def _group(self, placed: Sequence[tuple[int, Span]]) -> Rows:
        size, count = self._block_size, placed[0][1].length
        longest = max(span.context for _, span in placed)
        width = -(-longest // size)
        tables = [[*span.blocks[:width], *[0] * (width - len(span.blocks))] for _, span in placed]
        starts = torch.tensor([start for start, _ in placed], device=self._device)
        return Rows(
            rows=starts[:, None] + torch.arange(count, device=self._device),
            tables=torch.tensor(tables, device=self._device),
            lengths=torch.tensor([span.context for _, span in placed], device=self._device),
            longest=longest,
            block_size=size,
        )
