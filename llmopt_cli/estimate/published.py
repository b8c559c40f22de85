"""Rows of published measurements in our words: which deployment, which load, which figure; or why a row is skipped.

The columns are those of `published_measurements.csv`; `published_names` has what publishers call things. Knows nothing
of errors or bands.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate import published_names as names
from llmopt_cli.estimate.bands import kind as kind_of
from llmopt_cli.estimate.constants import Constants
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.pool import own_batching
from llmopt_cli.estimate.published_names import Skipped
from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import KvDtype, Scheme, find_kv_dtype
from llmopt_cli.spec.workload import Size

COLUMNS = (
    *("id", "source", "engine", "engine_version", "model", "gpu", "gpu_count", "tp", "pp", "weight_precision"),
    *("kv_dtype", "scenario", "batch_or_concurrency", "input_len", "output_len", "metric", "value", "unit", "notes"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row resolved. `kind` is `dense`, `moe` or `memory`.

    `figure` is what is predicted, `value` what was measured, both in the row's unit, on `gpus` of all servers together.
    """

    row: Mapping[str, str]
    on: Deployment
    load: Load
    kind: str
    figure: str
    value: float
    gpus: int


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; raises UsageError where it is no CSV of these columns."""
    try:
        with path.open(encoding="utf-8", newline="") as text:
            reader = csv.DictReader(text)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} has no column `{missing[0]}`", f"it needs: {', '.join(COLUMNS)}")
            return [{name: row[name] or "" for name in COLUMNS} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def resolve(row: Mapping[str, str]) -> Case:
    """A row in our words; raises Skipped with the reason."""
    figure = _figure(row)
    spec, hardware, engine = names.model(row["model"]), names.card(row["gpu"]), _engine(row)
    layout = _layout(row)
    on = _deployment(row, layout, spec, hardware, engine)
    memory = row["scenario"] == "memory" or "vram" in row["metric"]
    kind = "memory" if memory else kind_of(spec)
    gpus = int(_number(row["gpu_count"] or "1", "gpu_count"))
    load = _load(row, layout)
    if load.input_len + load.output_len < 1 or (not load.output_len and figure not in ("prefill_tok_s", "peak_gb")):
        raise Skipped("no length of the answers")
    if not load.input_len and figure == "prefill_tok_s":
        raise Skipped("no length of the prompts")
    return Case(row, on, load, kind, figure, _number(row["value"], "value"), gpus)


# (scenario, metric) -> the figure it is compared with, by pattern of "scenario/metric".
_FIGURES = {
    r"online_closed_loop/tpot_ms": "tpot_ms",
    r"online_closed_loop/ttft_ms": "ttft_ms",
    r"offline_max_throughput/output_tok_s_(total|per_gpu)": "offline_tok_s",
    r"(decode_b1|static_batch)/decode_tok_s": "decode_tok_s",
    r"(prefill|static_batch|decode_b1)/prefill_tok_s": "prefill_tok_s",
    r"static_batch/output_tok_s": "static_tok_s",
    r".*/weights_per_gpu": "weights_gib",
    r".*/activation_peak_per_gpu": "activations_gib",
    r".*/non_torch_per_gpu": "non_torch_gib",
    r".*/kv_available_per_gpu": "kv_gib",
    r".*/kv_capacity_tokens": "kv_tokens",
    r".*/peak_vram(_total)?": "peak_gb",
}
_UNKNOWN_LENGTHS = re.compile(r"sharegpt|U\(", re.IGNORECASE)


def _figure(row: Mapping[str, str]) -> str:
    asked = f"{row['scenario']}/{row['metric']}"
    if row["metric"] == "achieved_weight_bw_per_gpu":
        raise Skipped("a bandwidth that follows from another row")
    if row["metric"] == "cuda_graph_delta":
        raise Skipped("the graphs' share is part of the profile, not a figure of its own")
    if _UNKNOWN_LENGTHS.search(row["input_len"]):
        raise Skipped("lengths drawn from a data set that the row does not hold")
    if asked.startswith(("prefill_throughput", "decode_throughput")):
        raise Skipped("neither batch nor lengths are published")
    figure = names.first(_FIGURES, asked)
    if figure is None:
        raise Skipped(f"no figure for {asked}")
    if figure == "decode_tok_s" and row["batch_or_concurrency"] in ("", "1"):
        return "decode_b1_tok_s"
    return figure


def _number(text: str, what: str) -> float:
    found = re.search(r"-?\d+(\.\d+)?(e[-+]?\d+)?", text.replace(",", ""))
    if not found or not math.isfinite(number := float(found[0])) or number <= 0:
        raise Skipped(f"{what} is no positive number")
    return number


# TensorRT-LLM 1.3.0rc1: 85-92 ms a token for 61 layers and 47-60 ms for 36, whatever the batch. A host that launches
# every kernel of a layer needs that long (1.3-1.5 ms); no other version shows it.
_EAGER = {"1.3.0rc1": 1.33e-3}


def _engine(row: Mapping[str, str]) -> Constants:
    engine = names.engine(row["engine"])
    if row["engine"] == "trtllm" and row["engine_version"] in _EAGER:
        engine = replace(engine, host_s=_EAGER[row["engine_version"]])
    told = re.search(r"util(?:ization)?[ =](0\.\d+)", row["notes"])
    return replace(engine, memory_utilization=float(told[1])) if told else engine


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a row's GPUs share the model: `servers` of it, each with as many requests."""

    tp: int
    pp: int
    attention_dp: int = 1
    expert_parallel: bool = False
    servers: int = 1


