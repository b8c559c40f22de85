"""LoRA adapters on a running model: to the outputs of its linears, `scale * B A x` is added for the rows that want it.

The modules stay what they are, packed or fused: a hook adds behind them, and without adapters there is none. A fused
linear has one pair of factors for all its members: their `A` stacked, their `B` as blocks of a diagonal, hence two
products for an adapter whatever it targets. Knows rows, not requests. The files are `spec.adapter`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmopt_cli.errors import CheckpointError, ModelError, UsageError
from llmopt_cli.model.linear import CodedLinear, DenseLinear, JoinedLinear, MergedLinear, PackedLinear
from llmopt_cli.spec.adapter import WEIGHTS, Adapter

TOKENS = 3  # of the run that shows which linears see every token

Read = Callable[[str, str], Tensor]  # the factor of a module


class Place(NamedTuple):
    """Where a linear of the checkpoint is: rows `start` .. `start + rows` of the output of `module`."""

    module: nn.Module
    start: int
    rows: int
    columns: int


class Factors(NamedTuple):
    """`down` (R, in) and `up` (out, R), scaled: what one adapter adds to a module's output is `up @ down @ x`."""

    down: Tensor
    up: Tensor


@dataclass
class Choice:
    """Which rows of the running step each adapter is for; None for all of them. Empty outside of steps."""

    rows: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """The hook of one module: adds what each adapter has for it."""

    choice: Choice
    factors: Mapping[str, Factors]

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Inputs (..., in), out (..., out), changed in place: no row but those of an adapter's requests."""
        for name, rows in self.choice.rows.items():
            if name not in self.factors:
                continue
            down, up = self.factors[name]
            x, y = inputs[0].flatten(0, -2), out.view(-1, out.shape[-1])
            if rows is None:
                y += F.linear(F.linear(x, down), up)
            else:
                y.index_add_(0, rows, F.linear(F.linear(x.index_select(0, rows), down), up))


