"""Loaded and fused models compute what transformers computes, or are refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CheckpointError, ModelError, UsageError
from llmopt_cli.model.load import load_model
from llmopt_cli.spec.checkpoint import Checkpoint

FAMILIES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("Llama", {"tie_word_embeddings": True}, {"attention": 2, "mlp": 2, "norm": 5, "layer": 2}),
    (
        "Llama",
        {"num_key_value_heads": 4, "head_dim": 24, "attention_bias": True},
        {"attention": 2, "mlp": 2, "norm": 5, "layer": 2},
    ),
    ("Qwen2", {}, {"attention": 2, "mlp": 2, "norm": 5, "layer": 2}),
    ("Qwen3", {"head_dim": 16}, {"attention": 2, "mlp": 2, "norm": 9, "layer": 2}),
    ("Mistral", {"sliding_window": 4, "head_dim": 16}, {"attention": 2, "mlp": 2, "norm": 5, "layer": 2}),
    (
        "Olmo2",
        {},
        {"attention": 0, "mlp": 2, "norm": 9, "layer": 0},
    ),  # its q and k norms span all heads: keeps its own attention
    ("Phi3", {}, {"attention": 0, "mlp": 0, "norm": 5, "layer": 0}),  # one merged projection already
    (
        "Granite",
        {"attention_multiplier": 0.3, "logits_scaling": 2.0},
        {"attention": 2, "mlp": 2, "norm": 5, "layer": 2},
    ),
    ("Mixtral", {"num_local_experts": 4}, {"attention": 2, "mlp": 0, "norm": 5, "layer": 0}),  # stacked experts
    (
        "Nemotron",
        {"partial_rotary_factor": 0.5},
        {"attention": 0, "mlp": 0, "norm": 0, "layer": 0},
    ),  # turns half of each head
    (
        "Glm4Moe",
        {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
        {"attention": 0, "mlp": 2, "norm": 5, "layer": 0},
    ),
    ("Olmo", {"clip_qkv": 8.0}, {"attention": 0, "mlp": 2, "norm": 0, "layer": 0}),  # clamps large queries
    (
        "SmolLM3",
        {"num_hidden_layers": 6, "pad_token_id": 6},
        {"attention": 5, "mlp": 6, "norm": 13, "layer": 5},
    ),  # one turns nothing
    ("GPTNeoX", {"num_key_value_heads": 4}, {"attention": 0, "mlp": 0, "norm": 0, "layer": 0}),
]


@pytest.mark.parametrize(
    ("family", "changes", "fused"), FAMILIES, ids=[f"{f}-{i}" for i, (f, *_) in enumerate(FAMILIES)]
)
def test_logits_equal_transformers(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any], fused: dict[str, int]
) -> None:
    folder = tiny(family, **changes)
    loaded = load_model(Checkpoint.open(folder), "float32", "cpu")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10, 16)[None]
    with torch.inference_mode():
        found = loaded.model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False).logits
        expected = reference(ids).logits
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert loaded.fused == fused


@pytest.mark.parametrize(("family", "changes", "fused"), FAMILIES)
def test_logits_in_bfloat16_are_as_close_as_transformers_own(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any], fused: dict[str, int]
) -> None:
    """Against float32, which both approximate: no more than one and a half times transformers' own error."""
    folder = tiny(family, **changes)
    ids = torch.arange(10, 14)[None]
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(ids).logits
        ours = load_model(Checkpoint.open(folder), "bfloat16", "cpu").model(
            input_ids=ids, position_ids=torch.arange(4)[None], use_cache=False
        )
    assert (ours.logits - exact).norm() <= 1.5 * (theirs - exact).norm()


def copy_of(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def test_unknown_architecture_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("Llama"), tmp_path / "m", model_type="nonesuch")
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(Checkpoint.open(folder))


def test_remote_code_is_not_run_unasked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("Llama"), tmp_path / "m", model_type="nonesuch", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="own Python code"):
        load_model(Checkpoint.open(folder))


def test_missing_and_surplus_tensors_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("Llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    taken = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.self_attn\.k_proj\.weight"):
        load_model(Checkpoint.open(folder))
    save_file(
        tensors | {"model.layers.1.self_attn.k_proj.weight": taken, "extra.weight": taken.clone()},
        folder / "model.safetensors",
    )
    with pytest.raises(ModelError, match=r"extra\.weight"):
        load_model(Checkpoint.open(folder))


def test_tied_tensors_that_are_stored_apart_and_differ_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("Llama", tie_word_embeddings=True), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    assert load_model(Checkpoint.open(folder), "float32", "cpu")
    save_file(tensors | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="stores both, and they differ"):
        load_model(Checkpoint.open(folder), "float32", "cpu")


def test_a_wrong_config_value_is_one_sentence(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(Checkpoint.open(copy_of(tiny("Llama"), tmp_path / "a", rms_norm_eps="abc")))
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(Checkpoint.open(copy_of(tiny("Llama"), tmp_path / "b", hidden_act="nonesuch")))


def test_a_tensor_of_another_shape_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny("Llama"), tmp_path / "m", intermediate_size=128)
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(Checkpoint.open(folder))


def test_unknown_dtype_and_absent_gpu_are_usage_errors(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny("Llama"))
    with pytest.raises(UsageError, match="int3"):
        load_model(checkpoint, dtype="int3")
    for device in ("toaster", "meta", "mps", "cuda:99"):
        with pytest.raises(UsageError, match=device):
            load_model(checkpoint, device=device)


@pytest.mark.parametrize(
    ("family", "changes", "is_plain"),
    [
        ("Llama", {}, True),
        ("Qwen3", {"head_dim": 16}, True),
        ("Granite", {"attention_multiplier": 0.3, "logits_scaling": 2.0}, False),  # divides its logits
        ("SmolLM3", {"num_hidden_layers": 6, "pad_token_id": 6}, False),  # one layer is not ours
    ],
)
def test_the_short_way_through_a_model_is_taken_where_it_gives_the_same(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any], is_plain: bool
) -> None:
    loaded = load_model(Checkpoint.open(tiny(family, **changes)), "float32", "cpu")
    assert (loaded.decoder is not None) == is_plain
    ids, positions = torch.arange(10, 16), torch.arange(6)
    with torch.inference_mode():
        expected = loaded.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        assert torch.equal(loaded.logits(ids, positions), expected)
        some = loaded.logits(ids, positions, torch.tensor([1, 5]))
    torch.testing.assert_close(some, expected[[1, 5]], rtol=1e-5, atol=1e-5)
