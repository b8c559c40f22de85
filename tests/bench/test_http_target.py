"""The HTTP target: tokens counted right from any server's stream, and a real server process behind real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.bench.http_target import HttpTarget, Tally
from llmopt_cli.bench.metrics import Chunk, Reply
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.errors import ServerError, UsageError
from llmopt_cli.runtime import Engine, SamplingParams

PROMPT = "Once upon a time there was"


def event(text: str | None, usage: int | None = None) -> str:
    """One server-sent event; text None is the event that ends a stream with the usage alone."""
    body: dict[str, Any] = {"choices": [] if text is None else [{"index": 0, "text": text}]}
    if usage is not None:
        details = {"cached_tokens": 3}
        body["usage"] = {"prompt_tokens": 9, "completion_tokens": usage, "prompt_tokens_details": details}
    return f"data: {json.dumps(body)}\n\n"


def tally(*reads: str) -> Reply:
    counter = Tally()
    for second, text in enumerate(reads):
        counter.add(float(second), text)
    return counter.reply()


def test_usage_in_every_event_tells_the_tokens_of_each_read() -> None:
    reply = tally(event("a", 1), event("", 1), event("b", 2) + event("cd", 5), event("", 6), event(None, 6))
    assert reply == Reply((Chunk(0, 1), Chunk(2, 4), Chunk(3, 1)), prompt_tokens=9, cached_tokens=3)


def test_a_total_at_the_end_is_shared_out_and_said_to_be() -> None:
    reply = tally(event("a"), event("b") + event("c"), event("d"), event(None, 8) + "data: [DONE]\n\n")
    assert [chunk.tokens for chunk in reply.chunks] == [2, 4, 2]
    assert reply.interpolated


def test_a_total_of_one_token_an_event_is_exact() -> None:
    reply = tally(event("a"), event("b"), event("c"), event(None, 3))
    assert reply.chunks == (Chunk(0, 1), Chunk(1, 1), Chunk(2, 1))
    assert not reply.interpolated


def test_without_usage_an_event_with_text_is_a_token() -> None:
    reply = tally(event("a"), event(""), event("b") + event("c"))
    assert reply.chunks == (Chunk(0, 1), Chunk(2, 2))
    assert reply.prompt_tokens == 0


@given(st.lists(st.integers(0, 120), max_size=6), st.booleans())
def test_wherever_the_stream_is_cut_no_token_is_lost(cuts: list[int], told: bool) -> None:
    stream = "".join(event(letter, index + 1 if told else None) for index, letter in enumerate("abcdef"))
    stream += event(None, 6) + "data: [DONE]\n\n"
    places = [0, *sorted(cut * len(stream) // 120 for cut in cuts), len(stream)]
    reply = tally(*(stream[one:two] for one, two in itertools.pairwise(places)))
    assert sum(chunk.tokens for chunk in reply.chunks) == 6


def test_an_error_amid_the_stream_or_an_empty_answer_is_a_failure() -> None:
    for error in ('{"message": "out of blocks"}', '"out of blocks"'):  # OpenAI's shape, and a flat one
        with pytest.raises(ServerError, match="gave up: out of blocks"):
            tally(event("a"), f'data: {{"error": {error}, "error_type": "overloaded"}}\n\n')
    with pytest.raises(ServerError, match="without a single token"):
        tally("data: [DONE]\n\n")


@pytest.mark.parametrize("item", ["7", '"a"', "{", '{"choices": 3}', '{"choices": ["a"]}', '{"usage": "many"}'])
def test_an_event_in_no_known_shape_is_a_failure_with_its_words(item: str) -> None:
    with pytest.raises(ServerError, match="no event of a completion: " + re.escape(item)):
        tally(event("a"), f"data: {item}\n\n")


def test_nulls_say_nothing_and_lose_no_token() -> None:
    usage = '{"prompt_tokens": null, "completion_tokens": null, "prompt_tokens_details": {"cached_tokens": null}}'
    choice = '{"index": 0, "text": "b", "logprobs": null}'
    reply = tally(event("a"), f'data: {{"error": null, "choices": [{choice}], "usage": {usage}}}\n\n')
    assert reply == Reply((Chunk(0, 1), Chunk(1, 1)), prompt_tokens=0)


def send(target: HttpTarget, *asks: Ask) -> list[Reply]:
    async def main() -> list[Reply]:
        async with target:
            return list(await asyncio.gather(*map(target.send, asks)))

    return asyncio.run(main())


def test_real_server_streams_what_the_engine_generates(server: tuple[str, str], demo_engine: Engine) -> None:
    url, key = server
    ids = tuple(demo_engine.tokenizer.encode(PROMPT))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    target = HttpTarget(f"{url}/v1/", api_key=key)
    replies = send(target, *(Ask(prompt, len(ids), params) for prompt in (ids, PROMPT)))
    assert (target.model, target.context) == ("demo", demo_engine.max_model_len)
    for reply in replies:
        assert sum(chunk.tokens for chunk in reply.chunks) == 12
        assert reply.prompt_tokens == len(ids)
        assert not reply.interpolated
        assert sorted(reply.chunks) == list(reply.chunks)


def test_a_refusal_carries_the_servers_words(server: tuple[str, str]) -> None:
    url, key = server
    long = Ask((5,) * 3000, 3000, SamplingParams())
    with pytest.raises(ServerError, match=r"answered 400: .*3,?000 tokens"):
        send(HttpTarget(url, api_key=key), long)
    with pytest.raises(ServerError, match="answered 401"):
        send(HttpTarget(url, api_key="wrong"))
    with pytest.raises(ServerError, match=r"answered 404: .*nobody"):
        send(HttpTarget(url, "nobody", api_key=key), Ask("a", 1, SamplingParams()))


def test_nobody_there_is_one_sentence_with_a_hint() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nothing can answer there
        with pytest.raises(ServerError, match=r"no server answers at http://127\.0\.0\.1:") as caught:
            send(HttpTarget(f"http://127.0.0.1:{taken.getsockname()[1]}"))
    assert "llmopt serve" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://localhost:abc", None, "is no URL: Invalid port: 'abc'"),
        ("http://localhost:99999", None, "is no URL: a port is at most 65535"),
        ("http://localhost:8000", "schlüssel", "consists of ASCII characters"),
    ],
)
def test_what_no_request_can_carry_is_refused(url: str, key: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HttpTarget(url, api_key=key)
