"""Trees of drafts: the tree that is found is the best there is, chains bring what they must, a run adds its line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
import torch

from llmopt_cli.bench.report import index
from llmopt_cli.bench.trees import Tree, best_tree, chain, held, trees
from llmopt_cli.model.load import load_model
from llmopt_cli.runtime.speculative.heads import EAGLE_FILE, MEDUSA_FILE, write_heads
from llmopt_cli.runtime.speculative.heads_output import ranks_of
from llmopt_cli.runtime.speculative.train import walked
from llmopt_cli.runtime.speculative.train_job import Lesson, pupil_for
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.result import read_results


def brought(table: list[list[int]], tree: Tree) -> int:
    return sum(held(row, tree) for row in table)


@pytest.mark.parametrize("seed", range(8))
def test_no_tree_of_a_size_holds_more(seed: int) -> None:
    draw = Random(seed)
    table = [[min(2, int(draw.expovariate(1.2))) for _ in range(2)] for _ in range(12)]
    paths = [path for depth in (1, 2) for path in product(range(3), repeat=depth)]
    for size in range(1, 6):
        whole = (
            frozenset(chosen)
            for chosen in combinations(paths, size)
            if all(path[:-1] in chosen for path in chosen if len(path) > 1)
        )
        found = best_tree(table, size)
        assert all(path[:-1] in found for path in found if len(path) > 1)
        assert brought(table, found) == max(brought(table, tree) for tree in whole)


def test_a_tree_holds_the_longest_of_its_paths() -> None:
    tree = frozenset({(0,), (1,), (1, 0), (1, 0, 2)})
    assert [held(row, tree) for row in ([0, 0, 0], [1, 0, 2], [1, 0, 0], [2, 0, 0])] == [1, 3, 2, 0]
    assert best_tree([[0, 99], [99, 0]], 32) == {(0,)}  # nobody asks for a hundredth candidate


@pytest.mark.parametrize(("chance", "length"), [(0.6, 2), (0.8, 4)])
def test_a_chain_brings_what_its_chances_say(chance: float, length: int) -> None:
    draw = Random(length)
    table = [[int(draw.random() > chance) for _ in range(length)] for _ in range(40_000)]
    stood = torch.tensor([[held(row, chain(length)) for row in table]])
    assert walked(stood) == pytest.approx(sum(chance**place for place in range(length + 1)), rel=0.02)


def test_ranks_are_places_in_the_order_of_logits() -> None:
    tokens, logits = torch.tensor([2, 5, 7]), torch.tensor([0.5, 3.0, 1.0])
    said = torch.tensor([5, 7, 2, 6, 9])
    assert ranks_of(said, logits.expand(5, 3), tokens).tolist() == [0, 1, 2, 3, 3]
    assert ranks_of(said[:1], torch.full((1, 3), torch.nan), tokens).tolist() == [3]


@pytest.mark.parametrize(("kind", "file"), [("eagle", EAGLE_FILE), ("medusa", MEDUSA_FILE)])
def test_chains_and_trees_of_heads_are_timed(
    kind: str, file: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("speculation", "trees"):
        monkeypatch.setattr(f"llmopt_cli.bench.{module}.ANSWER", 60)
    base = Checkpoint.open(
        tiny("Llama", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    )
    pupil, config, _ = pupil_for(base, load_model(base), torch.arange(4096), Lesson(kind, 2))
    write_heads(tmp_path / "heads", file, config, pupil.tensors())
    trees(tmp_path / "heads", count=2, model=str(base.path), results=tmp_path)
    (result,) = read_results(tmp_path / "trees.jsonl")
    found = result.metrics["found"]["repetitive"]
    brought = found["tokens_per_step"]
    assert brought["chain of 0"] == 1 <= brought["chain of 1"] <= brought["chain of 2"]
    assert brought["tree of 32, 2 deep"] >= brought["tree of 8, 2 deep"]
    assert found["tokens_per_s"].keys() == brought.keys()
    assert f"{kind}: trees of drafts at most" in index(tmp_path)
