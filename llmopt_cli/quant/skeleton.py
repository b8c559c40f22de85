"""A model's module tree on the meta device, of which only what is at work holds weights: one block, or the outside.

Weights come from the safetensors files when they are wanted, in float32, and are dropped after use; quantized ones are
expanded. Experts are single linear layers here, and `stored` says under which name of the checkpoint each weight lies.
Peak memory: one block, or embeddings with the final norm and the head.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.model.inputs import round_inputs
from llmopt_cli.model.load import fill_computed_buffers, read_config
from llmopt_cli.model.stream import Source, Store, plan
from llmopt_cli.quant.experts import MEMBERS, split_experts, stacks
from llmopt_cli.quant.structure import find_blocks
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme

M_MMAP_THRESHOLD = -3  # a parameter of glibc's mallopt
LARGE = 4 * 2**20  # bytes: weights and their statistics, but few of a batch's states


class Skeleton:
    """The tree of `checkpoint` for use as a context manager; outside of it no file is open.

    Raises ModelError if blocks cannot be walked or a weight is stored in a way that gives it no name of its own.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        give_back_large_blocks()
        self.checkpoint = checkpoint
        self.device = device
        self._store = Store(checkpoint)
        self.model = _build(checkpoint)
        stacked = {f"{name}.{leaf}" for name, stack in stacks(self.model) for leaf in MEMBERS if hasattr(stack, leaf)}
        found = plan(self.model, self._store.names, self.model.state_dict().keys())
        split_experts(self.model)
        self.prefix, self.blocks = find_blocks(self.model)
        self.stored = _places(found, stacked)
        self._refuse_missing()
        self._place_buffers()
        self._round_inputs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.__exit__(*_)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        return head is not None and head.weight is embedding.weight

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block number `index` with its weights."""
        block, where = self.blocks[index], f"{self.prefix}.{index}"
        names = [f"{where}.{name}" for name, _ in block.named_parameters()]
        with self._filled(names):
            yield block

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Everything but the blocks with its weights: embeddings, norms, head."""
        inside = f"{self.prefix}."
        with self._filled([name for name, _ in self.model.named_parameters() if not name.startswith(inside)]):
            yield

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other weights in their places for a while, by their names in the tree.

        What is tied to one of them follows it, unless it is named itself.
        """
        holders = {id(self.model.get_parameter(name)): slots for name, slots in _holders(self.model).items()}
        replaced = {name: self.model.get_parameter(name) for name in weights}
        held = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        try:
            for name, old in replaced.items():
                _put(holders[id(old)], held[name])
            for name, weight in held.items():
                path, _, leaf = name.rpartition(".")
                _put([(self.model.get_submodule(path), leaf)], weight)
            yield
        finally:
            for old in replaced.values():
                _put(holders[id(old)], old)

    def place(self, name: str) -> str:
        """What a parameter or a module of the tree is called in the files; what they lack keeps its name."""
        if name in self.stored:
            return self.stored[name]
        inside = (known for known in self.stored if known.startswith(f"{name}."))
        tails = ((known.removeprefix(name), self.stored[known]) for known in inside)
        found = next((stored.removesuffix(tail) for tail, stored in tails if stored.endswith(tail)), None)
        parent, dot, leaf = name.rpartition(".")
        return found or (f"{self.place(parent)}.{leaf}" if dot else name)

    def read(self, name: str) -> Tensor:
        """A weight of the tree in float32, on the device."""
        return self._store.get(self.stored[name]).to(self.device, torch.float32, copy=True)

    @contextmanager
    def _filled(self, names: list[str]) -> Iterator[None]:
        holders = _holders(self.model)
        empty = {name: self.model.get_parameter(name) for name in names if name in holders}
        try:
            for name, old in empty.items():
                _put(holders[name], nn.Parameter(self._checked(name, old), requires_grad=False))
            yield
        finally:
            for name, old in empty.items():
                _put(holders[name], old)
            trim()

    def _checked(self, name: str, slot: Tensor) -> Tensor:
        tensor = self.read(name)
        if tensor.shape != slot.shape:
            raise CheckpointError(
                f"`{self.stored[name]}` has shape {list(tensor.shape)} where the model has {list(slot.shape)}"
            )
        return tensor

    def _refuse_missing(self) -> None:
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        wanted = {name for name, _ in self.model.named_parameters()} | (self.model.state_dict().keys() - tied)
        missing = sorted(wanted - self.stored.keys())
        if missing:
            raise CheckpointError(
                f"`{self.checkpoint.path}` lacks {len(missing)} weights of the model, such as `{missing[0]}`"
            )

    def _place_buffers(self) -> None:
        """Buffers are small: those that a checkpoint stores are read, the others computed, once and for all."""
        for path, module in self.model.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    stored = name in self.stored
                    module._buffers[leaf] = (
                        self.read(name).to(buffer.dtype) if stored else torch.empty_like(buffer, device=self.device)
                    )
        fill_computed_buffers(self.model)

    def _round_inputs(self) -> None:
        """Let the linears that are stored for int8 or fp8 products see their inputs as those products do."""
        schemes = self._store.linears
        for name, module in self.model.named_modules():
            linear = self.stored.get(f"{name}.weight", "").removesuffix(".weight")
            scheme = schemes.get(linear)
            if scheme is not None and not scheme.weight_only:
                given = getattr(self._store.codes(linear), "input_scale", None) if scheme.static_inputs else None
                module.register_forward_pre_hook(partial(rounded_inputs, scheme=scheme, given=given))


def rounded_inputs(_: nn.Module, args: tuple[Any, ...], scheme: Scheme, given: Tensor | None) -> tuple[Tensor]:
    """A hook before a linear that lets it see its inputs as the products of `scheme` do."""
    return (round_inputs(args[0], scheme, given),)


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it for itself (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_large_blocks() -> None:
    """Let large pieces of memory go back to the system when they are freed (glibc would learn to keep them)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def _build(checkpoint: Checkpoint) -> Any:
    """The transformers tree on the meta device."""
    from transformers import AutoModelForCausalLM

    config = read_config(checkpoint)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(f"`{checkpoint.name}` is no causal language model: {str(error).splitlines()[0]}") from None
    return model.eval().requires_grad_(False)


