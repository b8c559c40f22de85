"""ModelSpec: what config.json says is what it holds, and the parameter counts are those of the real modules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.errors import CheckpointError, LlmoptError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.memory import budget, sequence_bytes
from llmopt_cli.spec.catalog import find_gpu
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.model import Experts, LatentAttention, LinearAttention, ModelSpec
from llmopt_cli.spec.scheme import find_scheme

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/data/configs"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SMALL = {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 256, "vocab_size": 4096}
SMALL |= {"max_position_embeddings": 512}
GATED = SMALL | {"intermediate_size": 704, "num_key_value_heads": 2}
EXPERTS = GATED | {"moe_intermediate_size": 96, "num_experts_per_tok": 2, "pad_token_id": 0}
LATENT = EXPERTS | {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_key_value_heads": 8}
NEXT = {"num_experts": 8, "shared_expert_intermediate_size": 96, "head_dim": 64, "linear_num_key_heads": 2}
NEXT |= {"linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}


def config_file(name: str) -> dict[str, Any]:
    path = CONFIGS / f"{name}_config.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return dict(json.loads(path.read_text()))


def test_llama_70b_is_read_whole() -> None:
    spec = ModelSpec.from_hf(LLAMA, "llama")
    assert spec == ModelSpec(
        name="llama",
        architecture="LlamaForCausalLM",
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=28672,
        vocab_size=128256,
        max_context=131072,
    )
    assert spec.num_params == spec.num_active_params == 70_553_706_496  # the number on the model's card


@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_bundled_models_have_exactly_the_parameters_of_their_files(name: str) -> None:
    checkpoint = Checkpoint.open(name)
    stored = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert checkpoint.spec.num_params == stored


FAMILIES = [
    ("Llama", GATED),
    ("Llama", GATED | {"tie_word_embeddings": True, "head_dim": 48}),
    ("Mistral", GATED),
    ("Qwen2", GATED | {"tie_word_embeddings": False}),
    ("Qwen3", GATED | {"head_dim": 64}),
    ("Gemma2", GATED | {"head_dim": 64}),
    ("Phi3", GATED | {"pad_token_id": 0}),
    ("Olmo2", GATED),
    ("Starcoder2", GATED),
    ("GPT2", {"n_layer": 6, "n_head": 8, "n_embd": 256, "vocab_size": 4096, "n_positions": 64}),
    ("GPTNeoX", SMALL | {"intermediate_size": 1024}),
    ("Falcon", SMALL | {"multi_query": True}),
    ("Phi", SMALL | {"intermediate_size": 1024}),
    ("Mixtral", GATED | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("Qwen3Moe", EXPERTS | {"num_experts": 8, "mlp_only_layers": [0], "head_dim": 32}),
    ("Qwen3Moe", EXPERTS | {"num_experts": 8, "decoder_sparse_step": 2, "head_dim": 32}),
    ("Qwen2Moe", EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 192}),
    ("DeepseekV3", LATENT | {"q_lora_rank": 96}),
    ("DeepseekV2", LATENT | {"q_lora_rank": None}),
    ("Qwen3Next", EXPERTS | NEXT),
]


@pytest.mark.parametrize(("family", "facts"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_are_those_of_the_modules_transformers_builds(family: str, facts: dict[str, Any]) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**facts)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    spec = ModelSpec.from_hf(json.loads(config.to_json_string(use_diff=False)), family)
    assert spec.num_params == pytest.approx(built, rel=0.01)  # norms of q and k and biases but those of q, k, v


def test_every_real_config_is_read() -> None:
    files = sorted(CONFIGS.glob("*.json"))
    if not files:
        pytest.skip(f"no configs in {CONFIGS}")
    for file in files:
        spec = ModelSpec.from_hf(json.loads(file.read_text()), file.stem)
        assert spec.num_params > spec.embedding_params > 0, file.name
        assert spec.num_active_params <= spec.num_params, file.name
        assert 0 <= spec.num_moe_layers <= spec.num_layers, file.name
        assert 0 <= spec.num_full_layers <= spec.num_layers, file.name


def test_explicit_head_dim_wins_over_hidden_size() -> None:
    assert ModelSpec.from_hf(LLAMA | {"head_dim": 64}, "m").head_dim == 64
    assert ModelSpec.from_hf(LLAMA, "m").head_dim == 8192 // 64


def test_without_kv_heads_every_head_has_its_own() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert ModelSpec.from_hf(config, "m").num_kv_heads == 64


def test_nested_text_config_is_read_and_the_tower_named() -> None:
    nested = {"architectures": ["SeesForConditionalGeneration"], "vision_config": {"depth": 3}, "text_config": LLAMA}
    spec = ModelSpec.from_hf(nested, "m")
    assert spec.num_layers == 80
    assert spec.architecture == "SeesForConditionalGeneration"
    assert spec.unmodelled == ("the vision tower is not counted",)


def test_both_rope_spellings_make_one_spec() -> None:
    old = ModelSpec.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": None}, "m")
    new = ModelSpec.from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "m")
    assert old == new


NEEDED = ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"]


@pytest.mark.parametrize("key", NEEDED)
def test_missing_key_is_named(key: str) -> None:
    config = {known: value for known, value in LLAMA.items() if known != key}
    with pytest.raises(CheckpointError, match=f"config.json of `my-model` lacks `{key}`"):
        ModelSpec.from_hf(config, "my-model")


@pytest.mark.parametrize(
    ("change", "assumed"),
    [
        ({"intermediate_size": None}, "names no FFN width: 4 x hidden_size assumed"),
        ({"max_position_embeddings": None}, "names no context length: 2,048 tokens assumed"),
        ({"model_type": "brand_new"}, "`brand_new` is not known here"),
        ({"layer_types": ["mamba"] * 40 + ["full_attention"] * 40}, "40 layers without keys and values"),
    ],
)
def test_what_is_assumed_is_said(change: dict[str, Any], assumed: str) -> None:
    spec = ModelSpec.from_hf(LLAMA | change, "m")
    assert len(spec.unmodelled) == 1
    assert assumed in spec.unmodelled[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 128}, "128 KV heads for 64 heads"),
        ({"hidden_size": 32}, "64 heads for a hidden size of 32"),
        ({"num_experts": 4, "num_experts_per_tok": 9}, "sends a token to 9 of 4 experts"),
        ({"vocab_size": 10**12}, "`vocab_size: 1000000000000` where a whole number of sensible size"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings: yes` where a switch"),
    ],
)
def test_contradictions_are_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ModelSpec.from_hf(LLAMA | change, "m")


@pytest.mark.parametrize("value", ["large", 4096.5, True, -1, [4096]])
def test_value_of_the_wrong_kind_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match="`hidden_size: "):
        ModelSpec.from_hf(LLAMA | {"hidden_size": value}, "m")


@pytest.mark.parametrize(
    ("change", "window", "sliding"),
    [
        ({}, None, 0),
        ({"sliding_window": 4096}, 4096, 80),
        ({"sliding_window": 4096, "use_sliding_window": False}, None, 0),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 60}, 4096, 20),
        ({"sliding_window": 4096, "model_type": "gemma2"}, 4096, 40),
        ({"sliding_window": 512, "sliding_window_pattern": 6}, 512, 67),
        ({"sliding_window": 512, "layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 60}, 512, 60),
        ({"sliding_window": 512, "sliding_window_pattern": "LLLG"}, 512, 60),
        ({"sliding_window": 512, "model_type": "qwen2"}, None, 0),
        ({"sliding_window": 512, "model_type": "qwen2", "use_sliding_window": None}, None, 0),
        ({"sliding_window": 512, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 90}, None, 0),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 80}, None, 0),
    ],
)
def test_sliding_layers_are_counted(change: dict[str, Any], window: int | None, sliding: int) -> None:
    spec = ModelSpec.from_hf(LLAMA | change, "m")
    assert (spec.sliding_window, spec.num_sliding_layers) == (window, sliding)
    assert spec.num_full_layers == 80 - sliding


MOE = LLAMA | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sliding_window": 512, "sliding_window_pattern": "ABAB"}, "`sliding_window_pattern: ABAB`"),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": -3}, "`max_window_layers: -3`"),
        ({"decoder_sparse_step": "a"}, "`decoder_sparse_step: a`"),
        ({"interleave_moe_layer_step": "b"}, "`interleave_moe_layer_step: b`"),
        ({"mlp_only_layers": 3}, "`mlp_only_layers: 3` where a list"),
        ({"layer_types": "full_attention"}, "`layer_types: full_attention` where a list"),
        ({"layer_types": ["mamba"] * 80}, "no layer that keeps keys and values"),
    ],
)
def test_odd_layer_patterns_are_one_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ModelSpec.from_hf(MOE | change, "m")


@pytest.mark.parametrize(
    "change",
    [{"first_k_dense_replace": 99}, {"mlp_layer_types": ["dense"] * 99}, {"moe_layer_freq": [0] * 99}],
)
def test_no_more_layers_are_dense_than_there_are(change: dict[str, Any]) -> None:
    spec = ModelSpec.from_hf(MOE | change, "m")
    assert spec.num_moe_layers == 0
    assert spec.num_params == ModelSpec.from_hf(LLAMA, "m").num_params


def test_deepseek_v3_has_latent_attention_and_experts() -> None:
    spec = ModelSpec.from_hf(config_file("deepseek-ai--DeepSeek-V3"), "m")
    assert spec.latent == LatentAttention(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, v_dim=128)
    assert spec.experts == Experts(count=256, per_token=8, ffn_size=2048, shared_ffn_size=2048, num_dense_layers=3)
    assert spec.head_dim == 192
    assert spec.num_params == pytest.approx(671e9, rel=0.001)
    assert spec.num_active_params == pytest.approx(37.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "dense_layers", "shared"),
    [
        ("meta-llama--Llama-4-Maverick-17B-128E-Instruct", 24, 8192),
        ("meta-llama--Llama-4-Scout-17B-16E-Instruct", 0, 8192),
        ("MiniMaxAI--MiniMax-M3", 3, 3072),
        ("zai-org--GLM-5.2", 3, 2048),
        ("Qwen--Qwen3-235B-A22B", 0, 0),
        ("Qwen--Qwen3.5-35B-A3B", 0, 512),
        ("stepfun-ai--Step-3.7-Flash", 3, 1280),
    ],
)
def test_dense_layers_and_shared_experts_are_found_in_every_spelling(name: str, dense_layers: int, shared: int) -> None:
    experts = ModelSpec.from_hf(config_file(name), name).experts
    assert experts is not None
    assert (experts.num_dense_layers, experts.shared_ffn_size) == (dense_layers, shared)


@pytest.mark.parametrize("name", ["google--gemma-4-26B-A4B", "deepseek-ai--DeepSeek-V4-Pro", "moonshotai--Kimi-K3"])
def test_what_a_spec_leaves_out_is_said(name: str) -> None:
    assert ModelSpec.from_hf(config_file(name), name).unmodelled


def test_linear_attention_layers_keep_no_keys() -> None:
    spec = ModelSpec.from_hf(config_file("Qwen--Qwen3.5-27B"), "m")
    assert (spec.num_full_layers, spec.num_linear_layers) == (16, 48)
    assert spec.linear_attention == LinearAttention(16, 48, 128, 128, conv_width=4)
    kimi = ModelSpec.from_hf(config_file("moonshotai--Kimi-K3"), "m")
    assert (kimi.num_full_layers, kimi.num_linear_layers) == (24, 69)


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(0, 2)))
JUNK |= st.sampled_from([0, 1, -1, 2**31, 10**400, {}, {"num_heads": "a"}, ["full_attention"], ["linear_attention"]])


def real_configs() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(CONFIGS.glob("*.json"))] or [LLAMA, MOE]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), config=st.sampled_from(real_configs()))
def test_a_mutated_config_gives_figures_or_one_sentence(data: st.DataObject, config: dict[str, Any]) -> None:
    inner = config.get("text_config")
    part = inner if isinstance(inner, dict) else config
    for key in data.draw(st.lists(st.sampled_from(sorted(part)), max_size=3)):
        part = part | {key: data.draw(JUNK)}
    mutated = config | {"text_config": part} if inner is not None else part
    try:
        spec = ModelSpec.from_hf(mutated, "m")
    except LlmoptError:
        return
    on = Deployment(spec, find_gpu("h100")[0], find_scheme("awq"), tp=2)
    figures = spec.num_params, spec.num_active_params, sequence_bytes(on, 100), budget(on).weights, spec.max_context
    assert all(0 < figure < float("inf") for figure in figures)
