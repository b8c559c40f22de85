"""Beam search: the sequences and scores of transformers' `generate(num_beams=...)` in float32, whatever else runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import UsageError
from llmopt_cli.runtime import Engine, FinishReason, SamplingParams
from llmopt_cli.runtime.journal import replay
from llmopt_cli.runtime.request import Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.spec.recipe import Batching

PROMPTS = [[9, 30, 7, 512, 77], list(range(40, 61))]
CASES = [(2, 1.0), (4, 0.3), (3, -1.0)]
BEAMS = SamplingParams(max_tokens=16, beams=4)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    # Every other token ends the text, or next to no search would see an end.
    return tiny("Llama", eos_token_id=[*range(1, 4096, 40)], num_hidden_layers=2, hidden_size=32)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[int, float, int], list[tuple[list[int], float]]]:
    """Generated tokens and score of all beams of every case, best first, as transformers has them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for beams, penalty in CASES:
        for number, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_beams=beams,
                num_return_sequences=beams,
                length_penalty=penalty,
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=6,
                return_dict_in_generate=True,
                output_scores=True,
            )
            rows = [row[len(prompt) :].tolist() for row in out.sequences]
            trimmed = [row[: row.index(6)] if 6 in row else row for row in rows]
            found[beams, penalty, number] = list(zip(trimmed, out.sequences_scores.tolist(), strict=True))
    return found


def make(folder: Path, **batching: Any) -> Engine:
    options = {"max_num_seqs": 8, "block_size": 4, "max_model_len": 64} | batching
    return Engine.from_pretrained(folder, dtype="float32", device="cpu", batching=Batching(**options))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make(folder)


def run(engine: Engine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_work():
        last |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0
    return last


def search_all(engine: Engine, expected: Mapping[Any, Any], *others: str) -> None:
    """Search all cases at once, beside ordinary requests, and compare."""
    for beams, penalty, number in expected:
        params = SamplingParams(max_tokens=16, beams=beams, length_penalty=penalty)
        engine.add_request(PROMPTS[number], params, f"{beams} {penalty} {number}")
    for name in others:
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=30, ignore_eos=True), name)
    last = run(engine)
    for (beams, penalty, number), wanted in expected.items():
        output = last[f"{beams} {penalty} {number}"]
        assert [list(one.token_ids) for one in output.beams] == [tokens for tokens, _ in wanted]
        assert [one.score for one in output.beams] == pytest.approx([score for _, score in wanted], rel=1e-5)
        assert (output.token_ids, output.text) == (output.beams[0].token_ids, output.beams[0].text)


def test_sequences_and_scores_are_those_of_generate(engine: Engine, expected: Mapping[Any, Any]) -> None:
    search_all(engine, expected)
    reasons = {len(tokens) < 16 for rows in expected.values() for tokens, _ in rows}
    assert reasons == {True, False}, "some sequences end by themselves, some by their length"


@pytest.mark.parametrize(
    "batching",
    [
        {"max_num_seqs": 2},  # less than there are beams
        {"max_num_batched_tokens": 8, "enable_prefix_caching": False},
        {"batching_mode": "static", "scheduling_policy": "priority"},
        {"batching_mode": "none"},
        {"kv_cache_memory_bytes": 10 * 4 * 256, "max_model_len": 40},  # room for one request
    ],
    ids=lambda batching: next(iter(batching)),
)
def test_beams_are_the_same_where_room_is_scarce(
    folder: Path, expected: Mapping[Any, Any], batching: dict[str, Any]
) -> None:
    engine = make(folder, **batching)
    search_all(engine, expected, "one", "two")
    if "kv_cache_memory_bytes" in batching:
        assert engine.stats().num_blocks == 10
        assert engine.stats().num_preemptions > 0


def test_one_beam_is_greedy(engine: Engine) -> None:
    [beam] = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=9, beams=1, ignore_eos=True))
    [greedy] = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=9, ignore_eos=True))
    assert (beam.token_ids, beam.text) == (greedy.token_ids, greedy.text)


def test_beams_share_the_blocks_of_what_they_have_in_common(folder: Path) -> None:
    engine = make(folder, enable_prefix_caching=False)
    engine.add_request(PROMPTS[1], SamplingParams(max_tokens=8, beams=4, ignore_eos=True))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, round(engine.stats().kv_cache_usage * engine.stats().num_blocks))
    assert 6 < most <= 5 + 4 * 3  # 5 full blocks of the prompt once, and at most three of each beam


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6, 12])
def test_an_aborted_search_leaves_nothing_behind(folder: Path, engine: Engine, steps: int) -> None:
    small = make(folder, max_num_seqs=2, max_num_batched_tokens=8)  # the prompt takes three steps, then beams wait
    small.add_request(PROMPTS[1], BEAMS, "beams")
    small.add_request([5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True), "other")
    for _ in range(steps):
        small.step()
    small.abort("beams")
    small.check_integrity()
    last = run(small)
    if "other" in last:
        [alone] = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True))
        assert last["other"].token_ids == alone.token_ids


def test_a_search_ends_at_its_deadline_with_all_its_beams(engine: Engine) -> None:
    engine.add_request(PROMPTS[1], SamplingParams(max_tokens=40, beams=3, ignore_eos=True, max_seconds=1000), "late")
    for _ in range(3):
        engine.step()
    engine._state.deadlines = [(0.0, number, one) for _, number, one in engine._state.deadlines]
    [output] = engine.step()
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "its time was up")
    assert run(engine) == {}


def test_one_beam_that_is_no_number_fails_its_search_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine._runner.run

    def poisoned(chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> torch.Tensor:
        logits = forward(chunks, requests).clone()
        rows = [row for row, chunk in enumerate(chunks) if chunk.request_id.startswith("ill/")]
        logits[rows[:1], 17] = float("nan")
        return logits

    monkeypatch.setattr(engine._runner, "run", poisoned)
    engine.add_request(PROMPTS[1], BEAMS, "ill")
    engine.add_request(PROMPTS[0], BEAMS, "well")
    last = run(engine)
    assert "not finite" in str(last["ill"].error)
    assert len(last["well"].beams) == 4


def test_a_search_replays_to_the_same_plans(folder: Path, tmp_path: Path) -> None:
    engine = make(folder, max_num_seqs=3, kv_cache_memory_bytes=16 * 4 * 256)
    engine.record(tmp_path / "log")
    engine.add_request(PROMPTS[1], BEAMS)
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True), "first")
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True, seed=2, temperature=1), twin="first")
    run(engine)
    engine.close()
    assert replay(tmp_path / "log").difference is None


@pytest.mark.parametrize(
    "wrong", [{"top_k": 3}, {"seed": 1}, {"stop": ("x",)}, {"logprobs": 0}, {"temperature": 0.5}, {"min_tokens": 2}]
)
def test_what_has_no_meaning_for_beams_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingParams(beams=2, **wrong)
