"""`--dry-run`: what a job will take and make, from shapes and a few seconds of timing. Nothing is written.

The time is that of every shape's statistics and solver, tried on random numbers, and of the forward passes at the
speed that a product of the same shape was seen to run with. Knows no text: token counts are those asked for.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmopt_cli.model.load import pick_device
from llmopt_cli.quant.blocks import FALLBACK
from llmopt_cli.quant.methods import METHODS
from llmopt_cli.quant.outside import turned_weights
from llmopt_cli.quant.preflight import Layout, misfits, output_bytes, refuse_not_quantizable, stream_bytes
from llmopt_cli.quant.rehearse import rehearse
from llmopt_cli.quant.rotate import Rotation
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.walk import BATCH_TOKENS, Walk
from llmopt_cli.spec.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llmopt_cli.quant.job import Job

PASSES = 2.5  # runs of a block over the calibration text: its groups look at parts of it, then it hands on the states
JUDGED_PASSES = 2  # of the evaluation text: base and quantized
SOLVED_ROWS = 256  # of a weight are solved to learn how long all of them take
SCRATCH = 3  # copies of the largest weight and of its statistics that a solver holds
SCALER_TRIES = 45  # candidate scales, each of which rounds the weight and runs its parent on a batch
SCALER_SOLVES = 3  # of every weight by a method with scales: without one, with the best one, and for good


@dataclass(frozen=True, slots=True)
class Kind:
    """All tensors of one name in their blocks: `bits` a weight as stored, `problem` why the format can't hold them."""

    name: str
    count: int
    shape: tuple[int, ...]
    bits: float
    nbytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will take: bytes of memory and disk while it runs, minutes; and what it makes, and who loads that."""

    model: str
    method: str
    format: str
    kinds: tuple[Kind, ...]
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    disk_bytes: int
    minutes: float
    engines: dict[str, str]


def plan(job: Job, evaluation_windows: int) -> Plan:
    """Look `job` over. Raises what the job itself would refuse, but for shapes: those are listed."""
    checkpoint = refuse_not_quantizable(Checkpoint.open(job.model))
    form, files, wishes = job.layout, job.files, job.wishes
    with Skeleton(checkpoint, pick_device(job.device)) as skeleton:
        parts = Layout.of(skeleton, files.fixed(checkpoint), wishes)
        rotation = Rotation.make(parts.hidden, job.seed, skeleton.device) if wishes.rotate else None
        rehearse(Walk(skeleton), rotation, wishes.scales)
        blocks, memory = len(skeleton.blocks), _memory(job, parts, skeleton)
    output = output_bytes(parts, job.typical, checkpoint)
    tokens = round((job.samples * job.streams + 2 * evaluation_windows) * job.seq_len)
    return Plan(
        model=checkpoint.name,
        method=job.method,
        format=form.name,
        kinds=_kinds(parts, checkpoint, job, files.notes(checkpoint)),
        bytes_before=checkpoint.nbytes,
        bytes_after=output,
        peak_memory_bytes=memory,
        disk_bytes=stream_bytes(parts, tokens) + 2 * output,
        minutes=_seconds(job, parts, blocks, evaluation_windows) / 60,
        engines=dict(form.engines),
    )


def _memory(job: Job, parts: Layout, skeleton: Skeleton) -> int:
    """Bytes for a block with its statistics, or for the outside: with what it becomes, and statistics of the head."""
    outside = sum(
        weight.numel()
        for name, weight in skeleton.model.named_parameters()
        if not name.startswith(f"{skeleton.prefix}.")
    )
    outside *= 2 if parts.ends else 1
    if job.rotate:
        outside += sum(skeleton.model.get_parameter(name).numel() for name in turned_weights(skeleton.model))
    largest = max(sum(weight.numel() for weight in block.parameters()) for block in skeleton.blocks)
    statistics = SCRATCH * max(rows * columns + columns**2 for rows, columns in parts.linears.values())
    widest = max(columns for _, columns in parts.linears.values())
    batch = BATCH_TOKENS * (2 * widest + 4 * parts.hidden)
    held: int = max(largest + statistics, outside + (statistics if job.quantize_head else 0))
    return 4 * (held + batch)


def _kinds(parts: Layout, checkpoint: Checkpoint, job: Job, notes: Mapping[str, str]) -> tuple[Kind, ...]:
    """Quantized tensors by name, shape and precision, then the rest."""
    wrong = [misfits(parts, job.layout, scheme).items() for scheme in job.widths.values() or [job.scheme]]
    problems = {f"{parts.stored[name]}.weight": why for found in wrong for name, why in found}
    shapes = {f"{parts.stored[name]}.weight": shape for name, shape in parts.linears.items()}
    schemes = dict.fromkeys(shapes, job.typical) | dict(parts.fixed)
    headers = dict(checkpoint.tensors) | dict(parts.added)
    kinds: dict[tuple[str, tuple[int, ...], float], list[str]] = {}
    for name in [*shapes, *(name for name in headers if name not in shapes)]:
        shape = shapes[name] if name in shapes else headers[name].shape
        bits = schemes[name].bits_per_weight if name in schemes else 8 * headers[name].nbytes / max(1, math.prod(shape))
        kinds.setdefault((_role(name), shape, bits), []).append(name)
    reasons = problems | dict(notes)
    return tuple(_kind(role, names, shape, bits, reasons.get(names[0])) for (role, shape, bits), names in kinds.items())


def _kind(role: str, names: list[str], shape: tuple[int, ...], bits: float, problem: str | None) -> Kind:
    nbytes = round(len(names) * torch.Size(shape).numel() * bits / 8)
    return Kind(role, len(names), shape, bits, nbytes, problem)


def _role(name: str) -> str:
    """A tensor's name without the numbers of its block and expert."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _seconds(job: Job, parts: Layout, blocks: int, evaluation_windows: int) -> float:
    """Solvers and statistics of all shapes, and all passes through the blocks."""
    tokens = job.samples * job.seq_len
    passes = (PASSES * (2 if job.widths else 1) + job.corrected) * tokens
    judged = JUDGED_PASSES * evaluation_windows * job.seq_len
    total = 0.0
    for shape, count in Counter(parts.linears.values()).items():
        fast, exact, gram, solver = _timed(job, shape)
        total += count * (passes * fast + judged * exact + tokens * gram / 2 + solver)
    return total


