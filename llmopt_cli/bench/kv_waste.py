"""How much of the paged KV cache lies idle: `python -m llmopt_cli.bench.kv_waste TRACE [--results DIR]` adds a line.

A recorded trace is replayed through the runtime's own scheduler and block pool, under the simulated clock of
`estimate`. Waste is the share of the token slots held by running requests that hold no token, over time; beside it
stands what one contiguous stretch of the full context for each of them would waste (arXiv 2309.06180).
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, TraceArg, keep
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.memory import budget, sequence_bytes
from llmopt_cli.estimate.pace import Pace
from llmopt_cli.estimate.timeline import Call, Timeline, new_state
from llmopt_cli.output import error_boundary
from llmopt_cli.runtime.scheduler import SchedulerState
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.result import check_writable
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.workload import Workload

MODEL, GPU, CONTEXT = "llama-2-7b", "a100-80gb", 4096
LIMITS = Batching(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=CONTEXT)


@dataclass
class Slots:
    """Token slots times seconds: held in pages, filled with tokens, and held if each request had the full context."""

    context: int
    paged: float = 0.0
    filled: float = 0.0
    contiguous: float = 0.0
    most_running: int = 0

    def watch(self, state: SchedulerState, seconds: float) -> None:
        """Add one step."""
        size, running = state.limits.block_size, state.running
        self.paged += seconds * size * sum(len(request.blocks) for request in running)
        self.filled += seconds * sum(request.num_cached for request in running)
        self.contiguous += seconds * self.context * len(running)
        self.most_running = max(self.most_running, len(running))


def kv_waste(
    trace: TraceArg,
    results: ResultsOpt = RESULTS,
    block_size: Annotated[int, typer.Option("--block-size", min=1, help="Tokens of a block.")] = 16,
    num_requests: Annotated[int | None, typer.Option("--num-requests", min=1, help="Only the first so many.")] = None,
) -> None:
    """Measure the waste of pages of `--block-size` tokens on a trace."""
    check_writable(results, "kv_waste")
    limits = Batching(**asdict(LIMITS) | {"block_size": block_size})
    on = Deployment(find_model(MODEL), find_gpu(GPU)[0], find_scheme("bf16"), batching=limits)
    sizes, clipped = Workload.of_trace(trace).sizes(CONTEXT)
    sent = Workload.of_trace(trace).offsets()
    calls = [Call.of(number, size, at, []) for number, (size, at) in enumerate(zip(sizes, sent, strict=True))]
    slots, coming = Slots(CONTEXT), deque(calls[:num_requests])
    state = new_state(limits, int(budget(on).free // sequence_bytes(on, block_size)), share=False)
    timeline = Timeline(Pace(StepModel(on)), state, coming, jumps=False, watch=slots.watch)
    timeline.run()
    metrics = {
        "waste": 1 - slots.filled / slots.paged,
        "contiguous_waste": 1 - slots.filled / slots.contiguous,
        "block_size": block_size,
        "context": CONTEXT,
        "requests": len(calls[:num_requests]),
        "clipped": clipped,
        "steps": timeline.steps,
        "most_running": slots.most_running,
        "preemptions": timeline.preemptions,
    }
    recipe = {"model": MODEL, "gpu": GPU, "batching": asdict(limits)}
    keep("kv_waste", "scheduler", metrics, results, recipe=recipe, workload={"name": trace.stem})


if __name__ == "__main__":
    with error_boundary():
        typer.run(kv_waste)
