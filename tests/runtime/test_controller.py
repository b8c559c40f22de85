"""The controller drafts where that wins, stops where it loses, and finds out when that changes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from llmopt_cli.runtime.speculative.controller import Controller, Times, gain, reach

MOST = 8


class World:
    """A machine whose steps take `step(tokens)` seconds, proposing `propose(tokens)`; drafts stand with `chance`."""

    def __init__(
        self, step: Callable[[int], float], propose: Callable[[int], float], chance: float, noise: float = 0.05
    ) -> None:
        self.step, self.propose, self.chance, self.noise = step, propose, chance, noise
        self.steps, self.proposals = Times(), Times()
        self.controller = Controller(MOST, self.steps, self.proposals)
        self.random = Random(0)
        self.seconds = self.tokens = 0.0

    def run(self, rounds: int, requests: int) -> float:
        """Tokens a second relative to no drafts at all."""
        self.seconds = self.tokens = 0.0
        names = [f"r{index}" for index in range(requests)]
        for _ in range(rounds):
            lengths = self.controller.lengths(names)
            drafted = sum(lengths)
            jitter = 1 + self.noise * self.random.uniform(-1, 1)
            running = self.step(requests + drafted) * jitter
            proposing = self.propose(drafted) if drafted else 0.0
            for name, length in zip(names, lengths, strict=True):
                stood = next((place for place in range(length) if self.random.random() > self.chance), length)
                self.tokens += stood + 1
                self.controller.verified(name, length, stood)
            self.steps.add(requests + drafted, running)
            if drafted:
                self.proposals.add(drafted, proposing)
            self.controller.stepped(requests, drafted, running + proposing)
            self.seconds += running + proposing
        return self.tokens / self.seconds * self.step(requests) / requests


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


@pytest.mark.parametrize(("chance", "least"), [(0.9, 4.5), (0.7, 2.4), (0.4, 1.4)])
def test_where_steps_are_flat_drafts_are_long_and_win(chance: float, least: float) -> None:
    assert World(flat, free, chance).run(2000, 1) > least


def test_it_comes_back_when_the_text_changes_and_leaves_again() -> None:
    world = World(flat, lambda tokens: 0.03 * tokens, 0.02)
    assert world.run(2000, 4) > 0.98
    world.chance = 0.9
    assert world.run(4000, 4) > 1.3
    world.chance = 0.02
    world.run(100, 4)
    assert world.run(2000, 4) > 0.98


def test_times_are_means_with_straight_lines_between() -> None:
    times = Times()
    assert times.at(5) == 0
    times.add(4, 2.0)
    assert times.at(4) == 2
    times.add(8, 4.0)
    assert times.at(6) == pytest.approx(3)
    assert times.at(16) == pytest.approx(8)
    times.add(4, 400.0)  # the machine paused
    assert times.at(4) < 3


def test_reach_and_gain_are_those_of_the_paper() -> None:
    assert reach(0.5, 0.2, 8) == 2
    assert reach(0.9, 0.2, 8) == 8
    assert reach(0.1, 0.2, 8) == 0
    assert gain(0.5, 3) == pytest.approx(0.5 + 0.25 + 0.125)
