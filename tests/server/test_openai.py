"""The server, as the official client and a plain HTTP client see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from llmopt_cli import __version__
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.server.guard import MAX_BODY_BYTES

pytestmark = pytest.mark.timeout(60)
PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is his place?"}]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def streamed_text(client: OpenAI, **request: Any) -> tuple[str, str | None]:
    """Text and finish reason of a streamed completion."""
    text, reason = "", None
    for chunk in client.completions.create(model="demo", stream=True, **request):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def test_the_model_is_listed_and_found_by_name(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "demo"
    assert card.model_dump()["max_model_len"] == 2048
    assert client.models.retrieve("demo") == card
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")


def test_greedy_completion_equals_the_engine(client: OpenAI, engine: Engine) -> None:
    (expected,) = engine.generate(PROMPT, SamplingParams(max_tokens=40))
    answer = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=40)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == expected.num_prompt_tokens + len(expected.token_ids)


def test_greedy_chat_equals_the_engine_on_the_template(client: OpenAI, engine: Engine) -> None:
    prompt = engine.tokenizer.chat(MESSAGES)
    (expected,) = engine.generate([prompt], SamplingParams(max_tokens=40))
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=40)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(expected.token_ids))


def test_content_parts_and_developer_role_mean_the_plain_conversation(client: OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Where is his place?"},
    ]
    answers = [
        client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=12)
        for messages in (MESSAGES, parts)
    ]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage


def test_a_chat_without_limit_may_fill_the_context(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "the sea " * 1000}]
    answer = client.chat.completions.create(model="demo", messages=messages, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2048


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_streamed_chat_equals_the_whole(client: OpenAI, temperature: float) -> None:
    request: Any = {"model": "demo", "messages": MESSAGES, "temperature": temperature, "seed": 7, "max_tokens": 50}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in body)


def test_streamed_completion_equals_the_whole(client: OpenAI) -> None:
    request = {"prompt": PROMPT, "temperature": 1.2, "top_p": 0.95, "seed": 3, "max_tokens": 60}
    whole = client.completions.create(model="demo", **request).choices[0]
    assert streamed_text(client, **request) == (whole.text, whole.finish_reason)


def test_continuous_usage_counts_every_token(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=9, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 9


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    texts = [
        client.completions.create(model="demo", prompt=PROMPT, temperature=1, seed=seed, max_tokens=30).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_never_leak(client: OpenAI, stream: bool) -> None:
    free = client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=40).choices[0].text
    stop = free[20:27]
    request = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stop": ["never in there", stop]}
    if stream:
        text, reason = streamed_text(client, **request)
    else:
        choice = client.completions.create(model="demo", **request).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert text == free[: free.index(stop)]
    assert reason == "stop"


def test_stop_token_ids_end_the_text(client: OpenAI, engine: Engine) -> None:
    (free,) = engine.generate(PROMPT, SamplingParams(max_tokens=20))
    answer = client.completions.create(
        model="demo",
        prompt=PROMPT,
        temperature=0,
        max_tokens=20,
        extra_body={"stop_token_ids": [free.token_ids[5]]},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == free.token_ids.index(free.token_ids[5]) + 1


def test_top_k_one_is_greedy_and_minus_one_is_off(client: OpenAI) -> None:
    def text(**extra: Any) -> str:
        request: Any = {"model": "demo", "prompt": PROMPT, "seed": 5, "max_tokens": 20}
        return client.completions.create(**request, **extra).choices[0].text

    assert text(temperature=1.5, extra_body={"top_k": 1}) == text(temperature=0)
    assert text(temperature=1.5, extra_body={"top_k": -1}) == text(temperature=1.5)


def test_every_form_of_prompt(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)

    def answer(prompt: Any) -> Any:
        return client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=10)

    one = answer(PROMPT)
    assert answer(ids).choices == one.choices
    for several in (answer([PROMPT, "The ship"]), answer([ids, engine.tokenizer.encode("The ship")])):
        assert [choice.index for choice in several.choices] == [0, 1]
        assert several.choices[0].text == one.choices[0].text
        assert several.choices[1].text == answer("The ship").choices[0].text
        assert several.usage.completion_tokens == 20


def test_streams_of_several_prompts_keep_apart(client: OpenAI) -> None:
    prompts = [PROMPT, "The ship", "My lord"]
    request: Any = {"model": "demo", "prompt": prompts, "temperature": 0, "max_tokens": 15}
    whole = client.completions.create(**request)
    texts = [""] * 3
    usage = None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage == whole.usage


def test_echo_puts_the_prompt_first(client: OpenAI) -> None:
    request: Any = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    plain = client.completions.create(model="demo", **request).choices[0].text
    assert client.completions.create(model="demo", echo=True, **request).choices[0].text == PROMPT + plain
    assert streamed_text(client, echo=True, **request)[0] == PROMPT + plain


def test_eight_streams_at_once_equal_each_alone(client: OpenAI) -> None:
    prompts = [f"{word} is" for word in ("The", "My", "His", "Her", "This", "That", "Our", "Love")]

    def ask(prompt: str) -> str:
        return streamed_text(client, prompt=prompt, temperature=0, max_tokens=40)[0]

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("reasoning_effort", "low"),
        ("top_logprobs", 2),
        ("logit_bias", {"five": 1}),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("best_of", 129),
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("stop", [""]),
        ("seed", 2**70),
        ("messages", []),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(server: Any, field: str, value: Any) -> None:
    answer = server.post("/v1/chat/completions", **{"messages": MESSAGES, field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]


def test_an_unknown_field_is_refused_with_the_nearest(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="nearest: `temperature`") as caught:
        client.completions.create(model="demo", prompt=PROMPT, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"


def test_harmless_fields_and_neutral_values_are_accepted(server: Any) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "logit_bias": {}, "presence_penalty": 0}
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=1, temperature=None, **harmless)
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(client: OpenAI, stream: bool) -> None:
    with pytest.raises(BadRequestError, match=r"2,500 tokens.*2,048") as caught:
        client.completions.create(model="demo", prompt=[9] * 2500, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_more_tokens_than_there_is_room_for_are_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"2048.*2000.*100") as caught:
        client.completions.create(model="demo", prompt=[9] * 2000, max_tokens=100)
    assert caught.value.param == "max_tokens"


def test_a_token_outside_the_vocabulary_and_an_empty_prompt_are_refused(client: OpenAI) -> None:
    for prompt in ([5000], [-1], [2**70]):
        with pytest.raises(BadRequestError, match="vocabulary"):
            client.completions.create(model="demo", prompt=prompt)
    with pytest.raises(BadRequestError, match="prompt"):
        client.completions.create(model="demo", prompt=[])


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="`demo`") as caught:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b'"text"', b'{"prompt": NaN}', b"\xff"])
def test_a_damaged_body_is_a_400(server: Any, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_a_413(server: Any, chunked: bool) -> None:
    content = json.dumps({"prompt": "a" * MAX_BODY_BYTES}).encode()
    headers = {"Content-Type": "application/json"}
    with httpx.Client(headers=headers, timeout=30) as client:
        answer = client.post(f"{server.url}/v1/completions", content=iter([content]) if chunked else content)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert f"larger than {MAX_BODY_BYTES:,} bytes" in answer.json()["error"]["message"]
        assert client.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "body", [{"prompt": "\ud800"}, {"model": "\ud800", "prompt": "a"}, {"prompt": "a", "\ud800": 1}]
)
def test_half_a_surrogate_pair_is_an_error_of_the_client(server: Any, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == (404 if "model" in body else 400)


def test_an_unknown_route_answers_in_the_same_shape(server: Any) -> None:
    assert server.get("/v1/nope").json()["error"]["message"].startswith("GET /v1/nope")
    assert server.get("/v1/completions").status_code == 405


def test_probes_and_schema(server: Any) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200
    assert server.get("/version").json() == {"version": __version__}
    assert "/v1/chat/completions" in server.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(server: Any, stream: bool) -> None:
    aborted = server.metric("llmopt:request_success_total", finished_reason="abort")
    body = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    generated = server.metric("llmopt:generation_tokens_total")
    with httpx.Client(timeout=1) as impatient:
        if stream:
            with impatient.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                impatient.post(f"{server.url}/v1/completions", json=body)
    server.wait_for(lambda: server.metric("llmopt:num_requests_running") == 0)
    server.wait_for(
        lambda: server.metric("llmopt:request_success_total", finished_reason="abort") == aborted + 1, seconds=5
    )
    assert server.metric("llmopt:generation_tokens_total") - generated < 2000
    assert server.metric("llmopt:kv_cache_usage_perc") == 0


def test_metrics_count_what_was_asked(server: Any) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_generation_tokens_sum",
    )
    before = {name: server.metric(f"llmopt:{name}") for name in names}
    server.post("/v1/completions", prompt=[5, 6, 7], max_tokens=6, ignore_eos=True)
    grown = [server.metric(f"llmopt:{name}") - before[name] for name in names]
    assert grown == [3, 6, 1, 5, 1, 6]
    for name in names:
        assert server.metric(f"vllm:{name}") == server.metric(f"llmopt:{name}")


def test_a_refused_request_is_counted_as_such(server: Any) -> None:
    server.post("/v1/completions", prompt=[5000])
    before = server.metric("vllm:admission_rejections_total", reason="invalid")
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    server.post("/v1/completions", prompt=[5000])
    assert server.metric("vllm:admission_rejections_total", reason="invalid") == before + 1
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted
