"""What drafts are expected to gain, whichever way they are made: the formula against dice, costs against real heads."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import resolve_draft
from llmopt_cli.estimate.latency import StepModel, expected_tokens
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import budget, sequence_bytes
from llmopt_cli.estimate.plan import answer
from llmopt_cli.estimate.question import ask
from llmopt_cli.estimate.speculation import Decoding, gain
from llmopt_cli.runtime.speculative.heads import KINDS
from llmopt_cli.spec.catalog import find_gpu, find_model
from llmopt_cli.spec.recipe import SPECULATION, Recipe, Speculation
from llmopt_cli.spec.scheme import SCHEMES

TARGET = find_model("8b")
PLAIN = Deployment(TARGET, find_gpu("h100")[0], SCHEMES["bf16"])
MODELS = {"draft_model": "llama-3.2-1b", "eagle": "some/heads", "medusa": "some/heads"}
ASKED = {method: Speculation(MODELS.get(method, ""), 4, 0.7, method) for method in SPECULATION}
SIZE, TOKENS = 32, 256
CONFIGS = {
    "eagle": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TOKENS,
        "max_position_embeddings": 128,
    },
    "medusa": {"medusa_num_heads": 3, "medusa_num_layers": 2, "hidden_size": SIZE},
}
SMALL = replace(TARGET, hidden_size=SIZE, vocab_size=TOKENS)


def drafted(asked: Speculation, plain: Deployment = PLAIN) -> Deployment:
    return replace(plain, draft=resolve_draft(asked, plain.spec))


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.3, 5), (0.7, 4), (0.95, 8), (0.0, 3), (1.0, 6)])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_formula_is_the_mean_of_many_rounds(acceptance: float, drafts: int, share: float) -> None:
    dice, rounds = random.Random(1), 20_000
    brought = 0
    for _ in range(rounds):
        stood = 0
        while dice.random() < acceptance and stood < drafts:
            stood += 1
        brought += 1 + (stood if dice.random() < share else 0)
    assert brought / rounds == pytest.approx(gain(acceptance, drafts, share).tokens_per_step, rel=0.02)


def test_lengths_between_two_bring_something_between() -> None:
    low, between, high = (expected_tokens(0.6, length) for length in (2, 2.5, 3))
    assert low < between < high


@pytest.mark.parametrize("method", SPECULATION)
def test_every_method_is_timed_and_takes_its_memory(method: str) -> None:
    on = drafted(ASKED[method])
    step, plain = StepModel(on), StepModel(PLAIN)
    found = Decoding(step, 8, 512).asked()
    assert found.speedup == pytest.approx(plain.decode(8, 512) / step.decode(8, 512))
    assert 1 < found.speedup < found.tokens_per_step == pytest.approx(2.7731)
    assert budget(on).weights - budget(PLAIN).weights == pytest.approx(2 * on.draft.params if on.draft else 0)
    wide, wider = (replace(one, scheme=SCHEMES["fp32"]) for one in (PLAIN, on))
    more, twice = budget(on).weights - budget(PLAIN).weights, budget(wider).weights - budget(wide).weights
    assert twice == pytest.approx(2 * more)
    cached = {"draft_model": 16 * 8 * 64 * 4, "eagle": 8 * 128 * 4}.get(method, 0)  # of the draft, bytes a token
    assert sequence_bytes(on, 1600) - sequence_bytes(PLAIN, 1600) == 1600 * cached


def test_what_is_run_less_for_a_draft_gains_more() -> None:
    gains = {method: Decoding(StepModel(drafted(asked)), 1, 512).asked().speedup for method, asked in ASKED.items()}
    ordered = [gains[method] or 0 for method in ("draft_model", "eagle", "medusa", "ngram")]
    assert ordered == sorted(ordered)
    assert gains["ngram"] == gains["suffix"]


def test_a_draft_in_a_part_of_the_steps_gains_a_part() -> None:
    on = Decoding(StepModel(drafted(ASKED["ngram"])), 1, 512)
    speeds = [gain(0.7, 4, share, on).speedup or 0 for share in (0.0, 0.3, 1.0)]
    assert speeds[0] == 1
    assert speeds == sorted(speeds)
    assert speeds[2] == on.asked().speedup


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads_that_lie_here_are_counted_by_their_files(kind: str, tmp_path: Path) -> None:
    shapes = KINDS[kind](CONFIGS[kind], SMALL)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors | {"token_map": np.arange(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    found = resolve_draft(Speculation(str(tmp_path), 4, 0.7, kind), SMALL)
    rows = 64 * SIZE  # of the output matrix, copied
    own = sum(tensor.size for tensor in tensors.values() if tensor.shape != (TOKENS, SIZE))
    assert found.params == pytest.approx(own + rows, abs=2 * SIZE)  # but for a norm more or less
    assert found.tokens == (3 if kind == "medusa" else 4)  # no more than there are heads
    assert "counted by" not in found.name
    with pytest.raises(UsageError, match="hidden size of 32"):
        resolve_draft(Speculation(str(tmp_path), 4, 0.7, kind), TARGET)
    other = "eagle" if kind == "medusa" else "medusa"
    with pytest.raises(UsageError, match=f"holds {kind} heads, not {other}"):
        resolve_draft(Speculation(str(tmp_path), 4, 0.7, other), SMALL)


def test_heads_that_lie_elsewhere_are_counted_by_the_models_shape() -> None:
    found = resolve_draft(ASKED["eagle"], TARGET)
    size = TARGET.hidden_size
    assert found.params == pytest.approx(TARGET.linear_params / TARGET.num_layers + 2 * size**2, rel=0.001)
    assert "counted by the model's shape" in found.name
    with pytest.raises(UsageError, match=r"no folder `\./none`"):
        resolve_draft(Speculation("./none", 4, 0.7, "eagle"), TARGET)


def test_a_recipe_that_looks_text_up_is_timed_with_it() -> None:
    recipe = Recipe(model="8b", gpu="h100", engine="vllm")
    load = Load.fixed(8, 512, 128)
    speeds = [
        answer(ask(replace(recipe, speculation=asked), load)).speed for asked in (None, Speculation(method="ngram"))
    ]
    assert speeds[0]
    assert speeds[1]
    assert speeds[0].speculation is None
    assert speeds[1].speculation
    assert speeds[1].tpot < speeds[0].tpot
    assert speeds[1].tokens_per_s > speeds[0].tokens_per_s
