"""Heads that learn to draft: that they do, that a seed decides what, and what is left where they are stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt_cli.errors import InterruptedWorkError, UsageError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.runtime.speculative import train
from llmopt_cli.runtime.speculative.eagle import angles
from llmopt_cli.runtime.speculative.heads import Heads
from llmopt_cli.runtime.speculative.heads_output import output_matrix
from llmopt_cli.runtime.speculative.train_eagle import EaglePupil
from llmopt_cli.runtime.speculative.train_job import Lesson, Outcome, eagle_config, folder_for, train_heads
from llmopt_cli.runtime.speculative.train_medusa import MedusaPupil
from llmopt_cli.spec.checkpoint import Checkpoint

VOCABULARY = 4096


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(
        tiny("Llama", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    )


@pytest.fixture(scope="module")
def loaded(base: Checkpoint) -> LoadedModel:
    return load_model(base)


@pytest.fixture(scope="module")
def texts() -> Tensor:
    """(12, 32): words that come in one order, so that a model's states tell what comes next."""
    generator = torch.Generator().manual_seed(6)
    starts = torch.randint(0, 10, (12, 1), generator=generator)
    return 100 + (starts + torch.arange(32)) % 10


def quiet(_: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


def teach(base: Checkpoint, texts: Tensor, folder: Path, **wanted: Any) -> Outcome:
    return train_heads(base, Lesson(**({"count": 2} | wanted)), texts, texts[:2], folder, quiet)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_learn_and_a_seed_decides_what(kind: str, base: Checkpoint, texts: Tensor, tmp_path: Path) -> None:
    outcomes = [teach(base, texts[:6], tmp_path / name, kind=kind, seed=1) for name in ("one", "two")]
    made = [Heads.open(tmp_path / name, base, kind) for name in ("one", "two")]
    one, two = (heads.tensors(torch.float32, torch.device("cpu")) for heads in made)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert outcomes[0].score == outcomes[1].score
    assert outcomes[0].steps == outcomes[0].planned


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_learning_makes_drafts_better(kind: str, base: Checkpoint, loaded: LoadedModel, texts: Tensor) -> None:
    torch.manual_seed(0)
    output, tokens = 20 * output_matrix(loaded), torch.arange(VOCABULARY)  # as sharp as that of a model that has learnt
    config, embed = eagle_config(base, "float32"), loaded.model.get_input_embeddings()
    turns = angles(config, 64, torch.float32, loaded.device)
    pupil: train.Pupil = MedusaPupil(output, tokens, 2, 2)
    if kind == "eagle":
        pupil = EaglePupil(config, embed, output, tokens, turns, 2)
    states = train.hidden_states(loaded, texts, lambda done, total: None)
    before = train.score(pupil, texts, states, 8)
    learnt = train.learn(pupil, texts, states, train.Course(20, 4, 2e-2), lambda done, total: None)
    after = train.score(pupil, texts, states, 8)
    assert learnt.steps == 60
    assert after.accuracy[0] > before.accuracy[0] + 0.2
    assert after.tokens_per_step[1] > before.tokens_per_step[1]


def test_an_interrupted_lesson_keeps_what_was_learnt(base: Checkpoint, texts: Tensor, tmp_path: Path) -> None:
    def progress(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
        def report(done: int, total: int) -> None:
            if label.startswith("teaching") and done == 2:
                raise KeyboardInterrupt

        return nullcontext(report)

    with pytest.raises(InterruptedWorkError, match=r"after 2 of \d+ steps; what was learnt is in"):
        train_heads(base, Lesson("medusa", 2, rewritten=False), texts, texts[:2], tmp_path / "kept", progress)
    assert Heads.open(tmp_path / "kept", base).kind == "medusa"


def test_where_heads_go(base: Checkpoint, tmp_path: Path) -> None:
    assert folder_for(base, "eagle", None, False) == base.path.parent / f"{base.name}-eagle"
    assert folder_for(Checkpoint.open("demo"), "medusa", None, False) == Path("demo-medusa")
    (tmp_path / "config.json").touch()
    with pytest.raises(UsageError, match="exists already"):
        folder_for(base, "eagle", tmp_path, False)
    assert folder_for(base, "eagle", tmp_path, True) == tmp_path
