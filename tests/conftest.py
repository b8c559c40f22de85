"""Fixtures that several packages share: devices, tiny random checkpoints, the demo engine."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import settings
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "llmopt_cli" / "assets" / "bookworm-6m"
TINY = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 6,
}

CONFIG = tempfile.mkdtemp(prefix="llmopt-tests-")  # what tests keep of this machine is kept aside from the user's own
os.environ["LLMOPT_CONFIG_DIR"] = CONFIG  # before any test module copies the environment for its processes
atexit.register(shutil.rmtree, CONFIG, ignore_errors=True)

settings.register_profile("llmopt", deadline=None)  # no test asserts a time
settings.load_profile("llmopt")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return str(request.param)


STRONG = {"initializer_range": 0.3, "vocab_size": 512}  # weights so large that every token depends on all before it


@pytest.fixture(scope="session")
def families() -> dict[str, dict[str, Any]]:
    """The rows of families.yaml."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "families.yaml").read_text())
    return rows


@pytest.fixture(scope="session")
def strong(tiny: Callable[..., Path], families: dict[str, dict[str, Any]]) -> Callable[[str], Path]:
    """Makes a checkpoint folder of the family of that name in families.yaml; its attention decides what it says."""
    return lambda name: tiny(**({k: v for k, v in families[name].items() if k != "refused"} | STRONG))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a checkpoint folder of a tiny random model: `tiny("Qwen2Config", "Qwen2ForCausalLM", sliding_window=8)`.

    The demo's tokenizer lies beside it. The output head is sharpened, so that greedy choices are no ties.
    """
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}-{sorted(changes.items())}"
        if key not in made:
            made[key] = _make(family, tmp_path_factory.mktemp(family), changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def write_lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes an adapter folder as peft saves it, for the linears of a checkpoint folder whose names end so.

    Its factors are random, of `ranks` by name and else of rank `r`; they are strong enough to change what is said.
    """

    def write(
        base: Path, ends: list[str], seed: int, r: int = 4, ranks: dict[str, int] | None = None, **more: Any
    ) -> Path:
        folder, generator = tmp_path_factory.mktemp("lora"), torch.Generator().manual_seed(seed)
        factors: dict[str, torch.Tensor] = {}
        for name, weight in load_file(base / "model.safetensors").items():
            linear, (rows, columns) = name.removesuffix(".weight"), (weight.shape * 2)[:2]
            if linear.rpartition(".")[2] in ends and name.endswith(".weight"):
                rank = (ranks or {}).get(linear, r)
                shapes = {"A": (rank, columns), "B": (rows, rank)}
                factors |= {
                    f"base_model.model.{linear}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.12
                    for part, shape in shapes.items()
                }
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": ends, "r": r}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8} | more))
        return folder

    return write


def _make(family: str, folder: Path, changes: dict[str, Any]) -> Path:
    import transformers

    config = getattr(transformers, f"{family}Config")(**(TINY | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if "initializer_range" not in changes:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / file, folder)
    return folder
