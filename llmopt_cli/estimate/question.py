"""`Question`: what is asked of the estimator, every name resolved and every contradiction refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.constants import find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import resolve_draft
from llmopt_cli.estimate.host import find_accelerator, tuned
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.splits import GPU_COUNTS, Split, shares, split_over
from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.scheme import cache_of, find_scheme


@dataclass(frozen=True, slots=True)
class Price:
    """USD an hour for one GPU, and who says so."""

    usd_per_hour: float
    source: str


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, names resolved: a deployment under a load, to be weighed on several numbers of GPUs."""

    base: Deployment
    load: Load
    splits: tuple[Split, ...]
    price: Price | None

    @property
    def needed(self) -> int:
        """Requests that must be in memory at once."""
        return min(self.load.concurrency, self.base.batching.max_num_seqs)

    @property
    def batch(self) -> Load:
        """The load as far as it is in memory at once; the rest of it waits."""
        return self.load.at(self.needed)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request that the engine is to accept."""
        return self.base.batching.max_model_len or self.base.spec.max_context


def ask(recipe: Recipe, load: Load, gpu_price: float | None = None) -> Question:
    """Resolve the names of a deployment; raises UsageError where it contradicts itself."""
    if recipe.gpu is None:
        raise UsageError("no accelerator given", "add `--gpu a100` or `--gpu h100x4`; all of them: `llmopt gpus`")
    scheme = find_scheme(recipe.scheme or recipe.dtype)
    hardware, count = find_accelerator(recipe.gpu, scheme)
    spec = find_model(recipe.model)
    base = Deployment(
        spec=spec,
        hardware=hardware,
        scheme=scheme,
        engine=find_engine(recipe.engine),
        kv=cache_of(recipe.kv_cache_dtype, scheme),
        batching=recipe.batching,
        draft=resolve_draft(recipe.speculation, spec) if recipe.speculation else None,
    )
    cuts = _cuts(base, count, recipe.tensor_parallel_size, recipe.pipeline_parallel_size)
    question = Question(tuned(base), load, cuts, price_of(hardware, gpu_price))
    _check_lengths(question)
    return question


def _check_lengths(question: Question) -> None:
    spec, limit, load = question.base.spec, question.max_model_len, question.load
    if limit > spec.max_context:
        raise UsageError(f"--max-model-len {limit:,} is beyond the {spec.max_context:,} tokens of {spec.name}")
    if limit < 2:
        raise UsageError(f"--max-model-len {limit} has no room for a prompt and an answer", "give it 2 or more")
    if load.longest > limit:
        longest = max(load.sizes, key=sum)
        raise UsageError(
            f"input {longest.input_len:,} + output {longest.output_len:,} tokens exceed the context of {limit:,}",
            f"for example `--input-len {limit * 3 // 4} --output-len {limit // 4}`",
        )


def _cuts(base: Deployment, count: int | None, tp: int | None, pp: int) -> tuple[Split, ...]:
    """The cuts to weigh: the one that is named, or those over up to `count` GPUs that the heads allow."""
    spec = base.spec
    if count and (tp or 1) * pp > count:
        named = f"--tp {tp}" if pp == 1 else f"--tp {tp or 1} x --pp {pp}"
        raise UsageError(f"{named} needs more than the {count} GPUs given")
    if pp > spec.num_layers:
        raise UsageError(f"{spec.name} has {spec.num_layers} layers, which is not {pp} stages")
    most = count or GPU_COUNTS[-1] * pp
    counts = sorted({gpus * pp for gpus in GPU_COUNTS if gpus * pp < most} | {most})
    if tp or pp > 1:
        found = [(tp, pp)] if tp else [(gpus // pp, pp) for gpus in counts if gpus % pp == 0]
        possible = tuple(split for split in found if shares(spec, split[0]))
    else:
        possible = tuple(split for gpus in counts if (split := split_over(spec, base.hardware, gpus)))
    if not possible:
        heads = f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads"
        raise UsageError(
            f"{heads} of {spec.name} cannot be shared out among {tp} GPUs", "leave --tp out to see which can"
        )
    return possible


def price_of(hardware: Hardware, given: float | None) -> Price | None:
    """What one costs an hour: as given, else as the catalogue lists it, else unknown."""
    if given is not None:
        if not math.isfinite(given):
            raise UsageError(f"--gpu-price {given} is no price", "give USD an hour for one GPU, such as 2.5")
        return Price(given, "--gpu-price")
    if hardware.price_usd_hour is None:
        return None
    spread = f", range {hardware.price_range}" if hardware.price_range else ""
    return Price(hardware.price_usd_hour, f"{hardware.price_source}{spread}")
