"""The demonstration: every verb once on the embedded model, each as the command a person would type.

Runs the verbs as processes and reads the files they leave; knows nothing of how they work.
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from llmopt_cli.errors import LlmoptError
from llmopt_cli.output import Output
from llmopt_cli.spec.checkpoint import Checkpoint

METHODS = ("rtn", "awq")
CONCURRENCY = (1, 8)
QUESTION = "What is the matter with you, my lord?"
START_LIMIT = 120.0  # seconds that a server gets to load the demo model


@dataclass(frozen=True)
class Row:
    """One version of the model: bytes on disk, loss against the 16-bit one, output tokens/s by concurrency."""

    name: str
    weight_bytes: int
    perplexity_ratio: float
    mean_kl: float
    top1_agreement: float
    tokens_per_s: dict[int, float]


class Demo:
    """Runs the verbs in `folder`; what they print goes to `stdout`, what is said between them to stderr."""

    def __init__(self, folder: Path, out: Output, stdout: IO[Any] | None) -> None:
        self._folder = folder
        self._out = out
        self._stdout = stdout

    def run(self) -> list[Row]:
        """Estimate, quantize, bench before and after, serve. Raises LlmoptError if a verb fails."""
        self._llmopt("estimate", "--model", "demo", "--gpu", "l4", "--max-model-len", "2048")
        for method in METHODS:
            self._llmopt("quantize", "demo", "--method", method, "--samples", "32")
        versions = {"bf16": "demo"} | {method: f"./demo-{method}-w4g128" for method in METHODS}
        for model in versions.values():
            load = ("--workload", "decode", "--concurrency", ",".join(map(str, CONCURRENCY)), "--num-requests", "32")
            self._llmopt("bench", model, *load, "--results", "results")
        self._serve(versions["awq"])
        return [self._row(name, model) for name, model in versions.items()]

    def _llmopt(self, *arguments: str) -> None:
        self._say(arguments)
        done = subprocess.run(command(*arguments), cwd=self._folder, stdout=self._stdout, check=False)
        if done.returncode:
            raise LlmoptError(f"`llmopt {shlex.join(arguments)}` ended with {done.returncode}")

    def _serve(self, model: str) -> None:
        """Start the server, ask it one thing as an OpenAI client would, and stop it with SIGTERM."""
        port = free_port()
        arguments = ("serve", model, "--port", str(port), "--quiet")
        self._say(arguments)
        with process(command(*arguments), self._folder) as server:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server)
            messages = [{"role": "user", "content": QUESTION}]
            body = {"model": Path(model).name, "messages": messages, "max_tokens": 40, "temperature": 0.7, "seed": 1}
            self._out.note(f"$ curl {url}/v1/chat/completions -d '{json.dumps(body)}'")
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        if "choices" not in answer:
            raise LlmoptError(f"the server answered {answer}")
        self._out.note(f"{answer['choices'][0]['message']['content']}\n{answer['usage']}")

    def _row(self, name: str, model: str) -> Row:
        runs = [json.loads(line) for line in (self._folder / "results" / "bench.jsonl").read_text().splitlines()]
        speeds = [run["metrics"]["output_throughput"] for run in runs if run["recipe"]["model"] == model]
        tokens_per_s = dict(zip(CONCURRENCY, speeds, strict=True))
        if model == "demo":
            return Row(name, weight_bytes(model), 1.0, 0.0, 1.0, tokens_per_s)
        folder = self._folder / model
        quality = json.loads((folder / "quality.json").read_text())["quality"]
        return Row(
            name,
            weight_bytes(str(folder)),
            quality["perplexity_ratio"]["value"],
            quality["kl_mean"]["value"],
            quality["top1_agreement"]["value"],
            tokens_per_s,
        )

    def _say(self, arguments: tuple[str, ...]) -> None:
        self._out.note(f"\n$ llmopt {shlex.join(arguments)}")


def verdict(rows: list[Row]) -> list[str]:
    """What the table says, in sentences: which method lost less, and where 4 bits were faster, and why."""
    base, rtn, awq = rows
    gain = awq.tokens_per_s[1] / base.tokens_per_s[1]
    batch = awq.tokens_per_s[CONCURRENCY[-1]] / base.tokens_per_s[CONCURRENCY[-1]]
    lost = 1 - awq.mean_kl / rtn.mean_kl
    sentences = [
        f"quality  AWQ diverges {lost:.0%} {'less' if lost > 0 else 'MORE'} from the 16-bit model than rounding does",
        f"speed    4 bits run at {gain:.2f} x the 16-bit tokens/s for one request, {batch:.2f} x for {CONCURRENCY[-1]}",
    ]
    cache = last_level_cache()
    if cache and base.weight_bytes < cache:
        sentences += [
            "why      one row is multiplied with the packed weights as they lie; for more rows they are unpacked each",
            "         time, which costs more than it saves while the 16-bit weights "
            f"({base.weight_bytes / 1e6:.1f} MB) lie in the CPU's cache ({cache / 2**20:.0f} MiB)",
        ]
    return sentences


def weight_bytes(model: str) -> int:
    """Bytes of the stored tensors."""
    return Checkpoint.open(model).nbytes


def last_level_cache() -> int | None:
    """Bytes of the CPU's largest cache, where Linux tells."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=None)


def command(*arguments: str) -> list[str]:
    """The command line of this very llmopt."""
    return [sys.executable, "-m", "llmopt_cli", *arguments]


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(arguments: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server while the block lasts, then ask it to drain."""
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            yield server
        finally:
            server.send_signal(signal.SIGTERM)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Poll /ready; raises LlmoptError if the server ends or takes too long."""
    for _ in range(int(START_LIMIT / 0.2)):
        try:
            if httpx.get(f"{url}/ready").is_success:
                return
        except httpx.TransportError:
            if server.poll() is not None:
                break
        time.sleep(0.2)
    raise LlmoptError(f"the server at {url} did not get ready")
