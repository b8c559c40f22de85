"""What a bench is expected to show: the closed forms on exactly what will be sent, in the precision that runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt_cli.errors import LlmoptError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.host import Machine
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.predict import bound, deployment, expect, load_of, stored_scheme
from llmopt_cli.spec.checkpoint import BUNDLED
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.recipe import Batching, Recipe
from llmopt_cli.spec.result import Environment
from llmopt_cli.spec.workload import Workload

HERE = Machine("a CPU", 4, 2, None, "2026-01-02", 8 * GIB, 20.0, {"float32": 0.1, "bfloat16": 0.25})
ENVIRONMENT = Environment("2026-01-03", "Linux", HERE.cpu, HERE.cores, HERE.threads, 8 * GIB, 0.1, {})
CHAT = Workload.read("chat")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CONFIG_DIR", str(tmp_path / "own"))
    host.keep(HERE)


def test_a_prediction_is_the_closed_form_on_what_will_be_sent() -> None:
    found = expect(Recipe(), CHAT, ENVIRONMENT)
    on = deployment(Recipe(), ENVIRONMENT)
    step, load = StepModel(on), load_of(CHAT, on)
    assert [tuple(size) for size in load.sizes] == [tuple(size) for size in CHAT.sizes(2048)[0]]
    assert (found.ttft, found.tpot) == (step.ttft(load), step.tpot(load))
    seconds = found.ttft + found.tpot * (load.output_len - 1)
    assert found.output_throughput == pytest.approx(8 * load.output_len / seconds)  # Little's law
    assert "not calibrated" in found.basis
    assert found.record()["mean_tpot_ms"] == 1e3 * found.tpot


def test_prompts_are_clipped_to_the_engines_context() -> None:
    on = deployment(Recipe(batching=Batching(max_model_len=256)), ENVIRONMENT)
    assert load_of(CHAT, on).longest <= 256 < load_of(CHAT, deployment(Recipe(), ENVIRONMENT)).longest


def test_an_open_loop_is_as_many_requests_as_its_rate_keeps_busy() -> None:
    slow, fast = (expect(Recipe(), CHAT.with_load(rate=rate), ENVIRONMENT) for rate in (0.5, 8))
    assert fast.output_throughput == 16 * slow.output_throughput  # all of it, as long as it keeps up
    assert slow.tpot < fast.tpot
    with pytest.raises(LlmoptError, match="more than it can keep up with"):
        expect(Recipe(), CHAT.with_load(rate=1e6), ENVIRONMENT)


def test_float32_is_computed_at_its_own_rate_with_a_cache_as_wide() -> None:
    narrow, wide = (deployment(Recipe(dtype=dtype), ENVIRONMENT) for dtype in ("auto", "float32"))
    assert (narrow.hardware.flops(), wide.hardware.flops()) == (0.25e12, 0.1e12)
    assert wide.kv_bytes == 2 * narrow.kv_bytes


@pytest.mark.parametrize(
    ("config", "dtype", "scheme"),
    [
        ({"dtype": "float32"}, "auto", "fp32"),
        ({"torch_dtype": "float16"}, "auto", "bf16"),
        ({"dtype": "float32"}, "bfloat16", "bf16"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "auto", "awq"),
    ],
)
def test_the_precision_is_that_of_the_stored_weights(
    tmp_path: Path, config: dict[str, object], dtype: str, scheme: str
) -> None:
    plain = {key: value for key, value in demo_config().items() if not key.endswith("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(plain | config))
    recipe = Recipe(model=str(tmp_path), dtype=dtype)
    assert stored_scheme(recipe).name == scheme
    assert expect(recipe, CHAT, ENVIRONMENT).tpot > 0


@pytest.mark.parametrize("quantized", [{"quant_method": "warp"}, {"quant_method": "gptq", "bits": 8}])
def test_a_precision_without_closed_form_is_not_guessed(tmp_path: Path, quantized: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(demo_config() | {"quantization_config": quantized}))
    with pytest.raises(LlmoptError):
        expect(Recipe(model=str(tmp_path)), CHAT, ENVIRONMENT)


def demo_config() -> dict[str, object]:
    config: dict[str, object] = json.loads((BUNDLED["demo"] / "config.json").read_text())
    return config


def test_the_bound_is_the_largest_part_of_a_token() -> None:
    on = deployment(Recipe(), ENVIRONMENT)
    load = load_of(Workload.read("decode").with_load(concurrency=1), on)
    rates = {"overhead": (9e9, 9e9), "memory": (1e-3, 9e9), "compute": (9e9, 1e-6)}
    for part, (bandwidth, tflops) in rates.items():
        hardware = replace(on.hardware, bandwidth_gb_s=bandwidth, bf16_tflops=tflops)
        assert bound(replace(on, hardware=hardware), load) == part
