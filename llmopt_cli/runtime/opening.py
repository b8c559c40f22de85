"""What is asked of an engine beside its model, checked before anything is read that takes long.

Knows recipes and limits; neither weights nor caches.
"""

from __future__ import annotations

from dataclasses import replace

from llmopt_cli.errors import UsageError
from llmopt_cli.spec.recipe import Batching, Recipe


def with_length(batching: Batching, limit: int) -> Batching:
    """`batching` with the longest request it means; UsageError if the model can't do it."""
    length = batching.max_model_len or limit
    if length > limit:
        raise UsageError(
            f"--max-model-len {length} is above the model's own limit of {limit:,} tokens",
            "give at most that, or leave the flag out",
        )
    return replace(batching, max_model_len=length)


def refuse_foreign(recipe: Recipe) -> None:
    """What a recipe may ask of other engines, and this one would have to ignore."""
    asked = {
        f"the engine {recipe.engine}": recipe.engine != "llmopt",
        f"tensor_parallel_size {recipe.tensor_parallel_size}": (recipe.tensor_parallel_size or 1) > 1,
        f"pipeline_parallel_size {recipe.pipeline_parallel_size}": recipe.pipeline_parallel_size > 1,
    }
    if foreign := [name for name, applies in asked.items() if applies]:
        raise UsageError(f"the recipe asks for {foreign[0]}, which llmopt's engine does not have", "take it out")
