"""`llmopt bench`: drive a workload at an engine or a server, show and keep what came out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli.errors import ServerError, UnknownNameError, UsageError
from llmopt_cli.options import (
    RECIPE_FLAGS,
    BatchingOpt,
    BlockSizeOpt,
    DeterministicOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    KvDtypeOpt,
    KvMemoryOpt,
    LongPrefillOpt,
    MaxBatchedTokensOpt,
    MaxModelLenOpt,
    MaxNumSeqsOpt,
    PolicyOpt,
    PrefixCachingOpt,
    QuietOpt,
    RecipeModelArg,
    RecipeOpt,
    SpecConfigOpt,
    SpecMethodOpt,
    SpecModelOpt,
    SpecTokensOpt,
    TrustOpt,
    recipe_flags,
)
from llmopt_cli.output import Output

if TYPE_CHECKING:
    from llmopt_cli.bench.targets import Baseline, Target
    from llmopt_cli.spec.recipe import Recipe
    from llmopt_cli.spec.result import Environment, Result
    from llmopt_cli.spec.workload import Workload

WorkloadOpt = Annotated[str, typer.Option("--workload", "-w", help="A YAML file, or `chat`, `code`, `rag`, `decode`.")]
BaseUrlOpt = Annotated[
    str | None, typer.Option("--base-url", help="Measure the OpenAI-compatible server there, not an engine in here.")
]
ServedOpt = Annotated[
    str | None, typer.Option("--served-model-name", "--served-model", help="The model to ask the server for.")
]
KeyOpt = Annotated[str | None, typer.Option("--api-key", envvar="LLMOPT_API_KEY", help="The server's key.")]
ConcurrencyOpt = Annotated[
    str | None, typer.Option("--concurrency", "-c", help="Requests under way at once; several as `1,8,32`.")
]
RateOpt = Annotated[
    float | None,
    typer.Option("--rate", "--request-rate", help="Requests a second, sent whether answered or not."),
]
BurstinessOpt = Annotated[
    float | None,
    typer.Option("--burstiness", help="Coefficient of variation of the gaps under --rate: 0 even, 1 Poisson."),
]
NumRequestsOpt = Annotated[
    int | None,
    typer.Option(
        "--num-requests",
        "--num-prompts",
        min=1,
        help="How many to count. Default: the workload's, but at least 4 for each place of --concurrency.",
    ),
]
ResultsOpt = Annotated[Path, typer.Option("--results", help="Folder to which bench.jsonl the result is added.")]
AgainstOpt = Annotated[
    str | None,
    typer.Option(
        "--against", help="Also run transformers' `generate` or `generate_batch` on the same requests, in turns."
    ),
]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="Seed of lengths, texts and times, for the workload's.")]

AGAINST = ("transformers", "generate_batch")
FAILURES_ALLOWED = 0.01
ENGINE_ONLY = {*RECIPE_FLAGS, "recipe", "against"}
SERVER_ONLY = {"served_model_name", "api_key"}


def bench(
    context: typer.Context,
    model: RecipeModelArg = None,
    workload: WorkloadOpt = "chat",
    concurrency: ConcurrencyOpt = None,
    rate: RateOpt = None,
    burstiness: BurstinessOpt = None,
    num_requests: NumRequestsOpt = None,
    against: AgainstOpt = None,
    base_url: BaseUrlOpt = None,
    served_model_name: ServedOpt = None,
    api_key: KeyOpt = None,
    results: ResultsOpt = Path("results"),
    recipe: RecipeOpt = None,
    seed: SeedOpt = None,
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
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Measure TTFT, TPOT, throughput and goodput of an engine or a server under a workload.

    TTFT: from sending to the first token. TPOT: (last token - first token) / (tokens - 1). ITL: the gaps between
    tokens, pooled. Goodput: requests per second that keep the workload's limits. The result is added to
    RESULTS/bench.jsonl.
    """
    from llmopt_cli.spec.recipe import Recipe
    from llmopt_cli.spec.result import check_writable

    out = Output(as_json=as_json, quiet=quiet)
    loads = _loads(workload, concurrency, rate, burstiness, num_requests, seed)
    _check(_typed(context), loads, against, base_url, model)
    deployment = Recipe.resolve(recipe, model=model, **recipe_flags(context))
    check_writable(results, "bench")
    from llmopt_cli.bench.run import Session  # torch comes in here, once all is found right

    environment, command = _look_around(loads, out), _command_line(api_key)
    if base_url is None:
        target, baseline = _open_engine(deployment, trust_remote_code, against=against, out=out)
        session = Session(target, loads, deployment, environment, command, results, baseline)
    else:
        target = _open_server(base_url, served_model_name, api_key, model, trust_remote_code)
        session = Session(target, loads, None, environment, command, results)
    _tell(out, session.run(out.progress), results)


