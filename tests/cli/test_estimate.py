"""`llmopt estimate | models | gpus` as processes: what they print, what they import, how they fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy")


def llmopt(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llmopt_cli", *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("args", [["estimate", "--model", "70b", "--gpu", "a100"], ["models"], ["gpus"]])
def test_runs_without_torch_transformers_or_numpy(args: list[str]) -> None:
    code = f"""
import sys
from llmopt_cli.cli import main
sys.argv = ["llmopt", *{args!r}, "--json"]
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip().splitlines()[-1] == "[]"
    assert json.loads(ran.stdout)


def test_json_holds_the_whole_plan() -> None:
    ran = llmopt("estimate", "--model", "70b", "--gpu", "a100", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    data = json.loads(ran.stdout)
    assert (data["model"]["asked"], data["model"]["name"]) == ("70b", "Llama-3.1-70B")
    assert (data["gpu"]["asked"], data["gpu"]["name"]) == ("a100", "A100-SXM4-80GB")
    assert [fit["verdict"] for fit in data["memory"]] == ["does not fit", "tight", "fits", "fits"]
    assert data["recommended_gpus"] == 4
    band = data["speed"]["tpot_band"]
    assert band["low"] < 1 < band["high"]
    assert 0 < band["median_error"] < 0.25
    assert band["rows"] >= 10
    assert data["usd_per_1k_output_tokens"] > 0
    assert all(constant["source"] for constant in data["constants"].values())


def test_text_says_what_names_mean_shows_formulas_and_recommends() -> None:
    text = llmopt("estimate", "--model", "70b", "--gpu", "a100").stdout
    for expected in (
        "70b   = Llama-3.1-70B",
        "a100  = A100-SXM4-80GB",
        "2 x 80 layers x 8192 x 1,280 tokens x 2 B x 32 requests",
        "2 x 80 layers x 8 of 64 heads x 128 x 1,280 tokens x 2 B x 32 requests",
        "(weights + KV cache) x 1.2 to 1.3",
        "does not fit: 131.4 GiB of weights",
        "fits, but only 24,937 KV tokens",
        "Recommended: 4 x A100-SXM4-80GB in bf16",
        "In fewer bits: int8: 2 GPUs",
        "published runs under vllm of dense models",
        "s per 1K / 3600",
        "2026-03",
    ):
        assert expected in text


@pytest.mark.parametrize(
    "args",
    [
        ["--model", "kimi-k2-instruct", "--gpu", "t4", "--input-len", "60000", "--concurrency", "256"],
        ["--model", "405b", "--gpu", "b200", "--input-len", "100000", "--concurrency", "256"],
    ],
)
def test_no_figure_has_an_exponent(args: list[str]) -> None:
    ran = llmopt("estimate", *args)
    assert ran.returncode == 0, ran.stderr
    assert not re.search(r"\de[+-]\d", ran.stdout)


def test_bands_name_their_runs_and_what_sets_this_one_apart() -> None:
    measured = llmopt("estimate", "--model", "70b", "--gpu", "h100", "--scheme", "fp8").stdout
    assert re.search(r"TPOT .* ms \(.* to .*: 80% of \d+ published runs under vllm of dense models\)", measured)
    beyond = llmopt("estimate", "--model", "70b", "--gpu", "l40s").stdout
    assert "wider here: none on Ada" in beyond


def test_a_flag_wins_over_the_listed_price() -> None:
    data = json.loads(llmopt("estimate", "--model", "7b", "--gpu", "a100", "--gpu-price", "3", "--json").stdout)
    assert data["price"] == {"usd_per_hour": 3.0, "source": "--gpu-price"}


def test_the_demo_is_estimated_from_its_own_config() -> None:
    data = json.loads(llmopt("estimate", "--model", "demo", "--gpu", "t4", "--json").stdout)
    assert data["model"]["parameters"] == 5_770_496
    assert data["recommended_gpus"] == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "70c", "--gpu", "a100"], "unknown model `70c`"),
        (["--model", "mixtral", "--gpu", "a100"], "`mixtral` fits more than one model"),
        (["--model", "70b", "--gpu", "a1000"], "unknown accelerator `a1000`"),
        (["--model", "7" * 300, "--gpu", "a100"], "unknown model `777"),
        (["--model", "70b"], "no accelerator given"),
        (["--gpu", "a100"], "no model given"),
        (["--model", "70b", "--gpu", "a100", "--scheme", "int9"], "unknown scheme `int9`"),
    ],
)
def test_a_wrong_request_is_one_sentence_a_hint_and_exit_2(args: list[str], said: str) -> None:
    ran = llmopt("estimate", *args)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"error: {said}" in ran.stderr
    assert "hint: " in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["--gpu", "h100", "--plot", "x.png"], "--plot has no effect on a plain estimate"),
        (["--gpu", "h100", "--replicas", "2"], "--replicas has no effect on a plain estimate"),
        (["--compare", "-o", "x.yaml"], "--output has no effect on --compare"),
        (["--gpu", "h100", "--simulate", "--prefix-hit", "0.5"], "--prefix-hit has no effect on --simulate"),
        (["--gpu", "h100", "--ladder", "--scheme", "fp8"], "--scheme has no effect on --ladder"),
        (["--validate", "x.csv"], "--model has no effect on --validate"),
        (["--calibrate", "results"], "--model has no effect on --calibrate"),
    ],
)
def test_a_flag_that_an_answer_does_not_read_is_refused(args: list[str], flag: str) -> None:
    ran = llmopt("estimate", "--model", "8b", *args)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"error: {flag}" in ran.stderr


