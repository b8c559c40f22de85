"""LoRA adapters: each request gets what the merged weights say, whoever else is in the batch; others are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import CheckpointError, LlmoptError, ModelError, UsageError
from llmopt_cli.model.codes import IntCodes
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.linear import CodedLinear, JoinedLinear, PackedLinear
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.model.lora import Loras
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.adapter import Adapter, named_folders
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import Scheme, find_scheme

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q1 = "model.layers.1.self_attn.q_proj"
PROMPTS = [[(7 * i * i + 13 * i + length) % 4000 + 7 for i in range(length)] for length in (3, 21, 9, 40, 17, 5)]
WHO = ["", "a", "b", "a", "b", ""]  # the adapter of each prompt
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
INT4 = replace(find_scheme("gptq"), group_size=32)


@dataclass
class Case:
    """A checkpoint, its adapters, and what transformers says to PROMPTS with the merged weights."""

    base: Path
    adapters: dict[str, Path]
    expected: list[list[int]]


def scale_a(_: str) -> float:
    return 16 / 4


def scale_b(linear: str) -> float:
    alpha, rank = (20 if linear.endswith("v_proj") else 12), (2 if linear == Q1 else 8)
    return float(alpha / rank**0.5)


SCALES: dict[str, Callable[[str], float]] = {"a": scale_a, "b": scale_b}


def merged(base: Path, weights: dict[str, Tensor], adapter: Path | None, scale: Callable[[str], float]) -> Any:
    """transformers' model with `weights`, and with `scale * B A` added to those that the adapter names."""
    weights = dict(weights)
    factors = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    for name in [name for name in factors if "lora_A" in name]:
        linear = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = factors[name.replace("lora_A", "lora_B")] @ factors[name]
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] + scale(linear) * product
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    return model


def said(base: Path, weights: dict[str, Tensor], adapters: dict[str, Path]) -> list[list[int]]:
    """Greedy answers to PROMPTS, each with the weights merged for its adapter."""
    answers: dict[int, list[int]] = {}
    for name in sorted(set(WHO)):
        model = merged(base, weights, adapters.get(name), SCALES.get(name, scale_a))
        for index, prompt in enumerate(PROMPTS):
            if WHO[index] == name:
                ids = torch.tensor([prompt])
                mask, ends = torch.ones_like(ids), {"eos_token_id": None, "pad_token_id": 6}
                out = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, **ends)
                answers[index] = out[0, len(prompt) :].tolist()
    return [answers[index] for index in range(len(PROMPTS))]


def adapters_of(base: Path, write: Callable[..., Path]) -> dict[str, Path]:
    """`a` on every linear; `b` by rslora on two, with ranks and alphas by pattern."""
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 20}}
    more = {"lora_alpha": 12, "use_rslora": True, **patterns}
    second = write(base, ["q_proj", "v_proj"], 2, r=8, ranks={Q1: 2}, **more)
    return {"a": write(base, ALL, 1, lora_alpha=16), "b": second}


def answers(engine: Engine) -> list[list[int]]:
    params = [replace(GREEDY, adapter=name) for name in WHO]
    return [list(output.token_ids) for output in engine.generate(PROMPTS, params)]


@pytest.fixture(scope="module", params=["Llama", "Qwen2"])
def case(request: pytest.FixtureRequest, tiny: Callable[..., Path], write_lora: Callable[..., Path]) -> Case:
    base = tiny(request.param)
    adapters = adapters_of(base, write_lora)
    return Case(base, adapters, said(base, load_file(base / "model.safetensors"), adapters))


@pytest.mark.parametrize("batching", [Batching(), Batching(max_num_batched_tokens=16, max_num_seqs=6, block_size=4)])
def test_a_mixed_batch_says_what_the_merged_weights_say(case: Case, device: str, batching: Batching) -> None:
    engine = Engine.from_pretrained(
        case.base, dtype="float32", device=device, batching=batching, adapters=case.adapters
    )
    assert answers(engine) == case.expected
    assert answers(engine) == case.expected  # prompts are found in the cache now
    plain = [list(output.token_ids) for output in engine.generate(PROMPTS, GREEDY)]
    assert [one == other for one, other in zip(plain, case.expected, strict=True)] == [not name for name in WHO]
    engine.check_integrity()
    engine.close()


