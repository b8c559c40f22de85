"""Quantizing one decoder block in place: linears in the order they run, each seeing the ones before it quantized.

Knows how a group's scale is taken up and how one weight is put on its grid; neither files nor other blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import Codes, FloatCodes, IntCodes
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.quant.awq import Choice, rescale
from llmopt_cli.quant.correct import corrected
from llmopt_cli.quant.fp8 import with_fixed_inputs
from llmopt_cli.quant.grid import divide_rows, relative_error
from llmopt_cli.quant.methods import METHODS, Method
from llmopt_cli.quant.rotate import Rotation
from llmopt_cli.quant.skeleton import rounded_inputs
from llmopt_cli.quant.solved import RangeError, Solved
from llmopt_cli.quant.structure import Group, Producer, find_stages, fold
from llmopt_cli.quant.walk import Seen
from llmopt_cli.spec.scheme import Scheme

FEWEST_TOKENS = 32  # that a linear must have seen for its statistics to mean anything: an expert may see none
FALLBACK = "rtn"
Watch = Callable[[Sequence[Group]], list[Seen]]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What was done to one linear. `method` is the one really in effect; `fallback` says that it is not the one wanted.

    `scheme` names its precision, which with GGUF is the type of its blocks, and `bits` are those of a code in it.
    `error` is |(W' - W) x| / |W x| on the calibration tokens it saw (None if it saw none), W being what was to be
    quantized; `damping` is what was added to the mean diagonal of its Hessian, `scaled_by` the module that took up the
    inverse of its channels' scale.
    """

    name: str
    method: str
    fallback: bool
    scheme: str
    bits: int
    damping: float
    error: float | None
    scaled_by: str | None
    tokens: int
    inputs: int


@dataclass(frozen=True, eq=False)
class Settings:
    """What is wanted of a model. `stored` holds the dtype on disk of each parameter, by its name in the tree.

    `exceptions` are linears of another precision, `ends` weights outside the blocks that are quantized without any
    statistics. `rotation` turns the model beforehand; `head` quantizes the output head with statistics, `kv_scales`
    asks for those of an 8-bit KV cache. `products` is the dtype in which the calibration text is multiplied.
    """

    method: Method
    format: Format
    scheme: Scheme
    stored: Mapping[str, torch.dtype]
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    ends: Mapping[str, Scheme] = field(default_factory=dict)
    strict: bool = False
    correct: bool = False
    rotation: Rotation | None = None
    head: bool = False
    kv_scales: bool = False
    products: torch.dtype = torch.float32

    def scheme_of(self, linear: str) -> Scheme:
        """The precision of the linear of this name in the tree."""
        return self.exceptions.get(linear, self.scheme)


@dataclass(eq=False)
class Made:
    """What became of a block: codes of every linear, vectors that took up scales, and a report of each linear."""

    linears: dict[str, Codes] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    reports: list[ModuleReport] = field(default_factory=list)


def digest(weight: Tensor) -> str:
    """A hash of the float32 numbers, equal only for equal weights."""
    return hashlib.sha256(weight.detach().to("cpu", torch.float32).contiguous().numpy().data).hexdigest()


@torch.inference_mode()
def quantize_block(block: nn.Module, where: str, groups: Sequence[Group], watch: Watch, settings: Settings) -> Made:
    """Quantize the linears of `groups` in `block`, in place; afterwards its weights are those that the codes mean.

    `block` is called `where` in the tree, which is `` for the whole of it. `watch` says what groups see, with all
    before them quantized. ModelError if that is not finite, or with `settings.strict` as soon as a linear has to fall
    back.
    """
    made = Made()
    at_work = _Block(block, where, settings, made)
    for stage in find_stages(block, groups):
        for group, seen in zip(stage, watch(stage), strict=True):
            try:
                at_work.quantize(group, seen)
            except RangeError:
                names = "`, `".join(at_work.full(linear) for linear in group.linears)
                raise RangeError(f"a weight of `{names}`") from None
    return made


