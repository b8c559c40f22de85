"""The model card: what was done to a model, on what text, and what it cost, in a README that says it in words.

Renders an `Outcome`; computes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmopt_cli.quant.quality import Interval, Quality
    from llmopt_cli.quant.quantize import Outcome


def card(outcome: Outcome) -> str:
    """The README.md of a quantized model."""
    scheme, quality, text = outcome.scheme, outcome.quality, outcome.calibration
    warnings = "".join(f"- Warning: {warning}.\n" for warning in outcome.warnings)
    wishes = "".join(f"- {subject or 'bits'}: {what}.\n" for subject, what in extras(outcome))
    worst = max(outcome.modules, key=lambda module: module.error or 0.0)
    return f"""---
base_model: {outcome.model}
tags: [{outcome.method}, {scheme.weight_bits}-bit, llmopt]
---
# {outcome.model}, {scheme.weight_bits}-bit {outcome.method.upper()}

`{outcome.model}` with the linear layers of its decoder blocks in {_grid(outcome)} \
({scheme.bits_per_weight:.3f} bits a weight); {ends_of(outcome)}. \
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
{wishes}\
{warnings}"""


def _grid(outcome: Outcome) -> str:
    """The precision of the linears in words: that of all, or how many are in which."""
    scheme, counted = outcome.scheme, Counter(module.scheme for module in outcome.modules)
    if outcome.ends:
        return " and ".join(f"{name} ({count})" for name, count in counted.items())
    widths = sorted({module.bits for module in outcome.modules})
    group = f"groups of {scheme.group_size}" if scheme.group_size else "one group a row"
    bits = " or ".join(map(str, widths))
    return f"{bits} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}, {group}"


def ends_of(outcome: Outcome) -> str:
    """What became of embeddings and head, in words."""
    found = ", ".join(f"`{name}` in {scheme}" for name, scheme in outcome.ends.items())
    embedding = "rotated" if outcome.rotated else "as they were"
    if outcome.head_bits is not None:
        return f"embeddings {embedding}, output head in {outcome.head_bits:.3f} bits a weight"
    return found or f"embeddings and output head {embedding}"


def extras(outcome: Outcome) -> list[tuple[str, str]]:
    """What else was wished for, in words: subject and what became of it."""
    found = []
    if outcome.untied_bytes:
        found.append(
            ("untied", f"an output head of its own beside the embedding, {outcome.untied_bytes / 1e6:,.2f} MB")
        )
    if outcome.target_bpw is not None:
        found.append(("bits", "linears that engines run as one, such as query, key and value, have the same"))
        found += [("", f"{role}: {chosen}") for role, chosen in bits_by_role(outcome)]
    if outcome.kv_scales:
        found.append(("KV cache", "a scale in fp8 (e4m3) for keys and one for values of every layer"))
    return found


def bits_by_role(outcome: Outcome) -> list[tuple[str, str]]:
    """A linear's name in its block, and how many blocks gave it how many bits."""
    roles: dict[str, Counter[int]] = {}
    for module in outcome.modules:
        roles.setdefault(module.name.rpartition(".")[2], Counter())[module.bits] += 1
    return [
        (role, ", ".join(f"{count} in {bits} bits" for bits, count in sorted(counts.items())))
        for role, counts in roles.items()
    ]


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
