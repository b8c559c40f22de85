"""The scheduler and its blocks under random traffic: no leak, no lost or repeated token, progress within a bound."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.scheduler import Plan, SchedulerState, schedule
from llmopt_cli.spec.recipe import Batching

BLOCKS, SIZE = 12, 4


def new_state(max_num_seqs: int = 3, budget: int = 10, blocks: int = BLOCKS) -> SchedulerState:
    limits = Batching(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, block_size=SIZE)
    return SchedulerState(limits, BlockPool(blocks))


def request(name: str, prompt: int) -> Request:
    return Request(name, list(range(prompt)), prompt, SamplingParams())


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, finishes and aborts over a pool so small that preemption is common."""

    def __init__(self) -> None:
        super().__init__()
        self.state = new_state()
        self.goal: dict[str, int] = {}  # request -> tokens it must reach
        self.computed: dict[str, int] = {}  # request -> position up to which its tokens were run since its last start
        self.names = (f"r{i}" for i in itertools.count())
        self.idle_steps = 0

    @rule(prompt=st.integers(1, 30), output=st.integers(1, 18))
    def arrive(self, prompt: int, output: int) -> None:
        name = next(self.names)
        self.state.waiting.append(request(name, prompt))
        self.goal[name] = prompt + output
        self.computed[name] = 0

    @precondition(lambda self: self.goal)
    @rule()
    def step(self) -> None:
        plan = schedule(self.state)
        live = {r.request_id: r for r in (*self.state.running, *self.state.waiting)}
        for name in plan.preempted:
            self.computed[name] = 0
        assert sum(chunk.length for chunk in plan.chunks) <= self.state.limits.max_num_batched_tokens
        for chunk in plan.chunks:
            assert chunk.start == self.computed[chunk.request_id], "a token was skipped or computed twice"
            self.computed[chunk.request_id] += chunk.length
            one = live[chunk.request_id]
            assert chunk.samples == (one.num_computed == one.num_tokens)
            if chunk.samples:
                one.token_ids.append(0)
                if one.num_tokens >= self.goal[chunk.request_id]:
                    self._drop(one)
        self.idle_steps = 0 if plan.chunks else self.idle_steps + 1
        assert self.idle_steps < 2, "there is work and nothing runs"

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.goal)))
        self._drop(next(r for r in (*self.state.running, *self.state.waiting) if r.request_id == name))

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

    @invariant()
    def nothing_leaks(self) -> None:
        self.state.check_integrity()
        assert len(self.state.running) <= self.state.limits.max_num_seqs

    def _drop(self, one: Request) -> None:
        self.state.release(one)
        for queue in (self.state.running, self.state.waiting):
            if one in queue:
                queue.remove(one)
        del self.goal[one.request_id]


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_scheduler_survives_random_traffic = SchedulerMachine.TestCase


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


def lengths(plan: Plan) -> dict[str, int]:
    return {chunk.request_id: chunk.length for chunk in plan.chunks}
