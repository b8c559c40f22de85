"""Limits as they are shown: JSON that names its units, and lines for people."""

from __future__ import annotations

import json

import pytest

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.limits import find_limits
from llmopt_cli.estimate.load import Load
from llmopt_cli.output import Output
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.views import limits as view

LIMITS = find_limits(
    Deployment(find_model("70b"), find_gpu("a100")[0], find_scheme("bf16"), 4), Load.fixed(32, 512, 512)
)


def test_json_holds_the_limits() -> None:
    data = json.loads(json.dumps(view.data(LIMITS), allow_nan=False))
    assert data["max_context_tokens"] == LIMITS.max_context
    assert data["max_batch_requests"] == LIMITS.max_batch
    assert data["fewest_gpus"]["awq"] == {"gpus": 1, "tp": 1, "pp": 1}
    assert data["largest_model"]["bf16"]


def test_people_read_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result(view.data(LIMITS), lambda: view.render(LIMITS))
    shown = capsys.readouterr().out
    assert f"{LIMITS.max_context:,} tokens for each of 32 requests" in shown
    assert f"{LIMITS.max_batch:,} requests of 1,024 tokens" in shown
    assert "A100-SXM4-80GB" in shown
