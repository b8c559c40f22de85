"""What a decoder block is made of, found by running it: which linears read one tensor, and what can absorb a scale.

No architecture is known by name. A claim about a block (this norm feeds those linears) is tried out on the block
itself, in float32, before anything relies on it. Knows no quantization.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.experts import Experts

Run = Callable[[], Tensor]  # one forward pass of a block on an example: its output
TOLERANCE = 1e-3  # of the change that an uncompensated scale makes


@dataclass(frozen=True)
class Producer:
    """The module whose output, divided per channel, can be compensated in the linears that read it.

    `heads` is (groups, repeats, width): consumer channel (g, r, i) is fed by producer channel (g, i). It is
    (1, 1, channels) but for a value projection whose heads several query heads share.
    """

    name: str
    kind: Literal["gain", "offset gain", "rows"]
    heads: tuple[int, int, int]

    def tie(self, values: Tensor) -> Tensor:
        """Consumer channels to producer channels: the mean over those that share one."""
        return values.view(self.heads).mean(1).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Producer channels to consumer channels."""
        groups, _, width = self.heads
        return values.view(groups, 1, width).expand(self.heads).reshape(-1)


@dataclass(frozen=True)
class Whole:
    """A module whose output is that of a linear in it: by itself, or in a tuple with `more` things that are None."""

    name: str
    more: int | None

    def answer(self, output: Tensor) -> Any:
        """What the module puts out when its linear does `output`."""
        return output if self.more is None else (output, *[None] * self.more)


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one tensor; `parent` is the smallest module that holds them all.

    If a lone linear's output is added to the residual stream, `sum` is the norm that reads it first, or `` where the
    block puts it out, and `whole` the largest module that puts out just what the linear does.
    """

    linears: tuple[str, ...]
    parent: str
    producer: Producer | None = None
    sum: str | None = None
    whole: Whole | None = None


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted name; ModelError if the model has no such list."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ModelError(f"`{model.config.model_type}` keeps its {depth} decoder blocks in no list that llmopt can walk")


def find_linears(block: nn.Module, where: str) -> dict[str, nn.Linear]:
    """The block's linear layers by name, without routers: those are small, and experts stand or fall with them.

    ModelError if the block holds weights of another kind, which would be left out.
    """
    routing = find_routers(block)
    linears = {
        name: module for name, module in block.named_modules() if type(module) is nn.Linear and name not in routing
    }
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1 and name.removesuffix(".weight") not in linears.keys() | routing:
            raise ModelError(
                f"`{where}.{name}` is no weight of a linear layer, so it can't be quantized",
                "models whose blocks hold only linear layers and norms can be; `llmopt models` lists some",
            )
    return linears


def find_routers(block: nn.Module) -> set[str]:
    """What stands beside experts and puts out one number, or one an expert: it chooses among them or weighs them."""
    found = set()
    for home, holder in block.named_modules():
        for experts in (child for child in holder.children() if isinstance(child, Experts)):
            for name, child in holder.named_children():
                weight = getattr(child, "weight", None)
                if weight is not None and weight.ndim == 2 and weight.shape[0] in (1, len(experts)):
                    found.add(f"{home}.{name}" if home else name)
    return found


def of_expert(block: nn.Module, linear: str) -> bool:
    """Whether a linear belongs to an expert, which sees some tokens only."""
    within = itertools.accumulate(linear.split("."), lambda path, part: f"{path}.{part}")
    return any(isinstance(block.get_submodule(name), Experts) for name in within)


def find_stages(block: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that can be observed in one run, in order: the same linears of all experts, else one group by itself."""
    holders = [name for name, module in block.named_modules() if isinstance(module, Experts)]
    stages: dict[str, list[Group]] = {}
    for group in groups:
        name = group.linears[0]
        home = next((f"{holder}." for holder in holders if name.startswith(f"{holder}.")), None)
        role = f"{home}*.{name.removeprefix(home).partition('.')[2]}" if home else name
        stages.setdefault(role, []).append(group)
    return list(stages.values())


@torch.inference_mode()
def find_groups(block: nn.Module, run: Run, where: str) -> list[Group]:
    """The block's linears by the tensor they read, in the order they run; producers have passed their trial."""
    linears = find_linears(block, where)
    reads, writes, outputs = _trace(block, linears, run)
    unused = linears.keys() - {name for name, _ in reads}
    if unused:
        raise ModelError(f"`{where}.{min(unused)}` is not run by its block, so its error can't be measured")
    readers: dict[int, list[str]] = {}  # by the identity of a tensor that `reads` keeps alive
    for name, tensor in reads:
        readers.setdefault(id(tensor), []).append(name)
    found = []
    for source, names in readers.items():
        group = Group(tuple(names), names[0] if len(names) == 1 else _common_parent(names))
        norms = [name for name, output in writes if id(output) == source]
        candidates = _candidates(block, group, norms, [name for name, _ in reads])
        producer = next((one for one in candidates if _keeps_output(block, group, one, run)), None)
        group = replace(group, producer=producer, sum=_find_sum(block, group, run))
        found.append(replace(group, whole=_find_whole(group, outputs) if group.sum is not None else None))
    return found