def pack(base: Path, target: Path) -> dict[str, Tensor]:
    """Write `base` with random codes of 4 bits, and of 8 where members are to disagree; returns what they mean."""
    shutil.copytree(base, target)
    stored, generator, layout = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0), FORMATS["gptq"]
    meant = dict(stored)
    wide: dict[str, Scheme] = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        linear = name.removesuffix(".weight")
        scheme: Scheme = replace(INT4, weight_bits=8) if name.endswith("v_proj.weight") else INT4
        rows, columns = stored.pop(name).shape
        codes = torch.randint(0, 2**scheme.weight_bits, (rows, columns), dtype=torch.uint8, generator=generator)
        scales = torch.rand(rows, columns // 32, generator=generator).half() / 2**scheme.weight_bits
        zeros = torch.full_like(scales, 2 ** (scheme.weight_bits - 1), dtype=torch.uint8)
        made = IntCodes(codes, scales, zeros, scheme.weight_bits)
        meant[name] = made.dequantize()
        stored |= {f"{linear}.{suffix}": part for suffix, part in layout.pack(made, scheme).items()}
        wide |= {linear: scheme} if scheme is not INT4 else {}
    save_file(stored, target / "model.safetensors")
    file = target / "config.json"
    quantization = layout.config(INT4, ["lm_head"], wide)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(quantization)}))
    return meant


def test_packed_weights_are_adapted_member_by_member(
    tiny: Callable[..., Path], write_lora: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny("Llama")
    adapters, meant = adapters_of(base, write_lora), pack(base, tmp_path / "packed")
    engine = Engine.from_pretrained(tmp_path / "packed", dtype="float32", device="cpu", adapters=adapters)
    kinds = {type(module) for module in engine._loaded.model.modules()}
    assert {PackedLinear, CodedLinear, JoinedLinear} <= kinds
    assert answers(engine) == said(base, meant, adapters)
    engine.close()


def test_only_requests_of_one_adapter_share_their_prefix(case: Case) -> None:
    batching = Batching(block_size=8)
    engine = Engine.from_pretrained(case.base, dtype="float32", device="cpu", batching=batching, adapters=case.adapters)

    def hits(adapter: str) -> int:
        [output] = engine.generate([PROMPTS[3]], replace(GREEDY, adapter=adapter))
        return output.num_cached_tokens

    assert [hits(name) for name in ("", "a", "b", "a", "", "b")] == [0, 0, 0, 32, 32, 32]
    engine.close()


def test_with_deterministic_the_neighbours_change_no_bit(case: Case) -> None:
    batching = Batching(deterministic=True, enable_prefix_caching=False)
    engine = Engine.from_pretrained(
        case.base, dtype="bfloat16", device="cpu", batching=batching, adapters=case.adapters
    )
    each = [replace(GREEDY, max_tokens=4, adapter=name, logprobs=1) for name in WHO]
    together = [output.logprobs for output in engine.generate(PROMPTS, each)]
    alone = [engine.generate([ids], params)[0].logprobs for ids, params in zip(PROMPTS, each, strict=True)]
    assert together == alone
    engine.close()


def test_beams_keep_their_adapter(tiny: Callable[..., Path], write_lora: Callable[..., Path]) -> None:
    base = tiny("Llama")
    adapters = adapters_of(base, write_lora)
    model = merged(base, load_file(base / "model.safetensors"), adapters["b"], scale_b)
    ids = torch.tensor([PROMPTS[1]])
    ends = {"eos_token_id": None, "pad_token_id": 6}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, **ends)
    engine = Engine.from_pretrained(base, dtype="float32", device="cpu", adapters=adapters)
    params = SamplingParams(max_tokens=8, ignore_eos=True, beams=3, adapter="b")
    other = SamplingParams(max_tokens=8, ignore_eos=True, adapter="a")
    found = engine.generate([PROMPTS[1], PROMPTS[1]], [params, other])[0]
    assert list(found.beams[0].token_ids) == out[0, ids.shape[1] :].tolist()
    engine.close()


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> LoadedModel:
    return load_model(Checkpoint.open(tiny("Llama")), "float32", "cpu")


def test_a_model_that_an_engine_let_go_of_is_as_it_was(
    loaded: LoadedModel, tiny: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    ids = torch.tensor([PROMPTS[1]])
    asked = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "use_cache": False}
    loras = Loras(loaded.model, [Adapter.open("a", write_lora(tiny("Llama"), ALL, 1))])
    before = loaded.model(**asked).logits
    loras.hang()
    loras.choose({"a": [3, 4]}, ids.shape[1], loaded.device)
    changed = (loaded.model(**asked).logits != before).any(-1)[0].tolist()
    assert changed == [row >= 3 for row in range(ids.shape[1])]  # those after them attend to them
    loras.release()
    assert torch.equal(loaded.model(**asked).logits, before)


HEAD = "base_model.model.lm_head.lora_{}.weight"
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "`use_dora: True`, which is not supported"),
    ({"bias": "all"}, "`bias: all`, which is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"peft_type": "IA3"}, "is of type `IA3`"),
    ({"r": 0}, "no usable `r`"),
    ({"lora_alpha": "big"}, "no usable `lora_alpha`"),
    ({"target_modules": None}, "no usable `target_modules`"),
    ({"layers_to_transform": "1"}, "no usable `layers_to_transform`"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"target_modules": "("}, "is no regular expression"),
    ({"rank_pattern": {"down_proj": 8}}, "factor A of shape [4, 96] for `model.layers.0.mlp.down_proj`"),
    ({"target_modules": ["q_proj"]}, "which it does not target"),
    ({"layers_to_transform": [0]}, "stores factors of `model.layers.1"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS, ids=[str(change) for change, _ in CONFIGS])
