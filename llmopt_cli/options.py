"""The options that several commands share, declared once with the words that users of vLLM know.

Options that a recipe holds too default to None, "not given": a flag wins over the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a hub id, or `demo`.")]
RecipeModelArg = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A local folder, a hub id, or `demo`. Default: the recipe's, else `demo`."),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no remarks.")]
SeedOpt = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOpt = Annotated[str | None, typer.Option("--device", help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
DtypeOpt = Annotated[
    str | None, typer.Option("--dtype", help="`auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.")
]
RecipeOpt = Annotated[
    Path | None, typer.Option("--recipe", help="A deployment in YAML; flags given beside it win over the file.")
]
TrustOpt = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that lies in the checkpoint.")]
MaxModelLenOpt = Annotated[int | None, typer.Option("--max-model-len", min=1, help="Context limit in tokens.")]
MaxNumSeqsOpt = Annotated[int | None, typer.Option("--max-num-seqs", min=1, help="Most requests in one batch.")]
MaxBatchedTokensOpt = Annotated[
    int | None, typer.Option("--max-num-batched-tokens", min=1, help="Token budget of one step.")
]
BlockSizeOpt = Annotated[int | None, typer.Option("--block-size", min=1, help="Tokens of one KV block.")]
KvMemoryOpt = Annotated[
    int | None, typer.Option("--kv-cache-memory-bytes", min=1, help="Bytes of KV cache; by default what is free.")
]
KvDtypeOpt = Annotated[
    str | None,
    typer.Option("--kv-cache-dtype", help="`auto` (the model's), `int8`, `fp8` or `fp8_e5m2`: halves the cache."),
]
PrefixCachingOpt = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Whether requests that begin alike share their KV blocks.",
    ),
]
BatchingOpt = Annotated[
    str | None,
    typer.Option("--batching", help="`continuous`, or a baseline: `static`, `none` (one request after the other)."),
]
PolicyOpt = Annotated[
    str | None, typer.Option("--scheduling-policy", help="`fcfs`, or `priority` (lower values are served first).")
]
LongPrefillOpt = Annotated[
    int | None,
    typer.Option("--long-prefill-token-threshold", min=0, help="Most tokens of a step for one prompt beside others."),
]
DeterministicOpt = Annotated[
    bool | None,
    typer.Option("--deterministic", help="The same logits bit for bit, whatever else is in the batch; slower."),
]
SpecMethodOpt = Annotated[
    str | None,
    typer.Option(
        "--spec-method", help="Draft tokens ahead with `draft_model`, `ngram`, `suffix`, `medusa` or `eagle`."
    ),
]
SpecModelOpt = Annotated[
    str | None, typer.Option("--spec-model", help="What drafts: a small model with the same tokens, or trained heads.")
]
SpecTokensOpt = Annotated[int | None, typer.Option("--spec-tokens", help="Most tokens of a draft. Default: 4.")]
SpecConfigOpt = Annotated[
    str | None, typer.Option("--speculative-config", metavar="JSON", help="All of that as vLLM takes it.")
]
KvPolicyOpt = Annotated[
    str | None,
    typer.Option(
        "--kv-policy",
        help="Keep a part of the KV: `streaming:sinks=4,window=1020`, `snapkv:budget=256,window=32`, `pyramidkv:...`.",
    ),
]
ScheduleLogOpt = Annotated[
    Path | None, typer.Option("--schedule-log", help="Log what the scheduler does, prompts included: `llmopt replay`.")
]

RECIPE_FLAGS = (  # the parameters of the options above that are fields of a recipe, its batching or its speculation
    "dtype",
    "device",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "batching_mode",
    "scheduling_policy",
    "long_prefill_token_threshold",
    "deterministic",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "speculative_config",
)


def recipe_flags(context: typer.Context) -> dict[str, Any]:
    """The values of RECIPE_FLAGS on a command that has all of them, for `Recipe.resolve`; None is "not given"."""
    return {name: context.params[name] for name in RECIPE_FLAGS}