@pytest.mark.parametrize(
    "args", [["--requests-per-day", "inf"], ["--gpu-price", "1e308"], ["--spot-price", "nan"], ["--slo", ""]]
)
def test_absurd_amounts_are_refused(args: list[str]) -> None:
    ran = llmopt("estimate", "--model", "8b", "--gpu", "h100", *args, "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-model-len", "512"], "input 1,024 + output 256 tokens exceed the context of 512"),
        (["--max-model-len", "1"], "--max-model-len 1 has no room"),
        (["--max-model-len", "1", "--workload", "chat"], "--max-model-len 1 has no room"),
    ],
)
def test_lengths_beyond_the_context_are_refused_not_cut(flags: list[str], said: str) -> None:
    ran = llmopt("estimate", "--model", "8b", "--gpu", "h100", *flags)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"error: {said}" in ran.stderr


def test_what_fits_nowhere_is_answered_and_has_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    ran = llmopt("estimate", "--model", "405b", "--gpu", "t4", "-o", str(file))
    assert ran.returncode == 1
    assert "Recommended: none" in ran.stdout
    assert "so there is no recipe" in ran.stderr
    assert llmopt("estimate", "--model", "8b", "--gpu", "h100", "--api-price", "x", "-o", str(file)).returncode == 2
    assert not file.exists()


def test_a_written_recipe_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    flags = ["--scheme", "awq", "--kv-cache-dtype", "fp8", "--draft-model", "1b", "--max-num-seqs", "48"]
    first = llmopt("estimate", "--model", "70b", "--gpu", "h100x4", *flags, "-o", str(file), "--json")
    assert first.returncode == 0, first.stderr
    again = llmopt("estimate", "--recipe", str(file), "--json")
    one, other = json.loads(first.stdout), json.loads(again.stdout)
    assert other["memory"] == one["memory"][:1]
    assert other["speed"] == one["speed"]
    assert llmopt("estimate", "--recipe", str(file), "-o", str(file)).returncode == 2


def test_limits_are_those_of_the_requests_that_are_in_memory_at_once() -> None:
    ran = llmopt("estimate", "--model", "8b", "--gpu", "h100", "--concurrency", "1000", "--json")
    data = json.loads(ran.stdout)
    assert data["recommended_gpus"] == data["limits"]["fewest_gpus"]["bf16"]["gpus"] == 1
    assert data["limits"]["max_context_at_requests"] == 256


def test_the_ladder_of_equal_requests_spreads_their_lengths() -> None:
    said = llmopt("estimate", "--model", "8b", "--gpu", "h100", "--ladder").stdout
    assert "spread as in the chat workload" in said
    assert not re.search(r"waits for its longest answer, 1\.0 x", said)


@pytest.mark.parametrize(("verb", "count", "row"), [("gpus", 58, "A100-SXM4-80GB"), ("models", 94, "Llama-3.1-70B")])
def test_catalogues_are_listed_with_sources(verb: str, count: int, row: str) -> None:
    assert row in llmopt(verb).stdout
    listed = json.loads(llmopt(verb, "--json").stdout)
    assert len(listed) == count
    assert all(entry.get("source") or entry.get("spec_source") for entry in listed)


def test_flags_change_the_speculation_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "speculating.yaml"
    recipe.write_text("model: 70b\ngpu: h100x4\nengine: vllm\nspeculation: {model: 1b, acceptance: 0.6}\n")

    def tpot(*flags: str) -> float:
        run = llmopt("estimate", "--recipe", str(recipe), "--json", *flags)
        return float(json.loads(run.stdout)["speed"]["tpot_s"])

    assert tpot("--acceptance", "0.9") < tpot() < tpot("--acceptance", "0.1")
