"""What policies do to the cache itself: between steps what is planned is moved, within a step layers are watched.

`change` decides which blocks; here are their tensors, the queries by which a prompt's end votes, and the tables of
requests whose layers keep unlike numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError, UsageError
from llmopt_cli.model.attention import PagedLayer, Reach, Watcher
from llmopt_cli.model.load import LoadedModel
from llmopt_cli.model.rotation import Rotation, find_rotations
from llmopt_cli.runtime.compression.change import Change, Compaction, Turn
from llmopt_cli.runtime.compression.door import WINDOWS, check, known_reasons
from llmopt_cli.runtime.compression.slots import lift, put, read, slots_of, turn
from llmopt_cli.runtime.compression.votes import chosen, pyramid
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting, Streaming
from llmopt_cli.spec.recipe import Batching
from llmopt_kernels import PagedBatch, Pages, Rule, Span

Whole = tuple[Pages, Pages]  # keys and values of all layers, one layer's slots after the other's


@dataclass
class _Seen:
    """By layer, the queries (W, H, D) of a prompt's last `window` tokens as far as they were run, and the rule."""

    window: int
    queries: dict[int, Tensor]
    rules: dict[int, Rule]


class _Pick(NamedTuple):
    """Rows of a step's packed queries, and where in the window the first of them belongs."""

    seen: _Seen
    rows: slice
    place: int

    def take(self, number: int, query: Tensor, rule: Rule) -> None:
        """Keep what a layer was asked."""
        found, seen = query[self.rows], self.seen
        if number not in seen.queries:
            seen.queries[number] = query.new_zeros(seen.window, *query.shape[1:])
        seen.queries[number][self.place : self.place + len(found)] = found
        seen.rules[number] = rule


class _Tables(NamedTuple):
    """By layer, a request's blocks in the cache of all, as long as it has these `blocks` and `pages`."""

    blocks: list[int]
    pages: tuple[int, ...]
    layers: list[list[int]]


