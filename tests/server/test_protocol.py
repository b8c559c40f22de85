"""Request bodies: what is let through, what is refused, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from pydantic import ValidationError

from llmopt_cli.errors import CapacityError, ServerError, UsageError
from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.server.body import HARMLESS
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.protocol import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "hello"}]


def refusal(kind: type[ChatRequest | CompletionRequest], body: Any) -> ApiError:
    """The error a client would get for `body`."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return ApiError.of_validation(caught.value.errors())


@pytest.mark.parametrize(("kind", "official"), [(ChatRequest, ChatParams), (CompletionRequest, TextParams)])
def test_every_field_of_the_official_client_is_served_harmless_or_refused_by_name(kind: Any, official: Any) -> None:
    known = {*kind.model_fields, *kind.unserved, *HARMLESS}
    assert set(official.__annotations__) <= known


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_the_three_lots_of_fields_do_not_overlap(kind: Any) -> None:
    assert not set(kind.model_fields) & set(kind.unserved)
    assert not set(kind.model_fields) & HARMLESS
    assert not set(kind.unserved) & HARMLESS


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_what_is_not_served_is_refused_unless_it_asks_for_nothing(kind: Any) -> None:
    base = {"messages": MESSAGES} if kind is ChatRequest else {"prompt": "hello"}
    for name, neutral in kind.unserved.items():
        error = refusal(kind, base | {name: "surely not neutral"})
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
        for value in (None, *neutral):
            kind.model_validate(base | {name: value})


def test_null_means_not_given() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_tokens"))
    assert ChatRequest.model_validate({"messages": MESSAGES} | nulls) == ChatRequest(messages=MESSAGES)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [*MESSAGES, {"role": "user", "contents": "x"}]}, "messages[1].contents"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": MESSAGES, "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": MESSAGES, "max_tokens": 5.5}, "max_tokens"),
        ({"messages": MESSAGES, "stream": "yes"}, "stream"),
        ({"messages": MESSAGES, "stop": [1]}, "stop[0]"),
        ({"messages": MESSAGES, "stop": ["a", "b" * 1001]}, "stop[1]"),
        ({"messages": MESSAGES, "stop": ["a"] * 17}, "stop"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content[0].text"),
        ({"messages": MESSAGES, "{odd}": 1}, "{odd}"),
    ],
)
def test_an_error_names_the_field_by_its_path(body: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, body)
    assert error.status == 400
    assert error.param == param
    assert param.rpartition(".")[2] in error.message


@pytest.mark.parametrize("body", [None, 5, "text", [1]])
def test_a_body_that_is_no_object_is_told_so(body: Any) -> None:
    assert "JSON object" in refusal(ChatRequest, body).message


@pytest.mark.parametrize("prompt", [5, [], [[]], [1.5], [True], ["a", 5], [["a"]], {}, [1, "a"]])
def test_a_prompt_of_another_form_is_refused(prompt: Any) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_every_form_of_prompt_becomes_a_list(prompt: Any, expected: Any) -> None:
    assert CompletionRequest(prompt=prompt).prompt == expected


def test_sampling_carries_every_parameter() -> None:
    body = CompletionRequest(
        prompt="a", temperature=0.5, top_p=0.9, top_k=7, seed=3, stop="x", stop_token_ids=[4], ignore_eos=True
    )
    assert body.sampling(9) == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        seed=3,
        stop=("x",),
        stop_token_ids=(4,),
        ignore_eos=True,
    )


def test_stop_may_hold_sixteen_strings_of_a_thousand_characters() -> None:
    assert CompletionRequest(prompt="a", stop="b" * 1000).stop == ["b" * 1000]
    assert len(CompletionRequest(prompt="a", stop=["b"] * 16).stop) == 16


def test_the_defaults_are_those_of_the_api() -> None:
    assert CompletionRequest(prompt="a").sampling(16) == SamplingParams(max_tokens=16, temperature=1.0)
    assert CompletionRequest(prompt="a").limit == 16
    assert ChatRequest(messages=MESSAGES).limit is None
    assert ChatRequest(messages=MESSAGES, max_completion_tokens=8).limit == 8


@given(
    temperature=st.floats(),
    top_p=st.floats(),
    top_k=st.integers(),
    seed=st.integers(),
    max_tokens=st.integers(),
    stop=st.lists(st.text(max_size=3), max_size=3),
)
def test_any_numbers_are_sampled_or_refused(max_tokens: int, **values: Any) -> None:
    try:
        params = CompletionRequest.model_validate({"prompt": "a"} | values).sampling(max_tokens)
    except ValidationError as invalid:
        error = ApiError.of_validation(invalid.errors())
    except ApiError as refused:
        error = refused
    else:
        assert (params.temperature, params.top_p, params.seed) == tuple(
            values[k] for k in ("temperature", "top_p", "seed")
        )
        return
    assert error.status == 400
    assert error.param in {*values, "max_tokens"}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (UsageError("odd"), 400, "invalid_request_error"),
        (CapacityError("long"), 400, "invalid_request_error"),
        (ServerError("dead"), 500, "server_error"),
    ],
)
def test_the_engine_s_errors_keep_their_words(error: Any, status: int, kind: str) -> None:
    answer = ApiError.of(error)
    assert answer.status == status
    assert answer.body()["error"] | {"code": None} == {
        "message": error.message,
        "type": kind,
        "param": None,
        "code": None,
    }
