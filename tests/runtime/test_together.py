"""Steps in which all layers run as one op, against the same steps block by block."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt_cli.model.load import load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching
from llmopt_kernels import Stack, cpu

pytestmark = pytest.mark.skipif(not cpu.pairs_bf16(), reason="this machine has no compiled product of bfloat16")
PROMPTS = [list(range(20, 33)), list(range(40, 45)), [7]]
ASKED = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 16}),
    ("Mistral", {"sliding_window": 4, "head_dim": 16}),
    ("SmolLM3", {"num_hidden_layers": 6, "pad_token_id": 6}),  # one layer keeps its own attention
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each step that ran as one op."""
    found: list[int] = []
    run = Stack.run

    def noting(self: Stack, x: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(len(x))
        return run(self, x, *others)

    monkeypatch.setattr(Stack, "run", noting)
    return found


def open_engine(folder: Path, **more: Any) -> Engine:
    return Engine.from_pretrained(folder, dtype="bfloat16", device="cpu", batching=Batching(max_model_len=64), **more)


def answers(engine: Engine) -> list[tuple[float, ...]]:
    found = [[one.logprob for one in output.logprobs] for output in engine.generate(PROMPTS, ASKED)]
    engine.close()
    return [tuple(logprobs) for logprobs in found]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_layers_together_answer_as_block_by_block(
    tiny: Callable[..., Path], family: str, changes: dict[str, Any], ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(family, **changes)
    together = answers(open_engine(folder))
    times = 5 if family == "SmolLM3" else 1
    assert ran == [3] * 8 * times, "one prompt step, then steps of three tokens"
    monkeypatch.setattr(Stack, "runs", lambda *_: False)
    apart = answers(open_engine(folder))
    assert len(ran) == 8 * times
    for one, other in zip(together, apart, strict=True):
        assert one == pytest.approx(other, abs=0.05)


def test_a_hook_sees_every_step(tiny: Callable[..., Path], ran: list[int]) -> None:
    engine = open_engine(tiny("Llama"))
    seen: list[int] = []
    [*_, last] = [module for module in engine._loaded.model.modules() if type(module).__name__ == "MergedLinear"]
    hook = last.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[-2]))
    engine.generate(PROMPTS, ASKED)
    assert ran == []
    assert seen == [19] + [3] * 8
    hook.remove()
    engine.generate(PROMPTS, ASKED)
    assert ran == [3] * 8
    engine.close()


def test_a_cache_is_freed_with_its_engine_and_the_next_one_is_used(tiny: Callable[..., Path], ran: list[int]) -> None:
    checkpoint = Checkpoint.open(tiny("Llama"))
    loaded = load_model(checkpoint, "bfloat16", "cpu")
    tokenizer = open_engine(tiny("Llama")).tokenizer
    found = []
    for _ in range(2):
        engine = Engine(checkpoint, loaded, tokenizer, Batching(max_model_len=64))
        pages = [weakref.ref(layer.k) for layer in engine._layers if layer.k is not None]
        found.append(answers(engine))
        assert [page() for page in pages] == [None, None]
    assert found[0] == found[1]
    assert ran == [3] * 16
