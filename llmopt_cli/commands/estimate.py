"""`llmopt estimate`: does a model fit, how fast, for how much, what would help. Parses and renders; the core plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmopt_cli.errors import UsageError
from llmopt_cli.options import JsonOpt, MaxBatchedTokensOpt, MaxModelLenOpt, RecipeOpt
from llmopt_cli.output import Output

if TYPE_CHECKING:
    from llmopt_cli.estimate.load import Load
    from llmopt_cli.estimate.question import Question
    from llmopt_cli.spec.recipe import Recipe
    from llmopt_cli.spec.workload import Slo, Workload

Given = dict[str, Any]  # the command's parameters by name

USD, A_DAY = {"min": 0, "max": 1e6}, {"min": 1, "max": 1e12}  # beyond them lie slips and infinity
QUESTION, TIME, MONEY, VIEWS, PROOF = "What is asked", "The load", "Money", "Other answers", "How good it is"


def _option(panel: str, *names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


ModelOpt = Annotated[
    str | None,
    _option(QUESTION, "--model", text="`70b`, `qwen3-32b` (see `llmopt models`), a folder, a config.json or `demo`."),
]
GpuOpt = Annotated[
    str | None,
    _option(QUESTION, "--gpu", text="NAME or NAMExN: `a100`, `h100x4` (see `llmopt gpus`), a YAML file, or `host`."),
]
SchemeOpt = Annotated[
    str | None, _option(QUESTION, "--scheme", text="Precision of the weights: bf16 (default), fp8, int8, awq, ...")
]
KvDtypeOpt = Annotated[str | None, _option(QUESTION, "--kv-cache-dtype", text="`auto`, `fp8`, `int8` or `int4`.")]
EngineOpt = Annotated[
    str | None, _option(QUESTION, "--engine", text="vllm (default), sglang, trtllm, llamacpp or llmopt.")
]
TpOpt = Annotated[
    int | None,
    _option(
        QUESTION, "--tp", "--tensor-parallel-size", min=1, text="GPUs to share every layer; by default all are weighed."
    ),
]
PpOpt = Annotated[
    int | None, _option(QUESTION, "--pp", "--pipeline-parallel-size", min=1, text="Stages to cut the layers into.")
]
SeqsOpt = Annotated[int | None, _option(QUESTION, "--max-num-seqs", min=1, text="Most requests in one batch.")]
DraftOpt = Annotated[str | None, _option(QUESTION, "--draft-model", text="Speculate with this model as the draft.")]
DraftTokensOpt = Annotated[
    int | None, _option(QUESTION, "--num-speculative-tokens", min=1, text="Tokens to draft at a time; 4.")
]
AcceptanceOpt = Annotated[
    float | None, _option(QUESTION, "--acceptance", min=0, max=1, text="Chance that a drafted token is accepted; 0.7.")
]
ConcurrencyOpt = Annotated[int | None, _option(TIME, "--concurrency", min=1, text="Requests at the same time; 32.")]
InputLenOpt = Annotated[int | None, _option(TIME, "--input-len", min=1, text="Prompt tokens of a request; 1024.")]
OutputLenOpt = Annotated[int | None, _option(TIME, "--output-len", min=1, text="Generated tokens of a request; 256.")]
WorkloadOpt = Annotated[
    Path | None, _option(TIME, "--workload", text="Lengths and arrivals: a name (`chat`), a YAML file or a trace.")
]
PrefixOpt = Annotated[
    float | None, _option(TIME, "--prefix-hit", min=0, max=1, text="Part of every prompt found in the prefix cache.")
]
SloOpt = Annotated[
    str | None, _option(TIME, "--slo", text="What a good request may take: `ttft=500ms,tpot=50ms`, or a name: `chat`.")
]
PriceOpt = Annotated[
    float | None, _option(MONEY, "--gpu-price", **USD, text="USD an hour for one GPU, instead of the catalogue's.")
]
SpotOpt = Annotated[float | None, _option(MONEY, "--spot-price", **USD, text="USD an hour for one spot GPU.")]
ApiOpt = Annotated[
    str | None, _option(MONEY, "--api-price", text="IN,OUT: what an API takes for 1M tokens; shows the break-even.")
]
DayOpt = Annotated[float | None, _option(MONEY, "--requests-per-day", **A_DAY, text="Shows a day's cost, idle share.")]
CompareOpt = Annotated[
    bool, _option(VIEWS, "--compare", text="Rank GPUs x precisions x splits; without --gpu, all of the catalogue.")
]
TopOpt = Annotated[int, _option(VIEWS, "--top", min=1, text="Rows of --compare.")]
PlotOpt = Annotated[
    Path | None, _option(VIEWS, "--plot", text="Draw the frontier of --compare into a .png or .html file.")
]
ParetoOpt = Annotated[
    str, _option(VIEWS, "--pareto", text="What --compare trades speed for: `throughput` of a GPU, or `cost`.")
]
LadderOpt = Annotated[
    bool, _option(VIEWS, "--ladder", text="What batching, precision, speculation and prefixes add up to.")
]
SimulateOpt = Annotated[
    bool, _option(VIEWS, "--simulate", text="Play the workload request by request: percentiles and goodput.")
]
ReplicasOpt = Annotated[int, _option(VIEWS, "--replicas", min=1, text="Engines that share the load of --simulate.")]
ValidateOpt = Annotated[
    Path | None, _option(PROOF, "--validate", text="Replay published measurements (CSV) and print the errors.")
]
CalibrateOpt = Annotated[
    Path | None, _option(PROOF, "--calibrate", text="Learn this machine's constants from a results folder.")
]
RecipeOutOpt = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the recommended deployment as a recipe in YAML.")
]


def estimate(
    context: typer.Context,
    model: ModelOpt = None,
    gpu: GpuOpt = None,
    scheme: SchemeOpt = None,
    kv_cache_dtype: KvDtypeOpt = None,
    engine: EngineOpt = None,
    tp: TpOpt = None,
    pp: PpOpt = None,
    max_model_len: MaxModelLenOpt = None,
    max_num_seqs: SeqsOpt = None,
    max_num_batched_tokens: MaxBatchedTokensOpt = None,
    draft_model: DraftOpt = None,
    num_speculative_tokens: DraftTokensOpt = None,
    acceptance: AcceptanceOpt = None,
    concurrency: ConcurrencyOpt = None,
    input_len: InputLenOpt = None,
    output_len: OutputLenOpt = None,
    workload: WorkloadOpt = None,
    prefix_hit: PrefixOpt = None,
    slo: SloOpt = None,
    gpu_price: PriceOpt = None,
    spot_price: SpotOpt = None,
    api_price: ApiOpt = None,
    requests_per_day: DayOpt = None,
    compare: CompareOpt = False,
    top: TopOpt = 20,
    plot: PlotOpt = None,
    pareto: ParetoOpt = "throughput",
    ladder: LadderOpt = False,
    simulate: SimulateOpt = False,
    replicas: ReplicasOpt = 1,
    validate: ValidateOpt = None,
    calibrate: CalibrateOpt = None,
    output: RecipeOutOpt = None,
    recipe: RecipeOpt = None,
    json: JsonOpt = False,
) -> None:
    """Does a model fit on a GPU, how fast is it there, and what does a token cost? Nothing is downloaded or run."""
    given = context.params
    asked = [name for name in ANSWERS if given.get(name)]
    if len(asked) > 1:
        raise UsageError(f"--{asked[0]} and --{asked[1]} are two questions", "ask one at a time")
    answer = asked[0] if asked else "plan"
    _check_read(context, answer)
    ANSWERS[answer](Output(as_json=json), given)


def _check_read(context: typer.Context, answer: str) -> None:
    """Refuse a flag that the answer does not read: silence would pass for an answer to it."""
    everything = tuple(name for name in context.params if name not in (answer, "json"))
    for name in UNREAD.get(answer, everything):
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            asked = "a plain estimate" if answer == "plan" else f"--{answer}"
            raise UsageError(f"--{name.replace('_', '-')} has no effect on {asked}", WITH.get(name, "leave it out"))


def _plan(out: Output, given: Given) -> None:
    from llmopt_cli.estimate import advice, bill, limits, plan, precision
    from llmopt_cli.estimate.cost import ApiPrice
    from llmopt_cli.views import plan as view

    wanted, slo = _recipe(given), _slo(given)
    found = plan.answer(_question(given, wanted))
    fit = found.recommended or found.fits[-1]
    money = bill.bill(
        found,
        slo,
        requests_per_day=given["requests_per_day"],
        spot_price=given["spot_price"],
        api=ApiPrice.parse(given["api_price"]) if given["api_price"] is not None else None,
    )
    whole = view.Whole(
        plan=found,
        wanted=wanted,
        limits=limits.find_limits(fit.on, found.question.batch),
        advice=advice.advise(found, slo),
        speedups=precision.speedups(fit.on, found.question.load),
        bill=money,
        detailed=any(given[name] is not None for name in ("slo", "spot_price", "api_price", "requests_per_day")),
    )
    out.result(view.data(whole), lambda: view.render(whole))
    if given["output"]:
        plan.chosen(found, wanted).write(given["output"], plan.title(found))
        out.note(f"written: {given['output']}")


def _compare(out: Output, given: Given) -> None:
    from llmopt_cli.estimate import compare, pareto
    from llmopt_cli.estimate.slo import offered_rate
    from llmopt_cli.views import compare as view
    from llmopt_cli.views import pareto as picture_view
    from llmopt_cli.views import plot

    wanted = _recipe(given)
    if given["pareto"] not in ("throughput", "cost"):
        raise UsageError(f"--pareto `{given['pareto']}` is neither `throughput` nor `cost`")
    rate = offered_rate(_workload(given))
    found = compare.compare(wanted, _load(given, wanted), _slo(given), given["gpu_price"], rate)
    picture = pareto.picture(found, given["pareto"]) if found.offers else None
    if given["plot"] and picture:
        plot.save(picture, given["plot"], f"{wanted.model}, {given['pareto']}")
        out.note(f"drawn: {given['plot']}")
    data = view.data(found, given["top"]) | {"pareto": picture_view.data(picture) if picture else None}
    drawn = picture_view.render(picture) if picture else []
    out.result(data, lambda: [*view.render(found, given["top"]), *drawn])


def _ladder(out: Output, given: Given) -> None:
    from llmopt_cli.estimate import ladder
    from llmopt_cli.views import ladder as view

    found = ladder.ladder(_question(given, _recipe(given)))
    out.result(view.data(found), lambda: view.render(found))


def _simulate(out: Output, given: Given) -> None:
    from llmopt_cli.estimate import plan, simulate
    from llmopt_cli.views import simulation as view

    wanted = _recipe(given)
    question = _question(given, wanted)
    fit = plan.recommend(question)
    if fit is None:
        raise UsageError("nothing fits, so there is nothing to simulate", "ask without --simulate for what would help")
    traffic = simulate.enough(replace(_workload(given), slo=_slo(given)))
    hourly = question.price.usd_per_hour * fit.gpus if question.price else None
    found = simulate.simulate(fit.on, traffic, given["replicas"], hourly)
    out.result(view.data(found), lambda: view.render(found))


def _validate(out: Output, given: Given) -> None:
    from llmopt_cli.estimate.validate import validate
    from llmopt_cli.views import validation as view

    found = validate(given["validate"])
    out.result(view.data(found), lambda: view.render(found))


def _calibrate(out: Output, given: Given) -> None:
    from llmopt_cli.estimate.calibrate import calibrate
    from llmopt_cli.views import calibration as view

    with out.progress("fitting"):
        found = calibrate(given["calibrate"])
    if found.file:
        out.note(f"kept in {found.file}")
    out.result(view.data(found), lambda: view.render(found))


ANSWERS: dict[str, Callable[[Output, Given], None]] = {
    "plan": _plan,
    "validate": _validate,
    "calibrate": _calibrate,
    "simulate": _simulate,
    "compare": _compare,
    "ladder": _ladder,
}
PLANS_OWN = ("output", "spot_price", "api_price", "requests_per_day")
COMPARES_OWN = ("top", "plot", "pareto")
WITH = {**dict.fromkeys(COMPARES_OWN, "it goes with --compare"), "replicas": "it goes with --simulate"}
UNREAD: dict[str, tuple[str, ...]] = {  # answer -> flags that have no effect on it; not here: all of them
    "plan": (*COMPARES_OWN, "replicas"),
    "simulate": (*PLANS_OWN, *COMPARES_OWN, "prefix_hit"),  # a simulation meets the prefixes themselves
    "compare": (*PLANS_OWN, "replicas"),
    "ladder": (*PLANS_OWN, *COMPARES_OWN, "replicas", "scheme", "slo", "gpu_price"),
}


def _recipe(given: Given) -> Recipe:
    """The deployment that flags and recipe ask for."""
    from llmopt_cli.estimate import deployment

    flags = ("model", "gpu", "scheme", "kv_cache_dtype", "engine", "max_model_len")
    return deployment.wanted(
        given["recipe"],
        **{name: given[name] for name in (*flags, "max_num_seqs", "max_num_batched_tokens")},
        tensor_parallel_size=given["tp"],
        pipeline_parallel_size=given["pp"],
        speculation=_speculation(given),
    )


def _speculation(given: Given) -> Any:
    from llmopt_cli.spec.recipe import Recipe, Speculation

    names = ("num_speculative_tokens", "acceptance")
    settings = {name: given[name] for name in names if given[name] is not None}
    known = Recipe.read(given["recipe"]).speculation if given["recipe"] else None
    if given["draft_model"]:
        return Speculation(given["draft_model"], **settings)
    if settings and known is None:
        raise UsageError("there is nothing to speculate with", "add `--draft-model 1b`")
    return dataclasses.replace(known, **settings) if settings and known else None


def _question(given: Given, wanted: Recipe) -> Question:
    """The deployment under its load, names resolved."""
    from llmopt_cli.estimate import plan
    from llmopt_cli.estimate.question import ask
    from llmopt_cli.estimate.slo import offered_rate

    question, rate = ask(wanted, _load(given, wanted), given["gpu_price"]), offered_rate(_workload(given))
    return question if rate is None else plan.at_rate(question, rate)


def _load(given: Given, wanted: Recipe) -> Load:
    from llmopt_cli.estimate.load import Load

    # Long requests of a workload are clipped as an engine clips them; lengths that flags name are taken at their word.
    load = Load.of(_workload(given), wanted.batching.max_model_len if given["workload"] else None)
    return load if given["prefix_hit"] is None else replace(load, cached_share=given["prefix_hit"])


def _workload(given: Given) -> Workload:
    """The traffic that is named, or requests that are all alike."""
    from llmopt_cli.spec.workload import Arrivals, Lengths, Workload

    lengths = [name for name in ("input_len", "output_len") if given[name] is not None]
    if given["workload"] is None:
        return Workload(
            name="alike",
            input_len=Lengths(mean=given["input_len"] or 1024),
            output_len=Lengths(mean=given["output_len"] or 256),
            arrivals=Arrivals(concurrency=given["concurrency"] or 32),
            num_requests=1,
        )
    if lengths:
        raise UsageError(f"--workload says the lengths already, so leave --{lengths[0].replace('_', '-')} out")
    workload = Workload.read(given["workload"])
    return workload.with_load(concurrency=given["concurrency"]) if given["concurrency"] else workload


def _slo(given: Given) -> Slo:
    from llmopt_cli.spec.workload import Slo

    return Slo.parse(given["slo"]) if given["slo"] is not None else _workload(given).slo
