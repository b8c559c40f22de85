"""`Scheme`: a precision of the weights, `KvDtype`: one of the KV cache. Bits include scales and zeros.

Knows how many bits a value costs and in what the products are done, not how anything is packed or how fast it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from llmopt_cli.errors import UnknownNameError
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.model import Matrix, ModelSpec

Compute = Literal["bf16", "fp8", "int8", "fp4"]
COVERED: dict[str, frozenset[Matrix]] = {
    "linear": frozenset(("query", "key", "value", "output", "latent", "ffn", "down", "expert_ffn", "expert_down")),
    "experts": frozenset(("expert_ffn", "expert_down")),
    "all": frozenset(get_args(Matrix)),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store the linear layers. `group_size=0` means one scale for a whole output row (or none, at 16 bits).

    `compute` is the dtype of the products: "bf16" for weight-only schemes, whatever 16-bit dtype the model has.
    `covers` says what is quantized: the linear layers of the blocks, the experts alone, or every matrix with
    embeddings and output head. `other_bits` is what a value of the rest costs. Of the inputs of int8 and fp8 products,
    those at least as large as `outliers` (if not 0) stay in 16 bits; `static_inputs` fixes their scale beforehand.
    """

    name: str
    weight_bits: int
    group_size: int = 0
    symmetric: bool = True
    scale_bits: int = 0
    zero_bits: int = 0
    compute: Compute = "bf16"
    covers: Literal["linear", "experts", "all"] = "linear"
    extra_bits: float = 0.0
    outliers: float = 0.0
    static_inputs: bool = False
    method: str | None = None
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a quantized linear layer: the code and its share of the group's scale and zero."""
        shared = (self.scale_bits + self.zero_bits) / self.group_size if self.group_size else 0.0
        return self.weight_bits + shared + self.extra_bits

    def at(self, bits: int) -> Scheme:
        """The same with codes, and zeros if there are any, of other bits."""
        return replace(self, weight_bits=bits, zero_bits=bits if self.zero_bits else 0)

    @property
    def other_bits(self) -> float:
        """Bits per weight of what the scheme does not cover: 16, or 32 in full precision."""
        return max(16, self.weight_bits)

    def matrix_bits(self, spec: ModelSpec) -> Mapping[Matrix, float]:
        """Bits per weight of every kind of matrix of `spec`."""
        if mix := MIXES.get(self.name):
            return mix.bits(spec)
        covered = COVERED[self.covers]
        return {kind: self.bits_per_weight if kind in covered else self.other_bits for kind in get_args(Matrix)}

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.weight_bits < 16

    @property
    def weight_only(self) -> bool:
        """Whether weights are unpacked to 16 bits before they are multiplied."""
        return self.compute == "bf16"


def _int4(name: str, method: str, note: str) -> Scheme:
    return Scheme(name, 4, 128, symmetric=False, scale_bits=16, zero_bits=4, method=method, note=note)


def _gguf(name: str, bits: int, bits_per_weight: float, note: str) -> Scheme:
    """`bits_per_weight` is the mean in the layers of Llama-3.1-8B; `matrix_bits` has it for any model."""
    return Scheme(name, bits, extra_bits=bits_per_weight - bits, covers="all", note=note)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", 32, note="full precision"),
        Scheme("bf16", 16, note="the usual precision of a checkpoint"),
        Scheme("fp8", 8, compute="fp8", note="e4m3, one scale per output row"),
        Scheme("fp8_block", 8, 128 * 128, scale_bits=32, compute="fp8", note="e4m3, blocks of 128 x 128 (DeepSeek)"),
        Scheme("int8", 8, note="one scale per output row, weights alone"),
        Scheme("w8a8", 8, compute="int8", note="int8 weights and activations"),
        Scheme("int4", 4, note="bare 4 bits, as the rule of thumb counts them"),
        _int4("awq", "awq", "activation-aware 4 bits, groups of 128"),
        _int4("rtn", "rtn", "round to nearest, 4 bits, groups of 128"),
        Scheme("gptq", 4, 128, scale_bits=16, zero_bits=4, note="Hessian-corrected 4 bits, groups of 128"),
        Scheme("gptq-3bit", 3, 128, scale_bits=16, zero_bits=3, note="Hessian-corrected 3 bits, groups of 128"),
        Scheme("nf4", 4, 64, scale_bits=32, note="bitsandbytes 4 bits, blocks of 64"),
        Scheme(
            "nf4-nested", 4, 64, scale_bits=8, extra_bits=32 / (64 * 256), note="nf4 whose scales are in 8 bits (QLoRA)"
        ),
        Scheme("nvfp4", 4, 16, scale_bits=8, compute="fp4", note="e2m1 with a scale per 16, weights and activations"),
        Scheme(
            "mxfp4", 4, 32, scale_bits=8, covers="experts", note="e2m1 with a scale per 32, experts alone (gpt-oss)"
        ),
        _gguf("q8_0", 8, 8.5, "GGUF, blocks of 32"),
        _gguf("q6_k", 6, 6.5625, "GGUF k-quant"),
        _gguf("q5_k_m", 5, 5.65, "GGUF k-quant mix"),
        _gguf("q5_k_s", 5, 5.5, "GGUF k-quant mix"),
        _gguf("q4_k_m", 4, 4.8, "GGUF k-quant mix"),
        _gguf("q4_k_s", 4, 4.54, "GGUF k-quant mix"),
        _gguf("q4_0", 4, 4.52, "GGUF, blocks of 32"),
        _gguf("q3_k_m", 3, 3.84, "GGUF k-quant mix"),
        _gguf("q2_k", 2, 2.94, "GGUF k-quant mix"),
    )
}
BF16 = SCHEMES["bf16"]
ALIASES = {"fp16": "bf16", "float16": "bf16", "bfloat16": "bf16", "float32": "fp32", "auto": "bf16", "f16": "bf16"}


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`; an unknown name raises UnknownNameError with the nearest ones."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in SCHEMES:
        raise UnknownNameError("scheme", name, SCHEMES)
    return SCHEMES[key]


@dataclass(frozen=True, slots=True)
class KvDtype:
    """How a cached key or value is stored. `scale_bits` is what each token and head adds for its scale."""

    name: str
    bits: int
    scale_bits: int = 0

    def bytes_per_value(self, head_dim: int) -> float:
        """Bytes of one cached value of a head of `head_dim`, its share of the scale included."""
        return (self.bits + self.scale_bits / head_dim) / 8


KV_DTYPES: dict[str, KvDtype] = {
    dtype.name: dtype
    for dtype in (
        KvDtype("auto", 16),
        KvDtype("fp8", 8),
        KvDtype("int8", 8, scale_bits=16),
        KvDtype("int4", 4, scale_bits=32),
    )
}
KV_ALIASES = {
    "bf16": "auto",
    "bfloat16": "auto",
    "fp16": "auto",
    "float16": "auto",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
}
KV_16 = KV_DTYPES["auto"]


def find_kv_dtype(name: str) -> KvDtype:
    """The cache dtype called `name`; an unknown name raises UnknownNameError with the nearest ones."""
    key = KV_ALIASES.get(name.lower(), name.lower())
    if key not in KV_DTYPES:
        raise UnknownNameError("KV cache dtype", name, [*KV_DTYPES, *KV_ALIASES])
    return KV_DTYPES[key]


def cache_of(name: str, scheme: Scheme) -> KvDtype:
    """The cache dtype called `name` beside weights in `scheme`: `auto` is as wide as they are computed in."""
    wide = name == "auto" and scheme.weight_bits > 16
    return KvDtype("float32", scheme.weight_bits) if wide else find_kv_dtype(name)
