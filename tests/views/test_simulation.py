"""How a simulation looks: JSON whose keys name their units, and the same figures for people."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.simulate import Simulation, simulate
from llmopt_cli.output import Output
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.workload import Slo, Workload
from llmopt_cli.views import simulation as view


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    on = Deployment(find_model("llama-3.1-8b"), find_gpu("h100")[0], find_scheme("bf16"))
    workload = replace(Workload.read("rag"), num_requests=60, slo=Slo(ttft_ms=90, tpot_ms=50, share=0.99))
    return simulate(on, workload, replicas=2, usd_per_hour=3.0)


def test_json_holds_every_figure(simulation: Simulation) -> None:
    data = json.loads(json.dumps(view.data(simulation), allow_nan=False))
    assert data["completed"] == 60
    assert data["gpus"] == 2
    assert set(data["ttft_s"]) == {"mean", "p50", "p90", "p99"}
    assert data["requests_per_s"] == pytest.approx(60 / data["duration_s"])
    assert data["goodput_requests_per_s"] == pytest.approx(data["requests_per_s"] * data["slo_attainment"])
    assert data["slo_met"] is False
    assert data["usd_per_1k_good_output_tokens"] > 0


def test_people_see_latencies_goodput_and_strain(simulation: Simulation, capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).result(view.data(simulation), lambda: view.render(simulation))
    shown = capsys.readouterr().out
    for part in (
        *("Llama-3.1-8B in bf16", "2 replicas", "TTFT, ms", "TPOT, ms", "E2E, ms", "p99"),
        *("TTFT 90 ms, TPOT 50 ms", "99% wanted: not met", "per 1K good output tokens, $6.00/h", "preemptions"),
    ):
        assert part in shown
    assert "refused" not in shown
