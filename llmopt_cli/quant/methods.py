"""The table of quantization methods: what chooses a group's scale, if anything, and what puts a weight on its grid.

The pipeline walks a model and asks this table; it knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmopt_cli.quant import awq, smooth
from llmopt_cli.quant.awq import Choice
from llmopt_cli.quant.fp8 import fp8
from llmopt_cli.quant.ggml_method import ggml
from llmopt_cli.quant.gptq import gptq
from llmopt_cli.quant.grid import quantize_weight
from llmopt_cli.quant.hqq import hqq
from llmopt_cli.quant.int8 import OUTLIER, int8
from llmopt_cli.quant.nf4 import nf4
from llmopt_cli.quant.solved import Solved, Solver
from llmopt_cli.quant.structure import Group
from llmopt_cli.quant.walk import Seen
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.scheme import Scheme, find_scheme

Scaler = Callable[[nn.Module, Group, Seen, Scheme], Choice]


@dataclass(frozen=True, eq=False)
class Method:
    """One way to quantize.

    `solver` puts a weight on its grid, after `scaler` chose what a group's channels are scaled by. `formats` can hold
    the result, the default first; `bits` are those it can do; `scheme` is what holds unless the user says otherwise.
    With `own_grid` group size and symmetry are the method's own, not the user's choice. `blind` is for weights whose
    inputs were not seen, where rounding to nearest would make nothing that the formats can hold. A `corrected` one
    makes good the errors upstream unless it is told not to.
    """

    name: str
    solver: Solver
    scheme: Scheme
    formats: tuple[str, ...]
    bits: tuple[int, ...]
    needs_gram: bool = False
    scaler: Scaler | None = None
    own_grid: bool = False
    blind: Solver | None = None
    corrected: bool = False

    @property
    def blind_solver(self) -> Solver:
        """What quantizes a weight of which nothing but its numbers is known."""
        return self.blind or _rtn

    def products(self, device: torch.device) -> torch.dtype:
        """What the calibration text is multiplied in: bfloat16 where that is at least twice as fast as float32.

        Means over many tokens don't show its rounding. But a scaler compares the outputs of a few.
        """
        native = device.type != "cpu" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        return torch.bfloat16 if native and self.scaler is None else torch.float32


def _rtn(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    return Solved(quantize_weight(weight, scheme), "rtn")


def _clipped(weight: Tensor, gram: Tensor | None, scheme: Scheme) -> Solved:
    return Solved(quantize_weight(weight, scheme, gram), "awq")


INTEGERS = ("compressed-tensors", "gptq", "gptq_v2", "awq")
BITS = (2, 3, 4, 8)


def _first(name: str) -> tuple[str, ...]:
    """The formats of integers, with this one as the default."""
    return (name, *(one for one in INTEGERS if one != name))


def _own(name: str, solver: Solver, scheme: Scheme, *formats: str, scaler: Scaler | None = None) -> Method:
    """A method whose grid is its own; it needs statistics if it has a scaler."""
    bits = (scheme.weight_bits,)
    return Method(name, solver, replace(scheme, method=name), formats, bits, scaler is not None, scaler, own_grid=True)


def _gguf(mix: str) -> Method:
    """A mix of GGML's block types. 8 bits are too fine for an importance to matter."""
    scheme, importance = replace(find_scheme(mix), method=mix), mix != "q8_0"
    blind = partial(ggml, name="no importance" if importance else mix)
    solver = partial(ggml, name=mix)
    return Method(mix, solver, scheme, ("gguf",), (scheme.weight_bits,), importance, own_grid=True, blind=blind)


NF4 = replace(find_scheme("nf4-nested"), name="nf4")  # by its table; that scales are in 8 bits is said beside it
INT8 = replace(find_scheme("int8"), compute="int8", scale_bits=32, outliers=OUTLIER)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rtn", _rtn, find_scheme("rtn"), _first("awq"), BITS),
        Method("awq", _clipped, find_scheme("awq"), _first("awq"), BITS, needs_gram=True, scaler=awq.choose),
        Method("gptq", gptq, replace(find_scheme("gptq"), method="gptq"), _first("gptq"), BITS, True, corrected=True),
        Method(
            "awq+gptq",
            partial(gptq, name="awq+gptq"),
            replace(find_scheme("gptq"), method="awq+gptq"),
            _first("gptq"),
            BITS,
            needs_gram=True,
            scaler=awq.choose_for_gptq,
            corrected=True,
        ),
        Method("hqq", hqq, replace(find_scheme("rtn"), method="hqq"), _first("awq"), BITS),
        _own("smoothquant", int8, find_scheme("w8a8"), "compressed-tensors", scaler=smooth.choose),
        _own("int8", int8, INT8, "bitsandbytes"),
        _own("nf4", nf4, NF4, "bitsandbytes"),
        _own("fp4", nf4, replace(NF4, name="fp4"), "bitsandbytes"),
        _own("fp8", fp8, find_scheme("fp8"), "compressed-tensors"),
        _own("fp8_static", fp8, replace(find_scheme("fp8"), static_inputs=True), "compressed-tensors"),
        _own("fp8_block", fp8, find_scheme("fp8_block"), "fp8", "compressed-tensors"),
        *map(_gguf, MIXES),
    )
}
