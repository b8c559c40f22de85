"""`Offer`: one deployment weighed under a load, what it holds, how fast it is, what it costs. What rankings rank."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt_cli.estimate.cost import TokenCost, Work
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.plan import Fit, Verdict
from llmopt_cli.estimate.question import Question
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.workload import Slo


@dataclass(frozen=True, slots=True)
class Offer:
    """`replicas` of a deployment, each with `load` running: the part of its requests that memory holds.

    Seconds; USD an hour for all GPUs of all replicas, None without a price; `meets` the limits of a good request.
    """

    fit: Fit
    load: Load
    ttft: float
    tpot: float
    work: Work
    usd_per_hour: float | None
    meets: bool
    replicas: int = 1

    @property
    def on(self) -> Deployment:
        """The deployment of one replica."""
        return self.fit.on

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.replicas * self.fit.gpus

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests on all replicas."""
        return self.replicas * self.work.tokens_per_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """The same, shared out among the GPUs."""
        return self.tokens_per_s / self.gpus

    @property
    def usd_per_1m(self) -> float | None:
        """USD of a million output tokens, prompts included."""
        if self.usd_per_hour is None:
            return None
        return TokenCost(self.usd_per_hour / self.replicas, self.work).all_in()

    @property
    def good(self) -> bool:
        """Whether it holds the whole load and meets the limits."""
        return self.fit.verdict is Verdict.FITS and self.meets


def timed(question: Question, fit: Fit, slo: Slo, replicas: int = 1) -> Offer:
    """What is known to hold at least one request, timed with as many as it holds."""
    step = StepModel(fit.on)
    load = question.load.at(min(question.needed, fit.max_requests))
    ttft, tpot = step.ttft(load), step.tpot(load)
    return Offer(
        fit=fit,
        load=load,
        ttft=ttft,
        tpot=tpot,
        work=work(step, load),
        usd_per_hour=question.price.usd_per_hour * fit.gpus * replicas if question.price else None,
        meets=slo.keeps(ttft, tpot, ttft + tpot * (load.output_len - 1)),
        replicas=replicas,
    )
