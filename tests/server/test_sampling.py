"""Sampling through the server, as the official client asks for it: what is drawn, how often, and what is told of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.request import Grammar
from llmopt_cli.server.logprobs import Worder
from llmopt_cli.server.protocol import ChatRequest, CompletionRequest
from llmopt_cli.spec.kv_policy import Selecting

pytestmark = pytest.mark.timeout(60)
PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "user", "content": "Where is his place?"}]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def all_blocks_come_back(server: Any) -> Iterator[None]:
    yield
    server.wait_for(lambda: server.metric("llmopt:num_requests_running") == 0)
    assert server.metric("llmopt:kv_cache_usage_perc") == 0


def complete(client: OpenAI, **fields: Any) -> Any:
    known = {"prompt", "max_tokens", "temperature", "seed", "n", "best_of", "logprobs", "echo", "logit_bias", "stream"}
    request: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    request |= {name: value for name, value in fields.items() if name in known}
    return client.completions.create(
        **request, extra_body={name: value for name, value in fields.items() if name not in known}
    )


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"200": 100}}, {"logit_bias": ((200, 100.0),)}),
        ({"allowed_token_ids": [200, 300]}, {"allowed_token_ids": (200, 300)}),
        ({"min_tokens": 12, "stop_token_ids": [13]}, {"min_tokens": 12, "stop_token_ids": (13,)}),
        ({"temperature": 1.0, "seed": 4, "min_p": 0.2}, {"temperature": 1.0, "seed": 4, "min_p": 0.2}),
        ({"temperature": 1.0, "seed": 4, "typical_p": 0.5}, {"temperature": 1.0, "seed": 4, "typical_p": 0.5}),
        ({"guided_regex": "[a-c]{5}"}, {"grammar": Grammar("regex", "[a-c]{5}")}),
    ],
    ids=lambda value: "-".join(value),
)
def test_every_field_means_what_it_means_to_the_engine(
    client: OpenAI, engine: Engine, fields: dict[str, Any], params: dict[str, Any]
) -> None:
    [expected] = engine.generate([PROMPT], SamplingParams(max_tokens=12, **params))
    assert complete(client, **fields).choices[0].text == expected.text


def test_n_answers_have_their_own_streams_and_share_one_prompt(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT) * 10
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    expected = [engine.generate([ids], params.child(index))[0] for index in range(4)]
    answer = client.completions.create(model="demo", prompt=ids, n=4, temperature=1, seed=5, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [output.text for output in expected]
    assert [choice.finish_reason for choice in answer.choices] == [output.finish_reason for output in expected]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in expected)
    again = client.completions.create(model="demo", prompt=ids, max_tokens=1)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (len(ids) - 1) // 16 * 16


def test_streamed_answers_are_the_whole_ones(client: OpenAI) -> None:
    request: Any = {"model": "demo", "messages": MESSAGES, "n": 3, "seed": 9, "max_tokens": 10}
    request |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**request)
    texts, reasons, told = [""] * 3, [None] * 3, [[], [], []]  # type: ignore[var-annotated]
    usage = None
    for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            assert reasons[choice.index] is None, "nothing comes after the end"
            reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
            told[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert told == [choice.logprobs.content for choice in whole.choices if choice.logprobs]
    assert usage == whole.usage


def test_the_best_of_several_answers_is_the_likeliest_per_token(client: OpenAI, engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, logprobs=0)
    drawn = [engine.generate([PROMPT], params.child(index))[0] for index in range(5)]
    ranked = sorted(drawn, key=lambda one: -math.fsum(t.logprob for t in one.logprobs) / len(one.logprobs))
    answer = complete(client, n=2, best_of=5, temperature=1, seed=5)
    assert [choice.text for choice in answer.choices] == [output.text for output in ranked[:2]]
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in drawn)


def test_a_request_keeps_what_it_says_of_its_cache(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT * 30)
    kept = SamplingParams(max_tokens=12, kv_policy=Selecting(budget=32, window=16))
    texts = [engine.generate([ids], params)[0].text for params in (kept, SamplingParams(max_tokens=12))]
    assert texts[0] != texts[1]
    answers = [complete(client, prompt=ids, kv_policy=text) for text in ("snapkv:budget=32,window=16", "none")]
    assert [answer.choices[0].text for answer in answers] == texts
    with pytest.raises(BadRequestError, match="budget 16 is below the window of 32") as caught:
        complete(client, kv_policy="snapkv:budget=16,window=32")
    assert caught.value.param == "kv_policy"


@pytest.mark.parametrize("stream", [False, True])
def test_beam_search(client: OpenAI, engine: Engine, stream: bool) -> None:
    [expected] = engine.generate([PROMPT], SamplingParams(max_tokens=12, beams=4, length_penalty=0.5))
    fields = {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0.5}
    answer = complete(client, **fields, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert [choice.text for choice in choices] == [beam.text for beam in expected.beams[:2]]
    assert [choice.finish_reason for choice in choices] == [beam.finish_reason for beam in expected.beams[:2]]
    assert [choice.index for choice in choices] == [0, 1]


def test_logprobs_of_a_chat_are_the_engines(client: OpenAI, engine: Engine) -> None:
    [expected] = engine.generate([engine.tokenizer.chat(MESSAGES)], SamplingParams(max_tokens=10, logprobs=3))
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    assert [len(one.top_logprobs) for one in choice.logprobs.content] == [3] * len(expected.token_ids)
    spelled = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert spelled.decode().removesuffix("<|end_of_turn|>") == choice.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_told_of_like_the_answer_and_every_offset_fits(client: OpenAI, stream: bool) -> None:
    answer = complete(client, echo=True, logprobs=2, max_tokens=6, stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for name, values in told.items():
            values.extend(getattr(choice.logprobs, name))
    assert text.startswith(PROMPT)
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert all(len(top) in (2, 3) for top in told["top_logprobs"][1:])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert text[offset:].startswith(token)


def test_an_echo_without_an_answer_scores_a_text(client: OpenAI, engine: Engine) -> None:
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    [scored] = engine.generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert answer.choices[0].text == PROMPT
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        [one.logprob for one in scored.prompt_logprobs or ()], abs=1e-4
    )
    assert answer.usage.completion_tokens == 0


def test_prompt_logprobs_are_told_by_token_id(client: OpenAI, server: Any, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    told = complete(client, prompt_logprobs=1).choices[0].model_dump()["prompt_logprobs"]
    assert told[0] is None
    assert [str(token) in position for token, position in zip(ids[1:], told[1:], strict=True)] == [True] * len(told[1:])
    assert {entry["rank"] >= 1 for position in told[1:] for entry in position.values()} == {True}
    chat = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == len(engine.tokenizer.chat(MESSAGES))


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, r"\{.*\}"),
        ({"structured_outputs": {"json": SCHEMA}}, r"\{.*\}"),
        ({"guided_json": json.dumps(SCHEMA)}, r"\{.*\}"),
        ({"structured_outputs": {"regex": "x[0-9]{3}"}}, "x[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "ab"~3'}, "ababab"),
    ],
    ids=lambda value: next(iter(value)),
)
def test_answers_follow_what_is_asked_for(client: OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=1, max_tokens=60, n=2, extra_body=fields
    )
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.message.content or "")
        if pattern.startswith(r"\{"):
            assert 0 <= json.loads(choice.message.content or "")["age"] <= 99


def test_any_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=40, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "use_beam_search": True}, "guided_regex"),
        ({"use_beam_search": True, "n": 2, "seed": 5}, "seed"),
        ({"use_beam_search": True, "n": 2, "temperature": 0.5}, "temperature"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"priority": 1}, "priority"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_p": 1.5}, "min_p"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"timeout": 0}, "timeout"),
        ({"n": 600}, "n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_contradicts_itself_is_refused_by_its_name(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param
    assert param.rpartition(".")[2] in caught.value.message


def test_a_wrong_schema_is_told_in_a_sentence(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="the regex is wrong"):
        complete(client, guided_regex="(")


def test_a_request_that_fails_says_why_and_leaves_others_alone(server: Any, client: OpenAI) -> None:
    late = server.post("/v1/completions", prompt=PROMPT, max_tokens=2000, ignore_eos=True, timeout=0.05, n=2)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")
    stuck = server.post("/v1/completions", prompt=PROMPT, guided_regex="a+", allowed_token_ids=[300])
    assert (stuck.status_code, stuck.json()["error"]["code"]) == (400, "no_token_left")
    events = server.post(
        "/v1/completions", prompt=PROMPT, max_tokens=2000, ignore_eos=True, timeout=0.2, stream=True
    ).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert events[-2] == "data: [DONE]"
    assert complete(client).choices[0].finish_reason == "length"


def test_tokens_are_told_with_their_bytes_and_characters_where_they_begin(engine: Engine) -> None:
    text = "Ünïcode 世界 🙂 end"
    ids = engine.tokenizer.encode(text)
    worder = Worder(engine.tokenizer)
    assert b"".join(engine.tokenizer.token_bytes(token) for token in ids).decode() == text
    assert worder.length(ids) == len(text)
    for token, offset in zip(ids, worder.offsets(ids, 0), strict=True):
        spelled = engine.tokenizer.token_bytes(token)
        assert spelled in text[offset:].encode()[: len(spelled) + 3]
    assert worder.length([*engine.tokenizer.eos_ids]) == 0


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_the_readme_lists_every_field(kind: type[ChatRequest | CompletionRequest]) -> None:
    listed = re.search(r"<!-- fields -->(.*?)<!-- /fields -->", README, flags=re.DOTALL)
    assert listed
    assert {name for name in kind.served() if f"`{name}`" not in listed[1]} == set()
    named = set(re.findall(r"`(\w+)`", listed[1]))
    assert named <= ChatRequest.served() | CompletionRequest.served()
