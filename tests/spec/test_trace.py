"""Traces: every format is told by its content, read whole, and a mistake is reported with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmopt_cli.errors import TraceError
from llmopt_cli.spec import trace as module
from llmopt_cli.spec.trace import TracedRequest, read_trace

TRACES = Path(__file__).resolve().parents[2] / "../shared/data/traces"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9799600,4808,10
2023-11-17 00:00:00.4799601,3180,8
"""
MOONCAKE = """{"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 2750, "input_length": 700, "output_length": 9, "hash_ids": [0, 3]}
"""
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""
SHARE_GPT: list[dict[str, Any]] = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 41}, {"from": "gpt", "value": "y" * 8}]},
    {"id": "b", "conversations": [{"from": "human", "value": "nobody answers"}]},
    {"id": "c", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "\u00e9]}{["}]},
]


def write(folder: Path, text: str) -> str:
    path = folder / "trace.any"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "name", "requests", "left_out"),
    [
        (AZURE, "Azure", [TracedRequest(0, 4808, 10), TracedRequest(0.5, 3180, 8)], 0),
        (MOONCAKE, "Mooncake", [TracedRequest(0, 1100, 5, (0, 1, 2)), TracedRequest(2.25, 700, 9, (0, 3))], 0),
        (BURST_GPT, "BurstGPT", [TracedRequest(0, 472, 18), TracedRequest(113, 417, 276)], 1),
        (json.dumps(SHARE_GPT), "ShareGPT", [TracedRequest(0, 11, 2), TracedRequest(0, 1, 2)], 1),
        (json.dumps(SHARE_GPT, indent=2), "ShareGPT", [TracedRequest(0, 11, 2), TracedRequest(0, 1, 2)], 1),
        ("\n".join(map(json.dumps, SHARE_GPT)), "ShareGPT", [TracedRequest(0, 11, 2), TracedRequest(0, 1, 2)], 1),
    ],
)
def test_a_trace_is_known_by_its_content(
    tmp_path: Path, text: str, name: str, requests: list[TracedRequest], left_out: int
) -> None:
    trace = read_trace(write(tmp_path, text))
    assert trace.format.startswith(name)
    assert [one._replace(at=round(one.at, 5)) for one in trace.requests] == requests
    assert trace.left_out == left_out
    assert trace.timed == (name != "ShareGPT")
    assert trace.hashed == (name == "Mooncake")


def test_sharegpt_says_how_tokens_were_counted(tmp_path: Path) -> None:
    assert "4 characters taken for a token" in read_trace(write(tmp_path, json.dumps(SHARE_GPT))).format


@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "  " + json.dumps(SHARE_GPT, indent=1))
    whole = read_trace(path)
    monkeypatch.setattr(module, "CHUNK", size)
    read_trace.cache_clear()
    assert read_trace(path) == whole


def test_requests_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    first, second = MOONCAKE.splitlines()
    trace = read_trace(write(tmp_path, f"{second}\n\n{first}\n"))
    assert [one.input_len for one in trace.requests] == [1100, 700]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ("a,b\n1,2\n", "no known format"),
        ("[1, 2]", "no known format"),
        ('{"prompt": "x"}', "no known format"),
        (AZURE.replace("3180", "many"), "line 3 is no request of a Azure.*'many'"),
        (AZURE.replace(",8\n", "\n"), "line 3 is no request"),
        (AZURE.replace("2023-11-17", "yesterday"), "line 3 is no request.*isoformat"),
        (AZURE.replace("3180", "-3"), "line 3: .*not negative"),
        (BURST_GPT.replace("118", "nan"), "line 4: times must be finite"),
        (MOONCAKE.replace("2750", '"x"'), "line 2 is no request"),
        (MOONCAKE + "{", "line 3 is not JSON"),
        (MOONCAKE.replace('"output_length": 9', '"output": 9'), "line 2 is no request.*output_length"),
        (json.dumps(SHARE_GPT)[:-1], "entry 4 is not JSON"),
        (json.dumps([*SHARE_GPT, {"conversations": 3}]), "entry 4 is no request"),
        (BURST_GPT.replace("18,", "0,").replace("276,", "0,"), "no request that was answered"),
    ],
)
def test_a_mistake_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read trace"):
        read_trace(str(tmp_path / "missing.csv"))
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(TraceError, match="cannot read trace"):
        read_trace(str(tmp_path / "binary.csv"))


@pytest.mark.parametrize(
    ("name", "count", "seconds", "tokens"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 3501.7, 4_088_665),
        ("AzureLLMInferenceTrace_code.csv", 8_819, 3435.9, 245_896),
        ("mooncake_conversation_trace.jsonl", 12_031, 3537.0, 4_122_048),
    ],
)
def test_published_traces_are_read_whole(name: str, count: int, seconds: float, tokens: int) -> None:
    if not TRACES.is_dir():
        pytest.skip("the traces are not at hand")
    trace = read_trace(str(TRACES / name))
    assert len(trace.requests) == count
    assert trace.left_out == 0
    assert trace.requests[-1].at == pytest.approx(seconds, abs=0.1)
    assert sum(one.output_len for one in trace.requests) == tokens
