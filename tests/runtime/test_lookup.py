"""What lookups propose is what followed the same tokens before; the automaton knows every substring."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.speculative.automaton import Automaton
from llmopt_cli.runtime.speculative.lookup import FEWEST, NGram, Suffix

TEXTS = st.lists(st.integers(0, 3), max_size=60)


def request(tokens: list[int], name: str = "a", salt: str = "") -> Request:
    return Request(name, tokens, len(tokens), SamplingParams(cache_salt=salt))


def occurs(text: list[int], part: list[int]) -> bool:
    return any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))


@given(TEXTS)
def test_the_longest_repeated_suffix_is_found_with_a_place_it_occurred(text: list[int]) -> None:
    automaton = Automaton()
    for end, symbol in enumerate(text, start=1):
        automaton.add(symbol)
        length, place = automaton.repeated()
        known = text[:end]
        suffixes = [size for size in range(1, end) if occurs(known[:-1], known[-size:])]
        assert length == max(suffixes, default=0)
        if length:
            assert place < end
            assert known[place - length : place] == known[-length:]


@given(TEXTS, TEXTS)
def test_following_another_text_finds_its_longest_suffix_that_occurs(text: list[int], other: list[int]) -> None:
    automaton = Automaton()
    for symbol in text:
        automaton.add(symbol)
    state = length = 0
    for end, symbol in enumerate(other, start=1):
        state, length = automaton.follow(state, length, symbol)
        suffixes = [size for size in range(1, end + 1) if occurs(text, other[end - size : end])]
        assert length == max(suffixes, default=0)
        if length:
            place = automaton.ends[state]
            assert text[place - length : place] == other[end - length : end]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_n_grams_propose_what_followed_the_latest_occurrence(text: list[int], length: int) -> None:
    proposer, grown = NGram(2, 4), request(text[:1])
    for token in text[1:]:
        proposer.propose([grown], [length])
        grown.token_ids.append(token)
    [draft] = proposer.propose([grown], [length])
    for size in (4, 3, 2):
        ends = [end for end in range(size, len(text)) if size <= len(text) and text[end - size : end] == text[-size:]]
        if ends:
            followed = text[ends[-1] :]
            assert list(draft.tokens) == [(followed * length)[index] for index in range(length)]
            return
    assert draft.tokens == ()


def test_suffixes_are_trusted_as_far_as_they_are_long_and_loops_go_on() -> None:
    proposer = Suffix()
    [draft] = proposer.propose([request([1, 2, 3, 4, 1, 2])], [8])
    assert draft.tokens == (3, 4, 1, 2)  # two tokens matched
    [draft] = proposer.propose([request([5, 6, 5, 6, 5, 6], "b")], [8])
    assert draft.tokens == (5, 6, 5, 6, 5, 6, 5, 6)


def test_answers_that_ended_help_others_but_not_across_a_salt() -> None:
    proposer = Suffix()
    for name, salt in (("first", ""), ("secret", "mine")):
        start = [1, 2, 3, 4, 5, 6] if not salt else [11, 12, 13, 14]
        proposer.propose([request(start, name, salt)], [4])
        proposer.forget(name)
    drafts = proposer.propose(
        [request([9, 2, 3], "a"), request([9, 11, 12], "b"), request([9, 2, 3], "c", "x")], [4] * 3
    )
    assert [draft.tokens for draft in drafts] == [(4, 5, 6), (), ()]
    proposer.forget_ended()
    drafts = proposer.propose([request([9, 2, 3], "a"), request([9, 2, 3], "d")], [4] * 2)
    assert [draft.tokens for draft in drafts] == [(), ()]


def test_what_is_remembered_is_bounded() -> None:
    proposer = Suffix(remembered=50)
    for index in range(40):
        proposer.propose([request([4 * index, 4 * index + 1, 4 * index + 2, 4 * index + 3] * 3, f"r{index}")], [4])
        proposer.forget(f"r{index}")
    assert len(proposer._others) == 2
    assert sum(len(one.text) for one in proposer._others.values()) < 150
    [draft] = proposer.propose([request([156, 157], "new")], [4])
    assert draft.tokens[: FEWEST - 1] == (158,)
    proposer.forget_ended()
    assert proposer.propose([request([156, 157], "newer")], [4])[0].tokens == ()


@given(TEXTS.filter(bool), st.integers(1, 5))
def test_texts_shorter_than_an_n_gram_propose_nothing(text: list[int], shortest: int) -> None:
    grown, proposer = request(text[:1]), NGram(shortest, 5)
    for token in text[1:]:
        [draft] = proposer.propose([grown], [3])
        assert len(grown.token_ids) > shortest or not draft.tokens
        grown.token_ids.append(token)
