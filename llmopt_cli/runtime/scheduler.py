"""Which request runs how many tokens in the next step: one rule, one token budget, no phases.

A request is (tokens computed, tokens known); each step gives it some of the difference. Prefill, chunked prefill,
decode and resuming after preemption are all that rule. `schedule` is deterministic: it changes only the state it is
handed and knows no clock, randomness, tensors or I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.request import Request
from llmopt_cli.spec.recipe import Batching


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a request from position `start`; `samples` if they reach its last known token."""

    request_id: str
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: what runs, in the order in which it is packed, and who had to give up its blocks for it."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()


@dataclass
class SchedulerState:
    """The requests and the blocks. `running` is in order of admission; its last is the first to be preempted."""

    limits: Batching
    blocks: BlockPool
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.limits.block_size)

    def release(self, request: Request) -> None:
        """Take a request's blocks away."""
        # The tail goes first, so that when prefixes are shared the head of a sequence lives longest.
        self.blocks.release(reversed(request.blocks))
        request.blocks = []

    def check_integrity(self) -> None:
        """Assert that no block leaked, no request is in two places, and no request holds too few blocks."""
        self.blocks.check_integrity(request.blocks for request in self.running)
        assert not any(request.blocks for request in self.waiting), "a waiting request holds blocks"
        ids = [request.request_id for request in (*self.running, *self.waiting)]
        assert len(ids) == len(set(ids)), "a request is queued twice"
        assert all(len(r.blocks) >= self.blocks_for(r.num_cached) for r in self.running), (
            "cached tokens without a block"
        )


def schedule(state: SchedulerState) -> Plan:
    """Plan the next step: running requests first, then, if none had to be preempted, waiting ones.

    Running requests come in order of admission, so decoding never starves. A waiting request is admitted only if its
    whole prompt fits beside one more block for each running request, or chunked prompts would evict each other.
    """
    budget = state.limits.max_num_batched_tokens
    chunks: list[Chunk] = []
    preempted: list[str] = []
    index = 0
    while index < len(state.running) and budget:
        request = state.running[index]
        length = min(request.num_wanted, budget)
        if _make_room(state, request, length, preempted):
            chunks.append(_advance(request, length))
            budget -= length
        index += 1
    while state.waiting and budget and not preempted and len(state.running) < state.limits.max_num_seqs:
        request = state.waiting[0]
        needed = state.blocks_for(request.num_tokens)
        if needed + len(state.running) > state.blocks.num_free:
            break
        state.running.append(state.waiting.popleft())
        request.blocks = state.blocks.allocate(needed)
        length = min(request.num_wanted, budget)
        chunks.append(_advance(request, length))
        budget -= length
    return Plan(tuple(chunks), tuple(preempted))


def _make_room(state: SchedulerState, request: Request, length: int, preempted: list[str]) -> bool:
    """Give `request` the blocks for `length` more tokens, at the cost of later ones; False if it had to go itself."""
    missing = state.blocks_for(request.num_cached + length) - len(request.blocks)
    while missing > state.blocks.num_free:
        victim = state.running.pop()
        _preempt(state, victim)
        preempted.append(victim.request_id)
        if victim is request:
            return False
    request.blocks.extend(state.blocks.allocate(max(missing, 0)))
    return True


def _preempt(state: SchedulerState, victim: Request) -> None:
    """Back to the head of the queue; its tokens are kept and computed again."""
    state.release(victim)
    victim.num_computed = victim.num_cached = 0
    state.waiting.appendleft(victim)


def _advance(request: Request, length: int) -> Chunk:
    chunk = Chunk(request.request_id, request.num_computed, length, samples=length == request.num_wanted)
    request.num_computed += length
    request.num_cached += length
    return chunk
