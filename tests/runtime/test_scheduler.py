"""The scheduler and its blocks under random traffic: no leak, no lost or repeated token, progress within a bound."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmopt_cli.runtime.blocks import BlockPool, Chain, chain
from llmopt_cli.runtime.compression.change import Turn
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.scheduler import Plan, SchedulerState, schedule
from llmopt_cli.runtime.state import EXPECTED_AT_FIRST
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting, Streaming
from llmopt_cli.spec.recipe import MODES, POLICIES, Batching

BLOCKS, SIZE = 12, 4


def new_state(max_num_seqs: int = 3, budget: int = 10, blocks: int = BLOCKS, share: bool = False) -> SchedulerState:
    limits = Batching(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, block_size=SIZE)
    return SchedulerState(limits, BlockPool(blocks), share_prefixes=share, expected=0)  # one more block each


def request(name: str, prompt: int) -> Request:
    return Request(name, list(range(prompt)), prompt, SamplingParams())


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, finishes, aborts and deadlines under any limits, over pools so small that preemption is common.

    `memory` stands for the cache: each slot remembers the tokens up to its own, so that a request which meets a slot of
    another beginning is found out.
    """

    share = False
    chain: Chain = staticmethod(chain)
    steps: ClassVar[Counter[str]] = Counter()  # of each machine: what the fuzzing reached

    def __init__(self) -> None:
        super().__init__()
        self.state = new_state(share=self.share)
        self.goal: dict[str, int] = {}  # request -> tokens it must reach
        self.computed: dict[str, int] = {}  # request -> position up to which its tokens are in memory
        self.memory: dict[int, tuple[int, ...]] = {}
        self.names = (f"r{i}" for i in itertools.count())
        self.idle_steps = 0
        self.drafts = 0  # tokens that are drafted for each request that decodes, at most
        self.random = Random(0)

    @initialize(
        seqs=st.sampled_from([4, 3, 2, 1]),
        spare=st.integers(0, 12),
        blocks=st.integers(6, 12),
        expected=st.sampled_from([0.0, 0.0, EXPECTED_AT_FIRST]),
        policy=st.sampled_from(POLICIES),
        mode=st.sampled_from([*MODES[:1] * 4, *MODES]),
        threshold=st.sampled_from([0, 0, 3]),
        drafts=st.sampled_from([0, 5, 2]),
    )
    def limit(
        self, seqs: int, spare: int, blocks: int, expected: float, policy: str, mode: str, threshold: int, drafts: int
    ) -> None:
        self.drafts = drafts
        self.state = new_state(seqs, seqs + spare, blocks, self.share)
        self.state.limits = replace(
            self.state.limits, scheduling_policy=policy, batching_mode=mode, long_prefill_token_threshold=threshold
        )
        self.state.chain = type(self).chain
        self.state.expected = expected

    @rule(
        prompt=st.integers(1, 24),
        output=st.sampled_from([20, 14, 9, 5, 1]),
        kind=st.sampled_from([0, 0, 1]),
        priority=st.integers(0, 2),
        patience=st.sampled_from([None, None, None, 30]),
        scored=st.sampled_from([None, None, 0]),
        twins=st.sampled_from([3, 2, 1]),
    )
    def arrive(self, twins: int, **wanted: Any) -> None:
        for _ in range(twins):
            self._arrive(**wanted)

    def _arrive(
        self, prompt: int, output: int, kind: int, priority: int, patience: int | None, scored: int | None
    ) -> None:
        name = next(self.names)
        prompt = min(prompt, self.state.blocks.num_blocks * SIZE - output)  # what can never fit is refused at the door
        # Prompts of a kind begin alike; the last token of some is their own.
        ids = [*range(kind, kind + prompt)]
        params = SamplingParams(max_tokens=output, prompt_logprobs=scored, kv_policy=self.policy(len(self.goal)))
        deadline = None if patience is None else self.state.now + patience
        self.state.add(Request(name, ids, prompt, params, priority=priority, deadline=deadline))
        self.goal[name] = prompt + output
        self.computed[name] = 0

    def policy(self, number: int) -> KvPolicy | None:
        """That of the next request, beside so many."""
        return None

    @precondition(lambda self: self.goal)
    @rule(times=st.integers(1, 8))
    def run(self, times: int) -> None:
        for _ in range(times):
            if self.goal:
                self.step()

    def step(self) -> None:
        before = {r.request_id for r in self.state.running}
        self.state.now += 1
        self._draft()
        plan = schedule(self.state)
        live = {r.request_id: r for r in (*self.state.running, *self.state.waiting)}
        for name in plan.expired:
            del self.goal[name]
        for name in plan.preempted:
            self.computed[name] = 0
        self._tally(plan)
        self._change(plan)
        assert sum(chunk.length for chunk in plan.chunks) <= self.state.limits.max_num_batched_tokens
        for chunk in plan.chunks:
            one = live[chunk.request_id]
            if chunk.request_id not in before:
                assert chunk.start % SIZE == 0
                assert self.share or not chunk.start
                self.computed[chunk.request_id] = chunk.start  # found in the cache: checked below
            assert chunk.start == self.computed[chunk.request_id], "a token was skipped or computed twice"
            self.computed[chunk.request_id] += chunk.length
            self._write(one, chunk.start, chunk.length)
            self._read(one)
        for chunk in plan.chunks:
            if chunk.samples:
                self._sample(live[chunk.request_id], chunk.drafts)
        self.idle_steps = 0 if plan.chunks or not self.goal else self.idle_steps + 1
        assert self.idle_steps < 2, "there is work and nothing runs"
        self.state.check_integrity()
        assert len(self.state.running) <= self.state.limits.max_num_seqs

    def _tally(self, plan: Plan) -> None:
        shared = sum(r.num_hit or 0 for r in self.state.running)
        self.steps.update(steps=1, preempted=len(plan.preempted), expired=len(plan.expired), shared=shared > 0)

    def _change(self, plan: Plan) -> None:
        assert not plan.changes, "nobody has a policy"

    def _write(self, one: Request, start: int, length: int) -> None:
        holders = [block for other in self.state.running for block in other.blocks]
        for position in range(start, start + length):
            block = one.blocks[position // SIZE]
            assert holders.count(block) == 1, "a block with several holders is written"
            self.memory[block * SIZE + position % SIZE] = (*one.token_ids, *one.drafts)[: position + 1]

    def _read(self, one: Request) -> None:
        """Attention reads every computed position: each must hold this request's own beginning."""
        for position in range(one.num_computed):
            slot = one.blocks[position // SIZE] * SIZE + position % SIZE
            known = (*one.token_ids, *one.drafts)[: position + 1]
            assert self.memory[slot] == known, "the cache holds another's tokens"

    def _draft(self) -> None:
        """Some of what is drafted is right: a token's own position."""
        for one in self.state.running:
            one.drafts = ()
            room = self.goal[one.request_id] - one.num_tokens - 1
            if one.num_tokens > one.num_prompt and one.num_wanted == 1 and room > 0 and one.params.kv_policy is None:
                places = range(one.num_tokens, one.num_tokens + min(room, self.random.randint(0, self.drafts)))
                one.drafts = tuple(place if self.random.random() < 0.7 else -1 for place in places)

    def _sample(self, one: Request, drafts: int) -> None:
        assert one.num_computed == one.num_tokens + drafts
        assert len(one.drafts) == drafts, "what is drafted runs, or is forgotten"
        for drafted in (*one.drafts, None):
            assert one.num_tokens < self.goal[one.request_id], "a request goes on after its end"
            one.token_ids.append(one.num_tokens)
            if one.token_ids[-1] != drafted:
                break
        one.rewind()
        self.computed[one.request_id] = one.num_computed
        self.steps["drafted"] += drafts
        if one.num_tokens >= self.goal[one.request_id]:
            self._drop(one, self.state.finish)

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.goal)))
        one = next(r for r in (*self.state.running, *self.state.waiting) if r.request_id == name)
        self._drop(one, self.state.release)

    @precondition(lambda self: self.state.running)
    @rule()
    def preempt(self) -> None:
        victim = self.state.preempt(set())
        self.computed[victim.request_id] = 0
        self.steps["preempted"] += 1

    @rule()
    def forget(self) -> None:
        self.state.blocks.forget()

    @precondition(lambda self: self.goal)
    @rule()
    def drain(self) -> None:
        """Whatever is queued ends within as many steps as it has tokens, times the restarts it may suffer."""
        bound = 4 * sum(self.goal.values()) + 10
        for _ in range(bound):
            if not self.goal:
                return
            self.step()
        raise AssertionError("no progress")

    def teardown(self) -> None:
        """At the end everything is given back."""
        self.drain()
        self.state.check_integrity()
        assert self.state.blocks.num_free == self.state.blocks.num_blocks

    def _drop(self, one: Request, let_go: Callable[[Request], None]) -> None:
        let_go(one)
        for queue in (self.state.running, self.state.waiting):
            if one in queue:
                queue.remove(one)
        del self.goal[one.request_id]


