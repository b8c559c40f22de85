"""What continuous batching is worth: `python -m llmopt_cli.bench.batching [--results DIR]` adds a line.

One loaded model answers the same requests under each way to batch, in turns, so that a drift of the machine hits all.
Answers differ in length, as they do in practice: that is what a static batch waits for.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from random import Random
from typing import Annotated

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.model.load import load_model
from llmopt_cli.output import error_boundary
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import MODES, Batching
from llmopt_cli.spec.result import check_writable

Ask = tuple[list[int], SamplingParams]


def batching(
    results: ResultsOpt = RESULTS,
    model: Annotated[str, typer.Option("--model", help="What to run.")] = "demo",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests of a round.")] = 64,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at once.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that every mode has its turn.")] = 3,
) -> None:
    """Measure output tokens a second with `--batching` none, static and continuous."""
    check_writable(results, "batching")
    checkpoint = Checkpoint.open(model)
    loaded, tokenizer, asks = load_model(checkpoint), Tokenizer(checkpoint), make_asks(requests)
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(rounds):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            limits = Batching(max_num_seqs=concurrency, batching_mode=mode, enable_prefix_caching=False)
            engine = Engine(checkpoint, loaded, tokenizer, limits)
            speeds[mode].append(speed(engine, asks))
            engine.close()
    medians = {mode: statistics.median(found) for mode, found in speeds.items()}
    metrics = {
        "tokens_per_s": medians,
        "over_static": medians["continuous"] / medians["static"],
        "over_none": medians["continuous"] / medians["none"],
        "requests": requests,
        "concurrency": concurrency,
        "rounds": rounds,
    }
    keep("batching", "engine", metrics, results, recipe={"model": model, "batching": asdict(limits)})


def make_asks(count: int) -> list[Ask]:
    """Prompts of 16 to 48 tokens whose answers have 8 to 120, drawn with a fixed seed."""
    draw = Random(0)
    return [
        (
            [draw.randrange(10, 4000) for _ in range(draw.randint(16, 48))],
            SamplingParams(max_tokens=draw.randint(8, 120), ignore_eos=True),
        )
        for _ in range(count)
    ]


def speed(engine: Engine, asks: list[Ask]) -> float:
    """Output tokens a second."""
    prompts, params = [list(ids) for ids, _ in asks], [one for _, one in asks]
    engine.generate(prompts[:2], SamplingParams(max_tokens=2))
    started = time.perf_counter()
    outputs = engine.generate(prompts, params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - started)


if __name__ == "__main__":
    with error_boundary():
        typer.run(batching)
