"""Teaching heads that draft: the model writes, its hidden states are kept, heads learn to foresee them.

The model is frozen, and what it says is the whole lesson. Knows steps, time and scores; what a head computes and how it
errs is its own business (`train_medusa`, `train_eagle`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmopt_cli.model.load import LoadedModel
from llmopt_cli.output import Report

WARM = 0.05  # of the steps, in which the rate rises
LONGEST_STEP = 1.0  # norm of a gradient
DECAY = 0.01
SCORED = 16  # windows scored at once


class Pupil(Protocol):
    """Heads that learn."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is learnt."""
        ...

    def loss(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """How far off the heads are on windows `ids` (B, L) with the model's `hidden` states (B, L, H)."""
        ...

    def ranks(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """How many tokens are likelier than what the model says, for each place of a draft: int64 (B, L - n, n).

        Row t is of a draft behind token t + 1; its places after a wrong one are as if that had been right.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        ...


@dataclass(frozen=True)
class Course:
    """How to learn: so many passes over the windows, so many of them a step, at a peak learning `rate`.

    It ends early after so many `seconds`, the rate lowered in time.
    """

    passes: float
    batch: int
    rate: float
    seconds: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Learnt:
    """What became of a course: `steps` of those planned, in `seconds`; whether the user stopped it."""

    steps: int
    planned: int
    seconds: float
    stopped: bool


@dataclass(frozen=True)
class Score:
    """Drafts on held-out text: `accuracy` of each place of a draft by itself, and tokens that a step brings."""

    accuracy: tuple[float, ...]
    tokens_per_step: tuple[float, ...]  # with drafts of 1, 2, ... tokens


@torch.no_grad()
def hidden_states(loaded: LoadedModel, ids: Tensor, report: Report) -> Tensor:
    """(N, L, H) in the model's dtype: what its output head reads, for windows `ids` (N, L)."""
    positions = torch.arange(ids.shape[1], device=loaded.device)[None]
    found = []
    for done, window in enumerate(ids, 1):
        ran: Any = loaded.model.base_model(
            input_ids=window[None].to(loaded.device), position_ids=positions, use_cache=False
        )
        found.append(ran.last_hidden_state[0])
        report(done, len(ids))
    return torch.stack(found)


def learn(pupil: Pupil, ids: Tensor, hidden: Tensor, course: Course, report: Report) -> Learnt:
    """Teach `pupil` windows `ids` (N, L) with hidden states (N, L, H). Ctrl-C ends it: what was learnt stays."""
    planned = max(1, round(course.passes * len(ids) / course.batch))
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=course.rate, betas=(0.9, 0.95), weight_decay=DECAY)
    begun, done = time.monotonic(), 0
    try:
        for chosen in _batches(len(ids), course, planned):
            past, spent = done / planned, (time.monotonic() - begun) / course.seconds
            if spent > (done + 1) / planned:  # else the clock decides nothing: the same seed gives the same heads
                past = spent
            if past >= 1:
                break
            optimizer.param_groups[0]["lr"] = course.rate * _slope(past)
            optimizer.zero_grad()
            with torch.autocast(hidden.device.type, torch.bfloat16):  # several times faster where bfloat16 is built in
                loss = pupil.loss(ids[chosen].to(hidden.device), hidden[chosen].float())
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(pupil.parameters(), LONGEST_STEP)
            optimizer.step()
            done += 1
            report(done, planned)
    except KeyboardInterrupt:
        return Learnt(done, planned, time.monotonic() - begun, stopped=True)
    return Learnt(done, planned, time.monotonic() - begun, stopped=False)


def _batches(windows: int, course: Course, steps: int) -> Iterator[Tensor]:
    """Indices of windows for each step; in every pass each comes once."""
    generator = torch.Generator().manual_seed(course.seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < course.batch:
            left = torch.cat((left, torch.randperm(windows, generator=generator)))
        yield left[: course.batch]
        left = left[course.batch :]


def _slope(past: float) -> float:
    """The share of the peak rate after such a share of the course: up in a line, down in half a cosine."""
    if past < WARM:
        return past / WARM + 0.01
    return 0.5 * (1 + math.cos(math.pi * (past - WARM) / (1 - WARM)))


def score(pupil: Pupil, ids: Tensor, hidden: Tensor, begin: int) -> Score:
    """Draft along windows `ids` (N, L) that the model wrote itself from token `begin` on."""
    hits = ranks(pupil, ids, hidden, begin) == 0
    stood = hits.long().cumprod(-1)
    most = hits.shape[-1]
    brought = tuple(walked(stood[..., :length].sum(-1)) for length in range(1, most + 1))
    return Score(tuple(hits.float().mean((0, 1)).tolist()), brought)


@torch.no_grad()
def ranks(pupil: Pupil, ids: Tensor, hidden: Tensor, begin: int) -> Tensor:
    """Those of `pupil` int64 (N, L - n - begin + 1, n), along windows that the model wrote from token `begin` on."""
    parts = [
        pupil.ranks(ids[at : at + SCORED].to(hidden.device), hidden[at : at + SCORED].float()).cpu()
        for at in range(0, len(ids), SCORED)
    ]
    return torch.cat(parts)[:, begin - 1 :]


def walked(stood: Tensor) -> float:
    """Tokens a step, going through each row of `stood` (N, T) from draft to draft."""
    steps = tokens = 0
    for row in stood.tolist():
        place = 0
        while place < len(row):
            steps += 1
            tokens += row[place] + 1
            place += row[place] + 1
    return tokens / max(1, steps)
