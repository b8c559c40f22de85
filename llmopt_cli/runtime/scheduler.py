"""Which request runs how many tokens in the next step: one rule, one token budget, no phases.

A request is (tokens computed, tokens known); each step gives it some of the difference. Prefill, chunked prefill,
decode and resuming after preemption are all that rule. `schedule` is deterministic: it changes only the state it is
handed and knows no clock, randomness, tensors or I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmopt_cli.runtime.blocks import BlockPool, Chain, chain
from llmopt_cli.runtime.request import Request
from llmopt_cli.spec.recipe import Batching

SCORED_ROWS = 256  # of logits for prompts in one step: more would be a spike of the vocabulary's size times the budget


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a request from position `start`; `samples` if they reach its last known token.

    `scored` if the logits of all of them are wanted.
    """

    request_id: str
    start: int
    length: int
    samples: bool
    scored: bool = False

    @property
    def num_logits(self) -> int:
        """Rows of logits that this chunk yields."""
        return self.length if self.scored else int(self.samples)


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
    share_prefixes: bool = False
    chain: Chain = chain
    stuck: tuple[str, int] = ("", 0)  # the request that had to wait for blocks, and how many must be free for it

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.limits.block_size)

    def release(self, request: Request) -> None:
        """Take a request's blocks away."""
        # The tail goes first, so that when prefixes are shared the head of a sequence lives longest.
        self.blocks.release(reversed(request.blocks))
        request.blocks = []
        request.num_published = 0

    def finish(self, request: Request) -> None:
        """As `release`, for a request whose planned tokens were all run: what they cached can be shared."""
        self.publish(request)
        self.release(request)

    def publish(self, request: Request) -> None:
        """Make the blocks that are full of computed tokens findable, and drop those that another holds as well."""
        size = self.limits.block_size
        while self.share_prefixes and (request.num_published + 1) * size <= request.num_cached:
            index = request.num_published
            parent = request.blocks[index - 1] if index else None
            if parent is not None and not self.blocks.knows(parent):
                return  # its hash met another's: what comes after it can't be found either
            self._extend_keys(request, index + 1)
            tokens = request.token_ids[index * size : (index + 1) * size]
            own = request.blocks[index]
            shared = self.blocks.publish(own, request.keys[index], tokens, parent)
            if shared != own:
                self.blocks.hold(shared)
                self.blocks.release([own])
                request.blocks[index] = shared
            request.num_published += 1

    def find_prefix(self, request: Request) -> list[int]:
        """The blocks in cache that hold the beginning of a request, never all of it: one token has to be run."""
        found: list[int] = []
        if not self.share_prefixes or request.is_scored:
            return found
        size, most = self.limits.block_size, (request.num_tokens - 1) // self.limits.block_size
        self._extend_keys(request, most)
        for index, key in enumerate(request.keys[:most]):
            tokens = request.token_ids[index * size : (index + 1) * size]
            block = self.blocks.find(key, tokens, found[-1] if found else None)
            if block is None:
                break
            found.append(block)
        return found

    def _extend_keys(self, request: Request, count: int) -> None:
        """Hash the first `count` blocks, each once in the request's life."""
        size = self.limits.block_size
        for index in range(len(request.keys), count):
            parent = request.keys[-1] if request.keys else request.salt
            request.keys.append(self.chain(parent, request.token_ids[index * size : (index + 1) * size]))

    def check_integrity(self) -> None:
        """Assert that no block leaked, no request is in two places, and no request holds too few blocks."""
        self.blocks.check_integrity(request.blocks for request in self.running)
        assert not any(request.blocks for request in self.waiting), "a waiting request holds blocks"
        ids = [request.request_id for request in (*self.running, *self.waiting)]
        assert len(ids) == len(set(ids)), "a request is queued twice"
        assert all(len(r.blocks) >= self.blocks_for(r.num_cached) for r in self.running), (
            "cached tokens without a block"
        )
        size = self.limits.block_size
        assert all(r.num_published * size <= r.num_cached for r in self.running), "a block is shared that is not full"


def schedule(state: SchedulerState) -> Plan:
    """Plan the next step: running requests first, then, if none had to be preempted, waiting ones.

    Running requests come in order of admission, so decoding never starves. What the last plan computed is taken as run.
    """
    left = _Left(state.limits.max_num_batched_tokens)
    chunks: list[Chunk] = []
    preempted: list[str] = []
    for request in state.running:
        state.publish(request)
    index = 0
    while index < len(state.running) and left.tokens:
        request = state.running[index]
        length = left.share(request)
        if length and _make_room(state, request, length, preempted):
            chunks.append(left.spend(request, length))
        index += 1
    if not preempted:
        chunks += _admit(state, left)
    return Plan(tuple(chunks), tuple(preempted))


@dataclass
class _Left:
    """What a step has left to give: tokens to run, and rows of logits for prompts that are scored."""

    tokens: int
    scores: int = SCORED_ROWS

    def share(self, request: Request) -> int:
        """Tokens that a request may run."""
        return min(request.num_wanted, self.tokens, self.scores if request.is_scored else self.tokens)

    def spend(self, request: Request, length: int) -> Chunk:
        """Let it run them."""
        samples = length == request.num_wanted
        chunk = Chunk(request.request_id, request.num_computed, length, samples, request.is_scored)
        request.num_computed += length
        request.num_cached += length
        self.tokens -= length
        self.scores -= length if chunk.scored else 0
        return chunk


def _admit(state: SchedulerState, left: _Left) -> list[Chunk]:
    """Start waiting requests, in order, while the token budget lasts.

    One is admitted only if its whole prompt fits beside one more block for each running request, or chunked prompts
    would evict each other. One whose next block is being computed for another waits for it, and lets others pass.
    """
    chunks: list[Chunk] = []
    passed: list[Request] = []
    while state.waiting and left.tokens and len(state.running) < state.limits.max_num_seqs:
        request = state.waiting[0]
        if state.stuck[0] == request.request_id and state.blocks.num_free < state.stuck[1]:
            break  # nothing is looked up again before it can help
        found = state.find_prefix(request)
        if len(passed) < state.limits.max_num_seqs and _is_coming(state, request, len(found)):
            passed.append(state.waiting.popleft())
            continue
        missing = state.blocks_for(request.num_tokens) - len(found)
        needed = missing + sum(map(state.blocks.is_idle, found)) + len(state.running)
        if needed > state.blocks.num_free:
            state.stuck = (request.request_id, needed)
            break
        if not left.share(request):
            break  # the rows of logits are spent
        state.running.append(state.waiting.popleft())
        _start(state, request, found, missing)
        chunks.append(left.spend(request, left.share(request)))
    state.waiting.extendleft(reversed(passed))
    return chunks


def _is_coming(state: SchedulerState, request: Request, found: int) -> bool:
    """Whether a running request is computing the first block of the prompt that `request` lacks."""
    if not state.share_prefixes or request.is_scored or found >= (request.num_tokens - 1) // state.limits.block_size:
        return False
    key = request.keys[found]
    return any(
        found >= other.num_published and found < len(other.keys) and other.keys[found] == key
        for other in state.running
        if other.num_published < len(other.keys)
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
    if found >= (request.num_tokens - 1) // state.limits.block_size:
        return None
    return "evicted" if state.blocks.was_evicted(request.keys[found]) else "not seen before"


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
