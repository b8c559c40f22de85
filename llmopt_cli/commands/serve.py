"""`llmopt serve`: a model behind OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmopt_cli.errors import UsageError
from llmopt_cli.options import (
    BatchingOpt,
    BlockSizeOpt,
    DeterministicOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    KvDtypeOpt,
    KvMemoryOpt,
    KvPolicyOpt,
    LongPrefillOpt,
    MaxBatchedTokensOpt,
    MaxModelLenOpt,
    MaxNumSeqsOpt,
    PolicyOpt,
    PrefixCachingOpt,
    QuietOpt,
    RecipeModelArg,
    RecipeOpt,
    ScheduleLogOpt,
    SpecConfigOpt,
    SpecMethodOpt,
    SpecModelOpt,
    SpecTokensOpt,
    TrustOpt,
    recipe_flags,
)
from llmopt_cli.output import Output, lines

NameOpt = Annotated[
    str | None,
    typer.Option("--served-model-name", help="The name clients ask for. Default: the folder's name or the hub id."),
]
KeyOpt = Annotated[
    str | None, typer.Option("--api-key", envvar="LLMOPT_API_KEY", help="Let in only requests that carry this key.")
]
HostOpt = Annotated[str, typer.Option("--host", help="The address to listen on.")]
PortOpt = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port to listen on, 0 for any free one.")]
QueueOpt = Annotated[
    int, typer.Option("--max-num-queued-reqs", min=0, help="Requests that may wait; more are answered 429.")
]
LoraOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-modules",
        metavar="NAME=FOLDER",
        help="A LoRA adapter in peft's format, served as the model NAME. More of them may follow, or give it again.",
    ),
]
MoreLorasArg = Annotated[list[str] | None, typer.Argument(hidden=True)]  # as vLLM reads them: all in one go
DrainOpt = Annotated[
    float, typer.Option("--shutdown-timeout", min=0, help="Seconds that running requests get to finish at a signal.")
]


def serve(
    context: typer.Context,
    model: RecipeModelArg = None,
    more_loras: MoreLorasArg = None,
    host: HostOpt = "127.0.0.1",
    port: PortOpt = 8000,
    served_model_name: NameOpt = None,
    api_key: KeyOpt = None,
    recipe: RecipeOpt = None,
    dtype: DtypeOpt = None,
    device: DeviceOpt = None,
    max_model_len: MaxModelLenOpt = None,
    max_num_seqs: MaxNumSeqsOpt = None,
    max_num_batched_tokens: MaxBatchedTokensOpt = None,
    block_size: BlockSizeOpt = None,
    kv_cache_memory_bytes: KvMemoryOpt = None,
    enable_prefix_caching: PrefixCachingOpt = None,
    kv_cache_dtype: KvDtypeOpt = None,
    batching_mode: BatchingOpt = None,
    scheduling_policy: PolicyOpt = None,
    long_prefill_token_threshold: LongPrefillOpt = None,
    deterministic: DeterministicOpt = None,
    spec_method: SpecMethodOpt = None,
    spec_model: SpecModelOpt = None,
    spec_tokens: SpecTokensOpt = None,
    speculative_config: SpecConfigOpt = None,
    kv_policy: KvPolicyOpt = None,
    schedule_log: ScheduleLogOpt = None,
    lora_modules: LoraOpt = None,
    max_num_queued_reqs: QueueOpt = 512,
    shutdown_timeout: DrainOpt = 30.0,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Serve a model over OpenAI's API, with continuous batching and a paged KV cache."""
    from llmopt_cli.server.app import run
    from llmopt_cli.server.service import Settings
    from llmopt_cli.spec.adapter import named_folders
    from llmopt_cli.spec.kv_policy import parse_policy
    from llmopt_cli.spec.recipe import Recipe

    deployment = Recipe.resolve(recipe, model=model, **recipe_flags(context))
    settings = Settings(
        served_model_name=served_model_name,
        host=host,
        port=port,
        api_key=api_key,
        max_num_queued_reqs=max_num_queued_reqs,
        shutdown_timeout=shutdown_timeout,
        schedule_log=schedule_log,
        kv_policy=None if kv_policy is None else parse_policy(kv_policy),
    )
    out = Output(as_json=as_json, quiet=quiet)
    if more_loras and not lora_modules:
        raise UsageError(f"there is no place for `{more_loras[0]}`", "give one model")
    adapters = named_folders([*(lora_modules or ()), *(more_loras or ())])
    run(deployment, settings, trust_remote_code, lambda report: _announce(out, report), adapters)


def _announce(out: Output, report: dict[str, Any]) -> None:
    """The memory budget and the URL: on stderr for people, on stdout with `--json`."""
    if out.as_json:
        out.result(report, lambda: "")
        return
    rows = [
        ("model", f"{report['model']} ({report['dtype']} on {report['device']})"),
        ("memory", f"{_mib(report, 'memory')}, {_mib(report, 'free')} of it free beside the weights"),
        ("weights", _mib(report, "weights")),
        *([("adapters", ", ".join(report["adapters"]))] if report["adapters"] else []),
        ("a step", f"{_mib(report, 'activations')} at its peak"),
        ("KV cache", f"{_mib(report, 'kv_cache')}: {report['kv_cache_tokens']:,} tokens in {report['kv_cache_dtype']}"),
        ("blocks", f"{report['num_blocks']:,} of {report['block_size']} tokens"),
        ("reserve", _mib(report, "reserve")),
        ("context", f"{report['max_model_len']:,} tokens"),
        ("batch", f"{report['max_num_seqs']:,} requests, {report['max_num_batched_tokens']:,} tokens a step"),
        *([("drafts", _drafts(report["speculation"]))] if report["speculation"] else []),
        *([("KV policy", f"{report['kv_policy']} for requests that name none")] if report["kv_policy"] else []),
    ]
    out.note(lines(rows))
    out.note(f"\nserving on {report['url']} (Ctrl-C to stop)")


def _drafts(report: dict[str, Any]) -> str:
    """Who drafts, and how far."""
    source = f"{report['method']} `{report['model']}`" if report["model"] else report["method"]
    often = ", fewer or none where that is faster" if report["adaptive"] else " in every step"
    return f"up to {report['num_speculative_tokens']} tokens by {source}{often}"


def _mib(report: dict[str, Any], part: str) -> str:
    return f"{report[f'{part}_bytes'] / 2**20:,.1f} MiB"
