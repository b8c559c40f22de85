"""Memory shared out at start-up: exactly the estimate's bytes, and a refusal that names the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt_cli.errors import CapacityError, CheckpointError
from llmopt_cli.estimate.memory import kv_block_bytes
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.quant.kv_scales import KV_CACHE_SCHEME
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime import engine as engine_module
from llmopt_cli.runtime.budget import Needs, share_out
from llmopt_cli.runtime.kv_cache import cache_dtype, needs_of
from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import find_scheme

MIB = 2**20
SMALL = Batching(max_num_seqs=2, max_model_len=64)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Qwen3", {"head_dim": 24}),
    ("Mistral", {"sliding_window": 8}),
    (
        "DeepseekV3",
        {
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
    ),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_the_tensors_of_the_cache_have_the_bytes_of_the_estimate(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    folder = tiny(family, **changes)
    for name, value_bytes, scale_bytes in (("auto", 4, 0), ("int8", 1, 4), ("fp8", 1, 4), ("fp8_e5m2", 1, 4)):
        engine = Engine.from_pretrained(folder, dtype="float32", device="cpu", kv_cache_dtype=name, batching=SMALL)
        pages = [pages for layer in engine._layers for pages in (layer.k, layer.v) if pages is not None]
        block = kv_block_bytes(engine.checkpoint.spec, SMALL.block_size, value_bytes, scale_bytes)
        report = engine.startup_report()
        assert sum(one.nbytes for one in pages) == report["num_blocks"] * block == report["kv_cache_bytes"]
        engine.close()


def test_the_shares_add_up_to_what_is_free() -> None:
    report = Engine.from_pretrained("demo", device="cpu", batching=SMALL).startup_report()
    parts = sum(report[f"{part}_bytes"] for part in ("activations", "kv_cache", "reserve"))
    assert parts == report["free_bytes"] <= report["memory_bytes"] - report["weights_bytes"]
    assert report["kv_cache_tokens"] == report["num_blocks"] * report["block_size"] == 2 * 64


def demo_needs(**changes: Any) -> Needs:
    batching = Batching(max_model_len=2048, **changes)
    return needs_of(Checkpoint.open("demo"), batching, torch.bfloat16, torch.bfloat16)


def test_what_the_headers_say_of_the_weights_is_what_is_loaded() -> None:
    engine = Engine.from_pretrained("demo", dtype="float32", device="cpu", batching=SMALL)
    needs = needs_of(engine.checkpoint, engine.batching, torch.float32, torch.float32)
    assert needs.weights == pytest.approx(engine.memory.weights, rel=0.001)


def test_a_small_machine_is_refused_before_the_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 26 * MIB)
    monkeypatch.setattr(engine_module, "load_model", None)  # would fail if it were called
    with pytest.raises(CapacityError, match=r"less than one request of 2,048 \(6.0 MiB\): 15.0 MiB are free") as caught:
        Engine.from_pretrained("demo", device="cpu")
    assert caught.value.hint == (
        "`--max-num-seqs 16` saves 3.7 MiB; `--kv-cache-dtype int8` saves 2.8 MiB; `--max-model-len 1616` saves 1.3 MiB"
    )


def test_every_fix_that_is_named_as_enough_is_enough() -> None:
    needs, free = demo_needs(), 15 * MIB
    with pytest.raises(CapacityError):
        share_out(needs, free, free)
    share_out(demo_needs(max_num_seqs=16), free, free)
    share_out(replace(needs, kv_bytes=1, kv_scale_bytes=4), free, free)
    share_out(replace(needs, batching=replace(needs.batching, max_model_len=1616)), free, free)


def test_what_is_not_enough_alone_is_said_so_the_largest_first() -> None:
    with pytest.raises(CapacityError, match="would hold 0 tokens") as caught:
        share_out(demo_needs(max_num_seqs=1), 0, 2**30)
    hint = str(caught.value.hint)
    assert hint.startswith("`llmopt quantize demo --method awq` saves 6.")
    assert hint.count("(not enough alone)") == 3


def test_a_large_model_names_quantizing_when_its_weights_are_the_matter() -> None:
    spec = find_model("8b")
    needs = Needs("8b", spec, Batching(max_model_len=8192), 2 * spec.num_params, 2, 2)
    with pytest.raises(CapacityError) as caught:
        share_out(needs, -4 * 2**30, 12 * 2**30)
    assert str(caught.value.hint).startswith("`llmopt quantize 8b --method awq` saves 9.")


def scaled(folder: Path, target: Path, scales: dict[str, float], **scheme: Any) -> Path:
    """A copy of a checkpoint that brings KV scales, as compressed-tensors stores them."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors |= {f"model.layers.{name}": torch.tensor([value]) for name, value in scales.items()}
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    form = FORMATS["compressed-tensors"].config(find_scheme("fp8"), [], {})
    config["quantization_config"] = form | {"kv_cache_scheme": dict(KV_CACHE_SCHEME) | scheme}
    (target / "config.json").write_text(json.dumps(config))
    return target


