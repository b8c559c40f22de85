"""Rotated models, quantized heads, budgets of bits and scales of the KV cache: from the job to the files and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt_cli.errors import InterruptedWorkError, LlmoptError, ModelError, UsageError
from llmopt_cli.model.load import load_model
from llmopt_cli.output import Report
from llmopt_cli.quant.dryrun import plan
from llmopt_cli.quant.evaluate import evaluate
from llmopt_cli.quant.job import Job
from llmopt_cli.quant.kv_scales import KV_CACHE_SCHEME
from llmopt_cli.quant.quantize import Outcome, quantize
from llmopt_cli.spec.checkpoint import Checkpoint

OUTLIER = 30.0
SHAPES: dict[str, dict[str, Any]] = {
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "Qwen3": {"head_dim": 16},
}
Make = Callable[..., Job]


@contextmanager
def quietly(label: str) -> Iterator[Report]:
    yield lambda done, total: None


@pytest.fixture
def job(tiny: Callable[..., Path], texts: dict[str, Path], tmp_path: Path) -> Make:
    def make(model: Path | None = None, family: str = "Llama", **changes: Any) -> Job:
        settings: dict[str, Any] = {"out": tmp_path / "out", "samples": 4, "seq_len": 64, "group_size": 32, **texts}
        return Job(str(model or tiny(family, **SHAPES.get(family, {}))), **(settings | changes))

    return make


@pytest.fixture(scope="module")
def outlying(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that computes what it did, with one channel's gain moved into the weights that read it."""
    folder = tmp_path_factory.mktemp("outliers") / "model"
    shutil.copytree(tiny("Llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[5] /= OUTLIER
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, 5] *= OUTLIER
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def uneven(source: Path, folder: Path) -> Path:
    """A copy of a model whose gains and biases do something."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def again(job: Job, texts: dict[str, Path]) -> Any:
    """Quality of the files that a job wrote."""
    return evaluate(job.model, str(job.folder), quietly, texts["evaluation"], samples=64, seq_len=64).quality


def config_of(job: Job) -> Any:
    return json.loads((job.folder / "config.json").read_text())


def stored(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.folder / "model.safetensors")


def test_outliers_cost_less_when_rotated(outlying: Path, job: Make, tmp_path: Path) -> None:
    kl = {
        rotate: quantize(job(outlying, method="rtn", rotate=rotate, out=tmp_path / str(rotate)), quietly).quality
        for rotate in (False, True)
    }
    assert kl[True].kl_mean.high < 0.5 * kl[False].kl_mean.low


ROTATED: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"method": "rtn", "bits": 8, "format": "gptq"}),
    ("Qwen2", {"method": "awq+gptq", "bits": 8}),
    ("Qwen3", {"method": "hqq", "bits": 8, "format": "compressed-tensors", "correct": "qep"}),
    ("Mistral", {"method": "int8", "group_size": None}),
]


@pytest.mark.parametrize(("family", "changes"), ROTATED, ids=[family for family, _ in ROTATED])
def test_a_rotated_model_is_the_same_but_for_rounding(
    family: str,
    changes: dict[str, Any],
    tiny: Callable[..., Path],
    job: Make,
    texts: dict[str, Path],
    tmp_path: Path,
) -> None:
    model = uneven(tiny(family, **SHAPES.get(family, {})), tmp_path / "model")
    one = job(model, rotate=True, **changes)
    outcome = quantize(one, quietly)
    assert outcome.quality.kl_mean.value < 1e-3
    assert outcome.rotated
    assert again(one, texts) == outcome.quality
    rescaled = {f"{module.scaled_by}.weight" for module in outcome.modules}
    gains = {name: value for name, value in stored(one).items() if name.endswith(("layernorm.weight", "model.norm"))}
    assert all(bool((gain == 1).all()) == (name not in rescaled) for name, gain in gains.items())


def test_a_tied_model_is_untied_and_what_that_adds_is_said(
    tiny: Callable[..., Path], job: Make, texts: dict[str, Path]
) -> None:
    one = job(tiny("Llama", tie_word_embeddings=True), method="gptq", rotate=True)
    outcome = quantize(one, quietly)
    head = stored(one)["lm_head.weight"]
    assert config_of(one)["tie_word_embeddings"] is False
    assert outcome.untied_bytes == head.nbytes == 4096 * 64 * 4
    assert again(one, texts) == outcome.quality
    assert plan(one, 64).bytes_after == pytest.approx(outcome.bytes_after, rel=0.01)


def test_a_head_that_is_the_embedding_is_quantized_only_if_rotated(
    tiny: Callable[..., Path], job: Make, texts: dict[str, Path], tmp_path: Path
) -> None:
    tied = tiny("Llama", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="is its embedding") as refused:
        quantize(job(tied, method="gptq", quantize_head=True), quietly)
    assert "--rotate" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []
    one = job(tied, method="gptq", quantize_head=True, rotate=True)
    outcome = quantize(one, quietly)
    assert outcome.head_bits == pytest.approx(4 + 20 / 32)
    assert again(one, texts) == outcome.quality
    assert plan(one, 64).bytes_after == pytest.approx(outcome.bytes_after, rel=0.01)


HEADS = {"gptq": "gptq", "awq": "awq", "rtn": "compressed-tensors"}


@pytest.mark.parametrize("method", HEADS)
def test_a_quantized_head_is_judged_and_read_back(method: str, job: Make, texts: dict[str, Path]) -> None:
    one = job(method=method, format=HEADS[method], quantize_head=True)
    outcome = quantize(one, quietly)
    head = outcome.modules[-1]
    assert (head.name, head.method, head.tokens) == ("lm_head", method, 4 * 64)
    assert "lm_head.weight" not in stored(one)
    assert "lm_head" not in json.dumps(config_of(one)["quantization_config"].get("ignore", []))
    assert config_of(one)["quantization_config"].get("lm_head", True) is True
    assert again(one, texts) == outcome.quality
    assert type(load_model(Checkpoint.open(one.folder)).model.lm_head).__name__ == "PackedLinear"


def bits_of(outcome: Outcome) -> dict[str, int]:
    return {module.name: module.bits for module in outcome.modules}


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_budget_is_kept_and_linears_that_run_as_one_share_their_bits(
    form: str, job: Make, texts: dict[str, Path], tmp_path: Path
) -> None:
    one = job(method="gptq", format=form, target_bpw=4.2, quantize_head=form == "gptq")
    outcome = quantize(one, quietly)
    bits = bits_of(outcome)
    assert 3.9 < outcome.scheme.bits_per_weight <= 4.2
    assert len(set(bits.values())) > 1
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert bits[f"{layer}.mlp.gate_proj"] == bits[f"{layer}.mlp.up_proj"]
    assert again(one, texts) == outcome.quality
    plain = quantize(job(method="gptq", format=form, bits=3, quantize_head=form == "gptq", out=tmp_path / "3"), quietly)
    assert outcome.quality.kl_mean.high < plain.quality.kl_mean.low


def test_all_experts_of_a_block_share_their_bits(tiny: Callable[..., Path], job: Make) -> None:
    model = tiny("Mixtral", num_local_experts=4)
    outcome = quantize(job(model, method="rtn", format="compressed-tensors", target_bpw=4.2), quietly)
    for layer in ("layers.0", "layers.1"):
        assert len({bits for name, bits in bits_of(outcome).items() if f"{layer}.mlp.experts" in name}) == 1


def test_scales_of_the_cache_are_stored_and_disturb_no_reader(job: Make, texts: dict[str, Path]) -> None:
    one = job(method="gptq", format="compressed-tensors", kv_scales=True, rotate=True)
    outcome = quantize(one, quietly)
    tensors, config = stored(one), config_of(one)["quantization_config"]
    for layer in (0, 1):
        for leaf in ("k_scale", "v_scale"):
            scale = tensors[f"model.layers.{layer}.self_attn.{leaf}"]
            assert scale.dtype == torch.float32
            assert scale.shape == (1,)
            assert float(scale) > 0
    assert config["kv_cache_scheme"] == dict(KV_CACHE_SCHEME)
    assert again(one, texts) == outcome.quality
    assert plan(one, 64).bytes_after == pytest.approx(outcome.bytes_after, rel=0.01)
    load_model(Checkpoint.open(one.folder))


@contextmanager
def interrupting(label: str, where: str, step: int) -> Iterator[Report]:
    def report(done: int, total: int) -> None:
        if where in label and done == step:
            raise KeyboardInterrupt

    yield report


def test_an_interrupted_run_with_all_wishes_ends_in_the_same_bytes(
    tiny: Callable[..., Path], job: Make, tmp_path: Path
) -> None:
    model = tiny("Llama", tie_word_embeddings=True)
    wishes: dict[str, Any] = {"rotate": True, "quantize_head": True, "target_bpw": 4.2, "kv_scales": True}
    one, whole = (
        job(model, method="gptq", format="compressed-tensors", out=tmp_path / name, **wishes) for name in "ab"
    )
    for where, step in (("weighing", 1), ("weighing", 2), ("quantizing", 1), ("quantizing", 2), ("comparing", 1)):
        with pytest.raises(InterruptedWorkError):
            quantize(one, lambda label, where=where, step=step: interrupting(label, where, step))
    assert quantize(one, quietly) == quantize(whole, quietly)
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (one.folder / path.name).read_bytes()


REFUSED: list[tuple[dict[str, Any], type[LlmoptError], str]] = [
    ({"rotate": True, "family": "Olmo2"}, ModelError, r"layers\.0` would not compute the same"),
    ({"rotate": True, "family": "OPT"}, ModelError, "something before or behind its blocks"),
    ({"rotate": True, "method": "q4_k_m", "group_size": None}, UsageError, "GGUF files are not made of rotated"),
    ({"quantize_head": True, "method": "fp8", "group_size": None}, UsageError, "decides by itself about the output"),
    ({"kv_scales": True}, UsageError, "`awq` files have no place for the scales of a KV cache"),
    ({"target_bpw": 4.5, "format": "awq"}, UsageError, "an AWQ file holds one precision"),
    ({"target_bpw": 4.5, "bits": 4, "format": "gptq"}, UsageError, "--bits and --target-bpw both"),
    ({"target_bpw": 2.0, "format": "gptq"}, UsageError, r"2 bits per weight are too few: .* 2\.5"),
    ({"target_bpw": 7, "method": "fp8", "group_size": None}, UsageError, "fp8 makes weights of one width"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message[:24] for *_, message in REFUSED])
def test_what_cannot_be_wished_is_refused_by_job_and_dry_run_before_anything_is_written(
    changes: dict[str, Any], error: type[LlmoptError], message: str, job: Make, tmp_path: Path
) -> None:
    one = job(**changes)
    for attempt in (lambda: quantize(one, quietly), lambda: plan(one, 64)):
        with pytest.raises(error, match=message):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_named_after_the_target() -> None:
    assert Job("demo", method="gptq", target_bpw=3.5).folder == Path("demo-gptq-w3.5g128")
