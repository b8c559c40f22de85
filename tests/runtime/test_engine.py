"""The engine's contracts: greedy output equals transformers' `generate` in float32, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CapacityError, ModelError, UnknownNameError, UsageError
from llmopt_cli.runtime import Engine, FinishReason, SamplingParams
from llmopt_cli.runtime.request import Request, RequestOutput
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
LENGTHS = (1, 2, 7, 8, 9, 31, 64, 100)


def prompts_of(lengths: tuple[int, ...], vocabulary: int = 4096) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(7, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def reference(folder: str | Path, prompts: list[list[int]], max_tokens: int, device: str) -> list[list[int]]:
    """What transformers' greedy `generate` gives for each prompt alone, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=6
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture
def demo(device: str) -> Iterator[Engine]:
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=Batching(max_num_seqs=8))
    yield engine
    engine.check_integrity()
    engine.close()


def test_greedy_equals_generate_alone_and_in_a_batch(demo: Engine) -> None:
    prompts = prompts_of(LENGTHS)
    expected = reference(demo.checkpoint.path, prompts, 24, str(demo.device))
    together = [list(output.token_ids) for output in demo.generate(prompts, GREEDY)]
    alone = [list(demo.generate([prompt], GREEDY)[0].token_ids) for prompt in prompts]
    assert together == expected
    assert alone == expected


@pytest.mark.parametrize("block_size", [5, 16])
@pytest.mark.parametrize("budget", [8, 33])
def test_greedy_equals_generate_with_chunked_prefill_and_scattered_pages(
    device: str, block_size: int, budget: int
) -> None:
    batching = Batching(max_num_seqs=6, max_num_batched_tokens=budget, block_size=block_size)
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=batching)
    engine.generate(prompts_of((40, 3, 21, 60)), SamplingParams(max_tokens=5))  # leaves the free list out of order
    prompts = prompts_of(LENGTHS)
    found = [list(output.token_ids) for output in engine.generate(prompts, GREEDY)]
    assert found == reference(engine.checkpoint.path, prompts, 24, device)
    engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0


def test_greedy_equals_generate_when_requests_are_preempted(device: str) -> None:
    batching = Batching(max_num_seqs=8, block_size=4, max_model_len=160, kv_cache_memory_bytes=48 * 4 * 6144)
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=batching)
    prompts = prompts_of((30, 41, 25, 33, 52, 18))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    found = [list(output.token_ids) for output in engine.generate(prompts, params)]
    assert found == reference(engine.checkpoint.path, prompts, 60, device)
    assert engine.stats().num_preemptions > 0
    engine.check_integrity()


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("budget", [8, 64])
def test_greedy_equals_generate_when_prefixes_are_found_in_the_cache(device: str, block_size: int, budget: int) -> None:
    batching = Batching(max_num_seqs=4, max_num_batched_tokens=budget, block_size=block_size)
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=batching)
    [head, *tails] = prompts_of((37, 1, 5, 40))
    prompts = [head + tail for tail in tails] + [head]
    expected = reference(engine.checkpoint.path, prompts, 24, device)
    for _ in range(2):  # the second time, all prompts and their answers have been seen
        outputs = engine.generate(prompts, GREEDY)
        assert [list(output.token_ids) for output in outputs] == expected
        engine.check_integrity()
    cached = [(len(prompt) - 1) // block_size * block_size for prompt in prompts]
    assert [output.num_cached_tokens for output in outputs] == cached
    assert {output.cache_miss for output in outputs} == {None}
    assert engine.stats().prefix_cache_hits >= sum(cached)
    longer = head + list(outputs[-1].token_ids)  # the next turn of a conversation
    [turn] = engine.generate([longer], GREEDY)
    assert turn.num_cached_tokens == (len(longer) - 1) // block_size * block_size
    assert list(turn.token_ids) == reference(engine.checkpoint.path, [longer], 24, device)[0]


def test_a_miss_has_its_reason(device: str) -> None:
    batching = Batching(max_num_seqs=1, block_size=4, max_model_len=64, kv_cache_memory_bytes=16 * 4 * 6144)
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=batching)
    once = SamplingParams(max_tokens=1)

    def ask(ids: list[int], params: SamplingParams = once) -> tuple[int, str | None]:
        [output] = engine.generate([ids], params)
        return output.num_cached_tokens, output.cache_miss

    one, other = prompts_of((20, 60))
    assert ask(one) == (0, "not seen before")
    assert ask(one) == (16, None)
    assert ask(one, replace(once, cache_salt="mine")) == (0, "not seen before")
    assert ask(one[:3]) == (0, "shorter than a block")
    assert ask(other) == (0, "not seen before")
    assert ask(one) == (0, "evicted")
    engine.reset_prefix_cache()
    assert ask(one) == (0, "not seen before")
    engine.check_integrity()


