"""Constrained answers on the real model: every answer matches, whatever the sampling, alone and in a batch."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from llmopt_cli.errors import UsageError
from llmopt_cli.runtime import AsyncEngine, Engine, FinishReason, SamplingParams
from llmopt_cli.runtime.request import Grammar
from llmopt_cli.spec.recipe import Batching

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.from_pretrained("demo", dtype="float32", device="cpu", batching=Batching(max_num_seqs=8))
    yield engine
    engine.check_integrity()
    engine.close()


def params(kind: Literal["json schema", "regex", "choice", "grammar"], text: str, **other: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 120, "temperature": 1.0, "seed": 1, **other}, grammar=Grammar(kind, text))


def test_answers_follow_their_grammars_side_by_side(engine: Engine) -> None:
    wanted = [
        params("json schema", json.dumps(SCHEMA)),
        params("regex", r"[A-Z][a-z]{2,8} was born in 1[0-9]{3}\."),
        params("choice", json.dumps(["yes", "no", 'perhaps "so"'])),
        params("grammar", 'start: ("ab" | "c")~3'),
        SamplingParams(max_tokens=10, ignore_eos=True),
    ]
    outputs = engine.generate(["It was"] * 5, wanted)
    record = json.loads(outputs[0].text)
    assert record.keys() == {"name", "age"}
    assert len(record["name"]) <= 12
    assert 0 <= record["age"] <= 99
    assert re.fullmatch(r"[A-Z][a-z]{2,8} was born in 1[0-9]{3}\.", outputs[1].text)
    assert outputs[2].text in ("yes", "no", 'perhaps "so"')
    assert re.fullmatch("(ab|c){3}", outputs[3].text)
    assert [output.finish_reason for output in outputs[:4]] == [FinishReason.STOP] * 4
    assert outputs[4].text == engine.generate(["It was"], wanted[4])[0].text


def test_a_grammar_that_never_ends_ends_with_its_request(engine: Engine) -> None:
    [output] = engine.generate(["It was"], params("regex", "(ha)*", max_tokens=9, logit_bias=((0, -100.0),)))
    assert output.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert re.fullmatch("(ha)*h?", output.text)


def test_an_answer_that_can_not_go_on_fails_alone(engine: Engine) -> None:
    allowed = engine.tokenizer.encode("z")[-1:]
    stuck = params("regex", "a+", allowed_token_ids=tuple(allowed))
    outputs = engine.generate(["It was"] * 2, [stuck, SamplingParams(max_tokens=5, ignore_eos=True)])
    assert outputs[0].finish_reason is FinishReason.ERROR
    assert len(outputs[1].token_ids) == 5


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "[0-9"),
        ("json schema", "{"),
        ("json schema", '{"type": "objekt"}'),
        ("choice", "[]"),
        ("grammar", "start"),
    ],
)
def test_a_wrong_grammar_is_refused_in_a_sentence(engine: Engine, kind: Any, text: str) -> None:
    with pytest.raises(UsageError, match=f"the {kind} is wrong"):
        engine.generate(["It was"], params(kind, text))
    assert not engine.has_work()


def test_streams_compile_their_grammars_off_the_loop(engine: Engine) -> None:
    async def work() -> str:
        async with AsyncEngine(engine) as running:
            with pytest.raises(UsageError, match="is wrong"):
                await anext(running.stream([5, 6], params("regex", "[0-9")))
            text = ""
            async for output in running.stream([5, 6], params("choice", '["left", "right"]')):
                text = output.text
            return text

    assert asyncio.run(work()) in ("left", "right")
