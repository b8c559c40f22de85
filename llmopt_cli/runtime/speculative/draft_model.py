"""A small model with the same tokens drafts for a large one, over a paged cache of its own.

A request's tokens are caught up with only when they are drafted for again, and what another that begins alike had run
is shared. Whoever gets no room is not drafted for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import LoadedModel
from llmopt_cli.model.lora import Loras
from llmopt_cli.runtime.budget import CacheSize
from llmopt_cli.runtime.kv_cache import hang_cache, release_cache
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.runner import ModelRunner
from llmopt_cli.runtime.sampler import weights_of
from llmopt_cli.runtime.scheduler import Chunk, SchedulerState
from llmopt_cli.runtime.speculative.proposer import Draft
from llmopt_cli.runtime.speculative.room import Room
from llmopt_cli.runtime.speculative.verify import draw
from llmopt_cli.spec.recipe import Batching


@dataclass(slots=True, eq=False)
class _Follower:
    """A request as the draft model has it: the same list of tokens, its own cache. `ran` are the drafts in that."""

    request: Request
    stream: Random
    ran: tuple[int, ...] = ()
    since: int = 0  # where `ran` begins

    def note(self) -> None:
        """Remember what was drafted on top of which tokens."""
        self.ran, self.since = self.request.drafts, self.request.num_tokens

    def settle(self) -> None:
        """Keep of the cache what the tokens known by now confirm; the last of them is to run again."""
        request, known = self.request, self.request.token_ids[self.since :]
        agreed = next(
            (index for index, pair in enumerate(zip(self.ran, known, strict=False)) if pair[0] != pair[1]), None
        )
        confirmed = self.since + (min(len(self.ran), len(known)) if agreed is None else agreed)
        held = request.num_computed if request.blocks else 0  # others may have taken them
        request.num_computed = request.num_cached = min(held, confirmed, request.num_tokens - 1)
        request.drafts = self.ran = ()


class DraftModel:
    """Drafts with `loaded`, whose cache of `size` it hangs. The token budget is the target's, and so is what is shared.

    Texts that would be longer than `context` are left alone.
    """

    in_turn = True

    def __init__(self, loaded: LoadedModel, size: CacheSize, batching: Batching, context: int) -> None:
        self._layers = paged_layers(loaded.model)
        hang_cache(self._layers, size, loaded.dtype, loaded.device)
        self._runner = ModelRunner(loaded, size.block_size, Loras(loaded.model, ()))
        self._room, self._context = Room(size.num_blocks, size.block_size), context
        self._state = SchedulerState(batching, self._room.pool, share_prefixes=batching.enable_prefix_caching)
        self._followers: dict[str, _Follower] = {}

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """As long as wanted, at most; nothing for those whose past does not fit into this pass."""
        wanted = {one.request_id: length for one, length in zip(requests, lengths, strict=True) if length}
        running = self._begin([one for one in requests if one.request_id in wanted], wanted)
        tokens: dict[str, list[int]] = {name: [] for name in running}
        chances: dict[str, list[Tensor]] = {name: [] for name in running}
        while running:
            found, running = self._run(running), []
            for name, (token, chance) in found.items():
                tokens[name].append(token)
                if chance is not None:
                    chances[name].append(chance)
                if len(tokens[name]) < wanted[name]:
                    shadow = self._followers[name].request
                    shadow.drafts = (*shadow.drafts, token)
                    running.append(name)
        for name in tokens:
            self._followers[name].note()
        return [_draft(tokens.get(one.request_id, []), chances.get(one.request_id, [])) for one in requests]

    def _begin(self, requests: Sequence[Request], wanted: Mapping[str, int]) -> list[str]:
        """Those that have room for their past and a draft, rid of what was drafted in vain."""
        running = []
        for request in requests:
            follower, tokens = self._follower(request), request.num_tokens + wanted[request.request_id]
            follower.settle()
            self._share(follower.request)
            others = (other.request.blocks for name, other in self._followers.items() if name not in wanted)
            if tokens <= self._context and self._room.make(follower.request.blocks, tokens, others):
                running.append(request.request_id)
        return running

    def _share(self, shadow: Request) -> None:
        """Others are to find what is cached of a request; one of which nothing is cached yet begins with theirs."""
        if shadow.num_computed:
            self._state.publish(shadow)
            return
        self._state.release(shadow)
        for block in self._state.find_prefix(shadow):
            self._room.pool.hold(block)
            shadow.blocks.append(block)
        shadow.num_published = len(shadow.blocks)
        shadow.num_computed = shadow.num_cached = shadow.num_published * self._state.limits.block_size

    def _follower(self, request: Request) -> _Follower:
        found = self._followers.get(request.request_id)
        if found is None:
            shadow = Request(
                request.request_id, request.token_ids, request.num_prompt, request.params, salt=request.salt
            )
            # Another stream than the verifier's: a draft must not depend on the numbers that judge it.
            seed = request.params.seed
            stream = Random(None if seed is None else f"draft/{seed}")
            found = self._followers[request.request_id] = _Follower(shadow, stream)
        return found

    def _run(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor | None]]:
        """One pass: the next token of each that is caught up with, and the distribution it was drawn from."""
        shadows = {name: self._followers[name].request for name in names}
        chunks, left = [], self._state.limits.max_num_batched_tokens
        for name, shadow in shadows.items():
            length = min(left, shadow.num_wanted)
            if length:
                chunks.append(Chunk(name, shadow.num_computed, length, samples=length == shadow.num_wanted))
            left -= length
            shadow.num_computed += length
            shadow.num_cached += length
        logits = self._runner.run(chunks, shadows)
        drawn = [chunk.request_id for chunk in chunks if chunk.samples]
        likeliest = logits.argmax(-1).tolist()
        return {
            name: self._choose(self._followers[name], logits[row], likeliest[row]) for row, name in enumerate(drawn)
        }

    def _choose(self, follower: _Follower, logits: Tensor, likeliest: int) -> tuple[int, Tensor | None]:
        params = follower.request.params
        if not params.temperature:
            return likeliest, None
        chance = weights_of(logits[None], [params])[0]
        return draw(chance, follower.stream), (chance / chance.sum()).float()

    def forget(self, request_id: str) -> None:
        """Give back a request's blocks."""
        follower = self._followers.pop(request_id, None)
        if follower is not None:
            self._room.give_back(follower.request.blocks)

    def forget_ended(self) -> None:
        """Let nobody begin with what another has left in the cache."""
        self._room.pool.forget()

    def close(self) -> None:
        """Let go of the cache."""
        self._followers.clear()
        release_cache(self._layers)


def _draft(tokens: Sequence[int], chances: Sequence[Tensor]) -> Draft:
    return Draft(tuple(tokens), torch.stack(list(chances)) if chances else None)
