"""Starting, overload, keys and stopping, on server processes of their own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from llmopt_cli.spec.checkpoint import BUNDLED

pytestmark = pytest.mark.timeout(60)
LONG = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@contextmanager
def running_stream(server: Any, **changes: Any) -> Iterator[Iterator[str]]:
    """The `data:` lines of a long completion whose first token has come."""
    address = f"{server.url}/v1/completions"
    with httpx.stream("POST", address, json=LONG | changes, headers=server.headers, timeout=60) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        next(lines)
        yield lines


def serve(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_told_before_the_model_is_read(serve_command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve(serve_command, "./no-such-model", "--port", port)
    assert done.returncode == 1
    assert done.stdout == ""
    message, _, hint = done.stderr.strip().split("\n")
    assert message == f"error: cannot listen on 127.0.0.1 port {port}: address already in use"
    assert "--port" in hint


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-model"], 2, "unknown model `no-such-model`"),
        (["./no-such-folder"], 2, "there is no folder"),
        (["demo", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], 2, "max_num_batched_tokens 8"),
        (["demo", "--host", "nowhere.invalid"], 1, "cannot listen on nowhere.invalid"),
        (["demo", "--recipe", "no-such-recipe"], 2, "unknown recipe"),
        (["demo", "--port", "99999"], 2, "--port"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    serve_command: list[str], arguments: list[str], code: int, words: str
) -> None:
    done = serve(serve_command, *arguments, *([] if "--port" in arguments else ["--port", "0"]))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_start_tells_the_budget(server: Any) -> None:
    assert server.report["max_num_seqs"] == 8
    assert server.report["kv_cache_tokens"] >= 2048
    assert server.report["kv_cache_bytes"] > 0
    assert server.report["weights_bytes"] > 0


@pytest.fixture(scope="module")
def small(start_server: Callable[..., Any]) -> Any:
    """One place in the batch, one in the queue, behind a key."""
    flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--served-model-name", "tiny"]
    return start_server(*flags, api_key="sesame")


def test_the_model_has_the_name_it_was_given(small: Any) -> None:
    assert small.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert small.post("/v1/completions", model="demo", prompt="a").status_code == 404
    assert small.post("/v1/completions", model="tiny", prompt="a", max_tokens=1).json()["model"] == "tiny"


def test_a_local_folder_is_served_under_its_name(start_server: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(BUNDLED["demo-draft"], folder)
    server = start_server(model=f"{folder}/")
    assert server.report["model"] == "mine"
    assert server.get("/v1/models").json()["data"][0]["id"] == "mine"
    answer = server.post("/v1/completions", model="mine", prompt="a", max_tokens=1)
    assert answer.json()["model"] == "mine"


def test_only_the_right_key_opens(small: Any) -> None:
    with OpenAI(base_url=f"{small.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(AuthenticationError):
            client.completions.create(model="tiny", prompt="a")
    for header in ({}, {"Authorization": "sesame"}, {"Authorization": b"Bearer sesam\xe9"}):
        assert httpx.get(f"{small.url}/v1/models", headers=header).status_code == 401
    with OpenAI(base_url=f"{small.url}/v1", api_key="sesame") as client:
        assert client.models.list().data
    assert httpx.get(f"{small.url}/health").status_code == 200


def test_without_the_key_no_body_is_read(small: Any) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = "POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 99"
        connection.sendall("\r\n".join([*head, "", ""]).encode())  # and never a byte of the body
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_a_full_queue_answers_429_and_when_to_come_back(small: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running_stream(small):
            second = pool.submit(small.post, "/v1/completions", prompt="a", max_tokens=1)
            small.wait_for(lambda: small.metric("llmopt:num_requests_waiting") == 1)
            third = small.post("/v1/completions", prompt="a", stream=True)
            assert third.status_code == 429
            assert 1 <= int(third.headers["Retry-After"]) <= 60
            assert third.json()["error"]["code"] == "queue_full"
            assert small.metric("vllm:admission_rejections_total", reason="queue_full") == 1
            assert small.get("/ready").status_code == 200
        assert second.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_frees_its_place(small: Any, stream: bool) -> None:
    with running_stream(small):
        with httpx.Client(timeout=0.5, headers=small.headers) as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(f"{small.url}/v1/completions", json=LONG | {"stream": stream})
        small.wait_for(lambda: small.metric("llmopt:num_requests_waiting") == 0)
        assert small.metric("llmopt:num_requests_running") == 1
    small.wait_for(lambda: small.metric("llmopt:num_requests_running") == 0)


def test_more_prompts_than_there_are_places_can_never_be_served(small: Any) -> None:
    answer = small.post("/v1/completions", prompt=["a", "b", "c"])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_sigterm_finishes_what_runs_and_admits_no_more(start_server: Callable[..., Any]) -> None:
    server = start_server()
    with running_stream(server, max_tokens=400) as lines:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/ready").status_code == 503)
        refused = server.post("/v1/completions", prompt="a")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert server.get("/health").status_code == 200
        *chunks, end = lines
    assert end == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=30) == 0


def test_the_drain_has_an_end(start_server: Callable[..., Any]) -> None:
    server = start_server("--shutdown-timeout", "0.3")
    with ThreadPoolExecutor(1) as pool, running_stream(server) as lines:
        whole = pool.submit(server.post, "/v1/completions", **LONG | {"stream": False})
        server.wait_for(lambda: server.metric("llmopt:num_requests_running") == 2)
        server.process.send_signal(signal.SIGINT)
        *_, error, end = lines
        assert whole.result().status_code == 500
    assert "stopped" in json.loads(error)["error"]["message"]
    assert end == "[DONE]"
    assert server.process.wait(timeout=30) == 0


def test_a_second_signal_ends_it_at_once(start_server: Callable[..., Any]) -> None:
    server = start_server()
    with running_stream(server):
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/ready").status_code == 503)
        assert server.stop() == 128 + signal.SIGTERM
