"""Workloads: what files may say, and that the traffic drawn from them is the one they describe."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import ConfigFileError, UnknownNameError, UsageError
from llmopt_cli.spec.workload import Arrivals, Lengths, Size, Slo, Workload, bundled_slos
from llmopt_cli.spec.yaml_file import recipes_folder

BUNDLED = sorted(file.stem for file in (recipes_folder() / "workloads").glob("*.yaml"))
TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"
MINIMAL = """name: mine
input_len: {kind: uniform, min: 10, max: 20}
output_len: {mean: 8}
arrivals: {concurrency: 2}
num_requests: 5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_bundled_workloads_are_there() -> None:
    assert BUNDLED == ["chat", "code", "decode", "rag"]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_workload_plans_and_cites_its_source(name: str) -> None:
    workload = Workload.read(name)
    sizes, _ = workload.sizes(2048)
    assert workload.name == name
    assert len(workload.source) > 40
    assert len(sizes) == workload.num_requests
    assert all(size.input_len > workload.shared_prefix and sum(size) <= 2048 for size in sizes)


@pytest.mark.parametrize(
    ("name", "file", "columns", "scale"),
    [
        ("chat", "AzureLLMInferenceTrace_conv.csv", ("ContextTokens", "GeneratedTokens"), 4),
        ("code", "AzureLLMInferenceTrace_code.csv", ("ContextTokens", "GeneratedTokens"), 4),
        ("rag", "mooncake_conversation_trace.jsonl", ("input_length", "output_length"), 16),
    ],
)
def test_lengths_are_those_of_the_cited_trace(name: str, file: str, columns: tuple[str, str], scale: int) -> None:
    if not TRACES.is_dir():
        pytest.skip("the traces are not at hand")
    with (TRACES / file).open() as stream:
        rows = list(csv.DictReader(stream)) if file.endswith("csv") else [json.loads(line) for line in stream]
    workload = Workload.read(name)
    for lengths, column in zip((workload.input_len, workload.output_len), columns, strict=True):
        values = [float(row[column]) / scale for row in rows]
        assert lengths.mean == pytest.approx(statistics.mean(values), abs=1)
        assert lengths.sd == pytest.approx(statistics.pstdev(values), abs=1)
        assert lengths.max is not None
        assert lengths.max == pytest.approx(max(values), rel=0.01)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (MINIMAL + "num_request: 3\n", "unknown key `num_request`.*line 6", "`num_requests`"),
        (MINIMAL.replace("kind", "kin"), "unknown key `input_len.kin`.*line 2", "`kind`"),
        (MINIMAL.replace("uniform", "poisson"), "key `input_len.kind`.*line 2", None),
        (MINIMAL.replace(", max: 20", ""), "key `input_len`.*line 2: `uniform` needs max", None),
        (MINIMAL.replace("{mean: 8}", "{mean: 8, sd: 2}"), "key `output_len`.*line 3: `constant` takes no sd", None),
        (MINIMAL.replace("max: 20", "max: 9"), "key `input_len`.*line 2: max must be at least 10, not 9", None),
        (MINIMAL.replace("concurrency: 2", "burstiness: 2"), "`arrivals`.*line 4.*either concurrency or rate", None),
        (MINIMAL.replace("arrivals: {concurrency: 2}\n", ""), "key `arrivals` is missing", None),
        (MINIMAL + "shared_prefix: 10\n", "shared_prefix 10 leaves the shortest prompt no token", None),
        (MINIMAL.replace("num_requests: 5", "num_requests: 0"), "num_requests must be at least 1, not 0", None),
        (MINIMAL + "slo: {ttft: 3}\n", "unknown key `slo.ttft`.*line 6", "`ttft_ms`"),
        (MINIMAL + "slo: {share: 2}\n", "key `slo`.*line 6: share must lie in", None),
        (MINIMAL.replace("concurrency: 2", "speed: 2"), "no `trace` to take lengths or times from", None),
        (MINIMAL.replace("{mean: 8}", "{kind: trace}") + "trace: x.csv\n", "both those of the trace, or neither", None),
        (MINIMAL.replace("{mean: 8}", "{kind: trace, mean: 8}"), "`trace` takes no mean", None),
    ],
)
def test_mistake_in_a_file_names_key_and_line(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigFileError, match=message) as caught:
        Workload.read(path)
    assert hint is None or hint in (caught.value.hint or "")


