"""`Scheme`: a precision. How many bits a weight costs, scales and zeros included, and in what the products are done."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt_cli.errors import UnknownNameError


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store the linear layers. `group_size=0` means one scale for a whole output row (or none, at 16 bits).

    `weight_only` schemes compute in the model's 16-bit dtype, the others in their own.
    """

    name: str
    weight_bits: int
    group_size: int = 0
    symmetric: bool = True
    scale_bits: int = 0
    zero_bits: int = 0
    weight_only: bool = True
    method: str | None = None
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a quantized linear layer: the code and its share of the group's scale and zero."""
        shared = (self.scale_bits + self.zero_bits) / self.group_size if self.group_size else 0.0
        return self.weight_bits + shared

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.weight_bits < 16


def _int4(name: str, method: str, note: str) -> Scheme:
    return Scheme(name, 4, 128, symmetric=False, scale_bits=16, zero_bits=4, method=method, note=note)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", 32, note="full precision"),
        Scheme("bf16", 16, note="the usual precision of a checkpoint"),
        Scheme("fp8", 8, weight_only=False, note="e4m3, one scale per output row"),
        Scheme("int8", 8, note="one scale per output row"),
        Scheme("int4", 4, note="bare 4 bits, as the rule of thumb counts them"),
        _int4("awq", "awq", "activation-aware 4 bits, groups of 128"),
        _int4("rtn", "rtn", "round to nearest, 4 bits, groups of 128"),
        Scheme("gptq", 4, 128, scale_bits=16, zero_bits=4, note="Hessian-corrected 4 bits, groups of 128"),
    )
}
ALIASES = {"fp16": "bf16", "float16": "bf16", "bfloat16": "bf16", "float32": "fp32", "auto": "bf16"}


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`; an unknown name raises UnknownNameError with the nearest ones."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in SCHEMES:
        raise UnknownNameError("scheme", name, SCHEMES)
    return SCHEMES[key]