_SERVER = 8  # GPUs: what a row calls one tensor-parallel group of 24 to 52 are several servers of these


def _layout(row: Mapping[str, str]) -> _Layout:
    """From the columns, the notes and the name of a run, which contradict each other."""
    tp, pp, count = (int(_number(row[name] or "1", name)) for name in ("tp", "pp", "gpu_count"))
    notes = {name: int(value) for name, value in re.findall(r"(attn_dp|moe_tp|moe_ep)=(\d+)", row["notes"])}
    experts = notes.get("moe_ep", 1) > 1
    if "DEP" in row["notes"] and count > 1:
        return _Layout(count, 1, attention_dp=count, expert_parallel=True)
    named = re.search(r"_c(\d+)_tp(\d+)_", row["source"])
    asked = _asked(row)
    if tp > 2 * _SERVER and not experts:
        return _Layout(_SERVER, pp, servers=tp // _SERVER)
    if named and asked:  # all requests of the run / those of one group
        tp = max(1, int(named[2]))
        return _Layout(tp, pp, min(tp, max(1, int(named[1]) // asked)), experts)
    if experts and notes.get("moe_tp") == notes["moe_ep"]:
        return _Layout(notes["moe_tp"], pp, expert_parallel=True)  # the product of two views of the same GPUs
    return _Layout(tp, count if tp * pp == 1 and "layer split" in row["notes"] else pp, expert_parallel=experts)


def _deployment(
    row: Mapping[str, str], layout: _Layout, spec: ModelSpec, hardware: Hardware, engine: Constants
) -> Deployment:
    scheme = names.scheme("nf4" if "bnb-4bit" in row["model"] else row["weight_precision"], spec, row["notes"])
    return Deployment(
        spec=spec,
        hardware=_utilized(row, hardware),
        scheme=scheme,
        tp=layout.tp,
        pp=layout.pp,
        engine=engine,
        kv=_kv_dtype(row, scheme),
        batching=_batching(row, engine, hardware),
        attention_dp=layout.attention_dp,
        expert_parallel=layout.expert_parallel,
    )


def _kv_dtype(row: Mapping[str, str], scheme: Scheme) -> KvDtype:
    """As the row says; where it does not, NVIDIA's FP8 and FP4 checkpoints for TensorRT-LLM keep an FP8 cache."""
    own = row["kv_dtype"].lower()
    trtllm = row["engine"].lower() in ("trtllm", "tensorrt-llm")
    nvidia = not own and trtllm and scheme.compute in ("fp8", "fp4") and "Qwen3-235B-A22B-FP8" not in row["model"]
    return find_kv_dtype("fp8" if "fp8" in own or nvidia else "auto")


def _utilized(row: Mapping[str, str], hardware: Hardware) -> Hardware:
    """Of the memory that a log names, as far as it names it."""
    named = re.search(r"([\d.]+) GiB", row["gpu"])
    return replace(hardware, memory_gib=float(named[1])) if named else hardware


# vLLM 0.11.2, 512 clients: two runs in which each waited 4-5 times as long as it was served.
_SEQS = {"0.11.2": 128}


def _batching(row: Mapping[str, str], engine: Constants, hardware: Hardware) -> Batching:
    """The engine's own on this GPU, and as many requests as a closed loop or a static batch has."""
    usual = own_batching(engine, hardware)
    told = re.search(r"max_num_seqs=(\d+)", row["batch_or_concurrency"])
    seqs = _asked(row) or (int(told[1]) if told else usual.max_num_seqs)
    seqs = max(1, min(seqs, _SEQS.get(row["engine_version"], seqs)))
    unchunked = re.search(r"max_model_len (\d+) unchunked", row["notes"])
    tokens = int(unchunked[1]) if unchunked else usual.max_num_batched_tokens
    return replace(usual, max_num_seqs=seqs, max_num_batched_tokens=max(seqs, tokens))


# InferenceX draws lengths evenly from 0.8 to 1.0 of their name; its runs are those that state `attn_dp=1`.
_DRAWN = (0.8, 0.85, 0.9, 0.95, 1.0)
# (input, output) -> requests of an offline run: the data sets that TensorRT-LLM's performance overview has made.
_REQUESTS = {
    (128, 128): 30000,
    (128, 2048): 3000,
    (128, 4096): 1500,
    (500, 2000): 3000,
    (1000, 1000): 3000,
    (1000, 2000): 1500,
    (1024, 8192): 1500,
    (2048, 128): 3000,
    (2048, 2048): 1500,
    (5000, 500): 1500,
    (8192, 1024): 1500,
    (20000, 2000): 1000,
    (32768, 1024): 1000,
}
_MANY = 3000


def _load(row: Mapping[str, str], layout: _Layout) -> Load:
    if row["scenario"] == "memory":
        return Load.fixed(1, 1, 1)
    inputs, outputs = (_number(row[f"{way}_len"], way) if row[f"{way}_len"] not in ("", "0") else 0.0 for way in _WAYS)
    if not inputs and not outputs:
        outputs = 256.0  # a chat's first answer, where nothing is said
    drawn = "attn_dp=1 " in row["notes"]
    endless = _REQUESTS.get((int(inputs), int(outputs)), _MANY)
    requests = _requests(_asked(row), layout, endless)
    sizes = tuple(Size(round(inputs * share), round(outputs * share)) for share in (_DRAWN if drawn else (1.0,)))
    return Load(max(1, requests), sizes)


_WAYS = ("input", "output")


def _asked(row: Mapping[str, str]) -> int | None:
    """The batch or the concurrency, where it is a number (and not `inf`)."""
    text = row["batch_or_concurrency"]
    return int(_number(text, "batch_or_concurrency")) if re.fullmatch(r"[0-9]+", text) else None


def _requests(asked: int | None, layout: _Layout, endless: int) -> int:
    """Of one server; a row counts those of one data parallel group, or of all servers together."""
    return endless if asked is None else math.ceil(asked * layout.attention_dp / layout.servers)


def resolved(rows: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], Case | str]]:
    """Every row with its case, or the reason why it has none."""
    for row in rows:
        try:
            yield row, resolve(row)
        except Skipped as reason:
            yield row, str(reason)
