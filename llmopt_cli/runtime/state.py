"""What the scheduler works on: requests, waiting or running, and the blocks they hold or share.

Plain data and the moves between its places. Knows no budget and no clock: the time is a field.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from llmopt_cli.runtime.blocks import BlockPool, Chain, chain
from llmopt_cli.runtime.request import Request
from llmopt_cli.spec.recipe import Batching

# How long answers become: at first a guess, which decays while it holds (SGLang's new-token ratio).
EXPECTED_AT_FIRST = 0.7
EXPECTED_AT_LEAST = 0.1
DECAY = (EXPECTED_AT_FIRST - EXPECTED_AT_LEAST) / 600  # a step
HEADROOM = 20  # tokens that each request may add before the next correction
LONGEST_ANSWER = 4096  # nobody is expected to use a limit beyond it


def _rank(request: Request) -> tuple[int, int]:
    """Who comes first: the lower priority value, then the earlier arrival."""
    return request.priority, request.arrival


def _longest_answer(request: Request) -> int:
    return min(request.params.max_tokens, LONGEST_ANSWER)


@dataclass
class SchedulerState:
    """The requests and the blocks, and the time `now` in seconds. `running` is in order of admission.

    `expected` is the share of the tokens they may still generate that running requests are expected to. `stuck` is the
    request that had to wait for blocks and how many must be free for it; `filling` says that a static batch is not
    complete yet. Those `parked` have nothing to run until others are where they are; their blocks are kept for them as
    long as nobody else needs any.
    """

    limits: Batching
    blocks: BlockPool
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    parked: list[Request] = field(default_factory=list)
    share_prefixes: bool = False
    chain: Chain = chain
    now: float = 0.0
    expected: float = EXPECTED_AT_FIRST
    stuck: tuple[str, int] = ("", 0)
    filling: bool = True
    deadlines: list[tuple[float, int, Request]] = field(default_factory=list)
    arrivals: int = 0

    def add(self, request: Request) -> None:
        """Queue a new request: behind those of its priority and better ones, or at the end."""
        self.arrivals += 1
        request.arrival = self.arrivals
        self._watch(request)
        if self.limits.scheduling_policy == "priority":
            insort(self.waiting, request, key=_rank)
        else:
            self.waiting.append(request)

    def drop(self, request: Request) -> None:
        """Take a request out, wherever it is; what its last plan computed is not to be shared."""
        self.release(request)
        for queue in (self.running, self.waiting, self.parked):
            if request in queue:
                queue.remove(request)

    def _watch(self, request: Request) -> None:
        """Let it end at its deadline."""
        if request.deadline is not None:
            self.arrivals += 1  # no two alike: requests themselves can't be compared
            heapq.heappush(self.deadlines, (request.deadline, self.arrivals, request))

    def pop_expired(self) -> list[Request]:
        """Take out the requests whose deadline has come."""
        expired = []
        while self.deadlines and self.deadlines[0][0] <= self.now:
            request = heapq.heappop(self.deadlines)[2]
            if request in self.running or request in self.waiting or request in self.parked:
                self.drop(request)
                expired.append(request)
        return expired

    def preempt(self, spared: set[str]) -> Request:
        """Send the running request that came last, of the worst priority if those count, back to the queue's head.

        It is none of those `spared`. Its tokens are kept and computed again. How long answers have become so far is
        then the better guess of how long they will be.
        """
        by_priority = self.limits.scheduling_policy == "priority"
        open_to = [request for request in self.running if request.request_id not in spared]
        victim = max(open_to, key=_rank) if by_priority else open_to[-1]
        generated = sum(r.num_tokens - r.num_prompt + HEADROOM for r in self.running)
        self.expected = min(1.0, generated / sum(_longest_answer(r) for r in self.running))
        self.running.remove(victim)
        self._return(victim)
        return victim

    def _return(self, request: Request) -> None:
        """Queue one that was admitted before, without its blocks: it comes first, and is computed again."""
        self.release(request)
        request.num_computed = request.num_cached = 0
        request.drafts = ()
        if self.limits.scheduling_policy == "priority":
            insort(self.waiting, request, key=_rank)
        else:
            self.waiting.appendleft(request)

    def fork(self, parent: Request, child: Request) -> bool:
        """Let `child`, of the same tokens, go on from where `parent` is: it holds the same blocks and runs.

        Where there is no seat or not enough room, it is or stays queued, and returns False. It may wait already.
        """
        queued = child in self.waiting
        if not queued:
            child.arrival = parent.arrival
            self._watch(child)
        if not parent.blocks or not self._has_seat() or self.blocks.num_free <= self.expected_growth():
            if not queued:
                self._return(child)
            return False
        if queued:
            self.waiting.remove(child)
        for block in parent.blocks:
            self.blocks.hold(block)
        child.blocks, child.keys = list(parent.blocks), list(parent.keys)
        child.num_computed, child.num_cached = parent.num_computed, parent.num_cached
        child.num_published, child.num_hit = parent.num_published, parent.num_computed if self.share_prefixes else 0
        self.running.append(child)
        return True

    def park(self, request: Request) -> None:
        """Take a running request that has nothing to run out of the batch."""
        self.running.remove(request)
        self.parked.append(request)

    def resume(self, request: Request) -> None:
        """Let one that was parked go on; it may have lost its blocks, and its seat."""
        self.parked.remove(request)
        if request.blocks and self._has_seat():
            self.running.append(request)
        else:
            self._return(request)

    def reclaim(self) -> bool:
        """Take the blocks of those parked; False if there are none."""
        held = [request for request in self.parked if request.blocks]
        for request in held:
            self.release(request)
            request.num_computed = request.num_cached = 0
        return bool(held)

    def _has_seat(self) -> bool:
        return len(self.running) < (1 if self.limits.batching_mode == "none" else self.limits.max_num_seqs)

    def relax(self, steps: int = 1) -> None:
        """So many steps went by in which nobody had to be preempted: expect a little less of those who run."""
        for _ in range(steps):
            if self.expected <= EXPECTED_AT_LEAST:
                break
            self.expected = max(EXPECTED_AT_LEAST, self.expected - DECAY)

    def expected_growth(self) -> int:
        """Blocks that the running requests are expected to take beside those they hold; one each at least."""
        size = self.limits.block_size
        left = (_longest_answer(r) - (r.num_tokens - r.num_prompt) for r in self.running)
        return sum(max(1, math.ceil(self.expected * tokens / size)) for tokens in left)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.limits.block_size)

    def shares_tail(self, request: Request) -> bool:
        """Whether the next token of a request would be written into a block that others hold as well."""
        index, offset = divmod(request.num_cached, self.limits.block_size)
        return offset > 0 and self.blocks.is_shared(request.blocks[index])

    def split_tail(self, request: Request) -> tuple[int, int]:
        """Give a request a block of its own for its tail; returns the block to copy and the one to copy to."""
        index = request.num_cached // self.limits.block_size
        shared = request.blocks[index]
        [request.blocks[index]] = self.blocks.allocate(1)
        self.blocks.release([shared])
        return shared, request.blocks[index]

    def release(self, request: Request) -> None:
        """Take a request's blocks away."""
        # The tail goes first, so that when prefixes are shared the head of a sequence lives longest.
        self.blocks.release(reversed(request.blocks))
        request.blocks = []
        request.num_published = 0
        if request.originals or request.pages:
            self.blocks.release(reversed(request.originals))
            request.originals, request.pages = [], ()

    def finish(self, request: Request) -> None:
        """As `release`, for a request whose planned tokens were all run: what they cached can be shared."""
        self.publish(request)
        self.release(request)

    def publish(self, request: Request) -> None:
        """Make the blocks that are full of computed tokens findable, and drop those that another holds as well."""
        size = self.limits.block_size
        if request.num_cached < request.num_computed:
            return  # what is compressed is nobody else's
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
        size, most = self.limits.block_size, self.most_found(request)
        self._extend_keys(request, most)
        for index, key in enumerate(request.keys[:most]):
            tokens = request.token_ids[index * size : (index + 1) * size]
            block = self.blocks.find(key, tokens, found[-1] if found else None)
            if block is None:
                break
            found.append(block)
        return found

    def most_found(self, request: Request) -> int:
        """Blocks of a request that may come from the cache."""
        size, policy = self.limits.block_size, request.params.kv_policy
        most = (request.num_tokens - 1) // size
        return most if policy is None else min(most, policy.shared(request.num_prompt, size) // size)

    def blocks_at_first(self, request: Request) -> int:
        """Blocks for which there must be room before a request begins: its known tokens, or what it keeps of them."""
        size, policy = self.limits.block_size, request.params.kv_policy
        known = request.num_tokens
        return self.blocks_for(policy.cached_at_first(known, request.num_prompt, size) if policy else known)

    def _extend_keys(self, request: Request, count: int) -> None:
        """Hash the first `count` blocks, each once in the request's life."""
        size = self.limits.block_size
        for index in range(len(request.keys), count):
            parent = request.keys[-1] if request.keys else request.salt
            request.keys.append(self.chain(parent, request.token_ids[index * size : (index + 1) * size]))

    def check_integrity(self) -> None:
        """Assert that no block leaked, no request is in two places, and no request holds too few blocks."""
        holders = [*self.running, *self.parked]
        self.blocks.check_integrity((*request.blocks, *request.originals) for request in holders)
        assert not any(one.blocks or one.originals for one in self.waiting), "a waiting request holds blocks"
        ids = [request.request_id for request in (*holders, *self.waiting)]
        assert len(ids) == len(set(ids)), "a request is queued twice"
        assert all(len(r.blocks) >= self.blocks_for(r.num_cached) for r in holders), "cached tokens without a block"
        size = self.limits.block_size
        assert all(r.num_published * size <= r.num_cached for r in holders), "a block is shared that is not full"