def test_unknown_workload_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        Workload.read("chats")
    assert "chat" in (caught.value.hint or "")


@st.composite
def lengths(draw: st.DrawFn) -> Lengths:
    kind = draw(st.sampled_from(["constant", "uniform", "normal", "lognormal"]))
    low = draw(st.integers(1, 500))
    high = draw(st.integers(low, 5000))
    mean, sd = draw(st.floats(1, 5000)), draw(st.floats(0, 5000))
    if kind == "constant":
        return Lengths("constant", mean=mean)
    if kind == "uniform":
        return Lengths("uniform", min=low, max=high)
    return Lengths(kind, mean=mean, sd=sd, min=low, max=high)  # type: ignore[arg-type]


@given(lengths(), st.integers())
def test_draws_stay_within_the_limits_and_repeat(lengths: Lengths, seed: int) -> None:
    drawn = [lengths.draw(rng) for rng in [Random(seed)] for _ in range(20)]
    assert all(lengths.least <= value <= (lengths.max or value) for value in drawn)
    assert drawn == [lengths.draw(rng) for rng in [Random(seed)] for _ in range(20)]


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_mean_and_deviation_are_those_of_the_draws(kind: str) -> None:
    lengths = Lengths(kind, mean=300, sd=60)  # type: ignore[arg-type]
    rng = Random(1)
    drawn = [lengths.draw(rng) for _ in range(20_000)]
    assert statistics.mean(drawn) == pytest.approx(300, rel=0.01)
    assert statistics.pstdev(drawn) == pytest.approx(60, rel=0.03)


def test_requests_depend_on_the_seed_and_not_on_their_number() -> None:
    workload = Workload.read("chat")
    few, _ = replace(workload, num_requests=10).sizes(None)
    many, _ = replace(workload, num_requests=40).sizes(None)
    other, _ = replace(workload, num_requests=10, seed=1).sizes(None)
    assert many[:10] == few
    assert other != few
    assert workload.with_load(rate=3).sizes(None) == workload.sizes(None)


def test_clipping_keeps_the_output_and_is_counted(tmp_path: Path) -> None:
    workload = Workload.read(write(tmp_path, MINIMAL))
    whole, none = workload.sizes(28)
    clipped, count = workload.sizes(20)
    assert none == 0
    assert clipped == [Size(min(size.input_len, 12), 8) for size in whole]
    assert count == sum(size.input_len > 12 for size in whole) > 0
    assert workload.sizes(5)[0] == [Size(1, 4)] * 5


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 3.0])
def test_open_loop_has_the_rate_and_burstiness_it_says(burstiness: float) -> None:
    times = Arrivals(rate=5, burstiness=burstiness).offsets(20_000, seed=0)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(burstiness, rel=0.05, abs=1e-6)


def test_timetable_repeats_and_depends_on_the_seed() -> None:
    arrivals = Arrivals(rate=5)
    assert arrivals.offsets(30, seed=7) == arrivals.offsets(30, seed=7) != arrivals.offsets(30, seed=8)


@pytest.mark.parametrize("burstiness", [0.0, 1.0, 13.2, 100.0])
@pytest.mark.parametrize("count", [2, 48])
def test_every_run_offers_the_rate_it_names(burstiness: float, count: int) -> None:
    for seed in range(20):
        times = Arrivals(rate=4, burstiness=burstiness).offsets(count, seed)
        assert len(times) == count
        assert times == sorted(times)
        assert (times[0], times[-1]) == (0, pytest.approx((count - 1) / 4))
    assert Arrivals(rate=4, burstiness=burstiness).offsets(1, seed=0) == [0]