@dataclass(frozen=True, eq=False)
class _Block:
    """One block at work: where it stands, what is wanted, and where results go."""

    module: Any
    name: str
    settings: Settings
    made: Made

    def full(self, name: str) -> str:
        """The name in the tree of a module of this block."""
        return f"{self.name}.{name}" if self.name else name

    def quantize(self, group: Group, seen: Seen) -> None:
        first = self.full(group.linears[0])
        if not bool(seen.gram.isfinite().all()):
            raise ModelError(f"the inputs of `{first}` are not finite numbers", "check the model, or try --device cpu")
        method = self._method(seen)
        choice = Choice(torch.ones_like(seen.mean_abs), frozenset(group.linears))
        if method.scaler is not None:
            choice = method.scaler(self.module, group, seen, self.settings.scheme_of(first))
        absorber = group.producer if choice.scaled else None
        scale = self._absorb(absorber, choice.scale) if absorber else choice.scale
        for linear in group.linears:
            self._settle(linear, group, method, replace(choice, scale=scale), seen)

    def _method(self, seen: Seen) -> Method:
        """The one wanted, unless too little was seen for it."""
        wanted = self.settings.method
        if seen.tokens >= FEWEST_TOKENS or not wanted.needs_gram:
            return wanted
        return METHODS[FALLBACK] if wanted.blind is None else replace(wanted, solver=wanted.blind, needs_gram=False)

    def _absorb(self, producer: Producer, scale: Tensor) -> Tensor:
        """Divide the producer's output by `scale`; returns what its readers must multiply by."""
        module, name = self.module.get_submodule(producer.name), self.full(producer.name)
        scale = fold(self.module, producer, scale, self.settings.stored[f"{name}.weight"])
        if producer.kind == "rows":
            # Scaled after it was quantized: codes don't depend on a factor that a whole row has in common.
            codes = self.made.linears[name]
            assert isinstance(codes, IntCodes)
            self.made.linears[name] = divide_rows(codes, producer.tie(scale))
            module.weight.copy_(self.made.linears[name].dequantize())
        self.made.vectors |= {f"{name}.{key}": value for key, value in module.named_parameters() if value.ndim == 1}
        return scale

    def _settle(self, linear: str, group: Group, method: Method, choice: Choice, seen: Seen) -> None:
        """Put one linear's weight onto its grid, for good."""
        name, module = self.full(linear), self.module.get_submodule(linear)
        scheme = self.settings.scheme_of(name)
        weight, gram = module.weight.clone(), seen.gram
        if seen.cross is not None:
            weight = corrected(weight, gram, seen.cross if group.sum is not None else weight @ seen.cross)
        if choice.scaled:
            weight, gram = rescale(weight, gram, choice.scale)
        solved = method.solver(weight, gram if method.needs_gram and linear in choice.clipped else None, scheme)
        module.weight.copy_(solved.codes.dequantize())
        self.made.linears[name] = solved.codes
        if scheme.static_inputs:
            assert isinstance(solved.codes, FloatCodes)
            self.made.linears[name] = with_fixed_inputs(solved.codes, seen.max_abs / choice.scale, name)
        if not scheme.weight_only:
            given = getattr(self.made.linears[name], "input_scale", None)
            module.register_forward_pre_hook(partial(rounded_inputs, scheme=scheme, given=given))
        error = relative_error(weight, module.weight, gram) if seen.tokens else None
        self._report(name, solved, error, seen, group.producer if choice.scaled else None)

    def _report(self, name: str, solved: Solved, error: float | None, seen: Seen, absorber: Producer | None) -> None:
        wanted, scheme = self.settings.method.name, self.settings.scheme_of(name)
        report = ModuleReport(
            name=name,
            method=solved.method,
            fallback=solved.method != wanted,
            scheme=scheme.name,
            bits=scheme.weight_bits,
            damping=solved.damping,
            error=error,
            scaled_by=self.full(absorber.name) if absorber else None,
            tokens=seen.tokens,
            inputs=len(seen.mean_abs),
        )
        if report.fallback and self.settings.strict:
            raise ModelError(
                f"`{name}` fell back from {wanted} to {report.method} (it saw {seen.tokens} tokens)",
                "leave out --strict, or give more calibration text",
            )
        self.made.reports.append(report)
