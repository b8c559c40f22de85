"""Room that proposers share: who is drafted for now takes it from who is not, and only as much as is needed."""

from __future__ import annotations

from llmopt_cli.runtime.speculative.room import Room


def test_room_is_made_at_the_cost_of_others_as_far_as_needed() -> None:
    room = Room(6, 4)
    first: list[int] = []
    second: list[int] = []
    third: list[int] = []
    assert room.make(first, 8, [])
    assert room.make(second, 9, [])
    assert [len(first), len(second)] == [2, 3]
    assert room.make(third, 9, [first, second])
    assert [len(first), len(second), len(third)] == [0, 3, 3]
    assert set(second).isdisjoint(third)


def test_who_finds_no_room_keeps_what_it_has() -> None:
    room = Room(2, 4)
    held: list[int] = []
    assert room.make(held, 5, [])
    kept = list(held)
    assert not room.make(held, 9, [])
    assert held == kept
    room.give_back(held)
    assert held == []
    room.check_integrity([])
    assert room.make([], 8, [])
