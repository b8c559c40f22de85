"""What the table promises of every method: codes that its formats hold, in the bits it names, and its own name."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.quant.job import Job
from llmopt_cli.quant.methods import METHODS

WIDTH = 256  # a multiple of every group and block


ALONE = [one for one in METHODS.values() if not one.scheme.static_inputs]  # the others are told an input scale, too


@pytest.mark.parametrize(("name", "bits"), [(one.name, bits) for one in ALONE for bits in one.bits])
def test_what_a_method_makes_can_be_stored_in_all_of_its_formats(name: str, bits: int) -> None:
    method = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(2))
    gram = inputs.T @ inputs / WIDTH if method.needs_gram else None
    fitting = 0
    for layout, symmetric in product(method.formats, (method.scheme.symmetric, True)):
        scheme = replace(method.scheme, weight_bits=bits, symmetric=symmetric)
        form = FORMATS[layout]
        if form.misfit(WIDTH, WIDTH, scheme) is None:
            solved = method.solver(weight, gram, scheme)
            assert solved.method == name
            read = form.unpack(form.pack(solved.codes, scheme), scheme)
            assert torch.equal(read.dequantize(), solved.codes.dequantize())
            fitting += 1
    assert fitting


@pytest.mark.parametrize("name", METHODS)
def test_the_default_format_holds_the_default_scheme(name: str) -> None:
    method = METHODS[name]
    assert method.scheme.method == name
    assert FORMATS[method.formats[0]].misfit(WIDTH, WIDTH, method.scheme) is None


def test_without_a_format_it_is_the_first_that_holds_the_bits() -> None:
    assert Job("demo", method="awq").layout.name == "awq"
    assert Job("demo", method="awq", bits=3).layout.name == "compressed-tensors"
    assert Job("demo", method="rtn", target_bpw=3.5).layout.name == "compressed-tensors"
