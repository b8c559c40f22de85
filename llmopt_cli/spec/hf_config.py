"""A Hugging Face config.json into a `ModelSpec`.

What families differ in is data, in `hf_families`; the functions here ask for facts by our names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmopt_cli.errors import CheckpointError
from llmopt_cli.spec.hf_families import (
    FULL_LAYER_EVERY,
    KEYS,
    KNOWN,
    LARGEST,
    LINEAR_LAYERS,
    OUTPUT_GATED,
    QKV_BIAS_BY_DEFAULT,
    TIED_BY_DEFAULT,
    UNGATED,
    UNMODELLED,
    USUAL_CONTEXT,
    WINDOW_OFF_BY_DEFAULT,
)
from llmopt_cli.spec.model import Experts, LatentAttention, LinearAttention, ModelSpec


def read_spec(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Read a parsed config.json, nested `text_config` included.

    Raises CheckpointError naming a key that is missing, wrong or contradicts another; what the config is silent about
    and is assumed stands in `unmodelled`.
    """
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
        max_context=reader.get("max_context") or USUAL_CONTEXT,
        tied_embeddings=reader.flag("tie_word_embeddings", reader.model_type in TIED_BY_DEFAULT),
        qkv_bias=reader.flag("attention_bias", reader.model_type in QKV_BIAS_BY_DEFAULT),
        output_gate=reader.flag("attn_output_gate", reader.model_type in OUTPUT_GATED),
        gated_ffn=reader.model_type not in UNGATED,
        sliding_window=_window(reader) if sliding else None,
        num_sliding_layers=sliding,
        num_linear_layers=linear,
        experts=experts,
        latent=latent,
        linear_attention=_linear_attention(reader) if linear else None,
        unmodelled=_unmodelled(reader, experts, linear),
    )


def _unmodelled(reader: _Reader, experts: Experts | None, linear: int) -> tuple[str, ...]:
    """What the figures leave out or assume."""
    config, kind = reader.config, reader.model_type or "none"
    assumed = (
        (kind not in KNOWN, f"model_type `{kind}` is not known here: counted by the usual keys, as Llama's layers are"),
        (not reader.get("max_context"), f"config.json names no context length: {USUAL_CONTEXT:,} tokens assumed"),
        (_guessed_ffn(reader, experts), "config.json names no FFN width: 4 x hidden_size assumed"),
        (
            bool(linear and not _linear_attention(reader)),
            f"{linear} layers without keys and values are counted with weights of ordinary attention, without state",
        ),
    )
    return (
        *(reason for key, reason in UNMODELLED.items() if config.get(key)),
        *(reason for applies, reason in assumed if applies),
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
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
                raise self._wrong(key, value, "whole number of sensible size")
            if value:
                return value
        return 0

    def array(self, key: str) -> list[Any] | None:
        """The list under `key`, None where the config is silent about it."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, value, "list")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The switch under `key`; what the family does where the config is silent about it."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "switch (true or false)")
        return default if value is None else value

    def _wrong(self, key: str, value: object, kind: str) -> CheckpointError:
        shown = str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."
        return CheckpointError(f"config.json of `{self.name}` has `{key}: {shown}` where a {kind} belongs")

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
    found = reader.get("num_kv_heads") or num_heads
    if found > num_heads:
        raise CheckpointError(f"config.json of `{reader.name}` has {found} KV heads for {num_heads} heads")
    return found


def _head_dim(reader: _Reader, num_heads: int) -> int:
    found = reader.get("head_dim") or reader.need("hidden_size") // num_heads
    if not found:
        raise CheckpointError(
            f"config.json of `{reader.name}` has {num_heads} heads for a hidden size of {reader.need('hidden_size')}"
        )
    return found


def _ffn_size(reader: _Reader, experts: Experts | None) -> int:
    if size := reader.get("dense_ffn_size") or reader.get("ffn_size"):
        return size
    if experts and not experts.num_dense_layers:
        return experts.ffn_size
    return 4 * reader.need("hidden_size")


def _guessed_ffn(reader: _Reader, experts: Experts | None) -> bool:
    known = reader.get("dense_ffn_size") or reader.get("ffn_size") or (experts and not experts.num_dense_layers)
    return not known and reader.model_type not in UNGATED


def _linear_attention(reader: _Reader) -> LinearAttention | None:
    """The shape of gated delta-net layers, None where the linear layers are of another kind."""
    if isinstance(kimi := reader.config.get("linear_attn_config"), Mapping):
        inner = _Reader(kimi, reader.name)
        heads, dim = inner.need("num_heads"), inner.need("head_dim")
        return LinearAttention(heads, heads, dim, dim, inner.need("linear_conv_width"))
    if not reader.get("linear_value_heads"):
        return None
    return LinearAttention(
        key_heads=reader.need("linear_key_heads"),
        value_heads=reader.need("linear_value_heads"),
        key_dim=reader.need("linear_key_dim"),
        value_dim=reader.need("linear_value_dim"),
        conv_width=reader.need("linear_conv_width"),
    )


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
    count, per_token = reader.need("num_experts"), reader.need("experts_per_token")
    if per_token > count:
        raise CheckpointError(f"config.json of `{reader.name}` sends a token to {per_token} of {count} experts")
    return Experts(
        count=count,
        per_token=per_token,
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
        return _num_sliding_layers(reader, layers), _num_kimi_layers(reader, layers)
    kinds = kinds[:layers]  # some files list the prediction heads' layers too
    linear = sum(kinds.count(kind) for kind in LINEAR_LAYERS)
    if linear == layers:
        raise CheckpointError(
            f"`{reader.name}` has no layer that keeps keys and values", "models without attention are not served"
        )
    return kinds.count("sliding_attention") if _window(reader) else 0, linear


def _num_kimi_layers(reader: _Reader, layers: int) -> int:
    """Layers that Kimi lists as linear, apart from their kinds."""
    listed = reader.config.get("linear_attn_config")
    found = listed.get("kda_layers") if isinstance(listed, Mapping) else None
    return min(len(found), layers - 1) if isinstance(found, list) else 0


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
