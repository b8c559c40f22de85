"""A bench session: warm up, measure each workload, compare with a baseline if there is one, keep every result at once.

Knows the order of things. What a figure means is in `metrics`, who answers in the targets, when to send in `load`.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmopt_cli.bench import drafts
from llmopt_cli.bench.load import Run, drive
from llmopt_cli.bench.metrics import summarize
from llmopt_cli.bench.prompts import make_asks, read_source
from llmopt_cli.bench.targets import Baseline, Target
from llmopt_cli.errors import LlmoptError, ServerError
from llmopt_cli.estimate.predict import expect
from llmopt_cli.estimate.speculation import Decoding
from llmopt_cli.output import Report
from llmopt_cli.spec.recipe import Recipe, Speculation
from llmopt_cli.spec.result import Environment, Result
from llmopt_cli.spec.workload import Workload

PAIRS = 3  # the fewest that show a spread
SETTLE_S = 0.3  # idle OpenMP threads spin for up to 0.2 s (KMP_BLOCKTIME) and would slow down whoever comes next
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Session:
    """What to measure, and what to write down with it. `baseline` answers the same requests.

    `recipe` is None for a server, whose settings are its own, so that nothing is predicted there.
    """

    target: Target
    workloads: Sequence[Workload]
    recipe: Recipe | None
    environment: Environment
    command: str
    results: Path
    baseline: Baseline | None = None

    def run(self, progress: Progress) -> list[Result]:
        """Measure every workload in turn. Ctrl-C ends the session and marks the result in hand as partial."""
        return asyncio.run(self._run(progress))

    async def _run(self, progress: Progress) -> list[Result]:
        stop = asyncio.Event()
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not on Windows, not outside the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
        results: list[Result] = []
        async with nullcontext() if self.baseline else self.target:
            source, asked = read_source(self.target.encode), self.recipe.speculation if self.recipe else None
            for workload in self.workloads:
                if stop.is_set():
                    break
                predicted, decoding = self._predicted(workload)
                nonce = secrets.token_hex(4) if self.target.remembers else workload.arrivals.label
                bench = Bench(workload, source, nonce, progress, stop, asked, decoding)
                metrics = await (bench.pairs(self.target, self.baseline) if self.baseline else bench.alone(self.target))
                if not metrics["completed"] + metrics["failed"]:
                    break  # stopped before a single request ended: there is nothing to keep
                results.append(self._result(workload, {"nonce": nonce} | metrics, predicted, partial=stop.is_set()))
                results[-1].save(self.results)
        return results

    def _predicted(self, workload: Workload) -> tuple[dict[str, Any], Decoding | None]:
        """What is expected, with how drafts are timed where there are some; or why nobody can tell.

        A closed form that lacks something never stops a measurement.
        """
        if self.recipe is None:
            return {"unknown": "the settings of a server are its own"}, None
        try:
            expected = expect(self.recipe, workload, self.environment)
        except LlmoptError as error:
            return {"unknown": f"{error.message}: {error.hint}" if error.hint else error.message}, None
        return expected.record(), expected.decoding

    def _result(
        self, workload: Workload, metrics: dict[str, Any], predicted: dict[str, Any], *, partial: bool
    ) -> Result:
        return Result(
            verb="bench",
            target=self.target.name,
            command=self.command,
            seed=workload.seed,
            environment=self.environment,
            metrics={"load": workload.arrivals.label} | metrics,
            recipe=asdict(self.recipe) if self.recipe else {"model": self.target.model},
            workload=asdict(workload),
            partial=partial,
            predicted=predicted,
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """One workload to measure. `source` is what prompts are cut from, `nonce` what makes them new.

    `speculation` is what was asked for, `decoding` what is expected of it.
    """

    workload: Workload
    source: list[Any]
    nonce: str
    progress: Progress
    stop: asyncio.Event
    speculation: Speculation | None = None
    decoding: Decoding | None = None

    async def alone(self, target: Target) -> dict[str, Any]:
        """The figures of one target."""
        return self.figures(target, [await self.measure(target, self.workload, self.nonce)])

    async def pairs(self, target: Target, baseline: Baseline) -> dict[str, Any]:
        """The figures of `target`, and under `against` those of `baseline` and how many times its tokens/s they are.

        Both answer the same requests in turns, in alternating order, so that a drift of the machine hits both.
        """
        ours: list[Run] = []
        theirs: list[Run] = []
        load = self.workload.with_load(concurrency=baseline.at_once) if baseline.at_once else self.workload
        sides = [(target, self.workload, ours), (baseline, load, theirs)]
        for pair in range(PAIRS):
            for side, workload, runs in sides if pair % 2 == 0 else reversed(sides):
                if not self.stop.is_set():
                    async with side:  # while the other has no threads that wait for work and get in the way
                        runs.append(await self.measure(side, workload, f"{self.nonce}/{pair}"))
        figures = self.figures(target, ours)
        whole = [pair for pair in zip(ours, theirs, strict=False) if not any(run.partial for run in pair)]
        ratios = [_speed(one) / _speed(other) for one, other in whole if _speed(other)]
        if not ratios:
            return figures
        spread = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        against = (
            {"target": baseline.name, "load": load.arrivals.label, "pairs": len(ratios)}
            | spread
            | self.figures(baseline, theirs)
        )
        return figures | {"against": against}

    async def measure(self, target: Target, workload: Workload, nonce: str) -> Run:
        """Warm up, wait until the machine is still, then the run that counts."""
        if workload.warmup:
            warm_up = workload.warm_up()
            asks = make_asks(warm_up, self.source, target.context, f"{nonce}/warm-up")
            run = await drive(target, asks, warm_up.arrivals, [], lambda done, total: None, self.stop)
            if errors := [record.error for record in run.records if record.error]:
                raise ServerError(f"warm-up failed: {errors[0]}")
        await asyncio.sleep(SETTLE_S)
        asks = make_asks(workload, self.source, target.context, nonce)
        before = await drafts.read(target)
        with self.progress(f"{workload.name} on {target.name}, {workload.arrivals.label}") as report:
            run = await drive(target, asks, workload.arrivals, workload.offsets(), report, self.stop)
        return replace(run, drafts=drafts.between(before, await drafts.read(target)))

    def figures(self, target: Target, runs: Sequence[Run]) -> dict[str, Any]:
        """The metrics of `runs` pooled, which is what percentiles need."""
        records = [record for run in runs for record in run.records]
        duration = sum(run.duration for run in runs)
        clipped = {"clipped_requests": self.workload.sizes(target.context)[1]}
        drafted = drafts.together(run.drafts for run in runs)
        told = {"speculation": drafts.figures(drafted, self.speculation, self.decoding)} if drafted else {}
        return summarize(records, duration, self.workload.slo) | clipped | told


def _speed(run: Run) -> float:
    """Output tokens per second."""
    replies = [record.reply for record in run.records if record.reply]
    return sum(chunk.tokens for reply in replies for chunk in reply.chunks) / run.duration
