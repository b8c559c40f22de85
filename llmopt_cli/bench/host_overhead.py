"""What a step costs beside the model: `python -m llmopt_cli.bench.host_overhead [--results DIR]` adds a line.

A real engine decodes 64 requests with a random Llama of 110 million parameters. The clock is stopped around the model,
the choice of tokens and the text: what is left is scheduling and bookkeeping. Then the same with a longer and longer
queue behind those that run.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.model.load import LoadedModel
from llmopt_cli.output import error_boundary
from llmopt_cli.runtime import Engine, SamplingParams, live, runner
from llmopt_cli.runtime.tokenizer import TextStream
from llmopt_cli.spec.checkpoint import BUNDLED
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.result import check_writable

SHAPE = {  # 110 million parameters with the embeddings
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
QUEUES = (0, 1_000, 10_000, 100_000)
PROMPT = list(range(10, 26))


@dataclass
class Clock:
    """Seconds spent inside of what is watched, by name, and how often it was called: watching costs a little itself."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    @contextmanager
    def watching(self, name: str, owner: Any, attribute: str) -> Iterator[None]:
        """Until it is left, calls of `owner.attribute` count towards `name`."""
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.calls += 1

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, original)


def host_overhead(
    results: ResultsOpt = RESULTS,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests that run at once.")] = 64,
    steps: Annotated[int, typer.Option("--steps", min=3, help="Decode steps measured for each queue.")] = 60,
    model: Annotated[str | None, typer.Option("--model", help="Another model than the random one.")] = None,
) -> None:
    """Measure the host's share of a decode step, with ever longer queues."""
    check_writable(results, "host_overhead")
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.from_pretrained(
            model or _random_model(Path(folder)),
            device="cpu",
            batching=Batching(max_num_seqs=requests, max_num_batched_tokens=max(1024, 16 * requests)),
        )
    rows = {queue: measure(engine, requests, queue, steps) for queue in QUEUES}
    alone = rows[0]
    metrics = alone | {
        "requests": requests,
        "steps": steps,
        "host_us_by_queue": {str(queue): row["host_us"] for queue, row in rows.items()},
        "longest_queue": QUEUES[-1],
        "host_us_longest_queue": rows[QUEUES[-1]]["host_us"],
    }
    keep("host_overhead", "engine", metrics, results, recipe={"model": model or "random-llama-110m"})


def measure(engine: Engine, requests: int, queue: int, steps: int) -> dict[str, float]:
    """Medians over `steps` decode steps of `requests` requests before `queue` waiting ones.

    `host_us` microseconds of scheduling and bookkeeping for a request and step, `text_us` of detokenizing, `sample_us`
    of choosing tokens; `step_ms` of the whole step, `host_share` what of it is host work without the text.
    """
    params = SamplingParams(max_tokens=steps + 8, ignore_eos=True)
    for _ in range(requests + queue):
        engine.add_request(PROMPT, params)
    engine.step()
    engine.step()
    found: list[tuple[float, dict[str, float]]] = []
    watching = cost_of_watching()
    for _ in range(steps):
        clock = Clock()
        whole = _seconds(engine.step, clock)
        found.append((whole - watching * clock.calls, clock.seconds))
    engine.abort_all()
    engine.check_integrity()
    rest = [whole - sum(inner.values()) for whole, inner in found]
    middle = statistics.median
    each = 1e6 / requests
    return {
        "host_us": middle(rest) * each,
        "text_us": middle(inner["text"] for _, inner in found) * each,
        "sample_us": middle(inner["sample"] for _, inner in found) * each,
        "step_ms": middle(whole for whole, _ in found) * 1e3,
        "host_share": middle(left / whole for left, (whole, _) in zip(rest, found, strict=True)),
    }


def cost_of_watching() -> float:
    """Seconds that one watched call takes beside those that are counted."""
    clock, box, count = Clock(), SimpleNamespace(nothing=lambda *args: None), 10_000
    with clock.watching("nothing", box, "nothing"):
        started = time.perf_counter()
        for _ in range(count):
            box.nothing(1, 2)
        return (time.perf_counter() - started - clock.seconds["nothing"]) / count


def _seconds(step: Callable[[], object], clock: Clock) -> float:
    with (
        clock.watching("model", LoadedModel, "logits"),
        clock.watching("model", runner, "_wide"),
        clock.watching("sample", live, "sample"),
        clock.watching("sample", live, "broken"),
        clock.watching("text", TextStream, "push"),
    ):
        started = time.perf_counter()
        step()
        return time.perf_counter() - started


def _random_model(folder: Path) -> Path:
    """A checkpoint of SHAPE with the demo's tokenizer; tokens that this does not know are never the likeliest."""
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    known = 4096
    with torch.no_grad():
        model.lm_head.weight[known:] = 0
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["demo"] / file, folder)
    return folder


if __name__ == "__main__":
    with error_boundary():
        typer.run(host_overhead)
