"""From texts to a folder of heads: the model writes on from them, the heads learn from that, and are tried elsewhere.

Knows the order of work and what is stored; not how texts become tokens, nor how heads learn.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import InterruptedWorkError, UnknownNameError, UsageError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.output import Report
from llmopt_cli.runtime.engine import Engine
from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.runtime.speculative.eagle import angles
from llmopt_cli.runtime.speculative.heads import EAGLE_FILE, KINDS, MEDUSA_FILE, write_heads
from llmopt_cli.runtime.speculative.heads_output import commonest, output_matrix
from llmopt_cli.runtime.speculative.train import Course, Pupil, Score, hidden_states, learn, score
from llmopt_cli.runtime.speculative.train_eagle import EaglePupil
from llmopt_cli.runtime.speculative.train_medusa import MedusaPupil
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint
from llmopt_cli.spec.recipe import Batching

PROMPT = 4  # the model writes on from this part of a window
HELD = 48  # windows of held-out text, at most
BATCH = 2  # windows a step
PASSES = {"medusa": 16.0, "eagle": 6.0}
RATES = {"medusa": 2e-3, "eagle": 2e-3}
MEDUSA_LAYERS = 2
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Lesson:
    """What is wanted: heads of a `kind` that draft `count` tokens, in at most so many `seconds` of learning.

    With `rewritten`, they learn from what the model writes on from the texts, not from these themselves.
    """

    kind: str
    count: int = 4
    rewritten: bool = True
    seconds: float = 600.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What was learnt: on `tokens` tokens in `steps` of `planned` steps and `seconds`, and how the heads draft."""

    model: str
    kind: str
    path: str
    tokens: int
    steps: int
    planned: int
    seconds: float
    held_tokens: int
    score: Score


def folder_for(checkpoint: Checkpoint, kind: str, out: Path | None, overwrite: bool) -> Path:
    """Where heads go: beside a local model, else into the current folder. UsageError if something is there."""
    if kind not in KINDS:
        raise UnknownNameError("kind of heads", kind, KINDS)
    local = checkpoint.name not in BUNDLED and "/" not in checkpoint.name
    beside = checkpoint.path.resolve().parent if local else Path()
    folder = beside / f"{checkpoint.name.rpartition('/')[2]}-{kind}" if out is None else out
    if folder.exists() and not (overwrite and folder.is_dir()) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"`{folder}` exists already", "give another folder with --out, or add --overwrite")
    return folder


def train_heads(
    checkpoint: Checkpoint,
    lesson: Lesson,
    texts: Tensor,
    held: Tensor,
    folder: Path,
    progress: Progress,
    device: str = "auto",
) -> Outcome:
    """Teach heads on windows `texts` int64 (N, L), try them on `held` (M, L), and write them into `folder`.

    InterruptedWorkError on Ctrl-C: heads that had begun to learn are written as they are then.
    """
    with progress(f"loading {checkpoint.name}") as report:
        loaded = load_model(checkpoint, device=device, report=report)
    ids, tried = texts, held[:HELD]
    prompt = max(1, texts.shape[1] // PROMPT)
    if lesson.rewritten:
        with progress("the model writes") as report:
            ids = written(checkpoint, loaded, texts[:, :prompt], texts.shape[1], report)
    with progress("the model writes for the trial") as report:
        tried = written(checkpoint, loaded, tried[:, :prompt], tried.shape[1], report)
    with progress("hidden states") as report:
        hidden = hidden_states(loaded, torch.cat((ids, tried)), report)
    torch.manual_seed(lesson.seed)
    tokens = commonest(ids, checkpoint.spec.vocab_size).to(loaded.device)
    pupil, config, file = pupil_for(checkpoint, loaded, tokens, lesson)
    course = Course(PASSES[lesson.kind], BATCH, RATES[lesson.kind], lesson.seconds, lesson.seed)
    with progress(f"teaching {lesson.kind}") as report:
        learnt = learn(pupil, ids, hidden[: len(ids)], course, report)
    if not learnt.steps:
        raise InterruptedWorkError("stopped before anything was learnt")
    write_heads(
        folder,
        file,
        config,
        {name: one.to(loaded.dtype) if one.is_floating_point() else one for name, one in pupil.tensors().items()},
    )
    if learnt.stopped:
        raise InterruptedWorkError(
            f"stopped after {learnt.steps} of {learnt.planned} steps; what was learnt is in `{folder}`",
            "the same command with --overwrite learns all of it",
        )
    found = score(pupil, tried, hidden[len(ids) :], prompt)
    counts = (ids.numel(), learnt.steps, learnt.planned, learnt.seconds, tried[:, prompt:].numel())
    return Outcome(checkpoint.name, lesson.kind, str(folder), *counts, found)


def written(checkpoint: Checkpoint, loaded: LoadedModel, prompts: Tensor, length: int, report: Report) -> Tensor:
    """int64 (N, length): `prompts` (N, P), and what the model finds likeliest to come behind them, token by token."""
    batching = Batching(max_model_len=length, enable_prefix_caching=False)
    engine = Engine(checkpoint, loaded, Tokenizer(checkpoint), batching)
    try:
        params = SamplingParams(max_tokens=length - prompts.shape[1], ignore_eos=True)
        outputs = engine.generate(prompts.tolist(), params, report)
    finally:
        engine.close()
    return torch.cat((prompts, torch.tensor([list(output.token_ids) for output in outputs])), dim=1)


def pupil_for(
    checkpoint: Checkpoint, loaded: LoadedModel, tokens: Tensor, lesson: Lesson
) -> tuple[Pupil, dict[str, Any], str]:
    """Who learns to draft `tokens`, the config.json of what it will be, and the name of its file."""
    output = output_matrix(loaded)
    if lesson.kind == "medusa":
        config = medusa_config(checkpoint, lesson.count)
        return MedusaPupil(output, tokens, lesson.count, MEDUSA_LAYERS), config, MEDUSA_FILE
    config = eagle_config(checkpoint, str(loaded.dtype).removeprefix("torch."))
    embed = loaded.model.get_input_embeddings()
    turns = angles(config, checkpoint.spec.max_context, torch.float32, loaded.device)
    return EaglePupil(config, lambda ids: embed(ids).float(), output, tokens, turns, lesson.count), config, EAGLE_FILE


def medusa_config(checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """config.json of Medusa heads."""
    return {
        "base_model_name_or_path": checkpoint.name,
        "medusa_num_heads": count,
        "medusa_num_layers": MEDUSA_LAYERS,
        "hidden_size": checkpoint.spec.hidden_size,
        "vocab_size": checkpoint.spec.vocab_size,
    }


def eagle_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of an EAGLE head: one Llama layer shaped as one of the model's."""
    spec, config = checkpoint.spec, checkpoint.config
    turning = config.get("rope_parameters") or {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": config.get("rope_theta") or turning.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bias": False,
    }