def test_without_prefix_caching_nothing_is_found(device: str) -> None:
    batching = Batching(max_num_seqs=2, enable_prefix_caching=False)
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, batching=batching)
    [prompt] = prompts_of((50,))
    engine.generate([prompt], GREEDY)
    [output] = engine.generate([prompt], GREEDY)
    assert (output.num_cached_tokens, output.cache_miss) == (0, "prefix caching is off")
    assert engine.stats().prefix_cache_queries == 0


def test_a_step_that_fails_leaves_nothing_half_computed(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    [prompt] = prompts_of((50,))
    with monkeypatch.context() as patch:
        patch.setattr(demo._runner, "run", explode)
        with pytest.raises(RuntimeError, match="out of luck"):
            demo.generate([prompt], GREEDY)
    assert not demo.has_work()
    [output] = demo.generate([prompt], GREEDY)
    assert output.num_cached_tokens == 0
    assert list(output.token_ids) == reference(demo.checkpoint.path, [prompt], 24, str(demo.device))[0]


def test_logprobs_are_the_models_own_whatever_was_done_to_its_logits(demo: Engine) -> None:
    prompts = prompts_of((9, 300))
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2, repetition_penalty=1.5)
    outputs = demo.generate(prompts, params)
    model = AutoModelForCausalLM.from_pretrained(demo.checkpoint.path, dtype=torch.float32).to(demo.device).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([ids], device=demo.device)).logits[0].log_softmax(-1).cpu()
        assert output.prompt_logprobs is not None
        for position, found in enumerate((*output.prompt_logprobs, *output.logprobs)):
            row = expected[position]
            assert found.token == ids[position + 1]
            assert found.logprob == pytest.approx(float(row[found.token]), abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(
                row.topk(len(found.top)).values.tolist(), abs=1e-4
            )
        assert [len(found.top) for found in output.logprobs] == [3] * 6
        assert len(output.prompt_logprobs) == len(prompt) - 1
        assert output.cache_miss == "prompt logprobs were asked for"


def test_penalties_change_the_answer_and_min_tokens_keeps_it_going(demo: Engine) -> None:
    [prompt] = prompts_of((40,))
    plain = demo.generate([prompt], GREEDY)[0].token_ids
    bias = ((plain[0], -100.0),)
    [other] = demo.generate([prompt], replace(GREEDY, logit_bias=bias))
    assert plain[0] not in other.token_ids
    [stopped] = demo.generate([prompt], SamplingParams(max_tokens=20, stop_token_ids=plain[:1]))
    assert len(stopped.token_ids) == 1
    [longer] = demo.generate([prompt], SamplingParams(max_tokens=20, stop_token_ids=plain[:1], min_tokens=5))
    assert len(longer.token_ids) >= 5
    assert plain[0] not in longer.token_ids[:5]


def test_logits_that_are_no_numbers_end_their_request_alone(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo._runner.run

    def poisoned(chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> torch.Tensor:
        logits = run(chunks, requests).clone()
        rows = [chunk.request_id for chunk in chunks if chunk.samples]
        if "ill" in rows and len(requests["ill"].token_ids) > 12:
            logits[rows.index("ill"), 17] = float("nan")
        return logits

    monkeypatch.setattr(demo._runner, "run", poisoned)
    one, other = prompts_of((10, 12))
    demo.add_request(one, GREEDY, "ill")
    demo.add_request(other, GREEDY, "well")
    last: dict[str, RequestOutput] = {}
    while demo.has_work():
        last |= {output.request_id: output for output in demo.step()}
    assert (last["ill"].finish_reason, len(last["ill"].token_ids)) == (FinishReason.ERROR, 3)
    assert "not finite" in str(last["ill"].error)
    assert list(last["well"].token_ids) == reference(demo.checkpoint.path, [other], 24, str(demo.device))[0]


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
    ("Mistral", {"sliding_window": 12, "head_dim": 16}),
    ("Phi3", {}),
    ("Olmo2", {}),
    ("Mixtral", {"num_local_experts": 4}),
    ("GPTNeoX", {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_greedy_equals_generate_for_every_family(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any], device: str
) -> None:
    folder = tiny(family, **changes)
    batching = Batching(max_num_seqs=4, max_num_batched_tokens=16, block_size=8)
    engine = Engine.from_pretrained(folder, dtype="float32", device=device, batching=batching)
    prompts = prompts_of((1, 5, 17, 40))
    found = [list(output.token_ids) for output in engine.generate(prompts, GREEDY)]
    assert found == reference(folder, prompts, 24, device)


@pytest.mark.parametrize(("kv_cache_dtype", "head_bytes"), [("auto", 64 * 4), ("int8", 64 + 4), ("fp8_e5m2", 64 + 4)])
def test_the_cache_has_exactly_the_bytes_of_the_estimate(kv_cache_dtype: str, head_bytes: int, device: str) -> None:
    engine = Engine.from_pretrained(
        "demo", dtype="float32", device=device, kv_cache_dtype=kv_cache_dtype, batching=Batching(max_num_seqs=2)
    )
    allocated = sum(t.nbytes for layer in engine._layers for t in (layer.k, layer.v) if t is not None)
    spec = engine.checkpoint.spec
    tokens = engine.startup_report()["kv_cache_tokens"]
    assert allocated == tokens * 2 * spec.num_layers * spec.num_kv_heads * head_bytes
    assert allocated == engine.startup_report()["kv_cache_bytes"]


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_a_quantized_cache_says_nearly_the_same(kv_cache_dtype: str, device: str) -> None:
    engine = Engine.from_pretrained("demo", dtype="float32", device=device, kv_cache_dtype=kv_cache_dtype)
    prompts = prompts_of((60, 33, 100))
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = engine.generate(prompts, scored)
    model = AutoModelForCausalLM.from_pretrained(engine.checkpoint.path, dtype=torch.float32).to(device).eval()
    differences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt], device=device)).logits[0].log_softmax(-1).cpu()
        found = output.prompt_logprobs or ()
        differences += [abs(one.logprob - float(expected[i, one.token])) for i, one in enumerate(found)]
    assert sum(differences) / len(differences) < {"int8": 0.02, "fp8_e4m3": 0.08, "fp8_e5m2": 0.15}[kv_cache_dtype]
    again = engine.generate(prompts, scored)
    assert [one.prompt_logprobs for one in again] == [one.prompt_logprobs for one in outputs]


def test_an_unknown_cache_dtype_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(UnknownNameError, match="unknown KV cache dtype `int3`"):
        Engine.from_pretrained("demo", kv_cache_dtype="int3")


def test_seeded_draws_do_not_depend_on_neighbours(demo: Engine) -> None:
    prompts = prompts_of((9, 20, 33))
    mixed = [
        SamplingParams(max_tokens=16, temperature=0.9, seed=5),
        SamplingParams(max_tokens=16, temperature=1.3, seed=6, top_p=0.8, top_k=50),
        SamplingParams(max_tokens=16),
    ]
    together = demo.generate(prompts, mixed)
    alone = [demo.generate([prompt], params)[0] for prompt, params in zip(prompts, mixed, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_draws_without_a_seed_differ(demo: Engine) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.5)
    first, second = demo.generate([[20, 30]] * 2, params)
    assert first.token_ids != second.token_ids


def test_end_of_text_ends_a_request_unless_ignored(demo: Engine) -> None:
    [prompt] = prompts_of((12,))
    [free] = demo.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
    stop = free.token_ids[3]
    where = free.token_ids.index(stop)
    [output] = demo.generate([prompt], SamplingParams(max_tokens=8, stop_token_ids=(stop,), ignore_eos=True))
    assert output.token_ids == free.token_ids[: where + 1]
    assert output.finish_reason == FinishReason.STOP
    assert (
        output.text
        == demo.tokenizer.decode(prompt + list(free.token_ids[:where]))[len(demo.tokenizer.decode(prompt)) :]
    )
    assert demo.tokenizer.eos_ids == {1, 5}


def test_stop_string_ends_the_text_before_itself(demo: Engine) -> None:
    prompt = demo.tokenizer.encode("It was the best of")
    [free] = demo.generate([prompt], SamplingParams(max_tokens=40))
    stop = free.text[9:13]
    [output] = demo.generate([prompt], SamplingParams(max_tokens=40, stop=("never there", stop)))
    assert output.text == free.text[: free.text.index(stop)]
    assert output.finish_reason == FinishReason.STOP


def test_context_limit_ends_a_request(tiny: Callable[..., Path]) -> None:
    engine = Engine.from_pretrained(tiny("Llama"), device="cpu", batching=Batching(max_num_seqs=2, max_model_len=20))
    [output] = engine.generate(prompts_of((15,)), SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (5, FinishReason.LENGTH)


def test_requests_that_can_never_run_are_refused(demo: Engine) -> None:
    with pytest.raises(CapacityError, match=r"2,048 tokens and the context is 2,048"):
        demo.generate([[5] * 2048])
    with pytest.raises(UsageError, match="no tokens"):
        demo.generate([[]])
    with pytest.raises(UsageError, match="4096 is outside"):
        demo.generate([[4096]])
    assert not demo.has_work()


def test_cache_smaller_than_one_request_is_refused_with_the_way_out() -> None:
    with pytest.raises(CapacityError, match="KV cache would hold") as caught:
        Engine.from_pretrained("demo", batching=Batching(kv_cache_memory_bytes=2**20))
    assert str(caught.value.hint).startswith("`--kv-cache-memory-bytes 6291456` is enough; `--max-model-len 336` saves")


def test_a_cache_of_no_blocks_is_refused_without_a_context_of_none() -> None:
    with pytest.raises(CapacityError, match="would hold 0 tokens") as caught:
        Engine.from_pretrained("demo", batching=Batching(kv_cache_memory_bytes=100))
    assert "--max-model-len" not in str(caught.value.hint)


def test_a_cache_beyond_the_machine_is_refused() -> None:
    with pytest.raises(CapacityError, match="left for the KV cache"):
        Engine.from_pretrained("demo", device="cpu", batching=Batching(kv_cache_memory_bytes=2**60))


def test_abort_frees_blocks_in_every_state(demo: Engine) -> None:
    ids = [demo.add_request(prompt, GREEDY) for prompt in prompts_of(tuple([30] * 12))]  # 8 run, 4 wait
    demo.step()
    assert (demo.stats().num_running, demo.stats().num_waiting) == (8, 4)
    for request_id in (*ids, "unknown"):
        demo.abort(request_id)
        demo.check_integrity()
    assert demo.stats().kv_cache_usage == 0
    assert not demo.has_work()
    assert demo.step() == []


def test_checkpoint_objects_are_taken_as_they_are(tiny: Callable[..., Path]) -> None:
    engine = Engine.from_pretrained(Checkpoint.open(tiny("Llama")), device="cpu")
    assert engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3))[0].num_prompt_tokens == 3


def test_generate_leaves_other_requests_alone(demo: Engine) -> None:
    [prompt] = prompts_of((9,))
    [expected] = demo.generate([prompt], GREEDY)
    other = demo.add_request([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    assert demo.generate([prompt], GREEDY)[0].token_ids == expected.token_ids
    assert demo.has_work()
    demo.abort(other)


def test_an_interrupted_generate_leaves_nothing_behind(demo: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.generate(prompts_of((9, 20)), GREEDY, report=interrupt)
    assert not demo.has_work()
    assert demo.stats().kv_cache_usage == 0


def test_a_generate_interrupted_while_it_adds_leaves_nothing_behind(
    demo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = demo.add_request

    def interrupt(prompt_ids: list[int], params: SamplingParams) -> str:
        if demo.has_work():
            raise KeyboardInterrupt
        return add(prompt_ids, params)

    monkeypatch.setattr(demo, "add_request", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.generate(prompts_of((9, 20)), GREEDY)
    assert not demo.has_work()


def test_a_context_beyond_the_models_is_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="limit of 256 tokens"):
        Engine.from_pretrained(tiny("Llama"), device="cpu", batching=Batching(max_model_len=257))


def test_layers_of_other_shapes_than_the_config_are_refused(tiny: Callable[..., Path]) -> None:
    folder = tiny("GPTNeoX", num_key_value_heads=2)  # a key that this architecture ignores
    with pytest.raises(ModelError, match="several shapes"):  # found before anything is allocated
        Engine.from_pretrained(folder, device="cpu")