def _places(found: dict[str, tuple[Any, list[Source]]], stacked: set[str]) -> dict[str, str]:
    """Weight of the tree -> the name it is stored under."""
    places: dict[str, str] = {}
    for target, (converter, sources) in found.items():
        if target in stacked and converter is None:
            raise ModelError(f"the checkpoint stores all experts of `{target}` in one tensor, which no format holds")
        if target in stacked:
            places |= _experts(target, converter, sources)
        elif len(sources) == 1 and converter is None:
            places[target] = sources[0][0]
        else:
            raise ModelError(f"the checkpoint stores `{target}` in {len(sources)} parts, so they can't be replaced")
    return places


def _experts(target: str, converter: Any, sources: list[Source]) -> dict[str, str]:
    """`mlp.experts.gate_up_proj` made of `experts.3.w1.weight` ... -> `mlp.experts.3.gate_proj.weight` of each."""
    stack, _, leaf = target.rpartition(".")
    seen: dict[str, int] = {}
    places = {}
    for stored, pattern in sources:
        index = seen[pattern] = seen.get(pattern, -1) + 1
        member = MEMBERS[leaf][converter.source_patterns.index(pattern)]
        places[f"{stack}.{index}.{member}.weight"] = stored
    return places


Holders = list[tuple[nn.Module, str]]


def _holders(model: nn.Module) -> dict[str, Holders]:
    """Name of a parameter -> every module and attribute that holds it: several where it is tied."""
    by_identity: dict[int, tuple[str, Holders]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{leaf}" if path else leaf
                by_identity.setdefault(id(parameter), (name, []))[1].append((module, leaf))
    return dict(by_identity.values())


def _put(holders: Holders, parameter: nn.Parameter) -> None:
    for module, leaf in holders:
        module._parameters[leaf] = parameter
