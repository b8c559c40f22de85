"""The controller drafts where that wins, stops where it loses, and finds out when that changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from llmopt_cli.runtime.speculative.controller import Controller
from llmopt_cli.runtime.speculative.times import Clocks, Times, bucket

MOST = 8


class World:
    """A machine whose steps take `step(tokens)` seconds, `propose(tokens, or passes)`; drafts stand with `chance`."""

    def __init__(
        self,
        step: Callable[[int], float],
        propose: Callable[[int], float],
        chance: float,
        noise: float = 0.05,
        in_turn: bool = False,
    ) -> None:
        self.step, self.propose, self.chance, self.noise = step, propose, chance, noise
        self.clocks = Clocks(in_turn)
        self.controller = Controller(MOST, self.clocks)
        self.random = Random(0)
        self.now = self.seconds = self.tokens = 0.0
        self.looking = 0.002  # seconds that it takes to look at a request
        self.rest = 0
        self.found = 1.0  # of what was asked for
        self.lifetime = 0  # steps after which one request makes way for another, if they do
        self.asked = 0  # steps in which requests were looked at

    def run(self, rounds: int, requests: int) -> float:
        """Tokens a second relative to no drafts at all."""
        self.seconds = self.tokens = self.asked = 0
        names = [f"r{index}" for index in range(requests)]
        for count in range(rounds):
            if self.lifetime and not count % self.lifetime:
                self.controller.forget(names.pop(0))
                names.append(f"other {count}")
            asleep = self.rest > 0
            self.rest, self.asked = max(0, self.rest - 1), self.asked + (not asleep)
            lengths = [0] * requests if asleep else self.controller.lengths(names, requests, self.now)
            comparing = not asleep and self.controller.comparing
            brought = 0
            found = [int(length * self.found) for length in lengths]
            for name, asked, length in zip(names, lengths, found, strict=True):
                stood = next((place for place in range(length) if self.random.random() > self.chance), length)
                if asked:
                    self.controller.proposed(name, asked, length)
                    self.controller.verified(name, length, stood, comparing)
                brought += 0 if comparing else stood
            self.tokens += requests + brought
            self.spend(requests, lengths, comparing, asleep, sum(found))
        return self.tokens / self.seconds * self.step(requests) / requests

    def spend(self, requests: int, lengths: Sequence[int], comparing: bool, asleep: bool, found: int) -> None:
        """The time of a step, and what there is to learn from it."""
        proposed = sum(lengths)
        drafted = 0 if comparing else found
        amount = max(lengths) if self.clocks.in_turn else proposed
        running = self.step(requests + drafted) * (1 + self.noise * self.random.uniform(-1, 1))
        proposing = 0.0 if asleep else self.looking * requests + (self.propose(amount) if proposed else 0.0)
        self.clocks.add_step(requests, drafted, running)
        if proposed:
            self.clocks.add_proposal(requests - lengths.count(0), max(lengths), proposing)
        if not asleep:
            self.controller.stepped(requests, drafted, running + proposing, proposing)
            self.rest = self.controller.rest(requests)
        self.seconds += running + proposing
        self.now += running + proposing


def flat(tokens: int) -> float:
    return 1.0 + 0.01 * tokens


def steep(tokens: int) -> float:
    return 0.2 + 0.8 * tokens


def free(tokens: int) -> float:
    return 0.001


@pytest.mark.parametrize("requests", [1, 8, 32])
@pytest.mark.parametrize(
    ("step", "propose", "chance"),
    [(steep, free, 0.5), (flat, lambda tokens: 0.8 * tokens, 0.6), (flat, free, 0.0), (steep, lambda t: t, 0.9)],
    ids=["steep steps", "dear proposals", "never right", "both"],
)
def test_where_drafting_loses_nearly_nothing_is_lost(
    step: Callable[[int], float], propose: Callable[[int], float], chance: float, requests: int
) -> None:
    assert World(step, propose, chance).run(3000, requests) > 0.98


@pytest.mark.parametrize(("chance", "least"), [(0.9, 4.5), (0.7, 2.4), (0.4, 1.25)])
def test_where_steps_are_flat_drafts_are_long_and_win(chance: float, least: float) -> None:
    assert World(flat, free, chance).run(2000, 1) > least


def test_a_pass_for_each_token_is_dear_for_one_request_and_not_for_many() -> None:
    world = World(flat, lambda passes: 0.05 * passes, 0.8, in_turn=True)
    assert world.run(2000, 1) > 1.5
    assert world.run(2000, 8) > 1.5


@pytest.mark.parametrize(("step", "chance", "least"), [(steep, 0.5, 0.98), (flat, 0.8, 1.5)])
def test_requests_come_and_go_in_all_sizes(step: Callable[[int], float], chance: float, least: float) -> None:
    world = World(step, free, chance)
    world.lifetime = 20
    world.run(500, 4)
    for requests in (1, 16, 3, 32, 8):
        assert world.run(2000, requests) > least


def test_times_that_have_become_shorter_are_noticed() -> None:
    world = World(steep, free, 0.9)
    assert world.run(2000, 2) > 0.98
    world.step = flat
    world.run(4000, 2)
    assert world.run(2000, 2) > 1.5


def test_a_machine_that_paused_does_not_keep_it_from_trying() -> None:
    world = World(flat, free, 0.1)
    world.run(500, 4)
    world.controller.stepped(4, 0, 500.0, 500.0)
    world.chance = 0.9
    world.run(3000, 4)
    assert world.run(1000, 4) > 1.5


def test_steps_that_are_not_timed_end_a_pause_and_teach_nothing_of_times() -> None:
    clocks = Clocks()
    controller = Controller(4, clocks)
    now, drafted = 0.0, []
    for step in range(400):
        (length,) = controller.lengths(["a"], 1, now)
        clocks.add_step(1, length, 1.0) if step < 100 else None
        if length:
            clocks.add_proposal(1, length, 0.001)
            controller.proposed("a", length, length)
            controller.verified("a", length, length)
        controller.stepped(1, length, 1.0 if step < 100 else None, 0.001)
        now, drafted = now + 1, [*drafted, length]
    assert drafted[-100:].count(4) > 90


def test_it_comes_back_when_the_text_changes_and_leaves_again() -> None:
    world = World(flat, lambda tokens: 0.03 * tokens, 0.02)
    assert world.run(2000, 4) > 0.98
    world.chance = 0.9
    assert world.run(4000, 4) > 1.3
    world.chance = 0.02
    world.run(100, 4)
    assert world.run(2000, 4) > 0.98


def test_while_nothing_is_drafted_requests_are_looked_at_as_often_as_that_may_cost() -> None:
    world = World(lambda tokens: 1.0 + 0.2 * tokens, free, 0.1)
    world.looking = 0.05
    world.run(1000, 32)
    assert world.run(3000, 32) > 0.985
    assert 0 < world.asked < 300


def test_what_would_stand_is_found_out_without_verifying() -> None:
    world = World(steep, free, 0.1)
    world.run(2000, 8)
    world.step, world.chance = flat, 0.95  # what drafted steps took is known to be much; it has to be tried
    assert world.run(6000, 8) > 1.5


def test_what_would_have_stood_is_believed_when_it_is_recalled() -> None:
    world = World(flat, free, 0.0)
    world.run(1000, 1)
    assert world.run(50, 1) < 1.01
    for _ in range(10):
        world.controller.recalled("r0", ((24, 24),) * MOST)
    world.chance = 0.95
    assert world.run(50, 1) > 1.5


def test_times_are_means_with_straight_lines_between() -> None:
    times = Times()
    assert times.at(5) == 0
    times.add(4, 2.0)
    assert times.at(4) == 2
    assert times.at(8) == 2  # nothing else is known
    assert times.at(8, start=(2, 1.5)) == pytest.approx(3)
    assert times.at(8, start=(6, 2.5)) == 2.5
    times.add(8, 4.0)
    assert times.at(6) == pytest.approx(3)
    assert times.at(16) == pytest.approx(8)
    assert times.at(3) == 2
    for _ in range(20):
        times.add(4, 2.0)
    times.add(4, 400.0)  # the machine paused
    assert times.at(4) < 2.2


def test_more_never_takes_less() -> None:
    times = Times()
    for tokens, seconds in ((4, 10.0), (8, 5.0)):
        times.add(tokens, seconds)
    assert [times.at(tokens) for tokens in (3, 4, 6, 8)] == [5.0] * 4


def test_where_nothing_is_found_hardly_anything_is_looked_at() -> None:
    world = World(flat, free, 0.9)
    world.found = 0.0
    assert world.run(3000, 4) > 0.98
    assert world.asked < 700


def test_the_first_times_are_cold_and_the_shortest_of_them_counts() -> None:
    times = Times()
    for seconds in (9.0, 2.0, 2.5):
        times.add(4, seconds)
    assert times.at(4) == 2
    times.add(4, 3.0)
    assert 2 < times.at(4) < 3


def test_more_drafts_than_were_seen_take_as_long_as_requests_would() -> None:
    clocks = Clocks()
    for requests in (1, 32):
        clocks.add_step(requests, 0, float(requests))
    assert clocks.drafted(32, 8) == pytest.approx(40)
    clocks.add_step(1, 4, 1.5)
    assert clocks.drafted(1, 4) == 1.5
    assert clocks.drafted(32, 32) == pytest.approx(64)
    clocks.add_step(32, 32, 40.0)
    assert clocks.drafted(32, 32) == 40


def test_passes_are_timed_by_requests() -> None:
    clocks = Clocks(in_turn=True)
    clocks.add_proposal(1, 4, 2.0)
    assert clocks.proposing(1, 1) == clocks.proposing(8, 1) == 0.8  # to begin takes as long as a pass
    clocks.add_proposal(8, 2, 2.4)
    assert clocks.proposing(8, 4) == pytest.approx(4)
    assert clocks.proposing(1, 4) == 2


def test_when_a_machine_becomes_slower_everything_does() -> None:
    clocks = Clocks()
    for scale in (1.0, 3.0):
        for _ in range(80):
            for requests in (4, 8, 12):
                clocks.add_step(requests, 0, requests * scale)
        if scale == 1:
            for _ in range(2):  # the first is slower than those that follow
                clocks.add_step(8, 8, 12.0)
            clocks.add_proposal(8, 1, 1.0)
    assert clocks.alone(8) == pytest.approx(24, rel=0.05)
    assert clocks.drafted(8, 8) == pytest.approx(36, rel=0.25)
    assert clocks.proposing(8, 1) == pytest.approx(3, rel=0.25)


def test_a_pace_that_is_uneven_does_not_drift_from_the_times() -> None:
    """Where pauses are long and haste is short, means of ratios and of differences are not the same."""
    clocks, random = Clocks(), Random(1)
    for drafted in (0, 4):
        for _ in range(30):
            clocks.add_step(1, drafted, 1.0 + drafted / 4)
    for _ in range(20_000):
        clocks.add_step(1, 0, 1.0 + 2 * random.random() ** 4)
    assert clocks.drafted(1, 4) == pytest.approx(2 * clocks.alone(1), rel=0.1)
    for _ in range(20_000):
        clocks.add_step(1, 4, 2.0 + 4 * random.random() ** 4)
    assert clocks.drafted(1, 4) == pytest.approx(2 * clocks.alone(1), rel=0.1)


def test_no_draft_is_longer_than_asked_for() -> None:
    world, asked = World(flat, free, 0.9), []
    world.controller = Controller(1, world.clocks)
    for step in range(30):
        asked += world.controller.lengths(["a"], 1, float(step))
        world.spend(1, asked[-1:], comparing=False, asleep=False, found=asked[-1])
    assert set(asked) == {0, 1}


def test_times_of_nearly_as_many_tokens_share_a_mean() -> None:
    assert [bucket(tokens) for tokens in (0, 1, 7, 15, 17, 33, 130)] == [0, 1, 7, 15, 16, 32, 128]
