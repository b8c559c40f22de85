"""A Hugging Face config.json into a `ModelSpec`: the only place that knows how each family spells its facts.

What families differ in is data at the top; the functions below ask for facts by our names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt_cli.errors import CheckpointError
from llmopt_cli.spec.model import Experts, LatentAttention, ModelSpec

# Spellings of one fact, in the order in which they win: families that differ from Llama's words.
KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "dense_ffn_size": ("intermediate_size_mlp", "dense_intermediate_size"),
    "ffn_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "max_context": ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"),
    "sliding_window": ("sliding_window", "sliding_window_size"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_k",
    ),
    "moe_ffn_size": ("moe_intermediate_size", "intermediate_size"),
    "shared_ffn_size": ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "num_dense_layers": ("first_k_dense_replace", "moe_layer_start_index"),
    "moe_layer_every": ("interleave_moe_layer_step",),
    "sparse_layer_every": ("decoder_sparse_step",),
    "full_layer_every": ("sliding_window_pattern",),
    "first_sliding_layer": ("max_window_layers",),
    "kv_rank": ("kv_lora_rank",),
    "q_rank": ("q_lora_rank",),
    "nope_dim": ("qk_nope_head_dim",),
    "rope_dim": ("qk_rope_head_dim",),
    "v_dim": ("v_head_dim",),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What transformers assumes where config.json is silent, by model type.
TIED_BY_DEFAULT = _words("""
    bloom cohere cohere2 ernie4_5 ernie4_5_moe falcon gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4
    gemma4_text gpt2 gpt_bigcode gpt_neo granite_swa jetmoe lfm2 lfm2_moe minicpm3 mpt opt qwen2 recurrent_gemma
    smollm3 starcoder2 vaultgemma""")
QKV_BIAS_BY_DEFAULT = _words("bloom gpt2 gpt_bigcode gpt_neox opt phi qwen2 qwen2_moe starcoder2")
UNGATED = _words(
    "bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt nemotron opt persimmon phi starcoder2 xglm"
)
# Families whose window is off unless `use_sliding_window` says otherwise.
WINDOW_OFF_BY_DEFAULT = _words("""
    deepseek_ocr2_text qwen2 qwen2_moe qwen2_vl qwen2_vl_text qwen2_5_omni_text qwen2_5_vl qwen2_5_vl_text qwen3
    qwen3_moe smollm3""")
# Every how many layers one attends to the whole context, in families whose older files do not list `layer_types`.
FULL_LAYER_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
LINEAR_LAYERS = ("linear_attention", "conv", "mamba", "recurrent")

# Keys of features that the figures here leave out, and what that means for them.
UNMODELLED = {
    "vision_config": "the vision tower is not counted",
    "linear_num_value_heads": "linear attention and output gates are counted with the weights of ordinary attention",
    "linear_attn_config": "linear-attention layers are counted as ordinary attention, cache included",
    "routed_expert_hidden_size": "experts on a narrower hidden size are counted at full width",
    "global_head_dim": "global attention layers have other heads than counted here",
    "swa_num_key_value_heads": "sliding layers have other heads than counted here",
    "num_kv_shared_layers": "layers that share one cache are counted as if each had its own",
    "attention_chunk_size": "chunked attention is counted as full attention",
    "compress_ratios": "compressed attention is counted as full attention",
    "sparse_attention_config": "sparse attention is counted as full attention, without its index",
    "index_topk": "sparse attention is counted as full attention, without its index",
}


def read_spec(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read a parsed config.json, nested `text_config` included; raises CheckpointError naming a missing key."""
    reader = _Reader(_text_config(config), name)
    latent = _latent(reader)
    sliding, linear = _layer_counts(reader)
    experts = _experts(reader)
    num_heads = reader.need("num_heads")
    return ModelSpec(
        name=name,
        architecture=_architecture(config),
        num_layers=reader.need("num_layers"),
        hidden_size=reader.need("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(reader, num_heads),
        head_dim=latent.nope_dim + latent.rope_dim if latent else _head_dim(reader, num_heads),
        ffn_size=_ffn_size(reader, experts),
        vocab_size=reader.need("vocab_size"),
        max_context=reader.need("max_context"),
        tied_embeddings=bool(reader.config.get("tie_word_embeddings", reader.model_type in TIED_BY_DEFAULT)),
        qkv_bias=bool(reader.config.get("attention_bias", reader.model_type in QKV_BIAS_BY_DEFAULT)),
        gated_ffn=reader.model_type not in UNGATED,
        sliding_window=_window(reader) if sliding else None,
        num_sliding_layers=sliding,
        num_linear_layers=linear,
        experts=experts,
        latent=latent,
        unmodelled=tuple(reason for key, reason in UNMODELLED.items() if reader.config.get(key)),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """A config whose facts are asked for by our names."""

    config: Mapping[str, Any]
    name: str

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    def get(self, fact: str) -> int:
        """The fact as an integer, 0 where the config is silent about it."""
        for key in KEYS[fact]:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self._wrong(key, value, "whole number")
            if value:
                return value
        return 0

    def array(self, key: str) -> list[Any] | None:
        """The list under `key`, None where the config is silent about it."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, value, "list")
        return value

    def _wrong(self, key: str, value: object, kind: str) -> CheckpointError:
        return CheckpointError(f"config.json of `{self.name}` has `{key}: {value}` where a {kind} belongs")

    def need(self, fact: str) -> int:
        value = self.get(fact)
        if not value:
            raise CheckpointError(
                f"config.json of `{self.name}` lacks `{KEYS[fact][0]}`", "it must be that of a decoder language model"
            )
        return value


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; what only the outer part says stays visible."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return {**config, **nested}
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else str(config.get("model_type", "unknown"))


def _num_kv_heads(reader: _Reader, num_heads: int) -> int:
    # Falcon's older files say multi_query and may still carry num_kv_heads, which that flag overrules.
    if reader.config.get("multi_query") and not reader.config.get("new_decoder_architecture"):
        return 1
    return reader.get("num_kv_heads") or num_heads


def _head_dim(reader: _Reader, num_heads: int) -> int:
    return reader.get("head_dim") or reader.need("hidden_size") // num_heads


def _ffn_size(reader: _Reader, experts: Experts | None) -> int:
    if size := reader.get("dense_ffn_size") or reader.get("ffn_size"):
        return size
    if experts and not experts.num_dense_layers:
        return experts.ffn_size
    if reader.model_type in UNGATED:
        return 4 * reader.need("hidden_size")
    return reader.need("ffn_size")


def _latent(reader: _Reader) -> LatentAttention | None:
    if not reader.get("kv_rank"):
        return None
    needed = {fact: reader.need(fact) for fact in ("kv_rank", "nope_dim", "rope_dim", "v_dim")}
    return LatentAttention(q_rank=reader.get("q_rank"), **needed)


def _experts(reader: _Reader) -> Experts | None:
    if not reader.get("num_experts"):
        return None
    ffn_size = reader.need("moe_ffn_size")
    shared = reader.get("shared_ffn_size") or reader.get("num_shared_experts") * ffn_size
    if "interleave_moe_layer_step" in reader.config:  # Llama 4 has one shared expert and no key for it
        shared = ffn_size
    if reader.config.get("enable_moe_block"):  # Gemma 4 runs the dense FFN beside the experts
        shared = reader.need("ffn_size")
    return Experts(
        count=reader.need("num_experts"),
        per_token=reader.need("experts_per_token"),
        ffn_size=ffn_size,
        shared_ffn_size=shared,
        num_dense_layers=_num_dense_layers(reader),
    )


def _num_dense_layers(reader: _Reader) -> int:
    """Layers without experts, from whichever of five ways the family uses to say so."""
    layers = reader.need("num_layers")
    if kinds := reader.array("mlp_layer_types"):
        return kinds[:layers].count("dense")
    if isinstance(frequency := reader.config.get("moe_layer_freq"), list):  # DeepSeek has a number there
        return frequency[:layers].count(0)
    if step := reader.get("moe_layer_every"):
        return layers - layers // step
    only_dense, step = reader.array("mlp_only_layers") or (), reader.get("sparse_layer_every") or 1
    sparse = [layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in only_dense]
    return max(min(reader.get("num_dense_layers"), layers), layers - len(sparse))


def _layer_counts(reader: _Reader) -> tuple[int, int]:
    """(sliding, linear) layers; raises CheckpointError where no layer has attention of the ordinary kind."""
    layers, kinds = reader.need("num_layers"), reader.array("layer_types")
    if not kinds:
        return _num_sliding_layers(reader, layers), 0
    kinds = kinds[:layers]  # some files list the prediction heads' layers too
    linear = sum(kinds.count(kind) for kind in LINEAR_LAYERS)
    if linear == layers:
        raise CheckpointError(
            f"`{reader.name}` has no layer that keeps keys and values", "models without attention are not served"
        )
    return kinds.count("sliding_attention") if _window(reader) else 0, linear


def _window(reader: _Reader) -> int:
    """Tokens of the sliding window, 0 where there is none or it is switched off."""
    on = reader.config.get("use_sliding_window")
    if on is None:
        on = reader.model_type not in WINDOW_OFF_BY_DEFAULT
    return reader.get("sliding_window") if on else 0


def _num_sliding_layers(reader: _Reader, layers: int) -> int:
    """Sliding layers, where `layer_types` does not list them."""
    config = reader.config
    if not _window(reader):
        return 0
    if config.get("use_sliding_window") and (first := reader.get("first_sliding_layer")):
        return max(0, layers - first)
    if isinstance(pattern := config.get("hybrid_layer_pattern"), list):
        return pattern[:layers].count(1)
    cycle = config.get("sliding_window_pattern")
    if isinstance(cycle, str) and set(cycle) == {"L", "G"}:  # EXAONE: local and global layers in turn
        return sum(cycle[layer % len(cycle)] == "L" for layer in range(layers))
    every = reader.get("full_layer_every") or FULL_LAYER_EVERY.get(reader.model_type)
    return layers - layers // every if every else layers
