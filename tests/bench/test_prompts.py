"""Prompts: as long as asked, new in every run, the same for the same seed, alike only where the workload says so."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from llmopt_cli.bench.prompts import Ask, make_asks, read_source
from llmopt_cli.spec.workload import Workload

TOKENS = read_source(lambda text: list(text.encode()))
TEXT = read_source(None)


def common(one: Ask, other: Ask) -> int:
    """Length of the shared beginning."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.prompt, other.prompt, strict=False))
    return sum(1 for _ in pairs)


@pytest.mark.parametrize("name", ["chat", "rag", "code", "decode"])
def test_prompts_have_the_lengths_and_limits_of_the_workload(name: str) -> None:
    workload = Workload.read(name)
    asks = make_asks(workload, TOKENS, 2048, "a")
    sizes, _ = workload.sizes(2048)
    assert [(len(ask.prompt), ask.params.max_tokens) for ask in asks] == [tuple(size) for size in sizes]
    assert all(ask.params.ignore_eos == workload.ignore_eos and ask.params.temperature == 0 for ask in asks)


def test_the_same_seed_and_nonce_make_the_same_requests() -> None:
    workload = Workload.read("chat")
    assert make_asks(workload, TOKENS, 2048, "a") == make_asks(workload, TOKENS, 2048, "a")


def test_no_two_prompts_share_a_beginning_within_or_between_runs() -> None:
    workload = Workload.read("chat")
    asks = [ask for nonce in ("a", "b") for ask in make_asks(workload, TOKENS, 2048, nonce)]
    assert max(common(one, other) for one, other in itertools.combinations(asks, 2)) < 8


def test_the_shared_prefix_is_shared_and_nothing_more() -> None:
    workload = Workload.read("rag")
    asks = make_asks(workload, TOKENS, 2048, "a")
    shared = [common(one, other) for one, other in itertools.combinations(asks, 2)]
    assert min(shared) == workload.shared_prefix
    assert max(shared) < workload.shared_prefix + 8


def test_without_a_tokenizer_prompts_are_text_of_about_that_length() -> None:
    workload = replace(Workload.read("chat"), temperature=0.5)
    for ask in make_asks(workload, TEXT, None, "a"):
        assert isinstance(ask.prompt, str)
        assert 3 * ask.input_len <= len(ask.prompt) <= 4 * ask.input_len


def test_sampled_requests_have_seeds_of_their_own() -> None:
    asks = make_asks(replace(Workload.read("chat"), temperature=0.5, seed=100), TOKENS, 2048, "a")
    assert [ask.params.seed for ask in asks] == list(range(100, 100 + len(asks)))
