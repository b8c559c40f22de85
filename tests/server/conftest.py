"""Real server processes for the tests, and an engine in this process to compare them with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from llmopt_cli.runtime import Engine
from llmopt_cli.spec.recipe import Batching

COMMAND = [sys.executable, "-m", "llmopt_cli", "serve"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class ServerProcess:
    """`llmopt serve` on a free port; it prints its URL when it is ready."""

    def __init__(self, *flags: str, model: str = "demo", api_key: str | None = None) -> None:
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        environment = ENVIRONMENT | ({"LLMOPT_API_KEY": api_key} if api_key else {})
        command = [*COMMAND, model, "--port", "0", "--dtype", "float32", "--json", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        document = ""
        for line in self.process.stdout:
            document += line
            if line == "}\n":
                break
        self.report: dict[str, Any] = json.loads(document)
        self.url: str = self.report["url"]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
        return float(value)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the server did not get there in time"
            time.sleep(0.02)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(sig)
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers and sees to it that none outlives the tests."""
    started: list[ServerProcess] = []

    def start(*flags: str, **options: Any) -> ServerProcess:
        started.append(ServerProcess(*flags, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def serve_command() -> list[str]:
    """`llmopt serve` as a user types it."""
    return COMMAND


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """One server that all tests may share: they must leave it idle."""
    return start_server("--max-num-seqs", "8")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The same model in this process."""
    return Engine.from_pretrained("demo", dtype="float32", batching=Batching(max_num_seqs=8))
