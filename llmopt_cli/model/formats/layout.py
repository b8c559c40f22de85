"""What every file format of quantized linears answers: the one noun that loader, quantizer and converter work with.

Knows no format; `table` lists them. A format stores each linear `X` as a few tensors `X.SUFFIX` beside one
`quantization_config` for the whole checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import Codes, IntCodes
from llmopt_cli.spec.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Schemes:
    """What a `quantization_config` declares: one scheme, and those of linears whose names match a pattern."""

    default: Scheme
    exceptions: tuple[tuple[str, Scheme], ...] = ()

    def of(self, linear: str) -> Scheme:
        """The scheme of the linear of this name: that of the first pattern that matches from its start."""
        return next((scheme for pattern, scheme in self.exceptions if re.match(pattern, linear)), self.default)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store quantized linears. Pure functions between codes, stored tensors and configs.

    pack(codes, scheme) -> {suffix: tensor on the CPU}. Exact: what `unpack` makes of them dequantizes to the same
        weight. Asserts what `misfit` refuses.
    unpack(parts, scheme) -> codes. Raises CheckpointError if the parts do not belong together or to the scheme.
    misfit(out, in, scheme) -> why a linear of this shape and scheme cannot be stored, or None.
    config(scheme, left, exceptions) -> `quantization_config`; `left` are linears that stay as they are, `exceptions`
        linears of another scheme (UsageError where the format cannot say that).
    parse_config(found) -> what it declares; CheckpointError if that is not what `unpack` reads.

    `suffixes` are all that a linear may have, `markers` those of which a quantized one has at least one. `engines`
    says who loads the files, as far as it is known: "yes", or on what condition. `config_copy` is a file beside
    config.json that older readers look for the config in. `head_key` of the config says whether the output head is
    quantized, `cache_key` which scales of a KV cache are stored: None where there is nothing to say it with.
    """

    name: str
    quant_method: str
    bits: tuple[int, ...]
    markers: tuple[str, ...]
    suffixes: tuple[str, ...]
    engines: Mapping[str, str]
    pack: Callable[[Any, Scheme], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Scheme], Codes]
    misfit: Callable[[int, int, Scheme], str | None]
    config: Callable[[Scheme, Sequence[str], Mapping[str, Scheme]], dict[str, Any]]
    parse_config: Callable[[Mapping[str, Any]], Schemes]
    config_copy: str | None = None
    head_key: str | None = None
    cache_key: str | None = None

    def linears(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Of a checkpoint with tensors of these names, what each quantized linear is stored as: suffix -> name."""
        ends = sorted((f".{marker}" for marker in self.markers), key=len, reverse=True)
        found: dict[str, dict[str, str]] = {}
        for name in names:
            linear = next((name.removesuffix(end) for end in ends if name.endswith(end)), None)
            if linear is not None and linear not in found:
                stored = {suffix: f"{linear}.{suffix}" for suffix in self.suffixes}
                found[linear] = {suffix: name for suffix, name in stored.items() if name in names}
        return found


def refuse(refusals: Iterable[tuple[bool, str]], reader: str) -> None:
    """Raise CheckpointError with the first refusal that holds; `reader` says what would have been read."""
    for refused, what in refusals:
        if refused:
            raise CheckpointError(
                f"{reader}; this checkpoint has {what}", "give the unquantized model to `llmopt quantize`"
            )


def taken(parts: Mapping[str, Tensor], *suffixes: str) -> list[Tensor]:
    """The parts of these suffixes; CheckpointError if one is missing."""
    missing = [suffix for suffix in suffixes if suffix not in parts]
    if missing:
        raise CheckpointError(f"a quantized linear lacks its `{missing[0]}`", "download the checkpoint again")
    return [parts[suffix] for suffix in suffixes]


def check(condition: bool, parts: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError with the shapes of `parts` unless they are `what`."""
    if not condition:
        shapes = ", ".join(f"{suffix} {list(tensor.shape)}" for suffix, tensor in parts.items())
        raise CheckpointError(f"{shapes} are not {what}")


def group_misfit(in_features: int, scheme: Scheme) -> str | None:
    """Why inputs do not part into the scheme's groups, or None."""
    if scheme.group_size and in_features % scheme.group_size:
        return f"its {in_features} inputs are no multiple of the group size {scheme.group_size}"
    return None


def check_groups(codes: IntCodes, scheme: Scheme) -> IntCodes:
    """`codes` if they are as the scheme says; CheckpointError otherwise."""
    wanted = scheme.group_size or codes.codes.shape[1]
    if codes.group_size != wanted or codes.bits != scheme.weight_bits:
        raise CheckpointError(
            f"a linear has {codes.bits} bits in groups of {codes.group_size} where the config says "
            f"{scheme.weight_bits} bits in groups of {wanted}"
        )
    return codes
