"""How Hugging Face families spell and default their facts, as data. What is done with it stands in `hf_config`."""

from __future__ import annotations

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
    "linear_key_heads": ("linear_num_key_heads",),
    "linear_value_heads": ("linear_num_value_heads",),
    "linear_key_dim": ("linear_key_head_dim",),
    "linear_value_dim": ("linear_value_head_dim",),
    "linear_conv_width": ("linear_conv_kernel_dim", "short_conv_kernel_size"),
}
LARGEST = 10**9  # no fact of a model is larger: not its vocabulary, not its context
USUAL_CONTEXT = 2048  # assumed where nothing is said


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
OUTPUT_GATED = _words("qwen3_next")  # and whoever says attn_output_gate
# Model types whose weights the functions below were compared with; any other is read by the usual keys.
KNOWN = _words("""
    bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5 ernie4_5_moe exaone4 falcon gemma
    gemma2 gemma3 gemma3_text gemma4 gemma4_text glm4 glm4_moe glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_oss gptj granite kimi_k2 kimi_k25 kimi_k3 kimi_linear llama llama4 llama4_text mimo minimax_m2 ministral
    mistral mixtral mpt nemotron olmo olmo2 olmo3 opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text
    smollm3 stablelm starcoder2""")

# Keys of features that the figures here leave out, and what that means for them.
UNMODELLED = {
    "vision_config": "the vision tower is not counted",
    "linear_attn_config": "gates of the linear-attention layers are counted as a gated delta-net's",
    "routed_expert_hidden_size": "experts on a narrower hidden size are counted at full width",
    "global_head_dim": "global attention layers have other heads than counted here",
    "swa_num_key_value_heads": "sliding layers have other heads than counted here",
    "num_kv_shared_layers": "layers that share one cache are counted as if each had its own",
    "attention_chunk_size": "chunked attention is counted as full attention",
    "compress_ratios": "compressed attention is counted as full attention",
    "sparse_attention_config": "sparse attention is counted as full attention, without its index",
    "index_topk": "sparse attention is counted as full attention, without its index",
}
