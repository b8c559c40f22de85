"""Requests that begin alike hold the same blocks: forks under random traffic, and several answers to one prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.request import Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk, SchedulerState, schedule
from llmopt_cli.spec.recipe import Batching

SIZE = 4


class ForkMachine(RuleBasedStateMachine):
    """Arrivals, forks, parking and aborts over a tiny pool. `memory` stands for the cache: what each slot holds."""

    def __init__(self) -> None:
        super().__init__()
        limits = Batching(max_num_seqs=4, max_num_batched_tokens=10, block_size=SIZE)
        self.state = SchedulerState(limits, BlockPool(12), share_prefixes=True)
        self.memory: dict[int, tuple[int, ...]] = {}
        self.names = (f"r{number}" for number in itertools.count())
        self.tokens = itertools.count(100)

    @property
    def all(self) -> list[Request]:
        return [*self.state.running, *self.state.waiting, *self.state.parked]

    @rule(prompt=st.integers(1, 20))
    def arrive(self, prompt: int) -> None:
        self.state.add(Request(next(self.names), list(range(prompt)), prompt, SamplingParams(max_tokens=12)))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        plan = schedule(self.state)
        for source, target in plan.copies:
            for offset in range(SIZE):
                self.memory[target * SIZE + offset] = self.memory.get(source * SIZE + offset, ())
        running = {one.request_id: one for one in self.state.running}
        for chunk in plan.chunks:
            self._compute(running[chunk.request_id], chunk)
        assert plan.chunks or not (self.state.running or self.state.waiting), "there is work and nothing runs"
        for chunk in plan.chunks:
            if chunk.samples:
                self._go_on(running[chunk.request_id], data.draw(st.sampled_from("ttttffpe")))

    def _compute(self, one: Request, chunk: Chunk) -> None:
        for position in range(chunk.start, chunk.start + chunk.length):
            block = one.blocks[position // SIZE]
            assert not self.state.blocks.is_shared(block), "a block with several holders is written"
            self.memory[block * SIZE + position % SIZE] = tuple(one.token_ids[: position + 1])
        for position in range(one.num_computed):
            slot = one.blocks[position // SIZE] * SIZE + position % SIZE
            assert self.memory[slot] == tuple(one.token_ids[: position + 1]), "the cache holds another's tokens"

    def _go_on(self, one: Request, choice: str) -> None:
        """A token, a fork and a token each, a pause, or the end."""
        if choice == "e" or one.num_tokens - one.num_prompt >= 12:
            self.state.running.remove(one)
            self.state.finish(one)
        elif choice == "p":
            self.state.park(one)
        else:
            if choice == "f":
                child = Request(next(self.names), list(one.token_ids), one.num_prompt, one.params)
                self.state.fork(one, child)
                child.token_ids.append(next(self.tokens))
            one.token_ids.append(next(self.tokens))

    @precondition(lambda self: self.state.parked)
    @rule(fork=st.booleans())
    def resume(self, fork: bool) -> None:
        one = self.state.parked[0]
        self.state.resume(one)
        self._go_on(one, "f" if fork else "t") if one.num_tokens - one.num_prompt < 12 else self.state.drop(one)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.state.drop(data.draw(st.sampled_from(self.all)))

    @invariant()
    def nothing_leaks(self) -> None:
        self.state.check_integrity()
        assert len(self.state.running) <= 4

    def teardown(self) -> None:
        for one in self.all:
            self.state.drop(one)
        assert self.state.blocks.num_free == 12


ForkMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
test_forks_never_write_into_each_other = ForkMachine.TestCase


def test_who_is_parked_gives_its_blocks_to_those_who_can_run() -> None:
    limits = Batching(max_num_seqs=4, max_num_batched_tokens=40, block_size=SIZE)
    state = SchedulerState(limits, BlockPool(8))
    first = Request("a", list(range(15)), 15, SamplingParams(max_tokens=8))
    state.add(first)
    schedule(state)
    state.park(first)
    assert len(first.blocks) == 4, "they are kept while nobody needs them"
    state.add(Request("c", list(range(100, 120)), 20, SamplingParams(max_tokens=8)))
    assert [chunk.request_id for chunk in schedule(state).chunks] == ["c"]
    assert not first.blocks
    state.drop(state.running[0])
    state.resume(first)
    first.token_ids.append(15)
    [chunk] = schedule(state).chunks
    assert (chunk.request_id, chunk.start, chunk.length) == ("a", 0, 16)
    state.check_integrity()


PROMPT = list(range(40, 61))
DRAW = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("Llama", num_hidden_layers=2, hidden_size=32)


def make(folder: Path, **batching: Any) -> Engine:
    options = {"max_num_seqs": 8, "block_size": 4, "max_model_len": 64} | batching
    return Engine.from_pretrained(folder, dtype="float32", device="cpu", batching=Batching(**options))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[RequestOutput]:
    """Each of six answers as a request of its own."""
    engine = make(folder)
    return [engine.generate([PROMPT], DRAW.child(index))[0] for index in range(6)]


def ask(engine: Engine, count: int = 6, params: SamplingParams = DRAW) -> list[str]:
    first = engine.add_request(PROMPT, params, "0")
    return [first, *(engine.add_request(PROMPT, params.child(i), str(i), twin=first) for i in range(1, count))]


def run(engine: Engine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_work():
        last |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0
    return last


@pytest.mark.parametrize(
    "batching",
    [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 3},  # less than there are answers
        {"max_model_len": 32, "kv_cache_memory_bytes": 8 * 4 * 256},  # room for one
        {"scheduling_policy": "priority"},
    ],
    ids=lambda batching: next(iter(batching)),
)
def test_several_answers_are_what_each_is_alone(
    folder: Path, alone: list[RequestOutput], batching: dict[str, Any]
) -> None:
    engine = make(folder, **batching)
    names = ask(engine)
    last = run(engine)
    assert [last[name].token_ids for name in names] == [output.token_ids for output in alone]
    assert len({output.token_ids for output in alone}) == 6, "each has a random stream of its own"


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, enable_prefix_caching=False)
    forward, lengths = engine._runner.run, []

    def counted(chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> torch.Tensor:
        lengths.append(sum(chunk.length for chunk in chunks))
        return forward(chunks, requests)

    monkeypatch.setattr(engine._runner, "run", counted)
    ask(engine)
    engine.step()
    blocks = engine.stats().num_blocks
    assert round(engine.stats().kv_cache_usage * blocks) == 6  # of 21 tokens, whoever holds them
    engine.step()
    assert round(engine.stats().kv_cache_usage * blocks) == 6 + 5  # five of six copy the last block
    run(engine)
    assert lengths[:2] == [21, 6]


def test_an_answer_that_is_asked_for_late_begins_at_the_prompt(folder: Path, alone: list[RequestOutput]) -> None:
    engine = make(folder)
    engine.add_request(PROMPT, DRAW, "0")
    for _ in range(3):
        engine.step()
    engine.add_request(PROMPT, DRAW.child(1), "1", twin="0")
    last = run(engine)
    assert [last[name].token_ids for name in "01"] == [output.token_ids for output in alone[:2]]


def test_what_was_scored_of_a_prompt_is_told_with_every_answer(folder: Path) -> None:
    engine = make(folder)
    names = ask(engine, 2, SamplingParams(max_tokens=3, temperature=1.0, seed=1, prompt_logprobs=1))
    last = run(engine)
    assert len(last["0"].prompt_logprobs or ()) == len(PROMPT) - 1
    assert last[names[0]].prompt_logprobs == last[names[1]].prompt_logprobs


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("gone", ["0", "2"])
def test_answers_go_on_when_one_of_them_is_aborted(
    folder: Path, alone: list[RequestOutput], steps: int, gone: str
) -> None:
    engine = make(folder, max_num_batched_tokens=8)  # the prompt takes three steps
    names = ask(engine)
    last: dict[str, RequestOutput] = {}
    for _ in range(steps):
        last |= {output.request_id: output for output in engine.step()}
    engine.abort(gone)
    engine.check_integrity()
    last |= run(engine)
    for name, output in zip(names, alone, strict=True):
        assert name == gone or last[name].token_ids == output.token_ids


def test_the_first_answer_has_the_seed_and_the_others_their_own() -> None:
    seeds = [DRAW.child(index).seed for index in range(5)]
    assert seeds[0] == 3
    assert len(set(seeds)) == 5
    assert SamplingParams(temperature=1.0).child(2).seed is None
