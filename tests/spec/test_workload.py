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

from llmopt_cli.errors import ConfigFileError, UnknownNameError
from llmopt_cli.spec.workload import Arrivals, Lengths, Size, Workload
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
