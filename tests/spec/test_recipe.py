"""Recipes: every bundled file loads and names things that exist; wrong files say where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt_cli.errors import ConfigFileError, UnknownNameError, UsageError
from llmopt_cli.spec.catalog import find_gpu
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Recipe, Speculation
from llmopt_cli.spec.scheme import find_scheme
from llmopt_cli.spec.yaml_file import recipes_folder

BUNDLED = sorted(recipes_folder().glob("*.yaml"))


@pytest.mark.parametrize("file", BUNDLED, ids=[file.stem for file in BUNDLED])
def test_every_bundled_recipe_names_what_exists(file: Path) -> None:
    recipe = Recipe.read(file)
    assert Checkpoint.open(recipe.model).spec.num_layers
    assert recipe.scheme is None or find_scheme(recipe.scheme).method
    assert recipe.gpu is None or find_gpu(recipe.gpu)
    assert file.read_text().startswith("# "), "a recipe says when to use it"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: other\nbatching:\n  block_size: 32\n  max_num_seqs: 4\n")
    recipe = Recipe.resolve(file, model=None, dtype="float32", block_size=8, max_model_len=None)
    assert recipe == Recipe(model="other", dtype="float32", batching=Batching(block_size=8, max_num_seqs=4))


def test_without_a_file_the_defaults_hold() -> None:
    assert Recipe.resolve(None) == Recipe()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("model: demo\n\nshceme: awq\n", "unknown key `shceme` in .* line 3", "`scheme`"),
        (
            "batching:\n  max_num_seqs: 4\n  blok_size: 3\n",
            r"unknown key `batching\.blok_size` in .* line 3",
            "`block_size`",
        ),
        ("batching:\n  max_num_seqs: many\n", r"key `batching\.max_num_seqs` in .* line 2", None),
        ("batching:\n  block_size: 0\n", "line 1: block_size must be at least 1, not 0", None),
        ("- a list\n", "must hold `key: value` lines", None),
        ("model: 2024-13-45\n", "holds a wrong value", None),
        ("model: !!int abc\n", "holds a wrong value", None),
        ("model: !!bool abc\n", "holds a wrong value", None),
        ("model: !!timestamp abc\n", "holds a wrong value", None),
        ("model: [unclosed\n", "line 2 is not valid YAML", None),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigFileError, match=message) as caught:
        Recipe.read(write(tmp_path, text))
    if hint:
        assert hint in str(caught.value.hint)


def test_an_unknown_recipe_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        Recipe.read("awk")
    assert "awq" in str(caught.value.hint)


def test_a_budget_that_starves_decoding_is_refused() -> None:
    with pytest.raises(UsageError, match="max_num_batched_tokens 8 is below max_num_seqs 9"):
        Recipe.resolve(None, max_num_seqs=9, max_num_batched_tokens=8)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    recipe = Recipe(
        model="70b",
        scheme="awq",
        gpu="h100x2",
        engine="vllm",
        kv_cache_dtype="fp8",
        tensor_parallel_size=2,
        speculation=Speculation("1b", 5, 0.8),
        batching=Batching(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192),
    )
    file = tmp_path / "chosen.yaml"
    recipe.write(file, "what was asked")
    assert file.read_text().startswith("# what was asked\n")
    assert "block_size" not in file.read_text()  # defaults are not repeated
    assert Recipe.read(file) == recipe
    with pytest.raises(UsageError, match="exists already"):
        recipe.write(file, "again")
    with pytest.raises(UsageError, match="cannot write"):
        recipe.write(tmp_path / "nowhere" / "x.yaml", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor_parallel_size: 0", "must be at least 1"),
        ("speculation: {model: 1b, acceptance: 2}", "acceptance must lie in 0..1"),
        ("speculation: {model: 1b, tokens: 2}", "unknown key `speculation.tokens`"),
    ],
)
def test_wrong_parallelism_and_speculation_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigFileError, match=message):
        Recipe.read(write(tmp_path, text + "\n"))