def _loads(
    name: str,
    concurrency: str | None,
    rate: float | None,
    burstiness: float | None,
    num_requests: int | None,
    seed: int | None,
) -> list[Workload]:
    """The workload as the flags change it, once for every concurrency."""
    from llmopt_cli.spec.workload import Workload

    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency and --rate are two kinds of load", "give one of them")
    base = Workload.read(name)
    try:
        arrivals = base.arrivals if burstiness is None else replace(base.arrivals, burstiness=burstiness)
        base = replace(
            base,
            arrivals=arrivals,
            num_requests=num_requests or base.num_requests,
            seed=base.seed if seed is None else seed,
        )
        if rate is not None:
            return [base.with_load(rate=rate)]
        loads = [base.with_load(concurrency=count) for count in _numbers(concurrency)]
        return (loads if num_requests else [load.steady() for load in loads]) or [base]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--concurrency takes numbers, not `{text}`", "for example `--concurrency 1,8,32`") from None


def _typed(context: typer.Context) -> list[str]:
    """The parameters that stand on the command line: a key that only lies in the environment is none of them."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _check(
    typed: Sequence[str], loads: Sequence[Workload], against: str | None, base_url: str | None, model: str | None
) -> None:
    """Refuse flags that would have no effect, before anything is loaded."""
    if against not in (None, *AGAINST):
        raise UnknownNameError("baseline", against, AGAINST)
    if against and loads[0].arrivals.rate:
        raise UsageError("--against compares engines under full load", "leave --rate out")
    if "burstiness" in typed and loads[0].arrivals.rate is None:
        raise UsageError("--burstiness is about the gaps of an open loop", "give a --rate")
    if "trust_remote_code" in typed and base_url is not None and model is None:
        raise UsageError("--trust-remote-code is about the code of a MODEL", "name the MODEL the server runs")
    for name in typed:
        flag = f"--{name.replace('_', '-')}"
        if name in SERVER_ONLY and base_url is None:
            raise UsageError(f"{flag} is for a server", "give the server's --base-url")
        if name in ENGINE_ONLY and base_url is not None:
            raise UsageError(f"{flag} is for an engine in this process", "leave --base-url out")


def _look_around(loads: Sequence[Workload], out: Output) -> Environment:
    """The machine as it is before we load it; warns if others do, or if a load is too short to tell much."""
    from llmopt_cli.bench.environment import fingerprint, spinning
    from llmopt_cli.spec.workload import FEWEST_ROUNDS

    for load in loads:
        if load.rounds < FEWEST_ROUNDS:
            out.warn(
                f"{load.num_requests} requests at {load.arrivals.label} are never that many at once but at the start: "
                f"give --num-requests {FEWEST_ROUNDS * (load.arrivals.concurrency or 0)} or more"
            )
    environment = fingerprint()
    if warning := spinning(environment):
        out.warn(warning)
    return environment


def _open_engine(
    deployment: Recipe, trust: bool, *, against: str | None, out: Output
) -> tuple[Target, Baseline | None]:
    from llmopt_cli.bench.targets import EngineTarget
    from llmopt_cli.runtime import Engine

    with out.progress(f"loading {deployment.model}") as report:
        engine = Engine.from_recipe(deployment, trust, report)
    if against is None:
        return EngineTarget(engine), None
    from llmopt_cli.bench.baseline import TransformersTarget
    from llmopt_cli.bench.batch_baseline import GenerateBatchTarget

    return EngineTarget(engine), (TransformersTarget if against == "transformers" else GenerateBatchTarget)(engine)


def _open_server(url: str, served_model: str | None, api_key: str | None, model: str | None, trust: bool) -> Target:
    from llmopt_cli.bench.http_target import HttpTarget

    if model is None:
        return HttpTarget(url, served_model, api_key)
    from llmopt_cli.runtime.tokenizer import Tokenizer
    from llmopt_cli.spec.checkpoint import Checkpoint

    return HttpTarget(url, served_model, api_key, Tokenizer(Checkpoint.open(model), trust).encode)


def _command_line(secret: str | None) -> str:
    """What was typed, without the key."""
    typed = ["llmopt", *sys.argv[1:]]
    return shlex.join(part.replace(secret, "***") for part in typed) if secret else shlex.join(typed)


def _tell(out: Output, results: Sequence[Result], folder: Path) -> None:
    """Show the results, then exit 130 after Ctrl-C, or 1 if more than one request in a hundred failed."""
    from llmopt_cli.bench.tables import show

    out.result([asdict(result) for result in results], lambda: show(results))
    if results:
        out.note(f"added to {folder / 'bench.jsonl'}")
        if unknown := results[-1].predicted.get("unknown"):
            out.note(f"nothing was predicted: {unknown}")
    if not results or results[-1].partial:
        raise typer.Exit(130)
    for result in results:
        failed, sent = result.metrics["failed"], result.metrics["failed"] + result.metrics["completed"]
        if failed > FAILURES_ALLOWED * sent:
            raise ServerError(f"{failed} of {sent} requests failed; the first: {result.metrics['first_error']}")
