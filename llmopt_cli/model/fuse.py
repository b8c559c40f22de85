"""Fusing by structure: a recognised attention block, MLP, RMSNorm or layer of these is replaced whole by ours.

A block is recognised by its members, not by its model, and ours is kept only if it equals the original on random input
in float32; anything else keeps its own forward. All of it happens on the meta device, before a weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.model.attention import AttentionContext, LayerFacts, PagedLayer
from llmopt_cli.model.fused import FusedAttention, FusedLayer, FusedMLP, FusedRMSNorm
from llmopt_cli.model.linear import CodedLinear, DenseLinear, JoinedLinear, MergedLinear, PackedLinear, merge

TOKENS = 5  # of the random input that a fused block is verified on
SCALES = (1.0, 1000.0)  # of that input: what clamps large values agrees on small ones
TOLERANCE = 1e-4  # of the largest value
Build = Callable[[nn.Module], nn.Module | None]  # our block for a recognised one, sharing its members
Example = tuple[Tensor, dict[str, Any]]  # input and keywords that a block is verified on


def fuse(model: nn.Module) -> dict[str, int]:
    """Replace what is recognised and verified, in place. Returns how many blocks of each kind were fused."""
    verdicts: dict[Any, bool] = {}
    kinds = _kinds(model)
    fused = dict.fromkeys(kinds, 0)
    for parent in reversed(list(model.modules())):  # children first, so that a fused block holds fused norms
        for name, child in list(parent.named_children()):
            for kind, (build, example) in kinds.items():
                ours = build(child)
                if ours is None:
                    continue
                key = (type(child), getattr(ours, "facts", None), _scalars(child), _shapes(child))
                if key not in verdicts:
                    verdicts[key] = _equals(child, build, example)
                if verdicts[key]:
                    setattr(parent, name, ours)
                    fused[kind] += 1
                break
    _swap_products(model)
    return fused


def _swap_products(model: nn.Module) -> None:
    """Let the linears that are left multiply as ours do. Those that inherit from nn.Linear may mean something else."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, DenseLinear.of(child))


def named_slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, the tensor its data goes into) for everything that is stored; members under their own names."""
    joined = {path for path, module in model.named_modules() if isinstance(module, JoinedLinear)}
    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        if parent in joined:
            parent = parent.rpartition(".")[0]
        if isinstance(module, MergedLinear | PackedLinear | CodedLinear):
            for name, tensor in module.slots():
                yield _join(parent, name), tensor
            continue
        path = _join(parent, own)
        for name, tensor in module.named_parameters(recurse=False):
            yield _join(path, name), tensor.data
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _join(path, name), tensor


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _scalars(block: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The block's own settings, by which blocks of one class may differ; its number is none of them."""
    plain = {name: value for name, value in vars(block).items() if isinstance(value, int | float | str)}
    return tuple(sorted((name, value) for name, value in plain.items() if name != "layer_idx"))


