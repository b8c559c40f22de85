"""Latency: golden values, the terms of the closed form, and what must never get faster when there is more to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.estimate.comm import all_reduce
from llmopt_cli.estimate.constants import ENGINES, REFERENCE, VLLM, Constants
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import model_draft
from llmopt_cli.estimate.latency import StepModel, expected_tokens
from llmopt_cli.estimate.load import Load
from llmopt_cli.spec.catalog import find_gpu, find_model, gpus, models
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import SCHEMES, Scheme

INT4_G128 = Scheme("int4-g128", 4, 128, scale_bits=16, zero_bits=16)  # 4.25 bits
BF16 = SCHEMES["bf16"]
# model, GPU, tp, scheme, batch, input, output, prefill ms, TPOT ms
GOLDEN = [
    ("8b", "a100", 1, BF16, 1, 1024, 256, 82.9, 10.39),
    ("8b", "a100", 1, BF16, 32, 1024, 256, 82.9, 23.47),
    ("8b", "h100", 1, BF16, 64, 1024, 1024, 28.0, 13.44),
    ("70b", "a100", 2, BF16, 1, 1024, 256, 407, 46.75),
    ("70b", "a100", 4, BF16, 1, 1024, 256, 222, 25.39),
    ("70b", "a100", 1, INT4_G128, 1, 1024, 256, 777, 39.95),
    ("70b", "h100", 4, BF16, 64, 1024, 1024, 82, 26.38),
]


def timed(spec: ModelSpec, gpu: Hardware, scheme: Scheme, tp: int = 1, engine: Constants = VLLM) -> StepModel:
    return StepModel(Deployment(spec, gpu, scheme, tp, engine=engine))


@pytest.mark.parametrize(("model", "gpu", "tp", "scheme", "batch", "inputs", "outputs", "prefill", "tpot"), GOLDEN)
def test_golden_times(
    model: str, gpu: str, tp: int, scheme: Scheme, batch: int, inputs: int, outputs: int, prefill: float, tpot: float
) -> None:
    step = timed(find_model(model), find_gpu(gpu)[0], scheme, tp, REFERENCE)
    assert step.prefill(inputs) * 1e3 == pytest.approx(prefill, rel=0.01)
    assert step.tpot(Load.fixed(batch, inputs, outputs)) * 1e3 == pytest.approx(tpot, rel=0.01)


SPECS = st.sampled_from([entry.item for entry in models()])
GPUS = st.sampled_from([entry.item for entry in gpus()])
SCHEME = st.sampled_from(list(SCHEMES.values()))


@settings(deadline=None)
@given(SPECS, GPUS, SCHEME, st.integers(1, 256), st.integers(0, 256), st.integers(1, 8192), st.integers(0, 8192))
def test_more_work_never_takes_less_time(
    spec: ModelSpec, gpu: Hardware, scheme: Scheme, batch: int, more: int, context: int, longer: int
) -> None:
    step = timed(spec, gpu, scheme)
    # A larger batch reads more cache, but its bigger tiles multiply more efficiently from 257 tokens on.
    if batch + more <= step.constants.decode_tokens:
        assert step.decode(batch + more, context) >= step.decode(batch, context)
    assert step.decode(batch, context + longer) >= step.decode(batch, context)


@settings(deadline=None)
@given(SPECS, GPUS, SCHEME, st.integers(257, 8192), st.integers(0, 8192))
def test_longer_prompts_never_prefill_faster(
    spec: ModelSpec, gpu: Hardware, scheme: Scheme, tokens: int, longer: int
) -> None:
    step = timed(spec, gpu, scheme)
    assert step.prefill(tokens + longer) >= step.prefill(tokens) > 0


@settings(deadline=None)
@given(SPECS, GPUS, SCHEME, st.integers(1, 512), st.integers(1, 4096))
def test_no_step_beats_the_roofline(spec: ModelSpec, gpu: Hardware, scheme: Scheme, batch: int, context: int) -> None:
    step = timed(spec, gpu, scheme)
    one_token = spec.num_active_params - spec.embedding_params
    assert step.decode(batch, context) > 2 * batch * one_token / max(
        gpu.flops("fp8"), gpu.flops("int8"), gpu.flops("fp4")
    )
    assert step.decode(batch, context) > one_token * scheme.bits_per_weight / 8 / gpu.bandwidth


@settings(deadline=None)
@given(SPECS, st.integers(1, 64), st.integers(1, 4096))
def test_gqa_reads_less_cache_than_as_many_kv_heads(spec: ModelSpec, batch: int, context: int) -> None:
    gpu, _ = find_gpu("h100")
    full = replace(spec, num_kv_heads=spec.num_heads)
    assert timed(full, gpu, BF16).decode(batch, context) >= timed(spec, gpu, BF16).decode(batch, context)


def test_prefill_attends_to_a_window_only() -> None:
    gpu, _ = find_gpu("h100")
    sliding = find_model("mistral-7b-v0.1")
    full = replace(sliding, sliding_window=None, num_sliding_layers=0)
    assert timed(sliding, gpu, BF16).prefill(4096) == timed(full, gpu, BF16).prefill(4096)
    assert timed(sliding, gpu, BF16).prefill(32768) < timed(full, gpu, BF16).prefill(32768)


def test_ttft_grows_with_the_queue_and_starts_at_dispatch() -> None:
    step = timed(find_model("8b"), find_gpu("h100")[0], BF16)
    assert step.ttft(Load.fixed(1, 1024, 1)) == step.constants.dispatch_s + step.prefill(1024)
    assert step.ttft(Load.fixed(64, 1024, 1)) > step.ttft(Load.fixed(8, 1024, 1)) > step.ttft(Load.fixed(1, 1024, 1))


def on_h100(model: str = "8b", **changes: object) -> StepModel:
    return StepModel(replace(Deployment(find_model(model), find_gpu("h100")[0], BF16), **changes))  # type: ignore[arg-type]


def test_requests_that_memory_does_not_hold_wait_for_a_place() -> None:
    step = on_h100("70b", tp=2)
    load = Load.fixed(16, 8192, 1024)
    places = step.running(load.at(10_000))
    assert step.running(load) == min(16, places)
    assert step.tpot(load.at(4 * places)) == step.tpot(load.at(places))
    waited = step.ttft(load.at(4 * places)) - step.ttft(load.at(places))
    assert waited == pytest.approx(3 * (step.ttft(load.at(places)) + 1024 * step.tpot(load.at(places))))


def test_what_does_not_fit_is_timed_as_if_it_did() -> None:
    assert on_h100("70b").running(Load.fixed(8, 1024, 256)) == 8


def test_a_hit_in_the_prefix_cache_is_not_computed_again() -> None:
    step, load = on_h100(), Load.fixed(1, 8192, 64)
    hit = replace(load, cached_share=0.75)
    assert step.mean_prefill(hit) == step.prefill(8192, 6144)
    assert step.prefill(2048) < step.mean_prefill(hit) < step.prefill(8192) / 2


def test_pipeline_stages_share_the_layers_and_cost_a_hop() -> None:
    one, two = on_h100(), on_h100(pp=2)
    assert two.step(8, 1024) > one.step(8, 1024)
    assert two.decode(16, 1024) == two.step(8, 1024)
    assert one.prefill(65536) / 2 < two.prefill(65536) < one.prefill(65536)


def test_speculation_divides_a_round_by_the_tokens_it_yields() -> None:
    draft = model_draft(find_model("llama-3.2-1b"), tokens=4, acceptance=0.8)
    plain, drafted = on_h100("70b", tp=4), on_h100("70b", tp=4, draft=draft)
    assert expected_tokens(0.8, 4) == pytest.approx(sum(0.8**place for place in range(5)))
    assert drafted.decode(1, 512) < plain.decode(1, 512)
    assert drafted.decode(256, 512) > plain.decode(256, 512)  # verifying five tokens a request is no longer free
    assert on_h100("70b", tp=4, draft=replace(draft, acceptance=0.0)).decode(1, 512) > plain.decode(1, 512)


def test_experts_touched_grow_with_the_batch_up_to_all_of_them() -> None:
    step, dense = on_h100("qwen3-30b-a3b"), on_h100("qwen3-32b")
    assert step.decode(1, 128) < dense.decode(1, 128) / 3
    assert step.decode(128, 128) > 4 * step.decode(1, 128)


def test_latent_attention_multiplies_in_the_latent_space() -> None:
    step = on_h100("deepseek-v3", tp=8, scheme=SCHEMES["fp8_block"])
    spec, h100 = step.spec, step.hardware
    assert spec.latent
    work = 2 * spec.num_heads / 8 * (2 * spec.latent.kv_rank + spec.latent.rope_dim) * spec.num_layers
    per_token = (step.decode(64, 8192) - step.decode(64, 4096)) / (64 * 4096)
    assert per_token >= work / (h100.flops() * step.constants.attention_compute_efficiency) * 0.999


def test_data_parallel_attention_copies_attention_and_shares_out_requests() -> None:
    shared, copied = on_h100("deepseek-v3", tp=8), on_h100("deepseek-v3", tp=8, attention_dp=8)
    assert copied.decode(8, 128) > shared.decode(8, 128)  # every GPU reads all of attention for one request
    assert copied.decode(512, 16384) < shared.decode(512, 16384)  # but only its own requests' cache


def test_all_reduces_collapse_over_pcie_and_not_over_nvlink() -> None:
    rates = {
        name: [all_reduce(find_gpu(name)[0], n, 0.7).rate for n in (2, 4, 8)] for name in ("l40s", "h100", "rtx 4090")
    }
    assert rates["l40s"][1] < rates["l40s"][0] / 2
    assert rates["rtx 4090"] == rates["l40s"]
    assert rates["h100"][2] > rates["h100"][0] / 2


def test_an_override_holds_on_its_gpu_alone() -> None:
    llamacpp, (a100, _), (rtx, _) = ENGINES["llamacpp"], find_gpu("a100"), find_gpu("rtx 3090")
    assert llamacpp.on(a100).memory_efficiency < llamacpp.on(rtx).memory_efficiency < llamacpp.memory_efficiency
    assert llamacpp.on(a100).on(rtx) == llamacpp.on(a100)


def test_every_engine_is_a_row_of_constants_that_exist_each_with_its_source() -> None:
    for engine in ENGINES.values():
        for override in engine.overrides:
            assert hasattr(engine, override.name)
            assert override.source
            assert override.value >= 0
