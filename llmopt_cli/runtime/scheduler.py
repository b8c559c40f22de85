"""Which request runs how many tokens in the next step: one rule, one token budget, no phases.

A request is (tokens computed, tokens known); each step gives it some of the difference. Prefill, chunked prefill,
decode, verifying drafts and resuming after preemption are all that rule. `schedule` is deterministic: it changes only
the state it is handed and knows no clock, randomness, tensors or I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmopt_cli.runtime.compression.change import Change, change, is_due, missing
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.state import SchedulerState
from llmopt_cli.spec.recipe import Batching

__all__ = ["Chunk", "Plan", "SchedulerState", "has_seat", "schedule"]

SCORED_ROWS = 256  # of logits for prompts in one step: more would be a spike of the vocabulary's size times the budget


class Chunk(NamedTuple):
    """`length` tokens of a request from position `start`; `samples` if they reach its last known token.

    `scored` if the logits of all of them are wanted. The last `drafts` of them are no known tokens.
    """

    request_id: str
    start: int
    length: int
    samples: bool
    scored: bool = False
    drafts: int = 0

    @property
    def num_logits(self) -> int:
        """Rows of logits that this chunk yields."""
        return self.length if self.scored else self.samples + self.drafts


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: what runs, in the order in which it is packed, who had to give up its blocks, who came too late.

    Before it runs, the `changes` are made, then the first block of each of the `copies` is copied to the second, one
    after the other.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    changes: tuple[Change, ...] = ()


def schedule(state: SchedulerState) -> Plan:
    """Plan the next step: running requests first, then, if none had to be preempted, waiting ones.

    Running requests come in order of admission, so decoding never starves. What the last plan computed is taken as run.
    """
    expired = state.pop_expired()
    left = _Left(state.limits, state.limits.max_num_batched_tokens, alone=len(state.running) + len(state.waiting) == 1)
    chunks: list[Chunk] = []
    preempted: list[str] = []
    copies: list[tuple[int, int]] = []
    state.filling = state.filling or not state.running
    for request in state.running:
        state.publish(request)
    changes = _compress(state, preempted)
    planned: set[str] = set()
    for request in list(state.running):
        length = left.share(request)
        if request.drafts:
            length = _affordable(state, request, length)
        if request.blocks and length and _make_room(state, request, length, preempted, planned):
            if state.shares_tail(request):
                copies.append(state.split_tail(request))
            chunks.append(left.spend(request, length))
            planned.add(request.request_id)
    if not preempted:
        state.relax()
        chunks += _admit(state, left)
    late = tuple(request.request_id for request in expired)
    made = [one for one in changes if one.request_id not in preempted]
    return Plan(tuple(chunks), tuple(preempted), late, tuple(copies), tuple(made))


def _compress(state: SchedulerState, preempted: list[str]) -> list[Change]:
    """Let requests drop what their policies drop now, if need be at the cost of others."""
    changes = []
    for request in [one for one in state.running if one.params.kv_policy is not None and is_due(state, one)]:
        while request.blocks and missing(state, request) > 0:
            if not state.reclaim():
                preempted.append(state.preempt(set()).request_id)
        if request.blocks:
            changes.append(change(state, request))
    return changes


@dataclass
class _Left:
    """What a step has left to give: tokens to run, and rows of logits for prompts that are scored."""

    limits: Batching
    tokens: int
    alone: bool
    scores: int = SCORED_ROWS

    def share(self, request: Request) -> int:
        """Tokens that a request may run; a long prompt leaves room for others."""
        threshold = 0 if self.alone else self.limits.long_prefill_token_threshold
        rows = self.scores if request.is_scored else self.tokens
        if (policy := request.params.kv_policy) is not None:
            rows = min(rows, policy.longest_run(request.num_computed, request.num_prompt, self.limits.block_size))
        return min(request.num_wanted, self.tokens, rows, threshold or self.tokens)

    def spend(self, request: Request, length: int) -> Chunk:
        """Let it run them."""
        drafts = length - (len(request.token_ids) - request.num_computed)
        chunk = Chunk(request.request_id, request.num_computed, length, drafts >= 0, request.is_scored, max(0, drafts))
        request.num_computed += length
        request.num_cached += length
        self.tokens -= length
        self.scores -= length if chunk.scored else 0
        return chunk


def _admit(state: SchedulerState, left: _Left) -> list[Chunk]:
    """Start waiting requests, in order, while the token budget lasts.

    One is admitted only if its whole prompt fits beside what the running requests are expected to need, or they would
    evict each other. One whose next block is being computed for another waits for it, and lets others pass.
    """
    chunks: list[Chunk] = []
    passed: list[Request] = []
    while state.waiting and has_seat(state):
        if not left.tokens:
            break
        request = state.waiting[0]
        spare = state.blocks.num_free - state.expected_growth()
        if state.stuck[0] == request.request_id and spare < state.stuck[1]:
            if state.reclaim():
                continue
            break  # nothing is looked up again before it can help
        found = state.find_prefix(request)
        if len(passed) < state.limits.max_num_seqs and _is_coming(state, request, len(found)):
            passed.append(state.waiting.popleft())
            continue
        missing = state.blocks_at_first(request) - len(found)
        needed = missing + sum(map(state.blocks.is_idle, found))
        if needed > spare:
            state.stuck = (request.request_id, needed)
            if state.reclaim():
                continue
            break
        if not left.share(request):
            break  # the rows of logits are spent
        state.running.append(state.waiting.popleft())
        _start(state, request, found, missing)
        chunks.append(left.spend(request, left.share(request)))
    if left.tokens:
        state.filling = False
    state.waiting.extendleft(reversed(passed))
    return chunks


def has_seat(state: SchedulerState) -> bool:
    """Whether one more request may run: a static batch is filled once, then runs until its last request has ended."""
    mode = state.limits.batching_mode
    if mode == "static" and not state.filling:
        return False
    return len(state.running) < (1 if mode == "none" else state.limits.max_num_seqs)


def _is_coming(state: SchedulerState, request: Request, found: int) -> bool:
    """Whether a running request is computing the prompt of `request`, or the first block of it that `request` lacks."""
    if request.twin and any(r.request_id == request.twin and r.num_tokens == r.num_prompt for r in state.running):
        return True
    if not state.share_prefixes or request.is_scored or found >= state.most_found(request):
        return False
    key = request.keys[found]
    return any(
        found >= other.num_published and found < len(other.keys) and other.keys[found] == key
        for other in state.running
        if other.num_published < len(other.keys) and other.num_cached == other.num_computed
    )


def _start(state: SchedulerState, request: Request, found: list[int], missing: int) -> None:
    """Give a request the blocks of its known tokens: those `found` in the cache, and `missing` new ones."""
    for block in found:
        state.blocks.hold(block)
    request.blocks = found + state.blocks.allocate(missing)
    request.num_published = len(found)
    request.num_computed = request.num_cached = len(found) * state.limits.block_size
    if request.num_hit is None:
        request.num_hit = request.num_computed
        request.cache_miss = _miss(state, request, len(found))


def _miss(state: SchedulerState, request: Request, found: int) -> str | None:
    """Why no more than `found` blocks of a prompt were in the cache; None if all were that can be."""
    if not state.share_prefixes:
        return "prefix caching is off"
    if request.is_scored:
        return "prompt logprobs were asked for"
    if request.num_prompt <= state.limits.block_size:
        return "shorter than a block"
    if found >= state.most_found(request):
        return None
    return "evicted" if state.blocks.was_evicted(request.keys[found]) else "not seen before"


def _affordable(state: SchedulerState, request: Request, length: int) -> int:
    """How many of `length` tokens a request with drafts runs: nobody gives up a block for a draft."""
    missing = state.blocks_for(request.num_cached + length) - len(request.blocks) + state.shares_tail(request)
    if missing > state.blocks.num_free:
        request.drafts = ()
    known = len(request.token_ids) - request.num_computed
    request.drafts = request.drafts[: max(0, length - known)]
    return min(length, known + len(request.drafts))


def _make_room(state: SchedulerState, request: Request, length: int, preempted: list[str], planned: set[str]) -> bool:
    """Give `request` the blocks for `length` more tokens, at the cost of others; False if it had to go itself.

    Those whose tokens are `planned` already keep their blocks.
    """
    missing = state.blocks_for(request.num_cached + length) - len(request.blocks)
    while (needed := missing + state.shares_tail(request)) > 0 and needed > state.blocks.num_free:
        if state.reclaim():
            continue
        victim = state.preempt(planned)
        preempted.append(victim.request_id)
        if victim is request:
            return False
    if missing > 0:
        request.blocks.extend(state.blocks.allocate(missing))
    return True
