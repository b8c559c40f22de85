"""How much of the prompts the prefix cache finds: `python -m llmopt_cli.bench.prefix_hits TRACE [--results DIR]`.

A trace with hashed prompts (Mooncake, arXiv 2407.00079) goes through the runtime's own scheduler and block pool under
the simulated clock of `estimate`, a hash for each block, in a cache that never has to evict. The ideal is every block
that any earlier request brought.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, TraceArg, keep
from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.pace import Pace
from llmopt_cli.estimate.timeline import Call, Timeline, new_state
from llmopt_cli.output import error_boundary
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.result import check_writable
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.trace import HASHED_TOKENS, TracedRequest, read_trace
from llmopt_cli.spec.workload import Size

MODEL, GPU = "llama-3.1-8b", "h100"  # they only say how many steps go by between two requests
LIMITS = Batching(max_num_seqs=256, max_num_batched_tokens=8192, block_size=HASHED_TOKENS)


def prefix_hits(
    trace: TraceArg,
    results: ResultsOpt = RESULTS,
    num_requests: Annotated[int | None, typer.Option("--num-requests", min=1, help="Only the first so many.")] = None,
) -> None:
    """Measure the share of prompt tokens found in the prefix cache, beside the ideal."""
    check_writable(results, "prefix_hits")
    recorded = read_trace(str(trace))
    if not recorded.hashed:
        raise UsageError(f"`{trace}` says nothing of which prompts begin alike", "give a Mooncake trace")
    requests = recorded.requests[:num_requests]
    calls = [_call(number, one) for number, one in enumerate(requests)]
    blocks = sum(-(-(one.input_len + one.output_len) // HASHED_TOKENS) for one in requests)
    on = Deployment(find_model(MODEL), find_gpu(GPU)[0], find_scheme("bf16"), batching=LIMITS)
    Timeline(Pace(StepModel(on)), new_state(LIMITS, blocks, share=True), deque(calls)).run()
    asked = sum(one.input_len for one in requests)
    metrics = {
        "hit_rate": sum(call.num_hit or 0 for call in calls) / asked,
        "ideal_hit_rate": ideal(requests) / asked,
        "block_size": HASHED_TOKENS,
        "requests": len(requests),
        "prompt_tokens": asked,
    }
    keep(
        "prefix_hits", "scheduler", metrics, results, workload={"name": trace.stem}, recipe={"model": MODEL, "gpu": GPU}
    )


def _call(number: int, one: TracedRequest) -> Call:
    """Only a block that the prompt fills can be shared."""
    keys = [b"%d" % head for head in one.hash_ids[: one.input_len // HASHED_TOKENS]]
    return Call.of(number, Size(one.input_len, one.output_len), one.at, keys)


def ideal(requests: Sequence[TracedRequest]) -> int:
    """Prompt tokens in blocks that an earlier request brought, whatever became of it since."""
    seen: set[int] = set()
    found = 0
    for one in requests:
        known = next((place for place, head in enumerate(one.hash_ids) if head not in seen), len(one.hash_ids))
        found += min(known * HASHED_TOKENS, one.input_len)
        seen.update(one.hash_ids)
    return found


if __name__ == "__main__":
    with error_boundary():
        typer.run(prefix_hits)