def test_what_a_config_asks_for_beside_factors_is_refused(
    loaded: LoadedModel, tiny: Callable[..., Path], write_lora: Callable[..., Path], change: dict[str, Any], words: str
) -> None:
    folder = write_lora(tiny("Llama"), ALL, 1, **change)
    with pytest.raises(CheckpointError) as caught:
        Loras(loaded.model, [Adapter.open("mine", folder)])
    assert words in caught.value.message


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


FILES: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (lambda _: {}, "stores no factors"),
    (lambda f: {k: v for k, v in f.items() if "1.mlp.up_proj.lora_B" not in k}, "only one of the two factors"),
    (lambda f: {k: v for k, v in f.items() if "layers.1" not in k}, "no factors for 7 of the 14 layers"),
    (lambda f: f | {k.replace("layers.1", "layers.2"): v.clone() for k, v in f.items()}, "changes `model.layers.2"),
    (lambda f: f | {HEAD.format("A"): torch.ones(4, 64), HEAD.format("B"): torch.ones(4096, 4)}, "changes `lm_head`"),
    (lambda f: f | {"base_model.model.lm_head.weight": torch.ones(4)}, "which is no factor of a linear layer"),
]


@pytest.mark.parametrize(("change", "words"), FILES, ids=[words for _, words in FILES])
def test_factors_that_do_not_fit_are_refused(
    loaded: LoadedModel,
    tiny: Callable[..., Path],
    write_lora: Callable[..., Path],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: str,
) -> None:
    folder = edited(write_lora(tiny("Llama"), ALL, 1), change)
    with pytest.raises(CheckpointError) as caught:
        Loras(loaded.model, [Adapter.open("mine", folder)])
    assert words in caught.value.message


def test_an_adapter_of_a_wider_model_is_refused(
    loaded: LoadedModel, tiny: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    folder = write_lora(tiny("Llama", hidden_size=96), ["o_proj"], 1)
    with pytest.raises(CheckpointError, match=r"factor A of shape \[4, 96\].*make it \[4, 64\]"):
        Loras(loaded.model, [Adapter.open("mine", folder)])


def test_layers_to_transform_leaves_the_others_alone(
    loaded: LoadedModel, tiny: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    folder = write_lora(tiny("Llama"), ALL, 1, layers_to_transform=[1])
    half = edited(folder, lambda factors: {name: one for name, one in factors.items() if "layers.1" in name})
    assert Loras(loaded.model, [Adapter.open("mine", half)]).nbytes > 0


def test_a_router_is_no_layer_that_an_adapter_can_change(
    strong: Callable[[str], Path], write_lora: Callable[..., Path]
) -> None:
    base = strong("llama4-chunked")
    model = load_model(Checkpoint.open(base), "float32", "cpu").model
    with pytest.raises(CheckpointError, match=r"changes `model.layers.\d.feed_forward.router`"):
        Loras(model, [Adapter.open("mine", write_lora(base, ["router"], 1))])
    every = write_lora(base, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 1)
    assert Loras(model, [Adapter.open("mine", every)]).nbytes > 0


class Halves(nn.Module):
    """Calls a block twice, as a mixture calls an expert: with some of the tokens."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(x[:, :1]), self.block(x[:, 1:])], dim=1)


def test_a_layer_that_does_not_see_every_token_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(tiny("Llama")), "float32", "cpu").model
    model.model.layers[1].mlp = Halves(model.model.layers[1].mlp)
    linear = "base_model.model.model.layers.1.mlp.block.down_proj"
    factors = {f"{linear}.lora_A.weight": torch.ones(4, 96), f"{linear}.lora_B.weight": torch.ones(64, 4)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["block.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not see each token once"):
        Loras(model, [Adapter.open("mine", tmp_path)])


def test_names_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    wrong: list[Callable[[], object]] = [
        lambda: Adapter.open("mine", tmp_path / "nowhere"),
        lambda: Adapter.open("mine", tmp_path),
        lambda: named_folders(["mine"]),
        lambda: named_folders(["mine=a", "mine=b"]),
    ]
    words = ["has no adapter_config.json", "has no adapter_model.safetensors", "names no adapter", "called `mine`"]
    for call, word in zip(wrong, words, strict=True):
        with pytest.raises(LlmoptError) as caught:
            call()
        assert word in caught.value.message


def test_a_request_for_an_unknown_adapter_is_refused(case: Case) -> None:
    engine = Engine.from_pretrained(case.base, dtype="float32", device="cpu", adapters={"a": case.adapters["a"]})
    with pytest.raises(UsageError, match="no adapter `z`") as caught:
        engine.generate([[7, 8]], SamplingParams(adapter="z"))
    assert caught.value.hint == "loaded: `a`"
    assert engine.startup_report()["adapters"] == ["a"]
    engine.close()
