"""How a plan looks: as JSON and as the tables of `llmopt estimate`. Computes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.output import lines, table
from llmopt_cli.spec.hardware import GB, GIB
from llmopt_cli.views import advice, cost, limits

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.advice import Advice
    from llmopt_cli.estimate.bands import Band
    from llmopt_cli.estimate.bill import Bill
    from llmopt_cli.estimate.limits import Limits
    from llmopt_cli.estimate.load import Load
    from llmopt_cli.estimate.plan import Fit, Plan, Speed
    from llmopt_cli.estimate.precision import Speedup
    from llmopt_cli.estimate.question import Question
    from llmopt_cli.estimate.rules import Comparison
    from llmopt_cli.spec.recipe import Recipe


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """All that a plain estimate says; `detailed` where the bill is wanted line by line."""

    plan: Plan
    wanted: Recipe
    limits: Limits
    advice: Advice
    speedups: tuple[Speedup, ...]
    bill: Bill | None
    detailed: bool


def data(whole: Whole) -> dict[str, Any]:
    """All of it as JSON: bytes, seconds, USD; every key names its unit."""
    plan, wanted = whole.plan, whole.wanted
    question, base = plan.question, plan.question.base
    spec, gpu = base.spec, base.hardware
    return {
        "model": {
            "asked": wanted.model,
            "parameters": spec.num_params,
            "active_parameters": spec.num_active_params,
            **dataclasses.asdict(spec),
        },
        "gpu": {"asked": wanted.gpu, **dataclasses.asdict(gpu)},
        "engine": base.engine.name,
        "kv_cache_dtype": base.kv.name,
        "scheme": {"bits_per_weight": base.scheme.bits_per_weight, **dataclasses.asdict(base.scheme)},
        "load": _load_data(question.load),
        "batching": dataclasses.asdict(base.batching),
        "formulas": [dataclasses.asdict(comparison) for comparison in plan.comparisons],
        "memory": [_fit_data(fit) for fit in plan.fits],
        "recommended_gpus": plan.recommended.gpus if plan.recommended else None,
        "smaller": [{"scheme": scheme.name, **_fit_data(fit)} for scheme, fit in plan.smaller],
        "speed": _speed_data(plan),
        "price": dataclasses.asdict(question.price) if question.price else None,
        "usd_per_1k_output_tokens": plan.usd_per_1k,
        "limits": limits.data(whole.limits),
        "advice": advice.data(whole.advice, whole.speedups),
        "cost": cost.data(whole.bill) if whole.bill else None,
        "constants": {
            name: {"value": value, "source": source}
            for name, (value, source) in base.engine.sourced(base.hardware).items()
        },
        "caveats": plan.caveats,
    }


def _load_data(load: Load) -> dict[str, Any]:
    return {
        "concurrency": load.concurrency,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "cached_share": load.cached_share,
    }


def _fit_data(fit: Fit) -> dict[str, Any]:
    weights, activations, non_torch, kv_cache = _parts(fit)
    return {
        "gpus": fit.gpus,
        "tp": fit.on.tp,
        "pp": fit.on.pp,
        "verdict": fit.verdict,
        "reason": fit.reason,
        "usable_bytes_per_gpu": fit.budget.usable,
        "weights_bytes_per_gpu": weights,
        "activations_bytes_per_gpu": activations,
        "non_torch_bytes_per_gpu": non_torch,
        "kv_cache_bytes_per_gpu": kv_cache,
        "kv_tokens": fit.kv_tokens,
        "max_requests": fit.max_requests,
    }


def _speed_data(plan: Plan) -> dict[str, Any] | None:
    if plan.speed is None:
        return None
    speed = dataclasses.asdict(plan.speed)
    renamed = {f"{name}_s": speed.pop(name) for name in ("prefill", "ttft", "tpot")}
    return {**speed, **renamed, "output_tokens_per_s": speed.pop("tokens_per_s")}


def render(whole: Whole) -> list[RenderableType]:
    """All of it for people; the bill line by line if it was asked for."""
    plan = whole.plan
    parts: list[RenderableType] = [
        _meaning(plan.question, whole.wanted),
        _comparison_table(plan.comparisons, (plan.recommended or plan.fits[-1]).gpus),
        _memory_table(plan),
        _recommendation(plan),
    ]
    if plan.speed:
        parts += ["", _speed_lines(plan)]
    parts += ["", *limits.render(whole.limits), *advice.render(whole.advice, whole.speedups)]
    if whole.bill and whole.detailed:
        parts += cost.render(whole.bill)
    return parts + [f"note: {caveat}" for caveat in plan.caveats]


def _meaning(question: Question, wanted: Recipe) -> str:
    base, load = question.base, question.load
    spec, gpu, scheme = base.spec, base.hardware, base.scheme
    size = f"{plain(spec.num_params / 1e9, 3)} B parameters"
    if spec.experts:
        size += f", {plain(spec.num_active_params / 1e9, 3)} B of them for a token"
    heads = f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads"
    memory = f"{gpu.memory_gib:g} GiB usable of {gpu.memory_gb:g} GB, {gpu.bandwidth_gb_s:,.0f} GB/s"
    batch = f", {question.needed} in one batch" if question.needed < load.concurrency else ""
    meanings = [
        (wanted.model, f"{spec.name}: {size}, {spec.num_layers} layers, {heads}, context {spec.max_context:,}"),
        (str(wanted.gpu), f"{gpu.name}: {memory}, {gpu.bf16_tflops:g} TFLOPS in 16 bits"),
        (scheme.name, f"{scheme.bits_per_weight:.4g} bits a weight: {scheme.note}"),
        (
            "load",
            f"{load.concurrency} requests at once{batch}, {load.input_len:,.0f} tokens in, {load.output_len:,.0f} out",
        ),
    ]
    return lines([(name, f"= {meaning}") for name, meaning in meanings])


def _comparison_table(comparisons: list[Comparison], gpus: int) -> RenderableType:
    rows = []
    for comparison in comparisons:
        for kind, figure in (("rule of thumb", comparison.rule), ("exact", comparison.exact)):
            values = [_amount(value, comparison.unit) for value in sorted({figure.low, figure.high})]
            rows.append((f"{comparison.name}, {kind}: {figure.formula}", " to ".join(values)))
    return table(f"\nBy hand and exactly, {_gpus(gpus)} (GB = 1e9 bytes)", ("formula", "gives"), rows)


def _amount(value: float, unit: str) -> str:
    return f"{plain(value / GB, 4)} GB" if unit == "bytes" else f"{plain(value * 1e3, 3)} ms"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _memory_table(plan: Plan) -> RenderableType:
    columns = ("GPUs", "weights", "activations", "non-torch", "KV cache", "KV tokens", "requests", "verdict")
    rows = [
        (
            _split(fit),
            *(f"{part / GIB:.2f}" for part in _parts(fit)),
            f"{fit.kv_tokens:,}",
            f"{fit.max_requests:,}",
            fit.reason,
        )
        for fit in plan.fits
    ]
    usable = plan.fits[0].budget.usable / GIB
    return table(f"Memory of each GPU in GiB (1024^3 bytes), {usable:.2f} of it to use", columns, rows)


def _split(fit: Fit) -> str:
    return str(fit.gpus) if fit.on.pp == 1 else f"{fit.gpus} (tp {fit.on.tp}, pp {fit.on.pp})"


def _parts(fit: Fit) -> tuple[float, ...]:
    memory = fit.budget
    return memory.weights, memory.activations, memory.non_torch, max(memory.free, 0.0)


def _recommendation(plan: Plan) -> str:
    name, scheme = plan.question.base.hardware.name, plan.question.base.scheme.name
    fit, limit = plan.recommended, plan.question.max_model_len
    if fit is None:
        said = f"Recommended: none, {scheme} does not fit {_gpus(plan.fits[-1].gpus)}."
    else:
        said = f"Recommended: {fit.gpus} x {name} in {scheme} ({fit.reason})."
        if fit.kv_tokens < limit:
            said += f" Start the engine with --max-model-len {fit.kv_tokens} or less: {limit:,} do not fit."
    smaller = [f"{scheme.name}: {_gpus(other.gpus)} ({other.reason})" for scheme, other in plan.smaller]
    return said + (f"\nIn fewer bits: {'; '.join(smaller)}." if smaller else "")


def _speed_lines(plan: Plan) -> str:
    speed, fit = plan.speed, plan.recommended
    assert speed
    assert fit
    return lines(
        [
            ("speed", f"closed form, {speed.batch} requests at once on {_gpus(fit.gpus)}"),
            ("prefill", f"{speed.prefill * 1e3:,.1f} ms for one prompt"),
            ("TTFT", _with_band(speed.ttft, speed.ttft_band)),
            ("TPOT", _with_band(speed.tpot, speed.tpot_band)),
            ("output", _throughput(speed, fit)),
            *_speculation_lines(plan),
            *_cost_lines(plan, fit.gpus, speed.tokens_per_s),
        ]
    )


def _speculation_lines(plan: Plan) -> list[tuple[str, str]]:
    gain, draft = plan.speed and plan.speed.speculation, plan.question.base.draft
    if not gain or not gain.speedup or not draft:
        return []
    said = f"x {plain(gain.speedup, 3)} in decoding: {gain.length:g} tokens a step by {draft.name}, each accepted with "
    return [("drafts", said + f"chance {gain.acceptance:g} (assumed), make {gain.tokens_per_step:.2f} tokens a step")]


def _throughput(speed: Speed, fit: Fit) -> str:
    said = f"{speed.tokens_per_s:,.0f} tokens/s, {speed.tokens_per_s / fit.gpus:,.0f} per GPU"
    band = speed.throughput_band
    if band is None:
        return said
    low, high = (f"{speed.tokens_per_s * factor:,.0f}" for factor in (band.low, band.high))
    return f"{said} ({low} to {high}: {band.basis}{_beyond(band)})"


def _beyond(band: Band) -> str:
    return f"; wider here: {band.outside}" if band.outside else ""


def _with_band(seconds: float, band: Band | None) -> str:
    said = f"{plain(seconds * 1e3, 4)} ms"
    if band is None:
        return f"{said} (no error band: nobody published runs like this)"
    low, high = (plain(seconds * 1e3 * factor, 3) for factor in (band.low, band.high))
    return f"{said} ({low} to {high}: {band.basis}{_beyond(band)})"


def _cost_lines(plan: Plan, gpus: int, tokens_per_s: float) -> list[tuple[str, str]]:
    price, cost = plan.question.price, plan.usd_per_1k
    if price is None or cost is None:
        return [("cost", "no price of this GPU is in the catalogue; give one with --gpu-price")]
    formula = f"${price.usd_per_hour * gpus:,.2f}/h x {plain(1000 / tokens_per_s, 3)} s per 1K / 3600"
    return [
        ("cost", f"${plain(cost, 3)} per 1K output tokens = {formula}; ${plain(cost * 1e3, 3)} per 1M"),
        ("price", f"${price.usd_per_hour:,.2f} an hour for one: {price.source}"),
    ]
