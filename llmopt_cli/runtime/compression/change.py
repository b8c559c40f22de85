"""What a policy does to the blocks of a request between two steps, in numbers; `compressor` does it to the tensors.

A compressed request has a position that is ahead of its cached slots. Its blocks are its own from there on: nothing of
them is published, and what it had shared stays with the others.
"""

from __future__ import annotations

from typing import NamedTuple

from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.state import SchedulerState
from llmopt_cli.spec.kv_policy import Streaming


class Turn(NamedTuple):
    """The first tokens of a streaming request move on by `distance` positions, from `old` blocks into `new` ones."""

    request_id: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    distance: int


class Compaction(NamedTuple):
    """The prompt in `old` blocks shrinks to `kept` slots in `new` ones: per layer, or on average over the layers."""

    request_id: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    kept: int


Change = Turn | Compaction


def is_due(state: SchedulerState, request: Request) -> bool:
    """Whether a request with a policy has to be compressed before it goes on."""
    policy, size = request.params.kv_policy, state.limits.block_size
    assert policy is not None, "nobody else is asked"
    if isinstance(policy, Streaming):
        return policy.dropped(request.num_computed, size) * size > request.num_computed - request.num_cached
    return request.num_cached == request.num_prompt == request.num_computed > policy.kept(request.num_prompt, size)


def missing(state: SchedulerState, request: Request) -> int:
    """Blocks that must become free before `change` can be: those it needs beyond what it lets go of."""
    freed = sum(not state.blocks.is_shared(block) for block in _released(state, request))
    return _wanted(state, request) - freed - state.blocks.num_free


def change(state: SchedulerState, request: Request) -> Change:
    """Drop what the policy drops: blocks and slots are counted as if it were done. It is published."""
    policy, size = request.params.kv_policy, state.limits.block_size
    assert policy is not None, "only what has a policy is due"
    released, wanted = _released(state, request), _wanted(state, request)
    state.blocks.release(reversed(released))
    new = state.blocks.allocate(wanted)
    request.num_published = 0
    if isinstance(policy, Streaming):
        sinks, distance = policy.sink_blocks(size), policy.dropped(request.num_computed, size) * size
        if not request.originals:
            request.originals, request.blocks[:sinks] = request.blocks[:sinks], new
        del request.blocks[sinks : sinks + len(released)]
        request.num_cached = request.num_computed - distance
        return Turn(request.request_id, tuple(request.originals), tuple(request.blocks[:sinks]), distance)
    request.blocks, request.num_cached = new, policy.kept(request.num_prompt, size)
    return Compaction(request.request_id, tuple(released), tuple(new), request.num_cached)


def _released(state: SchedulerState, request: Request) -> list[int]:
    """The blocks that go."""
    policy, size = request.params.kv_policy, state.limits.block_size
    if not isinstance(policy, Streaming):
        return request.blocks
    gone = policy.dropped(request.num_computed, size) - (request.num_computed - request.num_cached) // size
    sinks = policy.sink_blocks(size)
    return request.blocks[sinks : sinks + gone]


def _wanted(state: SchedulerState, request: Request) -> int:
    """The blocks that come: for the sinks, once; for all that a prompt keeps."""
    policy, size = request.params.kv_policy, state.limits.block_size
    assert policy is not None, "only what has a policy is due"
    if isinstance(policy, Streaming):
        return 0 if request.originals else policy.sink_blocks(size)
    return state.blocks_for(policy.kept(request.num_prompt, size))