def _timed(job: Job, shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """Seconds per token of products, of exact ones and of statistics, and of the solver, for a weight [out, in]."""
    rows, columns = shape
    device = pick_device(job.device)
    x = torch.randn(BATCH_TOKENS, columns, device=device)
    weight = torch.randn(min(rows, SOLVED_ROWS), columns, device=device)
    gram = x.T @ x / len(x) + torch.eye(columns, device=device)
    parts, dtype = rows / len(weight), job.how.products(device)
    exact = _clock(lambda: x @ weight.T) / BATCH_TOKENS * parts
    fast = _clock(lambda: x.to(dtype) @ weight.to(dtype).T) / BATCH_TOKENS * parts
    statistics = _clock(lambda: x.T.to(dtype) @ x.to(dtype)) / BATCH_TOKENS
    scheme = job.scheme if job.layout.misfit(rows, columns, job.scheme) is None else replace(job.scheme, group_size=0)
    method = job.how
    solver = parts * _clock(lambda: method.solver(weight, gram if method.needs_gram else None, scheme))
    if method.scaler is not None:
        rounding = parts * _clock(lambda: METHODS[FALLBACK].solver(weight, None, scheme))
        solver = SCALER_SOLVES * solver + SCALER_TRIES * (BATCH_TOKENS * exact + rounding)
    return fast, exact, statistics, solver


def _clock(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