class Loras:
    """The adapters of one model, read and fitted to it; they take part between `hang` and `release`.

    Raises CheckpointError for an adapter that was made for another model, ModelError for one that adapts a layer which
    does not see every token.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter]) -> None:
        self.names = [adapter.name for adapter in adapters]
        self._choice = Choice()
        self._hooks: list[Any] = []
        self._factors: dict[nn.Module, dict[str, Factors]] = {}
        known = places(model) if adapters else {}
        for adapter in adapters:
            check(adapter, known)
        for adapter in adapters:
            for module, factors in _read(adapter, known):
                self._factors.setdefault(module, {})[adapter.name] = factors
        if adapters:
            _check_rows(model, known, self._factors.keys())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in memory."""
        pairs = (pair for of_module in self._factors.values() for pair in of_module.values())
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def hang(self) -> None:
        """Add to what the model computes from now on."""
        self._hooks = [
            module.register_forward_hook(Delta(self._choice, factors)) for module, factors in self._factors.items()
        ]

    def release(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def require(self, name: str) -> None:
        """Raise UsageError for the name of no adapter; the empty one is that of none."""
        if name and name not in self.names:
            loaded = ", ".join(f"`{one}`" for one in self.names) or "none"
            raise UsageError(f"there is no adapter `{name}` here", f"loaded: {loaded}")

    def choose(self, rows: Mapping[str, Sequence[int]], count: int, device: torch.device) -> None:
        """From now on, each adapter is for those of the `count` rows of a step."""
        self._choice.rows = {
            name: None if len(mine) == count else torch.tensor(mine, device=device) for name, mine in rows.items()
        }


def places(model: Any) -> dict[str, Place]:
    """Every linear by its name in the checkpoint, but the output head: that does not see every token."""
    joined = {path for path, module in model.named_modules() if isinstance(module, JoinedLinear)}
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        parent, _, own = path.rpartition(".")
        if isinstance(module, MergedLinear | PackedLinear | CodedLinear):
            members, columns = module.members, module.in_features
        elif type(module) in (nn.Linear, DenseLinear):  # routers, say, inherit from the first and return more
            members, columns = {own: module.out_features}, module.in_features
        else:
            continue
        parent = parent.rpartition(".")[0] if parent in joined else parent
        start = 0
        for name, rows in members.items():
            found[f"{parent}.{name}"] = Place(module, start, rows, columns)
            start += rows
    return found


def check(adapter: Adapter, known: Mapping[str, Place]) -> None:
    """Raise CheckpointError unless the adapter has factors for just those linears that it targets, and they fit."""
    name, wanted = adapter.name, {module for module in known if adapter.targets(module)}
    hint = "it was made for another model, or another version of this one"
    if strange := [module for module in adapter.factors if module not in known]:
        raise CheckpointError(
            f"the adapter `{name}` changes `{strange[0]}`, and the model has no such linear layer", hint
        )
    if unwanted := [module for module in adapter.factors if module not in wanted]:
        raise CheckpointError(f"the adapter `{name}` stores factors of `{unwanted[0]}`, which it does not target")
    if missing := [module for module in known if module in wanted and module not in adapter.factors]:
        raise CheckpointError(
            f"the adapter `{name}` has no factors for {len(missing)} of the {len(wanted)} layers it targets, first "
            f"`{missing[0]}`",
            hint,
        )
    for module, pair in adapter.factors.items():
        place, rank = known[module], adapter.rank(module)
        fitting = {"A": (rank, place.columns), "B": (place.rows, rank)}
        for factor, shape in fitting.items():
            if pair[factor].shape != shape:
                raise CheckpointError(
                    f"the adapter `{name}` has a factor {factor} of shape {list(pair[factor].shape)} for `{module}`, "
                    f"where rank and model make it {list(shape)}",
                    hint,
                )


def _read(adapter: Adapter, known: Mapping[str, Place]) -> Iterator[tuple[nn.Module, Factors]]:
    """The factors of every module that the adapter changes, its members' as one pair."""
    from safetensors import safe_open

    grouped: dict[nn.Module, list[str]] = {}
    for name in adapter.factors:
        grouped.setdefault(known[name].module, []).append(name)
    with safe_open(adapter.path / WEIGHTS, framework="pt") as file:

        def read(module: str, factor: str) -> Tensor:
            found: Tensor = file.get_tensor(f"base_model.model.{module}.lora_{factor}.weight")
            return found.float()

        for module, names in grouped.items():
            yield module, _joined(adapter, module, {name: known[name] for name in names}, read)


def _joined(adapter: Adapter, module: Any, members: Mapping[str, Place], read: Read) -> Factors:
    """The members' factors as one pair, in the dtype the module computes in; the scale is in `up`."""
    like = next(module.parameters())
    dtype = module.dtype if isinstance(module, PackedLinear | CodedLinear) else like.dtype
    ranks = [adapter.rank(name) for name in members]
    up = torch.zeros(_outputs(module), sum(ranks))
    column = 0
    for (name, place), rank in zip(members.items(), ranks, strict=True):
        rows, columns = slice(place.start, place.start + place.rows), slice(column, column + rank)
        up[rows, columns] = read(name, "B") * adapter.scale(name)
        column += rank
    down = torch.cat([read(name, "A") for name in members])
    return Factors(down.to(like.device, dtype), up.to(like.device, dtype))


def _outputs(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else sum(module.members.values()))


@torch.inference_mode()
def _check_rows(model: Any, known: Mapping[str, Place], modules: Iterable[nn.Module]) -> None:
    """Run a few tokens: a linear that an expert, say, calls with some of them would add to the wrong rows."""
    seen: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module].append(inputs[0].numel() // inputs[0].shape[-1])

    hooks = [module.register_forward_pre_hook(note) for module in seen]
    try:
        ids = torch.arange(TOKENS, device=model.device)[None]
        model(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, place in known.items():
        if place.module in seen and seen[place.module] != [TOKENS]:
            raise ModelError(f"`{name}` does not see each token once, so that no adapter can change it")
