"""The model card: what was done to a model, on what text, and what it cost, in a README that says it in words.

Renders an `Outcome`; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmopt_cli.quant.quality import Interval, Quality
    from llmopt_cli.quant.quantize import Outcome


def card(outcome: Outcome) -> str:
    """The README.md of a quantized model."""
    scheme, quality, text = outcome.scheme, outcome.quality, outcome.calibration
    group = f"groups of {scheme.group_size}" if scheme.group_size else "one group a row"
    grid = "symmetric" if scheme.symmetric else "asymmetric"
    warnings = "".join(f"- Warning: {warning}.\n" for warning in outcome.warnings)
    worst = max(outcome.modules, key=lambda module: module.error or 0.0)
    return f"""---
base_model: {outcome.model}
tags: [{outcome.method}, {scheme.weight_bits}-bit, llmopt]
---
# {outcome.model}, {scheme.weight_bits}-bit {outcome.method.upper()}

`{outcome.model}` with the linear layers of its decoder blocks in {scheme.weight_bits} bits, {grid}, {group} \
({scheme.bits_per_weight:.3f} bits a weight); embeddings and output head as they were. \
Made by llmopt {outcome.llmopt}. The license is the base model's.

| | base | this |
|---|---|---|
| weights | {outcome.bytes_before / 1e6:,.2f} MB | {outcome.bytes_after / 1e6:,.2f} MB |
| perplexity | {quality.perplexity_base:.3f} | {quality.perplexity:.3f} |

## What it cost
{_table(quality_rows(quality))}

Measured against the base in float32 on `{outcome.evaluation.file}` (sha256 `{outcome.evaluation.sha256[:16]}`): \
{quality.tokens:,} tokens in {quality.windows} windows of {quality.window} ({quality.convention}). \
Intervals: 95 %, paired bootstrap over windows. The weights measured are exactly those in the files.

## How
- {outcome.summary}; the worst relative output error of a module is {worst.error or 0.0:.2%}, in `{worst.name}`. \
All of them: `quality.json`.
- Calibrated on `{text.file}` (sha256 `{text.sha256[:16]}`), {text.windows} windows of {text.window} tokens, \
seed {outcome.seed}; no text is in both sets, {outcome.overlap:.2%} of the evaluation's 13-grams are in both.
- Files: `{outcome.format}` layout.
{warnings}"""


def quality_rows(quality: Quality) -> list[tuple[str, str, str]]:
    """Measure, figure, 95 % interval."""
    shown: Sequence[tuple[str, Interval, str]] = (
        ("perplexity, ratio to base", quality.perplexity_ratio, ".4f"),
        ("KL(base || other), mean, nats", quality.kl_mean, ".5f"),
        ("KL(base || other), p99, nats", quality.kl_p99, ".4f"),
        ("top-1 agreement", quality.top1_agreement, ".2%"),
    )
    return [
        (name, format(figure.value, style), f"{figure.low:{style}} to {figure.high:{style}}")
        for name, figure, style in shown
    ]


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    return "\n".join(
        ["| measure | | 95 % interval |", "|---|---|---|", *("| {} | {} | {} |".format(*row) for row in rows)]
    )
