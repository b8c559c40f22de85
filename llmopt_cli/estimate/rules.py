"""The rules of thumb that everybody computes by hand, and the exact figures beside them.

The rules know neither grouped-query attention nor an engine's overheads, and nothing else is computed from them.
Bytes and seconds; 1 GB = 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.figures import plain
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import (
    KV_BYTES,
    Budget,
    Layout,
    covered_params,
    kv_sequence_bytes,
    kv_values_per_layer,
    layout_of,
    sequence_bytes,
    state_bytes,
    weight_bytes,
)
from llmopt_cli.spec.hardware import GB
from llmopt_cli.spec.model import ModelSpec

OVERHEAD = (1.2, 1.3)  # activations and the rest: 20-30 % on top of weights and KV cache


def parameter_bytes(num_params: float, bits: float) -> float:
    """Parameters x bytes."""
    return num_params * bits / 8


def kv_bytes(num_layers: int, hidden_size: int, length: int, batch: int, bytes_per_value: float = KV_BYTES) -> float:
    """2 x layers x d_model x length x bytes x batch: keys and values as multi-head attention would keep them."""
    return 2 * num_layers * hidden_size * length * bytes_per_value * batch


def total_bytes(weights: float, kv: float) -> tuple[float, float]:
    """Weights and KV cache with the low and the high overhead."""
    return OVERHEAD[0] * (weights + kv), OVERHEAD[1] * (weights + kv)


def seconds_per_token(weights: float, bandwidth: float) -> float:
    """Decoding one sequence reads every weight once a token: bytes / bytes per second."""
    return weights / bandwidth


@dataclass(frozen=True, slots=True)
class Figure:
    """A formula with its numbers, and what it gives: one value, or a low and a high one."""

    formula: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure by its rule and exactly."""

    name: str
    unit: Literal["bytes", "seconds"]
    rule: Figure
    exact: Figure


def side_by_side(step: StepModel, budget: Budget, load: Load) -> list[Comparison]:
    """The rules for a load on the GPUs of `step`, each beside the exact figure for all of them together."""
    spec, on, batch, length = step.spec, step.on, load.concurrency, load.length
    weights = parameter_bytes(spec.num_params, on.scheme.weight_bits)
    kv = kv_bytes(spec.num_layers, spec.hidden_size, length, batch)
    token = seconds_per_token(weights, on.gpus * step.hardware.bandwidth)
    rule_kv = (
        f"2 x {spec.num_layers} layers x {spec.hidden_size} x {length:,} tokens x {KV_BYTES:g} B x {batch} requests"
    )
    return [
        Comparison(
            "weights",
            "bytes",
            _one(f"{_count(spec.num_params)} parameters x {on.scheme.weight_bits / 8:g} B", weights),
            _one(_weights_formula(step), on.gpus * budget.weights),
        ),
        Comparison("KV cache", "bytes", _one(rule_kv, kv), _exact_kv(on, length, batch)),
        Comparison(
            "all of it",
            "bytes",
            Figure("(weights + KV cache) x 1.2 to 1.3", *total_bytes(weights, kv)),
            _exact_total(on, budget, length, batch),
        ),
        Comparison(
            "time per token, one request",
            "seconds",
            _one(f"{plain(weights / GB, 4)} GB / ({on.gpus} x {step.hardware.bandwidth_gb_s:,.0f} GB/s)", token),
            _one("bytes / (efficiency x bandwidth) + launches + all-reduces", step.tpot(load.at(1))),
        ),
    ]


def _one(formula: str, value: float) -> Figure:
    return Figure(formula, value, value)


def _count(params: int) -> str:
    return f"{params / 1e9:,.2f} B" if params >= 1e9 else f"{params / 1e6:,.2f} M"


def _weights_formula(step: StepModel) -> str:
    spec, scheme, gpus = step.spec, step.scheme, step.on.gpus
    covered = covered_params(spec, scheme)
    copies = " + what each GPU needs a copy of" if gpus > 1 else ""
    if scheme.covers == "all":
        mean = 8 * weight_bytes(spec, scheme) / spec.num_params
        return f"{_count(covered)} x {mean:.4g} bits on average{copies}"
    what = {"linear": "in linear layers", "experts": "in experts"}[scheme.covers]
    others = spec.num_params - covered
    rest = f" + {_count(others)} others x {scheme.other_bits:g} bits" if others else ""
    return f"{_count(covered)} {what} x {scheme.bits_per_weight:.4g} bits{rest}{copies}"


def _exact_kv(on: Deployment, length: int, batch: int) -> Figure:
    spec, value_bytes, layout = on.spec, on.kv_bytes, layout_of(on.engine)
    state = on.attention_tp * batch * state_bytes(spec, on.attention_tp) if layout == "engine" else 0.0
    one_copy = batch * kv_sequence_bytes(spec, length, value_bytes, layout=layout)
    held = on.attention_tp * batch * kv_sequence_bytes(spec, length, value_bytes, on.attention_tp, layout)
    copies = f" x {held / one_copy:.3g} copies" if held > one_copy else ""
    rest = f" + {plain(state / GB, 3)} GB of constant state" if state else ""
    cached = f"{_cached(spec, layout)} x {length:,} tokens x {value_bytes:.4g} B x {batch} requests"
    return _one(cached + copies + rest, held + state)


def _cached(spec: ModelSpec, layout: Layout) -> str:
    """What is kept of one token, in words."""
    if spec.latent and layout == "engine":
        said = f"{spec.num_layers - spec.num_linear_layers} layers x {kv_values_per_layer(spec)} latent values"
    elif spec.latent:
        said = f"{spec.num_layers} layers x {kv_values_per_layer(spec, layout)} values"
    else:
        said = f"2 x {spec.num_layers} layers x {spec.num_kv_heads} of {spec.num_heads} heads x {spec.head_dim}"
    if layout == "llmopt":
        return said
    if spec.num_sliding_layers:
        said += f" ({spec.num_sliding_layers} layers: the last {spec.sliding_window:,} tokens)"
    if spec.num_linear_layers and not spec.latent:
        said += f" ({spec.num_linear_layers} layers: none)"
    return said


def _exact_total(on: Deployment, budget: Budget, length: int, batch: int) -> Figure:
    beside = budget.activations + budget.non_torch
    formula = f"weights + KV cache + {on.gpus} x {beside / GB:.2f} GB of activations and non-torch memory"
    return _one(formula, on.gpus * (budget.weights + beside + batch * sequence_bytes(on, length)))
