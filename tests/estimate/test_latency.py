"""Latency: golden values, published measurements, and what must never get faster when there is more to do."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import UnknownNameError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import DENSE_TPOT, DENSE_TTFT, EXPERTS_TPOT, StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.spec.catalog import find_gpu, find_model, gpus, models
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import SCHEMES, Scheme, find_scheme

MEASURED = Path(__file__).resolve().parents[2] / "../shared/data/estimates/published_measurements.csv"
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


def timed(spec: ModelSpec, gpu: Hardware, scheme: Scheme, tp: int = 1) -> StepModel:
    return StepModel(Deployment(spec, gpu, scheme, tp))


@pytest.mark.parametrize(("model", "gpu", "tp", "scheme", "batch", "inputs", "outputs", "prefill", "tpot"), GOLDEN)
def test_golden_times(
    model: str, gpu: str, tp: int, scheme: Scheme, batch: int, inputs: int, outputs: int, prefill: float, tpot: float
) -> None:
    step = timed(find_model(model), find_gpu(gpu)[0], scheme, tp)
    assert step.prefill(inputs) * 1e3 == pytest.approx(prefill, rel=0.01)
    assert step.tpot(Load.fixed(batch, inputs, outputs)) * 1e3 == pytest.approx(tpot, rel=0.01)


def measured(metric: str) -> list[dict[str, str]]:
    if not MEASURED.is_file():
        pytest.skip(f"no {MEASURED}")
    return [row for row in csv.DictReader(MEASURED.read_text().splitlines()) if row["metric"] == metric]


def serving_error(row: dict[str, str]) -> tuple[bool, float] | None:
    """(has experts, predicted / measured - 1) of one published serving run on one server, if it is in our words."""
    schemes = {"fp8": "fp8", "fp8_block": "fp8", "bf16/default": "bf16"}
    if row["weight_precision"] not in schemes or int(row["tp"]) > 8:
        return None
    try:
        spec, (gpu, _) = find_model(row["model"].replace("-FP8", "")), find_gpu(row["gpu"].replace("_sxm", ""))
    except UnknownNameError:
        return None
    step = timed(spec, gpu, find_scheme(schemes[row["weight_precision"]]), int(row["tp"]))
    load = Load.fixed(int(row["batch_or_concurrency"]), int(row["input_len"]), int(row["output_len"]))
    seconds = step.ttft(load) if row["metric"] == "ttft_ms" else step.tpot(load)
    return spec.experts is not None, seconds * 1e3 / float(row["value"]) - 1


def test_tpot_stays_within_its_bands_on_published_runs() -> None:
    errors = [error for row in measured("tpot_ms") if (error := serving_error(row))]
    dense = [abs(error) for has_experts, error in errors if not has_experts]
    experts = [abs(error) for has_experts, error in errors if has_experts]
    assert len(dense) >= 30
    assert len(experts) >= 50
    assert statistics.median(dense) < DENSE_TPOT.median_error
    assert statistics.median(experts) < EXPERTS_TPOT.median_error


def test_ttft_of_dense_models_under_vllm_stays_within_its_band() -> None:
    rows = [row for row in measured("ttft_ms") if row["engine"] == "vllm"]
    dense = [abs(error[1]) for row in rows if (error := serving_error(row)) and not error[0]]
    assert len(dense) == 12
    assert statistics.median(dense) == pytest.approx(DENSE_TTFT.median_error, abs=0.01)


def test_ttft_of_experts_is_as_far_off_as_the_note_says() -> None:
    errors = [error for row in measured("ttft_ms") if (error := serving_error(row)) and error[0]]
    assert len(errors) == 51
    assert statistics.median(error for _, error in errors) == pytest.approx(-0.6, abs=0.05)


def test_single_requests_on_a100_are_within_20_percent() -> None:
    rows = [row for row in measured("decode_tok_s") if row["engine"] == "gpt-fast" and "A100" in row["gpu"]]
    rows = [row for row in rows if row["weight_precision"] in ("bf16", "int8") and int(row["tp"]) <= 4]
    assert len(rows) >= 7
    for row in rows:
        step = timed(
            find_model(row["model"]), find_gpu("a100")[0], find_scheme(row["weight_precision"]), int(row["tp"])
        )
        assert 1 / step.decode(1, 100) == pytest.approx(float(row["value"]), rel=0.2), row


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
