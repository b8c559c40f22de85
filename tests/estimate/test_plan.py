"""Plans: the verdicts, the recommendation, and the questions that contradict themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import CapacityError, UnknownNameError, UsageError
from llmopt_cli.estimate.deployment import wanted
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import Fit, Plan, Verdict, answer, at_rate, chosen, title
from llmopt_cli.estimate.question import ask
from llmopt_cli.estimate.slo import offered_rate, request_rate
from llmopt_cli.spec.catalog import gpus, models
from llmopt_cli.spec.hardware import GIB
from llmopt_cli.spec.scheme import SCHEMES
from llmopt_cli.spec.workload import Arrivals, Workload

LOAD = Load.fixed(32, 1024, 256)


def plan(model: str, gpu: str, load: Load | None = None, tp: int | None = None, **flags: Any) -> Plan:
    return answer(ask(wanted(None, model=model, gpu=gpu, tensor_parallel_size=tp, **flags), load or LOAD))


def on(found: Plan, gpus: int) -> Fit:
    return next(fit for fit in found.fits if fit.gpus == gpus)


def test_70b_on_a100_needs_four_in_bf16_and_one_in_4_bits() -> None:
    found = plan("70b", "a100")
    assert (on(found, 1).verdict, on(found, 2).verdict) == (Verdict.NO, Verdict.TIGHT)
    assert "131.4 GiB of weights" in on(found, 1).reason
    assert on(found, 2).kv_tokens == pytest.approx(25_100, rel=0.01)
    assert f"only {on(found, 2).kv_tokens:,} KV tokens" in on(found, 2).reason
    assert found.recommended is on(found, 4)
    assert {scheme.name: fit.gpus for scheme, fit in found.smaller} == {"int8": 2, "awq": 1}


def test_two_gpus_are_enough_for_what_two_hold() -> None:
    found = plan("70b", "a100", replace(LOAD, concurrency=16))
    assert found.recommended is on(found, 2)


def test_a_context_that_was_asked_for_must_fit() -> None:
    found = plan("70b", "a100", replace(LOAD, concurrency=8), max_model_len=32768)
    assert on(found, 2).verdict is Verdict.TIGHT
    assert "--max-model-len 32,768 does not" in on(found, 2).reason
    assert found.recommended is on(found, 4)


def test_what_fits_nowhere_has_no_speed_and_no_cost() -> None:
    found = plan("405b", "t4")
    assert found.recommended is None
    assert found.speed is None
    assert found.usd_per_1k is None
    assert found.comparisons


def test_where_only_a_part_of_the_load_fits_the_speed_is_that_part() -> None:
    found = plan("70b", "a100x2", replace(LOAD, concurrency=64))
    assert found.recommended is on(found, 2)
    assert found.recommended.verdict is Verdict.TIGHT
    assert found.speed is not None
    assert found.speed.batch == found.recommended.max_requests == 19
    assert any("the 19 requests that run at once; the others wait" in caveat for caveat in found.caveats)


def test_the_batch_is_at_most_max_num_seqs() -> None:
    found = plan("8b", "a100", replace(LOAD, concurrency=100), max_num_seqs=10)
    assert found.speed is not None
    assert found.speed.batch == 10
    assert any("TTFT leaves that wait out" in caveat for caveat in found.caveats)
    assert not plan("8b", "a100", replace(LOAD, concurrency=10), max_num_seqs=10).caveats[1:]


def test_experts_have_a_band_of_their_own() -> None:
    dense, experts = plan("8b", "h100"), plan("qwen3-30b-a3b", "h100")
    assert dense.speed is not None
    assert dense.speed.ttft_band is not None
    assert experts.speed is not None
    assert experts.speed.ttft_band is not None
    assert "experts" in experts.speed.ttft_band.basis
    assert "dense" in dense.speed.ttft_band.basis


@pytest.mark.parametrize(
    ("gpu", "tp", "counts"),
    [("a100", None, [1, 2, 4, 8]), ("a100x4", None, [1, 2, 4]), ("a100x6", None, [1, 2, 4]), ("a100", 2, [2])],
)
def test_gpu_counts_are_those_at_hand_that_can_share_the_heads(gpu: str, tp: int | None, counts: list[int]) -> None:
    assert [fit.gpus for fit in plan("70b", gpu, tp=tp).fits] == counts


def test_heads_that_cannot_be_shared_out_are_not_weighed() -> None:
    assert [fit.gpus for fit in plan("qwen2.5-0.5b", "a100").fits] == [1, 2]  # 14 heads
    with pytest.raises(UsageError, match=r"14 heads and 2 KV heads of .* cannot be shared out among 4 GPUs"):
        plan("qwen2.5-0.5b", "a100", tp=4)
    assert [fit.gpus for fit in plan("phi-4", "a100").fits] == [1, 2]  # 40 heads, 10 KV heads


def test_prices_come_from_the_catalogue_or_the_flag() -> None:
    asked = wanted(None, model="8b", gpu="a100")
    listed, given_ = ask(asked, LOAD), ask(asked, LOAD, gpu_price=3.0)
    assert listed.price is not None
    assert listed.price.usd_per_hour == 2.45
    assert "2026-03" in listed.price.source
    assert given_.price is not None
    assert (given_.price.usd_per_hour, given_.price.source) == (3.0, "--gpu-price")
    listed_cost, given_cost = answer(listed).usd_per_1k, answer(given_).usd_per_1k
    assert listed_cost is not None
    assert given_cost == pytest.approx(listed_cost * 3 / 2.45)


def test_cost_is_rate_times_seconds_per_1k() -> None:
    found = plan("70b", "a100", replace(LOAD, concurrency=1))
    assert found.speed is not None
    assert found.usd_per_1k == pytest.approx(2 * 2.45 * 1000 / found.speed.tokens_per_s / 3600)
    # One request alone: its prompt takes the GPUs' time, too.
    seconds = found.speed.prefill + 256 * found.speed.tpot
    assert found.speed.tokens_per_s == pytest.approx(256 / seconds)


def test_over_pcie_layers_are_shared_by_two_at_most_unless_that_is_asked_for() -> None:
    assert [(fit.on.tp, fit.on.pp) for fit in plan("70b", "l40s").fits] == [(1, 1), (2, 1), (2, 2), (2, 4)]
    assert [(fit.on.tp, fit.on.pp) for fit in plan("70b", "l40s", tp=4).fits] == [(4, 1)]
    assert [(fit.on.tp, fit.on.pp) for fit in plan("70b", "a100").fits] == [(1, 1), (2, 1), (4, 1), (8, 1)]


def test_stages_are_weighed_as_asked() -> None:
    staged = plan("70b", "a100", pipeline_parallel_size=2)
    assert [(fit.on.tp, fit.on.pp) for fit in staged.fits] == [(1, 2), (2, 2), (4, 2), (8, 2)]
    with pytest.raises(UsageError, match="80 layers, which is not 100 stages"):
        plan("70b", "a100", pipeline_parallel_size=100)
    with pytest.raises(UsageError, match=r"--tp 2 x --pp 2 needs more than the 2 GPUs"):
        plan("70b", "a100x2", tp=2, pipeline_parallel_size=2)


def test_requests_at_a_rate_keep_as_many_busy_as_little_says() -> None:
    traffic = replace(Workload.read("chat"), arrivals=Arrivals(rate=20.0))
    question = ask(wanted(None, model="8b", gpu="h100"), Load.of(traffic))
    rate = offered_rate(traffic)
    assert rate == pytest.approx(20)
    busy = at_rate(question, rate).load.concurrency
    step = StepModel(question.base)
    assert request_rate(step, question.load.at(busy)) >= rate
    assert request_rate(step, question.load.at(busy - 1)) < rate
    with pytest.raises(CapacityError, match="requests a second are more than"):
        at_rate(question, 1e6)


def test_the_recommended_deployment_is_a_recipe() -> None:
    asked = wanted(None, model="70b", gpu="l40s", kv_cache_dtype="fp8")
    found = answer(ask(asked, LOAD))
    recipe = chosen(found, asked)
    assert (recipe.gpu, recipe.tensor_parallel_size, recipe.pipeline_parallel_size) == ("L40Sx4", 2, 2)
    again = answer(ask(recipe, LOAD))
    assert again.recommended is not None
    assert found.recommended is not None
    assert again.recommended.on.split(1) == replace(found.recommended.on.split(1), batching=recipe.batching)
    assert "32 requests at once, 1,024 tokens in, 256 out: TTFT" in title(found)
    with pytest.raises(CapacityError, match="so there is no recipe"):
        chosen(plan("405b", "t4"), asked)


def test_without_a_price_there_is_no_cost() -> None:
    found = plan("8b", "mi325x")
    assert found.speed is not None
    assert found.usd_per_1k is None


@pytest.mark.parametrize(
    ("flags", "load", "tp", "message"),
    [
        ({"model": None, "gpu": "a100"}, LOAD, None, "no model given"),
        ({"model": "8b", "gpu": None}, LOAD, None, "no accelerator given"),
        ({"model": "8b", "gpu": "a100x2"}, LOAD, 4, "--tp 4 needs more than the 2 GPUs"),
        ({"model": "demo", "gpu": "a100"}, Load.fixed(32, 2048, 1), None, r"input 2,048 \+ output 1 tokens exceed"),
        ({"model": "8b", "gpu": "a100", "max_model_len": 512}, LOAD, None, "exceed the context of 512"),
        ({"model": "demo", "gpu": "a100", "max_model_len": 4096}, LOAD, None, "beyond the 2,048 tokens of demo"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, Any], load: Load, tp: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask(wanted(None, tensor_parallel_size=tp, **flags), load)


@pytest.mark.parametrize("price", [float("nan"), float("inf")])
def test_a_price_is_a_number(price: float) -> None:
    with pytest.raises(UsageError, match="is no price"):
        ask(wanted(None, model="8b", gpu="a100"), LOAD, gpu_price=price)


def test_a_recipe_says_what_flags_do_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: 8b\ngpu: a100\nscheme: awq\nbatching: {max_num_seqs: 7, kv_cache_memory_bytes: 1000000000}\n"
    )
    question = ask(wanted(file), LOAD)
    assert (question.base.spec.name, question.base.scheme.name, question.needed) == ("Llama-3.1-8B", "awq", 7)
    assert on(answer(question), 1).budget.free == 1e9
    assert ask(wanted(file, scheme="int8", gpu="h100"), LOAD).base.hardware.name == "H100-SXM5-80GB"
    with pytest.raises(UnknownNameError):
        ask(wanted(file, scheme="int9"), LOAD)


def test_caveats_name_what_was_left_out() -> None:
    assert any("vision tower" in text for text in plan("gemma-4-31b", "h100").caveats)
    assert any("PCIe" in text for text in plan("70b", "l40s").caveats)
    assert any("no FP8 tensor cores" in text for text in plan("8b", "a100", scheme="fp8").caveats)
    assert not plan("8b", "h100").caveats


NAMES = st.sampled_from([entry.names[0] for entry in models()])
GPUS = st.sampled_from([entry.names[0] for entry in gpus()])


@settings(max_examples=60, deadline=None)
@given(NAMES, GPUS, st.sampled_from(sorted(SCHEMES)), st.integers(1, 300), st.integers(1, 300))
def test_more_concurrency_never_needs_less(name: str, gpu: str, scheme: str, concurrency: int, more: int) -> None:
    some = plan(name, gpu, Load.fixed(concurrency, 512, 128), scheme=scheme)
    others = plan(name, gpu, Load.fixed(concurrency + more, 512, 128), scheme=scheme)
    assert [fit.kv_tokens for fit in some.fits] == [fit.kv_tokens for fit in others.fits]
    if others.recommended and others.recommended.verdict is Verdict.FITS:
        assert some.recommended is not None
        assert some.recommended.verdict is Verdict.FITS
        assert some.recommended.gpus <= others.recommended.gpus


@settings(max_examples=60, deadline=None)
@given(NAMES, GPUS, st.sampled_from(sorted(SCHEMES)))
def test_more_gpus_never_hold_fewer_tokens(name: str, gpu: str, scheme: str) -> None:
    fits = plan(name, gpu, Load.fixed(32, 512, 128), scheme=scheme).fits
    tokens = [fit.kv_tokens for fit in fits]
    # Sharing costs each GPU half a GiB of non-torch memory: a smaller model has less than that to share out.
    if fits[0].budget.weights > GIB:
        assert tokens == sorted(tokens)
    for fit in fits:
        assert (fit.verdict is Verdict.NO) == (fit.max_requests < 1)
