"""Every family of families.yaml says what transformers says, token for token, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from llmopt_cli.errors import LlmoptError
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.spec.recipe import Batching

ROWS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parents[1] / "families.yaml").read_text())
SERVED = [name for name, row in ROWS.items() if "refused" not in row]
PROMPTS = [[(7 * i * i + 13 * i + length) % 500 + 7 for i in range(length)] for length in (2, 41)]
BATCHING = Batching(max_num_seqs=2, max_num_batched_tokens=16, block_size=8, max_model_len=64)
TIE = 1e-4  # of logits: closer ones may come in either order


def open_engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, dtype="float32", device="cpu", batching=BATCHING)


@pytest.mark.parametrize("name", SERVED)
def test_a_family_says_what_transformers_says(strong: Callable[[str], Path], name: str) -> None:
    """Each token is the likeliest after all before it, in one pass of transformers without a cache."""
    folder = strong(name)
    engine = open_engine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, output in zip(
        PROMPTS, engine.generate(PROMPTS, SamplingParams(max_tokens=10, ignore_eos=True)), strict=True
    ):
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert bool((logits.amax(-1) - chosen <= TIE).all()), name
        assert len(set(output.token_ids)) > 1


@pytest.mark.parametrize("name", [name for name in ROWS if name not in SERVED])
def test_what_the_runtime_lacks_is_refused(strong: Callable[[str], Path], name: str) -> None:
    with pytest.raises(LlmoptError, match=ROWS[name]["refused"]):
        open_engine(strong(name))


def test_a_longer_context_than_longrope_is_steady_for_is_refused(tiny: Callable[..., Path]) -> None:
    angles = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = tiny("Phi3", rope_parameters=angles, original_max_position_embeddings=32)
    engine = Engine.from_pretrained(folder, device="cpu", batching=Batching(max_num_seqs=2))
    assert engine.max_model_len == 32
    with pytest.raises(LlmoptError, match="limit of 32 tokens"):
        Engine.from_pretrained(folder, device="cpu", batching=Batching(max_model_len=33))