def test_a_closed_loop_is_made_long_enough_to_be_steady() -> None:
    workload = replace(Workload.read("decode"), num_requests=32)
    assert [workload.with_load(concurrency=count).steady().num_requests for count in (1, 8, 9, 32)] == [32, 32, 36, 128]
    assert workload.with_load(rate=3).steady().num_requests == 32
    assert workload.with_load(concurrency=16).rounds == 2
    assert workload.with_load(rate=3).rounds == float("inf")


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.0,100,10
2023-11-16 18:17:05.0,200,20
2023-11-16 18:17:07.5,300,30
"""


def test_a_trace_is_a_workload(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(TRACE)
    workload = Workload.read(tmp_path / "mine.csv")
    assert workload.name == "mine"
    assert workload.arrivals.label == "the trace, 1x as fast"
    assert workload.sizes(None) == ([Size(100, 10), Size(200, 20), Size(300, 30)], 0)
    assert workload.sizes(150) == ([Size(100, 10), Size(130, 20), Size(120, 30)], 2)
    assert workload.offsets() == [0, 2, 4.5]
    closed = workload.with_load(concurrency=2)
    assert closed.sizes(None) == workload.sizes(None)
    assert closed.offsets() == []
    assert len(workload.with_load(rate=1).offsets()) == 3


def test_a_workload_may_take_lengths_and_times_from_a_trace_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(TRACE)
    text = MINIMAL.replace("{kind: uniform, min: 10, max: 20}", "{kind: trace}").replace("{mean: 8}", "{kind: trace}")
    path = write(tmp_path, text.replace("concurrency: 2", "speed: 4").replace(": 5", ": 2") + "trace: mine.csv\n")
    workload = Workload.read(path)
    assert workload.sizes(None)[0] == [Size(100, 10), Size(200, 20)]
    assert workload.offsets() == [0, 0.5]


def test_text_without_times_is_asked_in_a_closed_loop(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 20}]
    (tmp_path / "talks.json").write_text(json.dumps([{"conversations": turns}] * 3))
    workload = Workload.read(tmp_path / "talks.json")
    assert workload.arrivals.concurrency == 8
    assert workload.sizes(None)[0] == [Size(10, 5)] * 3


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500ms,tpot=50ms", Slo(500, 50)),
        ("tpot=0.05s, e2e=10s", Slo(None, 50, 10_000)),
        ("ttft=2s@p99", Slo(2000, share=0.99)),
        ("chat", Slo(200, 50, share=0.99)),
        ("mlperf-llama2-70b-interactive", Slo(450, 40, share=0.99)),
    ],
)
def test_an_slo_is_a_list_of_limits_or_a_name(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo


@pytest.mark.parametrize(
    "text", ["ttft=500", "ttft=-5ms", "ttft=5ms,ttft=6ms", "itl=5ms", "ttft=5ms@", "ttft=5ms@p0", "ttft=5ms@p101", "="]
)
def test_a_wrong_slo_is_explained(text: str) -> None:
    with pytest.raises(UsageError, match="--slo") as caught:
        Slo.parse(text)
    assert "ttft=500ms" in (caught.value.hint or "")


def test_an_unknown_slo_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        Slo.parse("mlperf-llama-70b")
    assert "mlperf-llama2-70b" in (caught.value.hint or "")


def test_a_request_keeps_an_slo_within_every_limit() -> None:
    slo = Slo(ttft_ms=100, tpot_ms=10, e2e_ms=1000)
    assert slo.keeps(0.1, 0.01, 1.0)
    assert not any(slo.keeps(*times) for times in ((0.11, 0, 0), (0, 0.011, 0), (0, 0, 1.1)))
    assert all(slo.tpot_ms for slo in bundled_slos().values())