def _find_sum(block: nn.Module, group: Group, run: Run) -> str | None:
    """Where a change of a lone linear's output first arrives as it is: a random one is tried out.

    Tokens may be in rows of windows in one place and in one row in another.
    """
    if len(group.linears) > 1 or of_expert(block, group.linears[0]):
        return None
    linear = block.get_submodule(group.linears[0])
    before = _arrivals(block, linear, run, None)
    random = torch.Generator().manual_seed(0)
    shape = before.pop("output").shape
    change = torch.randn(shape, generator=random).to(before[""]) * before[""].abs().mean()
    if shape[-1] != before[""].shape[-1] or change.numel() != before[""].numel():
        return None
    after = _arrivals(block, linear, run, change)
    alike = (name for name, one in before.items() if one.shape[-1] == shape[-1] and one.numel() == change.numel())
    return next((name for name in alike if _equal((after[name] - before[name]).view(shape), change)), None)


def _arrivals(block: nn.Module, linear: nn.Module, run: Run, change: Tensor | None) -> dict[str, Tensor]:
    """What norms read, by their names, in running order, and the block's output; `output` is the linear's own."""
    found: dict[str, Tensor] = {}

    def answer(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        found["output"] = output
        return output if change is None else output + change

    hooks = [linear.register_forward_hook(answer)]
    for name, module in block.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].clone()))
            )
    found[""] = run()
    for hook in hooks:
        hook.remove()
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < TOLERANCE * other.norm())


def fold(block: nn.Module, producer: Producer, scale: Tensor, stored: torch.dtype) -> Tensor:
    """Divide the producer's vectors (a norm's gain and bias, a linear's bias) by `scale` [consumer channels], in place.

    They are rounded to `stored`, the dtype they have on disk. Returns the scale that consumers must multiply by: for
    a norm it makes good the rounding of the gain exactly. The weight rows of a linear are left to the caller.
    """
    module: Any = block.get_submodule(producer.name)
    divisor = producer.tie(scale)
    if producer.kind != "rows":
        offset = 1.0 if producer.kind == "offset gain" else 0.0
        gain = module.weight + offset
        module.weight.copy_((gain / divisor - offset).to(stored))
        rounded = module.weight + offset
        divisor = torch.where(rounded == 0, divisor, gain / rounded)
    if getattr(module, "bias", None) is not None:
        module.bias.copy_((module.bias / divisor).to(stored))
    return producer.spread(divisor)


def _trace(
    block: nn.Module, linears: dict[str, nn.Linear], run: Run
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]], list[tuple[str, Any]]]:
    """(linear, the tensor it read) in running order, (norm, the tensor it wrote), (module, what it put out)."""
    reads: list[tuple[str, Tensor]] = []
    writes: list[tuple[str, Tensor]] = []
    outputs: list[tuple[str, Any]] = []
    hooks = []
    for name, module in block.named_modules():
        if name in linears:
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: reads.append((name, args[0]))))
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            hooks.append(module.register_forward_hook(lambda _, args, out, name=name: writes.append((name, out))))
        if name:
            hooks.append(module.register_forward_hook(lambda _, args, out, name=name: outputs.append((name, out))))
    run()
    for hook in hooks:
        hook.remove()
    return reads, writes, outputs


def _find_whole(group: Group, outputs: Sequence[tuple[str, Any]]) -> Whole | None:
    """The last of the modules around a lone linear whose `outputs` are its own, of tokens in rows of windows."""
    own = next(output for name, output in outputs if name == group.linears[0])
    if own.ndim != 3:
        return None
    found = None
    for name, output in outputs:
        first, *rest = output if isinstance(output, tuple) else (output,)
        if first is own and group.linears[0].startswith(f"{name}.") and all(part is None for part in rest):
            found = Whole(name, len(rest) if isinstance(output, tuple) else None)
    return found


def _common_parent(names: Sequence[str]) -> str:
    """`mlp` for `mlp.gate_proj` and `mlp.up_proj`; the block itself is ``."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _candidates(block: nn.Module, group: Group, norms: list[str], order: list[str]) -> Iterator[Producer]:
    """What might absorb a scale of the group's input: the norm that wrote it, or an earlier linear of its module."""
    first: Any = block.get_submodule(group.linears[0])
    width = int(first.in_features)
    for name in norms:
        yield Producer(name, "gain", (1, 1, width))
        yield Producer(name, "offset gain", (1, 1, width))
    home = group.linears[0].rpartition(".")[0]
    for name in reversed(order[: order.index(group.linears[0])]):
        linear: Any = block.get_submodule(name)
        outputs = int(linear.out_features)
        head = int(getattr(block.get_submodule(home), "head_dim", outputs))
        if name.rpartition(".")[0] == home and width % outputs == 0 and outputs % head == 0:
            yield Producer(name, "rows", (outputs // head, width // outputs, head))


def _keeps_output(block: nn.Module, group: Group, producer: Producer, run: Run) -> bool:
    """Whether dividing the producer and multiplying the consumers by a random scale leaves the block's output alone."""
    modules: dict[str, Any] = {name: block.get_submodule(name) for name in (*group.linears, producer.name)}
    saved = [(parameter, parameter.clone()) for module in modules.values() for parameter in module.parameters()]
    consumers = [modules[name] for name in group.linears]
    random = torch.rand(consumers[0].in_features, generator=torch.Generator().manual_seed(0))
    scale = producer.spread(producer.tie(torch.exp2(2 * random - 1))).to(consumers[0].weight.device)
    before = run()
    for consumer in consumers:
        consumer.weight.mul_(scale)
    unfolded = (run() - before).norm()
    fold(block, producer, scale, torch.float32)
    if producer.kind == "rows":
        modules[producer.name].weight.div_(producer.tie(scale)[:, None])
    folded = (run() - before).norm()
    for parameter, value in saved:
        parameter.copy_(value)
    return bool(folded < TOLERANCE * unfolded)
