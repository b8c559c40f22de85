"""Quantizing a model in place, block by block: every block is fitted to what the quantized blocks before it put out.

Within a block, linears are taken in the order they run, each seeing the ones before it quantized. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.awq import misfit
from llmopt_cli.output import Report
from llmopt_cli.quant import awq
from llmopt_cli.quant.awq import Choice
from llmopt_cli.quant.grid import divide_rows, quantize_weight, relative_error
from llmopt_cli.quant.structure import Group, Producer, find_blocks, find_groups, find_linears, fold
from llmopt_cli.quant.walk import Batch, Seen, advance, enter, observe, run_block
from llmopt_cli.spec.scheme import Scheme

Method = Callable[[nn.Module, Group, Seen, Scheme], Choice]


def _round_only(block: nn.Module, group: Group, seen: Seen, scheme: Scheme) -> Choice:
    """Round to nearest: no scale, no clipping."""
    return Choice(torch.ones_like(seen.mean_abs), frozenset())


TRIAL_TOKENS = 32  # of the example on which claims about a block's structure are tried out
METHODS: dict[str, Method] = {"awq": awq.choose, "rtn": _round_only}


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What was done to one linear. `method` is the one really in effect: `rtn` where the search found nothing better.

    `error` is |(W' - W) x| / |W x| on the calibration tokens it saw, `range_kept` the mean width of its groups' grids
    relative to their extremes, `scaled_by` the module that took up the inverse of its channels' scale.
    """

    name: str
    method: str
    error: float
    range_kept: float
    scaled_by: str | None
    tokens: int


@dataclass(eq=False)
class Quantization:
    """What became of a model: integers of every linear, vectors that took up scales, and a report of each linear."""

    linears: dict[str, IntCodes] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    reports: list[ModuleReport] = field(default_factory=list)


def refuse_misfits(model: Any, scheme: Scheme) -> None:
    """ModelError names the first linear of the decoder blocks that the format can't hold: none is skipped silently."""
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, f"{prefix}.{index}").items():
            reason = misfit(linear.out_features, linear.in_features, scheme.group_size)
            if reason:
                raise ModelError(
                    f"`{prefix}.{index}.{name}` can't be stored in groups of {scheme.group_size}: {reason}",
                    "try another --group-size",
                )


@torch.inference_mode()
def quantize_model(
    model: Any, scheme: Scheme, windows: Tensor, stored: Mapping[str, torch.dtype], report: Report
) -> Quantization:
    """Quantize the decoder blocks of a float32 `model` in place, by `scheme.method`, on token ids [N, L].

    Afterwards its weights are exactly those that the returned integers mean. `stored` holds the dtype on disk of each
    parameter: what takes up a scale is rounded to it.
    """
    prefix, blocks = find_blocks(model)
    batches = enter(model, blocks, windows)
    (trial,) = enter(model, blocks, windows[:1, :TRIAL_TOKENS])
    done = Quantization()
    for index, block in enumerate(blocks):
        _Block(block, f"{prefix}.{index}", index, scheme, stored, done).quantize(batches, trial)
        advance(block, index, [*batches, trial])
        report(index + 1, len(blocks))
    return done


@dataclass(frozen=True, eq=False)
class _Block:
    """One block at work: where it stands, what is wanted, and where results go."""

    module: Any
    name: str
    index: int
    scheme: Scheme
    stored: Mapping[str, torch.dtype]
    done: Quantization

    def quantize(self, batches: Sequence[Batch], trial: Batch) -> None:
        choose = METHODS[str(self.scheme.method)]
        for group in find_groups(self.module, lambda: run_block(self.module, trial, self.index), self.name):
            seen = observe(self.module, self.index, batches, group.linears[0], group.parent, awq.CALL_TOKENS)
            choice = choose(self.module, group, seen, self.scheme)
            absorber = group.producer if choice.scaled else None
            scale = self._absorb(absorber, choice.scale) if absorber else choice.scale
            for name in group.linears:
                self._settle(name, Choice(scale, choice.clipped), seen, absorber)

    def _absorb(self, producer: Producer, scale: Tensor) -> Tensor:
        """Divide the producer's output by `scale`; returns what its readers must multiply by."""
        module, name = self.module.get_submodule(producer.name), f"{self.name}.{producer.name}"
        scale = fold(self.module, producer, scale, self.stored[f"{name}.weight"])
        if producer.kind == "rows":
            # Scaled after it was quantized: codes don't depend on a factor that a whole row has in common.
            self.done.linears[name] = divide_rows(self.done.linears[name], producer.tie(scale))
            module.weight.copy_(self.done.linears[name].dequantize())
        vectors = {key: value for key, value in module.named_parameters() if value.ndim == 1}
        self.done.vectors |= {f"{name}.{key}": value for key, value in vectors.items()}
        return scale

    def _settle(self, linear: str, choice: Choice, seen: Seen, absorber: Producer | None) -> None:
        """Put one linear's weight onto its grid, for good."""
        name, parameter = f"{self.name}.{linear}", self.module.get_submodule(linear).weight
        weight, gram = awq.rescale(parameter, seen.gram, choice.scale)
        clipped = linear in choice.clipped
        plain = quantize_weight(weight, self.scheme)
        settled = quantize_weight(weight, self.scheme, gram) if clipped else plain
        parameter.copy_(settled.dequantize())
        self.done.linears[name] = settled
        self.done.reports.append(
            ModuleReport(
                name=name,
                method="awq" if clipped or choice.scaled else "rtn",
                error=relative_error(weight, parameter, gram),
                range_kept=float((settled.scales.float() / plain.scales.float()).mean()),
                scaled_by=f"{self.name}.{absorber.name}" if absorber else None,
                tokens=seen.tokens,
            )
        )
