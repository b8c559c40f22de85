"""GGUF files: a model that is written and opened again computes what it did, with the tokenizer it had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmopt_cli.errors import CheckpointError, ModelError, UsageError
from llmopt_cli.model.load import load_model
from llmopt_cli.model.stream import Store, stream
from llmopt_cli.quant.ggml import encode
from llmopt_cli.quant.ggml_write import block_types, write_checkpoint
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint
from llmopt_cli.spec.gguf_file import GgufTensor, read_gguf, write_gguf

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
DATA = Path(__file__).resolve().parents[2] / "../shared/data"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "pad_token_id": 6,
}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
SCALED = LLAMA3 | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SOFT = {"query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {"rope_parameters": SCALED}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", EXPERTS | {"num_local_experts": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "gemma2": ("gemma2", SOFT),
    "gemma3": ("gemma3_text", SOFT),
    "phi3": ("phi3", {"sliding_window": None}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(folder: Path, kind: str, changes: dict[str, Any]) -> Any:
    """A tiny random model, saved with the demo's tokenizer; its norms are not all ones."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(BUNDLED["demo"] / file, folder / file)
    return model


def transformers_model(checkpoint: Checkpoint) -> Any:
    """transformers' own model with the config and the weights of a checkpoint."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.path), dtype=torch.float32).eval()
    slots = dict(model.named_parameters(remove_duplicate=False))
    with Store(checkpoint) as store, torch.no_grad():
        filled = {name: slots[name].copy_(tensor) for name, tensor in stream(model, store, slots)}
    assert set(slots) - set(filled) <= {"lm_head.weight"}
    return model


def nothing(name: str) -> None:
    return None


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_from_gguf(name: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", *MODELS[name])
    write_checkpoint(tmp_path / "model.gguf", Checkpoint.open(tmp_path / "model"), "f32", nothing)
    ours = transformers_model(Checkpoint.open(tmp_path / "model.gguf"))
    ids = torch.randint(0, 4096, (1, 48))
    with torch.inference_mode():
        torch.testing.assert_close(ours(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("mix", ["q8_0", "q4_k_m", "q2_k"])
def test_the_demo_reads_back_as_it_was_encoded(mix: str, tmp_path: Path) -> None:
    demo = Checkpoint.open("demo")
    write_checkpoint(tmp_path / "demo.gguf", demo, mix, nothing)
    types = block_types(demo, mix)
    with Store(Checkpoint.open(tmp_path / "demo.gguf")) as written, Store(demo) as base:
        assert sorted(written.names) == sorted(base.names)
        for name in base.names:
            weight = base.get(name).float()
            wanted = encode(weight, types[name]).dequantize() if weight.ndim == 2 else weight
            assert torch.equal(written.get(name).float(), wanted), name


def coded_bytes(file: Path) -> int:
    return sum(header.held(4) for header in Checkpoint.open(file).tensors.values())


@pytest.mark.parametrize("mix", ["q8_0", "q4_0", "q3_k_m", "q5_k_m"])
def test_weights_take_the_memory_that_their_blocks_take(mix: str, tmp_path: Path) -> None:
    for name in ("llama", "qwen3"):  # untied and tied
        folder = tmp_path / name
        made(folder, *MODELS[name])
        write_checkpoint(tmp_path / f"{name}.gguf", Checkpoint.open(folder), mix, nothing)
        loaded = load_model(Checkpoint.open(tmp_path / f"{name}.gguf"), dtype="float32", device="cpu")
        buffers = sum(buffer.nbytes for buffer in loaded.model.buffers())  # rotary frequencies: no file has them
        assert loaded.weight_bytes - buffers <= 1.05 * coded_bytes(tmp_path / f"{name}.gguf")


def test_weights_stay_coded_in_memory_and_the_model_still_runs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "demo.gguf", Checkpoint.open("demo"), "q4_k_m", nothing)
    coded = load_model(Checkpoint.open(tmp_path / "demo.gguf"), dtype="float32", device="cpu")
    plain = load_model(Checkpoint.open("demo"), dtype="float32", device="cpu")
    assert coded.weight_bytes == pytest.approx(coded_bytes(tmp_path / "demo.gguf"), rel=0.05)
    assert coded.weight_bytes < 0.25 * plain.weight_bytes
    ids, positions = torch.arange(20, 84)[None], torch.arange(64)[None]
    with torch.inference_mode():
        found, wanted = (
            one.model(input_ids=ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)
            for one in (coded, plain)
        )
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.1


def test_the_tokenizer_comes_back_with_its_ends_and_its_template(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "demo.gguf", Checkpoint.open("demo"), "f16", nothing)
    found, wanted = Tokenizer(Checkpoint.open(tmp_path / "demo.gguf")), Tokenizer(Checkpoint.open("demo"))
    text = "It's 1234 naïve tests —\n\n  <|user|>done"
    assert found.encode(text) == wanted.encode(text)
    assert found.eos_ids == wanted.eos_ids
    messages = [{"role": "user", "content": "Hello"}]
    assert found.chat(messages) == wanted.chat(messages)


@pytest.mark.parametrize("folder", ["models/stories260k", "tokenizers/qwen2.5"])
def test_tokenizers_of_other_kinds_come_back(folder: str, tmp_path: Path) -> None:
    source = DATA / folder
    if not (source / "tokenizer.json").is_file():
        pytest.skip(f"{source} is not there")
    size = len(AutoTokenizer.from_pretrained(source))
    made(tmp_path / "model", "llama", {"vocab_size": size, "hidden_size": 32})
    for file in TOKENIZER:
        (tmp_path / "model" / file).unlink()
        if (source / file).is_file():
            shutil.copy(source / file, tmp_path / "model" / file)
    write_checkpoint(tmp_path / "model.gguf", Checkpoint.open(tmp_path / "model"), "f16", nothing)
    found = AutoTokenizer.from_pretrained(Checkpoint.open(tmp_path / "model.gguf").path)
    wanted = AutoTokenizer.from_pretrained(source)
    for text in ("Once upon a time, there were 123 cats.", "It's naïve — über\n\n  end ", "你好 world"):
        assert found(text).input_ids == wanted(text).input_ids
        assert found.decode(found(text).input_ids) == wanted.decode(wanted(text).input_ids)


def test_an_unknown_split_of_words_asks_for_its_name(tmp_path: Path) -> None:
    made(tmp_path / "model", "llama", {})
    file = tmp_path / "model" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(document))
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(UsageError, match="splits words"):
        write_checkpoint(tmp_path / "model.gguf", checkpoint, "f16", nothing)
    write_checkpoint(tmp_path / "model.gguf", checkpoint, "f16", nothing, pre="gpt-2")
    assert read_gguf(tmp_path / "model.gguf")[0]["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [("gpt_neox", {}, "gpt_neox"), ("llama", {"hidden_act": "gelu"}, "hidden_act"), ("qwen2", {"rope": 1}, "yarn")],
)
def test_what_llama_cpp_would_not_compute_is_refused_by_name(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if changes.pop("rope", None):
        changes = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}
    made(tmp_path / "model", "llama", {})
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind} | changes))
    with pytest.raises(ModelError, match=said):
        write_checkpoint(tmp_path / "model.gguf", Checkpoint.open(tmp_path / "model"), "f16", nothing)
    assert not (tmp_path / "model.gguf").exists()


def test_a_container_gives_back_what_was_put_in(tmp_path: Path) -> None:
    metadata = {"a": 3, "b": -1.5, "c": "ü", "d": True, "e": ["x", "yz"], "f": [1, -2], "g": [0.5], "h": []}
    tensors = [GgufTensor("one", "q8_0", (2, 32)), GgufTensor("two", "f32", (3,))]
    data = [bytes(range(68)), b"\1" * 12]
    write_gguf(tmp_path / "file.gguf", metadata, tensors, data)
    found, headers = read_gguf(tmp_path / "file.gguf")
    assert found == metadata
    assert [(one.name, one.type, one.shape) for one in headers] == [(one.name, one.type, one.shape) for one in tensors]
    raw = (tmp_path / "file.gguf").read_bytes()
    assert [raw[one.offset : one.offset + one.nbytes] for one in headers] == data
    assert all(one.offset % 32 == 0 for one in headers)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.9])
def test_a_damaged_file_is_refused_before_it_is_read(keep: float, tmp_path: Path) -> None:
    whole, cut = tmp_path / "demo.gguf", tmp_path / "cut.gguf"
    write_checkpoint(whole, Checkpoint.open("demo"), "q4_0", nothing)
    raw = whole.read_bytes()
    cut.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        Checkpoint.open(cut)
