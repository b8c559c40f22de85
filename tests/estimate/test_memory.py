"""Memory: golden values, the layouts, and what must never shrink when something grows."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.estimate.constants import VLLM
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.memory import (
    Layout,
    activation_bytes,
    budget,
    kv_block_bytes,
    kv_bytes_per_token,
    kv_sequence_bytes,
    weight_bytes,
)
from llmopt_cli.spec.catalog import find_gpu, find_model, models
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import SCHEMES, Scheme, find_scheme

MEASURED = Path(__file__).resolve().parents[2] / "../shared/data/estimates/published_measurements.csv"
INT4_G128 = Scheme("int4-g128", 4, 128, scale_bits=16, zero_bits=16)  # 4.25 bits
GOLDEN = [
    ("8b", "a100", 1, SCHEMES["bf16"], 14.96, 450_818),
    ("8b", "h100", 1, SCHEMES["bf16"], 14.96, 450_302),
    ("70b", "a100", 2, SCHEMES["bf16"], 65.71, 25_100),
    ("70b", "a100", 4, SCHEMES["bf16"], 32.85, 480_828),
    ("70b", "a100", 1, INT4_G128, 37.78, 105_534),
    ("70b", "h100", 4, SCHEMES["bf16"], 32.85, 480_002),
]
SPECS = st.sampled_from([entry.item for entry in models()])
LAYOUTS: tuple[Layout, ...] = ("engine", "llmopt")


@pytest.mark.parametrize(("model", "gpu", "tp", "scheme", "weights_gib", "kv_tokens"), GOLDEN)
def test_golden_budgets(model: str, gpu: str, tp: int, scheme: Scheme, weights_gib: float, kv_tokens: int) -> None:
    spec = find_model(model)
    memory = budget(Deployment(spec, find_gpu(gpu)[0], scheme, tp))
    assert memory.weights / GIB == pytest.approx(weights_gib, rel=0.01)
    assert memory.free / kv_bytes_per_token(spec, 2, tp=tp) == pytest.approx(kv_tokens, rel=0.01)


def test_bf16_weights_of_the_demo_are_the_bytes_of_its_file() -> None:
    checkpoint = Checkpoint.open("demo")
    assert weight_bytes(checkpoint.spec, find_scheme("bf16")) == checkpoint.nbytes


def test_quantization_leaves_embeddings_in_16_bits() -> None:
    spec = find_model("70b")
    others = spec.num_params - spec.linear_params
    assert weight_bytes(spec, find_scheme("int8")) == spec.linear_params + 2 * others
    assert weight_bytes(spec, find_scheme("fp32")) == 4 * spec.num_params


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gqa_keeps_keys_and_values_of_the_kv_heads(layout: Layout) -> None:
    assert kv_bytes_per_token(find_model("70b"), 2, layout) == 2 * 80 * 8 * 128 * 2
    assert kv_bytes_per_token(find_model("demo"), 4, layout) == 2 * 6 * 2 * 64 * 4


def test_latent_attention_is_kept_latent_by_engines_and_expanded_by_ours() -> None:
    spec = find_model("deepseek-v3")
    assert kv_bytes_per_token(spec, 2) == 61 * (512 + 64) * 2
    assert kv_bytes_per_token(spec, 2, "llmopt") == 61 * 128 * (192 + 128) * 2


def test_kv_heads_are_shared_out_but_never_below_one_and_a_latent_is_copied() -> None:
    seventy, deepseek = find_model("70b"), find_model("deepseek-v3")
    assert [kv_bytes_per_token(seventy, 2, tp=tp) for tp in (2, 8, 16)] == [163_840, 40_960, 40_960]
    assert kv_bytes_per_token(deepseek, 2, tp=8) == kv_bytes_per_token(deepseek, 2)


def test_linear_layers_cost_an_engine_nothing_and_our_runtime_as_much_as_the_others() -> None:
    spec = find_model("qwen3.5-27b")
    assert kv_bytes_per_token(spec, 2, "llmopt") == 4 * kv_bytes_per_token(spec, 2)


def test_sliding_layers_stop_growing_at_their_window() -> None:
    spec = find_model("gpt-oss-20b")
    assert (spec.sliding_window, spec.num_sliding_layers, spec.num_full_layers) == (128, 12, 12)
    a_layer = 2 * 8 * 64 * 2
    assert kv_sequence_bytes(spec, 100) == 24 * 100 * a_layer
    assert kv_sequence_bytes(spec, 1000) == 12 * (1000 + 128) * a_layer


@pytest.mark.parametrize("bytes_per_value", [1.0, 2.0, 4.0])
def test_a_block_is_its_tokens(bytes_per_value: float) -> None:
    spec = find_model("demo")
    assert kv_block_bytes(spec, 16, bytes_per_value) == 16 * kv_bytes_per_token(spec, bytes_per_value, "llmopt")


def test_a_kv_limit_caps_what_is_free() -> None:
    limited = Batching(kv_cache_memory_bytes=GIB)
    spec, (gpu, _) = find_model("8b"), find_gpu("a100")
    assert budget(Deployment(spec, gpu, find_scheme("bf16"), batching=limited)).free == GIB
    assert budget(Deployment(find_model("70b"), gpu, find_scheme("bf16"), batching=limited)).free < 0


def test_unchunked_prefill_outgrows_the_sampler() -> None:
    # vLLM's log for Qwen2.5-1.5B with 32k batched tokens on a T4: 2.02 GiB
    assert activation_bytes(find_model("qwen2.5-1.5b"), 256, 32768) / GIB == pytest.approx(2.02, rel=0.01)


def test_activations_and_kv_budgets_match_vllm_logs() -> None:
    if not MEASURED.is_file():
        pytest.skip(f"no {MEASURED}")
    rows = [row for row in csv.DictReader(MEASURED.read_text().splitlines()) if row["engine_version"] == "0.11 (V1)"]
    rows = [row for row in rows if row["weight_precision"] == "bf16" and row["scenario"] == "memory"]
    checked = 0
    for row in rows:
        memory = budget(
            Deployment(
                find_model(row["model"]), find_gpu("h100")[0], find_scheme("bf16"), batching=Batching(1024, 8192)
            )
        )
        expected = {"activation_peak_per_gpu": memory.activations, "kv_available_per_gpu": memory.free}
        if row["metric"] in expected:
            checked += 1
            assert expected[row["metric"]] / GIB == pytest.approx(float(row["value"]), rel=0.06), row
    assert checked >= 4


@settings(deadline=None)
@given(spec=SPECS, length=st.integers(1, 200_000), more=st.integers(0, 100_000), tp=st.sampled_from([1, 2, 4, 8]))
def test_longer_sequences_never_need_less(spec: ModelSpec, length: int, more: int, tp: int) -> None:
    assert kv_sequence_bytes(spec, length + more, tp=tp) >= kv_sequence_bytes(spec, length, tp=tp) > 0
    assert kv_sequence_bytes(spec, length, tp=tp) <= length * kv_bytes_per_token(spec, 2, tp=tp)


@settings(deadline=None)
@given(spec=SPECS, scheme=st.sampled_from(list(SCHEMES.values())), tp=st.sampled_from([1, 2, 4]))
def test_more_gpus_never_hold_more_each(spec: ModelSpec, scheme: Scheme, tp: int) -> None:
    gpu, _ = find_gpu("h100")
    few, many = (budget(Deployment(spec, gpu, scheme, count)) for count in (tp, 2 * tp))
    assert many.weights < few.weights
    assert many.activations <= few.activations
    assert kv_bytes_per_token(spec, 2, tp=2 * tp) <= kv_bytes_per_token(spec, 2, tp=tp)


@settings(deadline=None)
@given(spec=SPECS, seqs=st.integers(1, 2048), more=st.integers(0, 2048))
def test_more_requests_in_a_batch_never_leave_more_for_the_cache(spec: ModelSpec, seqs: int, more: int) -> None:
    gpu, _ = find_gpu("h100")
    few, many = (Batching(count, 4096) for count in (seqs, seqs + more))
    on = Deployment(spec, gpu, find_scheme("bf16"))
    assert budget(replace(on, batching=many)).free <= budget(replace(on, batching=few)).free


@settings(deadline=None)
@given(spec=SPECS)
def test_fewer_bits_never_weigh_more(spec: ModelSpec) -> None:
    covering = [scheme for scheme in SCHEMES.values() if scheme.covers == "linear"]
    by_bits = sorted(covering, key=lambda scheme: scheme.bits_per_weight)
    sizes = [weight_bytes(spec, scheme) for scheme in by_bits]
    assert sizes == sorted(sizes)


def test_every_constant_has_its_source() -> None:
    fields = type(VLLM).__dataclass_fields__
    assert len(fields) > 15
    assert all(len(field.metadata["source"]) > 8 for field in fields.values())