SCALES = {f"{layer}.self_attn.{side}_scale": 0.02 for layer in (0, 1) for side in "kv"}


def test_a_checkpoints_kv_scales_are_what_its_fp8_cache_has(tiny: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny("Llama")
    scales = SCALES | {"1.self_attn.v_scale": 0.5}
    engine = Engine.from_pretrained(
        scaled(plain, tmp_path / "scaled", scales), dtype="float32", device="cpu", kv_cache_dtype="fp8", batching=SMALL
    )
    free = Engine.from_pretrained(plain, dtype="float32", device="cpu", batching=SMALL)
    for one in (engine, free):
        one.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=8, ignore_eos=True))
    for number, (layer, exact) in enumerate(zip(engine._layers, free._layers, strict=True)):
        assert layer.k is not None
        assert layer.v is not None
        assert exact.k is not None
        assert layer.k.scales is not None
        assert layer.v.scales is not None
        assert bool((layer.k.scales == 0.02).all())
        assert bool((layer.v.scales == (0.5 if number else 0.02)).all())
        # vLLM's meaning: what is cached is x / scale in e4m3; the first layer's prompt is the same in both.
        if not number:
            expected = (exact.k.values[:4] / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(layer.k.values[:4].float(), expected.float())


def test_what_is_beyond_a_fixed_scale_is_cut_off_not_a_nan(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = scaled(tiny("Llama"), tmp_path / "scaled", dict.fromkeys(SCALES, 1e-6))
    engine = Engine.from_pretrained(folder, device="cpu", kv_cache_dtype="fp8", batching=SMALL)
    [output] = engine.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(output.token_ids) == 4  # NaN logits would have ended it
    assert engine._layers[0].k is not None
    assert float(engine._layers[0].k.values.float().abs().max()) == 448


@pytest.mark.parametrize(
    ("scales", "scheme", "message"),
    [
        ({"0.self_attn.k_scale": 0.1, "0.self_attn.v_scale": 0.1}, {}, "no k_scale for layer 1"),
        (SCALES | {"1.self_attn.v_scale": 0.0}, {}, "v_scale of layer 1 is 0,"),
        (SCALES | {"0.self_attn.k_scale": float("nan")}, {}, "k_scale of layer 0 is nan"),
        (SCALES, {"type": "int"}, "not of e4m3"),
        ({}, {}, "no k_scale for layer 0"),
    ],
)
def test_kv_scales_that_cannot_be_used_are_refused_and_ignored_without_fp8(
    tiny: Callable[..., Path], tmp_path: Path, scales: dict[str, float], scheme: dict[str, Any], message: str
) -> None:
    folder = scaled(tiny("Llama"), tmp_path / "scaled", scales, **scheme)
    with pytest.raises(CheckpointError, match=message) as caught:
        Engine.from_pretrained(folder, device="cpu", kv_cache_dtype="fp8", batching=SMALL)
    assert "int8" in str(caught.value.hint)
    Engine.from_pretrained(folder, device="cpu", kv_cache_dtype="int8", batching=SMALL).close()


def test_a_checkpoint_without_kv_scales_scales_every_head() -> None:
    engine = Engine.from_pretrained("demo", device="cpu", kv_cache_dtype="fp8", batching=SMALL)
    engine.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=2))
    assert engine._layers[0].k is not None
    assert engine._layers[0].k.scales is not None
    assert len(set(engine._layers[0].k.scales[:4].flatten().tolist())) > 4
    assert cache_dtype("fp8", torch.float32) == torch.float8_e4m3fn