def _shapes(block: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(parameter.shape for parameter in block.parameters())


def _attention(block: Any, rotary_dim: int) -> FusedAttention | None:
    members = {name for name, _ in block.named_children()}
    if members - {"q_norm", "k_norm"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return None
    if getattr(block, "head_dim", None) != rotary_dim or not getattr(block, "is_causal", True):
        return None
    facts = _facts(block, rotary_dim)
    qkv = merge({name: block.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")})
    if facts is None or facts.value_dim != facts.head_dim or qkv is None:
        return None
    return FusedAttention(block, facts, qkv)


def _mlp(block: nn.Module) -> FusedMLP | None:
    if {name for name, _ in block.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    gate_up = merge({name: block.get_submodule(name) for name in ("gate_proj", "up_proj")})
    return None if gate_up is None else FusedMLP(block, gate_up)


def _norm(block: nn.Module) -> FusedRMSNorm | None:
    eps = getattr(block, "variance_epsilon", getattr(block, "eps", None))
    parameters = dict(block.named_parameters())
    if "RMSNorm" not in type(block).__name__ or isinstance(block, FusedRMSNorm) or list(parameters) != ["weight"]:
        return None
    return FusedRMSNorm(parameters["weight"], eps) if isinstance(eps, float) else None


def _layer(block: nn.Module) -> FusedLayer | None:
    wanted = {
        "input_layernorm": FusedRMSNorm,
        "self_attn": FusedAttention,
        "post_attention_layernorm": FusedRMSNorm,
        "mlp": FusedMLP,
    }
    return FusedLayer(block) if {name: type(child) for name, child in block.named_children()} == wanted else None


def _facts(block: Any, rotary_dim: int) -> LayerFacts | None:
    """What the block tells the attention interface, from a run of its own forward; None if it does not run alone."""
    layer = PagedLayer(AttentionContext())
    block.paged = layer
    try:
        hidden, others = _attention_example(block, rotary_dim)
        block(hidden, **others)
    except (TypeError, RuntimeError, ValueError, AttributeError, KeyError):
        return None
    return layer.seen


def _attention_example(block: Any, rotary_dim: int) -> Example:
    angles = _example(block, rotary_dim)
    others = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    return _example(block, block.q_proj.in_features), others


def _layer_example(block: Any, rotary_dim: int) -> Example:
    angles = _example(block, rotary_dim)
    others = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    return _example(block, len(block.input_layernorm.weight)), others


def _randomize(parameter: Tensor, holds_floats: bool) -> None:
    """Random numbers of a size that keeps a block's outputs finite; bytes that hold floats stay small."""
    if parameter.is_floating_point():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    elif parameter.dtype == torch.uint8 and parameter.numel() == 1:
        parameter.fill_(8)  # the zero of all weights: one number, whoever shares it
    elif parameter.dtype == torch.uint8:
        parameter.random_(0, 16 if holds_floats or parameter.shape[-1] == 1 else 256)
    else:  # indices: any that exist
        parameter.zero_()


def _example(block: nn.Module, width: int) -> Tensor:
    """(1, TOKENS, width) random input where the block lies, in its floating dtype if it has any."""
    parameters = list(block.parameters())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    return torch.randn(1, TOKENS, width, device=parameters[0].device, dtype=dtype)


@torch.no_grad()
def _equals(original: nn.Module, build: Build, example: Callable[[Any], Example]) -> bool:
    """Whether the block that `build` makes computes what `original` does, on random weights and input in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = copy.deepcopy(original).to_empty(device="cpu").float()
        for module in twin.modules():
            for parameter in module.parameters(recurse=False):
                _randomize(parameter, getattr(module, "holds_floats", False))
        x, others = example(twin)
    ours = build(twin)
    assert ours is not None, "what was recognised on the meta device is recognised on the CPU"
    weights = dict(named_slots(twin))
    for name, slot in named_slots(ours):
        slot.copy_(weights[name])
    return all(_agree(twin, ours, x * scale, others) for scale in SCALES)


def _agree(twin: nn.Module, ours: nn.Module, x: Tensor, others: dict[str, Any]) -> bool:
    try:
        expected, found = twin(x, **others), ours(x, **others)
    except (TypeError, RuntimeError):  # it takes other input, or its products have other shapes
        return False
    if isinstance(expected, tuple) != isinstance(found, tuple):
        return False
    expected, found = (out[0] if isinstance(out, tuple) else out for out in (expected, found))
    return bool((expected - found).abs().max() <= TOLERANCE * expected.abs().max())


def _kinds(model: nn.Module) -> dict[str, tuple[Build, Callable[[Any], Example]]]:
    """What can be fused: how ours is built from a block (None if it is not recognised), and what to verify it on."""
    tables = (getattr(module, "inv_freq", None) for module in model.modules())
    dims = {2 * table.shape[-1] for table in tables if isinstance(table, Tensor)}
    rotary_dim = dims.pop() if len(dims) == 1 else 0  # with several kinds of angles, blocks keep their own forward
    return {
        "attention": (partial(_attention, rotary_dim=rotary_dim), partial(_attention_example, rotary_dim=rotary_dim)),
        "mlp": (_mlp, lambda block: (_example(block, block.gate_proj.in_features), {})),
        "norm": (_norm, lambda block: (_example(block, block.weight.shape[0]), {})),
        "layer": (_layer, partial(_layer_example, rotary_dim=rotary_dim)),
    }
