"""Views of estimates: every figure is JSON with its unit, and what people see says the same."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from llmopt_cli.errors import LlmoptError, UsageError
from llmopt_cli.estimate.advice import advise
from llmopt_cli.estimate.bill import bill
from llmopt_cli.estimate.compare import Comparison, compare
from llmopt_cli.estimate.cost import ApiPrice
from llmopt_cli.estimate.deployment import wanted
from llmopt_cli.estimate.ladder import ladder
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.pareto import Picture, picture
from llmopt_cli.estimate.plan import Plan, answer
from llmopt_cli.estimate.precision import speedups
from llmopt_cli.estimate.question import ask
from llmopt_cli.spec.workload import Slo
from llmopt_cli.views import advice as advice_view
from llmopt_cli.views import compare as compare_view
from llmopt_cli.views import cost as cost_view
from llmopt_cli.views import ladder as ladder_view
from llmopt_cli.views import pareto as pareto_view
from llmopt_cli.views import plot

LOAD = Load.fixed(32, 1024, 256)


def planned(model: str = "70b", gpu: str = "a100x2") -> Plan:
    return answer(ask(wanted(None, model=model, gpu=gpu), LOAD))


def compared() -> Comparison:
    return compare(wanted(None, model="8b", gpu="h100"), LOAD, Slo(tpot_ms=50))


def text(parts: Sequence[RenderableType]) -> str:
    console = Console(file=StringIO(), width=300)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_bill_names_prices_and_the_verdict_on_the_api() -> None:
    found = bill(planned("8b", "h100x1"), Slo(), requests_per_day=5000, api=ApiPrice(0.5, 1.5))
    assert found
    as_json = json.loads(json.dumps(cost_view.data(found), allow_nan=False))
    rates = as_json["given_load"]
    per_request = 1024 * rates["usd_per_1m_input_tokens"] + 256 * rates["usd_per_1m_output_tokens"]
    assert per_request / 1e6 == pytest.approx(rates["usd_per_request"])
    assert rates["spot"]["usd_per_request"] < rates["usd_per_request"]
    assert as_json["asked_day"]["requests"] == 5000
    shown = text(cost_view.render(found))
    assert "32 at once, spot" in shown
    assert "Own GPUs win from" in shown
    assert re.search(r"low end of the range 1\.99-5\.50", shown)


def test_a_bill_without_a_good_load_says_so() -> None:
    found = bill(planned("8b", "h100x1"), Slo(tpot_ms=0.1))
    assert found
    assert cost_view.data(found)["best_load"] is None
    assert "no load keeps to them" in text(cost_view.render(found))


@pytest.mark.parametrize(
    ("value", "written"), [(0, "$0.00"), (0.000294, "$0.000294"), (2.4, "$2.40"), (11760, "$11,760.00"), (None, "-")]
)
def test_money_is_written_as_money(value: float | None, written: str) -> None:
    assert cost_view.usd(value) == written


def test_advice_shows_what_each_change_gives() -> None:
    plan = planned()
    found, rows = advise(plan, Slo()), speedups(plan.fits[-1].on, LOAD)
    as_json = json.loads(json.dumps(advice_view.data(found, rows), allow_nan=False))
    assert as_json["goal"] == "fit"
    gained = as_json["changes"][0]["kv_bytes_per_gpu_gained"]
    assert as_json["changes"][0]["kv_bytes_per_gpu"] - as_json["now"]["kv_bytes_per_gpu"] == pytest.approx(gained)
    shown = text(advice_view.render(found, rows))
    assert "--scheme awq" in shown
    assert f"({gained / 1024**3:+,.1f})" in shown
    assert "batch 256" in shown


def test_advice_without_any_says_what_else_to_try() -> None:
    plan = planned("8b", "h100x1")
    shown = text(advice_view.render(advise(plan, Slo(ttft_ms=0.001)), ()))
    assert "No single change keeps to the limits" in shown


def test_a_comparison_shows_the_best_and_counts_the_rest() -> None:
    found = compared()
    as_json = json.loads(json.dumps(compare_view.data(found, 3), allow_nan=False))
    assert len(as_json["ranked"]) == 3
    assert as_json["weighed"] >= as_json["hold_a_request"] > 3
    assert as_json["cheapest"]["meets_slo"]
    shown = text(compare_view.render(found, 3))
    assert "the best 3 of" in shown
    assert "Cheapest that holds the load" in shown


def test_an_empty_comparison_says_so() -> None:
    at_rate = compare(wanted(None, model="8b", gpu="h100"), LOAD, Slo(), rate=2.5)
    assert "2.5 requests a second" in text(compare_view.render(at_rate, 3))
    assert compare_view.data(at_rate, 3)["requests_per_s"] == 2.5
    found = compare(wanted(None, model="405b", gpu="t4"), LOAD, Slo())
    assert "holds Llama-3.1-405B" in text(compare_view.render(found, 5))
    assert compare_view.data(found, 5)["cheapest"] is None


def test_a_ladder_shows_its_reasons_and_the_claims() -> None:
    found = ladder(ask(wanted(None, model="70b", gpu="h100"), LOAD))
    as_json = json.loads(json.dumps(ladder_view.data(found), allow_nan=False))
    assert [rung["name"] for rung in as_json["rungs"]] == [rung.name for rung in found.rungs]
    shown = text(ladder_view.render(found))
    assert "not measured here" in shown
    assert all(rung.reason in shown for rung in found.rungs)


def test_the_scatter_marks_each_stretch_of_the_frontier() -> None:
    found = picture(compared())
    drawn = pareto_view.scatter(found)
    letters = [letter for letter, _ in pareto_view.legend(found)]
    plotted = "".join(line.partition("|")[2] for line in drawn.splitlines())
    assert set(plotted) - set(" ·") <= set(letters)
    assert len(set(plotted) - set(" ·")) > len(letters) / 2  # the others lie in the same places
    assert drawn.splitlines()[0].count("output tokens/s") == 2
    shown = text(pareto_view.render(found))
    assert all(points[0].name in shown for _, points in pareto_view.legend(found))
    as_json = json.loads(json.dumps(pareto_view.data(found), allow_nan=False))
    assert len(as_json["frontier"]) == len(found.frontier)


def test_a_scale_is_logarithmic_and_ticked_within() -> None:
    scale = pareto_view.Scale(0.9, 110)
    assert scale.at(0.9) == 0
    assert scale.at(110) == pytest.approx(1)
    assert scale.ticks == pytest.approx([1, 2, 5, 10, 20, 50, 100])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag != "script"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    found, file = picture(compared(), "cost"), tmp_path / "frontier.html"
    plot.save(found, file, "8b <on> h100 & others")
    page = file.read_text("utf-8")
    tags = _Tags()
    tags.feed(re.sub(r"<(\w+)([^<>]*)/>", r"<\1\2></\1>", page))
    assert tags.open == []
    assert tags.links == []
    assert "8b &lt;on&gt; h100 &amp; others" in page
    drawing = ElementTree.fromstring(plot.svg(found))
    circles = drawing.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(found.points) + len(found.frontier)


def test_a_png_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing a PNG needs the extra `plot`")
    file = tmp_path / "frontier.png"
    plot.save(picture(compared()), file, "8b")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.png"]


def test_without_matplotlib_the_hint_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(LlmoptError, match="needs matplotlib") as raised:
        plot.save(picture(compared()), tmp_path / "frontier.png", "8b")
    assert raised.value.hint
    assert "llmopt[plot]" in raised.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"), [("frontier.gif", "cannot draw"), ("missing/frontier.html", "cannot write")]
)
def test_a_file_that_cannot_be_drawn_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plot.save(picture(compared()), tmp_path / name, "8b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [pareto_view.scatter, plot.svg])
def test_the_same_picture_is_drawn_the_same(draw: Callable[[Picture], str]) -> None:
    assert draw(picture(compared())) == draw(picture(compared()))
