"""What the mean request of a load takes of the GPUs in a steady state: the base of throughput and cost."""

from __future__ import annotations

from llmopt_cli.estimate.cost import Work
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load


def work(step: StepModel, load: Load) -> Work:
    """The seconds of the mean request: its own prompt, and of each decode step the share of one of the batch."""
    return Work(
        input_len=load.input_len,
        output_len=load.output_len,
        prefill=step.mean_prefill(load) / step.on.pp / step.on.attention_dp,
        decode=load.output_len * step.decode(load.concurrency, load.context) / load.concurrency,
    )