class Compressor:
    """The policies of one engine's requests. A step in which none has a policy costs nothing more."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[PagedLayer],
        checkpoint: Checkpoint,
        whole: Whole | None,
        batching: Batching,
    ) -> None:
        self._loaded, self._layers, self._whole = loaded, layers, whole
        self._name, self._size, self._limit = checkpoint.name, batching.block_size, batching.max_model_len or 0
        self._rotations: list[Rotation] = []  # found when somebody first wants to have keys turned
        self._seen: dict[Request, _Seen] = {}
        self._tables: dict[Request, _Tables] = {}
        self._reasons = known_reasons(checkpoint)
        if any(layer.reach not in (None, Reach()) or (layer.seen and layer.seen.window) for layer in layers):
            self._reasons = dict.fromkeys(self._reasons, WINDOWS)

    def check(self, policy: KvPolicy) -> None:
        """Raise UsageError or CapacityError if no request can have such a policy here.

        The first to ask for streaming has single tokens run: on the thread that steps, if there is one.
        """
        if isinstance(policy, Streaming) and not (self._rotations or self._reasons[Streaming]):
            try:
                self._rotations = find_rotations(self._loaded, self._layers)
            except ModelError as error:
                self._reasons[Streaming] = error.message
        check(policy, self._name, self._reasons, self._size, self._limit)
        if isinstance(policy, Selecting) and policy.pyramid and self._whole is None:
            raise UsageError(
                f"`{self._name}` has layers of unlike shapes: it can't have kv_policy `{policy}`",
                "take `snapkv`, which keeps as much in each of them",
            )

    @torch.inference_mode()
    def apply(self, changes: Sequence[Change], requests: Mapping[str, Request]) -> None:
        """Make the changes of a plan, in their order."""
        for change in changes:
            if isinstance(change, Turn):
                self._turn(change)
            else:
                self._compact(change, requests[change.request_id])

    def _turn(self, change: Turn) -> None:
        count, device = len(change.old) * self._size, self._loaded.device
        old, new = (slots_of(blocks, self._size, count, device) for blocks in (change.old, change.new))
        for layer, rotation in zip(self._layers, self._rotations, strict=True):
            k, v = _caches(layer)
            turn(k, old, new, rotation, change.distance)
            put(v, new, lift(v, old))

    def _compact(self, change: Compaction, request: Request) -> None:
        policy, seen = request.params.kv_policy, self._seen.pop(request)
        assert isinstance(policy, Selecting), "nothing else shrinks a prompt"
        prompt, device = request.num_prompt, self._loaded.device
        old, count = slots_of(change.old, self._size, prompt, device), len(self._layers)
        if policy.pyramid:
            request.pages = pyramid(policy, count, prompt, change.kept, self._size)
        kept = [pages * self._size for pages in request.pages] or [change.kept] * count
        taken = []  # from all layers, before anything is put: new blocks may be among the old ones
        for number, layer in enumerate(self._layers):
            k, v = _caches(layer)
            keys, queries = read(k, old), seen.queries[number].float()
            places = chosen(queries, keys, seen.rules[number], kept[number], policy.kernel)
            taken.append((lift(k, old[places]), lift(v, old[places])))
        for number, layer in enumerate(self._layers):
            caches = self._whole if policy.pyramid else _caches(layer)
            assert caches is not None, "a pyramid is refused without it"
            blocks = self._table(request, number) if policy.pyramid else change.new
            new = slots_of(blocks, self._size, kept[number], device)
            for pages, stored in zip(caches, taken[number], strict=True):
                put(pages, new, stored)

    def _current(self, request: Request) -> _Tables:
        """The tables of a request, those of the step before if none of its blocks changed."""
        found = self._tables.get(request)
        if found is None or (found.blocks, found.pages) != (request.blocks, request.pages):
            layers = [self._table(request, number) for number in range(len(self._layers))]
            found = _Tables(list(request.blocks), request.pages, layers)
        return found

    def _table(self, request: Request, number: int) -> list[int]:
        """The blocks of one layer in the cache of all: of those that the layers share out, then one in each new one."""
        layers, pages = len(self._layers), request.pages
        shared = sum(pages) // layers if pages else 0
        region = self._whole_blocks()
        first = sum(pages[:number])
        places = range(first, first + pages[number]) if pages else ()
        cells = [place % layers * region + request.blocks[place // layers] for place in places]
        return cells + [number * region + block for block in request.blocks[shared:]]

    def _whole_blocks(self) -> int:
        """Blocks of one layer."""
        assert self._whole is not None, "a pyramid is refused without it"
        return self._whole[0].values.shape[0] // len(self._layers) // self._size

    @contextmanager
    def step(self, chunks: Sequence[Chunk], requests: Mapping[str, Request], spans: Sequence[Span]) -> Iterator[None]:
        """Watch the layers while these chunks run, and give each its own tables where a request needs them."""
        # Who lost its blocks before it was compressed is watched anew, if it comes back.
        self._seen = {request: seen for request, seen in self._seen.items() if request.blocks}
        picks = list(self._picks(chunks, requests))
        owners = [requests[chunk.request_id] for chunk in chunks]
        apart = any(request.pages for request in owners)
        self._tables = {request: self._current(request) for request in owners} if apart else {}
        self._loaded.context.apart = bool(picks) or apart
        try:
            for number, layer in enumerate(self._layers):
                if picks:
                    layer.watcher = self._watcher(number, picks)
                if apart and self._whole is not None:
                    own = [self._own(number, request, span) for request, span in zip(owners, spans, strict=True)]
                    layer.own = (PagedBatch(own, self._size, self._loaded.device), *self._whole)
            yield
        finally:
            self._loaded.context.apart = False
            for layer in self._layers:
                layer.watcher, layer.own = None, None

    def _own(self, number: int, request: Request, span: Span) -> Span:
        """What one layer has of a request, in the cache of all layers."""
        table = self._tables[request].layers[number]
        if not request.pages:
            return span._replace(blocks=table)
        shared = sum(request.pages) // len(self._layers)
        return span._replace(blocks=table, context=span.context + (request.pages[number] - shared) * self._size)

    def _picks(self, chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> Iterator[_Pick]:
        """The queries of a step that will vote."""
        row = 0
        for chunk in chunks:
            request = requests[chunk.request_id]
            policy, prompt = request.params.kv_policy, request.num_prompt
            if isinstance(policy, Selecting) and policy.kept(prompt, self._size) < prompt:
                begin = max(chunk.start, prompt - policy.window)
                end = min(chunk.start + chunk.length, prompt)
                if begin < end:
                    seen = self._seen.setdefault(request, _Seen(policy.window, {}, {}))
                    first = row + begin - chunk.start
                    yield _Pick(seen, slice(first, first + end - begin), begin - (prompt - policy.window))
            row += chunk.length

    def _watcher(self, number: int, picks: Sequence[_Pick]) -> Watcher:
        def watch(query: Tensor, _: Tensor, rule: Rule) -> None:
            for pick in picks:
                pick.take(number, query, rule)

        return watch

    def close(self) -> None:
        """Let go of the cache."""
        self._whole = None


def _caches(layer: PagedLayer) -> Whole:
    assert layer.k is not None, "the cache is hung on the layers before the first step"
    assert layer.v is not None
    return layer.k, layer.v
