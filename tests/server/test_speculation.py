"""A server that drafts: the same answers, in fewer steps, and metrics that say how it went."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from llmopt_cli.bench.drafts import FIELDS, Totals
from llmopt_cli.bench.http_target import HttpTarget
from llmopt_cli.runtime import Engine, SamplingParams

PROMPT = "one two three four one two three four one two three"
ASKED = {"prompt": PROMPT, "max_tokens": 48, "temperature": 0, "ignore_eos": True}


async def counted(url: str) -> Totals | None:
    async with HttpTarget(url) as target:
        return await target.drafted()


def test_a_server_with_drafts_answers_as_an_engine_without_and_counts_them(
    start_server: Callable[..., Any], engine: Engine
) -> None:
    config = {"method": "draft_model", "model": "demo-draft", "num_speculative_tokens": 3, "adaptive": False}
    server = start_server("--speculative-config", json.dumps(config))
    [expected] = engine.generate(PROMPT, SamplingParams(max_tokens=48, ignore_eos=True))
    body = ASKED | {"model": server.report["model"]}
    server.post("/v1/completions", **(body | {"max_tokens": 2}))  # the last token has no draft: what it takes is known
    events = server.post("/v1/completions", **body, stream=True).text.splitlines()
    pieces = [json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith("data: {")]
    assert "".join(pieces) == expected.text
    answer = server.post("/v1/completions", **body).json()
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == 48
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted
    first = server.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total", position="0")
    assert 0 < first <= server.metric("vllm:spec_decode_num_drafts_total")
    assert 1 < server.metric("llmopt:spec_decode_acceptance_length") < 4
    told = asyncio.run(counted(server.url))
    assert told
    assert (told["tokens"], told["accepted"]) == (drafted, accepted)
    assert told.keys() == set(FIELDS)
    assert server.metric("llmopt:spec_decode_speedup") > 0
    assert server.stop() == 0
