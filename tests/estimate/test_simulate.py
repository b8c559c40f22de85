"""The simulation: jumps change nothing, the closed form agrees where it can; prefixes, replicas, refusals."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import model_draft
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import kv_bytes_per_token
from llmopt_cli.estimate.simulate import ENOUGH, Simulation, Spread, enough, simulate
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.workload import Arrivals, Lengths, Slo, Workload

TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"
H100, BF16 = find_gpu("h100")[0], find_scheme("bf16")
SMALL = find_model("llama-3.2-1b")
WINDOWED = replace(SMALL, sliding_window=40, num_sliding_layers=12)


def deploy(spec: ModelSpec = SMALL, kv_tokens: int | None = None, **batching: Any) -> Deployment:
    memory = None if kv_tokens is None else int(kv_tokens * kv_bytes_per_token(spec, 2))
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 2048} | batching
    return Deployment(spec, H100, BF16, batching=Batching(kv_cache_memory_bytes=memory, **limits))


def traffic(input_len: Lengths, output_len: Lengths, count: int, **arrivals: Any) -> Workload:
    return Workload("mine", input_len, output_len, Arrivals(**arrivals), count)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    prefix = draw(st.sampled_from([0, 0, 4, 9]))
    low = draw(st.integers(prefix + 1, 60))
    prompts = Lengths("uniform", min=low, max=low + draw(st.integers(0, 60)))
    answers = Lengths("uniform", min=1, max=draw(st.integers(1, 80)))
    arrivals: dict[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({"concurrency": st.integers(1, 12)}),
            st.fixed_dictionaries({"rate": st.floats(1, 3000), "burstiness": st.sampled_from([0.0, 1.0, 4.0])}),
        )
    )
    made = traffic(prompts, answers, draw(st.integers(1, 25)), **arrivals)
    return replace(made, shared_prefix=prefix, seed=draw(st.integers(0, 1000)))


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads(),
    spec=st.sampled_from([SMALL, WINDOWED]),
    kv_tokens=st.integers(210, 900),
    seqs=st.integers(1, 8),
    tokens=st.integers(8, 80),
    block_size=st.sampled_from([1, 4, 16]),
    mode=st.sampled_from(["continuous", "continuous", "static", "none"]),
    replicas=st.integers(1, 3),
)
def test_jumps_change_nothing(
    workload: Workload,
    spec: ModelSpec,
    kv_tokens: int,
    seqs: int,
    tokens: int,
    block_size: int,
    mode: str,
    replicas: int,
) -> None:
    on = deploy(
        spec,
        kv_tokens,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=block_size,
        batching_mode=mode,
    )
    jumped, stepped = (simulate(on, workload, replicas, jumps=jumps) for jumps in (True, False))
    for one, other in zip(jumped.served, stepped.served, strict=True):
        assert (one.size, one.cached) == (other.size, other.cached)
        times = [(served.sent, served.first, served.end) for served in (one, other)]
        # Steps are straight lines between probes; where a bend lies between two of them, microseconds are lost.
        assert times[0] == pytest.approx(times[1], rel=1e-4, abs=1e-5)
    for name in ("steps", "preemptions", "longest_queue", "refused"):
        assert getattr(jumped, name) == getattr(stepped, name), name
    assert jumped.busy_share == pytest.approx(stepped.busy_share, rel=1e-4)


def test_memory_that_runs_out_preempts_with_and_without_jumps() -> None:
    on = deploy(kv_tokens=600, max_num_seqs=8)
    workload = traffic(Lengths(mean=40), Lengths("uniform", min=50, max=150), 40, concurrency=8)
    jumped, stepped = (simulate(on, workload, jumps=jumps) for jumps in (True, False))
    assert jumped.preemptions == stepped.preemptions > 0
    assert [one.end for one in jumped.served] == pytest.approx([one.end for one in stepped.served], rel=1e-9)


@pytest.mark.parametrize(("input_len", "output_len"), [(1024, 1024), (1024, 256), (4096, 512)])
@pytest.mark.parametrize("concurrency", [1, 16, 64])
def test_a_closed_loop_takes_as_long_as_the_closed_form_says(input_len: int, output_len: int, concurrency: int) -> None:
    """Lengths vary by a fifth: alike to the token, all requests would end at once and prefill in turns for ever.

    TPOT is what the closed form is about. Its TTFT is a fit to measurements, and is not compared.
    """
    on = Deployment(find_model("llama-3.1-8b"), H100, BF16)
    some = [Lengths("uniform", min=length * 4 // 5, max=length * 6 // 5) for length in (input_len, output_len)]
    simulated = simulate(on, traffic(some[0], some[1], 12 * concurrency, concurrency=concurrency))
    assert simulated.tpot
    expected = StepModel(on).tpot(Load.fixed(concurrency, input_len, output_len))
    assert simulated.tpot.mean == pytest.approx(expected, rel=0.10)


def test_one_request_alone_takes_dispatch_prefill_and_decode_steps() -> None:
    on, step = deploy(), StepModel(deploy())
    simulated = simulate(on, traffic(Lengths(mean=700), Lengths(mean=50), 1, concurrency=1))
    [one] = simulated.served
    assert one.ttft == pytest.approx(step.constants.dispatch_s + step.prefill(700))
    assert one.e2e - one.ttft == pytest.approx(sum(step.decode(1, 701 + index) for index in range(49)))
    assert simulated.duration == one.end
    assert simulated.busy_share == pytest.approx(1 - step.constants.dispatch_s / one.end)


def test_a_draft_yields_its_expected_tokens() -> None:
    plain = deploy(find_model("llama-3.1-8b"))
    drafted = replace(plain, draft=model_draft(SMALL, tokens=4, acceptance=0.8))
    workload = traffic(Lengths(mean=200), Lengths(mean=200), 20, concurrency=4)
    without, with_draft = (simulate(on, workload).tpot for on in (plain, drafted))
    assert without
    assert with_draft
    ratio = StepModel(drafted).decode(4, 300) / StepModel(plain).decode(4, 300)
    assert with_draft.mean / without.mean == pytest.approx(ratio, rel=0.05)


def test_a_rate_beyond_the_limit_queues_and_a_lower_one_does_not() -> None:
    on = deploy(max_num_seqs=16)
    calm, flooded = (simulate(on, traffic(Lengths(mean=500), Lengths(mean=200), 400, rate=rate)) for rate in (5, 500))
    assert calm.ttft
    assert flooded.ttft
    assert calm.longest_queue < 5
    assert flooded.longest_queue > 300
    assert flooded.ttft.p99 > 20 * calm.ttft.p99
    assert calm.per_s(400) == pytest.approx(5, rel=0.05)


def test_goodput_counts_requests_within_all_limits() -> None:
    workload = traffic(Lengths(mean=500), Lengths(mean=100), 200, rate=200)
    free = simulate(deploy(max_num_seqs=32), workload, usd_per_hour=3.6)
    assert free.ttft
    assert free.tpot
    ttft, tpot = 1.001 * free.ttft.p50, 1.001 * free.tpot.p90
    limit = Slo(ttft_ms=1000 * ttft, tpot_ms=1000 * tpot, share=0.99)
    bound = simulate(deploy(max_num_seqs=32), replace(workload, slo=limit), usd_per_hour=3.6)
    assert len(bound.good) == sum(one.ttft <= ttft and (one.tpot or 0) <= tpot for one in free.served)
    assert 0.3 < bound.attainment == len(bound.good) / 200 < 0.52
    assert (free.met, bound.met) == (None, False)
    assert free.usd_per_1k_good
    assert free.usd_per_1k_good == pytest.approx(3.6 * free.duration / 3600 / (200 * 100) * 1000)
    assert bound.usd_per_1k_good == pytest.approx(free.usd_per_1k_good * 200 / len(bound.good))


def test_a_shared_prefix_is_computed_once() -> None:
    workload = traffic(Lengths(mean=800), Lengths(mean=20), 100, concurrency=4)
    shared = replace(workload, shared_prefix=640)
    without, with_prefix = simulate(deploy(), workload), simulate(deploy(), shared)
    off = simulate(deploy(enable_prefix_caching=False), shared)
    assert without.cached_share == off.cached_share == 0
    assert with_prefix.cached_share == pytest.approx(0.8 * 0.99, abs=0.02)  # all but the first
    assert with_prefix.ttft
    assert without.ttft
    assert with_prefix.ttft.mean < without.ttft.mean


def test_hashes_of_a_trace_are_hits_while_memory_lasts(tmp_path: Path) -> None:
    turns = [{"timestamp": 1000 * n, "input_length": 512 * n + 100, "output_length": 20} for n in range(1, 6)]
    lines = [str(turn | {"hash_ids": list(range(int(turn["input_length"] / 512) + 1))}) for turn in turns]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines).replace("'", '"'))
    workload = Workload.read(tmp_path / "chat.jsonl")
    cached = [one.cached for one in simulate(deploy(), workload).served]
    assert cached == [0, 512, 1024, 1536, 2048]
    scarce = simulate(deploy(kv_tokens=3072), workload)
    assert 0 < scarce.cached_share < 0.9


def test_replicas_share_the_requests() -> None:
    workload = traffic(Lengths(mean=500), Lengths(mean=100), 300, rate=150)
    one, three = (simulate(deploy(max_num_seqs=16), workload, replicas, 2.0) for replicas in (1, 3))
    assert one.e2e
    assert three.e2e
    assert three.e2e.p99 < one.e2e.p99
    assert [served.size for served in one.served] == [served.size for served in three.served]
    assert (one.usd_per_hour, three.usd_per_hour) == (2, 6)
    closed = [simulate(deploy(), workload.with_load(concurrency=2), replicas) for replicas in (2, 3)]
    assert closed[0].served == closed[1].served  # two places send nothing to a third replica
    assert closed[1].busy_share == pytest.approx(closed[0].busy_share * 2 / 3)


def test_what_can_never_fit_is_refused_and_missed() -> None:
    on = deploy(kv_tokens=1024)
    workload = traffic(Lengths("uniform", min=100, max=2000), Lengths(mean=10), 50, concurrency=4)
    simulated = simulate(on, workload)
    assert simulated.refused == sum(sum(size) > simulated.kv_tokens for size in workload.sizes(None)[0]) > 0
    assert simulated.attainment == len(simulated.served) / 50 < 1
    clipped = simulate(deploy(max_model_len=1000), workload)
    assert clipped.clipped > 0 == clipped.refused


def test_a_model_that_leaves_no_memory_says_so() -> None:
    on = Deployment(find_model("llama-3.1-70b"), H100, BF16)
    with pytest.raises(CapacityError, match="leaves no memory for a KV cache"):
        simulate(on, traffic(Lengths(mean=10), Lengths(mean=10), 1, concurrency=1))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    assert (spread.p50, spread.p90, spread.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]), rel=1e-9, abs=1e-9)
    assert spread.mean == pytest.approx(statistics.fmean(values))


def test_drawn_workloads_are_made_long_enough_for_percentiles() -> None:
    chat = Workload.read("chat")
    assert enough(chat).num_requests == ENOUGH
    assert enough(chat.with_load(concurrency=300)).num_requests == 3000


@pytest.fixture(scope="module")
def conversation() -> Simulation:
    if not TRACES.is_dir():
        pytest.skip("the traces are not at hand")
    workload = Workload.read(TRACES / "AzureLLMInferenceTrace_conv.csv")
    return simulate(Deployment(find_model("llama-3.1-8b"), H100, BF16), workload)


def test_an_hour_of_a_real_trace(conversation: Simulation) -> None:
    assert len(conversation.served) == 19366
    assert conversation.output_tokens == 4_088_665
    assert conversation.duration == pytest.approx(3502, rel=0.01)  # it keeps up
    assert conversation.steps > 10 * len(conversation.served)  # most of them were jumped over
    assert conversation.ttft
    assert 0.06 < conversation.ttft.p50 < 0.2
