"""Validation: published rows become deployments, every row is counted once, and the stated errors and bands hold."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate import bands, fit
from llmopt_cli.estimate.constants import ENGINES, build_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.published import COLUMNS, Skipped, resolve, resolved
from llmopt_cli.estimate.validate import Outcome, Validation, predict, validate
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.scheme import SCHEMES
from llmopt_cli.views import validation as view

MEASURED = Path(__file__).resolve().parents[2] / "../shared/data/estimates/published_measurements.csv"
ROW = dict.fromkeys(COLUMNS, "") | {
    "id": "1",
    "engine": "vllm",
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "gpu": "h100_sxm",
    "gpu_count": "1",
    "tp": "1",
    "pp": "1",
    "weight_precision": "bf16/default",
    "scenario": "online_closed_loop",
    "batch_or_concurrency": "16",
    "input_len": "1024",
    "output_len": "256",
    "metric": "tpot_ms",
    "value": "9.5",
    "unit": "ms",
}


def row(**cells: str) -> dict[str, str]:
    return {**ROW, **cells}


def written(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def replayed() -> Validation:
    if not MEASURED.is_file():
        pytest.skip(f"no {MEASURED}")
    return validate(MEASURED)


def test_a_serving_run_is_a_deployment_under_a_load() -> None:
    case = resolve(row())
    assert (case.on.spec.name, case.on.hardware.name, case.on.engine.name) == ("Llama-3.1-8B", "H100-SXM5-80GB", "vllm")
    assert (case.load.concurrency, case.load.input_len, case.load.output_len) == (16, 1024, 256)
    assert (case.kind, case.figure, case.value) == ("dense", "tpot_ms", 9.5)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("h100_sxm", "H100-SXM5-80GB"),
        ("A100-SXM-80GB (330W cap)", "A100-SXM4-80GB"),
        ("A100_PCIe", "A100-PCIE-80GB"),
        ("H100_PCIe", "H100-PCIe-80GB"),
        ("GH200-120GB", "GH200-96GB"),
        ("M2ultra_192GB", "Apple M2 Ultra 76c"),
        ("M1max_64GB", "Apple M1 Max 32c"),
        ("M1_8GB", "Apple M1 7c"),
        ("RTX PRO 6000 Server", "RTX PRO 6000 Blackwell Server"),
        ("4000_Ada", "RTX 4000 Ada"),
        ("4070Ti", "RTX 4070 Ti"),
        ("4080", "RTX 4080"),
        ("3080", "RTX 3080"),
        ("80GB GPU (79.14 GiB)", "A100-SXM4-80GB"),
        ("A6000", "RTX A6000"),
    ],
)
def test_cards_go_by_many_names(label: str, name: str) -> None:
    assert resolve(row(gpu=label)).on.hardware.name == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("LLaMA v3 70B", "Llama-3-70B"),
        ("Llama 3.1 405B", "Llama-3.1-405B"),
        ("nvidia/DeepSeek-V3.1-NVFP4", "DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Llama-3.1-70B"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B"),
        ("Mistral 7B", "Mistral-7B-v0.1"),
        ("Mixtral 8x7B", "Mixtral-8x7B-v0.1"),
        ("moonshotai/Kimi-K2.5", "Kimi-K2.5"),
        ("zhipuai/GLM-5", "GLM-5"),
    ],
)
def test_models_go_by_many_names(label: str, name: str) -> None:
    assert resolve(row(model=label)).on.spec.name == name


def test_precisions_are_those_of_the_model() -> None:
    def scheme(**cells: str) -> str:
        return resolve(row(**cells)).on.scheme.name

    assert scheme(weight_precision="Q4_K - Medium") == "q4_k_m"
    assert scheme(weight_precision="fp16(mixed)") == "bf16"
    assert scheme(weight_precision="fp8", model="deepseek-ai/DeepSeek-R1") == "fp8_block"
    assert scheme(weight_precision="fp4", model="openai/gpt-oss-120b") == "mxfp4"
    assert resolve(row(weight_precision="EXL2-2.5bpw")).on.scheme.bits_per_weight == 2.5
    assert resolve(row(weight_precision="int4-g32")).on.scheme.bits_per_weight == 5.0


def test_layouts_are_read_from_columns_notes_and_the_name_of_a_run() -> None:
    def layout(**cells: str) -> tuple[int, int, int, int]:
        case = resolve(row(**cells))
        return case.on.tp, case.on.pp, case.on.attention_dp, case.load.concurrency

    assert layout(tp="8", source="x_4000x1000_c96_tp8_epnone_4", batch_or_concurrency="12") == (8, 1, 8, 96)
    product = "attn_dp=1 moe_tp=8 moe_ep=8 moe_quant=nvfp4"
    assert layout(tp="64", gpu_count="64", notes=product, source="cfg201") == (8, 1, 1, 16)
    assert layout(tp="1", pp="1", gpu_count="4", notes="layer split") == (1, 4, 1, 16)
    assert layout(tp="32", notes="attn_dp=1 moe_tp=32 moe_ep=1 moe_quant=nvfp4") == (8, 1, 1, 4)


@pytest.mark.parametrize(
    "cells",
    [
        {"model": "Nobody-9B"},
        {"gpu": "Cray-1"},
        {"engine": "abacus"},
        {"weight_precision": "ternary"},
        {"value": "nan"},
        {"value": "-3"},
        {"metric": "smell"},
        {"tp": "many"},
        {"input_len": "sharegpt"},
        {"model": "Qwen2.5-VL-7B"},
    ],
)
def test_an_unknown_row_is_skipped_with_its_reason(cells: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(Skipped):
        resolve(row(**cells))
    found = validate(written(tmp_path / "rows.csv", row(), row(**cells)))
    assert len(found.outcomes) == 1
    assert sum(found.skipped.values()) == 1


ODD = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "0",
            "-1",
            "1e9",
            "inf",
            "nan",
            "8.0",
            "2x4",
            "~200",
            "fp8_block",
            "decode_b1",
            "memory",
            "x_c9_tp0_",
            "x_c99_tp4_",
        ]
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(COLUMNS), ODD, min_size=1, max_size=4))
def test_no_row_however_odd_is_more_than_skipped(cells: dict[str, str]) -> None:
    for _, found in resolved([row(**cells)]):
        assert isinstance(found, str) or math.isfinite(predict(found).predicted)


def test_a_file_that_is_no_such_table_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        validate(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no column `id`"):
        validate(tmp_path / "other.csv")


def test_every_published_row_is_replayed_or_skipped(replayed: Validation) -> None:
    rows = MEASURED.read_text(encoding="utf-8").count("\n") - 1
    assert len(replayed.outcomes) + sum(replayed.skipped.values()) == rows
    assert len(replayed.outcomes) > 0.95 * rows


BARS = [
    ("dense", "tpot_ms", 0.10),
    ("dense", "offline_tok_s", 0.11),
    ("dense", "decode_b1_tok_s", 0.15),
    ("moe", "decode_b1_tok_s", 0.15),
    ("moe", "tpot_ms", 0.25),
    ("moe", "ttft_ms", 0.35),
    ("memory", "weights_gib", 0.02),
    ("memory", "activations_gib", 0.08),
]


@pytest.mark.parametrize(("kind", "figure", "bar"), BARS)
def test_median_errors_on_published_rows_stay_below_their_bars(
    replayed: Validation, kind: str, figure: str, bar: float
) -> None:
    assert replayed.by(lambda one: (one.case.kind, one.case.figure))[kind, figure].median_error <= bar


def test_offline_throughput_of_all_models_together(replayed: Validation) -> None:
    errors = [one.error for one in replayed.outcomes if one.case.figure == "offline_tok_s"]
    assert statistics.median(errors) <= 0.11


@pytest.mark.parametrize("figure", ["tpot_ms", "ttft_ms", "offline_tok_s", "decode_b1_tok_s"])
def test_bands_cover_four_fifths_of_the_rows(replayed: Validation, figure: str) -> None:
    covered = [one.covered for one in replayed.outcomes if one.case.figure == figure and one.case.kind != "memory"]
    assert covered.count(True) >= 0.8 * len(covered)


def test_a_band_is_wider_outside_of_what_was_validated() -> None:
    h100, (t4, _), spec = find_gpu("h100")[0], find_gpu("t4"), find_model("70b")
    inside, outside = (bands.tpot_band(Deployment(spec, gpu, SCHEMES["fp8"], 4)) for gpu in (h100, t4))
    assert inside
    assert outside
    assert inside.low < 1 < inside.high
    assert not inside.outside
    assert outside.low < inside.low < inside.high < outside.high
    assert "Turing" in outside.outside


def test_a_summary_counts_bias_and_coverage() -> None:
    case = resolve(row())
    rising = [Outcome(case, case.value * factor) for factor in (1.1, 1.2, 1.3)]
    found = Validation(tuple(rising), Counter()).by(lambda one: one.case.figure)["tpot_ms"]
    assert (found.rows, found.median_error, found.bias) == (3, pytest.approx(0.2), pytest.approx(0.2))


def test_the_json_has_errors_in_percent_by_kind_and_figure(tmp_path: Path) -> None:
    found = validate(written(tmp_path / "rows.csv", row(), row(id="2", gpu="Cray-1")))
    data = json.loads(json.dumps(view.data(found)))
    assert {"dense", "moe", "memory"} <= data.keys()
    assert data["dense"]["tpot_ms"].keys() == {"median_ape", "bias", "rows", "covered"}
    assert data["dense"]["tpot_ms"]["median_ape"] == pytest.approx(100 * found.outcomes[0].error, abs=0.01)
    assert data["skipped"] == {"accelerator not in the catalogue: Cray-1": 1}


def test_people_see_tables_worst_rows_and_reasons(tmp_path: Path) -> None:
    found = validate(written(tmp_path / "rows.csv", row(), row(id="2", gpu="Cray-1")))
    said = view.render(found)
    assert "1 published figures replayed, 1 skipped" in str(said[0])
    assert "Cray-1" in str(said[-1])


def test_the_fit_moves_what_has_a_start_and_lessens_the_error(replayed: Validation) -> None:
    cases = [one.case for one in replayed.outcomes if one.case.on.engine.name == "exllamav2"]
    overrides = list(ENGINES["exllamav2"].overrides)
    free = [one if one.start is None else replace(one, value=one.start) for one in overrides]
    found = fit.fit("exllamav2", overrides, cases)
    before, after = (fit.objective(build_engine("exllamav2", values), cases) for values in (free, found))
    assert after < before
    assert [one.value for one in found] == [one.value for one in overrides]  # the table holds what the fit finds
