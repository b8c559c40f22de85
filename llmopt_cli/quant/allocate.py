"""Who shares bits with whom, what each would lose at each width, and the precisions that a budget buys.

Linears that engines run as one share their bits: those that read one tensor (query, key and value; gate and up), and
all experts of a block. Knows neither how statistics are gathered nor how a budget is spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import nn

from llmopt_cli.errors import UsageError
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.quant.budget import Stake, sensitivity, spend
from llmopt_cli.quant.experts import Experts
from llmopt_cli.quant.methods import Method
from llmopt_cli.quant.structure import Group
from llmopt_cli.quant.walk import Seen
from llmopt_cli.spec.scheme import Scheme


@dataclass(frozen=True)
class Claim:
    """Linears, by their names in the tree, of `size` weights in all, and what they lose together at each width."""

    linears: tuple[str, ...]
    size: int
    losses: Mapping[int, float]

    def times(self, factor: float) -> Self:
        """The claim with larger losses."""
        return replace(self, losses={bits: factor * loss for bits, loss in self.losses.items()})

    def note(self) -> dict[str, Any]:
        """The claim as JSON can hold it."""
        return asdict(self)

    @classmethod
    def read(cls, note: Mapping[str, Any]) -> Self:
        """A claim out of such a note."""
        losses = {int(bits): loss for bits, loss in note["losses"].items()}
        return cls(tuple(note["linears"]), note["size"], losses)


def widths(method: Method, form: Format, scheme: Scheme, target: float) -> dict[int, Scheme]:
    """The precisions by their bits among which a budget chooses.

    UsageError if the format or the method knows only one, or if `target` bits a weight are too few for any.
    """
    form.config(scheme, (), {"": scheme})  # the format's own words if it can't tell linears apart
    found = {bits: scheme.at(bits) for bits in method.bits if bits in form.bits}
    if len(found) < 2:
        raise UsageError(f"{method.name} makes weights of one width alone", "leave --target-bpw out")
    spend([Stake("", 1, dict.fromkeys(found, 0.0))], target, _costs(found))
    return found


def at_most(schemes: Mapping[int, Scheme], target: float) -> Scheme:
    """What a weight costs on average if a budget is used up."""
    scheme = next(iter(schemes.values()))
    bits = min(target, max(_costs(schemes).values()))
    return replace(scheme, extra_bits=scheme.extra_bits + bits - scheme.bits_per_weight)


def claims(
    block: nn.Module, where: str, pairs: Iterable[tuple[Group, Seen]], schemes: Mapping[int, Scheme]
) -> list[Claim]:
    """The claims of groups of `block` and what they saw, for `schemes` by their bits. An expert's is of all of them."""
    holders = [name for name, module in block.named_modules() if isinstance(module, Experts)]
    together: dict[str, list[Claim]] = {}
    for group, seen in pairs:
        first = group.linears[0]
        home = next((holder for holder in holders if first.startswith(f"{holder}.")), first)
        together.setdefault(home, []).append(_claim(block, where, group, seen, schemes))
    return [_sum(parts) for parts in together.values()]


def _claim(block: nn.Module, where: str, group: Group, seen: Seen, schemes: Mapping[int, Scheme]) -> Claim:
    base = next(iter(schemes.values()))
    weights = [block.get_parameter(f"{name}.weight") for name in group.linears]
    losses = [sensitivity(weight, seen.gram, base, schemes) for weight in weights]
    names = tuple(f"{where}.{name}" if where else name for name in group.linears)
    size = sum(weight.numel() for weight in weights)
    return Claim(names, size, {bits: sum(loss[bits] for loss in losses) for bits in schemes})


def _sum(parts: Sequence[Claim]) -> Claim:
    losses = {bits: sum(part.losses[bits] for part in parts) for bits in parts[0].losses}
    return Claim(tuple(name for part in parts for name in part.linears), sum(part.size for part in parts), losses)


def allot(found: Sequence[Claim], target: float, schemes: Mapping[int, Scheme]) -> tuple[Scheme, dict[str, Scheme]]:
    """The most frequent precision, and linears of another one: at most `target` bits a weight on average."""
    stakes = [Stake(claim.linears[0], claim.size, claim.losses) for claim in found]
    bits = spend(stakes, target, _costs(schemes))
    of = {linear: schemes[bits[claim.linears[0]]] for claim in found for linear in claim.linears}
    [(usual, _)] = Counter(of.values()).most_common(1)
    return usual, {linear: scheme for linear, scheme in of.items() if scheme != usual}


def _costs(schemes: Mapping[int, Scheme]) -> dict[int, float]:
    return {bits: scheme.bits_per_weight for bits, scheme in schemes.items()}
