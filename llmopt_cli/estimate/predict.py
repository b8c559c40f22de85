"""What a run on an engine is expected to show: the closed forms on the recipe, traffic and machine of a bench.

Knows no result file and fits nothing. All figures are means in a steady state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate import host
from llmopt_cli.estimate.constants import find_engine
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import resolve_draft
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.slo import keep_up, request_rate
from llmopt_cli.estimate.speculation import Decoding
from llmopt_cli.spec.catalog import find_model
from llmopt_cli.spec.checkpoint import BUNDLED, read_json
from llmopt_cli.spec.recipe import Recipe
from llmopt_cli.spec.result import Environment
from llmopt_cli.spec.scheme import Scheme, cache_of, find_scheme
from llmopt_cli.spec.workload import Workload

Bound = Literal["overhead", "memory", "compute"]
ENDLESS = 1e12  # GB/s or TFLOPS that take no time
MOST = 4096  # requests at once, above which an open loop counts as one that is not kept up with


@dataclass(frozen=True, slots=True)
class Prediction:
    """Mean seconds to the first token and for each one after it, output tokens a second of all requests together.

    `bound` is what takes the largest part of a token's time; `basis` is whose constants these are; `decoding` is None
    without speculation.
    """

    ttft: float
    tpot: float
    output_throughput: float
    bound: Bound
    basis: str
    decoding: Decoding | None

    def record(self) -> dict[str, Any]:
        """As a result keeps it, figures named as in its metrics."""
        return {
            "mean_ttft_ms": 1e3 * self.ttft,
            "mean_tpot_ms": 1e3 * self.tpot,
            "output_throughput": self.output_throughput,
            "bound": self.bound,
            "basis": self.basis,
        } | ({"speculation": asdict(self.decoding.asked())} if self.decoding else {})


def expect(recipe: Recipe, workload: Workload, environment: Environment) -> Prediction:
    """What `workload` will show on the engine of `recipe`, with what was learned of the machine.

    Raises UsageError or CheckpointError where it cannot be told: an unknown machine, model, precision, or a rate of
    requests that cannot be kept up with.
    """
    on = host.tuned(deployment(recipe, environment))
    step, load = StepModel(on), load_of(workload, on)
    rate = workload.arrivals.rate
    if workload.arrivals.concurrency is None:
        load = _kept_busy(step, load, rate)
    known = host.calibration_of(on)
    return Prediction(
        ttft=step.ttft(load),
        tpot=step.tpot(load),
        output_throughput=(rate or request_rate(step, load)) * load.output_len,
        bound=bound(on, load),
        basis=known.basis() if known else f"constants of {on.engine.name}, not calibrated on {on.hardware.name}",
        decoding=Decoding(step, step.running(load), load.context) if on.draft else None,
    )


def deployment(recipe: Recipe, environment: Environment) -> Deployment:
    """The engine that ran (or will run) `recipe` in `environment`, with the constants it has everywhere."""
    spec, scheme = find_model(recipe.model), stored_scheme(recipe)
    return Deployment(
        spec=spec,
        hardware=host.accelerator_of(environment, recipe.device, scheme),
        scheme=scheme,
        tp=recipe.tensor_parallel_size or 1,
        pp=recipe.pipeline_parallel_size,
        engine=find_engine(recipe.engine),
        kv=cache_of(recipe.kv_cache_dtype, scheme),
        batching=recipe.batching,
        draft=resolve_draft(recipe.speculation, spec) if recipe.speculation else None,
    )


def stored_scheme(recipe: Recipe) -> Scheme:
    """What the weights of a recipe's model are stored and run in; raises UsageError for what no closed form knows."""
    config = _config(recipe.model)
    quantized = config.get("quantization_config")
    if not quantized:
        stored = config.get("dtype") or config.get("torch_dtype") or "auto"
        return find_scheme(str(stored) if recipe.dtype == "auto" else recipe.dtype)
    scheme = find_scheme(str(quantized.get("quant_method")))
    if quantized.get("bits", scheme.weight_bits) != scheme.weight_bits:
        raise UsageError(f"no closed form knows {quantized['bits']}-bit {scheme.name}")
    return scheme


def _config(model: str) -> dict[str, Any]:
    """config.json of a model that lies here; a name of the catalogue stands for the unquantized model."""
    path = (BUNDLED.get(model) or Path(model).expanduser()) / "config.json"
    return read_json(path) if path.is_file() else {}


def load_of(workload: Workload, on: Deployment) -> Load:
    """The requests of a workload as they will be sent, clipped to the context."""
    context = on.batching.max_model_len or on.spec.max_context
    return replace(Load.of(workload, context), sizes=tuple(workload.sizes(context)[0]))


def _kept_busy(step: StepModel, load: Load, rate: float | None) -> Load:
    """The requests that an open loop has under way."""
    if rate is None:
        raise UsageError("a trace at its own times has no steady state")
    busy = keep_up(step, load, rate, MOST)
    if busy is None:
        raise UsageError(f"{rate:g} requests/s are more than it can keep up with, by the closed form")
    return busy


def bound(on: Deployment, load: Load) -> Bound:
    """What takes most of a token's time: what no faster memory or arithmetic would shorten, or one of these two."""

    def tpot(**rates: float) -> float:
        return StepModel(replace(on, hardware=replace(on.hardware, **rates))).tpot(load)  # type: ignore[arg-type]

    overhead = tpot(bandwidth_gb_s=ENDLESS, bf16_tflops=ENDLESS)
    parts: dict[Bound, float] = {
        "overhead": overhead,
        "memory": tpot(bf16_tflops=ENDLESS) - overhead,
        "compute": tpot(bandwidth_gb_s=ENDLESS) - overhead,
    }
    return max(parts, key=lambda part: parts[part])
