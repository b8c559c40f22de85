"""The architectures that GGUF files and transformers' checkpoints share: their keys, and what differs.

Keys are those of llama.cpp; tensor names: `gguf_names`. Both directions are read off one table. Only what llama.cpp
computes exactly as transformers does is let through, the rest refused by name. Knows neither bytes nor tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.spec.model import ModelSpec

KEYS = {  # what follows the architecture's name in a key -> the key of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
}
WINDOW = {"attention.sliding_window": "sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
FLOATS = {"rms_norm_eps", "rope_theta", *CAPS.values()}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, eq=False)
class Architecture:
    """One of transformers' model types as GGUF has it.

    `name` is GGUF's, `stems` the layers' tensors: transformers' -> GGUF's. Rows of q and k are `permuted`, since ggml
    rotates neighbours where transformers rotates halves; norms are stored with `norm_shift` added. `fixed` are what
    config.json must say, where it says it, for the two to compute the same.
    """

    name: str
    model_type: str
    class_name: str
    stems: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm_shift: float = 0.0
    pattern: int = 0  # every so many layers attention is full, else in the window

    @property
    def every_key(self) -> dict[str, str]:
        """GGUF's key without the architecture -> that of config.json."""
        return KEYS | dict(self.keys)


SILU = {"hidden_act": "silu"}
QWEN = SILU | {"use_sliding_window": False}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}
MIXTRAL = {f"block_sparse_moe.experts.{own}": name for own, name in EXPERTS.items()}
ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", ATTENTION | MLP, fixed=SILU, permuted=True),
    Architecture("llama", "mistral", "MistralForCausalLM", ATTENTION | MLP, fixed=SILU, permuted=True),
    Architecture(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        ATTENTION | MIXTRAL | {"block_sparse_moe.gate": "ffn_gate_inp"},
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        fixed=SILU,
        permuted=True,
    ),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", ATTENTION | MLP, fixed=QWEN),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", ATTENTION | MLP, fixed=QWEN),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        ATTENTION
        | {f"mlp.experts.{own.removeprefix('mlp.')}": f"{name}_exps" for own, name in MLP.items()}
        | {"mlp.gate": "ffn_gate_inp"},
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        fixed=QWEN | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        ATTENTION | MLP | SANDWICH,
        keys=WINDOW | CAPS,
        fixed=GELU,
        norm_shift=1.0,
        pattern=2,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        ATTENTION | MLP | SANDWICH,
        keys=WINDOW,
        fixed=GELU | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
        norm_shift=1.0,
        pattern=6,
    ),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        {
            **{own: ATTENTION[own] for own in ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm")},
            "self_attn.qkv_proj": "attn_qkv",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        fixed=SILU | {"partial_rotary_factor": 1.0},
    ),
)
LOCAL_ROPE = 10_000.0  # of Gemma-3's windowed layers: llama.cpp has no other


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json; ModelError if llama.cpp would compute something else."""
    kind = config.get("model_type")
    found = next((one for one in ARCHITECTURES if one.model_type == kind), None)
    if found is None:
        known = ", ".join(one.model_type for one in ARCHITECTURES)
        raise ModelError(f"models of type `{kind}` are not written as GGUF", f"written are: {known}")
    for key, wanted in found.fixed.items():
        if config.get(key, wanted) != wanted:
            raise ModelError(f"llama.cpp runs `{kind}` with {key} = {wanted}, this model has {config[key]}")
    _check_attention(found, config)
    return found


def _check_attention(architecture: Architecture, config: Mapping[str, Any]) -> None:
    layers, period = config.get("layer_types"), architecture.pattern
    windowed = [bool(period) and (index + 1) % period != 0 for index in range(len(layers or ()))]
    if layers and [kind == "sliding_attention" for kind in layers] != windowed and config.get("sliding_window"):
        raise ModelError("its layers with an attention window are not those that llama.cpp expects")
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and scalar != config.get("head_dim"):
        raise ModelError(f"llama.cpp divides queries by the root of the head size, this model by that of {scalar}")


def metadata_of(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The architecture's keys for a config.json; ModelError if GGUF has none for what it says."""
    architecture = architecture_of(config)
    theta, scaling = _rope(config)
    experts = spec.experts.count if spec.experts else None
    counted = dict.fromkeys(("num_experts", "num_local_experts"), experts)
    derived = counted | {"head_dim": spec.head_dim, "num_key_value_heads": spec.num_kv_heads, "rope_theta": theta}
    values = {**config, **derived, "max_position_embeddings": _context(architecture, config, spec)}
    found: dict[str, Any] = {"general.architecture": architecture.name}
    for key, own in architecture.every_key.items():
        if values.get(own) is not None:
            found[f"{architecture.name}.{key}"] = float(values[own]) if own in FLOATS else int(values[own])
    for key, value in _scaling_keys(scaling).items():
        found[f"{architecture.name}.rope.scaling.{key}"] = value
    if architecture.name == "phi3":  # demands both
        found["phi3.attention.sliding_window"] = 0
        found["phi3.rope.scaling.original_context_length"] = spec.max_context
    return found


