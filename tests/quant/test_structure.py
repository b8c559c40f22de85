"""What a block is made of, family by family: who reads what, which scales can be folded, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.quant.structure import Group, Producer, find_blocks, find_groups, find_linears, fold
from llmopt_cli.quant.walk import first_output

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 6,
}
ATTENTION, MLP = "self_attn.{}_proj", "mlp.{}_proj"
QKV = tuple(ATTENTION.format(name) for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
V_TO_O = Producer("self_attn.v_proj", "rows", (2, 2, 16))
UP_TO_DOWN = Producer("mlp.up_proj", "rows", (1, 1, 96))


def norm(name: str, kind: str = "gain") -> Producer:
    return Producer(name, kind, (1, 1, 64))  # type: ignore[arg-type]


STREAM = ("post_attention_layernorm", "")  # where the block's two writers first meet the residual stream
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")  # that read a writer's output by itself


def groups_of(
    before_attention: Producer | None,
    before_mlp: Producer | None,
    v_to_o: Producer = V_TO_O,
    sums: tuple[str, str] = STREAM,
) -> list[Group]:
    return [
        Group(QKV, "self_attn", before_attention),
        Group(("self_attn.o_proj",), "self_attn.o_proj", v_to_o, sums[0]),
        Group(GATE_UP, "mlp", before_mlp),
        Group(("mlp.down_proj",), "mlp.down_proj", UP_TO_DOWN, sums[1]),
    ]


USUAL = groups_of(norm("input_layernorm"), norm("post_attention_layernorm"))
OFFSET = groups_of(
    norm("input_layernorm", "offset gain"), norm("pre_feedforward_layernorm", "offset gain"), sums=POST_NORMS
)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[Group]]] = {
    "llama": ("Llama", {}, USUAL),
    "llama-mha": (
        "Llama",
        {"num_key_value_heads": 4},
        groups_of(
            norm("input_layernorm"),
            norm("post_attention_layernorm"),
            Producer("self_attn.v_proj", "rows", (4, 1, 16)),
        ),
    ),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}, USUAL),
    "qwen2": ("Qwen2", {}, USUAL),
    "qwen3": ("Qwen3", {}, USUAL),
    "gemma2": ("Gemma2", {}, OFFSET),
    "olmo2": ("Olmo2", {}, groups_of(None, None, sums=POST_NORMS)),
}


def build(family: str, **changes: Any) -> Any:
    """A tiny random model whose norms and biases are random too: with gains of one a wrong fold could pass."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(TINY | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def first_block(model: Any) -> tuple[Any, Callable[[], Tensor]]:
    """The first block, and how to run it on what reaches it for some tokens."""
    block = find_blocks(model)[1][0]
    calls: list[Any] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    model(input_ids=torch.randint(7, 256, (2, 12), generator=torch.Generator().manual_seed(0)), use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    return block, torch.inference_mode()(lambda: first_output(block(*args, **kwargs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_producers_are_found(family: str) -> None:
    kind, changes, expected = FAMILIES[family]
    block, run = first_block(build(kind, **changes))
    assert [replace(group, whole=None) for group in find_groups(block, run, "0")] == expected


def test_writers_are_found_where_tokens_are_in_one_row() -> None:
    block, run = first_block(build("OPT", ffn_dim=96, word_embed_proj_dim=64))
    sums = {group.linears[-1]: group.sum for group in find_groups(block, run, "0")}
    assert sums == {"self_attn.v_proj": None, "self_attn.out_proj": "final_layer_norm", "fc1": None, "fc2": ""}


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_a_scale_leaves_the_float_output_unchanged(family: str) -> None:
    kind, changes, _ = FAMILIES[family]
    block, run = first_block(build(kind, **changes))
    before = run()
    for group in find_groups(block, run, "0"):
        if group.producer is not None:
            apply_scale(block, group, group.producer)
    after = run()
    assert float((after - before).norm() / before.norm()) < 1e-5


@torch.inference_mode()
def apply_scale(block: Any, group: Group, producer: Producer) -> None:
    width = block.get_submodule(group.linears[0]).in_features
    scale = producer.spread(producer.tie(torch.linspace(0.4, 2.5, width)))
    effective = fold(block, producer, scale, torch.float32)
    if producer.kind == "rows":
        block.get_submodule(producer.name).weight.div_(producer.tie(effective)[:, None])
    for name in group.linears:
        block.get_submodule(name).weight.mul_(effective)


@pytest.mark.parametrize("kind", ["gain", "offset gain"])
@torch.inference_mode()
def test_the_rounding_of_a_folded_gain_is_made_good_by_its_readers(kind: Any) -> None:
    block, _ = first_block(build("Llama"))
    gain: Tensor = block.input_layernorm.weight
    offset = 1.0 if kind == "offset gain" else 0.0
    before = gain.clone() + offset
    effective = fold(block, Producer("input_layernorm", kind, (1, 1, 64)), torch.linspace(0.4, 2.5, 64), torch.bfloat16)
    assert torch.equal(gain, gain.bfloat16().float())
    assert torch.allclose((gain + offset) * effective, before, rtol=1e-6)


def test_heads_that_share_a_value_head_share_its_scale() -> None:
    values = torch.arange(64.0)
    tied = V_TO_O.tie(values)
    assert tied.tolist() == [
        (values[16 * 2 * g + i] + values[16 * (2 * g + 1) + i]) / 2 for g in range(2) for i in range(16)
    ]
    assert torch.equal(V_TO_O.tie(V_TO_O.spread(tied)), tied)


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "mlp.router.weight"),
        ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "attn.c_attn.weight"),
    ],
)
def test_blocks_with_other_weights_than_linears_are_refused_by_name(
    family: str, changes: dict[str, Any], name: str
) -> None:
    prefix, blocks = find_blocks(build(family, **changes))
    with pytest.raises(ModelError, match=name):
        find_linears(blocks[0], f"{prefix}.0")
