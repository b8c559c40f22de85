"""The index of a results folder: `python -m llmopt_cli.bench.report results/` writes its README.md from the lines.

One row per line of every *.jsonl file, newest last. The lines are the record; the index can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmopt_cli.output import error_boundary
from llmopt_cli.spec.result import Environment, Result, read_results

HEAD = """# Results

Every measurement is a line of JSON in this folder: what ran, on which machine, with which versions, and all figures.
Lines are only added: `llmopt bench` and `python -m llmopt_cli.bench.NAME` (startup, kv_waste, prefix_hits,
host_overhead, batching, kv_policies, speculation, trees) add them, to the folder that `--results` names or else to
`./results`.
This index is generated from them by `python -m llmopt_cli.bench.report results/`. A figure holds for its machine only.
"""
COLUMNS = ("date", "machine", "what", "figures", "command")
FIGURES = (  # (metric, how the index shows it), in this order
    ("output_throughput", "{output_throughput:,.0f} output tok/s"),
    ("request_throughput", "{request_throughput:,.2f} requests/s"),
    ("median_ttft_ms", "TTFT p50 {median_ttft_ms:,.0f} ms, p99 {p99_ttft_ms:,.0f} ms"),
    ("median_tpot_ms", "TPOT p50 {median_tpot_ms:,.1f} ms"),
    ("slo_attainment", "{slo_attainment:.0%} within the SLO"),
    ("against", "{against[ratio]:.2f} times the tok/s of {against[target]}"),
    ("perplexity_to_llamacpp", "{perplexity_to_llamacpp:.4f} times the perplexity of llama.cpp's own quantizer"),
    ("waste", "{waste:.1%} of the held slots are empty in pages of {block_size}"),
    ("contiguous_waste", "{contiguous_waste:.0%} if each request had its full context of {context:,}"),
    ("hit_rate", "{hit_rate:.1%} of the prompt tokens found"),
    ("ideal_hit_rate", "{ideal_hit_rate:.1%} at best"),
    ("host_us", "{host_us:.1f} us a request and step beside model, sampling and text"),
    ("host_share", "{host_share:.1%} of a step of {step_ms:,.1f} ms"),
    ("longest_queue", "{host_us_longest_queue:.1f} us before a queue of {longest_queue:,}"),
    (
        "tokens_per_s",
        "output tok/s: {tokens_per_s[continuous]:,.0f} continuous, {tokens_per_s[static]:,.0f} static, "
        "{tokens_per_s[none]:,.0f} one by one",
    ),
    (
        "streamed",
        "perplexity {streamed[first]:.1f} in the first {streamed[stretch]:,} of {streamed[tokens]:,} streamed tokens, "
        "{streamed[last]:.1f} in the last, {streamed[to_alone]:.3f} times that of each stretch alone; at most "
        "{streamed[blocks]} blocks",
    ),
    (
        "selected",
        "with {selected[kept]} of {selected[prompt]:,} slots KL to the full cache {selected[kl][snapkv]:.3f} SnapKV, "
        "{selected[kl][pyramidkv]:.3f} PyramidKV, {selected[kl][last]:.3f} the last ones; found again "
        "{selected[recall][full]:.0%} full, {selected[recall][snapkv]:.0%}, {selected[recall][pyramidkv]:.0%}, "
        "{selected[recall][last]:.0%}",
    ),
    ("tree_to_chain", "{heads}: trees of drafts at most {tree_to_chain:.2f} times the tok/s of chains"),
    (
        "slowest",
        "{drafts}: {slowest:.2f} to {fastest:.2f} times the tok/s of no drafts (intervals from {low:.3f})",
    ),
    ("help_s", "`--help` {help_s:.2f} s"),
    ("estimate_s", "`estimate` {estimate_s:.2f} s"),
)
FORETOLD = {"mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT", "output_throughput": "tok/s"}  # how far off it was


def index(folder: Path) -> str:
    """The text of the index of `folder`; raises ConfigFileError if a line is no result."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.jsonl")):
        rows = [_row(result) for result in read_results(path)]
        parts.append("\n".join([f"## {path.stem}\n", _line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, rows)]))
    if len(parts) == 1:
        parts.append("Nothing has been measured yet.")
    return "\n".join(f"{part.strip()}\n" for part in parts)


def _row(result: Result) -> list[str]:
    metrics = result.metrics
    figures = [form.format_map(metrics) for name, form in FIGURES if metrics.get(name) is not None]
    foretold = {name: result.off(figure) for figure, name in FORETOLD.items()}
    figures += [f"{name} predicted {off:+.0%}" for name, off in foretold.items() if off is not None]
    return [
        result.environment.date[:10],
        _machine(result.environment),
        _what(result),
        ", ".join(figures) + (" (interrupted)" if result.partial else ""),
        f"`{result.command}`",
    ]


def _machine(environment: Environment) -> str:
    """What computed: the GPU, else the CPU and how much of it."""
    return environment.gpu or f"{environment.cpu}, {environment.cores} cores, {environment.threads} threads"


def _what(result: Result) -> str:
    """What ran: the model, where, under which load, as far as the verb has them."""
    model = result.recipe.get("model")
    parts = [f"{model} on {result.target}" if model else result.target, result.workload.get("name")]
    return ", ".join(part for part in [*parts, result.metrics.get("load")] if part)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def report(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The folder of the *.jsonl files.")],
) -> None:
    """Write README.md into a results folder."""
    # A command line may hold bytes that are no text.
    (folder / "README.md").write_text(index(folder), encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    with error_boundary():
        typer.run(report)
