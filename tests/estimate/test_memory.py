"""Memory: golden values, the layouts, and what must never shrink when something grows."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.estimate.constants import VLLM, find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.memory import (
    Budget,
    Layout,
    activation_bytes,
    budget,
    covered_params,
    kv_block_bytes,
    kv_bytes_per_token,
    kv_sequence_bytes,
    sequence_bytes,
    state_bytes,
    weight_bytes,
)
from llmopt_cli.estimate.pool import own_batching, static_fraction
from llmopt_cli.spec.catalog import find_gpu, find_model, models
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import SCHEMES, Scheme, find_kv_dtype, find_scheme

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


# What the logs of published_measurements.csv do not say themselves: model, usable GiB, GPUs, scheme, utilization and
# batching by the rows' model and version. Left out: multimodal models (their towers are profiled too), a V0 log with
# 1.8 to 3.6 GiB of other processes' memory in it, and capacities that another engine version's defaults decided.
UNTIED = replace(find_model("qwen2.5-1.5b"), tied_embeddings=False)  # a distilled Qwen, by the size of its weights
LOGS = {
    "gpt-oss-20b": (find_model("gpt-oss-20b"), 79.18, "mxfp4", 0.9, Batching(1024, 8192)),
    "gpt-oss-120b": (find_model("gpt-oss-120b"), 79.18, "mxfp4", 0.95, Batching(1024, 8192)),  # 0.9 would hold none
    "Llama-3.1-8B": (find_model("llama-3.1-8b"), 79.18, "bf16", 0.9, Batching(1024, 8192)),
    "Qwen3-0.6B": (find_model("qwen3-0.6b"), 79.18, "bf16", 0.9, Batching(1024, 8192)),
    "8B FP16 (14.9888 GB)": (find_model("llama-3.1-8b"), 79.14, "bf16", 0.9, Batching(256, 2048)),
    # The peak of 0.22 GiB is one FFN's over 2,048 tokens: sampling for 256 requests would take 1.19.
    "8B BF16 (14.9888 GB), 131072 ctx": (find_model("llama-3.1-8b"), 22.07, "bf16", 0.9, Batching(16, 2048)),
    "1.5B (3.09 GB ckpt)": (find_model("qwen2.5-1.5b"), 14.56, "bf16", 0.5, Batching(256, 32768)),
    "1.5B bnb-4bit": (UNTIED, 8.0, "nf4-nested", 0.5, Batching(256, 2048)),
}


def logged() -> list[dict[str, str]]:
    if not MEASURED.is_file():
        pytest.skip(f"no {MEASURED}")
    rows = csv.DictReader(MEASURED.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["scenario"] == "memory" and row["model"] in LOGS]


@pytest.mark.parametrize("metric", ["weights_per_gpu", "activation_peak_per_gpu", "kv_available_per_gpu"])
def test_budgets_are_those_of_vllm_logs(metric: str) -> None:
    rows = [row for row in logged() if row["metric"] == metric]
    assert len(rows) >= 4
    for row in rows:
        spec, gib, scheme, utilization, batching = LOGS[row["model"]]
        gpu = replace(find_gpu("h100")[0], memory_gib=gib)
        engine = replace(VLLM, memory_utilization=utilization)
        memory = budget(Deployment(spec, gpu, find_scheme(scheme), engine=engine, batching=batching))
        measured = float(row["value"])
        assert {
            "weights_per_gpu": memory.weights / GIB == pytest.approx(measured, rel=0.012),
            "activation_peak_per_gpu": memory.activations / GIB == pytest.approx(measured, rel=0.04),
            "kv_available_per_gpu": memory.free / GIB == pytest.approx(measured, abs=0.2),
        }[metric], row


def test_kv_capacities_of_vllm_logs_are_whole_bytes_a_token() -> None:
    assert kv_bytes_per_token(find_model("mistral-small-24b-instruct-2501"), 2) == 163_840  # 28.20 GiB, 184,832 tokens
    assert kv_bytes_per_token(find_model("llama-3.1-8b"), 2) * 158_656 == pytest.approx(19.37 * GIB, rel=1e-3)


def test_experts_of_gpt_oss_are_padded_by_vllm_and_not_by_llama_cpp() -> None:
    on = Deployment(find_model("gpt-oss-20b"), find_gpu("h100")[0], find_scheme("mxfp4"))
    spec, experts = on.spec, covered_params(on.spec, on.scheme) * on.scheme.bits_per_weight / 8
    plain = budget(replace(on, engine=find_engine("llamacpp"))).weights
    assert plain == weight_bytes(spec, on.scheme)
    assert budget(on).weights - plain == pytest.approx(experts * (3072 / 2880 - 1))


def test_sglang_reproduces_the_capacity_of_its_issue() -> None:
    # 4 x H100, Qwen3-235B-A22B-FP8, --mem-fraction-static 0.93: 367,404 tokens (vLLM issue 21348)
    on = Deployment(find_model("qwen3-235b-a22b"), find_gpu("h100")[0], find_scheme("fp8_block"), 4)
    memory = budget(replace(on, engine=find_engine("sglang")))
    free = on.hardware.memory_bytes * 0.93 - memory.weights - memory.non_torch
    assert free / kv_bytes_per_token(on.spec, 2, tp=4) == pytest.approx(367_404, rel=0.01)


def test_engines_divide_a_gpu_by_their_own_rules() -> None:
    on = Deployment(find_model("8b"), find_gpu("h100")[0], find_scheme("bf16"))
    total = on.hardware.memory_bytes
    free = {name: budget(replace(on, engine=find_engine(name))) for name in ("sglang", "trtllm", "llamacpp", "llmopt")}
    for memory in free.values():
        assert 0 < memory.free < total - memory.weights
    assert free["trtllm"].free == pytest.approx(0.9 * (total - sum(parts(free["trtllm"]))))
    assert free["llamacpp"].free == pytest.approx(total - GIB - sum(parts(free["llamacpp"])))
    assert static_fraction(on.hardware, 1) == pytest.approx(0.834, abs=0.001)  # what SGLang prints on an H100


def parts(memory: Budget) -> tuple[float, ...]:
    return memory.weights, memory.activations, memory.non_torch


@pytest.mark.parametrize(
    ("engine", "gpu", "seqs", "tokens"),
    [
        ("vllm", "a100", 256, 2048),
        ("vllm", "l40s", 256, 2048),
        ("vllm", "h100", 1024, 8192),
        ("vllm", "b200", 1024, 16384),
        ("sglang", "rtx 4090", 24, 2048),
        ("trtllm", "h100", 2048, 8192),
    ],
)
def test_what_engines_batch_untold(engine: str, gpu: str, seqs: int, tokens: int) -> None:
    found = own_batching(find_engine(engine), find_gpu(gpu)[0])
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (seqs, tokens)


@pytest.mark.parametrize(
    ("model", "scheme", "gib"),
    [  # sizes of published files
        ("llama-3-8b", "bf16", 14.96),
        ("llama-3-8b", "q8_0", 7.95),
        ("llama-3-8b", "q6_k", 6.14),
        ("llama-3-8b", "q5_k_m", 5.33),
        ("llama-3-8b", "q4_k_m", 4.58),
        ("llama-3-8b", "q4_0", 4.34),
        ("llama-3-8b", "q3_k_m", 3.74),
        ("llama-3-8b", "q2_k", 2.96),
        ("llama-3-70b", "q4_k_m", 39.59),
        ("llama-3-70b", "q3_k_m", 31.91),
        ("llama-2-7b", "q4_k_m", 3.80),
        ("tinyllama-1.1b", "q4_k_m", 0.623),
    ],
)
def test_sizes_of_published_files(model: str, scheme: str, gib: float) -> None:
    assert weight_bytes(find_model(model), find_scheme(scheme)) / GIB == pytest.approx(gib, rel=0.006)


@pytest.mark.parametrize(("scheme", "gib"), [("awq", 5.33), ("fp8", 8.46)])
def test_sizes_of_published_quantized_checkpoints(scheme: str, gib: float) -> None:
    # hugging-quants and RedHatAI: Llama-3.1-8B, embeddings and head in 16 bits
    assert weight_bytes(find_model("llama-3.1-8b"), find_scheme(scheme)) / GIB == pytest.approx(gib, rel=0.006)


def test_linear_layers_keep_a_state_as_large_after_a_token_as_after_many() -> None:
    spec = find_model("qwen3.5-27b")
    on = Deployment(spec, find_gpu("h100")[0], find_scheme("bf16"))
    per_block = 16 * kv_bytes_per_token(spec, 2)
    assert state_bytes(spec) == 48 * (48 * 128 * 128 * 4 + (2 * 16 + 48) * 128 * 3 * 2)
    assert sequence_bytes(on, 1) == per_block + state_bytes(spec)
    assert sequence_bytes(on, 16 * 100) == 100 * per_block + state_bytes(spec)


@pytest.mark.parametrize(("kv", "share"), [("fp8", 0.5), ("int8", 0.5 + 1 / 128), ("int4", 0.25 + 2 / 128)])
def test_small_kv_dtypes_count_their_scales(kv: str, share: float) -> None:
    on = Deployment(find_model("8b"), find_gpu("h100")[0], find_scheme("bf16"))  # heads of 128
    assert sequence_bytes(replace(on, kv=find_kv_dtype(kv)), 1600) == pytest.approx(share * sequence_bytes(on, 1600))


def test_our_runtime_keeps_every_token_of_every_layer() -> None:
    on = Deployment(find_model("gpt-oss-20b"), find_gpu("h100")[0], find_scheme("bf16"), engine=find_engine("llmopt"))
    blocks = kv_block_bytes(on.spec, on.batching.block_size, 2)
    assert sequence_bytes(on, 1601) == 101 * blocks


def test_the_fullest_stage_of_a_pipeline_holds_the_embeddings() -> None:
    on = Deployment(find_model("70b"), find_gpu("h100")[0], find_scheme("bf16"), pp=3)
    spec = on.spec
    layers = spec.num_params - spec.embedding_params
    assert budget(on).weights == pytest.approx(2 * (layers * 27 / 80 + spec.embedding_params / 2), rel=1e-6)


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
    # GGUF's mixes are apart: rows that are no multiple of 256 make q2_k larger than q4_0 (gpt-oss).
    covering = [scheme for scheme in SCHEMES.values() if scheme.covers == "linear"]
    by_bits = sorted(covering, key=lambda scheme: scheme.bits_per_weight)
    sizes = [weight_bytes(spec, scheme) for scheme in by_bits]
    assert sizes == sorted(sizes)


@settings(deadline=None)
@given(spec=SPECS, more=st.integers(1, 50), length=st.integers(1, 10_000))
def test_more_layers_never_need_less(spec: ModelSpec, more: int, length: int) -> None:
    deeper = replace(spec, num_layers=spec.num_layers + more)
    on = Deployment(spec, find_gpu("h100")[0], find_scheme("bf16"))
    assert budget(replace(on, spec=deeper)).weights > budget(on).weights
    assert sequence_bytes(replace(on, spec=deeper), length) > sequence_bytes(on, length)


@settings(deadline=None)
@given(
    spec=SPECS,
    scheme=st.sampled_from(list(SCHEMES.values())),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 8),
    length=st.integers(1, 50_000),
)
def test_sharding_never_loses_bytes(spec: ModelSpec, scheme: Scheme, tp: int, pp: int, length: int) -> None:
    whole = Deployment(spec, find_gpu("h100")[0], scheme)
    parts = whole.split(tp, pp)
    assert tp * pp * budget(parts).weights >= budget(whole).weights * (1 - 1e-9)
    assert tp * pp * sequence_bytes(parts, length) >= sequence_bytes(whole, length) * (1 - 1e-9)


@settings(deadline=None)
@given(spec=SPECS, length=st.integers(1, 50_000), layout=st.sampled_from(LAYOUTS), tp=st.sampled_from([1, 2, 4, 8]))
def test_a_cache_without_windows_is_its_tokens(spec: ModelSpec, length: int, layout: Layout, tp: int) -> None:
    plain = replace(spec, sliding_window=None, num_sliding_layers=0)
    tokens = length * kv_bytes_per_token(plain, 2, layout, tp)
    assert kv_sequence_bytes(plain, length, tp=tp, layout=layout) == tokens


def test_every_constant_has_its_source() -> None:
    fields = type(VLLM).__dataclass_fields__
    assert len(fields) > 15
    assert all(len(field.metadata["source"]) > 8 for field in fields.values())