class SharingMachine(SchedulerMachine):
    """The same with a prefix cache."""

    share = True
    steps: ClassVar[Counter[str]] = Counter()


def two_keys(parent: bytes, tokens: Sequence[int]) -> bytes:
    """A hash so bad that most blocks collide."""
    return bytes([sum(tokens) % 2])


class CollidingMachine(SchedulerMachine):
    """The same with a prefix cache whose hashes collide."""

    share = True
    chain = staticmethod(two_keys)
    steps: ClassVar[Counter[str]] = Counter()


class KeepingMachine(SharingMachine):
    """The same where most requests keep a part of their cache only: `kept` are the positions in their slots."""

    steps: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[int]] = {}

    def _draft(self) -> None:
        """Nobody: who keeps a part of its cache is not drafted for."""

    def policy(self, number: int) -> KvPolicy | None:
        return (Streaming(sinks=1, window=5), Selecting(budget=7, window=3), None)[number % 3]

    def _change(self, plan: Plan) -> None:
        for change in plan.changes:
            kept, name = self.kept[change.request_id], change.request_id
            slots = [block * SIZE + offset for block in change.old for offset in range(SIZE)]
            if isinstance(change, Turn):
                gone = change.distance + len(change.old) * SIZE  # where the window begins
                self.kept[name] = kept[: len(slots)] + [position for position in kept[len(slots) :] if position >= gone]
            else:
                slots = slots[-change.kept :] if len(slots) == len(kept) else slots[len(kept) - change.kept : len(kept)]
                self.kept[name] = kept[-change.kept :]
            moved = [self.memory.get(slot) for slot in slots]
            for index, content in enumerate(moved):
                assert content is not None, "what was never written is kept"
                self.memory[change.new[index // SIZE] * SIZE + index % SIZE] = content
        self.steps["changed"] += len(plan.changes)

    def _write(self, one: Request, start: int, length: int) -> None:
        holders = [block for other in self.state.running for block in (*other.blocks, *other.originals)]
        kept = self.kept.setdefault(one.request_id, [])
        if one.num_cached - length == start:
            kept[:] = range(start)  # nothing is dropped: it may have begun anew, or drafts did not stand
        assert not kept or kept[-1] + 1 == start
        for position in range(start, start + length):
            block, offset = one.blocks[len(kept) // SIZE], len(kept) % SIZE
            assert holders.count(block) == 1, "a block with several holders is written"
            self.memory[block * SIZE + offset] = (*one.token_ids, *one.drafts)[: position + 1]
            kept.append(position)

    def _read(self, one: Request) -> None:
        kept = self.kept[one.request_id]
        assert len(kept) == one.num_cached
        for index, position in enumerate(kept):
            slot = one.blocks[index // SIZE] * SIZE + index % SIZE
            known = (*one.token_ids, *one.drafts)[: position + 1]
            assert self.memory[slot] == known, "the cache holds another's tokens"


FUZZ = settings(max_examples=90, stateful_step_count=30, deadline=None)
ENOUGH = {"steps": 2500, "preempted": 20, "expired": 10}  # of each machine


@pytest.mark.parametrize("machine", [SchedulerMachine, SharingMachine, CollidingMachine, KeepingMachine])
def test_random_traffic_leaks_loses_and_mixes_nothing(machine: type[SchedulerMachine]) -> None:
    """Thousands of steps: no block with two writers, no token computed twice save after preemption, an end in sight."""
    machine.steps.clear()
    run_state_machine_as_test(machine, settings=FUZZ)
    assert {what: machine.steps[what] for what, least in ENOUGH.items() if machine.steps[what] < least} == {}
    assert bool(machine.steps["shared"]) == machine.share
    assert bool(machine.steps["changed"]) == (machine is KeepingMachine)
    assert (machine.steps["drafted"] > 200) == (machine is not KeepingMachine)


def finish(state: SchedulerState) -> None:
    """Run whatever is queued to its first token, and let it end."""
    while state.waiting or state.running:
        for chunk in schedule(state).chunks:
            if chunk.samples:
                one = next(r for r in state.running if r.request_id == chunk.request_id)
                state.running.remove(one)
                state.finish(one)


def test_a_prompt_seen_before_is_computed_from_its_last_block() -> None:
    state = new_state(share=True)
    state.waiting.append(request("a", 9))
    finish(state)
    state.waiting.append(request("b", 9))
    [chunk] = schedule(state).chunks
    assert (chunk.start, chunk.length, state.running[0].num_hit) == (8, 1, 8)


def test_a_full_hit_still_runs_its_last_token() -> None:
    state = new_state(share=True)
    state.waiting.append(request("a", 8))
    finish(state)
    state.waiting.append(request("b", 8))
    [chunk] = schedule(state).chunks
    assert (chunk.start, chunk.length) == (4, 4)  # the token's whole block, since blocks are shared whole


def test_another_salt_shares_nothing() -> None:
    state = new_state(share=True)
    state.waiting.append(request("a", 9))
    finish(state)
    other = request("b", 9)
    other.salt = b"somebody else"
    state.waiting.append(other)
    assert schedule(state).chunks[0].start == 0


def test_requests_that_begin_alike_compute_it_once() -> None:
    state = new_state(budget=8, share=True)
    state.waiting.extend([request("a", 12), request("b", 11), Request("c", [50, 51], 2, SamplingParams())])
    assert lengths(schedule(state)) == {"a": 8}
    state.limits = replace(state.limits, max_num_batched_tokens=16)
    assert lengths(schedule(state)) == {"a": 4, "b": 3, "c": 2}  # b found the eight tokens that a computed
    assert [r.num_hit for r in state.running] == [0, 8, 0]


def test_while_a_beginning_is_computed_others_pass() -> None:
    state = new_state(budget=8, share=True)
    state.waiting.extend([request("a", 6), request("b", 6), Request("c", [50, 51], 2, SamplingParams())])
    assert lengths(schedule(state)) == {"a": 6, "c": 2}
    assert [r.request_id for r in state.waiting] == ["b"]


def test_the_head_of_a_sequence_is_forgotten_last() -> None:
    state = new_state(blocks=4, share=True)
    state.waiting.append(request("a", 16))
    finish(state)
    state.waiting.append(Request("b", [50, 51, 52], 3, SamplingParams()))
    finish(state)  # takes one block: the last of a's
    assert len(state.find_prefix(request("c", 17))) == 3


def test_decodes_come_before_prefill_and_share_one_budget() -> None:
    state = new_state(budget=10)
    state.waiting.append(request("a", 3))
    assert lengths(schedule(state)) == {"a": 3}
    state.running[0].token_ids.append(9)
    state.waiting.append(request("b", 20))
    assert lengths(schedule(state)) == {"a": 1, "b": 9}
    state.running[0].token_ids.append(9)
    assert lengths(schedule(state)) == {"a": 1, "b": 9}
    state.running[0].token_ids.append(9)
    plan = schedule(state)
    assert lengths(plan) == {"a": 1, "b": 2}
    assert [chunk.samples for chunk in plan.chunks] == [True, True]


def test_a_prompt_that_does_not_fit_whole_waits_in_line() -> None:
    state = new_state(blocks=4)  # 16 tokens
    state.waiting.extend([request("a", 9), request("b", 8), request("c", 1)])
    assert lengths(schedule(state)) == {"a": 9}
    assert [r.request_id for r in state.waiting] == ["b", "c"]  # c would fit, but b was first


def test_the_last_admitted_is_preempted_and_keeps_its_tokens() -> None:
    state = new_state(blocks=4, budget=20)
    state.waiting.extend([request("a", 4), request("b", 4)])
    schedule(state)
    for _ in range(3):
        for one in state.running:
            one.token_ids.append(7)
        schedule(state)
    assert [len(one.blocks) for one in state.running] == [2, 2]
    for _ in range(2):
        for one in state.running:
            one.token_ids.append(7)
        plan = schedule(state)
    assert plan.preempted == ("b",)
    assert [chunk.request_id for chunk in plan.chunks] == ["a"]
    [victim] = state.waiting
    assert (victim.num_computed, victim.num_cached, victim.num_tokens) == (0, 0, 9)


def test_priorities_decide_who_starts_and_who_goes() -> None:
    state = new_state(blocks=6, budget=40, max_num_seqs=4)
    state.limits = replace(state.limits, scheduling_policy="priority")
    for name, prompt, priority in (("low", 8, 5), ("high", 8, 1), ("middle", 8, 3)):
        one = request(name, prompt)
        one.priority = priority
        state.add(one)
    assert lengths(schedule(state)) == {"high": 8, "middle": 8}
    for one in state.running:
        one.token_ids.append(7)
    plan = schedule(state)
    assert plan.preempted == ()
    for _ in range(4):
        for one in state.running:
            one.token_ids.append(7)
        plan = schedule(state)
    assert plan.preempted == ("middle",)
    assert [r.request_id for r in state.waiting] == ["middle", "low"]


def test_what_is_planned_already_is_not_preempted_in_the_same_step() -> None:
    state = new_state(blocks=4, budget=40, max_num_seqs=4)
    state.limits = replace(state.limits, scheduling_policy="priority")
    worst, best = request("worst", 7), request("best", 7)
    worst.priority = 9
    state.add(worst)
    schedule(state)
    state.add(best)
    schedule(state)
    for one in (worst, best):
        one.token_ids += [7, 7]  # the next step needs a third block for each, and there is none
        one.num_computed = one.num_cached = 8
    plan = schedule(state)
    assert lengths(plan).keys().isdisjoint(plan.preempted)
    assert lengths(plan)


def test_at_its_deadline_a_request_ends_wherever_it_is() -> None:
    state = new_state(blocks=3)
    for name, deadline in (("running", 5.0), ("waiting", 7.0), ("patient", None)):
        one = request(name, 9)
        one.deadline = deadline
        state.add(one)
    schedule(state)
    state.now = 4.9
    assert schedule(state).expired == ()
    state.now = 5.0
    plan = schedule(state)
    assert plan.expired == ("running",)
    assert lengths(plan) == {"waiting": 9}
    state.now = 9.0
    assert schedule(state).expired == ("waiting",)
    state.check_integrity()


def test_a_long_prompt_leaves_room_for_others() -> None:
    state = new_state(budget=10)
    state.limits = replace(state.limits, long_prefill_token_threshold=6)
    state.add(request("long", 20))
    assert lengths(schedule(state)) == {"long": 10}  # alone, it gets all
    state.add(request("short", 4))
    assert lengths(schedule(state)) == {"long": 6, "short": 4}


def test_a_static_batch_is_filled_once_and_runs_to_its_end() -> None:
    state = new_state(max_num_seqs=2, budget=8)
    state.limits = replace(state.limits, batching_mode="static")
    for name in "abc":
        state.add(request(name, 6))
    assert lengths(schedule(state)) == {"a": 6, "b": 2}  # filling takes two steps
    state.running[0].token_ids.append(7)
    assert lengths(schedule(state)) == {"a": 1, "b": 4}
    state.finish(state.running.pop(0))
    state.running[0].token_ids.append(7)
    assert lengths(schedule(state)) == {"b": 1}  # c waits although there is a seat
    state.finish(state.running.pop(0))
    assert lengths(schedule(state)) == {"c": 6}


def test_without_batching_one_runs_after_the_other() -> None:
    state = new_state(budget=20)
    state.limits = replace(state.limits, batching_mode="none")
    state.add(request("a", 6))
    state.add(request("b", 6))
    assert lengths(schedule(state)) == {"a": 6}


def preemptions(expected: float) -> int:
    """How often requests are preempted while 20 of 8 + 40 tokens share a cache for five."""
    state = new_state(max_num_seqs=20, budget=64, blocks=60)
    state.expected = expected
    for index in range(20):
        state.add(Request(f"r{index}", list(range(8)), 8, SamplingParams(max_tokens=40)))
    count = 0
    while state.waiting or state.running:
        plan = schedule(state)
        count += len(plan.preempted)
        for one in [r for r in state.running if r.num_computed == r.num_tokens]:
            one.token_ids.append(7)
            if one.num_tokens == 48:
                state.running.remove(one)
                state.finish(one)
    return count


def test_expecting_answers_to_grow_avoids_preemption() -> None:
    assert preemptions(EXPECTED_AT_FIRST) * 3 < preemptions(0.0)


def lengths(plan: Plan) -> dict[str, int]:
    return {chunk.request_id: chunk.length for chunk in plan.chunks}
