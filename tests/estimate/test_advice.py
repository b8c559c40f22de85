"""Advice: every change is planned anew, those that are advised work, and the precisions cross where they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.estimate.advice import Advice, Advised, advise, apply, fixes
from llmopt_cli.estimate.choices import RISKS, risk
from llmopt_cli.estimate.deployment import wanted
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import Plan, Verdict, answer
from llmopt_cli.estimate.precision import BATCHES, Speedup, speedups
from llmopt_cli.estimate.question import ask
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.catalog import gpus, models
from llmopt_cli.spec.scheme import SCHEMES, find_scheme
from llmopt_cli.spec.workload import Slo


def plan(model: str, gpu: str, concurrency: int = 32, **flags: Any) -> Plan:
    return answer(ask(wanted(None, model=model, gpu=gpu, **flags), Load.fixed(concurrency, 1024, 256)))


def advised(model: str, gpu: str, concurrency: int = 32, slo: Slo | None = None, **flags: Any) -> Advice:
    return advise(plan(model, gpu, concurrency, **flags), slo or Slo())


def of_kind(advice: Advice, kind: str) -> Advised:
    return next(one for one in advice.options if one.fix.kind == kind)


def test_70b_on_two_a100_is_advised_4_bits_a_larger_gpu_or_a_smaller_batch() -> None:
    found = advised("70b", "a100x2")
    assert found.goal == "fit"
    assert found.fit.verdict is Verdict.TIGHT
    awq = of_kind(found, "weights")
    assert (awq.fix.flags, awq.offer.gpus) == ("--scheme awq", 1)
    assert found.options[0] is awq  # half the GPUs: the cheapest
    assert awq.fix.risk == RISKS["awq"]
    assert of_kind(found, "gpu").offer.fit.verdict is Verdict.FITS


def test_fewer_places_leave_more_room_for_the_cache() -> None:
    found = advised("70b", "a100x2", max_num_seqs=256)
    fewer = of_kind(found, "seqs")
    places = fewer.fix.question.base.batching.max_num_seqs
    assert fewer.offer.fit.budget.free > found.fit.budget.free
    assert fewer.offer.fit.max_requests >= places > found.fit.max_requests
    one_more = replace(fewer.fix.question.base.batching, max_num_seqs=places + 1)
    question = replace(fewer.fix.question, base=replace(fewer.fix.question.base, batching=one_more))
    assert answer(question).fits[-1].max_requests < places + 1


def test_a_context_that_does_not_fit_is_shortened_to_what_does() -> None:
    found = plan("70b", "a100x2", 8, max_model_len=32768)
    shorter = next(fix for fix in fixes(found.question, found.fits[-1]) if fix.kind == "context")
    assert shorter.question.base.batching.max_model_len == found.fits[-1].kv_tokens
    assert answer(shorter.question).recommended is not None
    assert f"--max-model-len {found.fits[-1].kv_tokens}" == shorter.flags


def test_a_smaller_context_is_not_offered_where_none_was_asked_for() -> None:
    found = plan("70b", "a100x2", 8)
    assert not [fix for fix in fixes(found.question, found.fits[-1]) if fix.kind == "context"]


def test_over_pcie_more_gpus_are_stages_and_replicas() -> None:
    found = plan("8b", "l40sx2", 64)
    more = [fix for fix in fixes(found.question, found.fits[0]) if fix.kind == "gpus"]
    assert [fix.question.splits for fix in more] == [((2, 1),), ((2, 2),), ((2, 4),)]
    assert [fix.flags for fix in more] == ["--tp 2", "--tp 2 --pp 2", "--tp 2 --pp 4"]
    replicas = [fix for fix in fixes(found.question, found.fits[0]) if fix.kind == "replicas"]
    assert [(fix.replicas, fix.question.load.concurrency) for fix in replicas] == [(2, 32), (4, 16), (8, 8)]


def test_replicas_are_paid_and_counted_together() -> None:
    found, slo = plan("8b", "a100x1", 64), Slo(tpot_ms=25)
    two = next(fix for fix in fixes(found.question, found.fits[0]) if fix.replicas == 2)
    now, made = advise(found, slo).offer, apply(two, slo)
    assert now
    assert made
    assert (made.gpus, made.replicas, made.load.concurrency) == (2, 2, 32)
    assert made.usd_per_hour == pytest.approx(2 * 2.45)
    assert made.tokens_per_s == pytest.approx(2 * made.work.tokens_per_s)
    assert now.tokens_per_s < made.tokens_per_s < 2 * now.tokens_per_s
    assert made.meets
    assert not now.meets


def test_a_precision_that_the_cores_lack_is_not_advised() -> None:
    found = plan("70b", "b300x1", 64)
    names = [fix.question.base.scheme.name for fix in fixes(found.question, found.fits[0]) if fix.kind == "weights"]
    assert "w8a8" not in names
    assert {"fp8", "nvfp4"} <= set(names)
    assert "gptq-3bit" not in names  # its 5-10 % are no advice


def test_what_holds_the_load_is_advised_what_makes_a_token_cheaper() -> None:
    found = advised("8b", "h100x1", 64)
    assert found.goal == "price"
    assert found.offer
    assert found.offer.usd_per_1m
    prices = [one.offer.usd_per_1m for one in found.options if one.offer.usd_per_1m]
    assert len(prices) == len({one.fix.kind for one in found.options}) == 3
    assert prices == sorted(prices)
    assert prices[-1] < 0.97 * found.offer.usd_per_1m


def test_where_nothing_helps_nothing_is_advised() -> None:
    assert advised("8b", "h100x1", slo=Slo(ttft_ms=0.001)).options == ()


NAMES = st.sampled_from([entry.names[0] for entry in models()])
GPUS = st.sampled_from([entry.names[0] for entry in gpus()])
LIMITS = st.sampled_from([Slo(), Slo(ttft_ms=2000, tpot_ms=50)])


@settings(max_examples=25, deadline=None)
@given(NAMES, GPUS, st.sampled_from([1, 2, 8]), st.integers(1, 200), LIMITS)
def test_what_is_advised_works_when_it_is_asked_again(name: str, gpu: str, count: int, many: int, slo: Slo) -> None:
    question = ask(wanted(None, model=name, gpu=gpu), Load.fixed(many, 512, 128))
    found = advise(answer(replace(question, splits=question.splits[:count])), slo)
    assert len({one.fix.kind for one in found.options}) == len(found.options) <= 3
    money = []
    for one in found.options:
        again = answer(one.fix.question).recommended
        assert again is not None
        assert again.verdict is Verdict.FITS
        load = one.fix.question.load.at(min(one.fix.question.needed, again.max_requests))
        step = StepModel(again.on)
        ttft, tpot = step.ttft(load), step.tpot(load)
        assert slo.keeps(ttft, tpot, ttft + tpot * (load.output_len - 1))
        money.append(one.offer.usd_per_1m if found.goal == "price" else one.offer.usd_per_hour)
    known = [usd for usd in money if usd is not None]
    assert known == sorted(known)


def of_scheme(found: tuple[Speedup, ...], name: str) -> Speedup:
    return next(one for one in found if one.scheme.name == name)


def tokens_per_s(found: Plan, scheme: str, batch: int) -> float:
    assert found.recommended
    step = StepModel(replace(found.recommended.on, scheme=find_scheme(scheme)))
    return work(step, found.question.load.at(batch)).tokens_per_s


def unpacking(gpu: str, efficiency: float) -> tuple[Plan, tuple[Speedup, ...]]:
    """8B on a GPU whose weight-only products run at a part of the 16-bit rate."""
    found = plan("8b", gpu)
    assert found.recommended
    on = replace(found.recommended.on, engine=replace(found.recommended.on.engine, unpack_efficiency=efficiency))
    made = replace(found, recommended=replace(found.recommended, on=on))
    return made, speedups(on, found.question.load)


def test_4_bits_win_at_batch_1_and_lose_from_the_batch_that_is_named() -> None:
    found, rows = unpacking("h200", 0.8)
    awq = of_scheme(rows, "awq")
    assert awq.factors[0] > 1.5
    assert awq.factors[-1] < 0.95
    assert awq.crossing
    assert awq.crossing.faster_below
    at = awq.crossing.batch
    assert tokens_per_s(found, "awq", at - 1) > 1.005 * tokens_per_s(found, "bf16", at - 1)
    assert tokens_per_s(found, "awq", at) <= 1.005 * tokens_per_s(found, "bf16", at)


def test_unpacking_that_costs_more_makes_4_bits_lose_sooner() -> None:
    crossings = [of_scheme(unpacking("h200", part)[1], "awq").crossing for part in (0.9, 0.7, 0.5)]
    batches = [crossing.batch for crossing in crossings if crossing]
    assert len(batches) == 3
    assert batches == sorted(batches, reverse=True)


def test_products_in_8_bits_win_at_every_batch() -> None:
    fp8 = of_scheme(unpacking("h200", 0.8)[1], "fp8")
    assert fp8.crossing is None
    assert min(fp8.factors) > 1.2
    assert len(fp8.factors) == len(BATCHES)


def test_precisions_are_those_of_the_accelerator() -> None:
    names = [one.scheme.name for one in unpacking("a100", 1.0)[1]]
    assert "bf16" not in names
    assert "nvfp4" not in names
    assert of_scheme(unpacking("a100", 1.0)[1], "fp8").remark


def test_every_precision_has_a_risk() -> None:
    assert all(risk(scheme).text for scheme in SCHEMES.values())
    assert risk(SCHEMES["bf16"]).rank == 0 < risk(SCHEMES["int8"]).rank < risk(SCHEMES["awq"]).rank