def _context(architecture: Architecture, config: Mapping[str, Any], spec: ModelSpec) -> int:
    """Tokens for which the file is exact: up to a window that llama.cpp does not know of."""
    longest, window = spec.max_context or 2048, config.get("sliding_window")
    return longest if architecture.pattern or not window else min(longest, window)


def _rope(config: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]]:
    """Base and scaling of the rotary embedding, whichever way config.json says it."""
    found = config.get("rope_parameters") or {}
    full = found.get("full_attention", found)
    scaling = full or config.get("rope_scaling") or {}
    local = found.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq", LOCAL_ROPE))
    if local != LOCAL_ROPE:
        raise ModelError(f"llama.cpp has a rotary base of {LOCAL_ROPE:g} in windowed layers, this model has {local:g}")
    return float(full.get("rope_theta") or config.get("rope_theta") or LOCAL_ROPE), scaling


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _scaling_keys(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = _rope_type(scaling)
    if kind in ("default", "llama3"):  # llama3's is a tensor
        return {}
    if kind == "linear":
        return {"type": kind, "factor": float(scaling["factor"])}
    raise ModelError(f"rotary scaling of type `{kind}` is not written as GGUF", "written are: linear, llama3")


def rope_factors(config: Mapping[str, Any], head_dim: int) -> list[float] | None:
    """What each rotary frequency is divided by, [head_dim / 2], for Llama-3's scaling; None for others."""
    theta, scaling = _rope(config)
    if _rope_type(scaling) != "llama3":
        return None
    return _llama3(theta, LLAMA3 | dict(scaling), head_dim)


def _llama3(theta: float, scaling: Mapping[str, Any], head_dim: int) -> list[float]:
    low, high, original = (scaling[key] for key in LLAMA3)
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors


def config_of(metadata: Mapping[str, Any], names: Collection[str], factors: list[float] | None) -> dict[str, Any]:
    """config.json of a GGUF file with tensors of these names; `factors` is what its rope_freqs holds.

    CheckpointError if the architecture, or a scaling of its rotary embedding, is not read.
    """
    architecture = found_architecture(metadata)
    values = {
        own: metadata[f"{architecture.name}.{key}"]
        for key, own in architecture.every_key.items()
        if f"{architecture.name}.{key}" in metadata
    }
    tokens = metadata.get("tokenizer.ggml.tokens")
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    theta = values.pop("rope_theta", LOCAL_ROPE)
    config = (
        values
        | dict(architecture.fixed)
        | {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
            "head_dim": head_dim,
            "num_key_value_heads": values.get("num_key_value_heads", values["num_attention_heads"]),
            "vocab_size": values.get("vocab_size") or len(tokens or ()),
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "dtype": "float16",
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta} | _found_scaling(metadata, architecture, theta, head_dim, factors),
        }
    )
    for own, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[own] = token
    return config | _gemma(architecture, config)


def found_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture of a GGUF file; CheckpointError if it is not read."""
    name = metadata.get("general.architecture")
    experts = metadata.get(f"{name}.expert_count", 0) > 0
    for one in ARCHITECTURES:
        if one.name == name and ("expert_count" in one.keys) == experts:
            return one
    known = ", ".join(dict.fromkeys(one.name for one in ARCHITECTURES))
    raise CheckpointError(f"GGUF files of architecture `{name}` are not read", f"read are: {known}")


def _found_scaling(
    metadata: Mapping[str, Any], architecture: Architecture, theta: float, dim: int, factors: list[float] | None
) -> dict[str, Any]:
    kind = metadata.get(f"{architecture.name}.rope.scaling.type", "none")
    if factors is not None:
        scaling = {"factor": max(factors), **LLAMA3}
        expected = _llama3(theta, scaling, dim)
        if not all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(factors, expected, strict=True)):
            raise CheckpointError("its rotary frequencies are scaled in another way than Llama-3's")
        return {"rope_type": "llama3", **scaling}
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata[f"{architecture.name}.rope.scaling.factor"]}
    if kind != "none":
        raise CheckpointError(f"rotary scaling of type `{kind}` is not read", "take the safetensors checkpoint")
    return {"rope_type": "default"}


def _gemma(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma's config.json says and GGUF leaves to its reader."""
    if not architecture.pattern:
        return {}
    found: dict[str, Any] = {"query_pre_attn_scalar": config["head_dim"]}
    if architecture.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": LOCAL_ROPE}
        found["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return found
