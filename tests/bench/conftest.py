"""The demo engine and a real `llmopt serve` process, each started once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmopt_cli.runtime import Engine

KEY = "open-sesame"


@pytest.fixture(scope="session")
def demo_engine() -> Engine:
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, str]]:
    """URL and key of a server of the demo model; with --json it prints where it listens once it does."""
    command = [sys.executable, "-m", "llmopt_cli", "serve", "demo", "--port", "0", "--json", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LLMOPT_API_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            document = ""
            while not document.endswith("}\n"):
                document += (line := process.stdout.readline())
                assert line, "the server did not start"
            yield json.loads(document)["url"], KEY
        finally:
            process.terminate()
